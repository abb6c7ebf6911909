"""Many devices compute what one does; on eight virtual CPU devices.

The gradient is compared before AdamW, which would hide a wrong factor.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.extend import core
from jax.sharding import PartitionSpec as P

from cacovid_jax import errors
from cacovid_jax.models import layers
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.training import programs, rollout, step
from tests.training import tiny

VIDEOS = 8


def gradient(config, state, constants, batch):
  """Returns one iteration's averaged gradient, on one device's share."""
  videos, memory = step.prepare_videos(config, state, constants, batch)
  answers, masks, memory = step.rollout(
    config, constants, videos, memory, max_rung=0
  )
  target = rollout.Target(
    videos.answer_id, videos.option_ids, constants.letters
  )
  rewards = rollout.reward(config.rollout, answers, target)
  memory = jax.vmap(step.replay.append)(memory, masks, rewards)
  # Away from the point where the policy equals the old one.
  moved = jax.tree.map(lambda p: p * 1.1, state.params)
  return step.gradients(config, moved, videos, memory)[0]


def mapped(config, data, model=1, how="shard_map"):
  """Returns the gradient function over `data` devices, as the trainer maps."""
  mesh = tiny.mesh(data, model)
  function = mesh_lib.map_over_data(
    functools.partial(gradient, config),
    mesh,
    (P(), P(), P("data")),
    P(),
    how=how,
  )
  return mesh, jax.jit(function)


@pytest.fixture(scope="module")
def reference():
  config = tiny.step_config(reward="margin")
  arguments = tiny.state(config), tiny.constants(config), tiny.batch(VIDEOS)
  _, function = mapped(config, 1)
  return config, arguments, jax.device_get(function(*arguments))


def assert_close(got, expected, rtol=1e-5):
  """Within rtol; entries that cancel to almost nothing, of the largest one."""
  expected_leaves = jax.tree.leaves(expected)
  scale = max(np.abs(leaf).max() for leaf in expected_leaves)
  for a, b in zip(jax.tree.leaves(got), expected_leaves, strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)


def test_gradient_on_eight_devices_is_that_of_one(reference):
  config, arguments, expected = reference
  assert max(np.abs(g).max() for g in jax.tree.leaves(expected)) > 1e-4
  _, function = mapped(config, 8)
  assert_close(jax.device_get(function(*arguments)), expected)


class WithFrozenHead(tiny.Policy):
  """The tiny policy beside the head that is never trained."""

  @nn.compact
  def __call__(self, x, positions, video_rows, grid, length):
    scores = super().__call__(x, positions, video_rows, grid, length)
    extra = nn.Dense(3, name="mode_selection")(x.mean(axis=0))
    # Even where a policy reads it.
    return scores._replace(frame=scores.frame + extra.mean())


def _sent(jaxpr):
  """Returns [numbers of each sum over `data`], inner programs included."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name.startswith("psum") and "data" in eqn.params["axes"]:
      found.append(sum(var.aval.size for var in eqn.invars))
    for inner in core.jaxprs_in_params(eqn.params):
      found += _sent(inner)
  return found


def test_devices_send_each_other_trained_parameters_only():
  config = tiny.step_config(reward="margin")  # Which differs between rows.
  config = dataclasses.replace(config, policy=WithFrozenHead())
  state = tiny.state(config)
  frozen = state.params["mode_selection"]
  size = optax.tree.size(state.params) - optax.tree.size(frozen)
  _, function = mapped(config, 2)
  arguments = state, tiny.constants(config), tiny.batch(2)
  jaxpr = jax.make_jaxpr(function)(*arguments)
  sent, metrics = sum(_sent(jaxpr.jaxpr)), 20  # Scalars, at most.
  assert size <= sent <= size + metrics < size + optax.tree.size(frozen)
  found = function(*arguments)
  assert not any(map(np.any, jax.tree.leaves(found["mode_selection"])))
  assert all(map(np.any, jax.tree.leaves(found["token"])))


def twenty_steps():
  """Returns (config, batches): of the tests that share compiled programs."""
  config = tiny.step_config(reward="margin", iterations=1, learning_rate=1e-3)
  return config, [tiny.batch(VIDEOS, seed=i) for i in range(20)]


def test_pmap_gives_the_bytes_of_shard_map():
  config, batches = twenty_steps()
  runs = [
    tiny.run(config, batches[:2], data=8, map_with=how)[1:]
    for how in ("shard_map", "pmap")
  ]
  leaves = [jax.tree.leaves(jax.device_get(run)) for run in runs]
  for one, other in zip(*leaves, strict=True):
    np.testing.assert_array_equal(one, other)


def test_pmap_runs_every_program_of_an_adaptive_ratio():
  config = tiny.step_config(fixed=None, rungs=(0.125, 0.25), iterations=1)
  batches = [tiny.batch(4, ladder=config.ladder)]
  made = tiny.programs_of(config, 2, "pmap", 1)
  given = tiny.state(config), tiny.constants(config)
  placed = (mesh_lib.put(x, made.mesh, programs.ONE) for x in given)
  made.compile_ahead(*placed, batches)
  names = {"prepare_videos", "iterate_0"}
  assert {name for _, name in made.compile_seconds} == names
  runs = [
    tiny.run(config, batches, data=2, map_with=how)
    for how in ("shard_map", "pmap")
  ]
  assert runs[1][0] is made and len(made.compile_seconds) == 2
  leaves = [jax.tree.leaves(jax.device_get(run[1:])) for run in runs]
  for one, other in zip(*leaves, strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  ("how", "model", "message"),
  [
    ("vmap", 1, "one of shard_map, pmap"),
    ("pmap", 2, "cannot split the base model .mesh.model=2."),
  ],
)
def test_a_map_that_does_not_fit_the_mesh_is_one_line(how, model, message):
  config = tiny.config(**{"mesh.map": how, "mesh.model": model})
  with pytest.raises(errors.UserError, match=message) as raised:
    assert tiny.experiment_of(config).mesh
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", ["stacked", "separate", "fused"])
def test_base_weights_split_over_the_model_axis_change_nothing(reference, form):
  config, (state, constants, batch), expected = reference
  mesh, function = mapped(config, 2, 2)
  params = layers.convert(constants.params, form)
  split = constants.replace(params=mesh_lib.shard_base_params(params, mesh))
  stack = split.params["language_model"]["layers"]
  own = stack.get("0", stack)
  name = "gate_up_proj" if form == "fused" else "gate_proj"
  assert own[name]["kernel"].sharding.spec[-1] == "model"
  got = function(
    mesh_lib.put(state, mesh, programs.ONE),
    split,
    programs.place_batch(batch, mesh),
  )
  assert_close(jax.device_get(got), expected, rtol=1e-4)


def test_parameters_after_twenty_steps_agree():
  config, batches = twenty_steps()
  _, one, outs_one = tiny.run(config, batches)
  _, many, outs_many = tiny.run(config, batches, data=8)
  assert int(many.step) == 20
  for (ids, rewards, _), (ids_many, rewards_many, _) in zip(
    outs_one, outs_many, strict=True
  ):
    np.testing.assert_array_equal(ids, ids_many)
    np.testing.assert_allclose(rewards, rewards_many, rtol=1e-3, atol=1e-4)
  assert_close(jax.device_get(many.params), jax.device_get(one.params))
