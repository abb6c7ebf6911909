"""One batch of questions, and what has been computed for it so far.

Letters: B batch, T frames, N video tokens, K kept tokens, M tokens of an answer
or continuation.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.data import question as question_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.models import prompt_batch
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import network

_CONTINUATION_STEP = 8  # Lengths are rounded up to it: few programs for many.


class KeptTokens(NamedTuple):
  """What a method kept of one clip, and the scores behind it.

  Of methods that act inside the language model, what its last layer has left.
  """

  index: np.ndarray  # int32[K].
  token_gap: np.ndarray | None = None  # float32[N] keep - drop, of a policy.
  frame_gap: np.ndarray | None = None  # float32[T], likewise.


class Likelihood(NamedTuple):
  """How likely one continuation of a prompt is."""

  log_prob: float  # Natural, summed over tokens; -inf for an unusable clip.
  num_tokens: int
  greedy: bool  # Whether the most likely answer begins with it.
  fault: str = ""  # Why the clip cannot be used.


class MethodOutput(NamedTuple):
  """Answers, and what became of the tokens that they are from."""

  ids: jax.Array  # int32[B, M].
  trace: base.SelectionTrace


class BatchRunner:
  """At most B questions about clips of one grid, and their prompts.

  What several methods read (scores of a policy, attention of the whole prompt,
  the question's text) is computed when the first one looks at it. `faults` say
  by row why a clip cannot be used, `records` are those of the clips; `batch` is
  a `prompt_batch.PromptBatch`, `lengths` int32[B] those of its prompts.
  Unless the engine waits, `check` tells of numbers that are not finite.
  """

  def __init__(self, engine: Any, questions: Sequence):
    """Waits for the clips and embeds the prompts of an `Engine`'s questions."""
    self._e, self._questions = engine, questions
    grids = {engine.grid_of(question) for question in questions}
    if len(grids) > 1:
      raise ValueError(f"clips of several grids in one batch: {sorted(grids)}")
    (self._shape,) = grids
    self.grid = engine.token_grid(self._shape)
    self.num_video = int(self.grid.num_tokens)
    self._programs, self._params = engine.programs, engine.checkpoint.params
    size = engine.settings.batch_size
    self._rows = prompt_batch.pad_rows(len(questions), size)
    self._scores, self._parts, self._vanilla = {}, {}, None
    # bool[B] of what is read of the tower, and by key of the scores.
    self._finite: list[jax.Array] = []
    self._finite_scores: dict[tuple, jax.Array] = {}
    with engine.timed("clips"):
      self._clips = [engine.source[question.video] for question in questions]
    self.records = [clip.record for clip in self._clips]
    rows = enumerate(self.records)
    self.faults = {row: record.fault for row, record in rows if record.fault}
    with engine.timed("prompts") as follow:
      features = self._of_clips(lambda clip: clip.features, 0)
      deep = None
      if engine.checkpoint.model.num_deep:
        deep = self._of_clips(lambda clip: clip.deep, 1)
      self.batch = self._prompts(questions, features, deep)
      self.lengths, self._frames = self.batch.lengths, self.batch.frames
      follow(self.batch.x)

  def vanilla(self, want_attention: bool = False) -> programs_lib.Vanilla:
    """Returns the answers to the whole prompts; computed once."""
    known = self._vanilla
    if known is None or (want_attention and known.attention is None):
      self._vanilla = self._timed(
        "vanilla", self._programs.vanilla, self._params, self.batch,
        want_attention=want_attention,
      )  # fmt: skip
    return self._vanilla

  def output(self, condition) -> MethodOutput:
    """Returns what the method of a condition answers, and from what."""
    params, batch = self._params, self.batch
    if not condition.method.compressor.selects_first:
      inputs, program = self.inputs(condition), self._program(condition)
      label = f"answer {condition.label}"
      return MethodOutput(*self._timed(label, program, params, batch, inputs))
    selection = self.select(condition)
    label = f"answer from {selection.index.shape[1]} tokens"
    ids = self._timed(label, self._programs.answer, params, batch, selection)
    # Alike in all layers.
    tokens = selection.mask.sum(axis=1, keepdims=True)
    trace = base.SelectionTrace(selection.index, selection.mask, tokens)
    return MethodOutput(ids, trace)

  def select(self, condition) -> base.Selection:
    """Returns the tokens that a method keeps, leading axis B."""
    # Whatever it reads is timed apart from the selection itself.
    inputs, program = self.inputs(condition), self._program(condition)
    if not condition.method.compressor.sees_question:
      program = functools.partial(self._select_by_clip, program)
    return self._timed(f"select {condition.label}", program, inputs)

  def _program(self, condition, **options):
    compressor, programs = condition.method.compressor, self._programs
    first = compressor.selects_first
    make = programs.select if first else programs.select_and_answer
    return make(compressor, condition.ratio, self.grid, **options)

  def _timed(self, name: str, function, *args, **options):
    with self._e.timed(name) as follow:
      return follow(function(*args, **options))

  def release(self) -> None:
    """Lets go of the clips and prompts: nothing more is asked about them."""
    self.batch, self._clips, self._parts = None, [], {}

  def check(self, condition=None) -> None:
    """Refuses what is not finite: features, or scores that a method reads."""
    for finite in self._finite:
      for row in np.flatnonzero(~np.asarray(finite))[:1]:
        raise errors.UserError(
          f"the features of {self._questions[row].video} hold NaN or infinity;"
          " check the checkpoint and its dtype, or empty the folder of cached"
          " features"
        )
    method = condition and condition.method
    for field in method.score_fields if method else ():
      name = method.follows(self._e.policies)
      self._check_scores(self._score_key(field, name, condition))

  def _check_scores(self, key) -> None:
    field, name, *_ = key
    if not np.asarray(self._finite_scores[key]).all():
      raise errors.UserError(
        f"{field.replace('_', ' ')} of policy {name!r} hold NaN or"
        " infinity; check how it was trained"
      )

  def kept(self, condition, chosen=None) -> list[KeptTokens]:
    """Returns what a condition keeps of each clip; `chosen` saves computing."""
    method = condition.method
    if chosen is None:
      first = method.compressor.selects_first
      chosen = self.select(condition) if first else self.output(condition).trace
    index, mask = np.asarray(chosen.index), np.asarray(chosen.mask)
    self.check(condition)
    tokens = frames = [None] * len(index)
    if method.score_fields:
      name = method.follows(self._e.policies)
      scores = self.scores(method.score_fields[0], name, condition)
      tokens, frames = map(_gap, (scores.token, scores.frame))
    return [
      KeptTokens(index[row][mask[row]], tokens[row], frames[row])
      for row in range(len(self._questions))
    ]

  def beside_video(self, trace=None) -> list[int]:
    """Returns the rows of text of each prompt, whole or as a trace leaves."""
    count = np.asarray(self.lengths) - self.num_video
    if self._frames is not None and trace is not None:
      each = math.prod(self._shape[1:])
      index, mask = np.asarray(trace.index), np.asarray(trace.mask)
      for row, frames in enumerate(np.asarray(self._frames)):
        text = np.bincount(frames[frames >= 0]) - each
        text[index[row][mask[row]] // each] = 0
        count[row] -= text.sum()
    return count.tolist()

  def likelihood(
    self, condition, continuations: Sequence[Sequence[list[int]]], size: int
  ) -> list[list[Likelihood]]:
    """Returns how likely ids follow each prompt; the longest have `size`."""
    size = -(-size // _CONTINUATION_STEP) * _CONTINUATION_STEP
    state = self._read(condition, size - 1)
    out = [[] for _ in self._questions]
    for column in range(max(map(len, continuations))):
      # A question with fewer continuations repeats its last.
      chosen = [own[min(column, len(own) - 1)] for own in continuations]
      padded = np.zeros((len(self._rows), size), np.int32)
      lengths = np.zeros(len(self._rows), np.int32)
      for row, ids in enumerate(chosen):
        padded[row, : len(ids)], lengths[row] = ids, len(ids)
      scored = self._programs.score(
        self._params, *state, self.batch.next_position, padded, lengths
      )
      log_probs, greedy = map(np.asarray, scored)
      for row, own in enumerate(continuations):
        if column < len(own):
          fault = self.faults.get(row, "")
          log_prob = -np.inf if fault else float(log_probs[row])
          likely = bool(greedy[row]) and not fault
          out[row].append(Likelihood(log_prob, len(own[column]), likely, fault))
    return out

  def _read(self, condition, room: int):
    """Returns (logits, cache) behind the prompts that a condition leaves."""
    selection = None
    if condition.method is not None:
      self._e.check(condition, self._shape)
      if not condition.method.compressor.selects_first:
        program = self._program(condition, room=room)
        return program(self._params, self.batch, self.inputs(condition))
      selection = self.select(condition)
    return self._programs.read(self._params, self.batch, selection, room)

  def scores(self, field: str, name: str, condition):
    """Returns a policy's Scores for a field of `CompressorInputs`.

    The condition's seed is of the untrained policy, or of the draw of another
    question; its ratio counts for policies that read one.
    """
    key = self._score_key(field, name, condition)
    _, _, seed, ratio = key
    if key not in self._scores:
      batch = self.batch
      if field == "other_scores":
        with self._e.timed("prompts") as follow:
          others = [
            methods_lib.other_question(question, self._e.pool, seed)
            for question in self._questions
          ]
          batch = self._prompts(others, batch.features, batch.deep)
          follow(batch.x)
      with self._e.timed("policy") as follow:
        module = self._e.policies[name].module
        params = self._e.policy_params(field, name, seed)
        given = module, params, batch, self.grid, ratio
        scores = self._programs.scores(*given)
        scores = scores._replace(
          frame=self._own(scores.frame, 1, self._shape[0]),
          token=self._own(scores.token, 1),
        )
        self._finite_scores[key] = follow(_finite_rows(scores))
        if self._e.waits:
          self._check_scores(key)
      self._scores[key] = scores
    return self._scores[key]

  def _score_key(self, field: str, name: str, condition):
    """Returns (field, name, seed, ratio) of what depends on no other."""
    seed = condition.seed if field != "scores" else 0
    reads_ratio = network.reads_ratio(self._e.policies[name].module)
    return field, name, seed, condition.ratio if reads_ratio else None

  def top_frames(self, condition) -> list[list[int]] | None:
    """Returns all frames of each question, best first, by frame score."""
    method = condition.method
    if method is None or "scores" not in method.needs:
      return None
    name = method.follows(self._e.policies)
    gap = _gap(self.scores("scores", name, condition).frame)
    return np.argsort(-gap, axis=1, kind="stable").tolist()

  def inputs(self, condition) -> base.CompressorInputs:
    """Returns what the condition's method reads, leading axis B."""
    method = condition.method
    parts = {}
    for need in sorted(method.needs):
      if need in method.score_fields:
        name = method.follows(self._e.policies)
        parts[need] = self.scores(need, name, condition)
      else:
        parts[need] = self._part(need)
    if method.compressor.stochastic:
      parts["rng"] = self._keys(condition.seed)
    batch = self.batch
    return base.CompressorInputs(
      features=self._own(batch.features, 1), grid=self._shape,
      deep=None if batch.deep is None else self._own(batch.deep, 2), **parts,
    )  # fmt: skip

  def _part(self, need: str):
    if need == "attention":
      return self._own(self.vanilla(want_attention=True).attention, 2)
    if need not in self._parts:
      if need == "text":
        part = self._timed("prompts", self._programs.text, self.batch)
      elif need == "decisive":
        part = self._decisive()
      else:
        # What the vision tower hands out beside the features.
        part = self._stacked([clip.extras[need] for clip in self._clips])
      self._parts[need] = part
    return self._parts[need]

  def _prompts(self, questions, features, deep) -> prompt_batch.PromptBatch:
    """Returns prompts of questions, or of their ids, about these clips."""
    return self._e.prompts.batch(
      lambda *arguments: self._programs.embed(self._params, *arguments),
      [getattr(question, "id", question) for question in questions],
      self._shape, [clip.second_per_grid_t for clip in self._clips], features,
      deep,
    )  # fmt: skip

  def _of_clips(self, read, axis: int) -> jax.Array:
    """Returns an array of each clip, zeros behind its N along `axis`."""
    size, found = self.grid.bucket.tokens, map(read, self._clips)
    return self._stacked(
      [prompt_batch.pad_tokens(x, size, axis) for x in found]
    )

  def _stacked(self, arrays) -> jax.Array:
    """Returns what was read of each clip, leading axis B."""
    rows = [arrays[row] for row in self._rows]
    on_device = any(isinstance(x, jax.Array) for x in arrays)
    joined = jnp.stack(rows) if on_device else jnp.asarray(np.stack(rows))
    self._finite.append(_finite_rows(joined))
    if self._e.waits:
      self.check()
    return joined

  def _own(self, x, axis: int, size: int | None = None):
    """Returns x without what is the bucket's only: the first N of an axis."""
    size = size or self.num_video
    if x.shape[axis] == size:
      return x
    return jax.lax.slice_in_dim(x, 0, size, axis=axis)

  def _decisive(self):
    mask = np.zeros((len(self._rows), self.num_video), bool)
    for row, question in enumerate(self._questions):
      if question.id not in self._e.decisive:
        raise errors.UserError(
          f"decisive.jsonl does not name the tokens of question {question.id}"
        )
      mask[row, list(self._e.decisive[question.id])] = True
    return jnp.asarray(mask)

  def _select_by_clip(self, program, inputs):
    """Runs a rule that never sees the question once per clip, not question."""
    names = [question.video for question in self._questions]
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    alone = {
      name: jax.tree.map(operator.itemgetter(slice(row, row + 1)), inputs)
      for name, row in first.items()
    }
    mesh = self._e.mesh
    if mesh is not None:
      alone = jax.device_put(alone, mesh.devices.flat[0])
    per_clip = {name: program(found) for name, found in alone.items()}
    joined = jax.tree.map(
      lambda *leaves: jnp.concatenate(leaves),
      *[per_clip[names[row]] for row in self._rows],
    )
    if mesh is None:
      return joined
    return mesh_lib.put(joined, mesh, mesh_lib.P("data"))

  def _keys(self, seed: int):
    """Returns one key per question, from the seed and the question's name."""
    names = [self._questions[row].rng_id for row in self._rows]
    hashes = np.array(list(map(question_lib.question_hash, names)), np.uint32)
    key = jax.random.key(seed)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(hashes))


@jax.jit
def _finite_rows(tree) -> jax.Array:
  """Returns bool[B]: whether all is finite in a row of arrays [B, ...]."""
  rows = [
    jnp.isfinite(x).reshape(len(x), -1).all(axis=1)
    for x in jax.tree.leaves(tree)
  ]
  return jnp.stack(rows).all(axis=0)


def _gap(scores) -> np.ndarray:
  """Returns keep - drop of scores [..., 2]."""
  return np.asarray(scores[..., 1] - scores[..., 0])
