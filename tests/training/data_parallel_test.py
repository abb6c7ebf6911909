"""Many devices compute what one does; on eight virtual CPU devices.

The gradient is compared before AdamW, which would hide a wrong factor.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.training import programs, step
from tests.training import tiny

VIDEOS = 8


def gradient(recipe, state, frozen, batch):
  """Returns one iteration's averaged gradient, on one device's share."""
  videos, memory = step.begin(recipe, state, frozen, batch)
  answers, masks = step.roll_out(recipe, frozen, videos, memory, largest=0)
  rewards = step.rollout.reward(
    recipe.rollout,
    answers,
    videos.answer_id,
    videos.option_ids,
    frozen.letters,
  )
  memory = jax.vmap(step.replay.append)(memory, masks, rewards)
  # Away from the point where the policy equals the old one.
  moved = jax.tree.map(lambda p: p * 1.1, state.params)
  return step.gradients(recipe, moved, videos, memory)[0]


def mapped(recipe, data, model=1):
  """Returns the gradient function over `data` devices, as the trainer maps."""
  mesh = tiny.mesh(data, model)
  return mesh, jax.jit(
    jax.shard_map(
      functools.partial(gradient, recipe),
      mesh=mesh,
      in_specs=(P(), P(), P("data")),
      out_specs=P(),
      axis_names={"data"} if model > 1 else {"data", "model"},
      check_vma=False,
    )
  )


@pytest.fixture(scope="module")
def reference():
  recipe = tiny.recipe(reward="margin")
  arguments = tiny.state(recipe), tiny.frozen(recipe), tiny.batch(VIDEOS)
  _, function = mapped(recipe, 1)
  return recipe, arguments, jax.device_get(function(*arguments))


def assert_close(got, expected, rtol=1e-5):
  """Within rtol; entries that cancel to almost nothing, of the largest one."""
  expected_leaves = jax.tree.leaves(expected)
  scale = max(np.abs(leaf).max() for leaf in expected_leaves)
  for a, b in zip(jax.tree.leaves(got), expected_leaves, strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)


def test_gradient_on_eight_devices_is_that_of_one(reference):
  recipe, arguments, expected = reference
  assert max(np.abs(g).max() for g in jax.tree.leaves(expected)) > 1e-4
  _, function = mapped(recipe, 8)
  assert_close(jax.device_get(function(*arguments)), expected)


def test_pmap_of_the_same_function_gives_the_same_gradient(reference):
  recipe, (state, frozen, batch), expected = reference
  devices = 4
  split = jax.tree.map(
    lambda a: a.reshape(devices, VIDEOS // devices, *a.shape[1:]), batch
  )
  function = jax.pmap(
    functools.partial(gradient, recipe),
    axis_name="data",
    in_axes=(None, None, 0),
    devices=jax.devices()[:devices],
  )
  got = jax.device_get(function(state, frozen, split))
  for device in range(devices):
    assert_close(jax.tree.map(lambda a: a[device], got), expected)  # noqa: B023


def test_base_weights_split_over_the_model_axis_change_nothing(reference):
  recipe, (state, frozen, batch), expected = reference
  mesh, function = mapped(recipe, 2, 2)
  split = frozen.replace(params=mesh_lib.shard_base_params(frozen.params, mesh))
  kernels = split.params["language_model"]["layers"]["gate_proj"]["kernel"]
  assert kernels.sharding.spec == P(None, None, "model")
  got = function(
    mesh_lib.put(state, mesh, programs.ONE),
    split,
    programs.place_batch(batch, mesh),
  )
  assert_close(jax.device_get(got), expected, rtol=1e-4)


def test_parameters_after_twenty_steps_agree():
  recipe = tiny.recipe(reward="margin", iterations=1, learning_rate=1e-3)
  batches = [tiny.batch(VIDEOS, seed=i) for i in range(20)]
  _, one, outs_one = tiny.run(recipe, batches)
  _, many, outs_many = tiny.run(recipe, batches, data=4)
  assert int(many.step) == 20
  for (ids, rewards, _), (ids_many, rewards_many, _) in zip(
    outs_one, outs_many, strict=True
  ):
    np.testing.assert_array_equal(ids, ids_many)
    np.testing.assert_allclose(rewards, rewards_many, rtol=1e-3, atol=1e-4)
  assert_close(jax.device_get(many.params), jax.device_get(one.params))
