"""The command that compares a policy's choices after storage."""

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, qwen2_5_vl
from experiments import policy_transfer
from tests.evals import tiny


def test_prints_a_row_per_type_and_ratio(tmp_path, capsys):
  directory = tiny.write_checkpoint(tmp_path / "model")
  policy = tiny.write_policy(tmp_path / "policy", checkpoints.load(directory))
  with flagsaver.flagsaver(
    base_model=directory,
    trained_policy=policy,
    keep_ratios=["0.25", "0.5"],
    num_videos=2,
    video_frames=3,
  ):
    policy_transfer.main(["policy_transfer"])
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  rows = {tuple(row[:2]): row[2:] for row in rows if len(row) > 4}
  # 3 frames of 4 x 4 tokens, two videos.
  for dtype in ("float32", "bfloat16", "float16"):
    assert rows[dtype, "0.25"][0] == "24"
    assert rows[dtype, "0.50"][0] == "48"
  for ratio in ("0.25", "0.50"):
    assert rows["float32", ratio][1:4] == ["100.00%", "2", "of"]


def test_videos_of_qwen_are_drawn_on_its_grid():
  model = qwen2_5_vl.Qwen2_5VLModel(qwen2_5_vl.Qwen2_5VLConfig.tiny())
  params = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.01, np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  prompt = policy_transfer.draw_prompt(
    model, params, np.random.default_rng(0), num_frames=4
  )
  assert prompt.grid == (2, 8, 8)
  assert len(prompt.video_rows) == 128
  assert prompt.positions.shape == (3, len(prompt.x))


@pytest.mark.parametrize(
  "flags,message",
  [
    (dict(trained_policy=None), "no policy given"),
    (dict(trained_policy="x", keep_ratios=["a"]), "--keep_ratios"),
    (dict(trained_policy="nowhere"), "no policy in nowhere"),
  ],
)
def test_mistakes_are_named(flags, message):
  with flagsaver.flagsaver(**flags):
    with pytest.raises(errors.UserError, match=message):
      policy_transfer.main(["policy_transfer"])
