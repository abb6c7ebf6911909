"""Prompts of Qwen3-VL without the text of frames of which nothing is kept.

Expected prompts are written frame by frame, from the tokens that are kept.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.compressors import simple
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.evals import evaluation
from cacovid_jax.inference import clip_queue
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import checkpoints, generation, prompt_batch, video_llm
from tests.evals import tiny

GRID = (4, 2, 3)
TIMES = (0.2, 9.9, 10.4, 100.0)  # Text of several lengths.
START, PAD, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
NEW = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  tiny.write_data(folder, num_clips=2)
  (folder / "decisive.jsonl").unlink()
  return str(folder)


@pytest.fixture(scope="module")
def experiment_of(qwen3_vl_dir, data):
  def make(workdir, **changes):
    fields = dict(
      data=data, checkpoint=qwen3_vl_dir, methods=("uniform",),
      ratios=(0.4, 0.05), num_frames=8, batch_size=2, max_new_tokens=NEW,
      num_examples=0, select_on="none",
    )  # fmt: skip
    return tiny.experiment(workdir, **fields | changes)

  return make


def written(tokenizer, question, grid, times, kept, outer=False):
  """Returns (ids, positions, tokens, frames) of a prompt, one row each.

  `tokens` are -1 for text. Frames without any of the tokens `kept` are left
  out; None keeps the text of all.
  """
  T, H, W = grid
  before, after = tokenizer.render(question).split(f"{START}{PAD}{END}")
  if outer:
    before, after = f"{before}{START}", f"{END}{after}"
  rows, counter = [], 0

  def text(words, frame):
    nonlocal counter
    for token_id in tokenizer.encode(words):
      rows.append((token_id, (counter,) * 3, -1, frame))
      counter += 1

  text(before, -1)
  for frame, time in enumerate(times):
    text(f"<{time:.1f} seconds>{START}", frame)
    for place in range(H * W):
      row, column = divmod(place, W)
      where = counter, counter + row, counter + column
      rows.append((tokenizer.video_id, where, frame * H * W + place, frame))
    counter += max(H, W)
    text(END, frame)
  text(after, -1)
  left = [
    row
    for row in rows
    if (row[2] < 0 or row[2] in kept)
    and (row[3] < 0 or any(token // (H * W) == row[3] for token in kept))
  ]
  ids, positions, tokens, frames = map(np.array, zip(*left, strict=True))
  # The same as a text, for a prompt is one.
  counts = [sum(t // (H * W) == frame for t in kept) for frame in range(T)]
  clip = "".join(
    f"<{time:.1f} seconds>{START}{PAD * count}{END}"
    for time, count in zip(times, counts, strict=True)
    if count
  )
  assert ids.tolist() == tokenizer.encode(f"{before}{clip}{after}")
  return ids, positions.T, tokens, frames


prune = jax.jit(jax.vmap(prompt_batch.prune))
cut = jax.jit(prompt_batch.take, static_argnames="num_video")


def embedded(model, tokenizer, room=5):
  """Returns a `PromptBatch` of one whose entries tell where they are from.

  Text has its id as its embedding, a video token 1000 and its number.
  """
  prompt = model.encode_prompt(tokenizer, "Why?", GRID, TIMES)
  video = video_llm.VideoFeatures(None, GRID, TIMES)
  positions, following = model.positions(prompt.ids, video)
  x = np.float32(prompt.ids)
  x[prompt.video_rows] = 1000 + np.arange(24)
  frames = model.frame_rows(tokenizer, prompt, GRID, TIMES)
  batch = prompt_batch.PromptBatch(
    x=np.pad(x, (0, room))[:, None],
    positions=np.pad(positions, [(0, 0), (0, room)]),
    lengths=np.int32(prompt.length),
    video_rows=prompt.video_rows,
    next_position=np.int32(following),
    deep=np.float32([[range(24)], [range(100, 124)]]).reshape(2, 24, 1),
    frames=np.pad(frames, (0, room), constant_values=-1),
  )
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch)


def check(pruned, kept, expected):
  """Compares the first of pruned prompts with what is `written`."""
  ids, positions, tokens, frames = expected
  length, video_rows = int(pruned.lengths[0]), np.flatnonzero(tokens >= 0)
  assert length == len(ids)
  x = np.where(tokens < 0, ids, 1000 + tokens)
  np.testing.assert_array_equal(pruned.x[0, :length, 0], x)
  np.testing.assert_array_equal(pruned.positions[0, :, :length], positions)
  np.testing.assert_array_equal(pruned.frames[0, :length], frames)
  count = len(kept)
  np.testing.assert_array_equal(pruned.video_rows[0, :count], video_rows)
  assert (pruned.video_rows[0, count:] == pruned.x.shape[1]).all()
  np.testing.assert_array_equal(pruned.deep[0, 0, :count, 0], kept)
  np.testing.assert_array_equal(pruned.deep[0, 1, :count, 0], 100 + kept)


@pytest.mark.parametrize("outer", [False, True])
def test_prompts_are_those_written_frame_by_frame(qwen3_vl_dir, outer):
  model = checkpoints.make_model(checkpoints.load_config(qwen3_vl_dir))
  model = model.with_outer_vision_tags(outer)
  tokenizer = tokenizer_lib.Tokenizer.from_directory(qwen3_vl_dir)
  batch = embedded(model, tokenizer)
  rng = np.random.default_rng(0)

  def padded(kept, size):
    return jnp.asarray(np.pad(kept, (0, size - len(kept))))[None]

  emptied = set()
  for count in (1, 2, 2, 3, 3, 5, 9, 24):
    kept = np.sort(rng.permutation(24)[:count])
    emptied |= {*range(4)} - {*(kept // 6).tolist()}
    given = tokenizer, "Why?", GRID, TIMES
    expected = written(*given, kept, outer)
    _, pruned = prune(batch, padded(kept, 24), jnp.array([count]))
    check(pruned, kept, expected)
    assert pruned.next_position == batch.next_position
    # Tokens that go in two cuts leave what those leave that go in one.
    more = np.union1d(kept, rng.permutation(24)[:6])
    whole = prompt_batch.whole(batch)
    _, first = cut(
      whole, padded(more, 24), jnp.array([len(more)]), num_video=24
    )
    check(first, more, written(*given, more, outer))
    places = np.searchsorted(more, kept)
    _, twice = cut(first, padded(places, 24), jnp.array([count]), num_video=24)
    check(twice, kept, expected)
    tail = written(*given, np.arange(24), outer)[2]
    tail = len(tail) - 1 - np.flatnonzero(tail >= 0)[-1]  # Its mark included.
    assert int(twice.num_after[0]) == tail - (kept[-1] < 18)
  assert emptied == {0, 1, 2, 3}
  # With everything kept it is the whole prompt, but for the padding.
  alone = batch._replace(frames=None)
  _, without = prune(alone, padded(np.arange(24), 24), jnp.array([24]))
  for name in ("x", "positions", "lengths", "video_rows", "deep"):
    ours, theirs = getattr(pruned, name), getattr(without, name)
    np.testing.assert_array_equal(ours, theirs)


def test_a_time_that_is_no_text_of_its_own_cannot_go(qwen3_vl_dir):
  model = checkpoints.make_model(checkpoints.load_config(qwen3_vl_dir))
  tokenizer = tokenizer_lib.Tokenizer.from_directory(qwen3_vl_dir)
  prompt = model.encode_prompt(tokenizer, "Why?", GRID, TIMES)
  length = len(tokenizer.encode("<0.2 seconds>"))
  # As if its first letter belonged to the text before it.
  prompt.ids[prompt.video_rows[0] - 1 - length] += 1
  with pytest.raises(errors.UserError, match="neither can go alone") as caught:
    model.frame_rows(tokenizer, prompt, GRID, TIMES)
  assert "\n" not in str(caught.value)


def test_models_without_such_text_refuse(
  experiment_of, checkpoint_dir, tmp_path
):
  changes = dict(checkpoint=checkpoint_dir, empty_frames="drop")
  with pytest.raises(errors.UserError, match="empty_frames=drop is for") as e:
    evaluation.evaluate(experiment_of(tmp_path, **changes))
  assert "leave it out" in str(e.value) and "\n" not in str(e.value)
  with pytest.raises(errors.UserError, match="empty_frames.*keep, drop"):
    engine_lib.Settings(empty_frames="none")


def greedy(checkpoint, batch, expected):
  """Returns int32[NEW] of the first prompt, from what is `written`."""
  ids, positions, tokens, _ = expected
  model, rows = checkpoint.model, np.flatnonzero(tokens >= 0)
  kept = tokens[rows]

  @jax.jit
  def answer(params):
    x = model.embed_text(params, jnp.asarray(ids))
    x = x.at[rows].set(batch.features[0, kept])
    logits, cache, _ = model.prefill(
      params, x[None], jnp.asarray(positions, jnp.int32)[None],
      jnp.array([len(ids)]), cache_length=len(ids) + NEW - 1,
      deep=batch.deep[:1, :, kept], video_rows=jnp.asarray(rows)[None],
    )  # fmt: skip
    return generation.extend(
      model, params, logits, cache, batch.next_position[:1],
      max_new_tokens=NEW, eos_ids=tuple(checkpoint.eos_ids),
      pad_id=checkpoint.pad_id,
    )  # fmt: skip

  return answer(checkpoint.params)[0]


def test_methods_before_and_inside_the_language_model(experiment_of, tmp_path):
  """What is counted beside the video is what the prompts hold."""
  asked = experiment_of(tmp_path, empty_frames="drop")
  questions = evaluation.load_benchmark(asked).questions[:2]
  checkpoint = asked.checkpoint
  with clip_queue.open_queue(asked) as source:
    settings = evaluation.settings(asked)
    engine = engine_lib.Engine.of(asked, source, questions, settings)
    batch = engine.batch(questions)
    times = source[questions[0].video].second_per_grid_t
  grid = engine.grid
  assert grid[0] == len(times) == 4
  emptied = set()
  for name, ratio in (("uniform", 0.05), ("fastv", 0.36), ("framefusion", 0.1)):
    method = methods_lib.Method.parse(name)
    _, condition = methods_lib.conditions([method], (ratio,), (0,))
    ids, trace = batch.output(condition)
    counts = batch.beside_video(trace)
    for row, question in enumerate(questions):
      kept = np.asarray(trace.index[row])[np.asarray(trace.mask[row])]
      given = checkpoint.tokenizer, question.prompt, grid, times
      expected = written(*given, kept)
      assert counts[row] == len(expected[0]) - len(kept), name
      frames = set(range(4)) - set((kept // 16).tolist())
      emptied |= {name} if frames else set()
    if name == "uniform":
      expected = written(
        checkpoint.tokenizer, questions[0].prompt, grid, times,
        simple.even_positions(64, 3),
      )  # fmt: skip
      found = greedy(checkpoint, batch.batch, expected)
      np.testing.assert_array_equal(ids[0], found)
  assert emptied == {"uniform", "fastv", "framefusion"}
  whole = batch.beside_video()
  assert whole == (np.asarray(batch.lengths) - 64).tolist()


def test_an_evaluation_counts_shorter_prompts(experiment_of, tmp_path):
  outs = {}
  for frames in ("keep", "drop"):
    asked = experiment_of(tmp_path / frames, empty_frames=frames)
    outs[frames] = evaluation.evaluate(asked)
  settings = {k: out["provenance"]["settings"] for k, out in outs.items()}
  assert settings["drop"].pop("empty_frames") == "drop"
  assert settings["drop"] == settings["keep"]
  keep, drop = outs["keep"], outs["drop"]
  assert drop["vanilla"] == keep["vanilla"]
  keep, drop = (out["methods"]["uniform"] for out in (keep, drop))
  # Of 64 tokens, 25 lie in all four frames, and 3 in three of them.
  assert drop["0.40"] == keep["0.40"]
  assert drop["0.05"]["kept_tokens"] == keep["0.05"]["kept_tokens"] == 3
  tokenizer = asked.checkpoint.tokenizer
  # Eight frames a second, in the middle of two.
  kept = set((simple.even_positions(64, 3) // 16).tolist())
  times = [(2 * frame + 0.5) / 8 for frame in {0, 1, 2, 3} - kept]
  gone = sum(
    len(tokenizer.encode(f"<{time:.1f} seconds>{START}{END}")) for time in times
  )
  difference = keep["0.05"]["prompt_tokens"] - drop["0.05"]["prompt_tokens"]
  assert difference == pytest.approx(gone)
  # Answers of one are not continued with the other.
  for one, other in (("keep", "drop"), ("drop", "keep")):
    with pytest.raises(errors.UserError, match="differs in settings"):
      evaluation.evaluate(experiment_of(tmp_path / one, empty_frames=other))
