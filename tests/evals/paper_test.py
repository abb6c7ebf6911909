"""The paper's numbers, and what may be called the same as them."""

import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.evals import paper
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import llava_onevision, qwen2_5_vl

VANILLA = paper.row("ov7b", "vanilla", 1.0)


def test_averages_and_shares_follow_from_the_columns():
  """The paper's own arithmetic, to its one decimal."""
  benchmarks = list(paper.BENCHMARKS)
  for row in paper.ROWS:
    vanilla = paper.row(row.model, "vanilla", 1.0)
    # Shares were taken before rounding to one decimal.
    assert abs(100 * row.average / vanilla.average - row.share) < 0.25, row
    if row.scores:
      mean = np.mean([row.scores[name] for name in benchmarks])
      assert abs(mean - row.average) < 0.11, row
      parts = [row.scores[f"videomme/{d}"] for d in ("short", "medium", "long")]
      assert abs(np.mean(parts) - row.scores["videomme"]) < 0.11, row


def test_every_row_of_the_paper_is_there():
  found = [(r.model, r.method, r.ratio) for r in paper.ROWS]
  assert len(found) == len(set(found)) == 20
  assert set(paper.METHODS) <= set(compressors.names())
  for ratio in paper.RATIOS:
    for model in paper.MODELS:
      assert (model, "cacovid", ratio) in found
  assert paper.row("ov7b", "divprune", 0.1).scores["mlvu_test"] == 44.9
  assert paper.row("ov7b", "divprune", 0.15) is None
  assert paper.row(None, "vanilla", 1.0) is None


def test_models_are_known_by_their_sizes():
  llava = llava_onevision.LlavaOnevisionConfig
  qwen = qwen2_5_vl.Qwen2_5VLConfig
  assert paper.model_of(llava.llava_onevision_7b()) == "ov7b"
  assert paper.model_of(qwen.qwen2_5_vl_3b()) == "qwen3b"
  assert paper.model_of(qwen.qwen2_5_vl_7b()) is None
  assert paper.model_of(llava.tiny()) is None


def test_options_make_another_method():
  for spec, expected in (
    ("cacovid", True),
    ("cacovid=cacovid?importance_ratio=0.5&max_frame_share=1.5", True),
    ("cacovid=cacovid?importance_ratio=1.0", False),
    ("cacovid=cacovid?merge=nearest", False),
    ("cacovid=cacovid?budget=frames", True),
    ("cacovid=cacovid?budget=clip", False),
    ("cacovid=uniform", False),
    ("mine=cacovid", False),
  ):
    assert paper.is_method(methods_lib.Method.parse(spec)) == expected


def own(**changes):
  return VANILLA.reported() | changes


def test_drift_is_told_by_column():
  found = paper.drift("ov7b", own(mlvu_dev=62.4), 1.0)
  entry = found["columns"]["mlvu_dev"]
  assert (entry["own"], entry["paper"], entry["difference"]) == (
    62.4, 63.0, -0.6,
  )  # fmt: skip
  assert entry["within"] and found["worst"] == 0.6
  # Both have one decimal: 61.951 is 62.0 in a table.
  assert paper.drift("ov7b", own(mlvu_dev=61.951), 1.0)["worst"] == 1.0
  far = paper.drift("ov7b", own(mlvu_dev=60.7), 1.0)
  assert not far["columns"]["mlvu_dev"]["within"] and far["worst"] == 2.3
  none = paper.drift(None, own(), 1.0)
  assert none["columns"] == {} and none["worst"] is None


def test_a_row_is_reproduced_only_where_vanilla_is():
  row = paper.row("ov7b", "cacovid", 0.25)
  near = paper.drift("ov7b", own(), 1.0)
  assert paper.reproduced(near, row, row.reported()) is True
  off = row.reported() | {"videomme": row.scores["videomme"] - 1.2}
  assert paper.reproduced(near, row, off) is False
  far = paper.drift("ov7b", own(longvideobench=54.1), 1.0)
  # Equal to the last digit, and yet not reproduced.
  assert paper.reproduced(far, row, row.reported()) == (
    "vanilla off by 2.3 points (tolerance 1.0)"
  )
  wide = paper.drift("ov7b", own(longvideobench=54.1), 3.0)
  assert paper.reproduced(wide, row, row.reported()) is True


def test_what_cannot_be_compared_says_why():
  near = paper.drift("ov7b", own(), 1.0)
  row = paper.row("ov7b", "cacovid", 0.25)
  assert paper.reproduced(near, None, {}) == "not in the paper"
  assert paper.reproduced(near, row, row.reported(), ["16 frames", "b"]) == (
    "16 frames"
  )
  # A model of which only averages are known, without one.
  found = paper.drift("qwen3b", {"videomme": 60.0}, 1.0)
  row = paper.row("qwen3b", "cacovid", 0.25)
  assert "no column" in paper.reproduced(found, row, {"videomme": 59.0})


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_is_a_number_of_points(tolerance):
  with pytest.raises(errors.UserError, match="tolerance"):
    paper.check_tolerance(tolerance)
