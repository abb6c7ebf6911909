"""Which questions a report shows, and what it says was kept of them."""

import dataclasses

import numpy as np
import pytest

from cacovid_jax.data import answer_log
from cacovid_jax.evals import benchmarks, results
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.evals.report import viewer
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.policy import loading
from tests.evals import tiny

RATIOS = (0.25, 0.1)
METHODS = (
  "cacovid_paper=cacovid?importance_ratio=0.5",
  "random",
  "uniform",
  "cacovid",
  "fastv",
  "density_peaks",
  "decisive_boxes",
)


@pytest.fixture(scope="module")
def engine(checkpoint, data_dir, policy_file):
  benchmark = benchmarks.load(data_dir, "test")
  made = tiny.engine_of(
    checkpoint, data_dir, benchmark.questions, (4, 3),
    policies={"policy": loading.load_policy(policy_file, checkpoint)},
    decisive=benchmark.decisive,
  )  # fmt: skip
  with made.source:
    yield made


@pytest.fixture(scope="module")
def table(data_dir):
  return results.Table(
    "blocks",
    "test",
    benchmarks.load(data_dir, "test").questions,
    [methods_lib.Method.parse(spec) for spec in METHODS],
    RATIOS,
    (7,),
    tiny.GRID,
  )


# Of FastV, which sees all tokens in its first layers, at a tenth.
FAILURES = {("fastv", 0.1): evaluator_lib.Failure("too little", 0.34)}
# Accuracies in sixths: what is right, by the place of the question.
RIGHT = {
  "cacovid": (0, 2, 3, 5),
  "cacovid_paper": (0, 1, 2, 3, 4, 5),
  "random": (1,),
  "uniform": (1, 2, 3),
  "density_peaks": (4, 5),
  "decisive_boxes": (0, 1, 2, 3, 4, 5),
  "fastv": (0, 1, 2, 3, 4),
}


@pytest.fixture(scope="module")
def answers(table):
  """Returns a ledger of made-up answers, as `RIGHT` has them."""
  made = answer_log.AnswerLog(None, {})
  records = []
  for cell in methods_lib.conditions(table.methods, table.ratios, table.seeds):
    if cell.place in FAILURES:
      continue
    label = cell.method.label if cell.method else ""
    for place, question in enumerate(table.questions):
      score = float(place in RIGHT.get(label, ()))
      text = f"{label} {cell.ratio} {cell.seed}"
      fields = {"text": text, "letter": "B", "score": score}
      records.append((cell.key(question.id), fields))
  made.add(records)
  return made


@pytest.fixture(scope="module")
def chosen(table, answers, engine):
  decisive = engine.decisive
  return viewer.choose(table, answers, engine, decisive, 5, failures=FAILURES)


def test_right_and_wrong_ones_in_equal_parts(table, chosen):
  places = [table.questions.index(one.question) for one in chosen]
  assert len(set(places)) == 5
  # Two of five are wrong, as there are no more; right ones come first.
  assert set(places[3:]) == {1, 4}
  assert set(places[:3]) < set(RIGHT["cacovid"])
  assert [one.said.right for one in chosen] == [True] * 3 + [False] * 2
  assert {one.shown for one in chosen} == {("cacovid", 0.1)}


def test_the_best_other_methods_can_be_looked_at(chosen):
  """Not the oracle, not what failed, and the method's own variants last."""
  for one in chosen:
    assert set(one.views) == {
      (name, ratio)
      for name in ("cacovid", "uniform", "density_peaks", "random")
      for ratio in RATIOS
    }


def test_answers_are_those_of_the_ledger(table, chosen):
  one = chosen[0]
  assert set(one.answers) == {"vanilla", *RIGHT}
  assert set(one.answers["fastv"]) == {0.25}
  assert set(one.answers["vanilla"]) == {1.0}
  # Random draws with the table's seed; others have none.
  assert one.answers["random"][0.1].text == "random 0.1 7"
  assert one.answers["uniform"][0.25].text == "uniform 0.25 0"
  place = table.questions.index(one.question)
  for name, right in RIGHT.items():
    assert one.answers[name][0.25].right is (place in right)


def test_as_many_tokens_are_kept_as_the_budget_says(chosen):
  for one in chosen:
    for (label, ratio), view in one.views.items():
      assert len(view.index) == {0.25: 16, 0.1: 6}[ratio]
      scored = label == "cacovid"
      assert (view.token_gap is not None) == scored
      assert (view.frame_gap is not None) == scored


def test_kept_tokens_are_those_of_a_question_by_itself(chosen, engine):
  """Not those of another row of the batch."""
  method = methods_lib.Method.parse("cacovid")
  for one in chosen:
    view = one.views["cacovid", 0.1]
    condition = methods_lib.Condition(method, 0.1)
    alone = engine.answer(one.question, condition).trace
    np.testing.assert_array_equal(view.index, alone.index)
    for name in ("token_gap", "frame_gap"):
      np.testing.assert_allclose(
        getattr(view, name), getattr(alone, name), rtol=1e-5, atol=1e-6
      )


def test_methods_inside_the_language_model_show_their_last_layer(table, engine):
  question = table.questions[0]
  method = methods_lib.Method.parse("fastv")
  condition = methods_lib.Condition(method, 0.5)
  kept = engine.kept([question], [condition])
  alone = engine.answer(question, condition).trace
  np.testing.assert_array_equal(kept[question.id][0].index, alone.index)


def test_pictures_and_deciding_tokens(chosen, engine):
  for one in chosen:
    shown = engine.source.frames(one.question.video)
    np.testing.assert_array_equal(one.frames, shown)
    assert (one.grid, one.frames_per_slice) == (tiny.GRID, 1)
    assert one.decisive == set(engine.decisive[one.question.id])


def test_none_are_chosen_where_there_is_nothing_to_show(table, answers, engine):
  assert viewer.choose(table, answers, engine, {}, 0) == []
  alone = dataclasses.replace(
    table,
    methods=[m for m in table.methods if m.label == "fastv"],
    ratios=[0.1],
  )
  found = viewer.choose(alone, answers, engine, {}, 4, failures=FAILURES)
  assert found == []
