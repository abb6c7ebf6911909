"""Clips of a media root at a frame rule, as the vision tower takes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cacovid_jax.data import frame_record, left_out, video
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.inference import tower
from cacovid_jax.models import processors, video_llm


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """One clip with what is known of it, or the reason why it cannot be used.

  Attributes:
    record: of its frames, with the fault of a clip that cannot be used.
    grid: (T, H, W).
    arrays: float32: "features" [N, D], "deep" [S, N, D] of models that have
      it, and the wanted ones of `video_llm.SIGNALS`; zeros of a clip that
      cannot be used.
    second_per_grid_t: see `video_llm.VideoFeatures`.
    warnings: what makes the frames less than they seem, one line each.
  """

  record: frame_record.FrameRecord
  grid: tuple[int, int, int]
  arrays: Mapping[str, np.ndarray]
  second_per_grid_t: float = 1.0
  warnings: tuple[str, ...] = ()

  @property
  def features(self) -> np.ndarray:
    return self.arrays[tower.FEATURES]

  @property
  def deep(self) -> np.ndarray | None:
    return self.arrays.get(tower.DEEP)

  @property
  def extras(self) -> dict[str, np.ndarray]:
    """Those of `video_llm.SIGNALS` that are there."""
    names = [name for name in video_llm.SIGNALS if name in self.arrays]
    return {name: self.arrays[name] for name in names}

  @property
  def fault(self) -> str:
    """Why the clip cannot be used, else ""."""
    return self.record.fault

  @property
  def frame_hash(self) -> str:
    return self.record.frame_hash

  @property
  def index_hash(self) -> str:
    return self.record.index_hash


class ClipReader:
  """Decodes clips, and refuses those that are known or found to be bad.

  Attributes:
    processor: frames to the tower's inputs.
    rule: which frames are shown.
    manifest: records that clips must agree with, or None.
  """

  def __init__(
    self,
    root: str,
    processor: processors.Processor,
    rule: frames_lib.FrameRule,
    *,
    limits: video.Limits | None = None,
    min_side: int = 0,
    refused: Mapping[str, str] | None = None,
    manifest: Any = None,
    hashed: bool = True,
    noted: bool = False,
  ):
    """Reads nothing.

    Args:
      root: folder that video paths are relative to.
      processor: see above.
      rule: see above.
      limits: caps on what is decoded.
      min_side: clips are refused whose frames have a side of so many pixels or
        fewer.
      refused: content hash -> reason, of clips that are known to be bad.
      manifest: `frame_manifest.FrameManifest`, where the frames are written
        down, and what they must agree with.
      hashed: whether records tell what the pixels are...
      noted: ... and the file, as they do with a manifest.
    """
    self.root, self.processor, self.rule = root, processor, rule
    self.manifest = manifest
    self._limits, self._min_side = limits, min_side
    self._refused, self._hashed = refused or {}, hashed
    self._noted = noted or manifest is not None

  @property
  def described(self) -> dict[str, Any]:
    """What frames depend on beside the file, for a key."""
    return {
      "decoder": frame_record.decoder(),
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
    if reason := self._refused.get(content):
      raise video.VideoError(file, reason, "refused in an earlier run")
    return content

  def size(self, path: str) -> tuple[int, int]:
    """Returns the (h, w) of a clip's frames, from its first one."""
    file = video.safe_path(self.root, path)
    return video.frame_size(file, self._limits)

  def grid(self, path: str, size: tuple[int, int]) -> tuple[int, int, int]:
    """Returns (T, H, W) of a clip of a size; `VideoError` if it has none."""
    try:
      return self.processor.grid(self.rule.num_frames, *size)
    except frames_lib.ShapeError as error:
      raise video.VideoError(
        path, "bad_shape", error.detail, error.mend
      ) from error

  def frames(self, path: str) -> np.ndarray:
    """Returns uint8[T,h,w,3] of the clip's own size; may raise `VideoError`."""
    return self._decode(path, None).frames

  def read(self, path: str) -> tuple[Clip, processors.TowerInputs, bool]:
    """Returns (a clip without arrays, the tower's inputs, whether its frames
    are those of the rule); `VideoError` if it cannot be used."""
    if self._refused:
      self.content(path)
    shown = self._decode(path, self._resize)
    file = video.safe_path(self.root, path)
    try:
      content = frame_record.hash_file(file) if self._noted else ""
    except OSError as error:
      raise video.VideoError(
        file, "unreadable", error.strerror or ""
      ) from error
    record = frame_record.FrameRecord.of(path, shown, content)
    fps = frames_lib.sampled_fps(len(shown.frames), shown.duration)
    inputs = self.processor(shown.frames, fps=fps, resized=True)
    clip = Clip(
      record, inputs.grid, {}, inputs.second_per_grid_t, shown.warnings
    )
    plain = self.rule(shown.num_frames, shown.duration)
    return clip, inputs, record.indices == tuple(plain.tolist())

  def check(self, path: str, record: frame_record.FrameRecord) -> None:
    """Refuses frames that are too small, or not those that are known."""
    if self.manifest:
      self.manifest.check(record)
    if min(record.size) <= self._min_side:
      error = self._too_small(*record.size)
      file = video.safe_path(self.root, path)
      raise video.VideoError(file, "bad_shape", error.detail, error.mend)

  def _decode(self, path: str, resize) -> video.Clip:
    def rule(count, seconds):
      known = self.manifest and self.manifest.indices(path, count)
      return known or self.rule(count, seconds)

    return video.decode(
      video.safe_path(self.root, path),
      rule,
      resize=resize,
      limits=self._limits,
      hashed=self._hashed,
    )

  def _resize(self, frame: np.ndarray) -> np.ndarray:
    """Returns a frame resized; `ShapeError` if it is too small."""
    if min(frame.shape[:2]) <= self._min_side:
      raise self._too_small(*frame.shape[:2])
    return self.processor.resize_frame(frame, self.rule.num_frames)

  def _too_small(self, height: int, width: int) -> frames_lib.ShapeError:
    return frames_lib.ShapeError(
      f"a frame of {width} x {height} pixels has a side of {self._min_side} or"
      " fewer",
      "leave the clip out",
    )
