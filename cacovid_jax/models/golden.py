"""Compares LLaVA-OneVision with a folder of golden intermediates.

A folder holds config.json, model.safetensors and golden.npz: the inputs and
the intermediates of the reference implementation in float32, on a left-padded
batch of prompts with one video each.

Axes: B batch, L prompt tokens, D width, T frames, N video tokens.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors, stages
from cacovid_jax.models import checkpoints, generation, llava_onevision, pruning

# For stages whose largest value is at most `_SCALE`; they grow in proportion
# beyond, as rounding does. (In the golden tiny model the projected features
# reach 21, where the reference itself is 1.1e-5 away from its float64 result.)
STAGE_TOLERANCE = 2e-5
LOGITS_TOLERANCE = 1e-4
_SCALE = 8.0

_ARRAYS = (
  "pixel_values_videos",
  "input_ids",
  "attention_mask",
  "position_ids",
  "vision_embeddings",
  "vision_tower_output",
  "projected_features",
  "pooled_features",
  "video_features",
  "inputs_embeds",
  "hidden_states",
  "last_hidden_state",
  "logits",
  "generated_ids",
  "dropped_keep_index",
  "dropped_last_hidden_state",
  "dropped_logits",
)


def check(folder):
  """Returns the list of `stages.Stage` of one golden folder."""
  config = checkpoints.load_config(folder)
  params = checkpoints.load_params(folder, config)
  return compare(
    llava_onevision.LlavaOnevisionModel(config), params, read(folder)
  )


def read(folder):
  """Returns the arrays of a folder's golden.npz."""
  path = os.path.join(folder, "golden.npz")
  try:
    with np.load(path, allow_pickle=False) as file:
      golden = {name: file[name] for name in file.files}
  except (OSError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise errors.UserError(f"{path} is not readable ({reason})") from error
  missing = [name for name in _ARRAYS if name not in golden]
  if missing:
    raise errors.UserError(
      f"{path} lacks {', '.join(missing)}; make the golden file again"
    )
  return golden


def tolerance(at_8, expected):
  """Returns the tolerance of a stage whose values are `expected`.

  Args:
    at_8: tolerance for values of up to 8.
    expected: array of the reference.
  """
  return at_8 * max(1.0, float(np.abs(expected).max()) / _SCALE)


def compare(model, params, golden):
  """Returns the list of `stages.Stage`, from the pixels to the answers.

  Args:
    model: `LlavaOnevisionModel` in float32.
    params: its parameters.
    golden: arrays of a golden.npz.
  """
  with jax.default_matmul_precision("highest"):
    return _compare(model, params, golden)


def _compare(model, params, golden):
  found = []

  def add(name, actual, expected, at_8=STAGE_TOLERANCE):
    within = tolerance(at_8, expected)
    found.append(stages.compare(name, actual, expected, within))

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
    add(name, out[name].reshape(-1, *out[name].shape[2:]), golden[name])
  blocks = jax.vmap(lambda video: module("video_block", video))(features)
  add("video_features", blocks, golden["video_features"])

  prompts = _Prompts(model.config, golden, features.shape[1])
  x = jax.vmap(model.embed_prompt, in_axes=(None, 0, 0, 0))(
    params, prompts.ids, features, prompts.video_start
  )
  valid = prompts.valid
  add("inputs_embeds", x[valid], prompts.rows("inputs_embeds"))

  forward = functools.partial(model.forward, want_hidden=True)
  hidden, out = jax.jit(forward)(
    params, x, prompts.positions, lengths=prompts.lengths
  )
  states = golden["hidden_states"]  # [layers + 1, B, L, D], last after norm.
  mine = [x, *out["hidden"][:-1], hidden]
  if len(mine) != len(states):
    raise errors.UserError(
      f"golden.npz has {len(states)} hidden states, the config's model"
      f" {len(mine)}; use the files of one folder"
    )
  for layer, (actual, expected) in enumerate(zip(mine, states, strict=True)):
    add(f"hidden_states[{layer}]", actual[valid], prompts.select(expected))
  add("last_hidden_state", hidden[valid], prompts.rows("last_hidden_state"))
  logits = model.logits(params, hidden)
  add("logits", logits[valid], prompts.rows("logits"), LOGITS_TOLERANCE)

  greedy = functools.partial(
    generation.greedy,
    model,
    max_new_tokens=golden["generated_ids"].shape[1],
    eos_ids=(),  # The reference loop ignored it, too.
    pad_id=0,
  )
  ids = jax.jit(greedy)(
    params, x, prompts.positions, prompts.lengths, prompts.lengths
  )
  add("generated_ids", ids, golden["generated_ids"], 0.0)

  hidden, logits = _dropped(model, params, x[0], prompts, golden)
  add("dropped_last_hidden_state", hidden, golden["dropped_last_hidden_state"])
  add("dropped_logits", logits, golden["dropped_logits"], LOGITS_TOLERANCE)
  return found


class _Prompts:
  """The left-padded batch, rolled to right padding."""

  def __init__(self, config, golden, num_video):
    self._golden = golden
    mask = golden["attention_mask"].astype(bool)
    batch, length = mask.shape
    self.num_video = num_video
    self.lengths = jnp.asarray(mask.sum(axis=1), jnp.int32)
    # Row i of the rolled prompt is row order[i] of the padded one.
    self._order = np.argsort(~mask, axis=1, kind="stable")
    self.valid = np.take_along_axis(mask, self._order, axis=1)
    ids = np.take_along_axis(golden["input_ids"], self._order, axis=1)
    positions = np.take_along_axis(golden["position_ids"], self._order, axis=1)
    self.ids = jnp.asarray(ids, jnp.int32)
    self.positions = jnp.asarray(positions, jnp.int32)[:, None]
    is_video = (ids == config.video_token_id) & self.valid
    if (is_video.sum(axis=1) != num_video + 1).any():
      raise errors.UserError(
        f"golden.npz: every prompt needs {num_video} video tokens and one"
        " newline; the pixels and the ids do not belong together"
      )
    self.video_start = jnp.asarray(is_video.argmax(axis=1), jnp.int32)

  def select(self, array):
    """Returns the valid rows of array[B, L, ...], in the rolled order."""
    index = self._order.reshape(self._order.shape + (1,) * (array.ndim - 2))
    return np.take_along_axis(array, index, axis=1)[self.valid]

  def rows(self, name):
    return self.select(self._golden[name])


def _dropped(model, params, x, prompts, golden):
  """Runs the first prompt without the dropped tokens, positions kept."""
  padding = int((golden["attention_mask"][0] == 0).sum())
  kept = golden["dropped_keep_index"] - padding  # Rows of the rolled prompt.
  length = int(prompts.lengths[0])
  start, num_video = int(prompts.video_start[0]), prompts.num_video
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
    params, x[rows][None], prompts.positions[:1, :, rows]
  )
  return hidden, model.logits(params, hidden)
