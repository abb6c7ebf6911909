"""Clips as the model sees them: decoded, encoded once, kept while needed."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.data import qwen_frames, video
from cacovid_jax.models import vision_signals


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """One encoded clip, or the reason why there is none.

  Attributes:
    features: float[N, D]; zeros if the clip cannot be used.
    frame_hash: sha256 of the decoded frames, "" if the clip cannot be used.
    fault: why it cannot be used, else "".
    seconds_per_slice: time between two rows of the grid's first axis, for
      models whose positions tell it.
    warnings: what makes the frames less than they seem, one line each.
    extras: float32[N, ...] of each wanted `vision_signals` name; zeros if the
      clip cannot be used.
  """

  features: np.ndarray
  frame_hash: str
  fault: str = ""
  seconds_per_slice: float = 0.0
  warnings: tuple[str, ...] = ()
  extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


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
    want: names of the `vision_signals` that each clip's `extras` hold.
    seconds: spent so far on "decode" (frames to pixels included; threads add
      up) and "tower".
  """

  def __init__(
    self,
    root: str,
    model: Any,
    params: Any,
    preprocessing: frames_lib.Preprocessing,
    *,
    num_frames: int,
    limits: video.Limits | None = None,
    cache: Any = None,
    cache_key: str = "",
    keep: int = 64,
    grid: tuple[int, int, int] | None = None,
    want: Iterable[str] = (),
  ):
    """Starts nothing but the threads.

    Args:
      root: folder that the questions' video paths are relative to.
      model: `LlavaOnevisionModel`.
      params: its weights.
      preprocessing: frames to pixels.
      num_frames: T.
      limits: caps on what is decoded.
      cache: `data.feature_cache.FeatureCache`, or None.
      cache_key: identity of the weights, part of the cache's keys.
      keep: clips held in memory.
      grid: (T, H, W) of every clip; None takes the model's own.
      want: names of `vision_signals` that are needed besides features.
    """
    self.want = frozenset(vision_signals.check(want))
    self.num_frames = num_frames
    self.grid = model.grid(num_frames) if grid is None else grid
    self.seconds = collections.Counter()
    self._root, self._params = root, params
    self._preprocessing, self._limits = preprocessing, limits
    self._width = model.config.text.hidden_size
    self._cache, self._cache_key = cache, cache_key
    self._model = model
    self._encode = jax.jit(model.encode_video)
    self._keep = keep
    self._clips: collections.OrderedDict[str, Clip] = collections.OrderedDict()
    self._pool = concurrent.futures.ThreadPoolExecutor(2, "decode")
    self._ahead: dict[str, concurrent.futures.Future] = {}

  def frames(self, path: str) -> np.ndarray:
    """Returns uint8[T, h, w, 3]; raises `VideoError` if it cannot."""
    return self._decode(path).frames

  def _decode(self, path: str) -> video.Clip:
    return video.decode(
      video.safe_path(self._root, path),
      lambda count, _: frames_lib.eval_linspace(count, self.num_frames),
      limits=self._limits,
    )

  def prefetch(self, paths: Iterable[str]) -> None:
    """Starts to decode clips that will be asked for next."""
    for path in dict.fromkeys(paths):
      if path not in self._clips and path not in self._ahead:
        self._ahead[path] = self._pool.submit(self._prepare, path)

  def __getitem__(self, path: str) -> Clip:
    if path in self._clips:
      self._clips.move_to_end(path)
      return self._clips[path]
    self.prefetch([path])
    prepared = self._ahead.pop(path).result()
    clip = prepared if isinstance(prepared, Clip) else self._finish(*prepared)
    self._clips[path] = clip
    while len(self._clips) > self._keep:
      self._clips.popitem(last=False)
    return clip

  def observe(self, want: Iterable[str]) -> None:
    """Changes what clips bring along; those that bring other things go."""
    want = frozenset(vision_signals.check(want))
    if want != self.want:
      self.want = want
      self.__dict__.pop("_no_extras", None)
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

  @functools.cached_property
  def _nothing(self) -> np.ndarray:
    T, H, W = self.grid
    return np.zeros([T * H * W, self._width], np.float32)

  @functools.cached_property
  def _no_extras(self) -> dict[str, np.ndarray]:
    if not self.want:
      return {}
    shapes = self._model.vision_signal_shapes(len(self._nothing))
    return {name: np.zeros(shapes[name], np.float32) for name in self.want}

  @functools.cached_property
  def _observe(self):
    """Program of the missing `extras`; what it does not return is not run."""

    def observe(want, params, *pixels):
      return self._model.encode_video_with(params, *pixels, want=want)[1]

    return jax.jit(observe, static_argnums=0)

  def _prepare(self, path: str):
    """Returns a Clip if no tower run is needed, else what `_finish` takes."""
    start = time.perf_counter()
    try:
      clip = self._decode(path)
    except video.VideoError as error:
      # Without the path: results must not depend on where the data lies.
      reason = error.reason.replace("_", " ")
      return Clip(self._nothing, "", reason, extras=self._no_extras)
    digest = hashlib.sha256(str(clip.frames.shape).encode())
    digest.update(np.ascontiguousarray(clip.frames).data)
    frame_hash = digest.hexdigest()
    facts = {"frame_hash": frame_hash, "warnings": clip.warnings}
    found = self._cached(frame_hash)
    features, extras = found
    if features is not None and extras.keys() == self.want:
      return Clip(features, extras=extras, **facts)
    pixels, more = self._pixels(clip)
    self.seconds["decode"] += time.perf_counter() - start
    return found, pixels, facts | more

  def _cached(self, frame_hash: str):
    """Returns (features or None, extras) as far as the cache holds them."""
    if self._cache is None:
      return None, {}
    features = self._cache.get(self._key(frame_hash))
    extras = {
      name: self._cache.get(self._key(frame_hash, name)) for name in self.want
    }
    # An entry that does not fit is no entry: it is made anew.
    return features, {
      name: value
      for name, value in extras.items()
      if value is not None and value.shape == self._no_extras[name].shape
    }

  def _pixels(self, clip: video.Clip):
    """Returns what the tower takes, and more fields of the encoded clip."""
    return (self._preprocessing(clip.frames),), {}

  def _finish(self, found, pixels, facts: dict[str, Any]) -> Clip:
    """Returns the clip, running the tower for what was not `found`."""
    features, extras = found
    start = time.perf_counter()
    new = {}
    if features is None:
      new[""] = self._encode(self._params, *pixels)
    missing = vision_signals.check(self.want - extras.keys())
    if missing:
      new |= self._observe(missing, self._params, *pixels)
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
    parts = [frame_hash, self._cache_key, repr(self._preprocessing)]
    if name:
      parts.append(name)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class PatchSource(ClipSource):
  """The same for models whose grid follows the frames' shape (Qwen2.5-VL).

  `preprocessing` is a `data.qwen_frames.ProcessorConfig`, and every clip has
  the `grid` that is given: one compiled tower, one length of prompt.
  """

  def __init__(self, root: str, model: Any, *args, **options):
    """As of `ClipSource`; `grid` must be given."""
    super().__init__(root, model, *args, **options)
    self._layout = model.layout(self.grid)

  def _pixels(self, clip: video.Clip):
    fps = qwen_frames.sampled_fps(self.num_frames, clip.duration)
    found = self._preprocessing(clip.frames, fps=fps)
    if found.grid != tuple(self.grid):
      raise errors.UserError(
        f"a clip gives a grid of {found.grid}, not the {self.grid} of the"
        " others; ask about it apart"
      )
    more = {"seconds_per_slice": found.seconds_per_slice}
    return (found.patches, self._layout), more
