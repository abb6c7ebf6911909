"""Video features: each clip is decoded once, encoded once, and kept.

The key of an entry on disk is all that the features depend on, whoever asks;
the entry also says which frames they are, so that its clip is not opened.

Letters: T frames, H W token grid, N = T*H*W video tokens, D width, S auxiliary
feature maps.
"""

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import decode_workers, feature_cache, frame_record, video
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.inference import clips, device_watch
from cacovid_jax.models import processors, token_grid, video_llm

SHOWN_SIDE = 320  # Pixels of the longer side of frames in reports.


class Loaded(NamedTuple):
  """A clip on its way into the store; can be pickled."""

  path: str  # As the questions name it.
  clip: clips.EncodedClip  # With the arrays that are known, zero or more.
  inputs: processors.TowerInputs | None = None  # For those that are not.
  key: Mapping[str, Any] | None = None  # Of its entry on disk.


@dataclasses.dataclass(eq=False, repr=False)
class FeatureStore:
  """Encoded clips below a media root.

  `load` decodes (in threads or other processes) and `finish` encodes (on the
  main thread). What a tower tells beside features comes from a second run of
  it: features are the same, to the bit, whatever else is wanted. `seconds` were
  spent on "decode" (frames to pixels included; threads add up) and "tower".
  """

  reader: clips.ClipReader
  model: video_llm.VideoLLM  # Whose tower encodes the clips.
  params: dataclasses.InitVar[Any]  # Of the model.
  _: dataclasses.KW_ONLY
  weights: str = ""  # Their identity, part of the keys.
  # (T, H, W) of every clip; where they differ, of most of them. None finds it
  # by the processor, which may need the shape of each clip's frames.
  grid: tuple[int, int, int] | None = None
  # Sizes that the tower is compiled for, where grids differ; a clip that fits
  # none is encoded in its own size...
  buckets: Sequence[token_grid.GridBucket] = ()
  # ... or refused if it is too long and narrow for all of them.
  only_buckets: bool = False
  want: Iterable[str] = ()  # Of `video_llm.SIGNALS`, what each clip brings.
  cache: feature_cache.FeatureCache | None = None  # On disk.
  keep: int = 64  # Clips held in memory.
  # Features stay on the device, not waited for, if there is one: it notes when
  # they are done. What goes to disk is waited for all the same.
  watch: device_watch.DeviceWatch | None = None
  # Its `data` axis shares the clips that are encoded at once.
  mesh: dataclasses.InitVar[Mesh | None] = None

  def __post_init__(self, params, mesh):
    self.want = frozenset(video_llm.check_signals(self.want))
    reader, self.buckets = self.reader, tuple(self.buckets)
    grid = self.grid or reader.processor.grid_of(reader.rule)
    self.grid = tuple(grid) if grid else None
    self._given = self.grid is not None
    self._grids: dict[str, tuple[int, int, int]] = {}  # Of surveyed clips.
    self.seconds = collections.Counter()
    # Of clips that were finished: path -> what of their pictures is damaged.
    self.damaged: dict[str, str] = {}
    self._set_up_memory()
    self._tower = clips.Tower(self.model, params, mesh)

  def _set_up_memory(self):
    self._clips = collections.OrderedDict()  # Name -> `EncodedClip`.
    self._lock = threading.Lock()

  def __getstate__(self):
    # For loading ahead in processes, which encode nothing.
    state = dict(self.__dict__, _tower=None, watch=None)
    del state["_clips"], state["_lock"]
    return state

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._set_up_memory()

  rows = property(lambda self: self._tower.rows)

  @property
  def identity(self) -> dict[str, Any]:
    """What features depend on besides the checkpoint and T, for a log."""
    found = dict(self.model.told)
    if not self.reader.processor.one_grid:
      found["preprocessing"] = self.reader.processor.identity
    if self.reader.rule.name != frames_lib.EVAL_RULE:
      found["frame_rule"] = self.reader.rule.name
    if self.reader.max_replaced != clips.ClipReader.max_replaced:
      found["max_replaced"] = self.reader.max_replaced
    return found

  def bucket_of(self, grid: tuple[int, int, int]) -> token_grid.GridBucket:
    """Returns the smallest bucket that holds a grid, or else its own size."""
    fits = [bucket for bucket in self.buckets if bucket.holds(grid)]
    own = token_grid.TokenGrid.of(grid).bucket
    return token_grid.pick(grid, fits or [own])

  def clear(self) -> None:
    """Forgets the clips in memory: the next one is decoded anew."""
    with self._lock:
      self._clips.clear()

  def to_host(self) -> None:
    """Moves the features in memory off the device."""
    with self._lock:
      for path, clip in self._clips.items():
        arrays = jax.device_get(dict(clip.arrays))
        self._clips[path] = dataclasses.replace(clip, arrays=arrays)

  def frames(self, path: str, side: int = SHOWN_SIDE) -> np.ndarray:
    """Returns uint8[T,h,w,3], no side above `side`; may raise `VideoError`."""
    resize = functools.partial(frames_lib.thumbnail, side=side)
    return self.reader.decode(path, resize).frames

  def load(self, path: str) -> Loaded:
    """Returns a clip, decoded if need be; `VideoError` if it is unfit."""
    if (clip := self._recall(path)) is not None:
      return Loaded(path, clip)
    start = time.perf_counter()
    if (known := self.reader.known(path)) and known.fault:
      raise video.VideoError(path, known.fault.replace(" ", "_"))
    key, clip = self._read(path)
    if clip is not None:
      self._check(path, clip)
      if clip.arrays.keys() >= {clips.FEATURES, *self.want}:
        return Loaded(path, clip)
    found, inputs, ruled = self.reader.read(path)
    self._check(path, found)
    if clip is None:
      clip = found
      if self.cache is not None:
        key = self._key(path, None if ruled else clip.record.indices)
    inputs = self._tower_inputs(clip, inputs)
    self.seconds["decode"] += time.perf_counter() - start
    return Loaded(path, clip, inputs, key)

  def finish(self, loaded: Sequence[Loaded]) -> list[clips.EncodedClip]:
    """Returns the clips, encoding what is not known yet; they are kept."""
    found, todo = {}, {}
    for one in loaded:
      # A clip may have been encoded since it was loaded ahead.
      known = self._recall(one.path)
      if known is None and one.inputs is not None:
        todo[one.path] = one
      else:
        found[one.path] = known or one.clip
    start = time.perf_counter()
    for one, new in self._encode(list(todo.values())):
      if one.key is not None:
        self._write(one, new)
      arrays = {**one.clip.arrays, **new}
      found[one.path] = dataclasses.replace(one.clip, arrays=arrays)
    if todo:
      self.seconds["tower"] += time.perf_counter() - start
    for path, clip in found.items():
      damage = video.told(clip.record.damage)
      if damage and path not in self.damaged:
        self.damaged[path] = damage
        logging.warning("%s: %s", path, damage)
    with self._lock:
      self._clips.update(found)
      while len(self._clips) > self.keep:
        self._clips.popitem(last=False)
    return [found[one.path] for one in loaded]

  def encoder(self, path: str) -> Callable[[], Any]:
    """Returns what runs the tower on a clip, which is decoded here."""
    clip, inputs, _ = self.reader.read(path)
    inputs = [self._tower_inputs(clip, inputs)]
    return lambda: self._tower(frozenset({clips.FEATURES}), inputs)

  def cached_bytes(self, path: str) -> int:
    """Returns the size of a clip's features on disk; 0 if there are none."""
    return self.cache.size(self._name(path)) if self.cache else 0

  def facts(self, path: str) -> dict[str, Any] | None:
    """Returns what the disk says of a clip; None if nothing."""
    return self.cache.facts(self._name(path)) if self.cache else None

  def _tower_inputs(self, clip: clips.EncodedClip, inputs):
    """Returns what the tower takes, padded where it is compiled for buckets."""
    bucket = self.bucket_of(clip.grid) if self.buckets else None
    return self.model.tower_inputs(inputs, bucket)

  def _encode(self, todo: list[Loaded]):
    """Yields (loaded clip, {name: float32 array} of what it lacked)."""
    groups = collections.defaultdict(list)
    for one in todo:
      lacks = {clips.FEATURES, *self.want} - one.clip.arrays.keys()
      bucket = self.bucket_of(one.clip.grid)
      groups[bucket, frozenset(lacks)].append(one)
    for (_, lacks), members in groups.items():
      for start in range(0, len(members), self.rows):
        part, called = members[start : start + self.rows], time.perf_counter()
        new = self._tower(lacks, [one.inputs for one in part])
        if self.watch:
          self.watch.add("tower", called, new)
        for one, arrays in zip(part, new, strict=True):
          yield one, {k: self._own(one, k, v) for k, v in arrays.items()}

  def _own(self, one: Loaded, name: str, value) -> np.ndarray | jax.Array:
    """Returns a clip's float32 rows of what the tower made of it."""
    count = int(np.prod(one.clip.grid))
    own = value[:, :count] if name == clips.DEEP else value[:count]
    # In float32 as on disk, so that a hit changes no type or bit.
    if self.watch and one.key is None:
      return jnp.asarray(own, jnp.float32)
    # A copy, lest it holds other clips.
    own = np.array(own, np.float32)
    base.check_finite(own, f"{name.replace('_', ' ')} of the vision tower")
    return own

  def _check(self, path: str, clip: clips.EncodedClip) -> None:
    """Refuses frames that are not those known, or that no program takes."""
    reader = self.reader
    reader.check(path, clip.record)
    expected = self.grid if self._given else self._grids.get(path, clip.grid)
    if clip.grid != expected:
      raise video.VideoError(
        path, "unreadable", f"a grid of {clip.grid}, not of {expected}"
      )
    fits = any(bucket.holds(clip.grid) for bucket in self.buckets)
    if fits or not self.only_buckets:
      return
    # Other clips that fit no bucket tell that the buckets are wrong.
    _, rows, columns = clip.grid
    _, most = reader.processor.patch_tokens(reader.rule.fewest)
    if rows * columns > most:
      file = video.safe_path(reader.root, path)
      detail = f"long and narrow: {columns} x {rows} tokens, above {most}"
      raise video.VideoError(file, "bad_shape", detail)

  def _recall(self, path: str) -> clips.EncodedClip | None:
    with self._lock:
      clip = self._clips.get(path)
      if clip is not None:
        self._clips.move_to_end(path)
      return clip

  def _name(self, path: str) -> str:
    return feature_cache.key(**self._key(path))

  def _key(self, path: str, indices: Sequence[int] | None = None):
    """Returns all that the features of a clip depend on.

    `indices` are those of its frames, where they are not the rule's.
    """
    key = {
      "content": self.reader.content(path),
      **self.reader.described,
      "model": f"{self.weights} {self.model.precision} {self.model.backend}",
      # Padding may move the last bit.
      "buckets": [dataclasses.astuple(bucket) for bucket in self.buckets],
    }
    return key if indices is None else key | {"frames": list(indices)}

  def _read(self, path: str):
    """Returns (key, clip) of what the disk holds; (None, None) if nothing."""
    if self.cache is None:
      return None, None
    known = self.reader.known(path)
    wanted = known and known.indices
    for indices in (None, wanted) if wanted else (None,):
      key = self._key(path, indices)
      entry = self.cache.get(feature_cache.key(**key))
      if entry is None:
        continue
      try:
        facts = {**entry.facts, "arrays": dict(entry.arrays)}
        record = {**facts["record"], "video": path}
        facts["record"] = frame_record.FrameRecord(**record)
        facts |= {name: tuple(facts[name]) for name in ("grid", "warnings")}
        if isinstance(apart := facts["second_per_grid_t"], list):
          facts["second_per_grid_t"] = tuple(apart)
        clip = clips.EncodedClip(**facts)
      except (KeyError, TypeError):
        continue
      if wanted and clip.record.indices != wanted:
        continue
      shapes = self._signal_shapes(clip.grid)
      for name in self.want:
        signal = self.cache.get(feature_cache.key(**key, signal=name))
        # An entry that does not fit is no entry: it is made anew.
        if signal and signal.arrays[name].shape == shapes[name]:
          clip.arrays[name] = signal.arrays[name]
      return key, clip
    return None, None

  def _write(self, one: Loaded, new: Mapping[str, np.ndarray]) -> None:
    clip, key = one.clip, one.key
    signals = {name: new[name] for name in self.want & new.keys()}
    for name, value in signals.items():
      self.cache.put(feature_cache.key(**key, signal=name), {name: value})
    if clips.FEATURES in new:
      arrays = {k: v for k, v in new.items() if k not in signals}
      facts = {
        "record": dataclasses.asdict(clip.record),
        "grid": clip.grid,
        "second_per_grid_t": clip.second_per_grid_t,
        "warnings": clip.warnings,
      }
      self.cache.put(feature_cache.key(**key), arrays, facts)

  def _signal_shapes(self, grid) -> dict[str, tuple[int, ...]]:
    if not self.want:
      return {}
    shapes = self.model.signal_shapes(int(np.prod(grid)))
    return {name: shapes[name] for name in self.want}


def open_store(
  experiment, processor, rule, *, make=FeatureStore, params=None, **options
) -> FeatureStore:
  """Returns the encoded clips of config.data, by the experiment's base model.

  `params` stand for that one's; `reading` is for `clips.ClipReader`.
  """
  data, checkpoint = experiment.config.data, experiment.loaded
  folder = data.feature_cache
  if processor.grid_of(rule) is None and "grid" not in options:
    # Those that training was given may be for fewer frames.
    strict = options.get("only_buckets", False)
    options["buckets"] = token_grid.make_buckets(
      data.buckets, processor, rule, strict=strict
    )
  reader = clips.ClipReader(
    experiment_lib.media_root(experiment.config), processor, rule,
    noted=bool(folder), max_replaced=data.max_replaced,
    call=decode_workers.WAYS[data.decode],
    **options.pop("reading", {}),
  )  # fmt: skip
  return make(
    reader, checkpoint.model, checkpoint.params if params is None else params,
    weights=checkpoint.identity["sha256"],
    cache=feature_cache.FeatureCache(folder) if folder else None, **options,
  )  # fmt: skip
