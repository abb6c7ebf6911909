"""Clips of a media root at a frame rule, and the tower that encodes them."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cacovid_jax.data import frame_record, left_out, video
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.models import processors, video_llm
from cacovid_jax.parallel import mesh as mesh_lib

# Names of a clip's arrays beside those of `video_llm.SIGNALS`.
FEATURES, DEEP = "features", "deep"


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedClip:
  """One clip with what is known of it, or the reason why it cannot be used.

  `arrays` are float32: "features" [N, D], "deep" [S, N, D] of models that have
  it, and the wanted ones of `video_llm.SIGNALS`; zeros of a clip that cannot be
  used. They lie on the host, or on the device and may still be computed.
  """

  record: frame_record.FrameRecord
  grid: tuple[int, int, int]  # (T, H, W).
  arrays: Mapping[str, np.ndarray | jax.Array]
  # See `processors.TowerInputs`.
  second_per_grid_t: float | tuple[float, ...] = 1.0
  warnings: tuple[str, ...] = ()  # What makes frames less than they seem.

  @property
  def features(self) -> np.ndarray:
    """float32[N, D]."""
    return self.arrays[FEATURES]

  @property
  def deep(self) -> np.ndarray | None:
    """float32[S, N, D]; None of models without it."""
    return self.arrays.get(DEEP)

  @property
  def fault(self) -> str:
    """Why it cannot be used; empty if it can."""
    return self.record.fault

  frame_hash = property(lambda self: self.record.frame_hash)
  index_hash = property(lambda self: self.record.index_hash)

  @property
  def extras(self) -> dict[str, np.ndarray]:
    """Those of `video_llm.SIGNALS` that are there."""
    names = [name for name in video_llm.SIGNALS if name in self.arrays]
    return {name: self.arrays[name] for name in names}


@dataclasses.dataclass(frozen=True, eq=False)
class ClipReader:
  """Decodes clips, and refuses those that are known or found to be bad."""

  root: str  # Folder that video paths are relative to.
  processor: processors.Processor  # Frames to the tower's inputs.
  rule: frames_lib.FrameRule  # Which frames are shown.
  limits: video.Limits | None = None  # Caps on what is decoded.
  # Clips are refused whose frames have a side of so many pixels or fewer.
  min_side: int = 0
  # Share of the frames above which those that cannot be decoded make a clip
  # unfit.
  max_replaced: float = 0.8
  # Content hash -> reason, of clips that are known to be bad.
  refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # `frame_manifest.FrameManifest`, where the frames are written down, and what
  # they must agree with.
  manifest: Any = None
  hashed: bool = True  # Whether records tell what the pixels are...
  noted: bool = False  # ... and the file, as they do with a manifest.
  call: Callable = operator.call  # Of `decode_workers.WAYS`.

  @property
  def described(self) -> dict[str, Any]:
    """What frames depend on beside the file, for a key."""
    return {
      "decoder": frame_record.decoder(),
      "reader": 2,  # Of `video`; this one counts damage.
      "frames": dataclasses.asdict(self.rule),
      "preprocessing": self.processor.identity,
    }

  def known(self, path: str) -> frame_record.FrameRecord | None:
    """Returns the record that a clip must agree with, if there is one."""
    return self.manifest[path] if self.manifest else None

  def content(self, path: str) -> str:
    """Returns the hash of a clip's bytes; `VideoError` if it is refused."""
    file = video.safe_path(self.root, path)
    content = left_out.content_hash(file)
    if reason := self.refused.get(content):
      raise video.VideoError(file, reason, "refused in an earlier run")
    return content

  def grid(self, path: str, size=None) -> tuple[int, int, int]:
    """Returns (T, H, W) of a clip; `VideoError` if it has none.

    Without its (h, w), the clip's first frame is read.
    """
    if size is None:
      file = video.safe_path(self.root, path)
      size = self.call(video.frame_size, file, limits=self.limits)
    try:
      return self.processor.grid(self._count(path), *size)
    except frames_lib.ShapeError as error:
      raise video.bad_shape(path, error) from error

  def decode(self, path: str, resize=None) -> video.Clip:
    """Returns the frames shown, of the clip's own size unless resized."""
    rule = (self.manifest and self.manifest.rule(path)) or self.rule
    return self.call(
      video.decode, video.safe_path(self.root, path), rule, resize=resize,
      limits=self.limits, hashed=self.hashed,
    )  # fmt: skip

  def read(self, path: str) -> tuple[EncodedClip, processors.TowerInputs, bool]:
    """Returns (a clip without arrays, the tower's inputs, whether its frames
    are those of the rule); `VideoError` if it cannot be used."""
    if self.refused:
      self.content(path)
    resize = functools.partial(
      self.processor.resize_frame, num_frames=self._count(path),
      above=self.min_side,
    )  # fmt: skip
    shown = self.decode(path, resize)
    file = video.safe_path(self.root, path)
    try:
      noted = self.noted or self.manifest is not None
      content = frame_record.hash_file(file) if noted else ""
    except OSError as error:
      raise video.VideoError(
        file, "unreadable", error.strerror or ""
      ) from error
    record = frame_record.FrameRecord.of(path, shown, content)
    inputs = self._inputs(file, shown)
    apart = inputs.second_per_grid_t
    clip = EncodedClip(record, inputs.grid, {}, apart, shown.warnings)
    plain = self.rule(shown.num_frames, shown.duration)
    return clip, inputs, record.indices == tuple(plain.tolist())

  def _count(self, path: str) -> int:
    """Returns T of a clip, which is looked into where that differs."""
    if (known := self.known(path)) and known.indices:
      return len(known.indices)
    if self.rule.fills:
      return self.rule.num_frames
    file = video.safe_path(self.root, path)
    found = self.call(video.probe, file, limits=self.limits)
    return len(self.rule(found.num_frames, found.duration))

  def _inputs(self, file: str, shown: video.Clip) -> processors.TowerInputs:
    """Returns what the tower takes of frames that are resized already."""
    rate = frames_lib.source_fps(shown.num_frames, shown.duration)
    if rate is None and self.processor.tells_time:
      raise video.VideoError(
        file, "unreadable", "its frames a second are not known, and prompts of"
        " this model tell the time"
      )  # fmt: skip
    return self.processor(
      shown.frames,
      fps=frames_lib.sampled_fps(len(shown.frames), shown.duration),
      times=None if rate is None else shown.indices / rate,
      resized=True,
      as_bytes=True,  # A quarter of what goes to the device.
    )

  def check(self, path: str, record: frame_record.FrameRecord) -> None:
    """Refuses frames that are too small or replaced, or not those known."""
    if self.manifest:
      self.manifest.check(record)
    try:
      frames_lib.check_side(*record.size, self.min_side)
    except frames_lib.ShapeError as error:
      file = video.safe_path(self.root, path)
      raise video.bad_shape(file, error) from error
    count = len(record.indices)
    if record.replaced > self.max_replaced * count:
      detail = f"{record.replaced} of {count} frames cannot be decoded"
      file = video.safe_path(self.root, path)
      raise video.VideoError(file, "too_damaged", detail)


class Tower:
  """The programs of a vision tower; `rows` clips are encoded at once."""

  def __init__(self, model, params, mesh: Mesh | None):
    """Compiles nothing yet.

    Each device of the mesh's `data` axis encodes a clip; None is one at once.
    """
    self._model, self._mesh = model, mesh
    self.rows = 1 if mesh is None else mesh.shape["data"]
    # None where nothing is to be encoded; the language model encodes nothing.
    params = {k: v for k, v in (params or {}).items() if k != "language_model"}
    if mesh is not None:
      params = mesh_lib.put(params, mesh, mesh_lib.P())
    self._params, self._over = params, mesh_lib.mesh_of(params)

  def __call__(self, names: frozenset[str], inputs) -> list[dict[str, Any]]:
    """Returns {name: float array} of each of the clips' TowerInputs.

    On one device they are not waited for.
    """
    wanted = [()] if FEATURES in names else []
    if signals := video_llm.check_signals(names - {FEATURES}):
      wanted.append(signals)
    found = [{} for _ in inputs]
    for signals in wanted:
      for out, new in zip(found, self._run(signals, inputs), strict=True):
        out |= new
    return found

  def _run(self, signals, inputs) -> list[dict[str, jax.Array]]:
    rows = self._mesh is not None
    program = tower_program(self._model, signals, self._over, rows=rows)
    if not rows:
      return [program(self._params, one) for one in inputs]
    count = len(inputs)
    inputs = [*inputs, *[inputs[-1]] * (self.rows - count)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *inputs)
    out = jax.device_get(program(self._params, stacked))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(count)]


@functools.lru_cache(maxsize=32)
def tower_program(model, signals, mesh, *, rows=False):
  """Returns the jitted tower; stores of equal models compile it once.

  A function of weights, which lie on the mesh, and `TowerInputs` of one clip,
  or with `rows` of several: {FEATURES and perhaps DEEP}, or {name: array} of
  the wanted signals.
  """

  def encode(params, inputs):
    video = model.encode(params, inputs, signals=signals)
    # What is not returned is not run.
    if signals:
      return dict(video.signals)
    found = {FEATURES: video.features, DEEP: video.deep}
    return {k: v for k, v in found.items() if v is not None}

  if not rows:
    return mesh_lib.jit(mesh_lib.whole(encode, mesh), "tower", weights=(0,))
  return mesh_lib.jit_rows(
    lambda params, inputs: jax.lax.map(lambda one: encode(params, one), inputs),
    mesh,
    "tower",
  )
