"""Compares a model with a folder of golden intermediates.

A folder holds config.json, model.safetensors and golden.npz: the inputs and
the intermediates of the reference implementation in float32, on a left-padded
batch of prompts with one video each. config.json says which model it is.

Axes: B batch, L prompt tokens, D width, T frames or time slices, N video
tokens, P position rows, V vocabulary.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors, stages
from cacovid_jax.models import (
  checkpoints,
  generation,
  pruning,
  qwen2_5_vl,
  qwen2_5_vl_vision,
)

# For stages whose largest value is at most `_SCALE`; they grow in proportion
# beyond, as rounding does. (In the golden tiny model the projected features
# reach 21, where the reference itself is 1.1e-5 away from its float64 result.)
STAGE_TOLERANCE = 2e-5
LOGITS_TOLERANCE = 1e-4
_SCALE = 8.0

_DECODER_ARRAYS = (
  "input_ids",
  "attention_mask",
  "position_ids",
  "inputs_embeds",
  "hidden_states",
  "last_hidden_state",
  "logits",
  "generated_ids",
)
_DROPPED_ARRAYS = (
  "dropped_keep_index",
  "dropped_last_hidden_state",
  "dropped_logits",
)
_LLAVA_ONEVISION_ARRAYS = (
  "pixel_values_videos",
  "vision_embeddings",
  "vision_tower_output",
  "projected_features",
  "pooled_features",
  "video_features",
  *_DECODER_ARRAYS,
  *_DROPPED_ARRAYS,
)
_QWEN2_5_VL_ARRAYS = (
  "pixel_values_videos",
  "video_grid_thw",
  "second_per_grid_ts",
  "patch_embed",
  "window_index",
  "cu_window_seqlens",
  "vision_tower_output",
  "video_features",
  *_DECODER_ARRAYS,
  "rope_deltas",
  "v4_position_ids",
  "v4_rope_deltas",
  "v4_last_hidden_state",
  "v4_logits",
)


def check(folder):
  """Returns the list of `stages.Stage` of one golden folder."""
  checkpoint = checkpoints.load(folder)
  return compare(checkpoint.model, checkpoint.params, read(folder))


def read(folder):
  """Returns the arrays of a folder's golden.npz."""
  path = os.path.join(folder, "golden.npz")
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except (OSError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise errors.UserError(f"{path} is not readable ({reason})") from error


def compare(model, params, golden):
  """Returns the list of `stages.Stage`, from the pixels to the answers.

  Args:
    model: `LlavaOnevisionModel` or `Qwen2_5VLModel`, in float32.
    params: its parameters.
    golden: arrays of a golden.npz.
  """
  is_qwen = isinstance(model, qwen2_5_vl.Qwen2_5VLModel)
  needed = _QWEN2_5_VL_ARRAYS if is_qwen else _LLAVA_ONEVISION_ARRAYS
  missing = [name for name in needed if name not in golden]
  if missing:
    raise errors.UserError(
      f"golden.npz lacks {', '.join(missing)}; make the golden file again"
    )
  table = _Table(golden)
  with jax.default_matmul_precision("highest"):
    (_qwen2_5_vl if is_qwen else _llava_onevision)(model, params, golden, table)
  return table.stages


def scaled(tolerance, expected):
  """Returns a stage's tolerance, which grows with its largest value."""
  largest = np.abs(expected).max(initial=0.0)
  return tolerance * max(1.0, float(largest) / _SCALE)


class _Table:
  """The stages compared so far."""

  def __init__(self, golden):
    self._golden = golden
    self.stages = []

  def add(self, name, actual, expected=None, tolerance=STAGE_TOLERANCE):
    """Adds a stage; what it should be is the golden array of its name."""
    expected = self._golden[name] if expected is None else expected
    within = scaled(tolerance, expected)
    self.stages.append(stages.compare(name, actual, expected, within))


def _llava_onevision(model, params, golden, table):
  pixels = jnp.asarray(golden["pixel_values_videos"])
  pixels = pixels.transpose(0, 1, 3, 4, 2)  # [B, T, h, w, 3]

  def module(method, *arguments):
    return model.module.apply({"params": params}, *arguments, method=method)

  encode = jax.jit(jax.vmap(lambda video: module("encode_video", video)))
  features, out = encode(pixels)
  for name in (
    "vision_embeddings",
    "vision_tower_output",
    "projected_features",
    "pooled_features",
  ):
    table.add(name, out[name].reshape(-1, *out[name].shape[2:]))
  blocks = jax.vmap(lambda video: module("video_block", video))(features)
  table.add("video_features", blocks)

  num_video = np.full(len(features), features.shape[1])
  prompts = _Prompts(model.config, golden, num_video, num_newlines=1)
  x = jax.vmap(model.embed_prompt, in_axes=(None, 0, 0, 0))(
    params, prompts.ids, features, prompts.video_start
  )
  positions = prompts.roll(golden["position_ids"])[:, None]
  next_positions = prompts.lengths
  _decoder(model, params, x, positions, next_positions, prompts, table)
  _dropped(model, params, x, positions, prompts, golden, table)


def _qwen2_5_vl(model, params, golden, table):
  vision = model.config.vision
  grids = golden["video_grid_thw"] // (1, vision.merge_size, vision.merge_size)
  layouts = [model.layout(grid) for grid in grids]
  num_video = np.array([layout.num_tokens for layout in layouts])
  num_patches = num_video * vision.patches_per_token
  prompts = _Prompts(model.config, golden, num_video)

  # The reference's tower works through all videos in the order of windows.
  starts = np.cumsum(num_patches) - num_patches
  windows = [
    start + rows[:length]
    for start, layout in zip(starts, layouts, strict=True)
    for rows, length in zip(*layout.windows[:2], strict=True)
  ]
  order = np.concatenate(windows)
  tokens = order[:: vision.patches_per_token] // vision.patches_per_token
  table.add("window_index", tokens, tolerance=0.0)
  ends = np.cumsum([0, *map(len, windows)])
  table.add("cu_window_seqlens", ends, tolerance=0.0)

  # One padded batch, as training and evaluation run it.
  sizes = qwen2_5_vl_vision.Sizes.of(grids, vision)
  layouts = [model.layout(grid, sizes) for grid in grids]
  patches = golden["pixel_values_videos"]
  if len(patches) != num_patches.sum():
    raise errors.UserError(
      f"golden.npz: pixel_values_videos has {len(patches)} patches,"
      f" video_grid_thw {num_patches.sum()}"
    )
  most = sizes.num_tokens * vision.patches_per_token
  patches = np.stack(
    [
      np.pad(video, [(0, most - len(video)), (0, 0)])
      for video in np.split(patches, starts[1:])
    ]
  )

  @jax.jit
  @jax.vmap
  def encode(patches, layout):
    return model.module.apply(
      {"params": params}, patches, layout, method="encode_video"
    )

  features, out = encode(patches, jax.tree.map(lambda *x: np.stack(x), *layouts))

  def valid(x, lengths):
    return np.concatenate(
      [row[:length] for row, length in zip(np.asarray(x), lengths, strict=True)]
    )

  table.add("patch_embed", valid(out["patch_embed"], num_patches))
  tower = valid(out["vision_tower_output"], num_patches)
  table.add("vision_tower_output", tower[order])
  table.add("video_features", valid(features, num_video))

  x = jax.vmap(model.embed_prompt, in_axes=(None, 0, 0, 0, 0))(
    params, prompts.ids, features, prompts.video_start, num_video
  )
  padded_length = golden["input_ids"].shape[1]
  both = {}
  for rule, prefix, counted in (
    ("v5", "", prompts.lengths),
    ("4.50", "v4_", padded_length),
  ):
    positions, next_positions = _position_ids(
      model.config, golden, prompts, grids, rule
    )
    both[rule] = positions, next_positions
    expected = prompts.select(golden[f"{prefix}position_ids"].transpose(1, 2, 0))
    table.add(
      f"{prefix}position_ids",
      positions.transpose(0, 2, 1)[prompts.valid],
      expected,
      tolerance=0.0,
    )
    # Deltas are how the reference keeps the next position: less the rows of
    # the prompt, with (4.50) or without (5.x) its padding.
    table.add(
      f"{prefix}rope_deltas",
      (next_positions - counted)[:, None],
      tolerance=0.0,
    )
  _decoder(model, params, x, *both["v5"], prompts, table)
  positions, _ = both["4.50"]
  hidden, _ = jax.jit(model.forward)(
    params, x, positions, lengths=prompts.lengths
  )
  _head(model, params, hidden, prompts, table, "v4_")
  if all(name in golden for name in _DROPPED_ARRAYS):
    _dropped(model, params, x, both["v5"][0], prompts, golden, table)
  _pruned(model, params, x, positions, prompts, table)


def _position_ids(config, golden, prompts, grids, rule):
  """Returns int32[B, P, L], zero behind the prompts, and int32[B] the next."""
  ids = np.asarray(prompts.ids)
  positions = np.zeros((len(ids), 3, ids.shape[1]), np.int32)
  next_positions = np.zeros(len(ids), np.int32)
  for i, length in enumerate(np.asarray(prompts.lengths)):
    positions[i, :, :length], next_positions[i] = qwen2_5_vl.position_ids(
      ids[i, :length],
      grid=grids[i],
      seconds_per_slice=golden["second_per_grid_ts"][i],
      config=config,
      rule=rule,
    )
  return positions, next_positions


class _Prompts:
  """The left-padded batch, rolled to right padding.

  Attributes:
    ids: int32[B, L].
    lengths: int32[B] tokens of each prompt.
    valid: bool[B, L].
    num_video: int[B] tokens of each video.
    video_start: int32[B] row of the first.
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
    self.video_start = jnp.asarray(is_video.argmax(axis=1), jnp.int32)

  def roll(self, array):
    """Returns int32[B, L] of array[B, L], right padded."""
    rolled = np.take_along_axis(array, self._order, axis=1)
    return jnp.asarray(rolled, jnp.int32)

  def select(self, array):
    """Returns the valid rows of array[B, L, ...], in the rolled order."""
    index = self._order.reshape(self._order.shape + (1,) * (array.ndim - 2))
    return np.take_along_axis(array, index, axis=1)[self.valid]

  def rows(self, name):
    return self.select(self._golden[name])


def _decoder(model, params, x, positions, next_positions, prompts, table):
  """Adds the stages from the embedded prompts to the generated ids."""
  golden, valid = table._golden, prompts.valid
  table.add("inputs_embeds", x[valid], prompts.rows("inputs_embeds"))

  forward = functools.partial(model.forward, want_hidden=True)
  hidden, out = jax.jit(forward)(params, x, positions, lengths=prompts.lengths)
  states = golden["hidden_states"]  # [layers + 1, B, L, D], last after norm.
  mine = [x, *out["hidden"][:-1], hidden]
  if len(mine) != len(states):
    raise errors.UserError(
      f"golden.npz has {len(states)} hidden states, the config's model"
      f" {len(mine)}; use the files of one folder"
    )
  for layer, (actual, expected) in enumerate(zip(mine, states, strict=True)):
    table.add(
      f"hidden_states[{layer}]", actual[valid], prompts.select(expected)
    )
  _head(model, params, hidden, prompts, table)

  greedy = functools.partial(
    generation.greedy,
    model,
    max_new_tokens=golden["generated_ids"].shape[1],
    eos_ids=(),  # The reference loop ignored it, too.
    pad_id=0,
  )
  ids = jax.jit(greedy)(params, x, positions, prompts.lengths, next_positions)
  table.add("generated_ids", ids, tolerance=0.0)


def _head(model, params, hidden, prompts, table, prefix=""):
  """Adds the last hidden state and the logits of the whole prompts."""
  valid = prompts.valid
  name = f"{prefix}last_hidden_state"
  table.add(name, hidden[valid], prompts.rows(name))
  name, logits = f"{prefix}logits", model.logits(params, hidden)
  table.add(name, logits[valid], prompts.rows(name), LOGITS_TOLERANCE)


def _dropped(model, params, x, positions, prompts, golden, table):
  """Runs the first prompt without the dropped tokens, positions kept."""
  padding = int((golden["attention_mask"][0] == 0).sum())
  kept = golden["dropped_keep_index"] - padding  # Rows of the rolled prompt.
  length, num_video = int(prompts.lengths[0]), int(prompts.num_video[0])
  start = int(prompts.video_start[0])
  index = kept[(kept >= start) & (kept < start + num_video)] - start
  rows, new_length = pruning.pruned_rows(
    index,
    len(index),
    video_start=start,
    num_video=num_video,
    length=length,
    out_length=length - num_video + len(index),
  )
  if int(new_length) != len(kept) or (np.asarray(rows) != kept).any():
    # Text was dropped, too, which a compressor never does: take it literally.
    rows = jnp.asarray(kept)
  hidden, _ = jax.jit(functools.partial(model.forward))(
    params, x[:1, rows], positions[:1, :, rows]
  )
  table.add("dropped_last_hidden_state", hidden)
  logits = model.logits(params, hidden)
  table.add("dropped_logits", logits, tolerance=LOGITS_TOLERANCE)


def _pruned(model, params, x, positions, prompts, table):
  """Adds prompts without most video tokens, against the same tokens masked.

  A prompt that hides tokens from every query is what one without them must
  equal, as long as the others keep their positions.
  """
  most = int(prompts.num_video.max())
  num_valid = -(-prompts.num_video // 3)
  index = jnp.arange(-(-most // 3)) * 3  # Every third token.
  rows, lengths = jax.vmap(
    lambda valid, start, video, length: pruning.pruned_rows(
      index,
      valid,
      video_start=start,
      num_video=video,
      length=length,
      out_length=x.shape[1],
    )
  )(num_valid, prompts.video_start, prompts.num_video, prompts.lengths)
  batch = np.arange(len(rows))[:, None]
  forward = jax.jit(model.forward)
  short, _ = forward(
    params,
    x[batch, rows],
    np.asarray(positions)[batch, :, rows].transpose(0, 2, 1),
    lengths=lengths,
  )
  visible = np.zeros(x.shape[:2], bool)
  visible[batch, rows] = True
  mask = np.broadcast_to(visible[:, None], (*visible.shape, x.shape[1]))
  masked, _ = forward(params, x, positions, mask=mask)
  inside = np.arange(x.shape[1])[None] < np.asarray(lengths)[:, None]
  short, masked = short[inside], masked[batch, rows][inside]
  table.add("pruned_last_hidden_state", short, np.asarray(masked))
  table.add(
    "pruned_logits",
    model.logits(params, short),
    np.asarray(model.logits(params, masked)),
    LOGITS_TOLERANCE,
  )
