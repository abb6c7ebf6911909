"""The installed transformers as the reference for a checkpoint directory.

Runs the directory's model in PyTorch, eager attention, on seeded random pixels
and two chat prompts, and records what a golden folder holds under the same
names; `parity.models` then compares our model with it.

Axes: B prompts, L prompt tokens, D width, T frames, N video tokens.
"""

import contextlib
import functools
import itertools
import os
from typing import Any

import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints, hub
from cacovid_jax.parity import models

_QUESTIONS = (
  "What happens first?",
  "Describe the video in one sentence, and name the colours that you see.",
)
# From one time slice to the next, of the two clips. Several versions count
# whole seconds only; their positions are compared where that is no matter.
_SECONDS = ((1.0, 0.7), (1.0, 2.0))
# Kept of the video tokens where the pruned prompt is compared.
_KEPT = 0.25
# Logits nearer to each other than this share of the largest (or of 8) may
# change places within the tolerance of `golden`, either way.
_TIE = 2 * models.LOGITS_TOLERANCE / 8
# Times the tolerances of `golden`, which were measured on its own folders.
# Rounding of other depths, weights and pixels reached 1.3 times those; a wrong
# formula or weight shows at a hundred times and more.
_SLACK = 4


def check(directory: str | os.PathLike, **options):
  """Returns the list of `stage.Stage` of our model beside transformers'.

  Options are those of `reference`.
  """
  arrays = reference(directory, **options)
  checkpoint = checkpoints.load(directory)
  return compare(checkpoint.model, checkpoint.params, arrays)


def compare(model, params, arrays: dict[str, np.ndarray]):
  """Returns the list of `stage.Stage` of a model beside a `reference`."""
  found = []
  for stage in models.compare(model, params, arrays):
    most = _SLACK * stage.tolerance
    ok = stage.max_abs_error <= most
    found.append(stage._replace(tolerance=most, ok=ok))
  return found


def reference(
  directory: str | os.PathLike, *, seed=0, num_frames=2, max_new_tokens=8,
  device="cpu", dtype="float32", attention="eager",
) -> dict[str, np.ndarray]:  # fmt: skip
  """Returns the arrays of a golden.npz, as transformers computes them.

  Of pixels and dropped tokens by a seed, T frames (time slices for Qwen2.5-VL)
  of each of two clips, and tokens that are generated greedily, less those from
  the first one on that rounding could decide. PyTorch computes on a device in a
  dtype with the attention kernel of that name. Arrays of half precision are
  returned as float32; the head computes in float32 always: logits in half
  precision tie.
  """
  directory = hub.directory(directory)
  config = checkpoints.load_config(directory)  # Our own one-line mistakes.
  rng = np.random.default_rng(seed)
  described = config.to_hf()
  make, (name,) = _MAKERS[described["model_type"]], described["architectures"]
  torch, model = load(directory, name, device, dtype, attention)
  with torch.no_grad():
    run = _Run(torch, model, device, config, rng, max_new_tokens)
    arrays = make(run, directory, num_frames)
  return {name: _numpy(value) for name, value in arrays.items()}


def _llava_onevision(run, directory, num_frames) -> dict[str, Any]:
  core, config = run.model.model, run.config
  size, side = config.vision.image_size, config.pooled_side
  num_video = num_frames * side * side
  pixels = (2, num_frames, 3, size, size)
  inputs = run.inputs(directory, [num_video] * 2, pixels, num_newlines=1)
  mask = inputs["attention_mask"]
  # As generation numbers them; a direct call counts the padding, too.
  positions = np.where(mask == 1, mask.cumsum(axis=1) - 1, 1)
  embeddings = core.vision_tower.embeddings
  seen, arrays = run.decoder(
    inputs, positions, num_video, position_ids=positions, embeddings=embeddings,
    projector=core.multi_modal_projector,
  )  # fmt: skip
  given, _, projected = seen["projector"]
  is_video = run.tensor(inputs["input_ids"] == config.video_token_id)
  features = arrays["inputs_embeds"][is_video]
  return arrays | {
    "vision_embeddings": seen["embeddings"][-1],
    # What is chosen of the tower's states is what the projector is given.
    "vision_tower_output": given[0],
    "projected_features": projected,
    "pooled_features": core.apply_pooling(projected),
    "video_features": features.reshape(2, num_video + 1, -1),
  }


def _qwen2_5_vl(run, directory, num_slices) -> dict[str, Any]:
  visual, config, vision = run.model.model.visual, run.config, run.config.vision
  grids = np.array([(num_slices, *size) for size in frame_sizes(config)])
  num_video = grids.prod(axis=1)
  patches = (num_video.sum() * vision.patches_per_token, vision.patch_values)
  inputs = run.inputs(directory, num_video, patches)
  ids, mask = inputs["input_ids"], inputs["attention_mask"]
  inputs |= {
    "video_grid_thw": grids * (1, vision.merge_size, vision.merge_size),
    # 2 marks videos.
    "mm_token_type_ids": np.where(ids == config.video_token_id, 2, 0),
  }
  seconds, positions, deltas = _counted_seconds(run, inputs)
  inputs["second_per_grid_ts"] = seconds
  modules = dict(patch_embed=visual.patch_embed, tower=visual)
  seen, arrays = run.decoder(inputs, positions, num_video[0], **modules)
  tower = seen["tower"][-1]
  order, ends = _windows(visual, run.tensor(inputs["video_grid_thw"]))

  old = _positions_4_50(ids, mask, grids, seconds, config)
  hidden, logits = run.language(arrays["inputs_embeds"], mask, old)
  following = np.where(mask == 1, old, -1).max(axis=(0, 2)) + 1
  return arrays | {
    "patch_embed": seen["patch_embed"][-1],
    "window_index": order,
    "cu_window_seqlens": ends,
    "vision_tower_output": tower.last_hidden_state,
    # By now split by video.
    "video_features": np.concatenate([*map(_numpy, tower.pooler_output)]),
    "rope_deltas": deltas,
    "v4_position_ids": old,
    "v4_rope_deltas": (following - ids.shape[1])[:, None],
    "v4_last_hidden_state": hidden,
    "v4_logits": logits,
  }


_MAKERS = {"llava_onevision": _llava_onevision, "qwen2_5_vl": _qwen2_5_vl}


def _counted_seconds(run, inputs):
  """Returns (seconds, positions, deltas): fractions if this version counts."""
  known = {name: run.tensor(value) for name, value in inputs.items()}
  del known["pixel_values_videos"]

  def index(seconds):
    known["second_per_grid_ts"] = run.tensor(seconds)
    return map(_numpy, run.model.model.get_rope_index(**known))

  for seconds in np.array(_SECONDS, np.float32):
    positions, deltas = index(seconds)
    whole, _ = index(np.trunc(seconds))
    if (positions != whole).any():
      break
  return seconds, positions, deltas


def frame_sizes(config):
  """Returns (rows, columns) of tokens of a frame of each of the two clips."""
  processor = checkpoints.make_model(config).processor
  if processor.one_grid:
    return [processor.fixed_grid(1)[1:]] * 2
  # Grids that the windows do and do not divide.
  vision = config.vision
  side = max(2, vision.window_size // (vision.patch_size * vision.merge_size))
  return [(side + 1, side + 2), (side, side - 1)]


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
  return _numpy(order), np.unique(_numpy(ends))


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


class _Run:
  """The reference model and how it is run; `rng` of everything random."""

  def __init__(self, torch, model, device, config, rng, max_new_tokens):
    self.model, self._torch, self._device = model, torch, device
    self.config, self._rng = config, rng
    self._max_new_tokens = max_new_tokens

  def tensor(self, array):
    return self._torch.from_numpy(np.asarray(array)).to(self._device)

  def inputs(self, directory, num_video, pixels, num_newlines=0):
    """Returns left-padded prompts and random pixels of a shape."""
    given = (self.config, num_video, self._rng, num_newlines)
    prompts = _prompts(directory, *given)
    # Any text id will do at the padding: the mask hides it.
    shape = (len(prompts), max(map(len, prompts)))
    ids = np.full(shape, prompts[0][0], np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
      ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    pixels = self._rng.uniform(-1, 1, pixels).astype(np.float32)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | {"pixel_values_videos": pixels}

  def decoder(self, inputs, positions, num_video, position_ids=None, **modules):
    """Returns what modules did and the arrays from embedded prompts to ids.

    `inputs` of the whole model by name; `positions`, int64[B, L] or [3, B, L],
    are what the decoder is to use, `position_ids` what a direct call is to be
    told of them. The first video has `num_video` tokens.
    """
    tensors = {name: self.tensor(value) for name, value in inputs.items()}
    options = dict(output_hidden_states=True, use_cache=False)
    if position_ids is not None:
      options["position_ids"] = self.tensor(position_ids)
    language = self.model.model.language_model
    with _recorded(language=language, **modules) as seen:
      full = self.model(**tensors, **options)
    embeds = seen["language"][1]["inputs_embeds"]
    arrays = inputs | {
      "position_ids": positions,
      "inputs_embeds": embeds,
      "hidden_states": self._torch.stack(full.hidden_states),
      "last_hidden_state": full.hidden_states[-1],
      "logits": self._head(full.hidden_states[-1]),
      "generated_ids": self._generated(tensors),
    }
    is_video = inputs["input_ids"][0] == self.config.video_token_id
    video = np.flatnonzero(is_video)[:num_video]
    mask = inputs["attention_mask"]
    return seen, arrays | self._dropped(embeds, positions, video, mask)

  def language(self, embeds, mask, positions):
    """Returns (last hidden state, logits) of the decoder alone."""
    # Without a mask, gaps in the positions are read as ends of sequences.
    out = self.model.model.language_model(
      inputs_embeds=embeds, attention_mask=self.tensor(mask),
      position_ids=self.tensor(positions), use_cache=False,
    )  # fmt: skip
    return out.last_hidden_state, self._head(out.last_hidden_state)

  def _head(self, hidden):
    weight = self.model.lm_head.weight
    return self._torch.nn.functional.linear(hidden.float(), weight.float())

  def _dropped(self, embeds, positions, video, mask) -> dict[str, Any]:
    """Runs the first prompt with some of its rows `video`, positions kept."""
    num_keep = max(1, int(_KEPT * len(video)))
    gone = self._rng.permutation(video)[num_keep:]
    index = np.setdiff1d(np.flatnonzero(mask[0]), gone)
    embeds, ones = embeds[:1, self.tensor(index)], np.ones((1, len(index)), int)
    found = self.language(embeds, ones, positions[..., :1, index])
    names = ("keep_index", "last_hidden_state", "logits")
    found = dict(zip(names, (index, *found), strict=True))
    return {f"dropped_{name}": value for name, value in found.items()}

  def _generated(self, tensors):
    """Returns the greedy ids, as far as rounding cannot change them."""
    # Without an end: all steps are compared.
    settings = type(self.model.generation_config)
    self.model.generation_config = settings(do_sample=False, pad_token_id=0)
    wanted = dict(return_dict_in_generate=True, output_logits=True)
    out = self.model.generate(
      **tensors, **wanted, max_new_tokens=self._max_new_tokens
    )
    steps = 1  # The first step is always told.
    for logits in out.logits[1:]:
      best = logits.float().topk(2, dim=-1).values
      tie = _TIE * max(8.0, float(logits.abs().max()))
      if bool((best[:, 0] - best[:, 1] < tie).any()):
        break
      steps += 1
    start = tensors["input_ids"].shape[1]
    return out.sequences[:, start : start + steps]


def load(directory, name, device, dtype, attention):
  """Returns (torch, the model of class `name`), ready to be compared."""
  try:
    import torch
    import transformers
  except ImportError as error:
    raise errors.UserError(
      f"comparing with transformers needs PyTorch and transformers ({error});"
      " install them: pip install 'cacovid_jax[hf]'"
    ) from error
  transformers.utils.logging.disable_progress_bar()
  # Nothing may be rounded to TF32.
  torch.backends.cuda.matmul.allow_tf32 = False
  torch.backends.cudnn.allow_tf32 = False
  try:
    model, info = getattr(transformers, name).from_pretrained(
      directory, dtype=getattr(torch, dtype), attn_implementation=attention,
      local_files_only=True, output_loading_info=True,
    )  # fmt: skip
  except (OSError, ValueError, RuntimeError, KeyError, AssertionError) as error:
    raise errors.UserError(
      f"transformers {transformers.__version__} cannot load {directory}"
      f" ({errors.one_line(error)})"
    ) from error
  if missing := sorted(info["missing_keys"]):
    # They would be random there: a comparison would tell nothing.
    raise errors.UserError(
      f"transformers {transformers.__version__} finds no {missing[0]} in"
      f" {directory} ({len(missing)} such); give a complete checkpoint"
    )
  try:
    return torch, model.to(device).eval()
  except (RuntimeError, AssertionError) as error:
    raise errors.UserError(
      f"PyTorch cannot compute on {device!r} ({errors.one_line(error)}); give"
      " another --torch_device"
    ) from error


@contextlib.contextmanager
def _recorded(**modules):
  """Yields {name: (arguments, keywords, output)} of modules that run."""
  seen = {}

  def keep(name, module, *call):
    del module
    seen[name] = call

  with contextlib.ExitStack() as stack:
    for name, module in modules.items():
      hook = functools.partial(keep, name)
      hook = module.register_forward_hook(hook, with_kwargs=True)
      stack.callback(hook.remove)
    yield seen


def _prompts(directory, config, num_video, rng, num_newlines):
  """Returns int64[L] ids of each question; random ids without a tokenizer.

  Behind the N tokens of each video are as many newlines of the same id.
  """
  if os.path.isfile(os.path.join(directory, "tokenizer.json")):
    tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
    each = zip(_QUESTIONS, map(int, num_video), strict=True)
    return [tokenizer.encode_prompt(*x).ids.astype(np.int64) for x in each]
  start, end = (
    [getattr(config, name)] if hasattr(config, name) else []
    for name in ("vision_start_token_id", "vision_end_token_id")
  )
  special = [config.image_token_id, config.video_token_id, *start, *end]
  text = np.setdiff1d(np.arange(config.text.vocab_size), special)
  prompts = []
  for count, length in zip(num_video, (6, 11), strict=True):
    video = [config.video_token_id] * (count + num_newlines)
    parts = [rng.choice(text, 4), start, video, end, rng.choice(text, length)]
    prompts.append(np.concatenate(parts).astype(np.int64))
  return prompts


def _numpy(value) -> np.ndarray:
  """Returns the array of a tensor; lists and arrays are told as they are."""
  if not hasattr(value, "detach"):
    return np.asarray(value)
  # NumPy has no bfloat16 of its own.
  value = value.float() if value.is_floating_point() else value
  return value.detach().cpu().numpy()
