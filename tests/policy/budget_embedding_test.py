"""One policy for all budgets: what the ratio changes, and what it does not."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from cacovid_jax import errors
from cacovid_jax.models import prompt_batch, token_grid
from cacovid_jax.policy import loading, network
from tests.policy import bilinear_policy

GRID = (2, 2, 3)
LENGTH = 16
PLAIN = network.PolicyConfig.tiny()
CONFIG = dataclasses.replace(PLAIN, budget_embedding=2)
PROMPT = prompt_batch.PromptBatch(
  x=np.random.default_rng(1).normal(size=(LENGTH, 32)).astype(np.float32),
  positions=np.arange(LENGTH, dtype=np.int32)[None],
  lengths=np.int32(LENGTH),
  video_rows=np.arange(2, 14),
  next_position=np.int32(LENGTH),
)


def make(config):
  """Returns a policy and its first parameters, of a random layer."""
  shapes = network.shapes(config).items()
  layer = {k[6:]: s for k, s in shapes if k.startswith("layer/")}
  rng = np.random.default_rng(7)
  layer = {name: rng.normal(size=(1, *s)) / 6 for name, s in layer.items()}
  layers = traverse_util.unflatten_dict(layer, sep="/")
  policy = network.Policy(config)
  return policy, policy.init_from_llm(jax.random.key(0), {"layers": layers})


@pytest.fixture(scope="module")
def plain():
  return make(PLAIN)


@pytest.fixture(scope="module")
def conditioned():
  return make(CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def score(policy, params, ratio):
  grid = token_grid.TokenGrid.of(GRID)
  return network.score(policy, params, PROMPT, grid, ratio)


def same(a, b):
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_untrained_it_is_the_plain_policy_bit_for_bit(plain, conditioned):
  policy, params = conditioned
  others = {name: leaf for name, leaf in params.items() if name != "budget"}
  assert same(others, plain[1])
  assert not params["budget"]["kernel"].any()
  for ratio in (0.01, 0.25, 1.0):
    assert same(score(policy, params, ratio), score(*plain, ratio))


def test_after_an_update_scores_follow_the_ratio(conditioned):
  policy, params = conditioned

  def total(params):
    return score(policy, params, 0.1).token[:, 1].sum()

  grads = jax.grad(total)(params)
  assert np.any(grads["budget"]["kernel"])
  moved = jax.tree.map(lambda p, g: p + 0.1 * g, params, grads)
  found = [score(policy, moved, ratio) for ratio in (0.1, 0.1, 0.05)]
  assert same(found[0], found[1]) and not same(found[0], found[2])
  for part in ("token", "frame"):
    assert not same(*[getattr(x, part) for x in found[1:]])


def test_features_are_waves_of_the_octaves():
  # 0.25 lies two octaves below 1: an eighth and a quarter of a period.
  eighth, quarter = -2 * math.pi / 8, -2 * math.pi / 4
  expected = [
    *map(math.sin, (eighth, quarter)),
    *map(math.cos, (eighth, quarter)),
  ]
  found = network.ratio_features(0.25, 2)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_reader_that_passes_no_ratio_is_told(conditioned):
  policy, params = conditioned
  with pytest.raises(errors.UserError, match="none was given; pass ratio"):
    given = PROMPT.x, PROMPT.positions, PROMPT.video_rows, GRID
    policy.apply({"params": params}, *given)


def test_its_file_says_what_it_is(plain, conditioned, tmp_path):
  policy, params = conditioned
  kernel = jnp.arange(params["budget"]["kernel"].size, dtype=jnp.float32)
  kernel = kernel.reshape(params["budget"]["kernel"].shape)
  params = params | {"budget": {"kernel": kernel}}
  path = tmp_path / "policy.safetensors"
  loading.save(path, policy, params)
  assert same(loading.load(path, policy), params)
  sizes = {"num_halvings": PLAIN.num_halvings}
  assert loading._sizes(path) == sizes | {"budget_embedding": 2}
  with pytest.raises(errors.UserError, match="not known .*budget.weight"):
    loading.load(path, plain[0])
  # Of a plain file nothing is made up, but where training starts from it.
  loading.save(path, *plain)
  assert loading._sizes(path) == sizes
  with pytest.raises(errors.UserError, match="missing .*budget.weight"):
    loading.load(path, policy)
  assert same(loading.load(path, policy, params), conditioned[1])


class Scaled(bilinear_policy.Bilinear):
  """A policy of one's own that reads the ratio."""

  @nn.compact
  def __call__(self, x, positions, video_rows, grid, length=None, *, ratio):
    scores = super().__call__(x, positions, video_rows, grid, length)
    return jax.tree.map(lambda leaf: leaf * ratio, scores)

  @nn.nowrap
  def init_from_llm(self, rng, llm_params):
    return bilinear_policy.Bilinear(self.width, self.rank).init_from_llm(
      rng, llm_params
    )


def test_modules_of_ones_own_get_the_ratio_if_they_declare_it():
  without = bilinear_policy.Bilinear(32, 4)
  params = without.init_from_llm(jax.random.key(0), {})
  reads = Scaled(32, 4)
  assert network.reads_ratio(reads) and not network.reads_ratio(without)
  half, whole = (score(reads, params, ratio) for ratio in (0.5, 1.0))
  assert same(whole, score(without, params, 0.5))
  assert same(jax.tree.map(lambda leaf: 2 * leaf, half), whole)


def test_a_ratio_outside_the_trained_ones_is_warned_of_once(
  plain, conditioned, caplog
):
  policy = loading.LoadedPolicy.of(*conditioned, ratios=(0.05, 0.1))
  for ratio in (0.05, 0.07, 0.1, 0.25, 0.25):
    policy.check_ratio("ours", ratio)
  loading.LoadedPolicy.of(*plain, ratios=(0.05,)).check_ratio("old", 0.25)
  [record] = caplog.records
  assert record.getMessage() == (
    "policy 'ours' reads the ratio and was trained from 0.05 to 0.1: its scores"
    " at 0.25 are a guess"
  )
