"""How long each method takes to choose the tokens of one video.

Compiled programs, one clip at a time, median of several runs: the rule itself,
and beside it what it reads that nobody else computes, the policy's scores or
the attention of a prefill of the whole prompt. What a vision tower hands out
beside its features is not counted. Inside the language model choosing and
answering are one program: there it is the time beyond that of answering from
the same share of tokens, chosen before the model.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from cacovid_jax import command
from cacovid_jax.compressors import base
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import asker as asker_lib
from cacovid_jax.evals import programs as programs_lib
from cacovid_jax.evals import runner
from cacovid_jax.models import prompt_batch
from cacovid_jax.policy import loading

REPEATS = command.Flag(
  "Runs that a time is the median of.",
  "table.repeats",
  old=("timing_repeats", "timed_runs"),
  least=1,
)


class Cost(NamedTuple):
  """Milliseconds for one video.

  Attributes:
    rule: choosing the tokens, from what it reads.
    reads: computing what it reads.
  """

  rule: float
  reads: float = 0.0

  @property
  def total(self) -> float:
    return self.rule + self.reads


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """One prompt on device, and what methods read of it.

  Attributes:
    checkpoint: the base model; `model` and `params` are read.
    programs: compiled functions for its grid.
    grid: (T, H, W) of the video.
    batch: the prompt, B = 1.
    inputs: `runner.Cell` -> `base.CompressorInputs` of its method.
    policy: `runner.Method` -> the `LoadedPolicy` that it follows.
  """

  checkpoint: Any
  programs: programs_lib.Programs
  grid: tuple[int, int, int]
  batch: prompt_batch.PromptBatch
  inputs: Callable[[runner.Cell], base.CompressorInputs]
  policy: Callable[[runner.Method], loading.LoadedPolicy]


def subject(
  evaluator: runner.Evaluator, question: question_lib.Question
) -> Subject:
  """Returns a question as it is asked in an evaluation; waits for its clip.

  Args:
    evaluator: of batches of one question.
    question: one of its questions, about a clip that can be read.
  """
  if evaluator.settings.batch_size != 1:
    raise ValueError("times are those of one video: use a batch size of 1")
  tools = evaluator.tools(question)
  asker = asker_lib.Asker(evaluator, [question])
  return Subject(
    checkpoint=evaluator.checkpoint,
    programs=tools.programs,
    grid=tools.grid,
    batch=asker.batch,
    inputs=asker.inputs,
    policy=lambda method: evaluator.policies[evaluator.policy_name(method)],
  )


class Stopwatch:
  """Measures methods on one prompt; shared parts are measured once."""

  def __init__(self, subject: Subject, repeats: int = 9):
    """Measures nothing yet.

    Args:
      subject: the prompt.
      repeats: runs that the median is taken over.
    """
    self._subject, self._repeats = subject, repeats
    self._known = {}

  def cost(self, method: runner.Method, ratio: float) -> Cost:
    """Returns the time of a method at a ratio.

    Raises:
      UserError: the method cannot be run at this ratio.
    """
    return self._cost(runner.Cell(method, ratio, 0))[0]

  def answered(self, method: runner.Method, ratio: float) -> tuple[Cost, float]:
    """Returns (cost, milliseconds of answering from what was chosen).

    The second part ends with the last token that the programs generate, the
    first one where they were made for one. Inside the language model the parts
    add up to the program's time, as of `Cost`.

    Raises:
      UserError: the method cannot be run at this ratio.
    """
    cell = runner.Cell(method, ratio, 0)
    cost, whole = self._cost(cell)
    if whole is not None:
      return cost, whole - cost.rule
    selection = self._select(cell, self._subject.inputs(cell))
    return cost, self._answer(selection)

  def vanilla(self) -> float:
    """Returns the milliseconds of answering from the whole prompt."""
    return self._once(
      ("vanilla",),
      lambda: self._subject.programs.vanilla(
        self._subject.checkpoint.params,
        self._subject.batch,
        want_attention=False,
      ),
    )

  def embed(self) -> float:
    """Returns the milliseconds of putting video and text into one prompt."""
    batch = self._subject.batch
    return self._once(
      ("embed",),
      lambda: self._subject.programs.embed(
        self._subject.checkpoint.params,
        batch.ids,
        batch.features,
        batch.video_rows,
      ),
    )

  def _cost(self, cell) -> tuple[Cost, float | None]:
    """Returns the cost, and inside the model the whole program's time."""
    programs, compressor = self._subject.programs, cell.method.compressor
    programs.check(compressor, cell.ratio)
    inputs = self._subject.inputs(cell)
    needs = sorted(cell.method.needs)
    reads = sum(self._read(need, cell.method) for need in needs)
    if not compressor.selects_first:
      program = programs.select_and_answer(compressor, cell.ratio)
      params, batch = self._subject.checkpoint.params, self._subject.batch
      whole = self._median(lambda: program(params, batch, inputs))
      even = runner.Cell(runner.Method.parse("uniform"), cell.ratio, 0)
      answer = self._answer(self._select(even, self._subject.inputs(even)))
      return Cost(max(whole - answer, 0.0), reads), whole
    program = programs.select(compressor, cell.ratio)
    return Cost(self._median(lambda: program(inputs)), reads), None

  def _select(self, cell, inputs) -> base.Selection:
    programs = self._subject.programs
    return programs.select(cell.method.compressor, cell.ratio)(inputs)

  def _read(self, need: str, method: runner.Method) -> float:
    """Returns the milliseconds of what a method reads; 0 for by-products."""
    if need.endswith("scores"):
      policy = self._subject.policy(method)
      return self._once(
        ("scores", id(policy)),
        lambda: self._subject.programs.scores(
          policy.module, policy.params, self._subject.batch
        ),
      )
    if need == "attention":
      return self._once(
        ("attention",),
        lambda: self._subject.programs.vanilla(
          self._subject.checkpoint.params,
          self._subject.batch,
          want_attention=True,
        ),
      )
    return 0.0

  def _answer(self, selection: base.Selection) -> float:
    """Returns the milliseconds of answering from the tokens of a selection."""
    return self._once(
      ("answer", selection.index.shape[1]),
      lambda: self._subject.programs.answer(
        self._subject.checkpoint.params, self._subject.batch, selection
      ),
    )

  def _once(self, key: tuple, function: Callable[[], Any]) -> float:
    if key not in self._known:
      self._known[key] = self._median(function)
    return self._known[key]

  def _median(self, function: Callable[[], Any]) -> float:
    return median_milliseconds(function, self._repeats)


def median_milliseconds(
  function: Callable[[], Any],
  repeats: int,
  wait: Callable[[Any], Any] = jax.block_until_ready,
) -> float:
  """Returns the median over `repeats` runs, after one that may compile.

  Args:
    function: what is timed.
    repeats: at least 1.
    wait: returns once what `function` gave has been computed.
  """
  wait(function())
  taken = []
  for _ in range(repeats):
    start = time.perf_counter()
    wait(function())
    taken.append(1e3 * (time.perf_counter() - start))
  return statistics.median(taken)


def readable(
  evaluator: runner.Evaluator, questions: Sequence[question_lib.Question]
) -> question_lib.Question | None:
  """Returns the first question whose clip can be used."""
  usable = (q for q in questions if not evaluator.source[q.video].fault)
  return next(usable, None)
