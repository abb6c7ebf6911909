"""Makes processors.npz: what the reference's video processors make of noise.

`python -m tests.golden.make_processors`, with transformers, torch and
torchvision installed (made with 5.23, 2.13 and 0.28). The processors resize
bytes, so that their normalised pixels can be stored as bytes again.
"""

import pathlib

import numpy as np

# F, h, w of the frames; least and most tokens of a frame; tokens of a video,
# 0 for no such bound. Enlarged, reduced, and one side each way.
QWEN = (
  (3, 40, 52, 4, 64, 0),
  (2, 100, 34, 1, 64, 0),
  (2, 58, 98, 1, 64, 0),
  (1, 130, 90, 1, 9, 0),
  (5, 90, 90, 1, 9, 12),
)
# F, h, w of the frames; least and most pixels of the clip; tokens of a frame, 0
# for no such bound. Enlarged, reduced, an odd F, and one side below a token.
QWEN3 = (
  (2, 40, 70, 2 * 64 * 96, 10**6, 0),
  (3, 150, 100, 4096, 3 * 64 * 64, 0),
  (2, 20, 70, 4096, 10**6, 0),
  (2, 130, 170, 4096, 10**6, 6),
)
# Of sizes and samples that are compared without pixels.
QWEN3_CASES = 400
# F, h, w, S.
LLAVA = ((2, 30, 70, 48), (1, 90, 31, 48), (2, 17, 20, 40), (1, 40, 40, 40))
SIDE = 28


def noise(index: int, F: int, h: int, w: int) -> np.ndarray:
  """Returns uint8[F,h,w,3], the worst case for filters and rounding."""
  rng = np.random.default_rng(index)
  return rng.integers(0, 256, (F, h, w, 3), np.uint8)


def main():
  import torch
  import transformers

  def run(processor, frames):
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return processor(videos=[video], return_tensors="pt")

  arrays = {}
  for index, (F, h, w, least, most, total) in enumerate(QWEN):
    processor = transformers.Qwen2VLVideoProcessor(
      min_pixels=least * SIDE**2,
      max_pixels=most * SIDE**2,
      cap_pixels_per_frame=bool(total),
      max_video_tokens=total,
    )
    out = run(processor, noise(index, F, h, w))
    values = out["pixel_values_videos"].numpy()
    values = values.reshape(len(values), 3, -1)
    std = np.array(processor.image_std)[:, None]
    mean = np.array(processor.image_mean)[:, None]
    arrays[f"qwen_{index}"] = _bytes(values * std + mean)
    arrays[f"qwen_{index}_grid_thw"] = out["video_grid_thw"].numpy()[0]
  arrays |= _qwen3(run)
  for index, (F, h, w, size) in enumerate(LLAVA):
    processor = transformers.LlavaOnevisionVideoProcessor(
      size={"height": size, "width": size},
      image_mean=[0.5] * 3,
      image_std=[0.5] * 3,
    )
    out = run(processor, noise(index, F, h, w))["pixel_values_videos"]
    arrays[f"llava_{index}"] = _bytes(
      out[0].permute(0, 2, 3, 1).numpy() / 2 + 0.5
    )
  path = pathlib.Path(__file__).with_name("processors.npz")
  np.savez_compressed(path, **arrays)


def _qwen3(run):
  """Returns {name: array} of Qwen3-VL's processor: pixels, sizes, samples."""
  import types

  import transformers
  from transformers.models.qwen3_vl import video_processing_qwen3_vl

  arrays, made = {}, transformers.Qwen3VLVideoProcessor
  for index, (F, h, w, least, most, tokens) in enumerate(QWEN3):
    processor = made(
      size={"shortest_edge": least, "longest_edge": most},
      cap_pixels_per_frame=bool(tokens),
      max_video_tokens=tokens or 768,
      do_sample_frames=False,
    )
    out = run(processor, noise(index, F, h, w))
    arrays[f"qwen3_{index}"] = _bytes(
      out["pixel_values_videos"].numpy() / 2 + 0.5
    )
    arrays[f"qwen3_{index}_grid_thw"] = out["video_grid_thw"].numpy()[0]

  rng = np.random.default_rng(3)
  sides = rng.integers(12, 1500, (QWEN3_CASES, 2))
  counts = rng.integers(2, 200, QWEN3_CASES)
  limits = rng.choice([4096, 131072, 786432, 25165824], (QWEN3_CASES, 2))
  given = np.column_stack([counts, sides, np.sort(limits, axis=1)])
  found = [
    video_processing_qwen3_vl.smart_resize(
      *row[:3], factor=32, min_pixels=row[3], max_pixels=row[4]
    )
    for row in given.tolist()
  ]
  arrays["qwen3_sizes"] = np.column_stack([given, found])
  lengths = rng.integers(1, 3000, QWEN3_CASES)
  rates = rng.choice([5, 23.976, 24, 25, 30000 / 1001, 30, 60], QWEN3_CASES)
  samples = []
  for length, rate in zip(lengths.tolist(), rates.tolist(), strict=True):
    clip = types.SimpleNamespace(total_num_frames=length, fps=rate)
    limits = types.SimpleNamespace(fps=2, min_frames=4, max_frames=64)
    taken = made.sample_frames(limits, clip)
    samples.append(np.pad(taken, (0, 64 - len(taken)), constant_values=-1))
  arrays["qwen3_clips"] = np.column_stack([lengths, rates])
  arrays["qwen3_samples"] = np.stack(samples)
  return arrays


def _bytes(values: np.ndarray) -> np.ndarray:
  levels = np.rint(values * 255)
  assert np.abs(levels - values * 255).max() < 1e-3
  return levels.astype(np.uint8)


if __name__ == "__main__":
  main()
