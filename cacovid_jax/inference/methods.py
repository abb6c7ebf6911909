"""Rows of a table: selection methods, and the conditions to ask under."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base
from cacovid_jax.data import answer_log
from cacovid_jax.data import question as question_lib

VANILLA = "vanilla"


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """A compressor in a table."""

  label: str  # Its row's name, unique in a run.
  # Name and options in full; answers are kept under it, so that a row whose
  # options were chosen anew is not mistaken for what it was.
  spec: str
  compressor: Any
  policy: str = ""  # Name of the one whose scores it follows.

  @classmethod
  def parse(cls, spec: str) -> "Method":
    """Returns the method of `name?option=value`, or `label=name?option=value`.

    One option is the evaluation's: `policy=NAME` follows another policy than
    the first one.
    """
    label, spec = split_label(spec)
    name, options = compressors.parse(spec)
    policy = str(options.pop("policy", ""))
    compressor = compressors.get(name, **options)
    # Answers of a file that has changed since are not its own.
    if compressor.fingerprint:
      spec = f"{spec}#{compressor.fingerprint}"
    return cls(label, spec, compressor, policy)

  @property
  def needs(self) -> frozenset[str]:
    """Fields of `CompressorInputs` that it reads."""
    return self.compressor.requires

  @property
  def score_fields(self) -> list[str]:
    """The fields of `CompressorInputs` that a policy fills."""
    return sorted(need for need in self.needs if need.endswith("scores"))

  def follows(self, policies: Collection[str]) -> str:
    """Returns which of the policies' names it follows; one must be there."""
    told = f"{self.label} needs a trained policy; give --policy"
    errors.check(policies, told)
    name = self.policy or next(iter(policies))
    errors.check_known("policy", name, policies)
    return name

  @property
  def per_seed(self) -> bool:
    """True if the evaluation seed changes its answers."""
    seeded = {"untrained_scores", "other_scores"}
    return self.compressor.stochastic or bool(seeded & self.needs)


def split_label(text: str) -> tuple[str, str]:
  """Returns (label, spec) of `label=spec`, or of a spec alone.

  Such a row is called as the spec reads, less the path of one's own method.
  """
  text = text.strip()
  label, equals, spec = text.partition("=")
  # The first "=" of a spec stands behind the "?" of its options.
  if equals and "?" not in label:
    return label, spec
  return text.rpartition(".py:")[2], text


def wanted(methods: Sequence[Method]) -> frozenset[str]:
  """Returns what the clips must bring along for these methods."""
  needs = frozenset().union(*[method.needs for method in methods])
  return needs & base.VISION_SIGNALS


class Condition(NamedTuple):
  """One thing to ask all questions under: a row, column and seed."""

  method: Method | None = None  # None is vanilla.
  ratio: float = 1.0
  seed: int = 0

  spec = property(lambda self: self.method.spec if self.method else VANILLA)
  label = property(lambda self: self.method.label if self.method else VANILLA)

  @property
  def place(self) -> tuple[str, float]:
    """Where it stands in a table, whatever the seed."""
    return self.spec, self.ratio

  def key(self, question: str) -> answer_log.Key:
    return answer_log.Key(self.spec, self.ratio, self.seed, question)


def conditions(methods, ratios, seeds) -> list[Condition]:
  """Returns vanilla and every method at every ratio, seeds where they count.

  Rows of one spec share their answers.
  """
  by_spec = {}
  for method in methods:
    by_spec.setdefault(method.spec, method)
  return [Condition()] + [
    Condition(method, ratio, seed)
    for ratio in ratios
    for method in by_spec.values()
    for seed in (seeds if method.per_seed else (0,))
  ]


def other_question(question, pool: Sequence, seed: int) -> str:
  """Returns the id of a question about another clip, in other words.

  Drawn by the seed and the question's id, the same in every run.
  """
  key = question_lib.question_hash(f"{seed}/{question.rng_id}")
  for place in np.random.default_rng(key).permutation(len(pool)):
    other = pool[int(place)]
    if other.video != question.video and other.prompt != question.prompt:
      return other.id
  raise errors.UserError(
    "cacovid_other_question needs questions about at least two clips"
  )
