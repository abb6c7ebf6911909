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
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, generation, processors, prompt_batch
from cacovid_jax.parity import patches, stage
from cacovid_jax.parity import prompts as prompts_lib

# For stages whose largest value is at most `_SCALE`; they grow in proportion
# beyond, as rounding does. (In the golden tiny model the projected features
# reach 21, where the reference itself is 1.1e-5 away from its float64 result.)
STAGE_TOLERANCE, LOGITS_TOLERANCE = 2e-5, 1e-4
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
_PREFIXES = ("dropped", "pruned")  # The same, in folders of other makers.
_DECODER_ARRAYS = dict(
  pixel_values_videos=5, video_features=3, input_ids=2, attention_mask=2,
  position_ids=2, inputs_embeds=3, hidden_states=4, last_hidden_state=3,
  logits=3, generated_ids=2,
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
    for prefix in _PREFIXES:
      if f"{prefix}_keep_index" in golden:
        _dropped(run, prompts, x, placed["v5"][0], prefix)
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
  own = run.of_video(prompts.video_rows)
  hidden, _ = run.forward(x, placed["v5"][0], lengths=prompts.lengths, **own)
  return run.logits(hidden[prompts.valid]), prompts.rows("logits")


class _Run:
  """The compiled functions of one comparison, and the stages so far."""

  def __init__(self, model, params, golden):
    self.model, self.params, self.golden = model, params, golden
    self.one_grid = model.processor.one_grid
    needed = _TOWER_STAGES | _DROPPED_ARRAYS
    if not self.one_grid:
      needed = patches.needed(model)
    for prefix in _PREFIXES:
      # All of them, or none.
      names = {f"{prefix}_{x.partition('_')[2]}": x for x in _DROPPED_ARRAYS}
      if golden.keys() & names.keys():
        needed |= {k: _DROPPED_ARRAYS[v] for k, v in names.items()}
    for name, axes in (_DECODER_ARRAYS | needed).items():
      found = golden.get(name, np.array(None))
      if found.ndim != axes or found.dtype.kind not in "biuf":
        raise errors.UserError(
          f"golden.npz lacks {name}, numbers along {axes} axes; make the golden"
          " file again"
        )
    self.stages = []
    self.deep = None  # float[B, S, N, D] of models that have it.
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
    return (_llava_onevision if self.one_grid else patches.embedded)(self)

  def of_video(self, video_rows, index=None, batch=None):
    """Returns the options of `forward` that the video's rows are.

    `index` are those of its tokens that are left in the first `batch` prompts.
    """
    if self.deep is None:
      return {}
    deep = self.deep[:batch]
    deep = deep if index is None else deep[:, :, index]
    return dict(deep=deep, video_rows=np.asarray(video_rows))

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
  prompts = prompts_lib.GoldenPrompts(
    model.config, golden, num_video, num_newlines=1
  )
  x = run.batched(model.embed_prompt, prompts.ids, features, prompts.video_rows)
  # The newline is the row behind the video's.
  rows = prompts.video_rows
  rows = np.concatenate([rows, rows[:, -1:] + 1], axis=1)
  run.add("video_features", np.take_along_axis(x, rows[..., None], axis=1))
  positions = prompts.roll(golden["position_ids"])[:, None]
  return prompts, x, {"v5": (positions, prompts.lengths)}


def _decoder(run, prompts, x, positions, next_positions):
  """Adds the stages from the embedded prompts to the generated ids."""
  valid = prompts.valid
  run.add("inputs_embeds", x[valid], prompts.rows("inputs_embeds"))

  own = run.of_video(prompts.video_rows)
  hidden, out = run.forward(x, positions, lengths=prompts.lengths, **own)
  states = run.golden["hidden_states"]  # [layers + 1, B, L, D], last normed.
  mine = [x, *out["hidden"][:-1], hidden]
  inner = STAGE_TOLERANCE if run.one_grid else patches.RESIDUAL_TOLERANCE
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
  run.add("generated_ids", jax.jit(greedy)(*given, **own), tolerance=0.0)


def _head(run, prompts, hidden, prefix=""):
  """Adds the last hidden state and the logits of the whole prompts."""
  for name, ours, tolerance in (
    ("last_hidden_state", hidden, STAGE_TOLERANCE),
    ("logits", run.logits(hidden), LOGITS_TOLERANCE),
  ):
    name = f"{prefix}{name}"
    run.add(name, ours[prompts.valid], prompts.rows(name), tolerance)


def _dropped(run, prompts, x, positions, prefix):
  """Runs the first prompt without the dropped tokens, positions kept."""
  padding = int((run.golden["attention_mask"][0] == 0).sum())
  rows = run.golden[f"{prefix}_keep_index"] - padding  # Rows after rolling.
  length, num_video = prompts.lengths[0], prompts.num_video[0]
  video = prompts.video_rows[0, :num_video]
  index = np.flatnonzero(np.isin(video, rows))
  # By a compressor's way, unless text was dropped, too, which none ever does.
  if np.isin(np.delete(np.arange(length), video), rows).all():
    rows, _, _ = prompt_batch.kept_rows(
      index, len(index), video_rows=video, length=length, num_rows=length
    )
  kept = np.searchsorted(rows, video[index])[None]
  own = run.of_video(kept, index, batch=1)
  hidden, _ = run.forward(x[:1, rows], positions[:1, :, rows], **own)
  run.add(f"{prefix}_last_hidden_state", hidden)
  name = f"{prefix}_logits"
  run.add(name, run.logits(hidden), tolerance=LOGITS_TOLERANCE)


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
