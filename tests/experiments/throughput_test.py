"""The throughput of evaluations, in its tiny form."""

import json

import pytest

from cacovid_jax import errors
from experiments import throughput
from tests.experiments import commands


def test_a_tiny_evaluation_is_measured_and_goes_on(
  tmp_path, monkeypatch, capsys
):
  flags = dict(
    workdir=tmp_path, size="tiny", clips=3, seconds=1, batches="1,2", threads=2
  )
  commands.run(throughput, **flags)
  out = json.loads((tmp_path / "results.json").read_text())
  cells = [(row["batch"], row["ratio"]) for row in out["rows"]]
  assert cells == [(1, 1.0), (1, 0.25), (2, 1.0), (2, 0.25)]
  for row in out["rows"]:
    assert row["status"] == "ok"
    assert (row["clips"], row["questions"]) == (3, 3)
    assert 0 < row["busy_share"] <= 1 and row["clips_per_second"] > 0
  assert out["threads"] == 2
  table = (tmp_path / "table.md").read_text()
  assert table.strip() in capsys.readouterr().out
  failing = lambda *args: pytest.fail("measured again")  # noqa: E731
  monkeypatch.setattr(throughput.made_up, "checkpoint", failing)
  commands.run(throughput, **flags)
  assert json.loads((tmp_path / "results.json").read_text()) == out
  assert (tmp_path / "table.md").read_text() == table


def test_gains_by_hand():
  """Of the first batch size 2 / 1; of the other one 12 / 8, three quarters."""
  rows = [
    {
      "batch": batch,
      "ratio": ratio,
      "status": "ok",
      "clips": 4,
      "seconds": seconds,
      "clips_per_second": 4 / seconds,
      "busy_share": 0.875,
    }
    for batch, ratio, seconds in (
      (1, 1.0, 2.0), (1, 0.25, 1.0), (8, 1.0, 1.2), (8, 0.25, 0.8)
    )
  ]  # fmt: skip
  rows.append(
    {"batch": 16, "ratio": 1.0, "status": "out of the device's memory (7 GiB)"}
  )
  lines = throughput.markdown(rows).splitlines()[2:]
  assert lines == [
    "| 1 | 100% | 500 | 2 | 88% |  |  |",
    "| 1 | 25% | 250 | 4 | 88% | 2.00 | 1.00 |",
    "| 8 | 100% | 300 | 3.33 | 88% |  |  |",
    "| 8 | 25% | 200 | 5 | 88% | 1.50 | 0.75 |",
    "| 16 | 100% | out of the device's memory |  |  |  |  |",
  ]


@pytest.mark.parametrize("batches", ["", "0", "1,x"])
def test_a_batch_size_that_is_none_is_named(batches, tmp_path):
  with pytest.raises(errors.UserError, match="--batches"):
    commands.run(throughput, workdir=tmp_path, size="tiny", batches=batches)


def test_prompts_of_released_models_are_as_long_as_they_are():
  asked = throughput.made_up.tokenizer().encode_prompt("Why?", 32 * 14 * 14)
  assert asked.length > 32 * 14 * 14
