"""What the policy has beyond the paper's: it reads the ratio, and changes."""

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
# By the names of `network.OWN`.
CONFIGS = {
  "budget": dataclasses.replace(PLAIN, budget_embedding=2),
  "frame_residual": dataclasses.replace(PLAIN, frame_residual=True),
}
BUCKET = token_grid.GridBucket(3, 9, 20)
each_map = pytest.mark.parametrize("own", CONFIGS)
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
  return make(CONFIGS["budget"])


@pytest.fixture(scope="module")
def residual():
  """Returns a policy whose map of changes is not zero, and its parameters."""
  policy, params = make(CONFIGS["frame_residual"])
  return policy, moved(params, "frame_residual")


def moved(params, own):
  shape = params[own]["kernel"].shape
  kernel = np.random.default_rng(3).normal(size=shape).astype(np.float32)
  return params | {own: {"kernel": jnp.asarray(kernel)}}


@functools.partial(jax.jit, static_argnums=0)
def score(policy, params, ratio, prompt=PROMPT, grid=None):
  grid = token_grid.TokenGrid.of(GRID) if grid is None else grid
  return network.score(policy, params, prompt, grid, ratio)


def same(a, b):
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


@each_map
def test_untrained_it_is_the_plain_policy_bit_for_bit(plain, own):
  policy, params = make(CONFIGS[own])
  others = {name: leaf for name, leaf in params.items() if name != own}
  assert same(others, plain[1])
  assert not params[own]["kernel"].any()
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


@each_map
def test_its_file_says_what_it_is(plain, own, tmp_path):
  policy, untrained = make(CONFIGS[own])
  params = moved(untrained, own)
  path = tmp_path / "policy.safetensors"
  loading.save(path, policy, params)
  assert same(loading.load(path, policy), params)
  sizes = {"num_halvings": PLAIN.num_halvings}
  assert (
    network.PolicyConfig(llm=PLAIN.llm, **loading._sizes(path)) == CONFIGS[own]
  )
  with pytest.raises(errors.UserError, match=f"not known .*{own}.weight$"):
    loading.load(path, plain[0])
  # Of a plain file nothing is made up, but where training starts from it.
  loading.save(path, *plain)
  assert loading._sizes(path) == sizes
  with pytest.raises(errors.UserError, match=f"missing .*{own}.weight$"):
    loading.load(path, policy)
  assert same(loading.load(path, policy, params), untrained)


def test_a_policy_may_have_all_of_them(tmp_path):
  config = dataclasses.replace(CONFIGS["budget"], frame_residual=True)
  policy, params = make(config)
  path = tmp_path / "policy.safetensors"
  loading.save(path, policy, params)
  assert config.own == tuple(network.OWN)
  assert same(loading.load(path, policy), params)


# What changes from frame to frame.


def test_frames_read_changes_against_a_loop(plain, residual):
  """The map of changes and the frame head, in NumPy."""
  policy, params = residual
  given = PROMPT.x, PROMPT.positions, None
  h = policy.apply({"params": params}, *given, method="_encode")
  v = np.asarray(h, np.float64)[PROMPT.video_rows].reshape(2, 6, -1)
  scale = np.asarray(params["layernorm"]["scale"], np.float64)

  def normed(x):
    square = (x**2).mean(axis=-1, keepdims=True)
    return x / np.sqrt(square + PLAIN.llm.rms_norm_eps) * scale

  frames = normed(v.mean(axis=1))
  change = sum(abs(normed(v[1, a]) - normed(v[0, a])) for a in range(6)) / 6
  frames[1] += change @ np.asarray(params["frame_residual"]["kernel"])
  for name, part in sorted(params["frame_compress"].items()):
    frames = frames @ np.asarray(part["kernel"]) + np.asarray(part["bias"])
    if name != "score":
      frames = frames / (1 + np.exp(-frames))
  found, before = score(policy, params, 0.1), score(*plain, 0.1)
  np.testing.assert_allclose(found.frame, frames, rtol=1e-4, atol=1e-4)
  # The first frame has none before it, and tokens do not read them.
  assert same(found.token, before.token)
  assert same(found.frame[0], before.frame[0])
  assert not np.allclose(found.frame[1], before.frame[1], atol=0.01)


def test_changes_are_learnt_from_zero():
  policy, params = make(CONFIGS["frame_residual"])

  def first(params):
    return score(policy, params, 0.1).frame[0, 1]

  def second(params):
    return score(policy, params, 0.1).frame[1, 1]

  kernels = [
    jax.grad(x)(params)["frame_residual"]["kernel"] for x in (first, second)
  ]
  assert not np.any(kernels[0]) and np.any(kernels[1])


def test_changes_in_a_bucket_are_those_of_the_clip_alone(residual):
  """Values and gradients; H and W are data, rows behind the clip anything."""
  policy, params = residual
  rows = np.append(PROMPT.video_rows, np.full(8, LENGTH))
  padded = PROMPT._replace(video_rows=rows)

  def total(params, *given):
    frame = score(policy, params, 0.1, *given).frame
    return (frame[:2] * jnp.arange(4.0).reshape(2, 2)).sum(), frame

  step = jax.value_and_grad(total, has_aux=True)
  placed = token_grid.TokenGrid.of(GRID, BUCKET)
  ((_, found), grads) = step(params, padded, placed)
  ((_, alone), expected) = step(params)
  np.testing.assert_allclose(found[:2], alone, rtol=1e-5, atol=1e-6)
  assert not np.any(found[2:])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, grads, expected)


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
