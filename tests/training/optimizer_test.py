"""Rates, decay and clipping by parameter name, on hand-made trees."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cacovid_jax import errors
from cacovid_jax.policy import network
from cacovid_jax.training import optimizer


def params():
  return {
    "layer": {
      "q_proj": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
      "input_layernorm": {"scale": jnp.ones(2)},
    },
    "layernorm": {"scale": jnp.ones(2)},
    "token_compress": {"score": {"kernel": jnp.ones((2, 2))}},
    "mode_selection": {"score": {"kernel": jnp.ones((2, 2))}},
    "my_own_head": {"kernel": jnp.ones((2, 2))},
  }


def updates(config, grads, total_steps=10):
  tx = optimizer.make(config, total_steps)
  return tx.update(grads, tx.init(params()), params())[0]


def test_rates_by_top_level_name():
  got = optimizer.labels(params())
  assert got["layer"]["q_proj"]["kernel"] == "layer"
  assert got["layer"]["input_layernorm"]["scale"] == "layer"
  assert got["layernorm"]["scale"] == "heads"
  assert got["token_compress"]["score"]["kernel"] == "heads"
  assert got["my_own_head"]["kernel"] == "heads"
  assert got["mode_selection"]["score"]["kernel"] == "frozen"


def test_norms_and_biases_do_not_decay():
  got = optimizer.decay_mask(params())
  assert got["layer"]["q_proj"] == {"kernel": True, "bias": False}
  assert not got["layer"]["input_layernorm"]["scale"]
  assert not got["layernorm"]["scale"]
  # Stacked over layers a norm has two axes.
  stacked = {"layers": {"post_norm": {"scale": jnp.ones((3, 2))}}}
  assert not optimizer.decay_mask(stacked)["layers"]["post_norm"]["scale"]


def test_every_parameter_of_the_papers_policy_is_placed():
  shapes = network.shapes(network.PolicyConfig.tiny())
  tree = {name: jnp.zeros(shape) for name, shape in shapes.items()}
  decays = optimizer.decay_mask(tree)
  for name, decay in decays.items():
    assert decay == name.endswith("kernel"), name
  places = optimizer.labels(tree)
  assert sorted(set(places.values())) == ["frozen", "heads", "layer"]
  assert all(
    (label == "layer") == name.startswith("layer/")
    for name, label in places.items()
  )


def test_layer_moves_at_its_own_rate_and_frozen_not_at_all():
  config = optimizer.OptimizerConfig(
    lr_heads=1e-2, lr_layer=1e-3, weight_decay=0.0
  )
  got = updates(config, params())
  # Adam's first update is the rate itself, whatever the gradient.
  np.testing.assert_allclose(got["layer"]["q_proj"]["kernel"], -1e-3, rtol=1e-4)
  np.testing.assert_allclose(
    got["token_compress"]["score"]["kernel"], -1e-2, rtol=1e-4
  )
  assert not got["mode_selection"]["score"]["kernel"].any()


def test_frozen_parameters_have_no_moments():
  tx = optimizer.make(optimizer.OptimizerConfig(), 10)
  names = {
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tx.init(params()))
  }
  assert not any("mode_selection" in name for name in names)


def test_decay_is_scaled_by_the_rate():
  config = optimizer.OptimizerConfig(
    lr_heads=1e-2, lr_layer=1e-3, weight_decay=0.5
  )
  got = updates(config, jax.tree.map(jnp.zeros_like, params()))
  np.testing.assert_allclose(got["my_own_head"]["kernel"], -0.5e-2, rtol=1e-5)
  np.testing.assert_allclose(
    got["layer"]["q_proj"]["kernel"], -0.5e-3, rtol=1e-5
  )
  assert not got["layer"]["q_proj"]["bias"].any()


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
def test_the_average_is_that_of_a_loop(decay):
  rates = {"lr_heads": 1e-2, "lr_layer": 1e-3}
  plain = optimizer.make(optimizer.OptimizerConfig(**rates), 10)
  config = optimizer.OptimizerConfig(**rates, average=decay)
  averaging = optimizer.make(config, 10)
  close = functools.partial(chex.assert_trees_all_close, rtol=1e-5)
  now = jax.tree.map(lambda p: p / 3, params())
  state, plain_state = averaging.init(now), plain.init(now)
  assert_equal(state.average, now)
  total, weight = jax.tree.map(np.zeros_like, now), 0.0
  for seed in range(6):
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda p, r=rng: r.normal(size=p.shape), now)
    step, state = jax.jit(averaging.update)(grads, state, now)
    plain_step, plain_state = jax.jit(plain.update)(grads, plain_state, now)
    # Up to rounding: another program may add in another order.
    close((step, state.inner), (plain_step, plain_state), atol=1e-6)
    now = optax.apply_updates(now, step)
    total = jax.tree.map(
      lambda old, p: decay * old + np.asarray(p, np.float64), total, now
    )
    weight = decay * weight + 1
    expected = jax.tree.map(lambda x, w=weight: x / w, total)
    close(state.average, expected)
  # What is frozen keeps every bit.
  assert_equal(state.average["mode_selection"], now["mode_selection"])


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_gradient_norm_is_clipped_over_all_groups():
  clip = optax.clip_by_global_norm(5.0)
  grads = jax.tree.map(lambda p: 100 * p, params())
  clipped, _ = clip.update(grads, clip.init(params()))
  tx = optimizer.make(optimizer.OptimizerConfig(clip=5.0), 10)
  _, state = tx.update(grads, tx.init(params()), params())
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if ".mu" in jax.tree_util.keystr(path)
    and "my_own_head" in jax.tree_util.keystr(path)
  ]
  np.testing.assert_allclose(
    moments[0], 0.1 * clipped["my_own_head"]["kernel"], rtol=1e-5
  )


def test_cosine_falls_to_zero_behind_a_warm_up():
  config = optimizer.OptimizerConfig(warmup=2)
  rate = optimizer.schedule(1.0, config, 10)
  np.testing.assert_allclose(
    [rate(i) for i in (0, 1, 2, 6, 10)], [0, 0.5, 1, 0.5, 0], atol=1e-6
  )
  plain = optimizer.schedule(1.0, optimizer.OptimizerConfig(), 10)
  np.testing.assert_allclose(
    [plain(i) for i in (0, 5, 10)], [1, 0.5, 0], atol=1e-6
  )


def test_the_repeated_cosine_is_zero_at_a_fifth_of_the_run_and_full_at_two():
  config = optimizer.OptimizerConfig(schedule="cosine_repeated")
  # Ten videos of five iterations; the horizon counts videos.
  rate = optimizer.schedule(2.0, config, 50, 5)
  found = [float(rate(step)) for step in (0, 5, 10, 20, 25, 30, 40, 50)]
  np.testing.assert_allclose(found, [2, 1, 0, 2, 1, 0, 2, 0], atol=1e-6)
  warm = dataclasses.replace(config, warmup=2)
  rate = optimizer.schedule(2.0, warm, 50, 5)
  found = [float(rate(step)) for step in (0, 1, 2, 6, 10, 18)]
  np.testing.assert_allclose(found, [0, 1, 2, 1, 0, 2], atol=1e-6)
  once = optimizer.schedule(2.0, config, 10)
  plain = optimizer.schedule(2.0, optimizer.OptimizerConfig(), 10)
  for step in range(11):
    np.testing.assert_allclose(once(step), plain(step), atol=1e-6)


@pytest.mark.parametrize("changes", [{"lr_heads": -1.0}, {"clip": 0.0}])
def test_mistakes_are_named(changes):
  with pytest.raises(errors.UserError, match="optimizer."):
    optimizer.OptimizerConfig(**changes)
