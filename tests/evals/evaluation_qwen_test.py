"""A Qwen2.5-VL over clips of several shapes: one table, one grid per batch."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.compressors import simple
from cacovid_jax.data import answer_log, feature_cache, frames, video
from cacovid_jax.evals import benchmarks, evaluation, frame_manifest
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import clip_queue
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import prompts as prompts_lib
from cacovid_jax.models import checkpoints, generation, processors
from cacovid_jax.policy import loading
from tests.evals import tiny
from tests.models import mrope_loop

FRAMES, NEW = 3, 2
# Tokens of 8 pixels: 4 x 4 and 4 x 6 of them fit as they are.
PIXELS = dict(min_pixels=12 * 64, max_pixels=24 * 64)
SQUARE, WIDE = (2, 4, 4), (2, 4, 6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tiny.write_qwen_checkpoint(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Returns a folder of a square, a wide, a square and a broken clip."""
  data = tmp_path_factory.mktemp("shapes")
  tiny.write_data(data, num_clips=4, sizes=((32, 32), (32, 48)))
  (data / "decisive.jsonl").unlink()
  (data / "videos" / "test3.mp4").write_bytes(b"no video")
  return data


@pytest.fixture(scope="module")
def request_of(directory, data):
  def make(workdir, **changes):
    fields = dict(
      data=str(data),
      checkpoint=directory,
      methods=("uniform",),
      ratios=(0.25,),
      num_frames=FRAMES,
      batch_size=4,
      max_new_tokens=NEW,
      num_examples=2,
      **PIXELS,
    )
    return tiny.experiment(workdir, **fields | changes)

  return make


@pytest.fixture(scope="module")
def finished(request_of, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("work")
  out = evaluation.evaluate(request_of(workdir))
  lines = (workdir / "answers.jsonl").read_text().splitlines()
  return workdir, out, [json.loads(line) for line in lines[1:]]


def test_one_table_of_all_grids(finished):
  workdir, out, lines = finished
  assert out["grid"] == [
    # The broken clip is counted with the shape that most clips have.
    {"grid": [2, 4, 4], "clips": 3, "questions": 6},
    {"grid": [2, 4, 6], "clips": 1, "questions": 2},
  ]
  assert [entry["video"] for entry in out["unreadable"]] == ["videos/test3.mp4"]
  # 32 and 48 tokens, a quarter of each.
  assert out["vanilla"]["n"] == 8
  assert out["vanilla"]["kept_tokens"] == (6 * 32 + 2 * 48) / 8
  cell = out["methods"]["uniform"]["0.25"]
  assert (cell["kept_tokens"], cell["equivalent_ratio"]) == (9, 0.25)
  timings = json.loads((workdir / "timings.json").read_text())
  # To embed, to answer whole prompts, to select and to answer; of each grid.
  assert (timings["grids"], timings["programs"]) == (2, 2 * 4)
  named = out["provenance"]["settings"]["preprocessing"]
  assert "min_pixels=768" in named and "max_pixels=1536" in named
  page = (workdir / "report.html").read_text()
  assert page.count("<article") == 2


def test_batches_hold_clips_of_one_grid(finished):
  _, _, lines = finished
  vanilla = [line for line in lines if line["method"] == "vanilla"]
  # Square clips first, as the first question is about one; then the wide one.
  asked = [(line["question"], line["of"], line["kept"]) for line in vanilla]
  assert asked == [
    *[(f"test{clip}-{i}", 32, 32) for clip in (0, 2, 3) for i in (0, 1)],
    *[(f"test1-{i}", 48, 48) for i in (0, 1)],
  ]
  for line in lines:
    assert line["score"] == float(line["letter"] == line["answer"])
    assert line["category"] in ("Colour", "Order")
    assert line["duration"] in ("short", "medium", "long")
  assert [line["fault"] for line in vanilla if "fault" in line] == [
    "unreadable",
    "unreadable",
  ]


def test_lengths_of_prompts_count_what_is_not_video(
  finished, request_of, tmp_path
):
  _, out, lines = finished
  experiment = request_of(tmp_path)
  questions = evaluation.load_benchmark(experiment).questions
  # Of a prompt with one video token, all others are not the video's.
  encode = experiment.checkpoint.tokenizer.encode_prompt
  rest = {one.id: encode(one.prompt, 1).length - 1 for one in questions}
  usable = [line for line in lines if "fault" not in line]
  assert len(usable) < len(lines)
  for line in usable:
    assert line["beside_video"] == rest[line["question"]]
  whole = [
    x["of"] + rest[x["question"]] for x in usable if x["kept"] == x["of"]
  ]
  assert out["vanilla"]["prompt_tokens"] == pytest.approx(np.mean(whole))


@pytest.mark.parametrize("clip,grid", [("test2", SQUARE), ("test1", WIDE)])
def test_answers_are_those_of_the_model_alone(
  finished, directory, data, clip, grid
):
  """One question, its clip and nothing else: no batch, no padding."""
  _, _, lines = finished
  checkpoint = checkpoints.load(directory)
  model, tokenizer = checkpoint.model, checkpoint.tokenizer
  question = next(
    q for q in benchmarks.load(data, "test").questions if q.id == f"{clip}-1"
  )
  path = data / "videos" / f"{clip}.mp4"
  processor = processors.Qwen2_5VLProcessor(
    patch_size=4,
    mean=tuple(tiny.QWEN_STATISTICS["image_mean"]),
    std=tuple(tiny.QWEN_STATISTICS["image_std"]),
    **PIXELS,
  )
  # Eight frames in a second, three of them shown: a slice lasts 2/3 s.
  shown = video.read_frames(path, frames.eval_linspace(8, FRAMES))
  inputs = model.tower_inputs(processor(shown, fps=FRAMES / 1.0))
  assert inputs.grid == grid
  num_video = math.prod(grid)
  prompt = tokenizer.encode_prompt(question.prompt, num_video)
  positions, following = mrope_loop.positions(
    prompt.ids, model.config.video_token_id, grid, 2 / 3, 2, "4.50"
  )
  index = simple.even_positions(num_video, num_video // 4)
  dropped = set(range(num_video)) - set(index.tolist())
  rows = np.array(
    [i for i in range(prompt.length) if i - prompt.video_rows[0] not in dropped]
  )

  @jax.jit
  def answers(params, inputs):
    features = model.encode(params, inputs).features
    x = model.embed_prompt(
      params, jnp.asarray(prompt.ids), features, prompt.video_rows
    )
    return [
      generation.greedy(
        model,
        params,
        x[kept][None],
        jnp.asarray(positions[:, kept], jnp.int32)[None],
        jnp.array([len(kept)]),
        jnp.array([following]),
        max_new_tokens=NEW,
        eos_ids=checkpoint.eos_ids,
        pad_id=checkpoint.pad_id,
      )[0]
      for kept in (np.arange(prompt.length), rows)
    ]

  expected = [
    tokenizer.decode(ids).strip() for ids in answers(checkpoint.params, inputs)
  ]
  found = {
    line["method"]: line["text"]
    for line in lines
    if line["question"] == question.id
  }
  assert [found["vanilla"], found["uniform"]] == expected
  assert all(expected)


def test_the_same_command_again_decodes_no_size(
  finished, request_of, monkeypatch
):
  """Sizes are those of the frame manifest; only the broken clip is tried."""
  workdir, out, _ = finished
  opened = []
  size = video.frame_size
  monkeypatch.setattr(
    video, "frame_size", lambda path, limits: (opened.append(path), size(path))
  )
  before = (workdir / "results.json").read_bytes()
  changes = {"data.decode": "in_process", "num_examples": 0}
  again = evaluation.evaluate(request_of(workdir, **changes))
  assert (workdir / "results.json").read_bytes() == before and again == out
  assert len(opened) == 1 and opened[0].endswith("test3.mp4")


def test_other_pixels_are_another_run(finished, request_of):
  workdir, _, _ = finished
  with pytest.raises(errors.UserError, match="differs in .*preprocessing"):
    evaluation.evaluate(request_of(workdir, max_pixels=23 * 64))


def test_a_policy_is_validated(request_of, directory, tmp_path):
  checkpoint = checkpoints.load(directory)
  path = tiny.write_policy(tmp_path / "policy", checkpoint)
  policy = loading.load_policy(path, checkpoint)
  validate = evaluation.validator(
    request_of(tmp_path).replace(
      {"validation.num_questions": 2, "validation.ratio": 0.25}
    )
  )
  found = validate(policy.module, policy.params)
  assert 0 <= found["accuracy"] <= 1
  assert validate(policy.module, policy.params) == found


def source_of(data, directory, **options):
  checkpoint = checkpoints.load(directory)
  return tiny.open_store(
    str(data),
    checkpoint.model,
    checkpoint.params,
    checkpoint.model.read_processor(directory).with_paper_bounds(**PIXELS),
    num_frames=FRAMES,
    **options,
  )


def test_cached_clips_keep_their_seconds(data, directory, tmp_path):
  cache = feature_cache.FeatureCache(tmp_path / "cache")
  found = []
  for _ in range(2):
    with source_of(data, directory, cache=cache) as source:
      found.append(source["videos/test1.mp4"])
      assert source.grid_of("videos/test1.mp4") == WIDE
  first, second = found
  np.testing.assert_array_equal(first.features, second.features)
  assert first.second_per_grid_t == second.second_per_grid_t
  assert second.second_per_grid_t == pytest.approx(2 / 3)


def test_clips_of_unknown_shape_can_be_decoded_ahead(data, directory):
  names = [f"videos/test{clip}.mp4" for clip in range(4)]
  with source_of(data, directory) as source:
    source.prefetch(iter(names))
    found = [source[name].features.shape[0] for name in names]
  assert found == [32, 48, 32, 32]


def test_a_clip_that_changes_its_shape_cannot_be_used(
  data, directory, monkeypatch
):
  with source_of(data, directory) as source:
    source.survey(["videos/test0.mp4", "videos/test1.mp4"])
    monkeypatch.setitem(source._grids, "videos/test1.mp4", SQUARE)
    clip = source["videos/test1.mp4"]
  assert clip.fault == "unreadable" and clip.features.shape[0] == 32


def test_no_clip_at_all_is_one_line(data, directory):
  with source_of(data, directory) as source:
    with pytest.raises(errors.UserError, match="none of the 2 clips") as error:
      source.survey(["videos/test3.mp4", "videos/nowhere.mp4"])
  assert "videos/test3.mp4, unreadable" in str(error.value)


def test_what_a_given_manifest_could_not_read_is_not_asked(
  data, directory, tmp_path
):
  """A grid needs no file where the manifest tells the size."""
  given = tmp_path / "frames.jsonl"
  own = frame_manifest.FrameManifest(given, num_frames=FRAMES)
  with source_of(data, directory, manifest=own) as source:
    source["videos/test1.mp4"], source["videos/test3.mp4"]
  manifest = frame_manifest.FrameManifest(
    tmp_path / "own.jsonl", num_frames=FRAMES, given=given
  )
  with source_of(tmp_path, directory, manifest=manifest) as source:
    source.survey(["videos/test3.mp4", "videos/test1.mp4"])
    assert source.grid_of("videos/test1.mp4") == WIDE
    assert source["videos/test3.mp4"].fault == "unreadable"
    # Clips without a shape of their own are shown as the others are.
    assert source["videos/test3.mp4"].features.shape[0] == 48


def test_a_batch_of_two_grids_is_a_mistake_of_the_caller(data, directory):
  checkpoint = checkpoints.load(directory)
  questions = benchmarks.load(data, "test").questions
  with source_of(data, directory) as source:
    engine = engine_lib.Engine(
      checkpoint,
      source,
      questions,
      engine_lib.Settings(num_frames=FRAMES, batch_size=4, max_new_tokens=NEW),
    )
    assert engine.grid == SQUARE
    with pytest.raises(ValueError, match="several grids"):
      engine.batch(questions[:4])
    # A budget that one of the grids cannot hold is told before anything.
    evaluator = evaluator_lib.Evaluator(engine)
    uniform = methods_lib.Method.parse("uniform")
    conditions = methods_lib.conditions([uniform], (0.03,), (0,))
    with pytest.raises(errors.UserError, match="keeps no token"):
      evaluator.run(questions, conditions, answer_log.AnswerLog(None, {}))
    assert not engine.seconds


def test_prompts_of_any_number_of_tokens(directory, checkpoint, data):
  """Of both models: as if they were made for the clip."""
  questions = benchmarks.load(data, "test").questions
  for found in (checkpoint, checkpoints.load(directory)):
    prompts = prompts_lib.Prompts(found, questions)
    for question in questions[:2]:
      for num_video in (1, 48):
        made = found.tokenizer.encode_prompt(question.prompt, num_video)
        prompt = prompts.prompt(question.id, (1, 1, num_video))
        np.testing.assert_array_equal(prompt.ids, made.ids)
        np.testing.assert_array_equal(prompt.video_rows, made.video_rows)
        assert len(prompt.video_rows) == num_video
        start, end = prompts_lib.question_span(prompt, found.tokenizer)
        text = found.tokenizer.decode(prompt.ids[start:end])
        assert text.strip() == question.prompt.strip()
  short = dataclasses.replace(checkpoints.load(directory))
  short.tokenizer.max_length = 60
  with pytest.raises(errors.UserError, match="the model takes 60"):
    prompts_lib.Prompts(short, questions, grid_of=lambda _: (1, 1, 48))


def test_pixels_of_a_model_with_one_size_are_refused(
  request_of, checkpoint, checkpoint_dir
):
  request = request_of("w", checkpoint=checkpoint_dir)
  with pytest.raises(errors.UserError, match="frames of one size"):
    clip_queue.open_queue(request)
  with pytest.raises(errors.UserError, match="min_pixels is -1"):
    request_of("w", min_pixels=-1)
  with pytest.raises(errors.UserError, match="workers.*in_process"):
    request_of("w", **{"data.decode": "threads"})


def test_a_clip_that_is_all_width_is_marked_and_stops_nothing(
  data, directory, tmp_path
):
  shutil.copy(data / "videos" / "test1.mp4", tmp_path / "wide.mp4")
  # 202 times as long as wide; the model's processor takes 200.
  tiny.write_clip(tmp_path / "odd.mp4", seed=0, num_frames=2, size=(16, 3232))
  with source_of(tmp_path, directory) as source:
    source.survey(["odd.mp4", "wide.mp4"])
    odd, wide = source["odd.mp4"], source["wide.mp4"]
  assert (odd.fault, wide.fault) == ("bad shape", "")
  assert not odd.features.any() and odd.features.shape == wide.features.shape
  with source_of(tmp_path, directory, grid=WIDE) as source:
    assert source["odd.mp4"].fault == "bad shape"
