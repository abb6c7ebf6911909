"""One batch of questions, and what has been computed for it so far.

Everything that several methods read (scores of a policy, attention of the
whole prompt, the question's text) is computed when the first one asks for it.

Letters: B batch, N video tokens, K kept tokens, M generated tokens.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import programs as programs_lib
from cacovid_jax.models import prompt_batch
from cacovid_jax.parallel import mesh as mesh_lib


class Reply(NamedTuple):
  """What one method answered from, and what it said.

  Attributes:
    ids: int32[B, M] of the answers.
    index: int32[B, K] tokens that were left in the last layer.
    mask: bool[B, K], True where there is one.
    equivalent: float[B], share of the N tokens that a layer saw on average.
    forced: bool[B], True where a method had to change its rule to stay within
      the budget.
  """

  ids: jax.Array
  index: np.ndarray
  mask: np.ndarray
  equivalent: np.ndarray
  forced: np.ndarray


class Asker:
  """At most B questions about clips of one grid, and their prompts.

  Attributes:
    batch: `prompt_batch.PromptBatch`.
    faults: row -> why its clip cannot be used.
  """

  def __init__(self, evaluator: Any, questions: Sequence):
    """Waits for the clips and embeds the prompts.

    Args:
      evaluator: `runner.Evaluator`.
      questions: of those that it was made for.
    """
    self._e, self._questions = evaluator, questions
    grids = {evaluator.grid_of(question) for question in questions}
    if len(grids) > 1:
      raise ValueError(f"clips of several grids in one batch: {sorted(grids)}")
    tools = evaluator.tools(questions[0])
    self._prompts, self._programs = tools.prompts, tools.programs
    self._params = evaluator.checkpoint.params
    with evaluator.timed("clips"):
      self._clips = [evaluator.source[question.video] for question in questions]
    for question, clip in zip(questions, self._clips, strict=True):
      if not np.isfinite(clip.features).all():
        raise errors.UserError(
          f"the features of {question.video} hold NaN or infinity; check the"
          " checkpoint and its dtype, or empty the folder of cached features"
        )
    self.faults = {
      row: clip.fault for row, clip in enumerate(self._clips) if clip.fault
    }
    self._seconds = [clip.second_per_grid_t for clip in self._clips]
    with evaluator.timed("prompts"):
      self.batch = self._prompts.batch(
        self._programs,
        np.stack([clip.features for clip in self._clips]),
        [question.id for question in questions],
        self._seconds,
      )
    self._scores, self._parts = {}, {}
    self._vanilla = None

  def vanilla(self, want_attention: bool = False) -> programs_lib.Vanilla:
    """Returns the answers to the whole prompts; computed once."""
    if self._vanilla is None or (
      want_attention and self._vanilla.attention is None
    ):
      with self._e.timed("vanilla"):
        self._vanilla = jax.block_until_ready(
          self._programs.vanilla(
            self._params, self.batch, want_attention=want_attention
          )
        )
    return self._vanilla

  def reply(self, cell) -> Reply:
    """Returns what the method of a `runner.Cell` answers."""
    num_video = self.batch.features.shape[1]
    if not cell.method.compressor.selects_first:
      ids, trace = self._inside(cell)
      return Reply(
        ids,
        np.asarray(trace.index),
        np.asarray(trace.mask),
        np.asarray(trace.equivalent_ratio(num_video)),
        np.zeros(len(ids), bool)
        if trace.forced is None
        else np.asarray(trace.forced),
      )
    selection = self.select(cell)
    ids = self.answer(selection)
    mask = np.asarray(selection.mask)
    return Reply(
      ids,
      np.asarray(selection.index),
      mask,
      mask.sum(axis=1) / num_video,
      np.zeros(len(ids), bool),
    )

  def select(self, cell) -> base.Selection:
    """Returns the tokens that a method keeps, leading axis B."""
    method = cell.method
    # Whatever it reads is timed apart from the selection itself.
    inputs = self.inputs(cell)
    with self._e.timed(f"select {method.label}"):
      program = self._programs.select(method.compressor, cell.ratio)
      if method.compressor.sees_question:
        selection = program(inputs)
      else:
        selection = self._select_by_clip(program, inputs)
      return jax.block_until_ready(selection)

  def _inside(self, cell):
    """Returns (ids, `SelectionTrace`): choice and answer in one program."""
    method = cell.method
    inputs = self.inputs(cell)
    with self._e.timed(f"answer {method.label}"):
      program = self._programs.select_and_answer(method.compressor, cell.ratio)
      return jax.block_until_ready(program(self._params, self.batch, inputs))

  def answer(self, selection: base.Selection):
    """Returns int32[B, M] ids of the answers to the pruned prompts."""
    num_keep = selection.index.shape[1]
    with self._e.timed(f"answer from {num_keep} tokens"):
      return jax.block_until_ready(
        self._programs.answer(self._params, self.batch, selection)
      )

  def scores(self, field: str, name: str, seed: int):
    """Returns the policy's Scores of the batch.

    Args:
      field: field of `CompressorInputs` that they are for.
      name: which policy.
      seed: of the untrained policy, or of the draw of another question.
    """
    key = field, name, seed if field != "scores" else 0
    if key not in self._scores:
      batch = self.batch
      if field == "other_scores":
        with self._e.timed("prompts"):
          batch = self._prompts.batch(
            self._programs,
            batch.features,
            [self._e.other(question, seed) for question in self._questions],
            self._seconds,
          )
      with self._e.timed("policy"):
        scores = self._programs.scores(
          self._e.policies[name].module,
          self._e.policy_params(field, name, seed),
          batch,
        )
        if not _finite(scores):
          raise errors.UserError(
            f"{field.replace('_', ' ')} of policy {name!r} hold NaN or"
            " infinity; check how it was trained"
          )
      self._scores[key] = scores
    return self._scores[key]

  def top_frames(self, cell) -> list[list[int]] | None:
    """Returns all frames of each question, best first, by frame score."""
    if cell.method is None or "scores" not in cell.method.needs:
      return None
    name = self._e.policy_name(cell.method)
    frame = np.asarray(self.scores("scores", name, 0).frame)
    gap = frame[..., 1] - frame[..., 0]
    return np.argsort(-gap, axis=1, kind="stable").tolist()

  def inputs(self, cell):
    """Returns the `CompressorInputs` of the cell's method, leading axis B."""
    method = cell.method
    parts = {}
    for need in sorted(method.needs):
      if need.endswith("scores"):
        name = self._e.policy_name(method)
        parts[need] = self.scores(need, name, cell.seed)
      else:
        parts[need] = self._part(need)
    if method.compressor.stochastic:
      parts["rng"] = self._keys(cell.seed)
    return base.CompressorInputs(
      features=self.batch.features, grid=self._programs.grid, **parts
    )

  def _part(self, need: str):
    """Returns what needs no policy, leading axis B."""
    if need == "attention":
      return self.vanilla(want_attention=True).attention
    if need not in self._parts:
      if need == "text":
        with self._e.timed("prompts"):
          part = jax.block_until_ready(self._programs.text(self.batch))
      elif need == "decisive":
        part = self._decisive()
      else:
        part = self._of_clips(need)
      self._parts[need] = part
    return self._parts[need]

  def _of_clips(self, name: str):
    """Returns what the vision tower hands out beside the features."""
    rows = prompt_batch.pad_rows(len(self._clips), self._e.settings.batch_size)
    return jnp.asarray(
      np.stack([self._clips[row].extras[name] for row in rows])
    )

  def _decisive(self):
    mask = np.zeros(self.batch.features.shape[:2], bool)
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
    rows = prompt_batch.pad_rows(len(names), self._e.settings.batch_size)
    joined = jax.tree.map(
      lambda *leaves: jnp.concatenate(leaves),
      *[per_clip[names[row]] for row in rows],
    )
    if mesh is None:
      return joined
    return mesh_lib.put(joined, mesh, mesh_lib.P("data"))

  def _keys(self, seed: int):
    """Returns one key per question, from the seed and the question's name."""
    names = [question.drawn_by for question in self._questions]
    hashes = [question_lib.question_hash(name) for name in names]
    rows = prompt_batch.pad_rows(len(hashes), self._e.settings.batch_size)
    hashes = jnp.asarray(np.array(hashes, np.uint32)[np.array(rows)])
    key = jax.random.key(seed)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)


def _finite(tree) -> bool:
  return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
