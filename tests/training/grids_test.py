"""Training on videos of several grids: what a bucket changes, namely nothing.

Each video alone, at its own static grid, is the reference.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.data import video
from cacovid_jax.inference import programs as inference
from cacovid_jax.models import (
  checkpoints,
  processors,
  prompt_batch,
  token_grid,
  video_llm,
)
from cacovid_jax.policy import network, sampling
from cacovid_jax.training import batches, programs, ratio, replay, step
from cacovid_jax.training import run as run_lib
from tests.data import clips
from tests.training import loop_test, tiny, tiny_qwen

BUCKET = token_grid.GridBucket(3, 26, 60)
NEW = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("qwen")


@pytest.fixture(scope="module")
def rows(folder):
  return tiny_qwen.write(folder)


@pytest.fixture(scope="module")
def checkpoint(folder, rows):
  del rows  # They are written together.
  return checkpoints.load(folder / "model")


@pytest.fixture(scope="module")
def made(folder, rows, checkpoint):
  """Returns (the run, its first batch, the rows of the batch)."""
  config = tiny_qwen.config(
    folder,
    **{
      "data.buckets": ((BUCKET.frames, BUCKET.frame_tokens, BUCKET.tokens),),
      "rollout.max_new_tokens": NEW,
      "rollout.reward": "accuracy",
    },
  )
  run = run_lib.Run(
    tiny.experiment_of(config, folder, checkpoint=checkpoint), questions=rows
  )
  for batch, questions in run.batches(0):
    if len({row.video[0] for row in questions}) == 2:
      return run, batch, questions
  raise AssertionError("no batch of two grids")


@pytest.fixture(scope="module")
def bucketed(made):
  """Returns what a step's parts give in the bucket, rewards by a rule."""
  run, batch, _ = made
  state = jax.device_get(run.init_state())
  given = (state, run.constants, batch)
  prepare = jax.jit(functools.partial(step.prepare_videos, run.config))
  videos, memory = prepare(*given)
  largest = int(batch.rungs.start.max())

  @jax.jit
  def iterate(videos, memory, state, constants):
    config = run.config
    drawn, kept = step.draw(config, videos, memory, max_rung=largest)
    answers, masks, _ = step.rollout(
      config, constants, videos, memory, max_rung=largest
    )
    rewards = rewarded(drawn.index.shape[:2])
    memory = jax.vmap(replay.append)(memory, masks, rewards)
    grads, (loss, metrics) = averaged(
      functools.partial(step.gradients, config), state.params, videos, memory
    )
    return drawn, kept, answers, masks, loss, grads, metrics

  params = _nudged(state.params)
  out = iterate(videos, memory, state.replace(params=params), run.constants)
  return run, state.params, params, videos, memory, out


def averaged(function, params, *args):
  """Calls a function of the step on the only device of an axis."""
  on = jax.vmap(function, (None,) + (0,) * len(args), axis_name=step.AXIS)
  out = on(params, *jax.tree.map(lambda leaf: leaf[None], args))
  return jax.tree.map(lambda leaf: leaf[0], out)


def rewarded(shape):
  return jnp.asarray((np.arange(np.prod(shape)) % 3 == 0).reshape(shape), float)


def _nudged(params):
  """Parameters as after a step: ratios of new and old then differ from 1."""
  return jax.tree.map(lambda leaf: leaf * 1.05 + 0.01, params)


class Alone:
  """One video of a batch, at its static grid, built without the bucket."""

  def __init__(self, run, checkpoint, batch, question, i):
    shape = question.video[:-5]
    self.grid = T, H, W = tiny_qwen.GRIDS[shape]
    self.num_video = N = T * H * W
    self.run = run
    prompt = checkpoint.tokenizer.encode_prompt(question.prompt, N)
    # Four frames of a clip of 8, 9, ... tenths of a second.
    seconds = 2 * (8 + int(question.id[1:])) / 10 / 4
    positions, following = run.config.model.positions(
      prompt.ids, video_llm.VideoFeatures(None, self.grid, seconds)
    )
    self.prompt = prompt_batch.PromptBatch(
      x=run.config.model.embed_prompt(
        run.constants.params,
        prompt.ids,
        batch.prompts.features[i, :N],
        prompt.video_rows,
      ),
      positions=positions,
      lengths=np.int32(prompt.length),
      video_rows=prompt.video_rows,
      next_position=np.int32(following),
    )
    given = run.config.ladder
    ladder = ratio.make_ladder(self.grid, given.sampler, given.config)
    self.rungs = ladder.rungs(self.grid)
    self.plan = ladder.plans[self.rungs.start]
    self.config = dataclasses.replace(run.config, ladder=ladder)

  @functools.cached_property
  def videos(self):
    return step.Batch(
      prompts=jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], self.prompt),
      answer_id=np.zeros(1, int),
      option_ids=np.zeros((1, 2), int),
      decisive_frames=np.zeros((1, self.grid[0]), bool),
      question_hash=np.zeros(1, np.uint32),
      rng=jax.random.split(jax.random.key(0), 1),
      grid=token_grid.TokenGrid.of(self.grid),
      rungs=jax.tree.map(lambda leaf: leaf[None], self.rungs),
    )

  @functools.cached_property
  def learn(self):
    """(before, after, weights, index, kept, masks, rewards) -> its results."""
    config, videos = self.config, self.videos

    @jax.jit
    def learn(before, after, params, index, kept, masks, rewards):
      ids, _ = inference.answer_rows(
        config.model,
        params,
        videos.prompts,
        index[None],
        kept[None],
        max_new_tokens=NEW,
        eos_ids=config.eos_ids,
        pad_id=config.pad_id,
      )
      scores = step.policy_scores(config, before, videos, np.zeros(1, int))
      memory = replay.empty(
        jax.tree.map(lambda leaf: leaf[0], scores),
        modes=config.modes,
        iterations=config.iterations,
        rung=0,
      )
      memory = replay.append(memory, masks, rewards)
      grads, (loss, metrics) = averaged(
        functools.partial(step.gradients, config),
        after,
        videos,
        jax.tree.map(lambda leaf: leaf[None], memory),
      )
      return scores, ids[0], loss[0], grads, metrics

    return learn


@pytest.fixture(scope="module")
def alone(made, checkpoint, bucketed):
  """Returns each video and what it gives alone, for the same combinations."""
  run, batch, questions = made
  _, before, after, _, _, (drawn, kept, _, masks, *_) = bucketed
  found = []
  for i, question in enumerate(questions):
    one = Alone(run, checkpoint, batch, question, i)
    T, N = one.grid[0], one.num_video
    own = replay.Masks(masks.token[i, :, :N], masks.frame[i, :, :T])
    assert not masks.token[i, :, N:].any() and not masks.frame[i, :, T:].any()
    index = drawn.index[i, :, : one.plan.num_keep]
    given = before, after, run.constants.params, index, kept[i], own
    found.append((one, one.learn(*given, rewarded((2, 8))[i])))
  return found


def test_features_are_those_of_the_clip_alone(made, folder):
  run, batch, questions = made
  model = run.config.model
  for i, question in enumerate(questions):
    clip = video.decode(
      folder / question.video, frames_lib.FrameRule(tiny.FRAMES)
    )
    processor = processors.Qwen2_5VLProcessor.from_files(folder / "model")
    fps = len(clip.frames) / clip.duration
    inputs = model.tower_inputs(processor(clip.frames, fps=fps))
    expected = model.encode(run.constants.params, inputs).features
    N = len(expected)
    np.testing.assert_allclose(
      batch.prompts.features[i, :N], expected, atol=1e-5
    )
    assert not batch.prompts.features[i, N:].any()
    assert inputs.grid == tiny_qwen.GRIDS[question.video.rstrip(".mp4")[:-1]]


def test_prompts_and_positions_are_those_of_each_video_alone(made, alone):
  _, batch, _ = made
  for i, (one, _) in enumerate(alone):
    length = one.prompt.lengths
    assert batch.prompts.lengths[i] == length
    rows = batch.prompts.video_rows[i]
    np.testing.assert_array_equal(rows[: one.num_video], one.prompt.video_rows)
    assert (rows[one.num_video :] == batch.prompts.ids.shape[1]).all()
    found = batch.prompts.positions[i]
    np.testing.assert_array_equal(found[:, :length], one.prompt.positions)
    assert batch.prompts.next_position[i] == one.prompt.next_position


def test_scores_are_those_of_each_video_alone(bucketed, alone):
  _, _, _, _, memory, _ = bucketed
  for i, (one, (scores, *_)) in enumerate(alone):
    T, N = one.grid[0], one.num_video
    found = jax.tree.map(lambda leaf, at=i: leaf[at], memory.old_scores)
    np.testing.assert_allclose(found.token[:N], scores.token[0], atol=2e-5)
    np.testing.assert_allclose(found.frame[:T], scores.frame[0], atol=2e-5)
    assert not found.token[N:].any() and not found.frame[T:].any()


def test_combinations_follow_each_videos_own_plan(bucketed, alone):
  _, _, _, _, memory, (drawn, kept, *_) = bucketed
  for i, (one, _) in enumerate(alone):
    T, N, K = one.grid[0], one.num_video, one.plan.num_keep
    index = np.asarray(drawn.index[i])
    assert kept[i] == K
    assert (index[:, :K] < N).all() and (np.diff(index[:, :K]) > 0).all()
    assert (index[:, K:] == BUCKET.tokens).all()
    # What no chance enters is the full grid's, index by index.
    scores = jax.tree.map(lambda leaf, at=i: leaf[at], memory.old_scores)
    alone = jax.jit(functools.partial(sampling.sample, plan=one.plan))(
      jax.random.key(5),
      network.Scores(scores.frame[:T], scores.token[:N]),
      one.prompt.x[one.prompt.video_rows],
    )
    num_token = one.plan.config.modes.token
    for row in (0, num_token, -1):
      np.testing.assert_array_equal(index[row, :K], alone.index[row])
    np.testing.assert_array_equal(
      drawn.frame_mask[i, 0, :T], alone.frame_mask[0]
    )


def test_answers_and_gradients_are_those_of_each_video_alone(bucketed, alone):
  _, _, answers, _, loss, grads, metrics = bucketed[-1]
  outs = [out for _, out in alone]
  np.testing.assert_array_equal(answers.ids, [ids for _, ids, *_ in outs])
  np.testing.assert_allclose(
    loss, [one[2] for one in outs], rtol=1e-4, atol=1e-6
  )
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *[one[3] for one in outs])
  flat = zip(jax.tree.leaves(grads), jax.tree.leaves(mean), strict=True)
  for found, expected in flat:
    scale = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(found, expected, atol=2e-4 * scale)
  assert any(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(mean))
  for name in ("token_gap_std", "frame_gap_std", "token_entropy"):
    expected = np.mean([one[4][name] for one in outs])
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-4)


def test_a_run_on_clips_of_two_shapes_resumes_bit_identically(
  folder, rows, checkpoint, tmp_path
):
  config = tiny_qwen.config(
    folder,
    **{
      "total_steps": 4,
      "ckpt.every_steps": 2,
      "videos_per_step": 1,
      "ratio.adaptive": False,
      "rollout.reward": "margin",
      "data.buckets": ((2, 16), (2, 24)),
      "data.feature_cache": str(tmp_path / "cache"),
      "policy.module": "tests.policy.bilinear_policy:Bilinear",
    },
  )
  given = dict(questions=rows, checkpoint=checkpoint, store=None)
  first, second = loop_test.Log(), loop_test.Log()
  result = tiny.train(tmp_path / "whole", config, on_step=first, **given)
  made = result.run.programs
  # One program for each bucket, which both are used.
  assert list(map(made.limit, made.configs)) == [1, 1]
  assert list(made.configs) == [
    token_grid.GridBucket(2, 16),
    token_grid.GridBucket(2, 24),
  ]
  assert {(shape.bucket, name) for shape, name in made.compile_seconds} == {
    (bucket, "fixed_ratio_step") for bucket in made.configs
  }
  # The second time, features come from the disk.
  assert any((tmp_path / "cache").rglob("*.features"))
  step_two = pathlib.Path("checkpoints", "2")
  shutil.copytree(tmp_path / "whole" / step_two, tmp_path / "cut" / step_two)
  again = tiny.train(tmp_path / "cut", config, on_step=second, **given)
  assert sorted(second.steps) == [3, 4]
  loop_test.assert_same(again.state, result.state)
  for done in (3, 4):
    assert first.steps[done][0] == second.steps[done][0]
    loop_test.assert_same(first.steps[done][1:], second.steps[done][1:])
  before = result.run.init_params()["question"]["kernel"]
  after = result.state.params["question"]["kernel"]
  assert np.abs(np.asarray(before) - np.asarray(after)).max() > 0
  config_file = tmp_path / "whole" / "policy" / "policy_config.json"
  described = json.loads(config_file.read_text())
  assert described["grid"] == [[2, 16, 32], [2, 24, 48]]


RATIOS = (0.01, 0.02, 0.04, 0.08, 0.12)


@pytest.mark.parametrize("fixed", [None, 0.12])
def test_a_video_walks_its_own_ladder_inside_a_bucket(fixed):
  config = ratio.RatioConfig(rungs=RATIOS)
  draws = sampling.SamplingConfig(num_combinations=8)
  ladder = ratio.make_ladder(
    token_grid.GridBucket(3, 64), draws, config, fixed=fixed
  )
  assert len(ladder) == (5 if fixed is None else 1)
  rng = np.random.default_rng(0)
  for grid in [(3, 8, 8), (2, 5, 5), (1, 3, 3), (3, 6, 7), (2, 4, 4)]:
    alone = ratio.make_ladder(grid, draws, config, fixed=fixed)
    full, own = alone.rungs(grid), ladder.rungs(grid)
    place, rung = int(own.start), int(full.start)
    for reward in rng.choice([0.0, 0.5, 1.0], 20):
      np.testing.assert_allclose(own.ratios[place], alone.ratios[rung])
      plan = jax.tree.map(lambda leaf, at=place: leaf[at], own.plans)
      assert int(plan.num_keep) == alone.num_keep[rung]
      # The program of a place has room for what is drawn there.
      assert alone.num_keep[rung] <= ladder.num_keep[place]
      place = int(ratio.next_rung(ladder, own, place, reward))
      rung = int(ratio.next_rung(alone, full, rung, reward))


def test_a_ratio_that_a_grid_does_not_allow_is_named():
  ladder = ratio.make_ladder(
    token_grid.GridBucket(3, 64),
    sampling.SamplingConfig(num_combinations=8),
    ratio.RatioConfig(),
    fixed=0.02,
  )
  with pytest.raises(errors.UserError, match="0.02 keeps no token of a 4 x 4"):
    ladder.rungs((3, 4, 4))


def test_settings_of_the_other_kind_of_grid_are_refused(folder, checkpoint):
  for key, value in (("data.buckets", ((4, 16),)), ("data.min_pixels", 64)):
    with pytest.raises(errors.UserError, match="whose grids differ"):
      run_lib.make_processor(
        tiny.config(**{key: value}), tiny.checkpoint().model
      )
  config = tiny_qwen.config(folder, **{"data.decisive_file": "decisive.jsonl"})
  with pytest.raises(errors.UserError, match="decisive_file.*leave it empty"):
    run_lib.make_processor(config, checkpoint.model)


def _ladders(checkpoint):
  return [
    ratio.make_ladder(
      token_grid.GridBucket(*sizes),
      sampling.SamplingConfig(num_combinations=4),
      ratio.RatioConfig(),
      fixed=0.25,
    )
    for sizes in ((2, 16), (2, 24), (9, 9))
  ]


def test_a_step_takes_the_smallest_bucket_that_holds_its_videos(checkpoint):
  ladders = {ladder.bucket: ladder for ladder in _ladders(checkpoint)}
  first, second, _ = ladders

  def together(*grids):
    return batches.together(grids, ladders)

  assert together((2, 4, 4), (1, 2, 2)) == first
  assert together((2, 4, 4), (2, 4, 6)) == second
  with pytest.raises(errors.UserError, match="no bucket holds a video of 2 x"):
    together((2, 4, 4), (2, 5, 5))
  with pytest.raises(errors.UserError, match="together: 2 x 4 x 4, 9 x 1 x 1"):
    together((2, 4, 4), (9, 1, 1))
  alone = ratio.make_ladder(
    tiny.GRID,
    sampling.SamplingConfig(num_combinations=4),
    ratio.RatioConfig(),
    fixed=0.25,
  )
  with pytest.raises(errors.UserError, match="a clip has 1 x 4 x 4 video tok"):
    batches.together([(1, 4, 4)], {alone.bucket: alone})


def test_text_is_padded_to_the_buckets_of_the_run(folder, rows, checkpoint):
  def lengths(prompt_rows, questions=rows):
    config = tiny_qwen.config(
      folder, **{"data.prompt_rows": prompt_rows, "total_steps": 6}
    )
    experiment = tiny.experiment_of(config, folder, checkpoint=checkpoint)
    store = tiny.Store(lambda path: np.ones((32, 32)), lambda path: (2, 4, 4))
    made = batches.Batches(
      experiment, questions, store, _ladders(checkpoint)[:1]
    )
    found = [
      (batch.prompts.ids.shape[1] - 32, int(batch.prompts.lengths.max()) - 32)
      for batch, _ in made(0)
    ]
    return made.prompts.text_rows, found

  buckets, found = lengths(())
  assert all(rows == buckets[-1] for rows, _ in found) and len(buckets) == 1
  longer = [dataclasses.replace(rows[0], prompt="and so on " * 40), *rows[1:]]
  buckets, found = lengths((), longer)
  assert len(buckets) == 2
  for length, text in found:
    assert length == min(size for size in buckets if size >= text)
  assert {length for length, _ in found} == set(buckets)
  # A length of one's own need be no multiple of anything.
  own = max(text for _, text in found) + 3
  assert {length for length, _ in lengths((own,), longer)[1]} == {own}
  with pytest.raises(errors.UserError, match="raise the last of them"):
    lengths((16,), longer)


def test_buckets_share_no_program(made):
  run, *_ = made
  assert list(run.programs.configs) == [BUCKET]
  given = run.config.ladder
  ladder = ratio.make_ladder(
    token_grid.GridBucket(3, 30), given.sampler, given.config
  )
  other = dataclasses.replace(run.config, ladder=ladder)
  both = programs.TrainingPrograms([run.config, other], run.mesh)
  assert list(map(both.limit, both.configs)) == [2 + 3] * 2
  assert both.configs[BUCKET].num_video == 60
  assert both.configs[ladder.bucket].num_video == 90


def test_the_shapes_of_batches_are_known_ahead(made):
  run, batch, _ = made
  lengths, wanted = run.batches.prompts.text_rows, programs.Shape.of(batch)
  likes = list(run.batches.shapes(batch))
  shapes = [BUCKET.tokens + rows for rows in lengths]
  assert [programs.Shape.of(x).length for x in likes] == shapes
  (like,) = [x for x in likes if programs.Shape.of(x) == wanted]
  assert jax.tree.structure(like) == jax.tree.structure(batch)
  for one, other in zip(
    jax.tree.leaves(like), jax.tree.leaves(batch), strict=True
  ):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_clips_of_odd_shapes_are_replaced_and_noted(rows, checkpoint, tmp_path):
  tiny_qwen.write_clips(tmp_path)
  # 202 times as long as wide; 100 times, hence 1 x 48 tokens of 24 at most; a
  # side of 28 pixels, which the public trainer refuses.
  odd = {"line": (6060, 30), "long": (3000, 30), "small": (48, 28)}
  for name, (width, height) in odd.items():
    clips.write(tmp_path / f"{name}.mp4", 4, width=width, height=height)
  asked = [
    *rows,
    *(
      dataclasses.replace(rows[0], id=name, video=f"{name}.mp4") for name in odd
    ),
  ]
  config = tiny_qwen.config(
    tmp_path,
    **{
      "total_steps": 9,
      "videos_per_step": 1,
      "data.buckets": ((2, 24),),
      "data.min_side": 28,
      "model.path": checkpoint.identity["path"],
    },
  )
  run = run_lib.Run(
    tiny.experiment_of(config, tmp_path, checkpoint=checkpoint), questions=asked
  )
  # The tower is not what this is about.
  run.store._tower._run = lambda signals, inputs: [
    {"features": np.zeros((48, 32), np.float32)}
  ]
  seen = {question.id for _, given in run.batches(0) for question in given}
  assert seen and seen <= {row.id for row in rows}
  lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
  found = {entry["video"]: entry for entry in map(json.loads, lines)}
  assert set(found) == {f"{name}.mp4" for name in odd}
  assert {entry["reason"] for entry in found.values()} == {"bad_shape"}
  assert "200 times" in found["line.mp4"]["detail"]
  assert "48 x 1 tokens, above 24" in found["long.mp4"]["detail"]
  assert "a side of 28 or fewer" in found["small.mp4"]["detail"]
  # Buckets that hold no ordinary clip are a mistake, not odd clips.
  config = config_lib.replace(config, {"data.buckets": ((2, 8),)})
  run = run_lib.Run(
    tiny.experiment_of(config, tmp_path, checkpoint=checkpoint), questions=rows
  )
  with pytest.raises(errors.UserError, match="no bucket holds a video of 2 x"):
    next(run.batches(0))
