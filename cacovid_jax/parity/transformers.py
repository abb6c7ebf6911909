"""The installed transformers as the reference for a checkpoint directory.

Runs the directory's model in PyTorch, eager attention, on seeded random pixels
and two chat prompts, and records what a golden folder holds under the same
names; `parity.models` then compares our model with it.

Axes: B prompts, L prompt tokens, D width, T frames, N video tokens.
"""

import contextlib
import functools
import os
from typing import Any

import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints, hub
from cacovid_jax.parity import models, reference_patches

_QUESTIONS = (
  "What happens first?",
  "Describe the video in one sentence, and name the colours that you see.",
)
# What the decoder calls features that it adds to rows of video.
_DEEP = "deepstack_visual_embeds"
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
    grids = [(num_frames, *size) for size in frame_sizes(config)]
    arrays = make(run, directory, np.array(grids))
  return {
    name: reference_patches.to_numpy(value) for name, value in arrays.items()
  }


def _llava_onevision(run, directory, grids) -> dict[str, Any]:
  core, config = run.model.model, run.config
  size, num_video = config.vision.image_size, int(grids[0].prod())
  pixels = (2, grids[0, 0], 3, size, size)
  inputs = run.inputs(directory, grids, pixels)
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


_MAKERS = {
  "llava_onevision": _llava_onevision,
  "qwen2_5_vl": reference_patches.qwen2_5_vl,
  "qwen3_vl": reference_patches.qwen3_vl,
}


def frame_sizes(config):
  """Returns (rows, columns) of tokens of a frame of each of the two clips."""
  processor = checkpoints.make_model(config).processor
  if processor.one_grid:
    return [processor.fixed_grid(1)[1:]] * 2
  # Grids that windows, where there are some, do and do not divide.
  side = max(2, config.vision.window_side or 0)
  return [(side + 1, side + 2), (side, side - 1)]


class _Run:
  """The reference model and how it is run; `rng` of everything random."""

  def __init__(self, torch, model, device, config, rng, max_new_tokens):
    self.model, self._torch, self._device = model, torch, device
    self.config, self._rng = config, rng
    self._max_new_tokens = max_new_tokens

  def tensor(self, array):
    return self._torch.from_numpy(np.asarray(array)).to(self._device)

  def inputs(self, directory, grids, pixels):
    """Returns left-padded prompts and random pixels of a shape."""
    prompts = _prompts(directory, self.config, grids, self._rng)
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
    mask, deep = inputs["attention_mask"], seen["language"][1].get(_DEEP)
    return seen, arrays | self._dropped(embeds, positions, video, mask, deep)

  def language(self, embeds, mask, positions, **options):
    """Returns (last hidden state, logits) of the decoder alone."""
    # Without a mask, gaps in the positions are read as ends of sequences.
    out = self.model.model.language_model(
      inputs_embeds=embeds, attention_mask=self.tensor(mask),
      position_ids=self.tensor(positions), use_cache=False, **options,
    )  # fmt: skip
    return out.last_hidden_state, self._head(out.last_hidden_state)

  def _head(self, hidden):
    weight = self.model.lm_head.weight
    return self._torch.nn.functional.linear(hidden.float(), weight.float())

  def _dropped(self, embeds, positions, video, mask, deep) -> dict[str, Any]:
    """Runs the first prompt with some of its rows `video`, positions kept.

    `deep` are features that the decoder adds to rows of video, or None.
    """
    num_keep = max(1, int(_KEPT * len(video)))
    gone = self._rng.permutation(video)[num_keep:]
    index = np.setdiff1d(np.flatnonzero(mask[0]), gone)
    embeds, ones = embeds[:1, self.tensor(index)], np.ones((1, len(index)), int)
    options, kept = {}, np.flatnonzero(~np.isin(video, gone))
    if deep is not None:
      options[_DEEP] = [one[self.tensor(kept)] for one in deep]
      options["visual_pos_masks"] = self.tensor(np.isin(index, video)[None])
    found = self.language(embeds, ones, positions[..., :1, index], **options)
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


def _prompts(directory, config, grids, rng):
  """Returns int64[L] ids of each question; random ids without a tokenizer.

  Behind the tokens of each video are as many newlines as the model has.
  """
  model = checkpoints.make_model(config)
  if os.path.isfile(os.path.join(directory, "tokenizer.json")):
    tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
    each = zip(
      _QUESTIONS, (tuple(map(int, grid)) for grid in grids), strict=True
    )
    prompts = [model.encode_prompt(tokenizer, *x) for x in each]
    return [prompt.ids.astype(np.int64) for prompt in prompts]
  start, end = (
    [getattr(config, name)] if hasattr(config, name) else []
    for name in ("vision_start_token_id", "vision_end_token_id")
  )
  special = [config.image_token_id, config.video_token_id, *start, *end]
  text = np.setdiff1d(np.arange(config.text.vocab_size), special)
  apart, prompts = model.processor.tells_time, []
  for (T, *sides), length in zip(grids, (6, 11), strict=True):
    # In one block, or each temporal patch behind its time.
    blocks, each = (T, 1) if apart else (1, T)
    video = [config.video_token_id] * (each * np.prod(sides))
    video += [config.video_token_id] * model.num_newlines
    parts = [rng.choice(text, 4)]
    for block in range(blocks):
      parts += [rng.choice(text, apart * (1 + block % 3)), start, video, end]
    parts.append(rng.choice(text, length))
    prompts.append(np.concatenate(parts).astype(np.int64))
  return prompts
