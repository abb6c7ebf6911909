r"""Fills a config's cache of video features ahead of time.

python -m cacovid_jax.preparation.encode_features --config configs/x.py
python -m cacovid_jax.preparation.encode_features --config configs/x.py \
    --shard=0/8
python -m cacovid_jax.preparation.encode_features --config configs/x.py \
    --questions=evaluation

Decodes every clip of the training questions, or of the questions that an
evaluation with this config asks, and runs the vision tower over it once, into
`config.data.feature_cache`, where training and evaluation find it: at the
frames of `data.frame_rule` or of `evals.frame_rule`. Several processes (one per
accelerator, say) share the work by --shard: which clips a process encodes
depends on the questions alone, and one that was stopped goes on behind what is
there. Clips that cannot be used are listed in the cache's `quarantine.jsonl`,
training rows that are left out in its `left_out.json`.
"""

import collections
import concurrent.futures
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Sequence

from cacovid_jax import command, errors, files, terminal
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import left_out, video
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import evaluation, shards
from cacovid_jax.inference import clip_queue, features
from cacovid_jax.training import batches
from cacovid_jax.training import run as run_lib

COMMAND = command.Command(
  __doc__,
  {
    "feature_cache": command.Flag("Folder to fill.", "data.feature_cache"),
    "questions": command.Flag(
      "Whose clips: training or evaluation.", default="training"
    ),
    "shard": command.Flag(
      "i/n: this process takes every n-th clip, from the i-th.", default="0/1"
    ),
  },
  config="required",
)

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclasses.dataclass
class Report:
  """What became of the clips of one share."""

  num_clips: int
  num_present: int = 0  # Whose features were there.
  num_encoded: int = 0  # Whose features were made.
  # Path -> why a clip cannot be used.
  failed: dict[str, str] = dataclasses.field(default_factory=dict)


def clips_of(
  rows: Sequence[question_lib.Question], shard: tuple[int, int] = (0, 1)
) -> list[question_lib.Question]:
  """Returns one question about each clip of a share.

  With `shard` (index, number) that is every number-th clip, by name.
  """
  index, number = shards.Shard(*shard).checked()
  first = {}
  for row in rows:
    first.setdefault(row.video, row)
  return [first[name] for name in sorted(first)][index::number]


def encode(
  store: features.FeatureStore,
  rows: Sequence[question_lib.Question],
  directory: str,
  *,
  shard: tuple[int, int] = (0, 1),
  num_threads: int = 2,
  rejected: left_out.RejectedClips | None = None,
) -> Report:
  """Makes the features that are missing; returns what was done.

  Args:
    store: with a cache on disk.
    rows: questions about the clips.
    directory: of the cache; once the size of a clip is known, it must have
      room for all that are missing, those of other shares too.
    shard: (index, number) of this process.
    num_threads: that decode ahead.
    rejected: log of clips that cannot be used.
  """
  rejected = left_out.RejectedClips() if rejected is None else rejected
  share = clips_of(rows, shard)
  report, todo, size, ready = Report(len(share)), [], 0, []
  mine = {row.video for row in share}
  others = [row for row in clips_of(rows) if row.video not in mine]

  def refuse(row, error):
    report.failed[row.video] = error.reason
    rejected.add(row, error)

  for row in share:
    try:
      known = store.cached_bytes(row.video)
    except video.VideoError as error:
      refuse(row, error)
      continue
    report.num_present += known > 0
    size = size or known
    if not known:
      todo.append(row)
  if size:
    _check_room(store, directory, size, len(todo), others)
  before = len(share) - len(todo)
  bar = progress_lib.Progress(len(share), start=before, description="encoded")
  loaded = _loaded(store, todo, num_threads)
  with bar:
    for done, (row, clip) in enumerate(loaded, start=1):
      if isinstance(clip, video.VideoError):
        refuse(row, clip)
      else:
        ready.append(clip)
      # As many at once as there are devices.
      if ready and (len(ready) == store.rows or done == len(todo)):
        store.finish(ready)
        report.num_encoded += len(ready)
        if not size:
          size = store.cached_bytes(ready[0].path)
          _check_room(store, directory, size, len(todo) - done, others)
        ready = []
      bar.update(before + done)
  return report


def _check_room(store, directory: str, size: int, count: int, others) -> None:
  """Refuses to go on to what the disk cannot hold.

  A clip has `size` bytes; this share still makes `count`, and then there are
  questions about the clips of other shares.
  """

  def is_missing(row):  # And can be made, since the clip is there.
    try:
      return not store.cached_bytes(row.video)
    except video.VideoError:
      return False

  free = shutil.disk_usage(directory).free
  if (count + len(others)) * size <= free:
    return
  # Only now, since to look for an entry reads the whole clip.
  count += sum(map(is_missing, others))
  if count * size > free:
    raise errors.UserError(
      f"{directory}: features of {count} more clips take {_text(count * size)}"
      f" ({_text(size)} each) and {_text(free)} are free; put"
      " config.data.feature_cache on a larger disk, or take fewer questions"
    )


def _text(count: int) -> str:
  unit = min(len(str(count)) - 1, 12) // 3
  return f"{count / 1000**unit:.4g} {_UNITS[unit]}"


def _loaded(store, rows, num_threads: int) -> Iterator:
  """Yields (question, clip or error) in order, decoding a few ahead."""

  def load(row):
    try:
      return row, store.load(row.video)
    except video.VideoError as error:
      return row, error

  pool = concurrent.futures.ThreadPoolExecutor(max(num_threads, 1))
  ahead = collections.deque()
  try:
    for row in rows:
      ahead.append(pool.submit(load, row))
      if len(ahead) > num_threads + 1:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def main(args):
  """Encodes the clips that the command line names."""
  shard, config = shards.Shard.parse(args.shard), args.config
  COMMAND.require(args, "feature_cache")
  told = f"--questions={args.questions}: use training or evaluation"
  errors.check(args.questions in ("training", "evaluation"), told)
  # Other configs may fill the same cache at the same time.
  work = f"encode-{args.questions}-{config_lib.config_hash(config)}"
  role, hint = shard.file(work), "or share the work with --shard"
  directory = config.data.feature_cache
  with files.claim(pathlib.Path(directory, role), what=directory, hint=hint):
    _encode(config, args.questions == "training", shard)


def _encode(config, training: bool, shard) -> None:
  """Encodes a share of the clips of training, or of an evaluation."""
  directory = config.data.feature_cache
  split = "videos_per_step" if training else "evals.batch_size"
  experiment = experiment_lib.Experiment.from_config(
    config, directory, split=split
  )
  if training:
    # A cache may serve several configs: what was left out is that of the last.
    questions = experiment_lib.read_questions(config, directory, resumes=False)
    processor = run_lib.make_processor(config, experiment.loaded.model)
    store = run_lib.open_store(experiment, processor, keep=1)
  else:
    found = evaluation.load_benchmark(experiment)
    questions, store = found.questions, clip_queue.open_queue(experiment)
  report = encode(
    store,
    questions,
    directory,
    shard=shard,
    num_threads=config.data.num_threads,
    rejected=left_out.RejectedClips(batches.rejected_path(directory)),
  )
  terminal.tell(
    f"{directory}: {report.num_clips} clips, {report.num_present} were there,"
    f" {report.num_encoded} encoded ({len(store.damaged)} with damaged"
    f" pictures), {len(report.failed)} cannot be used"
  )
  for name, reason in list(report.failed.items())[:10]:
    terminal.tell(f"  {name}: {reason.replace('_', ' ')}")


if __name__ == "__main__":
  COMMAND.run(main)
