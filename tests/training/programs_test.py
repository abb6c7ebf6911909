"""Which programs a run compiles, what they return, and what they compute."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.models import token_grid
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.training import programs, step
from tests.training import tiny

BUCKET = token_grid.TokenGrid.of(tiny.GRID).bucket
SHAPE = programs.Shape(BUCKET, tiny.LENGTH)
_COMPILED = "/jax/core/compile/backend_compile_duration"
_events = []
jax.monitoring.register_event_duration_secs_listener(
  lambda name, *_, **__: _events.append(name)
)


@contextlib.contextmanager
def compilations():
  """Collects the compilations of any program, small ones included."""
  found, before = [], len(_events)
  yield found
  found += [name for name in _events[before:] if name == _COMPILED]


def names(made):
  return sorted(name for _, name in made.compile_seconds)


def held(config):
  mesh = tiny.mesh()
  return (
    mesh,
    mesh_lib.put(tiny.state(config), mesh, programs.ONE),
    mesh_lib.put(tiny.constants(config), mesh, programs.ONE),
  )


def steps(made, state, constants, batches, reward=None):
  outs = []
  for batch in batches:
    placed = programs.place_batch(batch, made.mesh)
    with jax.transfer_guard("disallow"):
      state, *out = made.run(state, constants, placed, reward)
    outs.append(jax.device_get(out))
  return state, outs


@pytest.fixture(scope="module")
def fixed():
  """A fixed ratio with device rewards, after two steps."""
  config = tiny.step_config(reward="margin")
  mesh, state, constants = held(config)
  made = programs.TrainingPrograms([config], mesh)
  before = jax.device_get(state)
  state, outs = steps(made, state, constants, [tiny.batch()])
  with compilations() as found:
    state, more = steps(made, state, constants, [tiny.batch(seed=1)])
  return config, made, constants, before, state, outs + more, found


def test_fixed_ratio_is_one_program_compiled_once(fixed):
  _, made, *_, found = fixed
  assert list(made.compile_seconds) == [(SHAPE, "fixed_ratio_step")]
  assert made.limit(SHAPE.bucket) == 1
  assert not found


def test_a_step_learns_from_all_iterations(fixed):
  config, _, _, before, state, outs, _ = fixed
  assert int(state.step) == 2
  ids, rewards, metrics = outs[-1]
  assert ids.shape == (2, config.iterations, 8, 1)
  assert rewards.shape == (2, config.iterations, 8)
  assert set(metrics.per_video) == {"finite", "rung", "next_rung"}
  assert metrics.mean["gradient_norm"].shape == (config.iterations,)
  assert (metrics.mean["gradient_norm"] > 0).all()
  counts = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if mesh_lib.path_name(path).endswith("count")
  ]
  assert {int(count) for count in counts} == {2 * config.iterations}
  old, new = before.params["token"], state.params["token"]
  assert np.abs(old["kernel"] - new["kernel"]).max() > 0


def test_greedy_combination_is_the_same_in_all_iterations(fixed):
  rewards = fixed[5][0][1]
  np.testing.assert_allclose(rewards[:, 0, 0], rewards[:, 1, 0], rtol=1e-5)
  assert np.abs(rewards[:, 0, 1:5] - rewards[:, 1, 1:5]).max() > 1e-4


def test_decisive_frames_against_their_chance(fixed):
  metrics = fixed[5][0][2]
  decisive = tiny.batch().decisive_frames
  # One of four frames is drawn: the chance is the decisive share.
  known = decisive[decisive.any(axis=1)]
  np.testing.assert_allclose(
    metrics.mean["decisive_chance"], known.mean(axis=1).mean(), rtol=1e-5
  )
  assert set(np.unique(metrics.mean["decisive_frame"] * len(known))) <= {
    0.0,
    1.0,
    2.0,
  }


def test_program_has_no_callback_and_returns_what_it_says(fixed):
  config, made, constants, _, state, _, _ = fixed
  batch = programs.place_batch(tiny.batch(), made.mesh)
  jitted = made.jitted(BUCKET, "fixed_ratio_step")
  lowered = jitted.trace(state, constants, batch).lower()
  text = lowered.as_text()
  for word in ("callback", "infeed", "outfeed", "send", "recv"):
    assert f"@{word}" not in text and f"_{word}" not in text, word
  out = lowered.out_info
  assert jax.tree.structure(out[0]) == jax.tree.structure(state)
  assert out[1].shape == (2, config.iterations, 8, 1)
  assert out[2].shape == (2, config.iterations, 8)
  assert len(out) == 4


def test_base_weights_are_arguments_not_constants(fixed):
  _, made, constants, _, state, _, _ = fixed
  batch = programs.place_batch(tiny.batch(), made.mesh)
  jaxpr = (
    made.jitted(BUCKET, "fixed_ratio_step").trace(state, constants, batch).jaxpr
  )
  largest = max((np.size(c) for c in jaxpr.consts), default=0)
  assert largest < 1000


def test_a_full_grid_leaves_no_trace_of_a_mask(fixed, monkeypatch):
  _, made, constants, _, state, _, _ = fixed
  fill, traces = token_grid.fill, []

  def watched(x, valid, value):
    filled = fill(x, valid, value)
    traces.append(filled is not x)
    return filled

  monkeypatch.setattr(token_grid, "fill", watched)
  batch = programs.place_batch(tiny.batch(), made.mesh)
  made.jitted(BUCKET, "fixed_ratio_step").trace(state, constants, batch)
  assert len(traces) > 20 and not any(traces)


def test_step_lowers_for_tpu(fixed):
  _, made, constants, _, state, _, _ = fixed
  batch = programs.place_batch(tiny.batch(), made.mesh)
  traced = made.jitted(BUCKET, "fixed_ratio_step").trace(
    state, constants, batch
  )
  assert traced.lower(lowering_platforms=("tpu",)).as_text()


def test_another_shape_is_an_error_and_no_compilation(fixed):
  _, made, constants, _, state, _, _ = fixed
  placed = programs.place_batch(tiny.batch(videos=1), made.mesh)
  with compilations() as found, pytest.raises(TypeError):
    made.run(state, constants, placed)
  assert not found


def test_more_programs_than_allowed_is_an_error(fixed):
  _, made, constants, _, state, _, _ = fixed
  placed = programs.place_batch(tiny.batch(), made.mesh)
  with pytest.raises(RuntimeError, match="one more than"):
    made.call(SHAPE, "prepare_videos", state, constants, placed)


@pytest.fixture(scope="module")
def adaptive():
  """An adaptive ratio; no answer is right, so the ratio rises."""
  config = tiny.step_config(fixed=None, rungs=(0.125, 0.25), iterations=3)
  mesh, state, constants = held(config)
  constants = constants.replace(letters=constants.letters * 0 - 1)
  made = programs.TrainingPrograms([config], mesh)
  one, other = (tiny.batch(seed=i, ladder=config.ladder) for i in range(2))
  state, _ = steps(made, state, constants, [one])
  with compilations() as found:
    state, outs = steps(made, state, constants, [other])
  return config, made, constants, state, outs, found


def test_adaptive_ratio_has_one_program_per_rung(adaptive):
  config, made, *_, found = adaptive
  assert names(made) == ["iterate_0", "iterate_1", "prepare_videos"]
  assert len(made.compile_seconds) <= 2 + len(config.ladder)
  assert not found


def test_ratio_rises_when_no_answer_is_right(adaptive):
  _, _, _, state, outs, _ = adaptive
  ids, rewards, metrics = outs[0]
  np.testing.assert_array_equal(metrics.per_video["rung"], [[0, 1, 1]] * 2)
  np.testing.assert_allclose(metrics.mean["ratio"], [0.125, 0.25, 0.25])
  assert ids.shape == (2, 3, 8, 1) and not rewards.any()
  assert int(state.step) == 2
  # All rewards agree, so there is nothing to learn.
  assert not metrics.mean["gradient_norm"].any()


def test_all_rungs_are_compiled_before_the_first_step(adaptive, capsys):
  config = adaptive[0]
  _, state, constants = held(config)
  made = programs.TrainingPrograms([config], tiny.mesh())
  batch = tiny.batch(ladder=config.ladder)
  made.compile_ahead(state, constants, [jax.eval_shape(lambda: batch)])
  assert names(made) == ["iterate_0", "iterate_1", "prepare_videos"]
  assert "programs 3/3" in capsys.readouterr().err
  with compilations() as found:
    steps(made, state, constants, [batch])
  assert not found and len(made.compile_seconds) == 3


def test_a_rung_out_of_reach_is_not_compiled():
  config = tiny.step_config(fixed=None, rungs=(0.125, 0.25), iterations=1)
  _, state, constants = held(config)
  made = programs.TrainingPrograms([config], tiny.mesh())
  made.compile_ahead(state, constants, [tiny.batch(ladder=config.ladder)])
  assert names(made) == ["iterate_0", "prepare_videos"]


def test_what_does_not_compile_is_told_as_at_use(adaptive, monkeypatch):
  config = adaptive[0]
  _, state, constants = held(config)
  made = programs.TrainingPrograms([config], tiny.mesh())
  jitted = made.jitted

  def broken(bucket, name):
    if name == "iterate_1":
      raise errors.UserError("no memory for iterate_1; lower num_combinations")
    return jitted(bucket, name)

  monkeypatch.setattr(made, "jitted", broken)
  batch = tiny.batch(ladder=config.ladder)
  with pytest.raises(errors.UserError, match="^no memory for iterate_1") as one:
    made.compile_ahead(state, constants, [batch])
  with pytest.raises(errors.UserError) as other:
    made.call(SHAPE, "iterate_1", state, constants, batch, None)
  assert str(one.value) == str(other.value)


@pytest.fixture(scope="module")
def prepared(adaptive):
  """The videos of a batch and their memory."""
  config, made, constants, state, _, _ = adaptive
  batch = tiny.batch(ladder=config.ladder)
  placed = programs.place_batch(batch, made.mesh)
  return made.call(SHAPE, "prepare_videos", state, constants, placed)


def test_what_is_drawn_does_not_depend_on_the_program(adaptive, prepared):
  config, videos, memory = adaptive[0], *prepared
  draws = [
    jax.jit(functools.partial(step.draw, config, max_rung=largest))(
      videos, memory
    )
    for largest in (0, 1)
  ]
  (small, few), (large, also_few) = draws
  np.testing.assert_array_equal(few, also_few)
  num_keep = config.ladder.num_keep[0]
  np.testing.assert_array_equal(small.index, large.index[..., :num_keep])
  assert (large.index[..., num_keep:] == tiny.NUM_VIDEO).all()
  np.testing.assert_array_equal(small.frame_mask, large.frame_mask)


def test_a_masked_video_answers_as_in_its_own_program(adaptive, prepared):
  config, _, constants, *_ = adaptive
  videos, memory = prepared
  logits = [
    jax.jit(functools.partial(step.rollout, config, max_rung=largest))(
      constants, videos, memory
    )[0].logits
    for largest in (0, 1)
  ]
  np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def hosted():
  """Host rewards: the programs, and a function that runs a step."""
  config = tiny.step_config(max_new_tokens=3, iterations=1)
  mesh, state, constants = held(config)
  made = programs.TrainingPrograms([config], mesh, host_rewards=True)

  def run(reward):
    start = mesh_lib.put(tiny.state(config), mesh, programs.ONE)
    return steps(made, start, constants, [tiny.batch()], reward)

  del state
  return made, jax.device_get(tiny.state(config)), run


def graded(ids):
  rewards = np.linspace(0, 1, ids.shape[1], dtype=np.float32)
  return np.tile(rewards, (ids.shape[0], 1))


def test_host_rewards_take_three_programs(hosted):
  made, before, run = hosted
  seen = []

  def reward(ids):
    seen.append(ids)
    return graded(ids)

  state, [(ids, rewards, metrics)] = run(reward)
  assert names(made) == ["prepare_videos", "rollout_0", "update"]
  assert seen[0].shape == (2, 8, 3) and ids.shape == (2, 1, 8, 3)
  np.testing.assert_allclose(rewards[0, 0], np.linspace(0, 1, 8))
  np.testing.assert_allclose(metrics.mean["reward_token_greedy"], [0.0])
  np.testing.assert_allclose(metrics.mean["reward_content"], [1.0])
  change = state.params["token"]["kernel"] - before.params["token"]["kernel"]
  assert np.abs(change).max() > 0


def test_host_programs_are_compiled_ahead_too(hosted):
  made, *_ = hosted
  config = made.configs[BUCKET]
  _, state, constants = held(config)
  ahead = programs.TrainingPrograms([config], made.mesh, host_rewards=True)
  ahead.compile_ahead(state, constants, [tiny.batch()])
  assert names(ahead) == ["prepare_videos", "rollout_0", "update"]
  steps(ahead, state, constants, [tiny.batch()], graded)
  assert len(ahead.compile_seconds) == 3


def test_the_host_reads_whole_answers(hosted):
  _, _, run = hosted
  _, [(ids, *_)] = run(graded)
  letters = tiny.constants(tiny.step_config()).letters[ids]
  # Tokens behind a first letter, which an <answer> tag may stand in.
  behind = (np.cumsum(letters >= 0, axis=-1) > 0)[..., :-1]
  assert (behind & (ids[..., 1:] > 1)).any()


def test_equal_rewards_give_no_gradient(hosted):
  _, _, run = hosted
  _, [(_, _, metrics)] = run(lambda ids: graded(ids) * 0 + 0.3)
  assert metrics.mean["gradient_norm"] == 0


def test_a_reward_that_is_not_finite_skips_the_update(hosted):
  _, before, run = hosted

  def reward(ids):
    rewards = graded(ids)
    rewards[1, 3] = np.nan
    return rewards

  state, [(_, _, metrics)] = run(reward)
  assert metrics.mean["skipped_update"] == 1
  np.testing.assert_array_equal(metrics.per_video["finite"], [[True], [False]])
  assert int(state.step) == 1
  for old, new in zip(
    jax.tree.leaves((before.params, before.opt_state)),
    jax.tree.leaves((state.params, state.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(old, new)
