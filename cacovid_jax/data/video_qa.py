"""Video questions as a TFDS data set in array_record files, without TensorFlow.

`prepare` writes rows of `Question` once; `open_source` gives them back by
index, which is what Grain needs. A record holds the clip's path, or the encoded
clip itself where `embed` asks for it (short clips only: records are read
whole).
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from cacovid_jax import errors
from cacovid_jax.data import questions, video

_FINGERPRINT = "rows.blake2"
_TEXTS = (
  "id",
  "video",
  "question",
  "answer",
  "problem_type",
  "duration",
  "category",
  "source",
  "prompt",
)
# Absent texts are stored as this, since "" may be a value.
_NONE = "\0"


class VideoQa(tfds.core.GeneratorBasedBuilder):
  """Questions about videos; one record is one question."""

  VERSION = tfds.core.Version("1.0.0")
  # There are no checksums beside this file to look for. The base class's search
  # imports importlib_resources, which newer releases of etils do not install.
  code_path = None

  def __init__(self, *, splits=None, media_root=None, embed=False, **kwargs):
    """Sets the rows to write.

    Args:
      splits: split name -> rows; None if the files are there already.
      media_root: folder of the clips, needed to embed them.
      embed: whether records hold the encoded clips.
      **kwargs: of the base class (data_dir, file_format).
    """
    # Before the base class, which calls _info().
    self._splits = splits or {}
    self._media_root, self._embed = media_root, embed
    super().__init__(**kwargs)

  def _info(self):
    text = tfds.features.Text()
    features = {name: text for name in _TEXTS}
    features["options"] = tfds.features.Sequence(tfds.features.Text())
    features["clip"] = tfds.features.Scalar(np.object_)
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,  # Rows keep their order.
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      name: self._generate_examples(rows) for name, rows in self._splits.items()
    }

  def _generate_examples(self, rows):
    for index, row in enumerate(rows):
      yield index, self._record(row)

  def _record(self, row: questions.Question) -> dict:
    record = {name: getattr(row, name) for name in _TEXTS}
    record = {k: _NONE if v is None else v for k, v in record.items()}
    record["options"] = list(row.options)
    record["clip"] = b""
    if self._embed:
      path = video.safe_path(self._media_root, row.video)
      try:
        with open(path, "rb") as f:
          record["clip"] = f.read()
      except OSError as error:
        raise video.VideoError(path, "missing", error.strerror) from None
    return record


class QuestionSource:
  """Random access to a prepared split: `len`, `[i]`; can be pickled."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index) -> questions.Question:
    return _question(self._source[self._place(index)])

  def __getitems__(self, indices) -> list[questions.Question]:
    places = [self._place(index) for index in indices]
    return [_question(record) for record in self._source.__getitems__(places)]

  def __iter__(self):
    return (self[index] for index in range(len(self)))

  def clip(self, index) -> bytes:
    """Returns the encoded clip of a row; empty if clips are not embedded."""
    return bytes(self._source[self._place(index)]["clip"])

  def _place(self, index) -> int:
    index = int(index)
    if not -len(self) <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    return index % len(self)


def prepare(
  splits: Mapping[str, Sequence[questions.Question]],
  data_dir,
  *,
  media_root=None,
  embed: bool = False,
) -> tfds.core.DatasetBuilder:
  """Writes the rows as array_record files, unless the same rows are there.

  Args:
    splits: split name -> rows, at least one row each.
    data_dir: the files go to `data_dir`/video_qa/1.0.0.
    media_root: folder of the clips, needed to embed them.
    embed: whether records hold the encoded clips.
  """
  for name, rows in splits.items():
    if not len(rows):
      raise errors.UserError(f"split {name!r} has no rows; leave it out")
  if embed and media_root is None:
    raise errors.UserError("clips can be embedded only with a media_root")
  builder = VideoQa(
    splits=splits,
    media_root=media_root,
    embed=embed,
    data_dir=os.fspath(data_dir),
    file_format="array_record",
  )
  fingerprint = _fingerprint(splits, embed)
  path = os.path.join(os.fspath(builder.data_dir), _FINGERPRINT)
  if os.path.isdir(builder.data_dir):
    try:
      with open(path, encoding="utf-8") as f:
        present = f.read().strip()
    except FileNotFoundError:
      present = "nothing"  # An older or foreign folder.
    if present != fingerprint:
      raise errors.UserError(
        f"{builder.data_dir}: was prepared from other rows; delete the folder"
        " or give another data_dir"
      )
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):  # It prints, not logs.
    builder.download_and_prepare()
  with open(path, "w", encoding="utf-8") as f:
    f.write(fingerprint + "\n")
  return builder


def open_source(data_dir, split: str) -> QuestionSource:
  """Returns random access to the rows of a split that `prepare` wrote."""
  folder = os.path.join(os.fspath(data_dir), VideoQa.name, str(VideoQa.VERSION))
  if not os.path.isfile(os.path.join(folder, _FINGERPRINT)):
    raise errors.UserError(
      f"{folder}: holds no prepared questions; run prepare first"
    )
  builder = VideoQa(data_dir=os.fspath(data_dir), file_format="array_record")
  names = sorted(builder.info.splits)
  if split not in names:
    raise errors.UserError(
      f"{folder}: no split {split!r}; there are {', '.join(names)}"
    )
  return QuestionSource(builder.as_data_source(split=split))


def _fingerprint(splits, embed: bool) -> str:
  digest = hashlib.blake2b(digest_size=16)
  for name, rows in sorted(splits.items()):
    digest.update(json.dumps([name, embed]).encode())
    for row in rows:
      values = [getattr(row, field) for field in _TEXTS] + list(row.options)
      digest.update(json.dumps(values).encode())
  return digest.hexdigest()


def _string(value: bytes | str) -> str | None:
  text = value.decode() if isinstance(value, bytes) else value
  return None if text == _NONE else text


def _question(record: dict) -> questions.Question:
  return questions.Question(
    options=tuple(_string(option) for option in record["options"]),
    **{name: _string(record[name]) for name in _TEXTS},
  )
