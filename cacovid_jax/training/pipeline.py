"""Batches of prompts and clips for training and evaluation.

Which question stands in slot i of step s is a pure function of the seed, so
there is no iterator state to save: a run that resumes at step s asks for it.
Clips are decoded ahead by threads or processes (Grain). In training a clip that
cannot be used is written to a ledger and replaced by a question that depends on
its place alone; in evaluation it stays, marked, so that it counts as wrong.

Letters: B batch, T frames, S pixels of a side, N video tokens, D width,
L prompt tokens, P position rows.
"""

import collections
import dataclasses
import functools
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import feature_cache, rejected_clips, video
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import processors, token_grid, video_llm

MAX_SUBSTITUTES = 16


@dataclasses.dataclass(frozen=True)
class FrameRule:
  """Which T frames of a clip are shown; T is static.

  Attributes:
    num_frames: T.
    name: `frames.EVAL_RULE`, or `frames.TRAIN_RULE` for the public trainer's.
      Where that takes fewer than T frames (clips below T seconds), T frames
      are spaced over the clip instead, rounded as it rounds, since compiled
      programs have one T. Where it takes none, the clip is refused.
    fps: frames a second of the trainer's rule.
  """

  num_frames: int
  name: str = frames_lib.EVAL_RULE
  fps: float = 1.0

  def __post_init__(self):
    if self.name not in (frames_lib.EVAL_RULE, frames_lib.TRAIN_RULE):
      raise errors.UserError(
        f"frame rule {self.name!r}: give {frames_lib.EVAL_RULE!r} or"
        f" {frames_lib.TRAIN_RULE!r}"
      )

  def __call__(self, num_frames: int, duration: float) -> np.ndarray:
    """Returns int64[T] indices, none if the clip is too short."""
    if self.name == frames_lib.EVAL_RULE:
      return frames_lib.eval_linspace(num_frames, self.num_frames)
    indices = frames_lib.train_linspace_1fps(
      num_frames, duration, self.num_frames, self.fps
    )
    if 0 < len(indices) < self.num_frames:
      spaced = np.linspace(0, num_frames - 1, self.num_frames)
      indices = np.array([round(x) for x in spaced.tolist()], np.int64)
    return indices


def _resize_large(frame: np.ndarray, *, resize, min_side: int) -> np.ndarray:
  """Returns a frame resized; `ShapeError` if it is not above `min_side`."""
  height, width = frame.shape[:2]
  if min(height, width) <= min_side:
    raise frames_lib.ShapeError(
      f"a frame of {width} x {height} pixels has a side of {min_side} or fewer",
      "leave the clip out",
    )
  return resize(frame)


class ClipSource:
  """Frames uint8[T,S,S,3] of a question's clip; can be pickled.

  A source has `field`, the batch's key; `load(question)`, which runs ahead in
  threads and may raise `VideoError`; and `finish(payloads)`, which runs on the
  main thread.
  """

  field = "pixels"

  def __init__(
    self,
    media_root,
    rule: FrameRule,
    image_size: int,
    *,
    resample: int = frames_lib.BICUBIC,
    limits: video.Limits | None = None,
    decode: Callable[..., video.Clip] = video.decode,
    refused: dict[str, str] | None = None,
    min_side: int = 0,
  ):
    """Sets where clips lie and which frames are taken.

    Args:
      media_root: folder of the clips.
      rule: the frame rule.
      image_size: S.
      resample: PIL's number of the filter.
      limits: caps of the decoder.
      decode: the decoder, such as `video.decode`.
      refused: content hash -> reason of clips that are known to be bad.
      min_side: clips are refused whose frames have a side of so many pixels or
        fewer.
    """
    self.media_root = os.fspath(media_root)
    self.rule, self.image_size, self.min_side = rule, image_size, min_side
    self._resize = functools.partial(
      frames_lib.resize_frame, size=image_size, resample=resample
    )
    self.limits, self.decode = limits, decode
    self.refused = refused if refused is not None else {}

  def path(self, question: question_lib.Question) -> str:
    """Returns the clip's path, checked to lie below the media root."""
    return video.safe_path(self.media_root, question.video)

  def load(self, question: question_lib.Question) -> np.ndarray:
    """Returns uint8[T,S,S,3]."""
    return self.read(question).frames

  def read(self, question: question_lib.Question) -> video.Clip:
    """Returns the decoded clip, its frames resized."""
    path = self.path(question)
    if self.refused:
      reason = self.refused.get(rejected_clips.content_hash(path))
      if reason:
        raise video.VideoError(path, reason, "refused in an earlier run")
    resize = functools.partial(
      _resize_large, resize=self._resize, min_side=self.min_side
    )
    return self.decode(path, self.rule, resize=resize, limits=self.limits)

  def finish(self, payloads: Sequence[np.ndarray]) -> np.ndarray:
    """Returns uint8[B,T,S,S,3]."""
    return np.stack(payloads)

  def missing(self) -> np.ndarray:
    """Returns what stands in a batch for a clip that cannot be used."""
    size = self.image_size
    return np.zeros((self.rule.num_frames, size, size, 3), np.uint8)


class Shot(NamedTuple):
  """Frames uint8[T,h,w,3] of one shape, and how many of them a second has."""

  frames: np.ndarray
  fps: float | None


class ShotSource(ClipSource):
  """`Shot`s of clips, for models whose frames keep their aspect ratio."""

  def __init__(
    self,
    media_root,
    rule: FrameRule,
    processor: processors.Processor,
    **options,
  ):
    """As of `ClipSource`, with a processor in place of size and filter."""
    super().__init__(media_root, rule, 0, **options)
    self._resize = functools.partial(
      processor.resize_frame, num_frames=rule.num_frames
    )

  def load(self, question: question_lib.Question) -> Shot:
    """Returns the clip's frames as the model sees them."""
    clip = self.read(question)
    fps = frames_lib.sampled_fps(len(clip.frames), clip.duration)
    return Shot(clip.frames, fps)


class FeatureSource:
  """Features float32[N,D] of clips, encoded once and kept.

  The key of an entry is the clip's content, the frame rule, the pixels' rule
  and the identity of the model: nothing else enters the features.
  """

  field = "features"

  def __init__(
    self,
    clips: ClipSource,
    encode_fn: Callable[[np.ndarray], np.ndarray],
    processor: processors.Processor,
    *,
    identity: str,
    num_tokens: int,
    width: int,
    encode_batch: int = 1,
    cache: feature_cache.FeatureCache | None = None,
    memory_items: int = 256,
  ):
    """Sets how clips become features.

    Args:
      clips: gives the frames.
      encode_fn: float32[b,T,S,S,3] -> float[b,N,D], jitted; b is encode_batch.
      processor: frames to pixels.
      identity: of the model's weights (their sha256, say).
      num_tokens: N.
      width: D.
      encode_batch: b, clips encoded by one call; a part batch is filled up.
      cache: on disk; None keeps features in memory only.
      memory_items: clips whose features stay in memory.
    """
    self.clips, self._encode_fn = clips, encode_fn
    self._processor, self._identity = processor, identity
    self._shape = (num_tokens, width)
    self._encode_batch = encode_batch
    self._cache, self._memory_items = cache, memory_items
    self._memory = collections.OrderedDict()
    self._lock = threading.Lock()

  def __getstate__(self):
    # For loading ahead in processes, which encode nothing: a jitted function
    # and a lock cannot be sent, and a copy of the features is not wanted.
    state = dict(self.__dict__, _encode_fn=None)
    del state["_lock"], state["_memory"]
    return state

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._memory = collections.OrderedDict()
    self._lock = threading.Lock()

  def __call__(self, question: question_lib.Question) -> np.ndarray:
    """Returns float32[N,D] of one question's clip."""
    return self.finish([self.load(question)])[0]

  def key(self, question: question_lib.Question) -> str:
    """Returns the name of the clip's features, from all that makes them."""
    # An entry tells that the clip was not refused: by which rule, counts too.
    refused = {"min_side": self.clips.min_side} if self.clips.min_side else {}
    return feature_cache.key(
      content=rejected_clips.content_hash(self.clips.path(question)),
      **refused,
      rule=dataclasses.asdict(self.clips.rule),
      preprocessing=self._processor.described,
      identity=self._identity,
    )

  def cached_bytes(self, question: question_lib.Question) -> int:
    """Returns the size of the clip's features on disk; 0 if there are none."""
    return 0 if self._cache is None else self._cache.size(self.key(question))

  def load(self, question: question_lib.Question):
    """Returns (key, features or None, frames or None) of the clip."""
    name = self.key(question)
    features = self._recall(name)
    if features is not None:
      return name, features, None
    return name, None, self.clips.load(question)

  def finish(self, payloads) -> np.ndarray:
    """Returns float32[B,N,D]; encodes what is not known yet."""
    return np.stack(self._finished(payloads))

  def _finished(self, payloads) -> list:
    """Returns each clip's features, remembered from now on."""
    known = {name: feats for name, feats, _ in payloads if feats is not None}
    todo = {
      name: frames
      for name, feats, frames in payloads
      if feats is None and name not in known
    }
    # A clip may have been encoded since it was loaded ahead.
    for name in list(todo):
      features = self._remembered(name)
      if features is not None:
        known[name] = features
        del todo[name]
    names = list(todo)
    for start in range(0, len(names), self._encode_batch):
      part = names[start : start + self._encode_batch]
      for name, features in zip(
        part, self._encode([todo[name] for name in part]), strict=True
      ):
        known[name] = features
        self._remember(name, features)
        if self._cache is not None:
          self._write(name, features)
    return [known[name] for name, _, _ in payloads]

  def missing(self):
    """Returns what stands in a batch for a clip that cannot be used."""
    return "", np.zeros(self._shape, np.float32), None

  def _encode(self, clips: list[np.ndarray]) -> list[np.ndarray]:
    count = len(clips)
    clips = clips + [clips[-1]] * (self._encode_batch - count)
    pixels = self._processor.normalise(np.stack(clips))
    features = np.asarray(self._encode_fn(pixels), np.float32)
    if features.shape[1:] != self._shape:
      raise ValueError(
        f"encode_fn gives {features.shape[1:]} features, not {self._shape}"
      )
    return list(features[:count])

  def _remembered(self, name):
    with self._lock:
      features = self._memory.get(name)
      if features is not None:
        self._memory.move_to_end(name)
      return features

  def _remember(self, name, features):
    with self._lock:
      self._memory[name] = features
      while len(self._memory) > self._memory_items:
        self._memory.popitem(last=False)

  def _recall(self, name) -> np.ndarray | None:
    features = self._remembered(name)
    if features is None and self._cache is not None:
      features = self._read(name)
      if features is not None:
        self._remember(name, features)
    return features

  def _read(self, name):
    """Returns what the cache holds under a name, None if nothing."""
    return self._cache.get(name)

  def _write(self, name, features) -> None:
    self._cache.put(name, features)


class GridFeatureSource(FeatureSource):
  """`VideoFeatures` of clips, each of its own grid.

  A clip is encoded in the smallest bucket that holds it, whatever others are in
  the batch, so that its features do not depend on them.
  """

  def __init__(
    self,
    clips: ShotSource,
    encode_fn: Callable[
      [processors.TowerInputs, token_grid.GridBucket], np.ndarray
    ],
    processor: processors.Processor,
    *,
    buckets: Sequence[token_grid.GridBucket],
    identity: str,
    cache: feature_cache.FeatureCache | None = None,
    memory_items: int = 256,
  ):
    """Sets how clips become features.

    Args:
      clips: gives the frames.
      encode_fn: (inputs, bucket) -> float[N_max,D] of the bucket, the clip's
        own N rows first.
      processor: frames to the tower's inputs.
      buckets: sizes that programs are compiled for.
      identity: as of `FeatureSource`, also the next two.
      cache: see above.
      memory_items: see above.
    """
    super().__init__(
      clips,
      encode_fn,
      processor,
      identity=identity,
      num_tokens=0,
      width=0,
      cache=cache,
      memory_items=memory_items,
    )
    self._buckets = tuple(buckets)

  def load(self, question: question_lib.Question):
    """Returns (key, `VideoFeatures` or None, `Shot` or None) of the clip."""
    name, known, shot = super().load(question)
    if shot is not None:
      self._check_shape(self.clips.path(question), shot)
    return name, known, shot

  def _check_shape(self, path: str, shot: Shot) -> None:
    """Refuses the long and narrow clips that no bucket was made for.

    Other clips that find no bucket tell that the buckets are wrong, which stops
    the run.
    """
    grid = self._processor.resized_grid(*shot.frames.shape[:3])
    _, rows, columns = grid
    _, most = self._processor.patch_tokens(len(shot.frames))
    fits = any(bucket.holds(grid) for bucket in self._buckets)
    if rows * columns > most and not fits:
      raise video.VideoError(
        path,
        "bad_shape",
        f"long and narrow: {columns} x {rows} tokens, above {most}",
      )

  def finish(self, payloads) -> list[video_llm.VideoFeatures]:
    """Returns the clips, encoding what is not known yet."""
    return self._finished(payloads)

  def missing(self):
    raise errors.UserError(
      "a clip that cannot be used has no grid; videos of several grids are for"
      " training, where another question stands in"
    )

  def _encode(self, shots: list[Shot]) -> list[video_llm.VideoFeatures]:
    found = []
    for shot in shots:
      inputs = self._processor(shot.frames, fps=shot.fps, resized=True)
      bucket = token_grid.pick(inputs.grid, self._buckets)
      features = np.asarray(self._encode_fn(inputs, bucket), np.float32)
      found.append(
        video_llm.VideoFeatures(
          features[: math.prod(inputs.grid)],
          inputs.grid,
          inputs.second_per_grid_t,
        )
      )
    return found

  def _read(self, name) -> video_llm.VideoFeatures | None:
    # The grid is the shape of the entry; seconds are an entry of their own.
    features = self._cache.get(name)
    seconds = self._cache.get(_seconds(name))
    if features is None or seconds is None or features.ndim != 4:
      return None
    flat = features.reshape(-1, features.shape[-1])
    return video_llm.VideoFeatures(flat, features.shape[:3], float(seconds[0]))

  def _write(self, name, clip: video_llm.VideoFeatures) -> None:
    self._cache.put(_seconds(name), [clip.second_per_grid_t])
    self._cache.put(name, clip.features.reshape(*clip.grid, -1))


def _seconds(name: str) -> str:
  """Returns the name of the cache entry of a clip's `second_per_grid_t`."""
  return feature_cache.key(seconds_of=name)


@dataclasses.dataclass(frozen=True)
class Bucketing:
  """How batches of several grids get static shapes.

  Attributes:
    buckets: a batch takes the smallest that holds all of its videos.
    text_rows: rows that the longest prompt has beside its video tokens.
    model: `VideoLLM`, of which `encode_prompt` and `positions` are called.
    multiple: prompts are padded to a multiple of this.
  """

  buckets: tuple[token_grid.GridBucket, ...]
  text_rows: int
  model: video_llm.VideoLLM
  multiple: int = 16

  def length(self, bucket: token_grid.GridBucket) -> int:
    """Returns L of a bucket's prompts."""
    return -(-(bucket.tokens + self.text_rows) // self.multiple) * self.multiple

  def bucket(self, grids) -> token_grid.GridBucket:
    """Returns the smallest bucket that holds all of the grids (T, H, W)."""
    fits = [
      bucket
      for bucket in self.buckets
      if all(bucket.holds(grid) for grid in grids)
    ]
    if fits:
      return min(fits, key=lambda b: (b.tokens, b.frames * b.frame_tokens))
    for grid in grids:
      token_grid.pick(grid, self.buckets)  # Says which one fits nowhere.
    raise errors.UserError(
      "no bucket holds the videos of one step together:"
      f" {', '.join(' x '.join(map(str, grid)) for grid in grids)} tokens; add"
      " one as large as the largest of each side"
    )


class FunctionSource:
  """Features from any function question -> float32[N,D]."""

  field = "features"

  def __init__(self, features_of, shape: tuple[int, int] | None = None):
    self.load, self._shape = features_of, shape

  def finish(self, payloads) -> np.ndarray:
    """Returns float32[B,N,D]."""
    known = [payload for payload in payloads if payload is not None]
    shape = known[0].shape if known else self._shape
    if shape is None:
      raise errors.UserError(
        "no clip of the batch can be used, so its shape is unknown; give"
        " FunctionSource a shape"
      )
    zeros = np.zeros(shape, np.float32)
    return np.stack([zeros if p is None else p for p in payloads])

  def missing(self):
    """Returns what stands in a batch for a clip that cannot be used."""
    return None


class Order:
  """Which question stands at a position: a pure function of the seed.

  Positions run on through the epochs; each epoch is another permutation.
  """

  def __init__(self, num_questions: int, seed: int):
    if num_questions < 1:
      raise errors.UserError("there are no questions; give at least one")
    self._num, self._seed = num_questions, seed
    self._order = (
      grain.MapDataset.range(num_questions)
      .seed(seed % 2**32)
      .shuffle()
      .repeat()
    )

  def __getitem__(self, position: int) -> int:
    return int(self._order[position])

  def substitute(self, position: int, attempt: int) -> int:
    """Returns the question that stands in for one that cannot be used."""
    text = f"{self._seed} {position} {attempt}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % self._num


@dataclasses.dataclass
class _Loaded:
  """One slot: its question, its clip, and what was tried before."""

  question: question_lib.Question
  payload: object
  failures: list


def _try_load(source, question):
  """Returns (payload, None), or (None, the error) for a bad clip."""
  try:
    return source.load(question), None
  except video.VideoError as error:
    return None, error


class _LoadTraining:
  """Loads the question at a position, or its first usable substitute."""

  def __init__(self, rows, source, order):
    self._rows, self._source, self._order = rows, source, order

  def __call__(self, position) -> _Loaded:
    index, failures = self._order[int(position)], []
    for attempt in range(MAX_SUBSTITUTES + 1):
      question = self._rows[index]
      payload, error = _try_load(self._source, question)
      if error is None:
        return _Loaded(question, payload, failures)
      failures.append((question, error))
      index = self._order.substitute(int(position), attempt)
    return _Loaded(question, None, failures)


class _LoadEvaluation:
  """Loads the question at a position, whatever becomes of its clip."""

  def __init__(self, rows, source):
    self._rows, self._source = rows, source

  def __call__(self, position) -> _Loaded:
    question = self._rows[int(position)]
    payload, error = _try_load(self._source, question)
    failures = [] if error is None else [(question, error)]
    return _Loaded(question, payload, failures)


def prompt_length(
  rows, tokenizer, num_video_tokens: int, multiple: int = 16
) -> int:
  """Returns the bucket that holds every prompt: L, a multiple of `multiple`."""
  longest = max(
    tokenizer.encode_prompt(row.prompt, num_video_tokens).length for row in rows
  )
  return -(-longest // multiple) * multiple


def train_batches(
  rows: Sequence[question_lib.Question],
  tokenizer: tokenizer_lib.Tokenizer,
  source,
  *,
  batch_size: int,
  seed: int,
  num_video_tokens: int = 0,
  length: int = 0,
  bucketing: Bucketing | None = None,
  num_steps: int,
  start_step: int = 0,
  shard: tuple[int, int] = (0, 1),
  num_threads: int = 2,
  num_workers: int = 0,
  prefetch: int = 4,
  quarantine: rejected_clips.RejectedClips | None = None,
  max_failure_rate: float = 0.05,
  min_failures: int = 20,
) -> Iterator[dict]:
  """Yields the batches of steps start_step … num_steps - 1.

  Args:
    rows: questions, by index.
    tokenizer: makes the prompts.
    source: a ClipSource, FeatureSource, FunctionSource, or any function
      question -> float32[N,D].
    batch_size: B, of all processes together.
    seed: of the order.
    num_video_tokens: N.
    length: L, the bucket; see `prompt_length`.
    bucketing: for a `GridFeatureSource`, in place of the last two.
    num_steps: steps of the whole run.
    start_step: first step wanted, so a resumed run sees what it would have.
    shard: (index, number) of this process; it gets a contiguous share of B.
    num_threads: that load clips ahead; 0 loads when asked.
    num_workers: processes that load clips ahead, instead of threads.
    prefetch: batches loaded ahead.
    quarantine: ledger of bad clips.
    max_failure_rate: share of bad clips among those tried that ends the run...
    min_failures: ... once there are this many.

  Yields:
    dict: `features` float32[B,N,D] or `pixels` uint8[B,T,S,S,3]; `ids`
    int32[B,L]; `length` int32[B]; `video_rows` int32[B,N]; `answer_id` int32[B]
    (-1 where the answer is no letter); `question_hash` uint32[B]; `valid`
    bool[B] (all True here); `questions` list[Question]; `errors` list (all None
    here). With `bucketing` also `bucket`, `grids` [(T, H, W)], `positions`
    int32[B,P,L] and `next_position` int32[B]; features are then zero behind a
    video's own rows, and their `video_rows` are L.
  """
  source = _as_source(source)
  quarantine = (
    rejected_clips.RejectedClips() if quarantine is None else quarantine
  )
  index, number = shard
  if batch_size % number:
    raise errors.UserError(
      f"batch_size {batch_size} does not divide among {number} processes;"
      f" give a multiple of {number}"
    )
  local = batch_size // number
  first = index * local
  order = Order(len(rows), seed)
  positions = (
    grain.MapDataset.range(
      start_step * local, max(num_steps, start_step) * local
    )
    .map(_Position(batch_size, local, first))
    .map(_LoadTraining(rows, source, order))
  )
  tried = failed = 0
  for slots in _batched(
    _prefetched(positions, num_threads, num_workers, prefetch * local), local
  ):
    for slot in slots:
      tried += 1
      for question, error in slot.failures:
        tried, failed = tried + 1, failed + 1
        quarantine.add(question, error, rejected_clips.content_or_none(error))
      if slot.payload is None and len(slot.failures) > MAX_SUBSTITUTES:
        raise errors.UserError(
          f"{MAX_SUBSTITUTES + 1} clips in a row cannot be used, last:"
          f" {slot.failures[-1][1]}"
        )
    if failed >= min_failures and failed > max_failure_rate * tried:
      raise errors.UserError(
        f"{failed} of {tried} clips cannot be used, more than"
        f" {max_failure_rate:.0%}, last: {quarantine.entries[-1]['video']}"
        f" ({quarantine.entries[-1]['reason']}); mend the data set (see the"
        " quarantine ledger) or raise max_failure_rate"
      )
    yield _assemble(
      slots, local, tokenizer, source, num_video_tokens, length, bucketing
    )


def eval_batches(
  rows: Sequence[question_lib.Question],
  tokenizer: tokenizer_lib.Tokenizer,
  source,
  *,
  batch_size: int,
  num_video_tokens: int,
  length: int,
  num_threads: int = 2,
  num_workers: int = 0,
  prefetch: int = 4,
) -> Iterator[dict]:
  """Yields every question once, in order.

  Args and batches are those of `train_batches`, but `valid` is False where the
  clip cannot be used (its features or pixels are zero and `errors` says why:
  it counts as wrong) and on the fillers of the last batch, for which there is
  no entry in `questions` and `errors`.
  """
  source = _as_source(source)
  positions = grain.MapDataset.range(len(rows)).map(
    _LoadEvaluation(rows, source)
  )
  loaded = _prefetched(
    positions, num_threads, num_workers, prefetch * batch_size
  )
  for slots in _batched(loaded, batch_size):
    yield _assemble(
      slots, batch_size, tokenizer, source, num_video_tokens, length
    )


class _Position:
  """Maps this process's count of examples to positions of the global order."""

  def __init__(self, batch_size: int, local: int, first: int):
    self._batch_size, self._local, self._first = batch_size, local, first

  def __call__(self, count) -> int:
    step, slot = divmod(int(count), self._local)
    return step * self._batch_size + self._first + slot


def _as_source(source):
  return source if hasattr(source, "finish") else FunctionSource(source)


def _prefetched(dataset, num_threads: int, num_workers: int, buffer: int):
  """Iterates in order, loading ahead by processes, threads, or not at all."""
  if num_workers:
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    workers = grain.MultiprocessingOptions(
      num_workers=num_workers, per_worker_buffer_size=max(1, buffer)
    )
    return iter(dataset.to_iter_dataset(options).mp_prefetch(workers))
  if num_threads:
    options = grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=max(buffer, num_threads)
    )
    return iter(dataset.to_iter_dataset(options))
  return (dataset[i] for i in range(len(dataset)))


def _batched(items, size: int) -> Iterator[list]:
  batch = []
  for item in items:
    batch.append(item)
    if len(batch) == size:
      yield batch
      batch = []
  if batch:
    yield batch


def _assemble(
  slots, size, tokenizer, source, num_video_tokens, length, bucketing=None
) -> dict:
  """Builds the batch dict from at most `size` loaded slots."""
  rows = [slot.question for slot in slots]
  failures = [slot.failures if slot.payload is None else [] for slot in slots]
  payloads = [
    source.missing() if failed else slot.payload
    for slot, failed in zip(slots, failures, strict=True)
  ]
  fillers = size - len(slots)
  payloads += [payloads[-1]] * fillers
  shown = rows + [rows[-1]] * fillers
  visual, more = source.finish(payloads), {}
  if bucketing is None:
    prompts = [
      tokenizer.encode_prompt(row.prompt, num_video_tokens) for row in shown
    ]
  else:
    prompts = [
      bucketing.model.encode_prompt(
        tokenizer, row.prompt, clip.grid, clip.second_per_grid_t
      )
      for row, clip in zip(shown, visual, strict=True)
    ]
    visual, more = _in_bucket(visual, prompts, bucketing)
    num_video_tokens = more["bucket"].tokens
    length = bucketing.length(more["bucket"])
  padded = tokenizer.pad(prompts, length, num_video_tokens)
  if source.field == "features" and visual.shape[1] != num_video_tokens:
    # A clip that silently fell out of a prompt would teach nonsense.
    raise errors.UserError(
      f"clips have {visual.shape[1]} video tokens, but the prompts hold"
      f" {num_video_tokens}; correct num_video_tokens"
    )
  return {
    source.field: visual,
    "ids": padded.ids,
    "length": padded.length,
    "video_rows": padded.video_rows,
    "answer_id": np.array([tokenizer.answer_id(r) for r in shown], np.int32),
    "question_hash": np.array(
      [question_lib.question_hash(row.id) for row in shown], np.uint32
    ),
    "valid": np.array([not failed for failed in failures] + [False] * fillers),
    "questions": rows,
    "errors": [failed[-1][1] if failed else None for failed in failures],
    **more,
  }


def _in_bucket(clips, prompts, bucketing: Bucketing):
  """Returns (features float32[B,N_max,D], what else a batch of a bucket has).

  Args:
    clips: [VideoFeatures].
    prompts: their prompts.
    bucketing: see above.
  """
  grids = [clip.grid for clip in clips]
  bucket = bucketing.bucket(grids)
  length = bucketing.length(bucket)
  width = clips[0].features.shape[1]
  features = np.zeros((len(clips), bucket.tokens, width), np.float32)
  positions, next_positions = [], []
  for row, clip, prompt in zip(features, clips, prompts, strict=True):
    row[: len(clip.features)] = clip.features
    text = prompt.length - len(clip.features)
    if text > length - bucket.tokens:
      raise errors.UserError(
        f"a prompt has {text} tokens beside its video, but the bucket leaves"
        f" {length - bucket.tokens}; raise config.data.max_text_tokens"
      )
    own, after = bucketing.model.positions(prompt.ids, clip)
    behind = ((0, 0), (0, length - own.shape[1]))
    positions.append(np.pad(own, behind))
    next_positions.append(after)
  return features, {
    "bucket": bucket,
    "grids": grids,
    "positions": np.stack(positions).astype(np.int32),
    "next_position": np.array(next_positions, np.int32),
  }
