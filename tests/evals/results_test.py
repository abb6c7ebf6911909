"""results.json of answers that are written down by hand."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from cacovid_jax import errors, files
from cacovid_jax.data import answer_log
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks, provenance, results
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.evals.report import html, viewer
from cacovid_jax.inference import methods as methods_lib

GRID = (4, 2, 2)


def question(number, **fields):
  return question_lib.Question(
    id=f"q{number}",
    video=f"v{number // 2}.mp4",
    question="?",
    options=("x", "y"),
    answer="A",
    duration=("short", "long")[number % 2],
    category="colour" if number < 2 else None,
    **fields,
  )


QUESTIONS = [question(i) for i in range(4)]
METHODS = [
  methods_lib.Method.parse(n) for n in ("cacovid", "random", "uniform")
]


@pytest.fixture
def answers(tmp_path):
  """Vanilla 4/4, cacovid 3/4, random 1/4 and 2/4, uniform 0/4."""
  scores = {
    ("vanilla", 1.0, 0): [1, 1, 1, 1],
    ("cacovid", 0.25, 0): [1, 1, 1, 0],
    ("random", 0.25, 0): [1, 0, 0, 0],
    ("random", 0.25, 1): [1, 1, 0, 0],
    ("uniform", 0.25, 0): [0, 0, 0, 0],
  }
  out = answer_log.AnswerLog(tmp_path / "answers.jsonl", {})
  for (label, ratio, seed), values in scores.items():
    for q, value in zip(QUESTIONS, values, strict=True):
      fields = {
        "score": float(value),
        "kept": 16 if label == "vanilla" else 4,
        # The best frame is the question's own number.
        "frames": [int(q.id[1:]), 0, 1, 2],
      }
      out.add([(answer_log.Key(label, ratio, seed, q.id), fields)])
  return out


def built(answers, methods=METHODS, **options):
  table = results.Table(
    "toy", "test", QUESTIONS, methods, (0.25,), (0, 1), GRID
  )
  return results.build(table, answers, provenance={"decoder": "d"}, **options)


def test_schema(answers):
  out = built(answers)
  assert out["schema"] == 1
  assert (out["benchmark"], out["split"]) == ("toy", "test")
  assert (out["vanilla"]["accuracy"], out["vanilla"]["n"]) == (1.0, 4)
  assert list(out["methods"]) == ["cacovid", "random", "uniform"]
  cell = out["methods"]["cacovid"]["0.25"]
  assert cell["accuracy"] == 0.75
  assert cell["status"] == "ok"
  assert cell["kept_tokens"] == 4
  assert cell["equivalent_ratio"] == 0.25
  assert cell["of_vanilla"] == 0.75
  assert cell["by_duration"] == {
    "long": {"accuracy": 0.5, "n": 2},
    "short": {"accuracy": 1.0, "n": 2},
  }
  assert cell["by_category"] == {"colour": {"accuracy": 1.0, "n": 2}}
  assert cell["ci95"][0] <= 0.75 <= cell["ci95"][1]
  assert out["seeds"] == [0, 1]
  assert out["provenance"] == {"decoder": "d"}
  json.dumps(out, allow_nan=False)


def test_whole_prompts_are_what_was_kept_and_the_rest(answers):
  assert "prompt_tokens" not in built(answers)["vanilla"]  # Of before.
  more = answer_log.AnswerLog(None, {})
  for number, question in enumerate(QUESTIONS):
    for key in list(answers):
      if key.question == question.id:
        facts = {"beside_video": 10 + number} if number else {"fault": "broken"}
        more.add([(key, {**answers[key], **facts})])
  out = built(more)
  # Of three clips that can be used.
  assert out["vanilla"]["prompt_tokens"] == 16 + 12
  assert out["methods"]["cacovid"]["0.25"]["prompt_tokens"] == 4 + 12


def test_what_was_counted_and_how_is_told(answers):
  left_out = {"bad_rows": [{"file": "f", "row": 2}]}
  out = built(answers, rule="lmms-0.7.3", left_out=left_out)
  assert (out["metric"], out["scale"], out["macro"]) == ("accuracy", 1, [])
  assert (out["rule"], out["left_out"]) == ("lmms-0.7.3", left_out)
  assert built(answers)["left_out"] == {}


def test_further_groups_are_broken_down_by_facet(answers):
  groups = [
    (("domain", "sky"), ("type", "CW")),
    (("domain", "sea"),),
    (("domain", "sky"),),
    (),
  ]
  questions = [
    dataclasses.replace(q, groups=found)
    for q, found in zip(QUESTIONS, groups, strict=True)
  ]
  table = results.Table(
    "toy", "test", questions, METHODS, (0.25,), (0, 1), GRID
  )
  out = results.build(table, answers, provenance={})
  # random is right about q0 twice, about q1 once of two, else never.
  assert out["methods"]["random"]["0.25"]["by_group"] == {
    "domain": {
      "sea": {"accuracy": 0.5, "n": 1},
      "sky": {"accuracy": 0.5, "n": 2},
    },
    "type": {"CW": {"accuracy": 1.0, "n": 1}},
  }
  assert out["vanilla"]["by_group"]["domain"]["sky"] == {"accuracy": 1, "n": 2}
  assert built(answers)["vanilla"]["by_group"] == {}


@pytest.mark.parametrize("of_present", [False, True])
def test_a_macro_mean_over_categories(answers, of_present):
  """Of four questions: q0 "a", q1 to q3 "b"; "c" and "d" have none."""
  task = dataclasses.replace(
    benchmarks.task("prepared"),
    macro=("a", "b", "c", "d"),
    macro_of_present=of_present,
    metric="m_avg",
    scale=100,
  )
  questions = [
    dataclasses.replace(q, category="a" if q.id == "q0" else "b")
    for q in QUESTIONS
  ]
  table = results.Table(
    "toy", "test", questions, METHODS, (0.25,), (0, 1), GRID, task
  )
  out = results.build(table, answers, provenance={})
  categories = 2 if of_present else 4
  assert (out["metric"], out["scale"]) == ("m_avg", 100)
  assert out["macro"] == list("abcd")[:categories]
  assert out["vanilla"]["accuracy"] == round(2 / categories, 6)
  cell = out["methods"]["cacovid"]["0.25"]
  # a: 1 of 1; b: 2 of 3.
  np.testing.assert_allclose(
    cell["accuracy"], (1 + 2 / 3) / categories, atol=1e-6
  )
  np.testing.assert_allclose(cell["of_vanilla"], 5 / 6, atol=1e-6)
  assert cell["ci95"][0] <= cell["accuracy"] <= cell["ci95"][1]
  assert cell["by_category"]["b"] == {"accuracy": 0.666667, "n": 3}
  # random: a 1; b (1/2 + 0 + 0) / 3, of two seeds.
  cell = out["methods"]["random"]["0.25"]
  np.testing.assert_allclose(
    cell["accuracy"], (1 + 1 / 6) / categories, atol=1e-6
  )
  np.testing.assert_allclose(
    [cell["by_seed"]["0"], cell["by_seed"]["1"]],
    [1 / categories, (1 + 1 / 3) / categories],
    atol=1e-6,
  )
  paired = {(e["method"], e["vs"]): e["mean"] for e in out["paired"]}
  np.testing.assert_allclose(
    paired["random", "cacovid"], (1 / 6 - 2 / 3) / categories, atol=1e-6
  )


def test_guesses_are_counted(answers):
  method = methods_lib.Method.parse("guessing=uniform?")
  for q in QUESTIONS:
    fields = {"score": 1.0, "kept": 2}
    fields |= {"fallback": True} if q.id != "q0" else {}
    answers.add([(answer_log.Key(method.spec, 0.25, 0, q.id), fields)])
  out = built(answers, [method])
  assert out["methods"]["guessing"]["0.25"]["num_fallbacks"] == 3
  assert "num_fallbacks" not in out["vanilla"]


def test_a_cell_that_failed_has_a_reason_and_no_accuracy(answers):
  failures = {
    ("random", 0.25): evaluator_lib.Failure("needs rain", 0.31251),
    ("uniform", 0.25): evaluator_lib.Failure("needs sun", 0.3438),
  }
  out = built(answers, failures=failures)
  assert out["methods"]["random"]["0.25"] == {
    "status": "needs rain",
    "minimum_ratio": 0.3126,  # Rounded up: the ratio named can be used.
  }
  assert out["methods"]["uniform"]["0.25"]["minimum_ratio"] == 0.3438
  assert list(out["methods"]) == ["cacovid", "random", "uniform"]
  assert [(e["method"], e["vs"]) for e in out["paired"]] == [
    ("cacovid", "vanilla")
  ]
  # Without the reference there are no differences at all.
  out = built(
    answers, failures={("cacovid", 0.25): evaluator_lib.Failure("untrained")}
  )
  assert not out["paired"] and out["frame_head"] is None
  assert out["methods"]["uniform"]["0.25"]["accuracy"] == 0


def test_what_is_shown_is_a_method_that_ran():
  table = results.Table("toy", "test", QUESTIONS, METHODS, (0.25,), (0,), GRID)
  failure = evaluator_lib.Failure("needs rain")
  assert viewer._shown(table, 0.25, {}).label == "cacovid"
  failures = {("cacovid", 0.25): failure}
  assert viewer._shown(table, 0.25, failures).label == "random"
  failures |= {(name, 0.25): failure for name in ("random", "uniform")}
  assert viewer._shown(table, 0.25, failures) is None


def test_the_equivalent_ratio_is_a_mean_over_questions(answers):
  """In a method inside the model it does not follow from what is left."""
  method = methods_lib.Method.parse("inside=uniform?")
  for number, q in enumerate(QUESTIONS):
    fields = {"score": 1.0, "kept": 2, "equivalent": 0.2 + number / 100}
    fields |= {"forced": True} if number == 0 else {}
    answers.add([(answer_log.Key(method.spec, 0.25, 0, q.id), fields)])
  cell = built(answers, [method])["methods"]["inside"]["0.25"]
  assert (cell["kept_tokens"], cell["equivalent_ratio"]) == (2, 0.215)
  assert cell["forced"] == 0.25


def test_facts_of_a_method_are_told(answers):
  method = METHODS[0]
  compressor = dataclasses.replace(
    method.compressor, note="A stand-in.", exact_budget=False
  )
  method = dataclasses.replace(method, compressor=compressor)
  cell = built(answers, [method])["methods"]["cacovid"]["0.25"]
  assert (cell["note"], cell["exact_budget"]) == ("A stand-in.", False)


def test_seeds_are_averaged_and_shown(answers):
  cell = built(answers)["methods"]["random"]["0.25"]
  assert cell["accuracy"] == 0.375
  assert cell["by_seed"] == {"0": 0.25, "1": 0.5}


def test_paired_differences_name_both_sides(answers):
  paired = {
    (entry["method"], entry["vs"]): entry for entry in built(answers)["paired"]
  }
  assert paired["random", "cacovid"]["mean"] == -0.375
  assert paired["uniform", "cacovid"]["mean"] == -0.75
  assert paired["cacovid", "vanilla"]["mean"] == -0.25
  assert all(entry["ratio"] == "0.25" for entry in paired.values())
  low, high = paired["uniform", "cacovid"]["ci95"]
  assert low <= -0.75 <= high < 0


def test_frame_head_against_chance(answers):
  # One frame of four is drawn: q0 and q1 hit their frame, q2 does not (its
  # best frame is 2, the token lies in frame 3), q3 is not known.
  decisive = {"q0": [0, 1], "q1": [4, 15], "q2": [12]}
  head = built(answers, decisive=decisive)["frame_head"]
  assert (head["frames"], head["of"], head["n"]) == (1, 4, 3)
  np.testing.assert_allclose(head["hit"], 2 / 3, atol=1e-6)
  np.testing.assert_allclose(head["chance"], (1 + 2 + 1) / 4 / 3, atol=1e-6)
  assert built(answers)["frame_head"] is None


def test_oracles_are_not_methods(answers, tmp_path):
  methods = [*METHODS, methods_lib.Method.parse("decisive_boxes")]
  for q in QUESTIONS:
    key = answer_log.Key("decisive_boxes", 0.25, 0, q.id)
    answers.add([(key, {"score": 1.0, "kept": 4})])
  out = built(answers, methods)
  assert list(out["oracles"]) == ["decisive_boxes"]
  assert "decisive_boxes" not in out["methods"]


def test_the_same_answers_give_the_same_bytes(answers, tmp_path):
  for name in ("a.json", "b.json"):
    files.write_json(tmp_path / name, built(answers))
  assert (tmp_path / "a.json").read_bytes() == (
    tmp_path / "b.json"
  ).read_bytes()
  assert sorted(path.name for path in tmp_path.glob("*.json")) == [
    "a.json",
    "b.json",
  ]


@pytest.mark.parametrize("ratios", [(0.101, 0.104), (0.001,), ()])
def test_ratios_must_differ_in_two_decimals(ratios):
  with pytest.raises(errors.UserError):
    results.check_ratios(ratios)


def test_ratios_are_written_with_two_decimals():
  assert results.check_ratios([0.25, 0.1]) == (0.25, 0.1)
  assert results.ratio_key(0.1) == "0.10"


def test_shares_are_of_each_clips_own_tokens(tmp_path):
  """v0.mp4 has 16 tokens, v1.mp4 has 8; four are kept of each."""
  with answer_log.AnswerLog(tmp_path / "a.jsonl", {}) as out:
    for label, ratio, kept in (("vanilla", 1.0, (16, 8)), ("uniform", 0.25, 4)):
      for place, q in enumerate(QUESTIONS):
        count = kept if label == "uniform" else kept[place // 2]
        key = answer_log.Key(label, ratio, 0, q.id)
        out.add([(key, {"score": 1.0, "kept": count})])
  small = (2, 2, 2)
  table = results.Table(
    "toy",
    "test",
    QUESTIONS,
    METHODS[2:],
    (0.25,),
    (0,),
    GRID,
    grids={"v0.mp4": GRID, "v1.mp4": small},
  )
  found = results.build(table, out, provenance={})
  assert found["grid"] == [
    {"grid": [2, 2, 2], "clips": 1, "questions": 2},
    {"grid": [4, 2, 2], "clips": 1, "questions": 2},
  ]
  assert found["vanilla"]["kept_tokens"] == 12
  cell = found["methods"]["uniform"]["0.25"]
  assert cell["kept_tokens"] == 4
  # Means of 4/16 and 4/8, not 4 of the mean of 12.
  assert cell["equivalent_ratio"] == 0.375
  words = html.grid_words(found["grid"])
  assert words.startswith("2 grids of tokens (time, rows, columns): 2 × 2 × 2")
  many = [{"grid": [i, 1, 1], "clips": i} for i in range(1, 7)]
  assert html.grid_words(many).endswith("3 × 1 × 1 (3 clips), 2 more")
  assert html.grid_words([4, 2, 2]).startswith("4 × 2 × 2 tokens a clip")


def test_provenance_names_what_answers_were_computed_on():
  one = {
    "decoder": "PyAV 15",
    "device": "gpu X",
    "git_commit": "c0",
    "packages": {"jax": "1"},
    "python": "3.11",
  }
  other = {**one, "device": "cpu", "packages": {"jax": "2", "flax": "3"}}
  described = provenance.describe(
    frame_hashes={"a": "0"},
    index_hashes={"a": "1"},
    checkpoint={"sha256": "2"},
    policies={},
    template="{{ messages }}",
    environments=[one, other, one],
  )
  assert described["environments"] == [other, one]
  assert described["packages"] == {"flax": "3", "jax": "1, 2"}
  assert (described["decoder"], described["git_commit"]) == ("PyAV 15", "c0")
  assert described["device"] == "cpu, gpu X"
  # sha256 of "a", NUL, "1", newline; and of the template.
  digests = [
    hashlib.sha256(text).hexdigest()
    for text in (b"a\0" + b"1\n", b"{{ messages }}")
  ]
  assert described["frame_index_hash"] == digests[0]
  assert described["template_hash"] == digests[1]
  alone = provenance.describe(frame_hashes={}, checkpoint={}, policies={})
  assert alone["device"] == "cpu" and alone["template_hash"] is None
  assert alone["environments"] == [provenance.environment()]
  assert alone["packages"] == provenance.packages()
