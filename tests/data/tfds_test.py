"""TFDS files without TensorFlow, read back by index and by Grain."""

import dataclasses
import os
import pathlib
import pickle
import sys

import grain
import pytest
import tensorflow_datasets as tfds

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tfds as tfds_lib
from cacovid_jax.data import video

from . import clips

ROWS = [
  question_lib.Question(
    id=f"q{i}",
    video="videos/clip.mp4",
    question=f"Wie heißt Nr. {i}?",
    options=("eins", "") if i % 2 else (),
    answer="A",
    problem_type="multiple choice" if i % 2 else "free-form",
    duration="short" if i % 3 else None,
    category="" if i % 3 else None,
    groups=(("domain", "Wörter"), ("", "x")) if i % 2 else (),
    source="test",
    prompt=f"Wie heißt\nNr. {i}?",
  )
  for i in range(7)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  tfds_lib.prepare({"train": ROWS, "test": ROWS[:2]}, folder)
  return folder


def test_rows_come_back_equal_and_in_order(folder):
  source = tfds_lib.open_source(folder, "train")
  assert len(source) == 7
  assert list(source) == ROWS
  assert source[-1] == ROWS[-1]
  assert source.__getitems__([4, 1]) == [ROWS[4], ROWS[1]]
  assert list(tfds_lib.open_source(folder, "test")) == ROWS[:2]
  assert source.clip(0) == b""
  with pytest.raises(IndexError):
    source[7]


def test_tensorflow_is_not_imported(folder):
  tfds_lib.open_source(folder, "train")[0]
  assert "tensorflow" not in sys.modules


def test_a_source_can_be_pickled(folder):
  source = tfds_lib.open_source(folder, "train")
  assert list(pickle.loads(pickle.dumps(source))) == ROWS


@pytest.mark.parametrize("worker_count", [0, 2])
def test_grain_reads_it_with_any_number_of_workers(folder, worker_count):
  source = tfds_lib.open_source(folder, "train")
  sampler = grain.samplers.IndexSampler(
    num_records=len(source), num_epochs=1, shuffle=True, seed=3
  )
  loader = grain.DataLoader(
    data_source=source, sampler=sampler, worker_count=worker_count
  )
  got = list(loader)
  assert sorted(row.id for row in got) == sorted(row.id for row in ROWS)
  expected = [ROWS[sampler[i].record_key] for i in range(len(ROWS))]
  assert got == expected


def test_preparing_again_writes_nothing_and_other_rows_are_refused(folder):
  def times():
    return {
      os.path.join(base, name): os.stat(os.path.join(base, name)).st_mtime_ns
      for base, _, names in os.walk(folder)
      for name in names
      if "array_record" in name
    }

  before = times()
  tfds_lib.prepare({"train": ROWS, "test": ROWS[:2]}, folder)
  assert times() == before and before
  with pytest.raises(errors.UserError, match="prepared from other rows"):
    tfds_lib.prepare({"train": ROWS[:3]}, folder)


def test_clips_can_be_embedded(tmp_path):
  (tmp_path / "videos").mkdir()
  path = clips.write(tmp_path / "videos" / "clip.mp4", 6)
  tfds_lib.prepare(
    {"train": ROWS}, tmp_path / "tfds", media_root=tmp_path, embed=True
  )
  data = tfds_lib.open_source(tmp_path / "tfds", "train").clip(3)
  assert data == path.read_bytes()
  clip = video.decode(data, lambda n, s: [0, 5])
  assert clips.numbers(clip.frames) == [0, 5]


def test_what_cannot_be_prepared_or_opened(folder, tmp_path):
  with pytest.raises(errors.UserError, match="has no rows"):
    tfds_lib.prepare({"train": []}, tmp_path)
  with pytest.raises(errors.UserError, match="only with a media_root"):
    tfds_lib.prepare({"train": ROWS}, tmp_path, embed=True)
  with pytest.raises(video.VideoError, match="missing"):
    tfds_lib.prepare(
      {"train": ROWS}, tmp_path / "a", media_root=tmp_path, embed=True
    )
  with pytest.raises(errors.UserError, match="run prepare first"):
    tfds_lib.open_source(tmp_path / "b", "train")
  with pytest.raises(errors.UserError, match="there are test, train"):
    tfds_lib.open_source(folder, "validation")


@pytest.mark.parametrize("name", ["video_r1", "video_r1_filtered"])
def test_training_sets_open_by_folder_and_by_name(tmp_path, name):
  seen = []
  tfds_lib.prepare({"train": ROWS}, tmp_path, name=name, on_row=seen.append)
  assert seen == [1, 2, 3, 4, 5, 6, 7]
  folder = tmp_path / name / "1.1.0"
  builder = tfds.builder_from_directory(str(folder))
  (record,) = builder.as_data_source(split="train[1:2]")
  assert record["id"] == b"q1"
  assert record["options"] == [b"eins", b""]
  assert list(record["groups"]["facet"]) == [b"domain", b""]
  by_name = tfds.data_source(name, data_dir=str(tmp_path), split="train")
  assert [row["id"].decode() for row in by_name] == [row.id for row in ROWS]
  assert "tensorflow" not in sys.modules
  for place in (tmp_path, tmp_path / name):
    assert list(tfds_lib.open_source(place, "train")) == ROWS


def test_of_two_data_sets_in_a_folder_one_must_be_named(tmp_path):
  tfds_lib.prepare({"train": ROWS[:2]}, tmp_path, name="video_r1")
  tfds_lib.prepare({"train": ROWS[2:]}, tmp_path, name="video_r1_filtered")
  with pytest.raises(errors.UserError, match="video_r1 and video_r1_filtered"):
    tfds_lib.open_source(tmp_path, "train")
  got = tfds_lib.open_source(tmp_path / "video_r1_filtered", "train")
  assert list(got) == ROWS[2:]


def test_other_groups_are_other_rows(tmp_path):
  tfds_lib.prepare({"train": ROWS[:2]}, tmp_path)
  changed = [ROWS[0], dataclasses.replace(ROWS[1], groups=())]
  with pytest.raises(errors.UserError, match="prepared from other rows"):
    tfds_lib.prepare({"train": changed}, tmp_path)


def embed(tmp_path, **options):
  return tfds_lib.prepare(
    {"train": ROWS[:2]},
    tmp_path / "tfds",
    media_root=tmp_path,
    embed=True,
    **options,
  )


def test_other_clips_under_the_same_names_are_another_data_set(tmp_path):
  (tmp_path / "videos").mkdir()
  path = clips.write(tmp_path / "videos" / "clip.mp4", 6)
  embed(tmp_path)
  embed(tmp_path)
  clips.write(path, 7)
  with pytest.raises(errors.UserError, match="from other rows or clips"):
    embed(tmp_path)


def test_a_clip_that_no_record_holds_is_refused_unread(tmp_path, monkeypatch):
  (tmp_path / "videos").mkdir()
  path = clips.write(tmp_path / "videos" / "clip.mp4", 6)
  # A hole in the file: two gigabytes that take no room.
  os.truncate(path, 2**31)
  monkeypatch.setattr(tfds_lib.left_out, "content_hash", lambda path: 1 / 0)
  with pytest.raises(video.VideoError) as error:
    embed(tmp_path)
  assert "2147483648 bytes, where a record holds 1073741824" in str(error.value)
  assert "do not embed" in str(error.value)
  assert not (tmp_path / "tfds").exists()


def test_a_kill_at_any_time_leaves_all_or_nothing(tmp_path, monkeypatch):
  """The folder gets its name once data and fingerprint are both there."""
  final = tmp_path / "video_qa" / "1.1.0"
  real, seen = pathlib.Path.rename, []

  class Killed(BaseException):
    pass

  def rename(source, target):
    if os.fspath(target) != os.fspath(final):
      return real(source, target)
    seen.append(sorted(path.name for path in pathlib.Path(source).iterdir()))
    real(source, target)
    raise Killed

  monkeypatch.setattr(tfds_lib.tfds.core.utils.file_utils, "Path", pathlib.Path)
  monkeypatch.setattr(pathlib.Path, "rename", rename)
  with pytest.raises(Killed):
    tfds_lib.prepare({"train": ROWS}, tmp_path)
  assert "rows.blake2" in seen[0] and "dataset_info.json" in seen[0]
  monkeypatch.undo()
  # As if nothing had happened.
  tfds_lib.prepare({"train": ROWS}, tmp_path)
  assert list(tfds_lib.open_source(tmp_path, "train")) == ROWS
  (final / "rows.blake2").unlink()
  with pytest.raises(errors.UserError, match="does not tell which rows"):
    tfds_lib.prepare({"train": ROWS}, tmp_path)


def test_some_rows_of_a_source(folder):
  source = tfds_lib.open_source(folder, "train").take([5, 0, 3])
  assert len(source) == 3
  assert list(source) == [ROWS[5], ROWS[0], ROWS[3]]
  assert source[-1] == ROWS[3] and source.__getitems__([1]) == [ROWS[0]]
  assert list(pickle.loads(pickle.dumps(source)).take([2])) == [ROWS[3]]
  with pytest.raises(IndexError):
    source[3]
