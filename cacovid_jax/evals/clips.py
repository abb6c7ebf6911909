"""Clips as the model sees them: decoded, encoded once, kept while needed."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cacovid_jax import errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.data import video
from cacovid_jax.evals import frame_manifest
from cacovid_jax.models import processors, token_grid, video_llm


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """One encoded clip, or the reason why there is none.

  Attributes:
    features: float[N, D]; zeros if the clip cannot be used.
    frame_hash: sha256 of the decoded frames, "" if the clip cannot be used.
    index_hash: digest of which frames they are, "" likewise.
    fault: why it cannot be used, else "".
    second_per_grid_t: see `video_llm.VideoFeatures`.
    warnings: what makes the frames less than they seem, one line each.
    extras: float32[N, ...] of each wanted of `video_llm.SIGNALS`; zeros if the
      clip cannot be used.
    deep: see `video_llm.VideoFeatures`.
  """

  features: np.ndarray
  frame_hash: str
  fault: str = ""
  index_hash: str = ""
  second_per_grid_t: float = 1.0
  warnings: tuple[str, ...] = ()
  extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  deep: np.ndarray | None = None


class ClipSource:
  """Reads clips below a media root and runs the vision tower over them.

  Frames follow the evaluation rule: `num_frames` evenly spaced frames,
  truncated positions, repeats where a clip has fewer. Two threads decode
  ahead; a few clips stay in memory, so that questions about one clip which
  follow each other encode it once.

  Attention and keys of the tower come from a second run of it, in a program of
  their own: the features of a clip are the same, to the bit, whatever else is
  wanted.

  Attributes:
    grid: (T, H, W) of the clips; where they differ, of most of them.
    manifest: frames that clips must agree with, or None.
    buckets: static sizes that clips of several grids are asked in.
    want: names of `video_llm.SIGNALS` that each clip's `extras` hold.
    seconds: spent so far on "decode" (frames to pixels included; threads add
      up) and "tower".
  """

  def __init__(
    self,
    root: str,
    model: Any,
    params: Any,
    processor: processors.Processor,
    *,
    num_frames: int,
    limits: video.Limits | None = None,
    cache: Any = None,
    cache_key: str = "",
    keep: int = 64,
    grid: tuple[int, int, int] | None = None,
    want: Iterable[str] = (),
    manifest: frame_manifest.FrameManifest | None = None,
    buckets: Sequence[token_grid.GridBucket] = (),
  ):
    """Starts nothing but the threads.

    Args:
      root: folder that the questions' video paths are relative to.
      model: `models.video_llm.VideoLLM`.
      params: its weights.
      processor: frames to the tower's inputs.
      num_frames: T.
      limits: caps on what is decoded.
      cache: `data.feature_cache.FeatureCache`, or None.
      cache_key: identity of the weights, part of the cache's keys.
      keep: clips held in memory.
      grid: (T, H, W) of every clip; None finds it by the processor, which may
        need the shape of each clip's frames, see `survey`.
      want: names of `video_llm.SIGNALS` that are needed besides features.
      manifest: where the frames are written down, and what they must agree
        with; None for neither.
      buckets: for clips of several grids; a clip that fits in none has its own.
    """
    self.buckets = tuple(buckets)
    self.want = frozenset(video_llm.check_signals(want))
    self.num_frames = num_frames
    if grid is None:
      grid = processor.fixed_grid(num_frames)
    self.grid = None if grid is None else tuple(grid)
    # Of surveyed clips: the grid, or why there is none.
    self._grids: dict[str, tuple[int, int, int]] = {}
    self._faults: dict[str, str] = {}
    self._given = self.grid is not None
    self.manifest = manifest
    self.seconds = collections.Counter()
    self._root, self._params = root, params
    self._processor, self._limits = processor, limits
    self._width = model.config.text.hidden_size
    self._cache, self._cache_key = cache, cache_key
    self._model = model
    self._encode = jax.jit(lambda *args: model.encode(*args).features)
    # Program of the missing `extras`; what it does not return is not run.
    self._observe = jax.jit(self._run_observe, static_argnums=0)
    self._keep = keep
    self._clips: collections.OrderedDict[str, Clip] = collections.OrderedDict()
    self._pool = concurrent.futures.ThreadPoolExecutor(2, "decode")
    self._ahead: dict[str, concurrent.futures.Future] = {}

  @property
  def identity(self) -> dict[str, Any]:
    """What features depend on besides the checkpoint and T, for a ledger."""
    if self._processor.one_grid:
      return {}
    return {"preprocessing": self._processor.identity}

  def survey(self, paths: Iterable[str]) -> None:
    """Finds out the grids of clips by their first frames.

    Clips of which a manifest knows the size are not opened.

    Args:
      paths: as the questions name them. The grid that most of those have stands
        for those that cannot be used, so give all at once.
    """
    if self._given:
      return
    paths = [
      path
      for path in dict.fromkeys(paths)
      if path not in self._grids and path not in self._faults
    ]
    if not paths:
      return
    found = self._pool.map(self._find_grid, paths)
    with progress_lib.Progress(
      len(paths), description="clip shapes"
    ) as progress:
      for done, path in enumerate(paths, start=1):
        result = next(found)
        known = self._faults if isinstance(result, str) else self._grids
        known[path] = result
        progress.update(done)
    counts = collections.Counter(self._grids.values())
    if not counts:
      first = next(iter(self._faults))
      raise errors.UserError(
        f"none of the {len(self._faults)} clips below {self._root} can be read"
        f" (first: {first}, {self._faults[first]}); download them, or correct"
        " the folder of the clips"
      )
    self.grid = counts.most_common(1)[0][0]

  def grid_of(self, path: str) -> tuple[int, int, int]:
    """Returns (T, H, W) of a clip; of one that cannot be used, `grid`."""
    self.survey([path])
    return self._grids.get(path, self.grid)

  def bucket_of(self, grid: tuple[int, int, int]) -> token_grid.GridBucket:
    """Returns the smallest bucket that holds a grid, else the grid's own."""
    holding = [bucket for bucket in self.buckets if bucket.holds(grid)]
    return token_grid.pick(
      grid, holding or [token_grid.TokenGrid.of(grid).bucket]
    )

  def frames(self, path: str) -> np.ndarray:
    """Returns uint8[T, h, w, 3]; raises `VideoError` if it cannot."""
    return self._decode(path)[0].frames

  def _decode(self, path: str):
    """Returns (`video.Clip`, its line in a manifest)."""
    file = video.safe_path(self._root, path)

    def rule(count, _):
      known = self.manifest and self.manifest.indices(path, count)
      return known or frames_lib.eval_linspace(count, self.num_frames)

    clip = video.decode(file, rule, limits=self._limits)
    entry = frame_manifest.Entry.of(
      path, file, clip, hashed=self.manifest is not None
    )
    if self.manifest:
      self.manifest.check(entry)
    return clip, entry

  def prefetch(self, paths: Iterable[str]) -> None:
    """Starts to decode clips that will be asked for next."""
    paths = list(dict.fromkeys(paths))
    # Not from the threads that decode: they would wait for each other.
    self.survey(paths)
    for path in paths:
      if path not in self._clips and path not in self._ahead:
        self._ahead[path] = self._pool.submit(self._prepare, path)

  def discard(self, keep: Iterable[str] = ()) -> None:
    """Drops what was decoded ahead and is not asked for after all.

    Args:
      keep: clips that will be.
    """
    for path in self._ahead.keys() - set(keep):
      self._ahead.pop(path).cancel()

  def __getitem__(self, path: str) -> Clip:
    if path in self._clips:
      self._clips.move_to_end(path)
      return self._clips[path]
    self.prefetch([path])
    entry, prepared = self._ahead.pop(path).result()
    if self.manifest:
      # Here and not in the threads, so that the order is that of the questions.
      self.manifest.add(entry)
    clip = prepared
    if not isinstance(prepared, Clip):
      clip = self._finish(path, *prepared)
    self._clips[path] = clip
    while len(self._clips) > self._keep:
      self._clips.popitem(last=False)
    return clip

  def observe(self, want: Iterable[str]) -> None:
    """Changes what clips bring along; those that bring other things go."""
    want = frozenset(video_llm.check_signals(want))
    if want != self.want:
      self.want = want
      self.clear()

  def clear(self) -> None:
    """Forgets the clips: the next one is decoded and encoded anew."""
    self._clips.clear()

  def close(self) -> None:
    self._pool.shutdown(cancel_futures=True)

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def unusable(self, path: str, reason: str) -> Clip:
    """Returns what stands for a clip that cannot be used."""
    T, H, W = self.grid_of(path)
    features = np.zeros([T * H * W, self._width], np.float32)
    extras = {
      name: np.zeros(shape, np.float32)
      for name, shape in self._extra_shapes(path).items()
    }
    return Clip(features, "", reason, extras=extras)

  def _extra_shapes(self, path: str) -> dict[str, tuple[int, ...]]:
    if not self.want:
      return {}
    T, H, W = self.grid_of(path)
    shapes = self._model.signal_shapes(T * H * W)
    return {name: shapes[name] for name in self.want}

  def _run_observe(self, want, params, inputs):
    return self._model.encode(params, inputs, signals=want).signals

  def _fault(self, path: str) -> str:
    """Returns why a clip is not even tried, "" if it is."""
    # A clip that could not be used when batches were made is not used later.
    if path in self._faults:
      return self._faults[path]
    known = self.manifest[path] if self.manifest else None
    return known.fault if known else ""

  def _prepare(self, path: str):
    """Returns (the manifest's line, a Clip or what `_finish` takes)."""
    start = time.perf_counter()
    try:
      if fault := self._fault(path):
        return self._unusable(path, fault)
      clip, entry = self._decode(path)
      size = clip.frames.shape[1:3]
      grid = self._grid_of_frames(path, *size, len(clip.frames))
      if grid != self.grid_of(path):
        raise video.VideoError(
          path, "unreadable", f"a grid of {grid}, not of {self.grid_of(path)}"
        )
    except video.VideoError as error:
      # Without the path: results must not depend on where the data lies.
      return self._unusable(path, error.reason.replace("_", " "))
    fps = frames_lib.sampled_fps(self.num_frames, clip.duration)
    facts = {
      "second_per_grid_t": self._processor.second_per_grid_t(fps),
      "frame_hash": entry.frame_hash,
      "index_hash": entry.index_hash,
      "warnings": clip.warnings,
    }
    found = self._cached(path, entry.frame_hash)
    features, extras = found
    if features is not None and extras.keys() == self.want:
      return entry, Clip(features, extras=extras, **facts)
    inputs = self._model.tower_inputs(self._processor(clip.frames, fps=fps))
    self.seconds["decode"] += time.perf_counter() - start
    return entry, (found, inputs, facts)

  def _unusable(self, path: str, reason: str):
    entry = frame_manifest.Entry(video=path, fault=reason)
    return entry, self.unusable(path, reason)

  def _cached(self, path: str, frame_hash: str):
    """Returns (features or None, extras) as far as the cache holds them."""
    if self._cache is None:
      return None, {}
    features = self._cache.get(self._key(frame_hash))
    extras = {
      name: self._cache.get(self._key(frame_hash, name)) for name in self.want
    }
    shapes = self._extra_shapes(path)
    # An entry that does not fit is no entry: it is made anew.
    return features, {
      name: value
      for name, value in extras.items()
      if value is not None and value.shape == shapes[name]
    }

  def _find_grid(self, path: str) -> tuple[int, int, int] | str:
    known = self.manifest[path] if self.manifest else None
    if known and known.fault:
      return known.fault
    try:
      if known:
        size = known.size
      else:
        file = video.safe_path(self._root, path)
        size = video.frame_size(file, self._limits)
      return self._grid_of_frames(path, *size, self.num_frames)
    except video.VideoError as error:
      return error.reason.replace("_", " ")

  def _grid_of_frames(
    self, path: str, height: int, width: int, num_frames: int
  ) -> tuple[int, int, int]:
    """Returns the grid of frames of a clip; `VideoError` if they have none."""
    try:
      return self._processor.grid(num_frames, height, width)
    except frames_lib.ShapeError as error:
      raise video.VideoError(
        path, "bad_shape", error.detail, error.mend
      ) from error

  def _finish(self, path: str, found, inputs, facts: dict[str, Any]) -> Clip:
    """Returns the clip, running the tower for what was not `found`."""
    features, extras = found
    start = time.perf_counter()
    new = {}
    if features is None:
      new[""] = self._encode(self._params, inputs)
    missing = video_llm.check_signals(self.want - extras.keys())
    if missing:
      new |= self._observe(missing, self._params, inputs)
    new = jax.block_until_ready(new)
    self.seconds["tower"] += time.perf_counter() - start
    # As the cache keeps them, so that a hit changes no shape, type or bit.
    new = {name: np.asarray(value, np.float32) for name, value in new.items()}
    for name, value in new.items():
      what = name.replace("_", " ") or "features"
      base.check_finite(value, f"{what} of the vision tower")
    if self._cache is not None:
      for name, value in new.items():
        self._cache.put(self._key(facts["frame_hash"], name), value)
    features = new.pop("", features)
    return Clip(features, extras={**extras, **new}, **facts)

  def _key(self, frame_hash: str, name: str = "") -> str:
    """Names features by what they are made of: pixels and weights.

    Args:
      frame_hash: of the decoded frames.
      name: of an extra; empty for the features.
    """
    parts = [frame_hash, self._cache_key, self._processor.identity]
    if name:
      parts.append(name)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
