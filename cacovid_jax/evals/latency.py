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
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.models import prompt_batch, token_grid
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
    programs: compiled functions.
    grid: (T, H, W) or `TokenGrid` of the video.
    batch: the prompt, B = 1.
    inputs: `methods.Condition` -> what its method reads.
    policy: `methods.Method` -> the policy that it follows.
  """

  checkpoint: Any
  programs: programs_lib.Programs
  grid: Any
  batch: prompt_batch.PromptBatch
  inputs: Callable[[methods_lib.Condition], base.CompressorInputs]
  policy: Callable[[methods_lib.Method], loading.LoadedPolicy]


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
    policy=lambda method: engine.policies[engine.policy_name(method)],
  )


class Stopwatch:
  """Measures methods on one prompt; shared parts are measured once."""

  def __init__(self, subject: Subject, repeats: int = 9):
    """Measures nothing yet; `repeats` runs are what medians are taken of."""
    self._subject, self._repeats = subject, repeats
    self._known = {}

  def cost(self, method: methods_lib.Method, ratio: float) -> Cost:
    """Returns the time of a method at a ratio.

    Raises:
      UserError: the method cannot be run at this ratio.
    """
    return self._cost(methods_lib.Condition(method, ratio))[0]

  def answered(
    self, method: methods_lib.Method, ratio: float
  ) -> tuple[Cost, float]:
    """Returns (cost, milliseconds of answering from what was chosen).

    The second part ends with the last token that the programs generate, the
    first one where they were made for one. Inside the language model the parts
    add up to the program's time, as of `Cost`.

    Raises:
      UserError: the method cannot be run at this ratio.
    """
    condition = methods_lib.Condition(method, ratio)
    cost, whole = self._cost(condition)
    if whole is not None:
      return cost, whole - cost.rule
    selection = self._select(condition, self._subject.inputs(condition))
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

  def _cost(self, condition) -> tuple[Cost, float | None]:
    """Returns the cost, and inside the model the whole program's time."""
    programs, compressor = self._subject.programs, condition.method.compressor
    grid = self._subject.grid
    compressor.rows_per_layer(
      self._subject.checkpoint.model.config.text.num_layers,
      token_grid.TokenGrid.of(grid).shape,
      condition.ratio,
    )
    inputs = self._subject.inputs(condition)
    needs = sorted(condition.method.needs)
    reads = sum(self._read(need, condition.method) for need in needs)
    if not compressor.selects_first:
      program = programs.select_and_answer(compressor, condition.ratio, grid)
      params, batch = self._subject.checkpoint.params, self._subject.batch
      whole = self._median(lambda: program(params, batch, inputs))
      even = methods_lib.Condition(
        methods_lib.Method.parse("uniform"), condition.ratio, 0
      )
      answer = self._answer(self._select(even, self._subject.inputs(even)))
      return Cost(max(whole - answer, 0.0), reads), whole
    program = programs.select(compressor, condition.ratio, grid)
    return Cost(self._median(lambda: program(inputs)), reads), None

  def _select(self, condition, inputs) -> base.Selection:
    select = self._subject.programs.select
    return select(
      condition.method.compressor, condition.ratio, self._subject.grid
    )(inputs)

  def _read(self, need: str, method: methods_lib.Method) -> float:
    """Returns the milliseconds of what a method reads; 0 for by-products."""
    if need.endswith("scores"):
      policy = self._subject.policy(method)
      return self._once(
        ("scores", id(policy)),
        lambda: self._subject.programs.scores(
          policy.module,
          policy.params,
          self._subject.batch,
          self._subject.grid,
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
  engine: engine_lib.Engine, questions: Sequence[question_lib.Question]
) -> question_lib.Question | None:
  """Returns the first question whose clip can be used."""
  usable = (q for q in questions if not engine.source[q.video].fault)
  return next(usable, None)
