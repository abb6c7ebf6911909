"""The command that compares a policy's choices after storage."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, processors, qwen2_5_vl
from cacovid_jax.policy import selection
from experiments import precision_overlap
from tests.evals import tiny
from tests.experiments import commands
from tests.policy.storage_test import (  # noqa: F401
  CONFIG,
  POLICY,
  fixture_params,
)

GRID = (4, 3, 5)
RATIOS = (0.1, 0.4)


@pytest.fixture(name="prompts", scope="module")
def fixture_prompts():
  found = []
  for seed in range(3):
    x = jax.random.normal(jax.random.key(seed), (70, CONFIG.llm.hidden_size))
    rows = jnp.arange(60) + 3
    found.append((x, jnp.arange(70)[None], rows, GRID))
  return found


def chosen(params, prompt, ratio):
  """Returns the set of tokens that a policy selects."""
  scores = score(params, *prompt[:3])
  kept = jax.jit(selection.select)(scores, selection.budget(GRID, ratio))
  return set(np.asarray(kept).tolist())


@jax.jit
def score(params, x, positions, video_rows):
  return POLICY.apply({"params": params}, x, positions, video_rows, GRID)


def test_float32_storage_selects_the_very_same_tokens(params, prompts):
  other = precision_overlap.stored(POLICY, params, np.float32)
  jax.tree.map(np.testing.assert_array_equal, other, params)
  found = precision_overlap.overlaps(POLICY, params, other, prompts, RATIOS)
  assert [row.ratio for row in found] == list(RATIOS)
  for row in found:
    assert row.kept == 3 * int(60 * row.ratio)
    assert (row.shared, row.identical, row.share) == (row.kept, 3, 1.0)


def test_half_precision_storage_rounds_and_is_stable(params, prompts):
  once = precision_overlap.stored(POLICY, params, ml_dtypes.bfloat16)
  jax.tree.map(
    lambda leaf, rounded: np.testing.assert_array_equal(
      rounded, leaf.astype(jnp.bfloat16).astype(jnp.float32)
    ),
    params,
    once,
  )
  # A policy that was stored in half precision moves between types unharmed.
  for dtype in (ml_dtypes.bfloat16, np.float32):
    again = precision_overlap.stored(POLICY, once, dtype)
    jax.tree.map(np.testing.assert_array_equal, again, once)
  found = precision_overlap.overlaps(POLICY, params, once, prompts, RATIOS)
  for row in found:
    assert 0.5 < row.share <= 1
    # Counted by hand.
    shared = identical = 0
    for prompt in prompts:
      ours, theirs = (chosen(p, prompt, row.ratio) for p in (params, once))
      shared += len(ours & theirs)
      identical += ours == theirs
    assert (row.shared, row.identical) == (shared, identical)


def test_another_policy_does_not_overlap_in_full(params, prompts):
  other = jax.tree.map(lambda leaf: -leaf, params)
  found = precision_overlap.overlaps(POLICY, params, other, prompts, RATIOS)
  assert all(row.share < 1 and row.identical == 0 for row in found)


def test_prints_a_row_per_type_and_ratio(tmp_path, capsys):
  directory = tiny.write_checkpoint(tmp_path / "model")
  policy = tiny.write_policy(tmp_path / "policy", checkpoints.load(directory))
  commands.run(
    precision_overlap,
    model=directory,
    policy=policy,
    ratios=[0.25, 0.5],
    num_videos=2,
    num_frames=3,
  )
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  rows = {tuple(row[:2]): row[2:] for row in rows if len(row) > 4}
  # 3 frames of 4 x 4 tokens, two videos.
  for dtype in ("float32", "bfloat16", "float16"):
    assert rows[dtype, "0.25"][0] == "24"
    assert rows[dtype, "0.50"][0] == "48"
  for ratio in ("0.25", "0.50"):
    assert rows["float32", ratio][1:4] == ["100.00%", "2", "of"]


def test_videos_of_qwen_are_drawn_on_its_grid(monkeypatch):
  tiny_processor = processors.Qwen2_5VLProcessor.tiny()
  monkeypatch.setattr(qwen2_5_vl.Qwen2_5VLModel, "processor", tiny_processor)
  model = qwen2_5_vl.Qwen2_5VLModel(qwen2_5_vl.Qwen2_5VLConfig.tiny())
  params = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.01, np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  x, positions, video_rows, grid = precision_overlap.draw_prompt(
    model, params, np.random.default_rng(0), num_frames=4
  )
  # Square frames, of at most 24 tokens.
  assert grid == (2, 4, 4) and len(video_rows) == 32
  assert positions.shape == (3, len(x))


@pytest.mark.parametrize(
  "flags,message",
  [
    (dict(), "add --policy"),
    (dict(policy="x", ratios="a"), "--ratios=a"),
    (dict(policy="x", ratios="2"), "above 0 and at most 1"),
    (dict(policy="nowhere"), "no policy in nowhere"),
  ],
)
def test_mistakes_are_named(flags, message):
  with pytest.raises(errors.UserError, match=message):
    commands.run(precision_overlap, **flags)
