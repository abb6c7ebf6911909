"""Times of selections: every method has a row, peers choose what ours do."""

import dataclasses

import numpy as np
import pytest
import torch

from cacovid_jax import compressors, errors
from cacovid_jax.models import llava_onevision
from experiments import made_up, selection_speed
from tests.compressors import torch_peers
from tests.experiments import commands

TINY = llava_onevision.LlavaOnevisionConfig.tiny()
TINY = dataclasses.replace(
  TINY, text=dataclasses.replace(TINY.text, num_layers=8)
)
GRID = (8, 4, 4)


@pytest.mark.parametrize("name", ("divprune", "visionzip", "prunevid"))
def test_the_peer_keeps_the_same_tokens(name):
  (row,) = selection_speed.measure([name], GRID, TINY, 0.25, 1, "cpu")
  assert row["ms"] > 0 and row["peer_ms"] > 0
  # Rounding of bfloat16 means may move a cluster's centre.
  assert row["same"] >= (0.9 if name == "prunevid" else 1.0)


def test_methods_of_every_kind_are_timed():
  names = ["cacovid", "evs", "fastv", "framefusion", "flashvid"]
  rows = [*selection_speed.measure(names, GRID, TINY, 0.5, 1)]
  assert [row["name"] for row in rows] == names
  assert all(row["ms"] > 0 and "peer_ms" not in row for row in rows)
  lines = selection_speed.table(rows).splitlines()
  assert len(lines) == 2 + len(names) and "`fastv`" in lines[4]
  assert rows[0]["in_float32"] == 1.0 and rows[1]["in_float32"] > 0.9
  assert "in_float32" not in rows[2]


def test_a_share_counts_what_both_keep():
  assert selection_speed._share([1, 2, 3, 4], [4, 3, 9]) == 0.5


def test_scenes_hold_still_and_moving_places():
  tokens = made_up.video((8, 6, 6), 64).reshape(4, 2, 36, 64)
  unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
  cosine = (unit[:, 0] * unit[:, 1]).sum(axis=-1)
  assert 0.2 < (cosine > 0.9).mean() < 0.8
  assert (abs(cosine) < 0.5).any()
  # Scenes have nothing to do with each other.
  assert abs((unit[0, 0] * unit[1, 0]).sum(axis=-1)).mean() < 0.3


def test_budgets_of_the_peer_are_shared_out_exactly():
  assert torch_peers._shares([10, 5, 1], 8) == [5, 2, 1]
  assert torch_peers._shares([1, 1, 98], 50) == [1, 1, 48]
  segments = torch_peers._segments([0, 0, 0, 1, 2, 2, 0, 2, 2])
  assert segments == [(0, 4), (4, 9)]
  kept = torch_peers.divprune(torch.eye(4)[[0, 0, 1, 2]], 3)
  assert kept.tolist() == [0, 2, 3]


def test_mistakes_are_named():
  with pytest.raises(errors.UserError, match="did you mean divprune"):
    commands.run(selection_speed, methods="divprun")
  with pytest.raises(errors.UserError, match="unexpected argument 'fast'"):
    selection_speed.COMMAND.parse(["selection_speed", "fast"])
  assert set(selection_speed.GOALS) <= set(compressors.names())
