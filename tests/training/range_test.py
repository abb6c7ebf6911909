"""Ratios drawn from a range, one for each video."""

import json

import jax
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.policy import loading, network, sampling
from cacovid_jax.training import ratio, run
from tests.training import tiny
from tests.training.loop_test import KilledError, assert_same

RUNGS = (0.0625, 0.125, 0.25)
CHANGES = {
  "ratio.rungs": RUNGS,
  "ratio.range": (0.1, 0.25),
  "policy.budget_embedding": 2,
  "total_steps": 4,
  "videos_per_step": 1,
  "ckpt.every_steps": 2,
}


def ladder(grid=tiny.GRID, **changes):
  given = dict(adaptive=False, rungs=RUNGS, range=(0.1, 0.25)) | changes
  sampler = sampling.SamplingConfig(num_combinations=8)
  return ratio.make_ladder(grid, sampler, ratio.RatioConfig(**given))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Four steps over a range; what each saw, and the experiment's metrics."""
  workdir, seen = tmp_path_factory.mktemp("range"), {}
  result = tiny.train(
    workdir,
    tiny.config(**CHANGES),
    on_step=lambda step, *given: seen.update({step: given}),
  )
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return workdir, result, seen, list(map(json.loads, lines))


def drawn(seed, step, question):
  """The rung of a video, as its definition has it."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  key = jax.random.fold_in(key, question)
  return jax.random.randint(jax.random.fold_in(key, 2**32 - 1), (), 0, 2)


def test_each_video_has_a_ratio_of_the_range(whole):
  workdir, result, seen, lines = whole
  assert result.run.config.ladder.ratios == (0.125, 0.25)
  hashes = tiny.question_lib.question_hash
  for step, (questions, *_) in seen.items():
    rungs = [drawn(42, step - 1, hashes(q.id)) for q in questions]
    mean = np.mean([(0.125, 0.25)[rung] for rung in rungs])
    [line] = [line for line in lines if line["step"] == step]
    assert line["ratio"] == pytest.approx(mean)
  assert len({line["ratio"] for line in lines}) > 1
  made = result.run.programs
  assert len(made.compile_seconds) <= 2 + len(result.run.config.ladder)
  described = json.loads((workdir / "policy/policy_config.json").read_text())
  assert described["ratios"] == [0.125, 0.25]
  policy = loading.load_policy(workdir, tiny.checkpoint())
  assert policy.ratios == (0.125, 0.25) and network.reads_ratio(policy.module)
  assert np.any(policy.params["budget"]["kernel"])


def test_a_killed_run_goes_on_with_the_same_bits(whole, tmp_path):
  _, expected, before, _ = whole
  seen = {}

  def die(step, *given):
    seen[step] = given
    if step == 3:
      raise KilledError

  with pytest.raises(KilledError):
    tiny.train(tmp_path, tiny.config(**CHANGES), on_step=die)
  again = tiny.train(
    tmp_path,
    tiny.config(**CHANGES),
    on_step=lambda step, *given: seen.update({step: given}),
  )
  assert_same(again.state, expected.state)
  for step in before:
    assert_same(seen[step][1:], before[step][1:])


def test_rungs_are_drawn_evenly_and_never_left():
  made = ladder(range=(0.01, 1.0))
  rungs = made.rungs(tiny.GRID)
  keys = jax.random.split(jax.random.key(0), 3000)
  found = jax.vmap(lambda key: ratio.first_rung(made, rungs, key))(keys)
  shares = np.bincount(found, minlength=3) / 3000
  # Four standard deviations.
  np.testing.assert_allclose(shares, 1 / 3, atol=4 * (2 / 9 / 3000) ** 0.5)
  for rung in range(3):
    for reward in (0.0, 0.5, 1.0):
      assert ratio.next_rung(made, rungs, rung, reward) == rung
  assert made.within(0) == [0, 1, 2]


def test_in_a_bucket_a_place_stands_for_a_rung_that_fits():
  bucket = tiny.ratio.token_grid.GridBucket(4, 16, 64)
  made = ladder(bucket, rungs=(0.01, 0.0625, 0.25), range=(0.01, 0.25))
  rungs = made.rungs((4, 2, 2))  # A frame keeps one token of four, at least.
  for place in rungs.up:
    assert rungs.up[place] == place
    plan = jax.tree.map(lambda leaf, at=place: leaf[at], rungs.plans)
    assert plan.num_keep <= made.num_keep[place]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"adaptive": True}, "set config.ratio.adaptive=False, or leave"),
    ({"range": (0.3, 0.2)}, r"give \(low, high\)"),
    ({"range": (0.1,)}, r"give \(low, high\)"),
    ({"range": (0.3, 0.4)}, "holds none of ratio.rungs"),
    ({"range": (0.3, 2.0)}, r"range\[1\] is 2.0; it must be"),
  ],
)
def test_mistakes_are_named(changes, message):
  with pytest.raises(errors.UserError, match=message):
    ladder(**changes)


def test_an_adaptive_ratio_and_a_policy_that_reads_it_are_refused():
  config = tiny.config(
    **{
      "ratio.adaptive": True,
      "ratio.rungs": RUNGS,
      "ratio.start": 0.125,
      "rollout.reward": "accuracy",
      "policy.budget_embedding": 2,
    }
  )
  with pytest.raises(errors.UserError, match="moves it between the iterations"):
    run.Run(tiny.experiment_of(config, checkpoint=tiny.checkpoint()),
            questions=tiny.questions(), store=tiny.Store())  # fmt: skip
