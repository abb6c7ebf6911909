"""The table's rows, Markdown and CSV, of results written down by hand."""

import csv

from cacovid_jax.evals import latency, tables
from tests.evals import charts_test


def cell(accuracy, kept=78, **more):
  return {
    "status": "ok",
    "accuracy": accuracy,
    "ci95": [accuracy - 0.02, accuracy + 0.03],
    "kept_tokens": kept,
    "equivalent_ratio": kept / 784,
    **more,
  }


OUT = {
  "benchmark": "dense",
  "split": "test",
  "grid": [16, 7, 7],
  "num_clips": 5,
  "seeds": [0, 1, 2],
  "vanilla": {**cell(0.9, 784), "n": 20},
  "methods": {
    "cacovid": {"0.10": cell(0.8, options={"importance_ratio": 1.0})},
    "random": {"0.10": cell(0.5, by_seed={"0": 0.4, "1": 0.5, "2": 0.6})},
    "fastv": {"0.10": {"status": "a | b; use at least 0.12",
                       "minimum_ratio": 0.12}},
    "dyto": {"0.10": cell(0.85, 77.5, note="A stand-in.", forced=0.25)},
  },
  "oracles": {"decisive_boxes": {"0.10": cell(0.89)}},
  "paired": [
    {"method": "random", "vs": "cacovid", "ratio": "0.10", "mean": -0.3,
     "ci95": [-0.4, -0.2]},
    {"method": "cacovid", "vs": "vanilla", "ratio": "0.10", "mean": -0.1,
     "ci95": [-0.2, 0.0]},
  ],
}  # fmt: skip
TIMES = {
  "vanilla": {"1.00": latency.Cost(0.0, answer=50.0, before=9.0)},
  "cacovid": {"0.10": latency.Cost(0.5, 4.25, 20.0, 9.0)},
  "random": {"0.10": latency.Cost(0.125, answer=20.0, before=9.0)},
}


def test_rows_hold_what_is_known():
  rows = {row["method"]: row for row in tables.compressor_rows(OUT, TIMES)}
  assert list(rows) == [
    "cacovid", "random", "fastv", "dyto", "decisive_boxes (oracle)"
  ]  # fmt: skip
  assert all(tuple(row) == tables.COMPRESSOR_COLUMNS for row in rows.values())
  ours = rows["cacovid"]
  assert (ours["selection_ms"], ours["rule_ms"], ours["reads_ms"]) == (
    4.75, 0.5, 4.25,
  )  # fmt: skip
  assert (ours["answer_ms"], ours["first_token_ms"]) == (20.0, 33.75)
  # The difference to vanilla is not one to itself.
  assert ours["vs_cacovid"] is None
  assert ours["options"] == "importance_ratio=1.0"
  assert rows["random"]["seeds"] == 3 and ours["seeds"] == 1
  assert (rows["random"]["vs_low"], rows["random"]["vs_high"]) == (-0.4, -0.2)
  assert rows["fastv"]["accuracy"] is None
  assert rows["fastv"]["minimum_ratio"] == 0.12
  assert rows["dyto"]["selection_ms"] is None


def test_markdown_is_sorted_and_escaped():
  rows = tables.compressor_rows(OUT, TIMES)
  text = tables.compressor_markdown(OUT, rows)
  table = [line for line in text.splitlines() if line.startswith("| ")][2:]
  names = [line.split(" | ")[0].strip("| ") for line in table]
  # Best first; what could not be run last.
  assert names == [
    "decisive_boxes (oracle)", "dyto", "cacovid", "random", "fastv"
  ]  # fmt: skip
  assert table[3] == (
    "| random | 78 | 0.0995 | 0.12 | 29.12 | 50.0 [48.0, 53.0]"
    " | -30.0 [-40.0, -20.0] |"
  )
  assert "| 77.5 |" in table[1]
  # A bar within a cell would end it.
  assert "a \\| b; use at least 0.12" in table[4]
  assert "- dyto: A stand-in." in text
  assert text.count("left its rule") == 1
  assert "- dyto at 10%" in text and "for 25% of the questions" in text
  assert "## 10% of the tokens" in text and "20 questions about 5" in text


def test_csv_reads_back(tmp_path):
  rows = tables.compressor_rows(OUT, TIMES)
  tables.write_compressors(tmp_path, OUT, TIMES)
  with open(tmp_path / "table.csv", encoding="utf-8", newline="") as f:
    found = list(csv.DictReader(f))
  assert {p.name for p in tmp_path.iterdir()} == set(tables.COMPRESSOR_FILES)
  for row, back in zip(rows, found, strict=True):
    for name, value in row.items():
      assert back[name] == ("" if value is None else str(value))


def test_a_chart_of_few_points_and_of_many(tmp_path):
  """Rows without a time are left out; the same input, the same bytes."""
  many = {
    f"method_{i}": {"0.10": latency.Cost(0.1 * (i + 1))} for i in range(24)
  }
  crowd = OUT | {
    "methods": {name: {"0.10": cell(0.7)} for name in many},
    "paired": [],
  }
  path = tmp_path / "accuracy_over_time.svg"
  for out, times in ((OUT, TIMES), (crowd, many), (OUT, {})):
    tables.write_compressors(tmp_path, out, times)
    first = path.read_bytes()
    tables.write_compressors(tmp_path, out, times)
    assert path.read_bytes() == first
    shown = charts_test.texts(first.decode())
    methods = {*out["methods"], *out["oracles"]}
    assert {*methods, "vanilla"} & set(shown) == set(times)
    title = "dense, test: a point for each share kept"
    assert {"all tokens", title} <= set(shown)


def test_a_cell_with_a_bar_and_numbers_to_the_right():
  found = tables.as_markdown(["a", "b"], [["x | y", "1"]], range(1, 2))
  assert found == "| a | b |\n| --- | ---: |\n| x \\| y | 1 |"
