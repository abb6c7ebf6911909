"""What counts as a difference from the recorded run, and the file's form."""

import copy
import json

import numpy as np
import pytest

from tests.baseline import compare, record

RECORDED = {
  "dense/answers": {
    "q0": {"vanilla 1": ["A", "A", 1.0], "random 0.1": ["B", "B", 0.0]},
    "q1": {"vanilla 1": ["C", "C", 1.0], "random 0.1": ["C", "C", 1.0]},
  },
  "dense/kept": {
    # Bits 1, 5 and 9 of two bytes.
    "q0": {"random 0.1": "set:REA="},
    "q1": {"random 0.1": "3:ab"},
  },
}


def outcomes(change, **options):
  """Returns {section: outcome} after a change to a copy of RECORDED."""
  found = copy.deepcopy(RECORDED)
  change(found)
  made = compare.compare(RECORDED, found, **options)
  return {outcome.section: outcome for outcome in made}


def test_equal_runs_pass():
  found = outcomes(lambda sections: None)
  assert found["dense/answers"] == ("dense/answers", 12, 0, 0, "")
  assert found["dense/kept"] == ("dense/kept", 4, 0, 0, "")
  assert all(one.passes(0.0) for one in found.values())


def test_one_letter_differs():
  def change(sections):
    sections["dense/answers"]["q1"]["random 0.1"][1] = "D"

  found = outcomes(change)
  one = found["dense/answers"]
  assert one[1:4] == (12, 1, 0)
  assert one.first == "q1, random 0.1, 1: recorded 'C', found 'D'"
  assert not one.passes(0.0) and not one.passes(0.08)
  assert one.passes(1 / 12)  # A share of the values.
  assert found["dense/kept"].passes(0.0)
  shown = compare.table(found.values(), 0.0).splitlines()
  assert [("FAILED" in line) for line in shown] == [False, True, False]


def test_indices_count_one_by_one_and_only_those_that_differ_are_shown():
  def change(sections):
    sections["dense/kept"]["q0"]["random 0.1"] = "set:QkA="

  one = outcomes(change)["dense/kept"]
  assert one[1:4] == (4, 1, 0)
  assert one.first == "q0, random 0.1: recorded alone [5], found alone [6]"


@pytest.mark.parametrize("index", [[], [0], [7, 8], [1, 5, 9, 783]])
def test_indices_survive_their_text(index):
  text = record.set_text(np.array(index, int))
  assert compare.indices(text) == set(index)


def test_indices_that_occur_twice_are_refused():
  with pytest.raises(ValueError, match="occur twice"):
    record.set_text(np.array([3, 3]))


@pytest.mark.parametrize("other_way", [False, True])
def test_a_question_on_one_side_only_fails_whatever_is_allowed(other_way):
  def change(sections):
    if other_way:
      sections["dense/kept"]["q2"] = {"random 0.1": "3:cd"}
    else:
      del sections["dense/kept"]["q1"]

  one = outcomes(change)["dense/kept"]
  assert (one.differing, one.absent) == (1, 1)
  assert "(absent)" in one.first
  assert not one.passes(1.0)


def test_a_missing_section_and_an_empty_one_fail():
  one = outcomes(lambda sections: sections.pop("dense/kept"))["dense/kept"]
  assert not one.passes(1.0)
  (one,) = compare.compare({"a": {}}, {"a": {}})
  assert not one.passes(1.0)


def test_numbers_are_equal_within_the_tolerance():
  def change(sections):
    sections["dense/answers"]["q0"]["vanilla 1"][2] = 1.00001

  assert outcomes(change)["dense/answers"].differing == 1
  assert outcomes(change, tolerance=1e-4)["dense/answers"].differing == 0


def test_facts_of_another_machine_are_named():
  assert compare.machine_differences({"jax": "1"}, {"jax": "1"}) == []
  (line,) = compare.machine_differences({"jax": "1"}, {"jax": "2"})
  assert line == "jax: recorded with 1, here 2"


def test_a_file_that_is_not_there_is_named(capsys):
  with pytest.raises(SystemExit):
    compare.main(["--baseline", "nowhere.json"])
  assert "there is no file nowhere.json" in capsys.readouterr().err


def test_an_unknown_part_is_named(capsys):
  with pytest.raises(SystemExit):
    compare.main(["--parts", "dense,densest"])
  assert "there is no part 'densest'" in capsys.readouterr().err


def test_the_command_compares_two_files(tmp_path, capsys):
  facts = {"commit": "c", "machine": {"jax": "1"}}
  other = copy.deepcopy(RECORDED)
  other["dense/kept"]["q1"]["random 0.1"] = "3:ac"
  for name, sections in (("one", RECORDED), ("other", other)):
    record.write(tmp_path / name, facts | {"sections": sections})
  same = [f"--baseline={tmp_path / 'one'}", f"--found={tmp_path / 'one'}"]
  assert compare.main(same) == 0
  differs = [*same, f"--found={tmp_path / 'other'}"]
  assert compare.main(differs) == 1
  assert "1 of 2 sections failed" in capsys.readouterr().out
  assert compare.main([*differs, "--allow_differing=0.5"]) == 0


def test_the_recorded_file_is_whole():
  text = compare.BASELINE.read_text(encoding="utf-8")
  assert len(text) < 400 * 2**10
  recorded = json.loads(text)
  assert set(recorded) == {"commit", "machine", "sections"}
  assert {"processor", "jax", "flax", "numpy"} <= set(recorded["machine"])
  sections = recorded["sections"]
  asked = ("clips", "answers", "kept", "likelihoods")
  trained = ("kept", "answers", "rewards", "policy")
  assert set(sections) == {
    f"{part}/{kind}"
    for part in record.PARTS
    for kind in (asked if f"{part}/clips" in sections else trained)
  }
  for outcome in compare.compare(sections, sections):
    assert outcome.compared and outcome.passes(0.0), outcome.section
  # Every method is asked, at both ratios, and shows what it keeps.
  cells = {f"{name} {r:g}" for name in record.METHODS for r in record.RATIOS}
  for part in ("dense", "sparse"):
    for values in sections[f"{part}/kept"].values():
      assert set(values) == cells
    for values in sections[f"{part}/answers"].values():
      assert set(values) == cells | {"vanilla 1"}
