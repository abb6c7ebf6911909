"""How long each method takes to choose the tokens of one video, and to answer.

Compiled programs, one clip at a time, median of several runs: the rule itself,
and beside it what it reads that nobody else computes, the policy's scores or
the attention of a prefill of the whole prompt. Inside the language model
choosing and answering are one program: there it is the time beyond that of
answering from the same share of tokens, chosen before the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cacovid_jax import command
from cacovid_jax.compressors import base
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import timing
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.models import prompt_batch, token_grid
from cacovid_jax.policy import loading

REPEATS = command.Flag(
  "Runs that a time is the median of.",
  "table.repeats",
  old=("timing_repeats", "timed_runs"),
)


class Cost(NamedTuple):
  """Milliseconds for one video."""

  rule: float  # Choosing the tokens, from what it reads.
  reads: float = 0.0  # Computing what it reads.
  # Answering from what was chosen, up to the last token that the programs
  # generate: the first one where they were made for one.
  answer: float = 0.0
  before: float = 0.0  # The vision tower and the prompt, alike for all methods.

  @property
  def choosing(self) -> float:
    return self.rule + self.reads

  @property
  def total(self) -> float:
    return sum(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """One prompt on device, and what methods read of it."""

  checkpoint: Any  # The base model; `model` and `params` are read.
  programs: programs_lib.Programs
  grid: Any  # (T, H, W) or `TokenGrid` of the video.
  batch: prompt_batch.PromptBatch  # B = 1.
  inputs: Callable[[methods_lib.Condition], base.CompressorInputs]
  # The policy that a method follows.
  policy: Callable[[methods_lib.Method], loading.LoadedPolicy]
  encode: Callable[[], Any]  # Runs the vision tower on the decoded video.


def subject(
  engine: engine_lib.Engine, question: question_lib.Question
) -> Subject:
  """Returns a question as it is asked in batches of one; waits for its clip."""
  if engine.settings.batch_size != 1:
    raise ValueError("times are those of one video: use a batch size of 1")
  runner = engine.batch([question])
  return Subject(
    checkpoint=engine.checkpoint,
    programs=engine.programs,
    grid=tuple(map(int, runner.grid.shape)),
    # Without a bucket's padding, which parts of a time would share unevenly.
    batch=prompt_batch.crop(runner.batch, runner.num_video),
    inputs=runner.inputs,
    policy=lambda method: engine.policies[method.follows(engine.policies)],
    encode=engine.source.encoder(question.video),
  )


class Stopwatch:
  """Measures methods on one prompt; shared parts are measured once.

  Times are milliseconds. A method that cannot be run at a ratio is a UserError.
  """

  def __init__(self, subject: Subject, repeats: int = 9):
    """Measures nothing yet; `repeats` runs are what medians are taken of."""
    self._subject, self._repeats, self._known = subject, repeats, {}
    self._programs, self._batch = subject.programs, subject.batch
    self._params = subject.checkpoint.params

  def cost(self, method: methods_lib.Method | None, ratio: float) -> Cost:
    """Returns the times of a method at a ratio, but those `before`.

    None answers from all tokens. Inside the language model rule and answer add
    up to the program's time.
    """
    if method is None:
      return Cost(0.0, answer=self.vanilla())
    condition = methods_lib.Condition(method, ratio)
    compressor, grid = method.compressor, self._subject.grid
    compressor.rows_per_layer(
      self._subject.checkpoint.model.config.text.num_layers,
      token_grid.TokenGrid.of(grid).shape,
      ratio,
    )
    inputs = self._subject.inputs(condition)
    needs = sorted(method.needs)
    reads = sum(self._read(need, method, ratio) for need in needs)
    if compressor.selects_first:
      program = self._programs.select(compressor, ratio, grid)
      rule = self._median(lambda: program(inputs))
      return Cost(rule, reads, self._answer(condition))
    program = self._programs.select_and_answer(compressor, ratio, grid)
    whole = self._median(lambda: program(self._params, self._batch, inputs))
    even = methods_lib.Method.parse("uniform")
    rule = max(whole - self._answer(methods_lib.Condition(even, ratio)), 0.0)
    return Cost(rule, reads, whole - rule)

  def tower(self) -> float:
    """Returns the milliseconds of the vision tower."""
    return self._once("tower", self._subject.encode)

  def vanilla(self, *, want_attention: bool = False) -> float:
    """Returns the milliseconds of answering from the whole prompt."""
    ask = functools.partial(self._programs.vanilla, self._params, self._batch)
    return self._once(
      ("vanilla", want_attention), lambda: ask(want_attention=want_attention)
    )

  def embed(self) -> float:
    """Returns the milliseconds of putting video and text into one prompt."""
    batch = self._batch
    given = batch.ids, batch.features, batch.video_rows
    return self._once(
      "embed", lambda: self._programs.embed(self._params, *given)
    )

  def _read(self, need: str, method: methods_lib.Method, ratio) -> float:
    """Returns the milliseconds of what a method reads; 0 for by-products."""
    if need == "attention":
      return self.vanilla(want_attention=True)
    if not need.endswith("scores"):
      return 0.0
    policy, grid = self._subject.policy(method), self._subject.grid
    given = policy.module, policy.params, self._batch, grid, ratio
    return self._once(
      ("scores", id(policy)), lambda: self._programs.scores(*given)
    )

  def _answer(self, condition) -> float:
    """Returns the milliseconds of answering from what a method selects."""
    method, ratio, _ = condition
    select = self._programs.select(method.compressor, ratio, self._subject.grid)
    selection = select(self._subject.inputs(condition))
    return self._once(
      ("answer", selection.index.shape[1]),
      lambda: self._programs.answer(self._params, self._batch, selection),
    )

  def _once(self, key: Any, function: Callable[[], Any]) -> float:
    if key not in self._known:
      self._known[key] = self._median(function)
    return self._known[key]

  def _median(self, function: Callable[[], Any]) -> float:
    return timing.measure(function, self._repeats).ms


def readable(
  engine: engine_lib.Engine, questions: Sequence[question_lib.Question]
) -> question_lib.Question | None:
  """Returns the first question whose clip can be used."""
  return next((q for q in questions if not engine.source[q.video].fault), None)
