"""How long each method takes to choose the tokens of one video.

Compiled programs, one clip at a time, median of several runs: the rule itself,
and beside it what it reads that nobody else computes, the policy's scores or
the attention of a prefill of the whole prompt. What a vision tower hands out
beside its features is not counted. Inside the language model choosing and
answering are one program: there it is the time beyond that of answering from
the same share of tokens, chosen before the model.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from cacovid_jax.compressors import base
from cacovid_jax.data import questions as questions_lib
from cacovid_jax.evals import asker as asker_lib
from cacovid_jax.evals import programs as programs_lib
from cacovid_jax.evals import runner


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


class Stopwatch:
  """Measures methods on one question; shared parts are measured once."""

  def __init__(
    self,
    evaluator: runner.Evaluator,
    question: questions_lib.Question,
    repeats: int = 9,
  ):
    """Waits for the clip.

    Args:
      evaluator: of batches of one question.
      question: one of its questions, about a clip that can be read.
      repeats: runs that the median is taken over.
    """
    if evaluator.settings.batch_size != 1:
      raise ValueError("times are those of one video: use a batch size of 1")
    self._e, self._repeats = evaluator, repeats
    self._tools = evaluator.tools(question)
    self._asker = asker_lib.Asker(evaluator, [question])
    self._known = {}

  def cost(self, method: runner.Method, ratio: float) -> Cost:
    """Returns the time of a method at a ratio.

    Raises:
      UserError: the method cannot be run at this ratio.
    """
    cell = runner.Cell(method, ratio, 0)
    programs, compressor = self._tools.programs, method.compressor
    programs.check(compressor, ratio)
    inputs = self._asker.inputs(cell)
    reads = sum(self._read(need, method) for need in sorted(method.needs))
    if programs_lib.acts_inside(compressor):
      program = programs.inside(compressor, ratio)
      params, batch = self._e.checkpoint.params, self._asker.batch
      whole = self._median(lambda: program(params, batch, *inputs[1:]))
      return Cost(max(whole - self._answer(ratio), 0.0), reads)
    program = programs.select(compressor, ratio)
    return Cost(self._median(lambda: program(*inputs)), reads)

  def _read(self, need: str, method: runner.Method) -> float:
    """Returns the milliseconds of what a method reads; 0 for by-products."""
    if need.endswith("scores"):
      name = self._e.policy_name(method)
      policy = self._e.policies[name]
      return self._once(
        ("scores", name),
        lambda: self._tools.programs.scores(
          policy.module, policy.params, self._asker.batch
        ),
      )
    if need == "attention":
      return self._once(
        ("attention",),
        lambda: self._tools.programs.vanilla(
          self._e.checkpoint.params, self._asker.batch, want_attention=True
        ),
      )
    return 0.0

  def _answer(self, ratio: float) -> float:
    """Returns the milliseconds of answering from evenly spaced tokens."""
    num_keep = base.budget(self._tools.grid, ratio)
    method = runner.Method.parse("uniform")
    selection = self._asker.select(runner.Cell(method, ratio, 0))
    return self._once(
      ("answer", num_keep),
      lambda: self._tools.programs.answer(
        self._e.checkpoint.params, self._asker.batch, selection
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
  evaluator: runner.Evaluator, questions: Sequence[questions_lib.Question]
) -> questions_lib.Question | None:
  """Returns the first question whose clip can be used."""
  usable = (q for q in questions if not evaluator.source[q.video].fault)
  return next(usable, None)
