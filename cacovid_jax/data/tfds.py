"""Video questions as TFDS data sets in array_record files, without TensorFlow.

`prepare` writes rows of `Question` once; `open_source` gives them back by
index, which is what Grain needs. A record holds the clip's path, or the encoded
clip itself where `embed` asks for it (short clips only: records are read whole,
and cannot be larger than `MAX_CLIP_BYTES`). The training sets have their own
names, for `tfds.builder_from_directory` and `tfds.data_source` as well.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cacovid_jax import errors, files
from cacovid_jax.data import left_out, video
from cacovid_jax.data import question as question_lib

# Records are protocol buffers, which end at 2 GiB.
MAX_CLIP_BYTES = 2**30

_FINGERPRINT = "rows.blake2"
_TEXTS = (
  "id video question answer problem_type duration category source prompt"
).split()
# Absent texts are stored as this, since "" may be a value.
_NONE = "\0"


class VideoQa(tfds.core.GeneratorBasedBuilder):
  """Questions about videos; one record is one question."""

  VERSION = tfds.core.Version("1.1.0")
  RELEASE_NOTES = {"1.1.0": "Further groupings of a question."}
  # There are no checksums beside this file to look for. The base class's search
  # imports importlib_resources, which newer releases of etils do not install.
  code_path = None

  def __init__(self, **options):
    # `prepare` sets them: split -> rows, and their digest; the root of clips
    # that are embedded, or None; what is called after each row.
    self.rows, self.fingerprint = {}, ""
    self.embedded, self.on_row = None, None
    super().__init__(**options)

  def _info(self):
    text, listed = tfds.features.Text(), tfds.features.Sequence
    features = {name: text for name in _TEXTS}
    features["options"] = listed(text)
    features["groups"] = listed({"facet": text, "name": text})
    features["clip"] = tfds.features.Scalar(np.object_)
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,  # Rows keep their order.
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    # The folder is still another one, which gets its name once all is written:
    # data without the fingerprint, or the other way round, there is none.
    path = pathlib.Path(self.data_dir, _FINGERPRINT)
    path.write_text(self.fingerprint + "\n", encoding="utf-8")
    return {k: self._generate_examples(rows) for k, rows in self.rows.items()}

  def _generate_examples(self, rows):
    for place, row in enumerate(rows):
      yield place, _record(row, self.embedded)
      self.on_row()


class VideoR1(VideoQa):
  """The video questions of Video-R1-260k."""


class VideoR1Filtered(VideoQa):
  """Those of Video-R1 that a base model needs the video for."""


BUILDERS: dict[str, type[VideoQa]] = {
  builder.name: builder for builder in (VideoQa, VideoR1, VideoR1Filtered)
}


class QuestionSource:
  """Random access to a prepared split: `len`, `[i]`; can be pickled."""

  def __init__(self, source, places: Sequence[int] | None = None):
    """Takes the source of all records, and the places of some; None for all."""
    self._source = source
    self._places = range(len(source)) if places is None else places

  def __len__(self):
    return len(self._places)

  def take(self, indices: Sequence[int]) -> "QuestionSource":
    """Returns the source of some of the rows."""
    return QuestionSource(self._source, [self._places[i] for i in indices])

  def __getitem__(self, index) -> question_lib.Question:
    return _question(self._source[self._places[int(index)]])

  def __getitems__(self, indices) -> list[question_lib.Question]:
    places = [self._places[int(index)] for index in indices]
    return [_question(record) for record in self._source.__getitems__(places)]

  def clip(self, index) -> bytes:
    """Returns the encoded clip of a row; empty if clips are not embedded."""
    return bytes(self._source[self._places[int(index)]]["clip"])


def prepare(
  splits: Mapping[str, Sequence[question_lib.Question]],
  data_dir,
  *,
  media_root=None,
  embed: bool = False,
  name: str = VideoQa.name,
  on_row: Callable[[int], Any] = lambda count: None,
) -> tfds.core.DatasetBuilder:
  """Writes the rows as array_record files, unless the same rows are there.

  Args:
    splits: split name -> rows, at least one row each.
    data_dir: the files go to `data_dir`/NAME/VERSION.
    media_root: folder of the clips.
    embed: whether records hold the encoded clips, too.
    name: one of `BUILDERS`.
    on_row: called with the number of rows written so far.
  """
  for split, rows in splits.items():
    errors.check(len(rows), f"split {split!r} has no rows; leave it out")
  if embed and media_root is None:
    raise errors.UserError("clips can be embedded only with a media_root")
  embedded, written = media_root if embed else None, itertools.count(1)
  fingerprint = _fingerprint(splits, embedded)
  builder = _builder(BUILDERS[name], data_dir)
  builder.rows, builder.fingerprint = splits, fingerprint
  builder.embedded, builder.on_row = embedded, lambda: on_row(next(written))
  path = pathlib.Path(builder.data_dir, _FINGERPRINT)
  if path.parent.is_dir():
    try:
      present = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
      raise errors.UserError(
        f"{builder.data_dir}: does not tell which rows it was prepared from"
        f" (no {_FINGERPRINT}); delete the folder or give another data_dir"
      ) from None
    if present != fingerprint:
      raise errors.UserError(
        f"{builder.data_dir}: was prepared from other rows or clips; delete the"
        " folder or give another data_dir"
      )
  tfds.disable_progress_bar()
  with (
    files.claim(pathlib.Path(data_dir, name), hint="or give another data_dir"),
    contextlib.redirect_stdout(io.StringIO()),  # It prints, not logs.
  ):
    builder.download_and_prepare()
  return builder


def open_source(data_dir, split: str) -> QuestionSource:
  """Returns random access to the rows of a split that `prepare` wrote.

  `data_dir` is that of `prepare`, or the folder of one data set below it.
  """
  data_dir = os.path.normpath(os.fspath(data_dir))
  found = _prepared(data_dir, BUILDERS)
  # The folder of one of several data sets.
  parent, name = os.path.split(data_dir)
  if not found and name in BUILDERS:
    data_dir, found = parent, _prepared(parent, [name])
  if not found:
    raise errors.UserError(
      f"{os.path.join(data_dir, VideoQa.name)}: holds no prepared questions of"
      f" version {VideoQa.VERSION}; run prepare first"
    )
  if len(found) > 1:
    names = " and ".join(builder.name for builder in found)
    raise errors.UserError(
      f"{data_dir} holds {names}; name one of these folders"
    )
  builder = _builder(found[0], data_dir)
  names = sorted(builder.info.splits)
  errors.check_known(f"split in {builder.data_dir}:", split, names)
  return QuestionSource(builder.as_data_source(split=split))


def _builder(make: type[VideoQa], data_dir) -> VideoQa:
  return make(data_dir=os.fspath(data_dir), file_format="array_record")


def _prepared(data_dir: str, names: Iterable[str]) -> list[type[VideoQa]]:
  """Returns the data sets that `prepare` finished in a folder."""
  version = str(VideoQa.VERSION)
  return [
    BUILDERS[name]
    for name in names
    if os.path.isfile(os.path.join(data_dir, name, version, _FINGERPRINT))
  ]


def _embeddable(media_root, name: str) -> str:
  """Returns the path of a clip that a record can hold, or `VideoError`."""
  path = video.safe_path(media_root, name)
  try:
    size = os.path.getsize(path)
  except FileNotFoundError:
    raise video.VideoError(path, "missing") from None
  limit = min(MAX_CLIP_BYTES, video.Limits().max_bytes)
  if size > limit:
    told = f"{size} bytes, where a record holds {limit}"
    mend = "leave the clip out or do not embed clips"
    raise video.VideoError(path, "too_large", told, mend)
  return path


def _record(row: question_lib.Question, embedded) -> dict:
  """Returns a row's record, with its clip below the root `embedded` or None."""
  texts = ((name, getattr(row, name)) for name in _TEXTS)
  record = {k: _NONE if v is None else v for k, v in texts}
  record |= {"options": list(row.options), "clip": b""}
  record["groups"] = [{"facet": f, "name": name} for f, name in row.groups]
  if embedded is not None:
    path = _embeddable(embedded, row.video)
    try:
      record["clip"] = pathlib.Path(path).read_bytes()
    except OSError as error:
      told = error.strerror or ""
      raise video.VideoError(path, "unreadable", told) from None
  return record


def _fingerprint(splits, embedded) -> str:
  """Returns a digest of the rows, and of clips below the root `embedded`."""
  digest = hashlib.blake2b(digest_size=16)
  for name, rows in sorted(splits.items()):
    digest.update(json.dumps([name, embedded is not None]).encode())
    for row in rows:
      values = [getattr(row, field) for field in _TEXTS] + list(row.options)
      values += [list(group) for group in row.groups]
      digest.update(json.dumps(values).encode())
      if embedded is not None:
        path = _embeddable(embedded, row.video)
        digest.update(left_out.content_hash(path).encode())
  return digest.hexdigest()


def _string(value: bytes | str) -> str | None:
  text = value.decode() if isinstance(value, bytes) else value
  return None if text == _NONE else text


def _question(record: dict) -> question_lib.Question:
  facets, names = (map(_string, record["groups"][k]) for k in ("facet", "name"))
  return question_lib.Question(
    options=tuple(map(_string, record["options"])),
    groups=tuple(zip(facets, names, strict=True)),
    **{name: _string(record[name]) for name in _TEXTS},
  )
