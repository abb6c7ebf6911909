"""The installed transformers as the reference for a checkpoint directory.

Runs the directory's model in PyTorch, float32 and eager attention, on seeded
random pixels and two chat prompts, and records what a golden folder holds
under the same names; `models.golden` then compares our model with it. So any
checkpoint is its own golden folder, where PyTorch and transformers (the extra
`[hf]`) are installed.

Axes: B prompts, L prompt tokens, D width, T frames, N video tokens.
"""

import os
from typing import Any

import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, golden, llava_onevision

_QUESTIONS = (
  "What happens first?",
  "Describe the video in one sentence, and name the colours that you see.",
)
# Kept of the video tokens where the pruned prompt is compared.
_KEPT = 0.25
# Logits nearer to each other than this share of the largest (or of 8) may
# change places within the tolerance of `golden`, either way.
_TIE = 2 * golden.LOGITS_TOLERANCE / 8


def check(
  directory: str | os.PathLike,
  *,
  seed: int = 0,
  num_frames: int = 2,
  max_new_tokens: int = 8,
  device: str = "cpu",
):
  """Returns the list of `stages.Stage` of our model beside transformers'.

  Args:
    directory: Hugging Face checkpoint directory.
    seed: of pixels and dropped tokens.
    num_frames: T, frames of each of the two clips.
    max_new_tokens: tokens that are generated greedily.
    device: where PyTorch computes.
  """
  arrays = reference(
    directory,
    seed=seed,
    num_frames=num_frames,
    max_new_tokens=max_new_tokens,
    device=device,
  )
  config = checkpoints.load_config(directory)
  params = checkpoints.load_params(directory, config)
  return golden.compare(
    llava_onevision.LlavaOnevisionModel(config), params, arrays
  )


def reference(
  directory: str | os.PathLike,
  *,
  seed: int = 0,
  num_frames: int = 2,
  max_new_tokens: int = 8,
  device: str = "cpu",
) -> dict[str, np.ndarray]:
  """Returns the arrays of a golden.npz, as transformers computes them.

  Args:
    directory: Hugging Face checkpoint directory.
    seed: of pixels and dropped tokens.
    num_frames: T.
    max_new_tokens: tokens that are generated greedily, less those from the
      first one on that rounding could decide.
    device: where PyTorch computes.
  """
  directory = os.fspath(directory)
  config = checkpoints.load_config(directory)  # Our own one-line mistakes.
  torch, model = _load(
    directory, "LlavaOnevisionForConditionalGeneration", device
  )
  rng = np.random.default_rng(seed)
  size, side = config.vision.image_size, config.pooled_side
  num_video = num_frames * side * side
  pixels = rng.uniform(
    -1, 1, (len(_QUESTIONS), num_frames, 3, size, size)
  ).astype(np.float32)
  prompts = _prompts(directory, config, num_video, rng)
  ids, mask = _left_padded(prompts)
  # As generation numbers them; a direct call counts the padding, too.
  positions = np.where(mask == 1, mask.cumsum(axis=1) - 1, 1)
  inputs = {
    "input_ids": ids,
    "attention_mask": mask,
    "pixel_values_videos": pixels,
  }
  tensors = {k: torch.from_numpy(v).to(device) for k, v in inputs.items()}

  core = model.model
  tower = core.vision_tower
  seen = _Recorder(
    # One module deeper before transformers 5.
    embeddings=getattr(tower, "vision_model", tower).embeddings,
    projector=core.multi_modal_projector,
    language=core.language_model,
  )
  with torch.no_grad(), seen:
    full = model(
      **tensors,
      position_ids=torch.from_numpy(positions).to(device),
      output_hidden_states=True,
      use_cache=False,
    )
  embeds = seen.keywords["language"]["inputs_embeds"]
  projected = seen.outputs["projector"]
  is_video = ids == config.video_token_id
  arrays = inputs | {
    "position_ids": positions,
    "vision_embeddings": seen.outputs["embeddings"],
    # What is chosen of the tower's states is what the projector is given.
    "vision_tower_output": seen.inputs["projector"][0],
    "projected_features": projected,
    "pooled_features": core.apply_pooling(projected),
    "video_features": embeds[torch.from_numpy(is_video)].reshape(
      len(ids), num_video + 1, -1
    ),
    "inputs_embeds": embeds,
    "hidden_states": torch.stack(full.hidden_states),
    "last_hidden_state": full.hidden_states[-1],
    "logits": full.logits,
  }
  index = _kept_rows(is_video[0], mask[0], num_video, rng)
  with torch.no_grad():
    arrays |= _generated(model, tensors, max_new_tokens)
    arrays |= _dropped(torch, model, embeds, positions, index)
  return {name: _numpy(value) for name, value in arrays.items()}


def _load(directory, name, device):
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
      directory,
      dtype=torch.float32,
      attn_implementation="eager",
      local_files_only=True,
      output_loading_info=True,
    )
  except (OSError, ValueError, RuntimeError, KeyError) as error:
    raise errors.UserError(
      f"transformers {transformers.__version__} cannot load {directory}"
      f" ({errors.one_line(error)})"
    ) from error
  missing = sorted(info["missing_keys"])
  if missing:
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


class _Recorder:
  """Keeps what named modules are given and give while it is entered."""

  def __init__(self, **modules):
    self.inputs: dict[str, tuple] = {}
    self.keywords: dict[str, dict[str, Any]] = {}
    self.outputs: dict[str, Any] = {}
    self._modules, self._hooks = modules, []

  def __enter__(self):
    for name, module in self._modules.items():

      def keep(module, args, kwargs, output, name=name):
        del module
        self.inputs[name], self.keywords[name] = args, kwargs
        self.outputs[name] = output

      hook = module.register_forward_hook(keep, with_kwargs=True)
      self._hooks.append(hook)
    return self

  def __exit__(self, *exc_info):
    for hook in self._hooks:
      hook.remove()


def _prompts(directory, config, num_video, rng) -> list[np.ndarray]:
  """Returns int64[L] ids of each question; random ids without a tokenizer."""
  block = np.full(num_video + 1, config.video_token_id)
  if os.path.isfile(os.path.join(directory, "tokenizer.json")):
    # Here, so that weights can be read where no prompt is made.
    from cacovid_jax.data import prompts

    tokenizer = prompts.Tokenizer.from_directory(directory)
    found = [tokenizer.encode_prompt(q, num_video).ids for q in _QUESTIONS]
    return [ids.astype(np.int64) for ids in found]
  text = np.setdiff1d(
    np.arange(config.text.vocab_size),
    [config.image_token_id, config.video_token_id],
  )
  return [
    np.concatenate([rng.choice(text, 4), block, rng.choice(text, length)])
    for length in (6, 11)
  ]


def _left_padded(prompts) -> tuple[np.ndarray, np.ndarray]:
  """Returns (ids, mask) int64[B, L], as transformers generates from them."""
  length = max(map(len, prompts))
  # Any text id will do: the mask hides it.
  ids = np.full((len(prompts), length), prompts[0][0], np.int64)
  mask = np.zeros_like(ids)
  for row, prompt in enumerate(prompts):
    ids[row, length - len(prompt) :] = prompt
    mask[row, length - len(prompt) :] = 1
  return ids, mask


def _generated(model, tensors, max_new_tokens) -> dict[str, np.ndarray]:
  """Returns the greedy continuation, as far as rounding cannot change it."""
  given = type(model.generation_config)(do_sample=False, pad_token_id=0)
  model.generation_config = given  # Without an end: all steps are compared.
  out = model.generate(
    **tensors,
    max_new_tokens=max_new_tokens,
    return_dict_in_generate=True,
    output_logits=True,
  )
  steps = len(out.logits)
  for step, logits in enumerate(out.logits):
    best = logits.float().topk(2, dim=-1).values
    # The first step is always told.
    tie = _TIE * max(8.0, float(logits.abs().max()))
    if step and bool((best[:, 0] - best[:, 1] < tie).any()):
      steps = step
      break
  start = tensors["input_ids"].shape[1]
  return {"generated_ids": out.sequences[:, start : start + steps]}


def _kept_rows(is_video, mask, num_video, rng) -> np.ndarray:
  """Returns the rows of the padded prompt that stay: text and some tokens."""
  video = np.flatnonzero(is_video)[:num_video]  # The newline is text.
  num_keep = max(1, int(_KEPT * num_video))
  dropped = rng.permutation(video)[num_keep:]
  return np.setdiff1d(np.flatnonzero(mask), dropped)


def _dropped(torch, model, embeds, positions, index) -> dict[str, Any]:
  """Runs the first prompt's rows `index`, positions kept."""
  rows = torch.from_numpy(index).to(embeds.device)
  where = torch.from_numpy(positions[..., :1, index]).to(embeds.device)
  out = model.model.language_model(
    inputs_embeds=embeds[:1, rows],
    # Without a mask, gaps in the positions are read as ends of sequences.
    attention_mask=torch.ones_like(rows)[None],
    position_ids=where,
    use_cache=False,
  )
  hidden = out.last_hidden_state
  return {
    "dropped_keep_index": index,
    "dropped_last_hidden_state": hidden,
    "dropped_logits": model.lm_head(hidden),
  }


def _numpy(value) -> np.ndarray:
  if isinstance(value, np.ndarray):
    return value
  return value.detach().cpu().numpy()
