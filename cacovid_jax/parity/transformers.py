"""The installed transformers as the reference for a checkpoint directory.

Runs the directory's model in PyTorch, float32 and eager attention, on seeded
random pixels and two chat prompts, and records what a golden folder holds
under the same names; `parity.models` then compares our model with it. So any
checkpoint is its own golden folder, where PyTorch and transformers (the extra
`[hf]`) are installed.

Axes: B prompts, L prompt tokens, D width, T frames, N video tokens.
"""

import functools
import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints
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
# In half precision two tokens may change places whose logits are this close, as
# a share of the largest: bfloat16 resolves 0.4 % of it.
HALF_TIE = 1e-2
HALF_SHARE, HALF_POSITIONS = 0.99, 500


class Agreement(NamedTuple):
  """How often two models in half precision hold the same token most likely."""

  positions: int  # Prompt tokens compared.
  # Of these, where the reference's best two logits are within `HALF_TIE` of the
  # largest.
  ties: int
  same: int  # Of the others, where the best token is the same.
  near: int  # Positions whose best two logits are within `HALF_TIE` itself.
  same_but_near: int  # Of the others, where the best token is the same.

  @property
  def share(self) -> float:
    """Same best token, of the positions that are no ties."""
    return self.same / max(1, self.positions - self.ties)

  @property
  def strict_share(self) -> float:
    """Same best token, of the positions whose logits are not near."""
    return self.same_but_near / max(1, self.positions - self.near)

  @property
  def ok(self) -> bool:
    return self.positions >= HALF_POSITIONS and self.share >= HALF_SHARE


def check(directory: str | os.PathLike, **options):
  """Returns the list of `stage.Stage` of our model beside transformers'.

  Args:
    directory: Hugging Face checkpoint directory.
    **options: of `reference`.
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


def agree(
  directory: str | os.PathLike, *, dtype="bfloat16", seed=0, device="cpu"
) -> tuple[Agreement, Agreement]:
  """Returns two `Agreement`s of models that all compute in `dtype`.

  The first is ours with transformers'. The second is transformers' with itself,
  by another of its attention kernels: what rounding alone does to the
  checkpoint. Arguments as of `reference`.
  """
  sizes = _frame_sizes(checkpoints.load_config(os.fspath(directory)))
  tokens = sum(rows * columns for rows, columns in sizes)
  settings = dict(
    seed=seed,
    # As many as the verdict asks for, without the text.
    num_frames=-(-HALF_POSITIONS // tokens),
    max_new_tokens=1,
    device=device,
    dtype=dtype,
  )
  other = reference(directory, attention="sdpa", **settings)
  valid = other["attention_mask"].astype(bool)
  other = other["logits"][valid]
  arrays = reference(directory, **settings)
  checkpoint = checkpoints.load(directory, jnp.dtype(dtype))
  mine, theirs = models.logits(checkpoint.model, checkpoint.params, arrays)
  return agreement(mine, theirs), agreement(other, arrays["logits"][valid])


def agreement(ours: np.ndarray, theirs: np.ndarray) -> Agreement:
  """Returns the `Agreement` of logits float[n, V]."""
  second, best = np.partition(theirs, -2, axis=-1)[:, -2:].T
  tie = best - second <= HALF_TIE * np.maximum(1.0, np.abs(best))
  near = best - second <= HALF_TIE
  same = ours.argmax(axis=-1) == theirs.argmax(axis=-1)
  counts = (tie, same & ~tie, near, same & ~near)
  return Agreement(len(theirs), *(int(count.sum()) for count in counts))


def reference(
  directory: str | os.PathLike,
  *,
  seed=0,
  num_frames=2,
  max_new_tokens=8,
  device="cpu",
  dtype="float32",
  attention="eager",
) -> dict[str, np.ndarray]:
  """Returns the arrays of a golden.npz, as transformers computes them.

  Args:
    directory: Hugging Face checkpoint directory.
    seed: of pixels and dropped tokens.
    num_frames: T, frames (time slices for Qwen2.5-VL) of each of two clips.
    max_new_tokens: tokens that are generated greedily, less those from the
      first one on that rounding could decide.
    device: where PyTorch computes.
    dtype: in what; arrays of half precision are returned as float32. The
      head computes in float32 always: logits in half precision tie.
    attention: kernel, as transformers names it.
  """
  directory = os.fspath(directory)
  config = checkpoints.load_config(directory)  # Our own one-line mistakes.
  rng = np.random.default_rng(seed)
  described = config.to_hf()
  make, (name,) = _MAKERS[described["model_type"]], described["architectures"]
  torch, model = _load(directory, name, device, dtype, attention)
  with torch.no_grad():
    run = _Run(torch, model, device, rng, max_new_tokens)
    arrays = make(run, directory, config, num_frames)
  return {name: _numpy(value) for name, value in arrays.items()}


def _llava_onevision(run, directory, config, num_frames) -> dict[str, Any]:
  rng, core = run.rng, run.model.model
  size, side = config.vision.image_size, config.pooled_side
  num_video = num_frames * side * side
  prompts = _prompts(directory, config, [num_video] * 2, rng, num_newlines=1)
  ids, mask = _left_padded(prompts)
  shape = (len(ids), num_frames, 3, size, size)
  inputs = {
    "input_ids": ids,
    "attention_mask": mask,
    "pixel_values_videos": rng.uniform(-1, 1, shape).astype(np.float32),
  }
  # As generation numbers them; a direct call counts the padding, too.
  positions = np.where(mask == 1, mask.cumsum(axis=1) - 1, 1)
  # One module deeper before transformers 5.
  tower = getattr(core.vision_tower, "vision_model", core.vision_tower)
  seen = _Recorder(
    embeddings=tower.embeddings, projector=core.multi_modal_projector
  )
  with seen:
    arrays = run.decoder(inputs, positions, position_ids=positions)
  projected = seen.outputs["projector"]
  is_video = ids == config.video_token_id
  arrays |= run.dropped(positions, is_video[0].nonzero()[0][:num_video], mask)
  embeds = arrays["inputs_embeds"]
  return arrays | {
    "vision_embeddings": seen.outputs["embeddings"],
    # What is chosen of the tower's states is what the projector is given.
    "vision_tower_output": seen.inputs["projector"][0],
    "projected_features": projected,
    "pooled_features": core.apply_pooling(projected),
    "video_features": embeds[run.tensor(is_video)].reshape(
      len(ids), num_video + 1, -1
    ),
  }


def _qwen2_5_vl(run, directory, config, num_slices) -> dict[str, Any]:
  rng, core, vision = run.rng, run.model.model, config.vision
  grids = np.array([(num_slices, *size) for size in _frame_sizes(config)])
  num_video = grids.prod(axis=1)
  prompts = _prompts(directory, config, num_video, rng)
  ids, mask = _left_padded(prompts)
  shape = (num_video.sum() * vision.patches_per_token, vision.patch_values)
  inputs = {
    "input_ids": ids,
    "attention_mask": mask,
    "pixel_values_videos": rng.uniform(-1, 1, shape).astype(np.float32),
    "video_grid_thw": grids * (1, vision.merge_size, vision.merge_size),
    # 2 marks videos.
    "mm_token_type_ids": np.where(ids == config.video_token_id, 2, 0),
  }
  seconds, positions, deltas = _counted_seconds(run, inputs)
  inputs["second_per_grid_ts"] = seconds
  seen = _Recorder(patch_embed=core.visual.patch_embed, tower=core.visual)
  with seen:
    arrays = run.decoder(inputs, positions)
  tower = seen.outputs["tower"]
  rows = np.flatnonzero(ids[0] == config.video_token_id)
  arrays |= run.dropped(positions, rows, mask)
  order, ends = _windows(core.visual, run.tensor(inputs["video_grid_thw"]))

  old = _positions_4_50(ids, mask, grids, seconds, config)
  hidden, logits = run.language(arrays["inputs_embeds"], mask, old)
  following = np.where(mask == 1, old, -1).max(axis=(0, 2)) + 1
  return arrays | {
    "patch_embed": seen.outputs["patch_embed"],
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

  for seconds in _SECONDS:
    seconds = np.array(seconds, np.float32)
    positions, deltas = index(seconds)
    whole, _ = index(np.trunc(seconds))
    if (positions != whole).any():
      break
  return seconds, positions, deltas


def _frame_sizes(config):
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

    order, ends = vision_utils.get_vision_window_index(
      grids,
      spatial_merge_size=tower.spatial_merge_size,
      window_size=tower.window_size,
      patch_size=tower.patch_size,
    )
  # Windows without a token end where the one before does.
  return np.asarray(_on_host(order)), np.unique(_on_host(ends))


def _positions_4_50(ids, mask, grids, seconds, config) -> np.ndarray:
  """Returns int64[3, B, L] by the rule of 4.50, which 5.x no longer has.

  Token by token, unlike `qwen2_5_vl.position_ids`, so that one checks the
  other; only the decoder behind it is transformers' own.
  """
  positions = np.ones((3, *ids.shape), np.int64)
  for row, (T, H, W) in enumerate(grids):
    step = np.float32(seconds[row]) * np.float32(config.tokens_per_second)
    cells = [
      (int(np.float32(t) * step), h, w)
      for t in range(T)
      for h in range(H)
      for w in range(W)
    ]
    following, start = 0, None
    for place in np.flatnonzero(mask[row]):
      if ids[row, place] != config.video_token_id:
        positions[:, row, place] = following
        following += 1
        continue
      if start is None:
        start = following
      where = start + np.array(cells.pop(0))
      positions[:, row, place] = where
      following = max(following, int(where.max()) + 1)
  return positions


class _Run:
  """The reference model and how it is run; `rng` of everything random."""

  def __init__(self, torch, model, device, rng, max_new_tokens):
    self.model, self.rng = model, rng
    self._torch, self._device = torch, device
    self._max_new_tokens = max_new_tokens
    self._embeds = None

  def tensor(self, array):
    return self._torch.from_numpy(np.asarray(array)).to(self._device)

  def decoder(self, inputs, positions, **extra) -> dict[str, Any]:
    """Returns the arrays from the embedded prompts to the generated ids.

    `inputs` of the whole model by name, `extra` those of a direct call that
    generation finds out for itself; `positions`, int64[B, L] or [3, B, L], are
    what the decoder is to use.
    """
    tensors = {name: self.tensor(value) for name, value in inputs.items()}
    given = {name: self.tensor(value) for name, value in extra.items()}
    seen = _Recorder(language=self.model.model.language_model)
    with seen:
      full = self.model(
        **tensors, **given, output_hidden_states=True, use_cache=False
      )
    self._embeds = seen.keywords["language"]["inputs_embeds"]
    return inputs | {
      "position_ids": positions,
      "inputs_embeds": self._embeds,
      "hidden_states": self._torch.stack(full.hidden_states),
      "last_hidden_state": full.hidden_states[-1],
      "logits": self._head(full.hidden_states[-1]),
      "generated_ids": self._generated(tensors),
    }

  def language(self, embeds, mask, positions):
    """Returns (last hidden state, logits) of the decoder alone."""
    out = self.model.model.language_model(
      inputs_embeds=embeds,
      # Without a mask, gaps in the positions are read as ends of sequences.
      attention_mask=self.tensor(mask),
      position_ids=self.tensor(positions),
      use_cache=False,
    )
    return out.last_hidden_state, self._head(out.last_hidden_state)

  def _head(self, hidden):
    weight = self.model.lm_head.weight
    return self._torch.nn.functional.linear(hidden.float(), weight.float())

  def dropped(self, positions, video, mask) -> dict[str, Any]:
    """Runs the first prompt with some of its rows `video`, positions kept."""
    num_keep = max(1, int(_KEPT * len(video)))
    gone = self.rng.permutation(video)[num_keep:]
    index = np.setdiff1d(np.flatnonzero(mask[0]), gone)
    hidden, logits = self.language(
      self._embeds[:1, self.tensor(index)],
      np.ones((1, len(index)), np.int64),
      positions[..., :1, index],
    )
    return {
      "dropped_keep_index": index,
      "dropped_last_hidden_state": hidden,
      "dropped_logits": logits,
    }

  def _generated(self, tensors):
    """Returns the greedy ids, as far as rounding cannot change them."""
    # Without an end: all steps are compared.
    settings = type(self.model.generation_config)
    self.model.generation_config = settings(do_sample=False, pad_token_id=0)
    out = self.model.generate(
      **tensors,
      max_new_tokens=self._max_new_tokens,
      return_dict_in_generate=True,
      output_logits=True,
    )
    steps = len(out.logits)
    for step, logits in enumerate(out.logits):
      best = logits.float().topk(2, dim=-1).values
      tie = _TIE * max(8.0, float(logits.abs().max()))
      # The first step is always told.
      if step and bool((best[:, 0] - best[:, 1] < tie).any()):
        steps = step
        break
    start = tensors["input_ids"].shape[1]
    return out.sequences[:, start : start + steps]


def _load(directory, name, device, dtype, attention):
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
      dtype=getattr(torch, dtype),
      attn_implementation=attention,
      local_files_only=True,
      output_loading_info=True,
    )
  except (OSError, ValueError, RuntimeError, KeyError, AssertionError) as error:
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
    self.inputs, self.keywords, self.outputs = {}, {}, {}
    self._modules, self._hooks = modules, []

  def __enter__(self):
    for name, module in self._modules.items():
      keep = functools.partial(self._keep, name)
      hook = module.register_forward_hook(keep, with_kwargs=True)
      self._hooks.append(hook)
    return self

  def __exit__(self, *exc_info):
    for hook in self._hooks:
      hook.remove()

  def _keep(self, name, module, args, kwargs, output):
    del module
    self.inputs[name], self.keywords[name] = args, kwargs
    self.outputs[name] = output


def _prompts(directory, config, num_video, rng, num_newlines=0):
  """Returns int64[L] ids of each question; random ids without a tokenizer.

  Behind the N tokens of each video are as many newlines of the same id.
  """
  if os.path.isfile(os.path.join(directory, "tokenizer.json")):
    tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
    return [
      tokenizer.encode_prompt(question, int(count)).ids.astype(np.int64)
      for question, count in zip(_QUESTIONS, num_video, strict=True)
    ]
  around = [
    [getattr(config, name)] if hasattr(config, name) else []
    for name in ("vision_start_token_id", "vision_end_token_id")
  ]
  special = [config.image_token_id, config.video_token_id, *sum(around, [])]
  text = np.setdiff1d(np.arange(config.text.vocab_size), special)
  return [
    np.concatenate(
      [
        rng.choice(text, 4),
        around[0],
        [config.video_token_id] * (count + num_newlines),
        around[1],
        rng.choice(text, length),
      ]
    ).astype(np.int64)
    for count, length in zip(num_video, (6, 11), strict=True)
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


def _numpy(value) -> np.ndarray:
  if isinstance(value, np.ndarray):
    return value
  # NumPy has no bfloat16 of its own.
  value = value.float() if value.is_floating_point() else value
  return _on_host(value).numpy()


def _on_host(value):
  """Returns a tensor in the host's memory; lists and arrays as they are."""
  return value.detach().cpu() if hasattr(value, "detach") else value
