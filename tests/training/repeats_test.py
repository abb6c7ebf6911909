"""Cheap rollouts against the plain path, which answers all rows to their end.

The plain path is only here: rows that repeat are asked in every iteration,
answers go on to their end, each prompt is read from its first row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.models import llava_onevision
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import sampling
from cacovid_jax.training import programs, ratio, repeats, rollout, step
from tests.training import tiny

NEW = 4


def ended_late(answers, target):
  """Reads whole answers: how many letters are in them."""
  return (target.letters[answers.ids] >= 0).sum(axis=-1).astype(jnp.float32)


def run(config, batch):
  """Returns (ids, rewards, metrics), and the state, after one step."""
  made = programs.TrainingPrograms([config], tiny.mesh())
  put = functools.partial(mesh_lib.put, mesh=made.mesh, spec=programs.ONE)
  placed = programs.place_batch(batch, made.mesh)
  state, *out = made.run(
    put(tiny.state(config)), put(tiny.constants(config)), placed
  )
  return jax.device_get((out, state))


def plainly(config, batch):
  """Returns what `run` does, on the plain path."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(repeats, "nothing", lambda *_: None)
    patch.setattr(rollout.RolloutConfig, "decided", lambda *_: None)
    return run(config, batch.replace(shared_rows=0))


def first_letters(ids):
  """Returns (the code of each answer's first letter or -1, its place)."""
  codes = tiny.constants(tiny.step_config()).letters[ids]
  place = np.argmax(codes >= 0, axis=-1)
  return np.take_along_axis(codes, place[..., None], axis=-1)[..., 0], place


def assert_equal(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lettered(request):
  """(dtype, what is found, plainly, with other rewards) of three iterations."""
  config = tiny.step_config(max_new_tokens=NEW, iterations=3)
  model = llava_onevision.LlavaOnevisionModel(
    config.model.config, dtype=jnp.dtype(request.param)
  )
  config, batch = dataclasses.replace(config, model=model), tiny.batch()
  if request.param == "bfloat16":
    batch = batch.replace(shared_rows=tiny.VIDEO_START)
  (ids, *_), _ = plainly(config, batch)
  # Right is what the model says first in some row that says it late.
  codes, place = first_letters(ids)
  found = [codes[v][place[v] > 0].max() for v in range(2)]
  batch = batch.replace(answer_id=np.array(found, np.int32) - ord("A") + 2)
  return request.param, run(config, batch), plainly(config, batch)


def test_lettered_rewards_are_those_of_whole_answers(lettered):
  dtype, ((ids, rewards, metrics), state), plain = lettered
  (whole, expected, told), learned = plain
  np.testing.assert_array_equal(rewards, expected)
  assert 0 < expected.mean() < 1
  np.testing.assert_array_equal(first_letters(ids)[0], first_letters(whole)[0])
  if dtype == "float32":
    assert_equal((metrics, state), (told, learned))


def test_answers_end_at_their_first_letter(lettered):
  _, ((ids, *_), _), ((whole, *_), _) = lettered
  codes, place = first_letters(whole)
  behind = np.arange(NEW) > np.where(codes < 0, NEW, place)[..., None]
  assert behind.any() and (whole[behind] != 0).any()
  np.testing.assert_array_equal(ids, np.where(behind, 0, whole))


@pytest.mark.parametrize("reward", ["margin", "log_likelihood"])
def test_graded_rewards_are_those_of_the_plain_path(reward):
  config = tiny.step_config(reward=reward, iterations=3, max_new_tokens=1)
  found, plain = (make(config, tiny.batch()) for make in (run, plainly))
  np.testing.assert_array_equal(found[0][0], plain[0][0])
  # Products of fewer rows may add up in another order.
  for one, other in zip(*map(jax.tree.leaves, (found, plain)), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
  assert len(np.unique(plain[0][1])) > 2


def test_rewards_of_whole_answers_are_those_of_the_plain_path():
  config = tiny.step_config(reward=ended_late, iterations=3, max_new_tokens=NEW)
  found, plain = (make(config, tiny.batch()) for make in (run, plainly))
  assert_equal(found, plain)
  assert len(np.unique(plain[0][1])) > 2


def asked(keep, num_valid=4, *, before=None, modes=(5, 2, 1)):
  """Returns (answers, those that repeat, numbers of rows asked)."""
  counts = []

  def ask(index):
    counts.append(index.shape[1])
    return rollout.Answers(index.sum(axis=-1, keepdims=True), None)

  with jax.disable_jit():
    answers, after = repeats.answer(
      ask,
      jnp.asarray(keep),
      jnp.full(1, num_valid),
      before,
      modes=sampling.Modes(*modes),
      num_video=9,
    )
  return np.asarray(answers.ids), after, counts


def test_rows_are_asked_again_only_where_they_keep_other_tokens():
  keep = np.arange(32).reshape(1, 8, 4) % 9
  shape = 1, 3
  nothing = repeats.Answered(
    jnp.full((*shape, 6), -1),
    rollout.Answers(jnp.zeros((*shape, 1), int), None),
  )
  ids, held, counts = asked(keep, before=nothing)
  np.testing.assert_array_equal(ids, keep.sum(axis=-1, keepdims=True))
  assert counts == [8]  # In one batch.
  drawn = keep.copy()
  drawn[0, 1:5] = 8 - drawn[0, 1:5]
  ids, held, counts = asked(drawn, before=held)
  np.testing.assert_array_equal(ids, drawn.sum(axis=-1, keepdims=True))
  assert counts == [5]
  other = drawn.copy()
  other[0, 7, 3] = 0  # A near tie of the content row.
  ids, _, counts = asked(other, before=held)
  np.testing.assert_array_equal(ids, other.sum(axis=-1, keepdims=True))
  assert counts == [8]
  # Fewer of them valid, or a program with room for more.
  assert asked(drawn, 3, before=held)[2] == [8]
  wider = np.pad(drawn, ((0, 0), (0, 0), (0, 1)), constant_values=9)
  assert asked(wider, before=held)[2] == [8]
  assert asked(drawn)[1:] == (None, [8])


@pytest.mark.parametrize(
  ("modes", "expected"),
  [
    ((23, 8, 1), [0, 23, 31]),
    ((6, 0, 2), [0, 6, 7]),
    ((2, 1, 1), []),  # One row would be left.
    ((8, 0, 0), [0]),
    ((0, 1, 1), []),
  ],
)
def test_rows_that_repeat(modes, expected):
  assert repeats.rows(sampling.Modes(*modes)).tolist() == expected


def test_one_iteration_repeats_nothing():
  config = tiny.step_config(iterations=1)
  assert repeats.nothing(config, 2, tiny.VOCABULARY) is None


def test_each_video_is_drawn_for_on_its_own_rung_alone():
  config = tiny.step_config(fixed=None, rungs=(0.125, 0.25))
  batch = tiny.batch(ladder=config.ladder)
  given = tiny.state(config), tiny.constants(config), batch
  videos, memory = jax.jit(functools.partial(step.prepare_videos, config))(
    *given
  )
  memory = memory.replace(rung=jnp.array([0, 1]))
  draw = functools.partial(step.draw, config, max_rung=1)
  drawn, count = jax.jit(draw)(videos, memory)
  for row, plan in enumerate(config.ladder.plans):
    of_row = functools.partial(jax.tree.map, lambda leaf, row=row: leaf[row])
    prompt = of_row(videos.prompts)
    alone = jax.jit(functools.partial(sampling.sample, plan=plan))(
      jax.random.fold_in(videos.rng[row], 0),
      of_row(memory.old_scores),
      prompt.x[prompt.video_rows],
    )
    assert count[row] == plan.num_keep
    np.testing.assert_array_equal(
      drawn.index[row, :, : plan.num_keep], alone.index
    )
    np.testing.assert_array_equal(drawn.frame_mask[row], alone.frame_mask)
  # A choice that stays one; side by side, all rungs are drawn and one is taken.
  assert " cond[" in str(jax.make_jaxpr(draw)(videos, memory))


def test_a_ladder_of_one_grid_knows_the_largest():
  assert tiny.step_config().ladder.largest == tiny.GRID
  bucket = tiny.step_config().ladder.bucket
  ladder = ratio.make_ladder(
    bucket, sampling.SamplingConfig(num_combinations=8), ratio.RatioConfig()
  )
  assert bucket.holds(ladder.largest)
