"""What transformers computes of models whose towers take patches.

Axes: B prompts, L prompt tokens, T time slices, S auxiliary feature maps.
"""

import itertools
from typing import Any

import numpy as np

# From one time slice to the next, of the two clips. Several versions count
# whole seconds only; their positions are compared where that is no matter.
_SECONDS = ((1.0, 0.7), (1.0, 2.0))


def qwen2_5_vl(run, directory, grids) -> dict[str, Any]:
  """Returns the arrays of a golden.npz; `run` is of `parity.transformers`."""
  visual, config = run.model.model.visual, run.config
  inputs = _inputs(run, directory, grids)
  ids, mask = inputs["input_ids"], inputs["attention_mask"]
  seconds, positions, deltas = _counted_seconds(run, inputs)
  inputs["second_per_grid_ts"] = seconds
  arrays, _ = _common(run, inputs, positions, grids)
  order, ends = _windows(visual, run.tensor(inputs["video_grid_thw"]))

  old = _positions_4_50(ids, mask, grids, seconds, config)
  hidden, logits = run.language(arrays["inputs_embeds"], mask, old)
  following = np.where(mask == 1, old, -1).max(axis=(0, 2)) + 1
  return arrays | {
    "window_index": order,
    "cu_window_seqlens": ends,
    "rope_deltas": deltas,
    "v4_position_ids": old,
    "v4_rope_deltas": (following - ids.shape[1])[:, None],
    "v4_last_hidden_state": hidden,
    "v4_logits": logits,
  }


def qwen3_vl(run, directory, grids) -> dict[str, Any]:
  """Returns the arrays of a golden.npz; `run` is of `parity.transformers`."""
  inputs = _inputs(run, directory, grids)
  known = {name: run.tensor(value) for name, value in inputs.items()}
  del known["pixel_values_videos"]
  positions, deltas = map(to_numpy, run.model.model.get_rope_index(**known))
  arrays, tower = _common(run, inputs, positions, grids)
  deep = [_joined(one) for one in tower.deepstack_features]
  return arrays | {"rope_deltas": deltas, "deepstack_features": np.stack(deep)}


def _inputs(run, directory, grids):
  """Returns the model's inputs by name; `grids` int[2, 3] are of tokens."""
  config, vision = run.config, run.config.vision
  count = grids.prod(axis=1).sum() * vision.patches_per_token
  inputs = run.inputs(directory, grids, (count, vision.patch_values))
  is_video = inputs["input_ids"] == config.video_token_id
  return inputs | {
    "video_grid_thw": grids * (1, vision.merge_size, vision.merge_size),
    "mm_token_type_ids": np.where(is_video, 2, 0),  # 2 marks videos.
  }


def _common(run, inputs, positions, grids):
  """Returns (arrays of tower and decoder, what the tower gave)."""
  visual = run.model.model.visual
  modules = dict(patch_embed=visual.patch_embed, tower=visual)
  count = int(grids[0].prod())
  seen, arrays = run.decoder(inputs, positions, count, **modules)
  tower = seen["tower"][-1]
  return arrays | {
    "patch_embed": seen["patch_embed"][-1],
    "vision_tower_output": tower.last_hidden_state,
    "video_features": _joined(tower.pooler_output),
  }, tower


def _joined(features):
  """Returns the features of all videos, by which they may have been split."""
  if not isinstance(features, (list, tuple)):
    return to_numpy(features)
  return np.concatenate([*map(to_numpy, features)])


def _counted_seconds(run, inputs):
  """Returns (seconds, positions, deltas): fractions if this version counts."""
  known = {name: run.tensor(value) for name, value in inputs.items()}
  del known["pixel_values_videos"]

  def index(seconds):
    known["second_per_grid_ts"] = run.tensor(seconds)
    return map(to_numpy, run.model.model.get_rope_index(**known))

  for seconds in np.array(_SECONDS, np.float32):
    positions, deltas = index(seconds)
    whole, _ = index(np.trunc(seconds))
    if (positions != whole).any():
      break
  return seconds, positions, deltas


def _windows(tower, grids):
  """Returns (tokens in the order of windows, where windows end in patches)."""
  grids = grids.cpu()
  if hasattr(tower, "get_window_index"):  # Before it was a function.
    order, ends = tower.get_window_index(grids)
  else:
    from transformers import vision_utils

    names = ("spatial_merge_size", "window_size", "patch_size")
    order, ends = vision_utils.get_vision_window_index(
      grids, **{name: getattr(tower, name) for name in names}
    )
  # Windows without a token end where the one before does.
  return to_numpy(order), np.unique(to_numpy(ends))


def _positions_4_50(ids, mask, grids, seconds, config) -> np.ndarray:
  """Returns int64[3, B, L] by the rule of 4.50, which 5.x no longer has.

  Token by token, unlike `qwen2_5_vl.position_ids`, so that one checks the
  other; only the decoder behind it is transformers' own.
  """
  positions = np.ones((3, *ids.shape), np.int64)
  for row, (T, H, W) in enumerate(grids):
    step = np.float32(seconds[row]) * np.float32(config.tokens_per_second)
    cells, following, start = itertools.product(*map(range, (T, H, W))), 0, None
    for place in np.flatnonzero(mask[row]):
      where = following
      if ids[row, place] == config.video_token_id:
        start = following if start is None else start
        time, *cell = next(cells)
        where = start + np.array([int(np.float32(time) * step), *cell])
      positions[:, row, place] = where
      following = max(following, int(np.max(where)) + 1)
  return positions


def to_numpy(value) -> np.ndarray:
  """Returns the array of a tensor; lists and arrays are told as they are."""
  if not hasattr(value, "detach"):
    return np.asarray(value)
  # NumPy has no bfloat16 of its own.
  value = value.float() if value.is_floating_point() else value
  return value.detach().cpu().numpy()
