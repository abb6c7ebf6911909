"""Clips one after the other, decoded ahead; those that cannot be used stay."""

import collections
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Iterable

import numpy as np

from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import frame_record, video
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.inference import clips, features
from cacovid_jax.models import hub, video_llm


@dataclasses.dataclass(eq=False, repr=False)
class ClipQueue(features.FeatureStore, contextlib.AbstractContextManager):
  """A store of which `queue[path]` is an encoded clip, or has its fault.

  Threads decode ahead what `prefetch` names. Where grids differ, `survey`
  finds them before anything is decoded.
  """

  _: dataclasses.KW_ONLY
  num_threads: int = 2

  def __post_init__(self, params, mesh):
    super().__post_init__(params, mesh)
    self._faults: dict[str, str] = {}
    self._pool = concurrent.futures.ThreadPoolExecutor(
      self.num_threads, "decode"
    )
    self._ahead: dict[str, concurrent.futures.Future] = {}

  def survey(self, paths: Iterable[str]) -> None:
    """Finds out the grids of clips, by their first frames if need be.

    The grid of most stands for those that cannot be used: give all at once.
    """
    if self._given:
      return
    known = self._grids.keys() | self._faults.keys()
    paths = [path for path in dict.fromkeys(paths) if path not in known]
    if not paths:
      return
    found = self._pool.map(self._find_grid, paths)
    title = "clip shapes"
    with progress_lib.Progress(len(paths), description=title) as progress:
      for done, path in enumerate(paths, start=1):
        result = next(found)
        known = self._faults if isinstance(result, str) else self._grids
        known[path] = result
        progress.update(done)
    counts = collections.Counter(self._grids.values())
    if not counts:
      first = next(iter(self._faults))
      raise errors.UserError(
        f"none of the {len(self._faults)} clips below {self.reader.root} can be"
        f" read (first: {first}, {self._faults[first]}); download them, or"
        " correct the folder of the clips"
      )
    self.grid = counts.most_common(1)[0][0]

  def grid_of(self, path: str) -> tuple[int, int, int]:
    """Returns (T, H, W) of a clip; of one that cannot be used, `grid`."""
    self.survey([path])
    return self._grids.get(path, self.grid)

  def __getitem__(self, path: str) -> clips.EncodedClip:
    if (clip := self._recall(path)) is not None:
      return clip
    self.prefetch([path])
    loaded = self._ahead.pop(path).result()
    if self.reader.manifest:
      # Here and not in the threads, so that the order is that of the questions.
      self.reader.manifest.add(loaded.clip.record)
    return self.finish([loaded])[0]

  def prefetch(self, paths: Iterable[str]) -> None:
    """Starts to decode clips that will be asked for next."""
    paths = list(dict.fromkeys(paths))
    # Not from the threads that decode: they would wait for each other.
    self.survey(paths)
    for path in paths:
      if path not in self._clips and path not in self._ahead:
        self._ahead[path] = self._pool.submit(self._load_or_fault, path)

  def discard(self, keep: Iterable[str] = ()) -> None:
    """Drops what was decoded ahead, but clips to `keep`."""
    for path in self._ahead.keys() - set(keep):
      self._ahead.pop(path).cancel()

  def observe(self, want: Iterable[str]) -> None:
    """Changes what clips bring along; those that bring other things go."""
    want = frozenset(video_llm.check_signals(want))
    if want != self.want:
      self.want = want
      self.discard()
      self.clear()

  def close(self) -> None:
    """Stops the threads."""
    self._pool.shutdown(cancel_futures=True)
    if self.watch:
      self.watch.close()

  def __exit__(self, *exc_info):
    self.close()

  def unusable(self, path: str, reason: str) -> clips.EncodedClip:
    """Returns what stands for a clip that cannot be used."""
    grid = self.grid_of(path)
    if not self._given:
      # It stays that one, whatever most clips of a later survey have.
      self._grids.setdefault(path, grid)
    count, width = int(np.prod(grid)), self.model.config.text.hidden_size
    shapes = {clips.FEATURES: (count, width), **self._signal_shapes(grid)}
    if self.model.num_deep:
      shapes[clips.DEEP] = (self.model.num_deep, count, width)
    arrays = {k: np.zeros(shape, np.float32) for k, shape in shapes.items()}
    record = frame_record.FrameRecord(video=path, fault=reason)
    # Prompts of some models tell the time of each temporal patch.
    tells_time = self.reader.processor.tells_time
    apart = (0.0,) * grid[0] if tells_time else 1.0
    return clips.EncodedClip(record, grid, arrays, apart)

  def _load_or_fault(self, path: str) -> features.Loaded:
    # A clip that could not be used when batches were made is not used later.
    known = self.reader.known(path)
    reason = self._faults.get(path) or (known.fault if known else "")
    if not reason:
      try:
        return self.load(path)
      except video.VideoError as error:
        reason = _told(error)
    return features.Loaded(path, self.unusable(path, reason))

  def _find_grid(self, path: str) -> tuple[int, int, int] | str:
    """Returns the grid of a clip, or why it has none."""
    known = self.reader.known(path)
    if known and known.fault:
      return known.fault
    try:
      size = known.size if known else None
      if not known and (facts := self.facts(path)):
        size = facts["record"]["size"]
      return self.reader.grid(path, size)
    except video.VideoError as error:
      return _told(error)


def _told(error: video.VideoError) -> str:
  # Without the path: results must not depend on where the data lies.
  return error.reason.replace("_", " ")


def read_processor(experiment: experiment_lib.Experiment):
  """Returns what an evaluation does to frames, with the paper's bounds."""
  path, data = experiment.config.model.path, experiment.config.data
  found = experiment.checkpoint.model.read_processor(hub.find(path))
  return found.with_paper_bounds(data.min_pixels, data.max_pixels)


def open_queue(
  experiment, want=frozenset(), *, keep=0, grid=None, watch=None, **reading
) -> ClipQueue:
  """Returns the encoded clips of config.data, at the frames of config.evals.

  `keep` of them are held in memory, 0 for those of this batch and of the next,
  and for those of one batch where a `watch` leaves them on the device;
  `reading` are options of `clips.ClipReader`, `watch` is as of the store.
  """
  config = experiment.config
  most = (1 if watch else 2) * config.evals.batch_size
  return features.open_store(
    experiment, read_processor(experiment),
    frames_lib.FrameRule(config.data.num_frames, config.evals.frame_rule),
    make=ClipQueue, keep=keep or most, want=want,
    num_threads=max(config.data.num_threads, 1), watch=watch,
    reading=reading, **({} if grid is None else {"grid": grid}),
  )  # fmt: skip
