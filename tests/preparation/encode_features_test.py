"""Features made ahead: who encodes what, and what training then skips."""

import os

import av
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import left_out
from cacovid_jax.data import question as question_lib
from cacovid_jax.inference import clip_queue, clips
from cacovid_jax.models import checkpoints
from cacovid_jax.preparation import encode_features
from cacovid_jax.training import run as run_lib
from tests.evals import tiny
from tests.training import tiny as tiny_training

NUM_CLIPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder of three clips."""
  folder = tmp_path_factory.mktemp("encoding")
  for number in range(NUM_CLIPS):
    tiny.write_clip(folder / "clips" / f"{number}.mp4", seed=number)
  return folder


@pytest.fixture(scope="module")
def checkpoint():
  return checkpoints.load(str(experiment_lib.SHIPPED_MODEL), jnp.float32)


def rows(names=("0.mp4", "1.mp4", "2.mp4", "1.mp4")):
  """Returns questions about the clips; two are about the same one."""
  return [
    question_lib.Question(
      id=f"q{number}",
      video=name,
      question="?",
      options=("x", "y"),
      answer="A",
      prompt="What colour is it?",
    )
    for number, name in enumerate(names)
  ]


def run_config(folder, cache):
  """Returns the config of two epochs of four questions."""
  return tiny_training.config(
    **{
      "model.path": str(experiment_lib.SHIPPED_MODEL),
      "total_steps": 8,
      "videos_per_step": 1,
      "data.root": str(folder),
      "data.media": "clips",
      "data.feature_cache": str(cache),
      "data.decode": "in_process",  # Clips that are opened are counted here.
    }
  )


def make(folder, checkpoint, cache, questions=None):
  """Returns a run of it, one question after the other."""
  config = run_config(folder, cache)
  experiment = tiny_training.experiment_of(config, cache, checkpoint=checkpoint)
  return run_lib.Run(experiment, questions=questions or rows())


@pytest.fixture
def size(folder, checkpoint, tmp_path_factory):
  """Returns the bytes that a clip takes on disk.

  4 frames of 7 x 7 tokens, of 128 numbers in 4 bytes; what they are of; a
  checksum.
  """
  elsewhere = tmp_path_factory.mktemp("elsewhere")
  store = make(folder, checkpoint, elsewhere).store
  store.finish([store.load("0.mp4")])
  found = store.cached_bytes("0.mp4")
  assert 0 < found - 4 * 49 * 128 * 4 - 32 < 1000
  return found


@pytest.fixture
def opened(monkeypatch, size):
  """Returns the clips that were opened to decode, as they come."""
  names, real = [], av.open

  def noting(file, *args, **kwargs):
    names.append(os.path.basename(str(file)))
    return real(file, *args, **kwargs)

  monkeypatch.setattr(av, "open", noting)
  return names


@pytest.fixture
def encoded(monkeypatch):
  """Returns the number of clips of each run of the tower."""
  counts, real = [], clips.Tower.__call__

  def noting(self, names, inputs):
    counts.append(len(inputs))
    return real(self, names, inputs)

  monkeypatch.setattr(clips.Tower, "__call__", noting)
  return counts


def test_a_clip_is_decoded_in_the_first_epoch_of_the_first_run_only(
  folder, checkpoint, tmp_path, opened, encoded
):
  first = [
    np.asarray(batch.prompts.features)
    for batch, _ in make(folder, checkpoint, tmp_path).batches(0)
  ]
  assert len(first) == 8
  assert sorted(opened) == ["0.mp4", "1.mp4", "2.mp4"]
  assert sum(encoded) == NUM_CLIPS
  del opened[:], encoded[:]
  # Another run, which remembers nothing.
  second = [
    np.asarray(batch.prompts.features)
    for batch, _ in make(folder, checkpoint, tmp_path).batches(0)
  ]
  assert opened == [] and encoded == []
  np.testing.assert_array_equal(first, second)


def test_features_made_ahead_by_two_processes_are_those_of_training(
  folder, checkpoint, tmp_path, opened, encoded
):
  lazy, ahead = tmp_path / "lazy", tmp_path / "ahead"
  expected = [
    np.asarray(batch.prompts.features)
    for batch, _ in make(folder, checkpoint, lazy).batches(0)
  ]
  reports = []
  for index in range(2):
    run = make(folder, checkpoint, ahead)
    reports.append(
      encode_features.encode(
        run.store, run.questions, str(ahead), shard=(index, 2)
      )
    )
  assert [(r.num_clips, r.num_encoded) for r in reports] == [(2, 2), (1, 1)]
  del opened[:], encoded[:]
  run = make(folder, checkpoint, ahead)
  got = [np.asarray(batch.prompts.features) for batch, _ in run.batches(0)]
  assert opened == [] and encoded == []
  np.testing.assert_array_equal(got, expected)
  again = encode_features.encode(run.store, run.questions, str(ahead))
  assert (again.num_present, again.num_encoded) == (3, 0)
  assert opened == []


def test_clips_that_cannot_be_used_are_listed_once(
  folder, checkpoint, tmp_path
):
  (folder / "clips" / "bad.mp4").write_text("no clip")
  tiny.write_clip(folder / "clips" / "small.mp4", seed=0, size=(16, 32))
  asked = rows(("bad.mp4", "0.mp4", "gone.mp4", "small.mp4"))
  path = tmp_path / "quarantine.jsonl"
  for present in (0, 1):
    run = make(folder, checkpoint, tmp_path, asked)
    report = encode_features.encode(
      run.store, asked, str(tmp_path), rejected=left_out.RejectedClips(path)
    )
    assert report.num_present == present
    assert report.failed == {
      "bad.mp4": "unreadable",
      "gone.mp4": "missing",
      "small.mp4": "bad_shape",
    }
  assert len(path.read_text().splitlines()) == 3


def test_a_disk_without_room_is_refused_after_the_first_clip(
  folder, checkpoint, tmp_path, opened, monkeypatch, size
):
  run = make(folder, checkpoint, tmp_path)
  need = 2 * size

  class Usage:
    free = need - 1

  monkeypatch.setattr(encode_features.shutil, "disk_usage", lambda _: Usage)
  with pytest.raises(
    errors.UserError, match="2 more clips take 201.6 kB .100.8 kB each"
  ):
    encode_features.encode(
      run.store, run.questions, str(tmp_path), num_threads=0
    )
  assert len(opened) == 2  # One ahead.
  # With one byte more, a second start goes on to the end.
  Usage.free += 1
  report = encode_features.encode(run.store, run.questions, str(tmp_path))
  assert (report.num_present, report.num_encoded) == (1, 2)


@pytest.mark.parametrize(
  ("shard", "names"),
  [((0, 1), "abc"), ((0, 2), "ac"), ((1, 2), "b"), ((3, 4), "")],
)
def test_shares_are_disjoint_and_sorted_by_name(shard, names):
  found = encode_features.clips_of(rows(("b", "a", "c", "a")), shard)
  assert "".join(row.video for row in found) == names


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_shares_that_there_are_not(shard):
  with pytest.raises(errors.UserError, match="shard"):
    encode_features.clips_of(rows(), shard)


def test_room_is_counted_for_the_clips_of_all_shares(
  folder, checkpoint, tmp_path, monkeypatch, size
):

  class Usage:
    free = 2 * size - 1

  monkeypatch.setattr(encode_features.shutil, "disk_usage", lambda _: Usage)
  # Of three shares, each has one clip, and one also the clip that is missing,
  # which takes no room.
  asked = rows(("0.mp4", "1.mp4", "2.mp4", "gone.mp4"))
  run = make(folder, checkpoint, tmp_path, asked)

  def encode(index):
    return encode_features.encode(
      run.store, asked, str(tmp_path), shard=(index, 3), num_threads=0
    )

  # The first share is done, and leaves two clips to the others.
  with pytest.raises(errors.UserError, match="2 more clips take 201.6 kB"):
    encode(0)
  # Entries that are there are not counted again, whosever they are.
  Usage.free = 2 * size
  assert encode(1).num_encoded == 1
  Usage.free = size
  assert encode(2).num_encoded == 1
  Usage.free = 0
  assert [encode(index).num_present for index in range(3)] == [1, 1, 1]


def test_an_evaluation_takes_what_training_has_encoded(
  folder, checkpoint, tmp_path, opened
):
  """At one frame rule there is one entry, whoever asks."""
  run = make(folder, checkpoint, tmp_path)
  encode_features.encode(run.store, run.questions, str(tmp_path))
  del opened[:]
  experiment = tiny_training.experiment_of(
    run_config(folder, tmp_path), tmp_path, checkpoint=checkpoint
  )
  with clip_queue.open_queue(experiment) as store:
    clip = store["1.mp4"]
    assert opened == []
    (other,) = run.store.finish([run.store.load("1.mp4")])
    np.testing.assert_array_equal(clip.features, other.features)
    assert clip.frame_hash and clip.index_hash and not clip.fault
    # The frames of another rule are others.
  other = experiment.replace({"evals.frame_rule": "train_linspace_1fps"})
  with clip_queue.open_queue(other) as store:
    store["1.mp4"]
  assert opened == ["1.mp4"]
