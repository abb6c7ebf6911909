"""Stages before the decoder of models whose towers take patches.

Axes: B batch, L prompt tokens, D width, T time slices, N video tokens, P
position rows, S auxiliary feature maps.
"""

import functools

import jax
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import (
  processors,
  prompt_batch,
  qwen2_5_vl,
  qwen2_5_vl_layout,
)
from cacovid_jax.parity import prompts as prompts_lib

# Residual streams, before any norm, carry the rounding of all that came before.
# (Qwen2.5-VL's golden tower ends in values up to 20: the reference is 3.0e-5
# away from its float64 result, this tower 2.4e-5 on the other side, and the
# decoder's layers make the difference a few times larger.)
RESIDUAL_TOLERANCE = 3e-5

# Arrays and how many axes they have: of both models, of each alone.
_ARRAYS = dict(
  pixel_values_videos=2, video_features=2, position_ids=3, video_grid_thw=2,
  patch_embed=2, vision_tower_output=2, rope_deltas=2,
)  # fmt: skip
_WINDOWED = dict(
  second_per_grid_ts=1, window_index=1, cu_window_seqlens=1, v4_position_ids=3,
  v4_rope_deltas=2, v4_last_hidden_state=3, v4_logits=3,
)  # fmt: skip
_DEEP = dict(deepstack_features=3)


def needed(model):
  """Returns {name: axes} of the arrays that a golden.npz must have."""
  return _ARRAYS | (_DEEP if model.num_deep else _WINDOWED)


def embedded(run):
  """Adds the stages of a `models` run; returns what its `embedded` does."""
  model, golden = run.model, run.golden
  merge = model.config.vision.merge_size
  grids = golden["video_grid_thw"] // (1, merge, merge)
  num_video = grids.prod(axis=1)
  prompts = prompts_lib.GoldenPrompts(model.config, golden, num_video)
  seconds = golden.get("second_per_grid_ts", np.ones(len(grids), np.float32))
  features = _features(run, grids, seconds, num_video)
  x = run.batched(model.embed_prompt, prompts.ids, features, prompts.video_rows)

  # Deltas are how the reference keeps the next position: less the rows of the
  # prompt, with (4.50) or without (5.x) its padding.
  placed, padded = {}, golden["input_ids"].shape[1]
  rules = {"v5": ("", prompts.lengths, model.positions)}
  if not model.num_deep:
    # Its releases have had two rules.
    by_rule = functools.partial(qwen2_5_vl.position_ids, config=model.config)
    for rule, counted in (("v5", prompts.lengths), ("4.50", padded)):
      prefix = "" if rule == "v5" else "v4_"
      rules[rule] = prefix, counted, functools.partial(by_rule, rule=rule)
  for rule, (prefix, counted, place) in rules.items():
    positions, following = placed[rule] = _place(prompts, grids, seconds, place)
    name = f"{prefix}position_ids"
    ours = positions.transpose(0, 2, 1)[prompts.valid]
    expected = prompts.select(golden[name].transpose(1, 2, 0))
    run.add(name, ours, expected, tolerance=0.0)
    deltas = (following - counted)[:, None]
    run.add(f"{prefix}rope_deltas", deltas, tolerance=0.0)
  return prompts, x, placed


def _features(run, grids, seconds, num_video):
  """Adds the stages of the tower; returns float[B, N, D], zero padded."""
  model, vision = run.model, run.model.config.vision
  num_patches = num_video * vision.patches_per_token
  patches = run.golden["pixel_values_videos"]
  if len(patches) != num_patches.sum():
    raise errors.UserError(
      f"golden.npz: pixel_values_videos has {len(patches)} patches,"
      f" video_grid_thw {num_patches.sum()}"
    )
  starts = np.cumsum(num_patches) - num_patches
  order = np.arange(len(patches))
  if not model.num_deep:
    order = _windows(run, grids, starts)
  # One padded batch, as training and evaluation run it.
  sizes = qwen2_5_vl_layout.Sizes.of(grids, vision)
  layouts = [model.layout(grid, sizes) for grid in grids]
  most = sizes.num_tokens * vision.patches_per_token
  videos = np.split(patches, starts[1:])
  videos = np.stack([prompt_batch.pad_tokens(x, most) for x in videos])
  layouts = jax.tree.map(lambda *leaves: np.stack(leaves), *layouts)
  inputs = processors.TowerInputs(videos, tuple(grids.T), seconds, layouts)
  features, out = run.batched(model.encode_stages, inputs)

  def valid(x, lengths):
    rows = zip(np.asarray(x), lengths, strict=True)
    return np.concatenate([row[:length] for row, length in rows])

  run.add("patch_embed", valid(out["patch_embed"], num_patches))
  tower = valid(out["vision_tower_output"], num_patches)
  run.add("vision_tower_output", tower[order], tolerance=RESIDUAL_TOLERANCE)
  run.add("video_features", valid(features, num_video))
  if model.num_deep:
    run.deep = out["deep"]  # [B, S, N, D]
    maps = valid(run.deep.swapaxes(1, 2), num_video)
    run.add("deepstack_features", maps.swapaxes(0, 1))
  return features


def _windows(run, grids, starts):
  """Adds the stages of windows; returns the patches in their order.

  The reference's tower works through all videos in it.
  """
  layouts = [run.model.layout(grid) for grid in grids]
  windows = [
    start + rows[:length]
    for start, layout in zip(starts, layouts, strict=True)
    for rows, length in zip(*layout.windows[:2], strict=True)
  ]
  order = np.concatenate(windows)
  size = run.model.config.vision.patches_per_token
  run.add("window_index", order[::size] // size, tolerance=0.0)
  ends = np.cumsum([0, *map(len, windows)])
  run.add("cu_window_seqlens", ends, tolerance=0.0)
  return order


def _place(prompts, grids, seconds, place):
  """Returns int32[B, P, L], zero behind the prompts, and int32[B] the next.

  `place` is as `VideoLLM.positions`.
  """
  ids = np.asarray(prompts.ids)
  positions = np.zeros((len(ids), 3, ids.shape[1]), np.int32)
  following = np.zeros(len(ids), np.int32)
  for i, length in enumerate(prompts.lengths):
    video = processors.TowerInputs(None, tuple(grids[i]), seconds[i])
    positions[i, :, :length], following[i] = place(ids[i, :length], video)
  return positions, following
