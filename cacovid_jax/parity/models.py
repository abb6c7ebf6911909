"""Compares a model with a folder of golden intermediates.

A folder holds config.json, model.safetensors and golden.npz: the inputs and
the intermediates of the reference implementation in float32, on a left-padded
batch of prompts with one video each.

Axes: B batch, L prompt tokens, D width, T frames or time slices, N video
tokens, P position rows, V vocabulary.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import (
  checkpoints,
  generation,
  processors,
  prompt_batch,
  qwen2_5_vl,
  qwen2_5_vl_layout,
)
from cacovid_jax.parity import stage

# For stages whose largest value is at most `_SCALE`; they grow in proportion
# beyond, as rounding does. (In the golden tiny model the projected features
# reach 21, where the reference itself is 1.1e-5 away from its float64 result.)
STAGE_TOLERANCE, LOGITS_TOLERANCE = 2e-5, 1e-4
# Qwen2.5-VL's residual streams, before any norm, carry the rounding of all that
# came before. (Its golden tower ends in values up to 20: the reference is
# 3.0e-5 away from its float64 result, this tower 2.4e-5 on the other side, and
# the decoder's layers make the difference a few times larger.)
RESIDUAL_TOLERANCE = 3e-5
_SCALE = 8.0

# Arrays and how many axes they have; the stages of LLaVA-OneVision's tower
# apart.
_TOWER_STAGES = dict(
  vision_embeddings=3, vision_tower_output=3, projected_features=3,
  pooled_features=3,
)  # fmt: skip
_DROPPED_ARRAYS = dict(
  dropped_keep_index=1, dropped_last_hidden_state=3, dropped_logits=3
)
_DECODER_ARRAYS = dict(
  pixel_values_videos=5, video_features=3, input_ids=2, attention_mask=2,
  position_ids=2, inputs_embeds=3, hidden_states=4, last_hidden_state=3,
  logits=3, generated_ids=2,
)  # fmt: skip
_QWEN2_5_VL_ARRAYS = dict(
  pixel_values_videos=2, video_features=2, position_ids=3, video_grid_thw=2,
  second_per_grid_ts=1, patch_embed=2, window_index=1, cu_window_seqlens=1,
  vision_tower_output=2, rope_deltas=2, v4_position_ids=3, v4_rope_deltas=2,
  v4_last_hidden_state=3, v4_logits=3,
)  # fmt: skip


def check(folder):
  """Returns the list of `stage.Stage` of one golden folder."""
  checkpoint = checkpoints.load(folder)
  return compare(checkpoint.model, checkpoint.params, read(folder))


def read(folder):
  """Returns the arrays of a folder's golden.npz."""
  return stage.read(os.path.join(folder, "golden.npz"))


def compare(model, params, golden):
  """Returns the list of `stage.Stage`, from the pixels to the answers.

  Of a `video_llm.VideoLLM` in float32 and the arrays of a golden.npz.
  """
  run = _Run(model, params, golden)
  with jax.default_matmul_precision("highest"):
    prompts, x, placed = run.embedded()
    _decoder(run, prompts, x, *placed["v5"])
    if "4.50" in placed:
      positions, _ = placed["4.50"]
      hidden, _ = run.forward(x, positions, lengths=prompts.lengths)
      _head(run, prompts, hidden, "v4_")
    if all(name in golden for name in _DROPPED_ARRAYS):
      _dropped(run, prompts, x, placed["v5"][0])
    if "4.50" in placed:
      _pruned(run, prompts, x, positions)
  return run.stages


def logits(model, params, golden):
  """Returns (ours, theirs) float32[n, V] behind each of all n prompt tokens.

  Arguments as of `compare`, the model in any dtype; Qwen2.5-VL's positions by
  the rule of transformers 5.
  """
  run = _Run(model, params, golden)
  prompts, x, placed = run.embedded()
  hidden, _ = run.forward(x, placed["v5"][0], lengths=prompts.lengths)
  return run.logits(hidden[prompts.valid]), prompts.rows("logits")


class _Run:
  """The compiled functions of one comparison, and the stages so far."""

  def __init__(self, model, params, golden):
    self.model, self.params, self.golden = model, params, golden
    self.one_grid = model.processor.one_grid
    needed = _DECODER_ARRAYS | _QWEN2_5_VL_ARRAYS
    if self.one_grid:
      needed = _DECODER_ARRAYS | _TOWER_STAGES | _DROPPED_ARRAYS
    for name, axes in needed.items():
      found = golden.get(name, np.array(None))
      if found.ndim != axes or found.dtype.kind not in "biuf":
        raise errors.UserError(
          f"golden.npz lacks {name}, numbers along {axes} axes; make the golden"
          " file again"
        )
    self.stages = []
    # Compiled once for all prompts of a shape.
    forward = jax.jit(functools.partial(model.forward, want_hidden=True))
    logits = jax.jit(model.logits)
    # On the host, where taking rows compiles nothing.
    self.forward = lambda *x, **y: jax.device_get(forward(params, *x, **y))
    self.logits = lambda hidden: jax.device_get(logits(params, hidden))

  def embedded(self):
    """Adds the stages before the decoder.

    Returns (prompts, embeddings, {rule: (positions, next position)}), only rule
    "v5" for a model whose positions count on.
    """
    return (_llava_onevision if self.one_grid else _qwen2_5_vl)(self)

  def add(self, name, actual, expected=None, tolerance=STAGE_TOLERANCE):
    """Adds a stage; what it should be is the golden array of its name."""
    expected = self.golden[name] if expected is None else np.asarray(expected)
    largest = np.abs(expected).max(initial=0.0)
    tolerance *= max(1.0, float(largest) / _SCALE)
    self.stages.append(stage.compare(name, actual, expected, tolerance))

  def batched(self, function, *batch):
    """Returns what a function of the model does to each entry of a batch."""
    in_axes = (None, *[0] * len(batch))
    run = jax.jit(jax.vmap(function, in_axes))
    return jax.device_get(run(self.params, *batch))


def _llava_onevision(run):
  model, golden = run.model, run.golden
  # [B, T, h, w, 3]
  pixels = golden["pixel_values_videos"].transpose(0, 1, 3, 4, 2)
  grids = np.array([model.grid(*video.shape[:3]) for video in pixels])
  inputs = processors.TowerInputs(pixels, tuple(grids.T), np.ones(len(pixels)))
  features, out = run.batched(model.encode_stages, inputs)
  for name in _TOWER_STAGES:
    run.add(name, out[name].reshape(-1, *out[name].shape[2:]))
  num_video = np.full(len(features), features.shape[1])
  prompts = _Prompts(model.config, golden, num_video, num_newlines=1)
  x = run.batched(model.embed_prompt, prompts.ids, features, prompts.video_rows)
  # The newline is the row behind the video's.
  rows = prompts.video_rows
  rows = np.concatenate([rows, rows[:, -1:] + 1], axis=1)
  run.add("video_features", np.take_along_axis(x, rows[..., None], axis=1))
  positions = prompts.roll(golden["position_ids"])[:, None]
  return prompts, x, {"v5": (positions, prompts.lengths)}


def _qwen2_5_vl(run):
  model, golden = run.model, run.golden
  merge = model.config.vision.merge_size
  grids = golden["video_grid_thw"] // (1, merge, merge)
  num_video = grids.prod(axis=1)
  prompts = _Prompts(model.config, golden, num_video)
  features = _qwen2_5_vl_features(run, grids, num_video)
  x = run.batched(model.embed_prompt, prompts.ids, features, prompts.video_rows)

  # Deltas are how the reference keeps the next position: less the rows of the
  # prompt, with (4.50) or without (5.x) its padding.
  placed, padded = {}, golden["input_ids"].shape[1]
  rules = {"v5": ("", prompts.lengths), "4.50": ("v4_", padded)}
  for rule, (prefix, counted) in rules.items():
    positions, following = placed[rule] = _place(run, prompts, grids, rule)
    name = f"{prefix}position_ids"
    ours = positions.transpose(0, 2, 1)[prompts.valid]
    expected = prompts.select(golden[name].transpose(1, 2, 0))
    run.add(name, ours, expected, tolerance=0.0)
    deltas = (following - counted)[:, None]
    run.add(f"{prefix}rope_deltas", deltas, tolerance=0.0)
  return prompts, x, placed


def _qwen2_5_vl_features(run, grids, num_video):
  """Adds the stages of the tower; returns float[B, N, D], zero padded."""
  model, vision = run.model, run.model.config.vision
  num_patches = num_video * vision.patches_per_token
  patches = run.golden["pixel_values_videos"]
  if len(patches) != num_patches.sum():
    raise errors.UserError(
      f"golden.npz: pixel_values_videos has {len(patches)} patches,"
      f" video_grid_thw {num_patches.sum()}"
    )

  # The reference's tower works through all videos in the order of windows.
  starts = np.cumsum(num_patches) - num_patches
  layouts = [model.layout(grid) for grid in grids]
  windows = [
    start + rows[:length]
    for start, layout in zip(starts, layouts, strict=True)
    for rows, length in zip(*layout.windows[:2], strict=True)
  ]
  order = np.concatenate(windows)
  tokens = order[:: vision.patches_per_token] // vision.patches_per_token
  run.add("window_index", tokens, tolerance=0.0)
  ends = np.cumsum([0, *map(len, windows)])
  run.add("cu_window_seqlens", ends, tolerance=0.0)
  # One padded batch, as training and evaluation run it.
  sizes = qwen2_5_vl_layout.Sizes.of(grids, vision)
  layouts = [model.layout(grid, sizes) for grid in grids]
  most = sizes.num_tokens * vision.patches_per_token
  videos = np.split(patches, starts[1:])
  videos = np.stack([prompt_batch.pad_tokens(x, most) for x in videos])
  layouts = jax.tree.map(lambda *leaves: np.stack(leaves), *layouts)
  seconds = run.golden["second_per_grid_ts"]
  inputs = processors.TowerInputs(videos, tuple(grids.T), seconds, layouts)
  features, out = run.batched(model.encode_stages, inputs)

  def valid(x, lengths):
    rows = zip(np.asarray(x), lengths, strict=True)
    return np.concatenate([row[:length] for row, length in rows])

  run.add("patch_embed", valid(out["patch_embed"], num_patches))
  tower = valid(out["vision_tower_output"], num_patches)
  run.add("vision_tower_output", tower[order], tolerance=RESIDUAL_TOLERANCE)
  run.add("video_features", valid(features, num_video))
  return features


def _place(run, prompts, grids, rule):
  """Returns int32[B, P, L], zero behind the prompts, and int32[B] the next."""
  ids, seconds = np.asarray(prompts.ids), run.golden["second_per_grid_ts"]
  positions = np.zeros((len(ids), 3, ids.shape[1]), np.int32)
  following = np.zeros(len(ids), np.int32)
  for i, length in enumerate(prompts.lengths):
    video = processors.TowerInputs(None, tuple(grids[i]), seconds[i])
    positions[i, :, :length], following[i] = qwen2_5_vl.position_ids(
      ids[i, :length], video, config=run.model.config, rule=rule
    )
  return positions, following


class _Prompts:
  """The left-padded batch, rolled to right padding.

  `video_rows` int32[B, N] are L behind the `num_video` int[B] of a video.
  """

  def __init__(self, config, golden, num_video, num_newlines=0):
    self._golden = golden
    mask = golden["attention_mask"].astype(bool)
    if len(mask) != len(num_video):
      raise errors.UserError(
        f"golden.npz: {len(mask)} prompts and {len(num_video)} videos; each"
        " prompt needs one"
      )
    self.num_video = num_video
    self.lengths = np.asarray(mask.sum(axis=1), np.int32)
    # Row i of the rolled prompt is row order[i] of the padded one.
    self._order = np.argsort(~mask, axis=1, kind="stable")
    self.valid = np.take_along_axis(mask, self._order, axis=1)
    self.ids = self.roll(golden["input_ids"])
    is_video = (np.asarray(self.ids) == config.video_token_id) & self.valid
    if (is_video.sum(axis=1) != num_video + num_newlines).any():
      raise errors.UserError(
        f"golden.npz: the prompts need {num_video.tolist()} video tokens"
        f"{' and one newline' if num_newlines else ''}; the pixels and the ids"
        " do not belong together"
      )
    # A newline, of the same id, is behind them.
    first = np.argsort(~is_video, axis=1, kind="stable")[:, : max(num_video)]
    is_own = np.arange(first.shape[1]) < num_video[:, None]
    self.video_rows = np.where(is_own, first, mask.shape[1]).astype(np.int32)

  def roll(self, array):
    """Returns int32[B, L] of array[B, L], right padded."""
    return jnp.asarray(np.take_along_axis(array, self._order, 1), jnp.int32)

  def select(self, array):
    """Returns the valid rows of array[B, L, ...], in the rolled order."""
    index = self._order.reshape(self._order.shape + (1,) * (array.ndim - 2))
    return np.take_along_axis(array, index, axis=1)[self.valid]

  def rows(self, name):
    return self.select(self._golden[name])


def _decoder(run, prompts, x, positions, next_positions):
  """Adds the stages from the embedded prompts to the generated ids."""
  valid = prompts.valid
  run.add("inputs_embeds", x[valid], prompts.rows("inputs_embeds"))

  hidden, out = run.forward(x, positions, lengths=prompts.lengths)
  states = run.golden["hidden_states"]  # [layers + 1, B, L, D], last normed.
  mine = [x, *out["hidden"][:-1], hidden]
  inner = STAGE_TOLERANCE if run.one_grid else RESIDUAL_TOLERANCE
  if len(mine) != len(states):
    raise errors.UserError(
      f"golden.npz has {len(states)} hidden states, the config's model"
      f" {len(mine)}; use the files of one folder"
    )
  tolerances = [*[inner] * (len(mine) - 1), STAGE_TOLERANCE]
  for layer, tolerance in enumerate(tolerances):
    actual, expected = mine[layer][valid], prompts.select(states[layer])
    run.add(f"hidden_states[{layer}]", actual, expected, tolerance)
  _head(run, prompts, hidden)

  steps = run.golden["generated_ids"].shape[1]
  # Without an end, which the reference loop ignored, too.
  options = dict(max_new_tokens=steps, eos_ids=(), pad_id=0)
  greedy = functools.partial(generation.greedy, run.model, **options)
  given = (run.params, x, positions, prompts.lengths, next_positions)
  run.add("generated_ids", jax.jit(greedy)(*given), tolerance=0.0)


def _head(run, prompts, hidden, prefix=""):
  """Adds the last hidden state and the logits of the whole prompts."""
  for name, ours, tolerance in (
    ("last_hidden_state", hidden, STAGE_TOLERANCE),
    ("logits", run.logits(hidden), LOGITS_TOLERANCE),
  ):
    name = f"{prefix}{name}"
    run.add(name, ours[prompts.valid], prompts.rows(name), tolerance)


def _dropped(run, prompts, x, positions):
  """Runs the first prompt without the dropped tokens, positions kept."""
  padding = int((run.golden["attention_mask"][0] == 0).sum())
  rows = run.golden["dropped_keep_index"] - padding  # Rows after rolling.
  length, num_video = prompts.lengths[0], prompts.num_video[0]
  video = prompts.video_rows[0, :num_video]
  # By a compressor's way, unless text was dropped, too, which none ever does.
  if np.isin(np.delete(np.arange(length), video), rows).all():
    index = np.flatnonzero(np.isin(video, rows))
    rows, _, _ = prompt_batch.kept_rows(
      index, len(index), video_rows=video, length=length, num_rows=length
    )
  hidden, _ = run.forward(x[:1, rows], positions[:1, :, rows])
  run.add("dropped_last_hidden_state", hidden)
  run.add("dropped_logits", run.logits(hidden), tolerance=LOGITS_TOLERANCE)


def _pruned(run, prompts, x, positions):
  """Adds prompts without most video tokens, against the same tokens hidden.

  Which must be equal as long as the other tokens keep their positions.
  """
  num_valid = -(-prompts.num_video // 3)
  index = np.arange(num_valid.max()) * 3  # Every third token.
  # As many rows as before, for prompts of much text beside those of much video.
  num_rows = x.shape[1] + prompts.video_rows.shape[1] - len(index)

  def kept(valid, video_rows, length):
    return prompt_batch.kept_rows(
      index, valid, video_rows=video_rows, length=length, num_rows=num_rows
    )[:2]

  each = (num_valid, prompts.video_rows, prompts.lengths)
  rows, lengths = jax.device_get(jax.jit(jax.vmap(kept))(*each))
  batch = np.arange(len(rows))[:, None]
  own = np.take_along_axis(positions, rows[:, None], axis=2)
  pruned, _ = run.forward(x[batch, rows], own, lengths=lengths)
  visible = np.zeros(x.shape[:2], bool)
  visible[batch, rows] = True
  mask = np.broadcast_to(visible[:, None], (*visible.shape, x.shape[1]))
  hidden, _ = run.forward(x, positions, mask=mask)

  inside = np.arange(rows.shape[1]) < lengths[:, None]
  both = pruned[inside], hidden[batch, rows][inside]
  run.add("pruned_last_hidden_state", *both)
  run.add("pruned_logits", *map(run.logits, both), LOGITS_TOLERANCE)
