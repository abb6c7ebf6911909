"""The benchmark on disk: same bytes, same rows, nothing overwritten."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest

from cacovid_jax import errors
from cacovid_jax import files as file_lib
from cacovid_jax.data import readers, video, video_stream
from cacovid_jax.data import tfds as tfds_lib
from cacovid_jax.synthetic import build, questions, render, world

CONFIG = build.BuildConfig(
  variant="sparse", seed=3, clips=(3, 1, 1, 0), questions_per_clip=2
)
ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("build") / "sparse"
  done = []
  build.build(CONFIG, folder, num_workers=1, on_clip=done.append)
  assert done == [1, 2, 3, 4, 5]
  return folder


def files(folder):
  """Returns {name: bytes} of what must not depend on the machine."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and "tfds" not in path.parts
  }


def splits(folder):
  rows = {"train": readers.read_video_r1(str(folder / "train.json"), folder)}
  for split in ("validation", "test"):
    rows[split] = readers.read_videomme(
      str(folder / f"{split}.parquet"), folder, style="video-r1"
    )
  return rows


def test_two_workers_write_the_same_bytes_as_one(folder, tmp_path):
  other = tmp_path / "other"
  build.build(CONFIG, other, num_workers=2)
  assert files(other) == files(folder)
  for split, rows in splits(folder).items():
    source = tfds_lib.open_source(str(other / "tfds"), split)
    assert list(source) == list(rows)


def test_a_clip_that_a_child_cannot_draw_is_named(tmp_path, monkeypatch):
  def fail(function, path, *args, limits, **kwargs):
    assert limits.timeout_s is None
    raise video_stream.VideoError(path, "crashed", "the process ended")

  monkeypatch.setattr(build.decode_workers, "run", fail)
  named = r"sparse_train_00000.mp4: crashed \(.*\); try --num_workers=1"
  with pytest.raises(errors.UserError, match=named):
    build.build(CONFIG, tmp_path / "other", num_workers=2)


def test_the_same_frames_are_the_same_bytes(tmp_path):
  # The clip that told: with the encoder's macroblock tree, twelve writings of
  # it gave five different files.
  scene = world.sample_scene(
    np.random.default_rng((0, 2, 1)), world.VARIANTS["dense"]
  )
  frames = list(render.clip(scene, 64))
  written = set()
  for number in range(6):
    path = tmp_path / f"{number}.mp4"
    build.encode(str(path), frames)
    written.add(path.read_bytes())
  assert len(written) == 1


def test_rows_and_clips_are_complete(folder):
  assert len(list((folder / "videos").glob("*.mp4"))) == 5
  assert not (folder / "test_fresh.parquet").exists()
  rows = splits(folder)
  decisive = {}
  for line in (folder / "decisive.jsonl").read_text().splitlines():
    entry = json.loads(line)
    decisive[entry["question_id"]] = entry["tokens"]
  assert sum(map(len, rows.values())) == len(decisive) == 10
  for split, found in rows.items():
    for row in found:
      assert row.problem_type == "multiple choice" and row.answer in "ABCD"
      assert len(row.options) == 4
      assert decisive[row.id]
      clip = video.decode(
        video.safe_path(str(folder), row.video),
        lambda count, duration: np.arange(count),
      )
      assert clip.frames.shape[1:] == (112, 112, 3)
      number = int(pathlib.Path(row.video).stem.rsplit("_", 1)[1])
      duration = ("short", "medium", "long")[number % 3]
      assert len(clip.frames) == build.DURATIONS[duration]
      assert row.duration == (None if split == "train" else duration)


def test_captions_tell_what_the_scene_of_their_clip_shows(folder):
  lines = map(json.loads, (folder / "captions.jsonl").read_text().splitlines())
  captions = {line["clip"]: line["captions"] for line in lines}
  assert len(captions) == 5
  scene, _ = build.draw(CONFIG, "test", 0)
  facts = questions.Facts(scene)
  names = {facts.name(obj): obj for obj in facts.unique((0, 1, 2))}
  assert any(len(found) == 2 for found in captions.values())
  assert all(len(set(found)) == len(found) for found in captions.values())
  for caption in captions["sparse_test_00000"]:
    told = re.findall(r"a (\w+ \w+ \w+)(?: in the (\w+))?[,.]", caption)
    assert len(told) == min(4, len(names) - 1)
    objects = [names[name] for name, _ in told]
    onsets = scene.life[objects, 0].tolist()
    assert onsets == sorted(onsets)
    for obj, (_, place) in zip(objects, told, strict=True):
      x, y = scene.path[obj].mean(0) / world.SMALL.image_size
      side = f"{'north' if y < 0.5 else 'south'}{'west' if x < 0.5 else 'east'}"
      assert place in ("", side)


def test_rows_ask_what_the_scene_of_their_clip_answers(folder):
  rng = np.random.default_rng((CONFIG.seed, build.SPLITS.index("test"), 0))
  scene = world.sample_scene(rng, world.VARIANTS["sparse"])
  asked = questions.sample_questions(rng, scene, 2)
  rows = splits(folder)["test"]
  for row, question in zip(rows, asked, strict=True):
    assert row.question == question.text
    assert row.options == question.options
    assert row.answer == questions.LETTERS[question.answer]
    assert row.category == question.kind
  # The clip shows the scene, as far as the codec lets it.
  clip = video.decode(
    video.safe_path(str(folder), rows[0].video),
    lambda count, duration: np.array([0, count - 1]),
  )
  for shown, time in zip(clip.frames, (0.0, 15.0), strict=True):
    drawn = render.frame(scene, time, render.grain(scene)).astype(int)
    assert np.abs(shown.astype(int) - drawn).mean() < 6


def test_first_clips_are_shared_by_larger_builds(folder):
  told, rows = build.make_clip(CONFIG, str(folder), "train", 0)
  larger = build.BuildConfig(
    variant="sparse", seed=3, clips=(9, 9, 9, 9), questions_per_clip=2
  )
  told_again, again = build.make_clip(larger, str(folder), "train", 0)
  assert told == told_again
  assert [row["question"] for row in rows] == [row["question"] for row in again]


def test_splits_share_no_scene(folder):
  shown = [
    path.read_bytes() for path in sorted((folder / "videos").glob("*.mp4"))
  ]
  assert len(set(shown)) == len(shown)


def test_a_finished_build_is_left_alone(folder):
  def fail(*at):
    raise AssertionError(at)

  before = files(folder)
  assert build.build(CONFIG, folder, on_clip=fail) == str(folder)
  assert files(folder) == before


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"seed": 4}, "seed differ"),
    ({"variant": "dense"}, "variant differ"),
    ({"clips": (3, 1, 2, 0)}, "clips differ"),
    ({"questions_per_clip": 3}, "questions_per_clip differ"),
  ],
)
def test_another_build_is_refused_and_harms_nothing(folder, changes, named):
  fields = dict(
    variant="sparse", seed=3, clips=(3, 1, 1, 0), questions_per_clip=2
  )
  before = files(folder)
  with pytest.raises(errors.UserError, match=named):
    build.build(build.BuildConfig(**fields | changes), folder)
  assert files(folder) == before


def test_a_second_build_is_refused_and_the_first_unharmed(folder, tmp_path):
  other, refused = tmp_path / "other", []

  def begin_another(done):
    with pytest.raises(errors.UserError, match="or give another --out") as told:
      build.build(CONFIG, other, num_workers=1)
    refused.append(str(told.value))

  build.build(CONFIG, other, num_workers=1, on_clip=begin_another)
  assert files(other) == files(folder)
  assert len(refused) == 5
  assert f"another process is writing to {other} (process" in refused[0]
  # What is there can be used meanwhile.
  with file_lib.claim(folder / "prepare"):
    assert build.build(CONFIG, folder) == str(folder)


def test_a_build_that_was_stopped_is_done_again(folder, tmp_path):
  other = tmp_path / "stopped"
  (other / "videos").mkdir(parents=True)
  # Of another seed, say: without a manifest nobody knows.
  (other / "videos" / "sparse_train_00000.mp4").write_bytes(b"half a clip")
  build.build(CONFIG, other, num_workers=1)
  assert files(other) == files(folder)


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"variant": "crowded"}, "no variant 'crowded'; there are"),
    ({"clips": (0, 0, 0, 0)}, "one number per split"),
    ({"clips": (-1, 1, 1, 1)}, "one number per split"),
    ({"questions_per_clip": 0}, "at least 1"),
  ],
)
def test_a_build_of_nothing_is_refused(fields, named):
  with pytest.raises(errors.UserError, match=named):
    build.BuildConfig(**fields)


@pytest.fixture
def fresh_hash():
  build.generator_hash.cache_clear()
  yield build.generator_hash
  build.generator_hash.cache_clear()


def test_the_generators_hash_is_of_what_it_makes(folder, fresh_hash):
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["generator_hash"] == fresh_hash()
  # Of the grid that decisive tokens are places of.
  assert manifest["num_frames"] == 16


def _brighter(clip, scene, length):
  for number, frame in enumerate(clip(scene, length)):
    yield frame ^ (number == length - 1)


@pytest.mark.parametrize("changed", ["pictures", "questions", "rate", "scenes"])
def test_the_generators_hash_tells_changes(changed, fresh_hash, monkeypatch):
  before = fresh_hash()
  fresh_hash.cache_clear()
  if changed == "pictures":  # One bit of the last frame's pixels.
    clip = functools.partial(_brighter, build.render.clip)
    monkeypatch.setattr(build.render, "clip", clip)
  elif changed == "questions":
    ask = build.questions.sample_questions
    monkeypatch.setattr(
      build.questions, "sample_questions", lambda *given: ask(*given)[:-1]
    )
  elif changed == "rate":
    monkeypatch.setattr(build, "FRAMES_PER_SECOND", 10)
  else:
    monkeypatch.setattr(build, "SPLITS", ("test", "train"))
  assert fresh_hash() != before


def test_parquet_has_the_columns_of_videomme(folder):
  table = pyarrow.parquet.read_table(folder / "test.parquet")
  assert table.column_names == [
    "video_id",
    "duration",
    "domain",
    "sub_category",
    "url",
    "videoID",
    "question_id",
    "task_type",
    "question",
    "options",
    "answer",
  ]


def command(*flags):
  return subprocess.run(
    [sys.executable, "-m", "cacovid_jax.prepare", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command_builds_variants_side_by_side(tmp_path):
  done = command(
    f"--out={tmp_path}",
    "--variants=dense,sparse,full",
    "--clips=1,0,1,0",
    "--num_workers=1",
  )
  assert done.returncode == 0, done.stderr
  for variant in ("dense", "sparse", "full"):
    assert (tmp_path / variant / "manifest.json").is_file()
    assert f"{tmp_path / variant}: ready" in done.stdout
  refused = command(f"--out={tmp_path}", "--clips=2,0,1,0")
  assert refused.returncode == 2
  assert refused.stderr.splitlines()[-1].startswith("error:")
  assert "clips differ" in refused.stderr
  refused = command(f"--out={tmp_path}", "--variants=")
  assert refused.returncode == 2 and "add --variants or" in refused.stderr
