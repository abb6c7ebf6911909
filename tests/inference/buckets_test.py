"""Grids and texts of many sizes in few compiled sizes, with equal answers."""

import dataclasses
import itertools
import types
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from cacovid_jax.data import question as question_lib
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import prompts as prompts_lib
from cacovid_jax.models import checkpoints, token_grid
from cacovid_jax.policy import loading, network
from tests.evals import tiny

BUCKETS = (token_grid.GridBucket(2, 16), token_grid.GridBucket(2, 30))
GRIDS = [
  (2, height, width)
  for height, width in itertools.product(range(2, 6), range(2, 7))
]
UNIFORM = methods_lib.Condition(methods_lib.Method.parse("uniform"), 0.25)
TEXTS = ("Why?", "Which of these is it, " + "the red one " * 5 + "or not?")


class Clip(NamedTuple):
  features: np.ndarray
  record: Any = types.SimpleNamespace(fault="")
  second_per_grid_t: float = 0.5
  deep: np.ndarray | None = None


class Source:
  """Random features of clips that are named by their grids."""

  want = frozenset()
  grid, watch = GRIDS[0], None

  def __init__(self, width: int, buckets=()):
    self._width, self.buckets = width, tuple(buckets)

  def survey(self, paths):
    list(paths)

  def grid_of(self, path):
    return tuple(map(int, path.split("x")))

  def bucket_of(self, grid):
    return token_grid.pick(
      grid, self.buckets or [token_grid.TokenGrid.of(grid).bucket]
    )

  def __getitem__(self, path):
    grid = self.grid_of(path)
    rng = np.random.default_rng(grid)
    shape = int(np.prod(grid)), self._width
    return Clip(rng.standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("qwen")
  return checkpoints.load(tiny.write_qwen_checkpoint(folder))


@pytest.fixture(scope="module")
def policies(checkpoint):
  module = network.Policy.from_llm_config(
    checkpoint.model.config.text, num_halvings=2
  )
  make = jax.jit(module.init_from_llm)
  params = make(jax.random.key(1), checkpoint.params)
  return {"policy": loading.LoadedPolicy(module, params)}


def question(grid, text):
  name = "x".join(map(str, grid))
  return question_lib.Question(
    id=f"{name} {TEXTS.index(text)}",
    video=name,
    question=text,
    options=("red", "blue"),
    answer="A",
    prompt=text,
  )


def make(checkpoint, questions, buckets=(), policies=None, lengths=()):
  engine = engine_lib.Engine(
    checkpoint,
    Source(checkpoint.model.config.text.hidden_size, buckets),
    questions,
    engine_lib.Settings(batch_size=2, max_new_tokens=2),
    policies=policies,
  )
  if lengths:
    engine.prompts.lengths = tuple(lengths)
  return engine


@pytest.fixture(scope="module")
def used(checkpoint, policies):
  """Returns an engine with buckets that has asked about twenty shapes.

  With it, the shapes of its prompts and how much it had compiled by then.
  """
  questions = [
    question(grid, TEXTS[place // 2 % 2]) for place, grid in enumerate(GRIDS)
  ]
  probe = prompts_lib.Prompts(checkpoint, questions)
  lengths = sorted(set(probe.text_rows.values()))
  assert len(GRIDS) == 20 and len(lengths) == 2
  engine = make(checkpoint, questions, BUCKETS, policies, lengths)
  shapes = set()
  for one in questions:
    batch = engine.batch([one])
    batch.vanilla()
    batch.scores("scores", "policy", methods_lib.Condition())
    count = batch.output(UNIFORM).trace.mask.sum()
    assert count == 2 * (batch.num_video // 4)
    shapes.add(batch.batch.x.shape)
  return engine, shapes, engine.programs.compiled


def test_twenty_shapes_share_the_programs_of_their_buckets(used):
  engine, shapes, compiled = used
  assert len(shapes) == len(BUCKETS) * len(engine.prompts.lengths)
  for kind in ("embed", "scores", "vanilla", "answer"):
    assert compiled[kind] == len(shapes), kind
  assert compiled["select"] == len(GRIDS)


# A rule for each clip, one that merges, and two that read what the model itself
# attends to, the second one inside it.
SPECS = ("uniform", "prunevid", "last_query?layer=1", "fastv?layer=1")


@pytest.fixture(scope="module")
def engines(checkpoint, policies, used):
  """Returns engines without and with buckets, of the same questions."""
  bucketed = used[0]
  return make(checkpoint, bucketed.questions, (), policies), bucketed


def asked(engine, text):
  """Returns a question of this text about a clip that its bucket pads."""
  return next(
    one
    for one in reversed(engine.questions)
    if one.prompt == text and not engine.token_grid(engine.grid_of(one)).full
  )


@pytest.mark.parametrize(
  ("spec", "texts"),
  # Lengths of text are nothing that a choice of tokens knows.
  [(None, TEXTS), ("cacovid", TEXTS), *((spec, TEXTS[:1]) for spec in SPECS)],
)
def test_a_bucket_changes_no_answer(engines, spec, texts):
  exact, bucketed = engines
  questions = [asked(bucketed, text) for text in texts]
  condition = methods_lib.Condition()
  if spec:
    ratio = 0.6 if spec.startswith("fastv") else UNIFORM.ratio
    condition = methods_lib.Condition(methods_lib.Method.parse(spec), ratio)
    for one, other in zip(
      *(engine.kept(questions, [condition]).values() for engine in engines),
      strict=True,
    ):
      np.testing.assert_array_equal(one[0].index, other[0].index)
  for one in questions:
    found = [engine.answer(one, condition) for engine in engines]
    assert found[0].text == found[1].text and found[0].text
    assert found[0].letter == found[1].letter
    assert found[0].kept == found[1].kept
  pairs = [(one, text) for one in questions for text in ("A", "blue")]
  found = [
    [
      one.log_prob
      for one in engine.likelihoods(*zip(*pairs, strict=True), condition)
    ]
    for engine in engines
  ]
  np.testing.assert_allclose(*found, atol=1e-4)


def test_another_questions_text_may_have_another_length(engines):
  _, bucketed = engines
  short = asked(bucketed, TEXTS[0])
  method = methods_lib.Method.parse("cacovid_other_question")
  assert len(bucketed.prompts.lengths) == 2
  seed = next(
    seed
    for seed in range(20)
    if methods_lib.other_question(short, bucketed.pool, seed).endswith("1")
  )
  condition = methods_lib.Condition(method, UNIFORM.ratio, seed)
  scores = []
  for engine in engines:
    batch = engine.batch([short])
    scores.append(batch.inputs(condition).other_scores)
  for one, other in zip(*scores, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_lengths_that_serve_later_questions(checkpoint, monkeypatch):
  monkeypatch.setattr(checkpoint.tokenizer, "max_length", 0)
  questions = [question(GRIDS[0], text) for text in TEXTS]
  prompts = prompts_lib.Prompts(checkpoint, questions, more_follow=True)
  assert prompts.lengths == (64, 256, 1024)
  assert prompts.pick(64) == 64 and prompts.pick(65) == 256
  longer = dataclasses.replace(questions[0], id="long", prompt="why? " * 300)
  prompts = prompts_lib.Prompts(
    checkpoint, [*questions, longer], more_follow=True
  )
  last = prompts.lengths[-1]
  assert last >= prompts.text_rows["long"] > 1024 and last % 16 == 0


def test_one_grid_and_one_length_fill_a_multiple(checkpoint):
  """As long as the longest prompt, rounded up once."""
  questions = [question((2, 3, 3), TEXTS[1])]
  engine = make(checkpoint, questions)
  (longest,) = engine.prompts.text_rows.values()
  rows = engine.batch(questions[:1]).batch.x.shape[1]
  assert rows == -(-(18 + longest) // 16) * 16
