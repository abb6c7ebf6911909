"""One engine: a model asked about clips, from all or some of their tokens.

Methods that keep the same number of tokens share one answering program. Shapes
are static: every batch has the same size, the last one padded, text has a few
lengths, and clips lie in a few grid buckets.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cacovid_jax import config_limits, errors
from cacovid_jax.compressors import base
from cacovid_jax.data import letters, rewards
from cacovid_jax.data import question as question_lib
from cacovid_jax.inference import batch as batch_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.inference import prompts as prompts_lib
from cacovid_jax.models import token_grid
from cacovid_jax.policy import loading


@dataclasses.dataclass(frozen=True)
class Settings:
  """What answers depend on besides weights and questions."""

  num_frames: int = 16
  batch_size: int = 8
  max_new_tokens: int = 16
  rule: str = "paper"  # How letters are taken from answers, see `data.letters`.
  rouge: str = rewards.UNICODE  # Of free-form answers; see `data.rewards`.
  empty_frames: str = "keep"  # See `config.evals`; or "drop".

  @property
  def identity(self) -> dict[str, Any]:
    """As answer logs have it; names here do not follow those of attributes."""
    names = "num_frames", "batch_size", "max_new_tokens", "rule"
    values = self.num_frames, self.batch_size, self.max_new_tokens, self.rule
    found = dict(zip(names, values, strict=True))
    # Logs of earlier versions, which kept them, do not say so.
    if self.empty_frames != "keep":
      found["empty_frames"] = self.empty_frames
    return found

  def __post_init__(self):
    for field in ("num_frames", "batch_size", "max_new_tokens"):
      told = f"evals.{field}={getattr(self, field)} must be at least 1"
      errors.check(getattr(self, field) >= 1, told)
    frames = {"empty_frames": self.empty_frames}
    config_limits.check({"rouge": self.rouge, "evals": frames})
    letters.check_rule(self.rule)


class AnswerResult(NamedTuple):
  """What the model said from one share of a clip's tokens."""

  method: str  # Its label, "vanilla" where everything was kept.
  ratio: float
  text: str
  letter: str  # In the text; "" without options, or if there is none.
  trace: batch_lib.KeptTokens
  milliseconds: Mapping[str, float] = {}  # By stage, where they were taken.

  @property
  def kept(self) -> int:
    """Number of tokens that it was answered from."""
    return len(self.trace.index)


@dataclasses.dataclass(eq=False, repr=False)
class Engine:
  """A model, its prompts and its programs; computes nothing yet.

  With a source that has a `watch`, nothing waits for the device but what reads
  numbers; what was computed from is looked at by `batch.BatchRunner.check`.

  Attributes:
    grids: exact (T, H, W) of the clips.
    pool: questions that `cacovid_other_question` draws from.
    seconds: spent so far, by what they were spent on; what a `watch` follows
      stands there.
  """

  checkpoint: Any  # `models.checkpoints.Checkpoint` with a tokenizer.
  source: Any  # `clip_queue.ClipQueue` with what `methods.wanted` lists.
  questions: Sequence[question_lib.Question]  # That will be asked.
  settings: Settings
  _: dataclasses.KW_ONLY
  # By name; the first one is what plain `cacovid` follows.
  policies: Mapping[str, loading.LoadedPolicy] | None = None
  # Question id -> tokens that decide it, where known.
  decisive: Mapping[str, Sequence[int]] | None = None
  # Those of an earlier engine of this checkpoint, mesh and number of new
  # tokens, so that nothing compiles twice; None makes new ones.
  programs: programs_lib.Programs | None = None
  more_follow: bool = False  # See `prompts.Prompts`.
  others: Sequence[question_lib.Question] = ()  # Further ones, see there.
  # Its `data` axis shares the questions of a batch, if their number divides.
  mesh: Mesh | None = None

  @property
  def grid(self) -> tuple[int, int, int]:
    """(T, H, W) of most of the clips."""
    return self.source.grid

  def __post_init__(self):
    # Several processes of a training run each ask all of it.
    mesh, source = self.mesh, self.source
    alone = mesh is None or mesh.size == 1 or jax.process_count() > 1
    if alone or self.settings.batch_size % mesh.shape["data"]:
      self.mesh = None
    self.policies = dict(self.policies or {})
    self.decisive = self.decisive or {}
    every = [*self.questions, *self.others]
    self.pool = by_id(every)
    self.seconds = collections.defaultdict(float)
    self._untrained = {}
    source.survey(question.video for question in every)
    self.grids = sorted({self.grid_of(question) for question in every})
    buckets = [source.bucket_of(grid) for grid in self.grids]
    self.prompts = prompts_lib.Prompts(
      self.checkpoint, self.questions, grid_of=self.grid_of,
      num_video=max((bucket.tokens for bucket in buckets), default=0),
      more_follow=self.more_follow, others=self.others,
      drop_empty_frames=self.settings.empty_frames == "drop",
    )  # fmt: skip
    for question in every:
      tokens, grid = self.decisive.get(question.id), self.grid_of(question)
      if tokens and not 0 <= min(tokens) <= max(tokens) < np.prod(grid):
        raise errors.UserError(
          f"decisive.jsonl: the tokens of {question.id} lie outside the model's"
          f" grid {grid}; was the data made for another model or frame count?"
        )
    self.programs = self.programs or programs_lib.Programs(
      self.checkpoint, self.settings.max_new_tokens, self.mesh
    )

  @classmethod
  def of(cls, experiment, *args, **options) -> "Engine":
    """Returns the engine of an experiment's checkpoint and mesh."""
    return cls(experiment.checkpoint, *args, mesh=experiment.mesh, **options)

  def grid_of(self, question: question_lib.Question) -> tuple[int, int, int]:
    """Returns (T, H, W) of the clip of a question."""
    return tuple(self.source.grid_of(question.video))

  def token_grid(self, grid: tuple[int, int, int]) -> token_grid.TokenGrid:
    """Returns a grid inside its bucket; as it is where it has none."""
    bucket = self.source.bucket_of(grid)
    known = bucket in self.source.buckets
    return token_grid.TokenGrid.of(grid, bucket if known else None)

  def batches(self, questions) -> list[list[question_lib.Question]]:
    """Returns at most B questions each, about clips of one grid."""
    groups = collections.defaultdict(list)
    for question in by_clip(questions):
      groups[self.grid_of(question)].append(question)
    size = self.settings.batch_size
    return [
      group[start : start + size]
      for group in groups.values()
      for start in range(0, len(group), size)
    ]

  def batch(self, questions) -> batch_lib.BatchRunner:
    """Returns the embedded prompts of at most B questions."""
    return batch_lib.BatchRunner(self, questions)

  def check(self, condition: methods_lib.Condition, grid) -> None:
    """Refuses a method's condition that cannot be run on clips of a grid."""
    method = condition.method
    for need in sorted(method.needs):
      if need in method.score_fields:
        name = method.follows(self.policies)
        self.policies[name].check_ratio(name, condition.ratio)
      elif need in base.VISION_SIGNALS:
        if need not in self.source.want:
          raise errors.UserError(
            f"{method.label} needs {need.replace('_', ' ')}, which the clips"
            " of this evaluation come without"
          )
      elif need not in base.OFFERED:
        raise errors.UserError(
          f"{method.label} needs {need!r}, which this evaluation does not"
          f" offer; it offers {', '.join(base.OFFERED)}"
        )
    num_layers = self.checkpoint.model.config.text.num_layers
    method.compressor.rows_per_layer(num_layers, grid, condition.ratio)

  def answer(self, question, condition) -> AnswerResult:
    """Returns one question's answer together with what led to it."""
    return self.answers([question], condition)[0]

  def answers(self, questions, condition) -> list[AnswerResult]:
    """Returns those of at most B questions about clips of one grid."""
    if condition.method is not None:
      grid = self.grid_of(questions[0])
      base.budget(grid, condition.ratio)
      self.check(condition, grid)
    batch = self.batch(questions)
    for row, fault in batch.faults.items():
      raise errors.UserError(f"{questions[row].video}: {fault}")
    if condition.method is None:
      ids, _ = batch.vanilla()
      trace = batch_lib.KeptTokens(np.arange(batch.num_video))
      traces = [trace] * len(questions)
    else:
      ids, chosen = batch.output(condition)
      traces = batch.kept(condition, chosen)
    given = condition.label, condition.ratio
    found = zip(questions, self.decode(ids), traces, strict=False)
    return [
      AnswerResult(*given, text, self._letter(question, text), trace)
      for question, text, trace in found
    ]

  def _letter(self, question, text: str) -> str:
    """Returns the letter in an answer's text, see `AnswerResult`."""
    if not question.lettered:
      return ""
    count, rule = len(question.options) or 4, self.settings.rule
    return letters.extract(
      text, num_options=count, rule=rule, options=question.options
    )

  def kept(self, questions, conditions) -> dict[str, list]:
    """Returns question id -> `KeptTokens` of its clip by each condition.

    Clips are such as can be used; no condition is vanilla.
    """
    found = {}
    for group in self.batches(questions):
      batch = self.batch(group)
      rows = [batch.kept(condition) for condition in conditions]
      for place, question in enumerate(group):
        found[question.id] = [row[place] for row in rows]
    return found

  def likelihoods(
    self, questions, continuations: Sequence[str], condition
  ) -> list[batch_lib.Likelihood]:
    """Returns how likely each text follows the prompt of its question.

    A question may stand there again. What ends an answer is no part of a text.
    """
    texts = collections.defaultdict(dict)
    pairs = list(zip(questions, continuations, strict=True))
    for question, text in pairs:
      texts[question.id][text] = self.checkpoint.tokenizer.encode(text)
    size = max(len(ids) for own in texts.values() for ids in own.values())
    distinct = list({question.id: question for question in questions}.values())
    found = {}
    for batch in self.batches(distinct):
      given = [list(texts[question.id].values()) for question in batch]
      rows = self.batch(batch).likelihood(condition, given, max(size, 1))
      for question, row in zip(batch, rows, strict=True):
        found[question.id] = dict(zip(texts[question.id], row, strict=True))
    return [found[question.id][text] for question, text in pairs]

  def decode(self, ids) -> list[str]:
    """Returns the texts of int32[B, M] ids."""
    decode = self.checkpoint.tokenizer.decode
    return [decode(row).strip() for row in np.asarray(ids)]

  def policy_params(self, field: str, name: str, seed: int):
    """Returns the parameters behind a field of `CompressorInputs`."""
    policy, key = self.policies[name], (name, seed)
    if field != "untrained_scores":
      return policy.params
    if key not in self._untrained:
      make, rng = policy.module.init_from_llm, jax.random.key(seed)
      params = make(rng, self.checkpoint.params)
      untrained = loading.LoadedPolicy.of(policy.module, params)
      self._untrained[key] = untrained.params
    return self._untrained[key]

  def stage(self, name: str):
    """Returns a context whose errors of the device name it and a remedy."""
    size, frames = self.settings.batch_size, self.settings.num_frames
    less = f"lower the batch size of {size} (evals. or validation.batch_size)"
    if size == 1:
      less = f"lower data.num_frames={frames}, or set config.mesh.model=2"
    return errors.during(f"computing {name!r} of {size} at once", less)

  @property
  def waits(self) -> bool:
    """Whether each program is waited for before the next one."""
    return self.source.watch is None

  @contextlib.contextmanager
  def timed(self, name: str) -> Iterator[Callable[[Any], Any]]:
    """Adds what the block takes to `seconds`, or that of its programs.

    Yields a function that returns what a program gave, waited for or watched.
    """
    start = time.perf_counter()
    watch, seen = self.source.watch, []

    def follow(out):
      if watch is None:
        return jax.block_until_ready(out)
      seen.append(name)
      return watch.add(name, start, out)

    with self.stage(name):
      yield follow
    if not seen:
      self.seconds[name] += time.perf_counter() - start


def by_clip(questions) -> list[question_lib.Question]:
  """Returns the questions with those about one clip side by side."""
  groups = collections.defaultdict(list)
  for question in questions:
    groups[question.video].append(question)
  return [question for group in groups.values() for question in group]


def by_id(questions) -> list[question_lib.Question]:
  """Returns the questions in the order of their ids."""
  return sorted(questions, key=lambda question: question.id)
