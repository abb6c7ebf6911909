"""Averages over benchmarks, against loops over resampled clips."""

import dataclasses
import json
import types

import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import combined
from cacovid_jax.inference import methods as methods_lib

VANILLA = ("vanilla", "1.00")
COMPRESSED = ("cacovid", "0.10")
OTHER = ("uniform", "0.10")
METHODS = [methods_lib.Method.parse(name) for name in ("cacovid", "uniform")]


def part(name, count, macro=(), seed=0, failed=()):
  """Returns a benchmark of made-up scores; two questions a clip."""
  rng = np.random.default_rng(seed + 7)
  kinds = macro or ("one",)
  asked = [
    question_lib.Question(
      id=f"{name}{i}",
      # Out of order, so that clips are not where their questions are.
      video=f"clip{(5 * i) % max(count // 2, 1)}",
      question="",
      answer="A",
      category=kinds[i % len(kinds)],
      duration=("short", "long")[i % 2],
    )
    for i in range(count)
  ]
  scores = {
    key: rng.integers(0, 2, count).astype(float)
    for key in (VANILLA, COMPRESSED, OTHER)
    if key[0] not in failed
  }
  methods = {
    key[0]: {key[1]: {"status": "too few" if key[0] in failed else "ok"}}
    for key in (COMPRESSED, OTHER)
  }
  out = {
    "methods": methods, "vanilla": {"by_duration": {}}, "macro": list(macro),
  }  # fmt: skip
  return combined.Part(name, tuple(asked), out, scores, seed)


def number(one, scores, counts=None):
  """Returns a benchmark's number by loops; counts: clip -> times drawn.

  A category that no drawn clip has is left out; one that never is there is 0.
  """
  kinds = one.out["macro"] or [""]
  sums = {kind: [0.0, 0] for kind in kinds}
  there = set()
  for question, score in zip(one.questions, scores, strict=True):
    times = 1 if counts is None else counts[question.video]
    kind = question.category if one.out["macro"] else ""
    there.add(kind)
    sums[kind][0] += times * score
    sums[kind][1] += times
  means = [total / seen for total, seen in sums.values() if seen]
  return sum(means) / len(means) * len(there) / len(kinds)


def drawn(one, replicates):
  """Returns a list of {clip: times drawn}, one for each replicate."""
  clips = sorted({question.video for question in one.questions})
  rng = np.random.default_rng(one.seed)
  share = np.full(len(clips), 1 / len(clips))
  rows = rng.multinomial(len(clips), share, size=replicates)
  return [dict(zip(clips, row, strict=True)) for row in rows]


PARTS = [
  part("plain", 12, seed=0),
  part("macro", 10, macro=("a", "b", "c", "never"), seed=1),
]


def test_numbers_and_replicates_are_those_of_loops():
  replicates = 50
  for one in PARTS:
    for key in (VANILLA, COMPRESSED):
      scores = one.scores[key]
      assert one.value(key) == pytest.approx(number(one, scores))
      expected = [
        number(one, scores, counts) for counts in drawn(one, replicates)
      ]
      np.testing.assert_allclose(one.draws(key, replicates), expected)


def test_averages_and_their_intervals():
  replicates = 400
  out = combined.average(PARTS, METHODS, [0.1], replicates=replicates)
  draws = {
    key: np.mean([p.draws(key, replicates) for p in PARTS], axis=0)
    for key in (VANILLA, COMPRESSED, OTHER)
  }
  means = {
    key: np.mean([number(p, p.scores[key]) for p in PARTS]) for key in draws
  }
  cell = out["methods"]["cacovid"]["0.10"]
  assert cell["accuracy"] == pytest.approx(means[COMPRESSED], abs=1e-6)
  np.testing.assert_allclose(
    cell["ci95"], np.quantile(draws[COMPRESSED], [0.025, 0.975]), atol=1e-6
  )
  share = means[COMPRESSED] / means[VANILLA]
  assert cell["of_vanilla"] == pytest.approx(share, abs=1e-6)
  paired = {(e["method"], e["vs"]): e for e in out["paired"]}
  assert set(paired) == {("uniform", "cacovid"), ("cacovid", "vanilla")}
  entry = paired["uniform", "cacovid"]
  assert entry["mean"] == pytest.approx(
    means[OTHER] - means[COMPRESSED], abs=1e-6
  )
  np.testing.assert_allclose(
    entry["ci95"],
    np.quantile(draws[OTHER] - draws[COMPRESSED], [0.025, 0.975]),
    atol=1e-6,
  )
  # Both are drawn together: their variances do not just add up.
  apart = np.var(draws[OTHER]) + np.var(draws[COMPRESSED])
  assert np.var(draws[OTHER] - draws[COMPRESSED]) != pytest.approx(apart)


def test_benchmarks_are_resampled_apart():
  """The same scores of the same clips in two benchmarks."""
  first, second = part("one", 12, seed=0), part("two", 12, seed=1)
  second = dataclasses.replace(second, scores=first.scores)
  assert first.value(VANILLA) == second.value(VANILLA)
  assert (first.draws(VANILLA, 20) != second.draws(VANILLA, 20)).any()


def test_a_row_that_fails_somewhere_has_no_average():
  parts = [PARTS[0], part("macro", 10, seed=1, failed=("uniform",))]
  out = combined.average(parts, METHODS, [0.1], replicates=20)
  assert out["methods"]["uniform"]["0.10"] == {"status": "macro: too few"}
  assert [entry["method"] for entry in out["paired"]] == ["cacovid"]


RUN = {"checkpoint": "abc", "settings": {"num_frames": 4}}


def write(path, records, run=RUN):
  lines = [{"run": run}, *records]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def record(method, ratio, seed, question, score):
  return {"method": method, "ratio": ratio, "seed": seed,
          "question": question, "score": score}  # fmt: skip


@pytest.fixture
def evaluated(tmp_path):
  """Returns (a workdir's answers, f(shard) that reads its scores)."""
  asked = PARTS[0].questions[:2]
  names = [question.id for question in asked]
  evals = types.SimpleNamespace(
    methods=("random",), ratios=(0.1,), seeds=(0, 1)
  )
  records = [record("vanilla", 1.0, 0, name, 1.0) for name in names]
  for seed, scores in ((0, (1, 0)), (1, (1, 1))):
    records += [
      record("random", 0.1, seed, name, score)
      for name, score in zip(names, scores, strict=True)
    ]
  out = {"methods": {"random": {"0.10": {"status": "ok"}}}, "macro": []}
  (tmp_path / "results.json").write_text(json.dumps(out))
  write(tmp_path / "answers.jsonl", records)

  def read(shard=(0, 1)):
    experiment = types.SimpleNamespace(
      workdir=tmp_path, shard=shard, config=types.SimpleNamespace(evals=evals)
    )
    return combined.read_part("plain", experiment, asked, RUN).scores

  return records, read


def test_scores_are_means_over_seeds(tmp_path, evaluated):
  records, read = evaluated
  found = read()
  np.testing.assert_array_equal(found["random", "0.10"], [1.0, 0.5])
  np.testing.assert_array_equal(found[VANILLA], [1.0, 1.0])
  write(tmp_path / "answers.jsonl", records[:-1])
  with pytest.raises(errors.UserError, match="random lacks question plain1"):
    read()


def test_a_stray_file_beside_the_answers_changes_nothing(tmp_path, evaluated):
  records, read = evaluated
  wrong = [{**entry, "score": 0.0} for entry in records]
  for name in ("answers_backup.jsonl", "answers-copy.jsonl",
               "answers.jsonl.bak", "validation_answers.jsonl"):  # fmt: skip
    write(tmp_path / name, wrong, run={})
  np.testing.assert_array_equal(read()["random", "0.10"], [1.0, 0.5])


def test_answers_of_another_run_are_refused(tmp_path, evaluated):
  records, read = evaluated
  other = {**RUN, "settings": {"num_frames": 8}}
  write(tmp_path / "answers-1-of-2.jsonl", records, run=other)
  with pytest.raises(errors.UserError, match="another run .differs in sett"):
    read()


def test_ledgers_that_were_cut_off(tmp_path, evaluated):
  """In the middle of a line, before the first one, or in another place."""
  records, read = evaluated
  first, second = (tmp_path / f"answers-{i}-of-2.jsonl" for i in (0, 1))
  write(first, records[:3])
  write(second, records[3:])
  (tmp_path / "answers.jsonl").write_bytes(b"")
  np.testing.assert_array_equal(read()["random", "0.10"], [1.0, 0.5])
  whole = second.read_bytes()
  second.write_bytes(whole[:-10])
  with pytest.raises(errors.UserError, match="random lacks question plain1"):
    read()
  second.write_bytes(whole[:20] + b"\n" + whole[20:])
  with pytest.raises(errors.UserError, match="random lacks question plain"):
    read()


def test_of_two_answers_the_process_own_counts(tmp_path, evaluated):
  """As in the evaluation, which asks nothing that its own file has."""
  records, read = evaluated
  write(
    tmp_path / "answers-1-of-2.jsonl",
    [{**entry, "score": 0.0} for entry in records],
  )
  np.testing.assert_array_equal(read((0, 1))["random", "0.10"], [1.0, 0.5])
  np.testing.assert_array_equal(read((1, 2))["random", "0.10"], [0.0, 0.0])


def test_a_clip_that_could_not_be_used_counts_as_wrong(tmp_path, evaluated):
  """Unless another process could use it after all."""
  records, read = evaluated
  fault = {**records[-1], "score": 0.0, "fault": "missing"}
  write(tmp_path / "answers.jsonl", [*records[:-1], fault])
  np.testing.assert_array_equal(read()["random", "0.10"], [1.0, 0.0])
  write(tmp_path / "answers-0-of-2.jsonl", records[-1:])
  np.testing.assert_array_equal(read()["random", "0.10"], [1.0, 0.5])
