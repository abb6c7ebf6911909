"""Writes the embedded benchmark to disk in the formats of the real ones.

  DIR/videos/<clip>.mp4     H.264 clips, 112 x 112, 8 frames a second; at full
                            size 224 x 224, one in two seconds or more
  DIR/train.json            rows as in Video-R1-260k
  DIR/validation.parquet    rows as in VideoMME; so are test and test_fresh
  DIR/captions.jsonl        one or two captions per clip, for retrieval
  DIR/decisive.jsonl        per question: the tokens that its answer rests on
  DIR/tfds/                 all splits as array_record files
  DIR/manifest.json         generator hash, seed, sizes; written last

A clip is a function of (seed, split, number): splits of other sizes share their
first clips.
"""

import concurrent.futures
import dataclasses
import fractions
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from cacovid_jax import errors, files, schema
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import decode_workers, readers, video_stream, wording
from cacovid_jax.synthetic import questions, render, world

FRAMES_PER_SECOND = 8
# Frames of a clip by its length class, of small stages; 16 are sampled.
DURATIONS = {"short": 32, "medium": 64, "long": 128}
# The order fixes the random streams: append only. `test_fresh` is a second
# test split that no choice was ever made on.
SPLITS = ("train", "validation", "test", "test_fresh")
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildConfig:
  """What to build."""

  variant: str = "dense"  # Of `world.VARIANTS`.
  seed: int = 0
  # In the order of `SPLITS`; 0 leaves a split out.
  clips: tuple[int, int, int, int] = (240, 40, 160, 0)
  questions_per_clip: int = 4  # At most; a scene may allow fewer.

  def __post_init__(self):
    errors.check_known("variant", self.variant, world.VARIANTS)
    if min(self.clips) < 0 or not any(self.clips):
      raise errors.UserError(f"clips {self.clips}: give one number per split")
    if self.questions_per_clip < 1:
      raise errors.UserError("questions_per_clip must be at least 1")


@functools.cache
def generator_hash(stage: world.Stage = world.SMALL) -> str:
  """Returns the sha256 of what is drawn and asked, in hexadecimal digits.

  Of frames (before the codec sees them), captions, questions and evidence
  tokens of three clips of each variant of a stage, not of the sources.
  """
  digest = hashlib.sha256()
  for variant in sorted(world.VARIANTS):
    if world.VARIANTS[variant].stage != stage:
      continue
    config = BuildConfig(variant=variant)
    for number in range(len(DURATIONS)):
      scene, asked = draw(config, "train", number)
      duration, length, rate = length_of(config, "train", number)
      digest.update(f"{variant} {duration} {rate}".encode())
      if world.VARIANTS[variant].seconds:
        # What is between sampled frames takes long, and is drawn as they are.
        length = stage.num_frames
      for frame in render.clip(scene, length):
        digest.update(np.ascontiguousarray(frame).data)
      captions = captions_of(config, "train", number, scene)
      digest.update(json.dumps(captions).encode())
      for one in asked:
        fields = [one.kind, one.text, one.options, one.answer, one.objects]
        fields.append(one.tokens(scene))
        digest.update(json.dumps(fields, default=int).encode())
  return digest.hexdigest()


def length_of(config: BuildConfig, split: str, number: int):
  """Returns (length class, frames, frames a second) of a clip's file.

  Seconds that are drawn have a random stream of their own. Frames are then one
  more than a multiple of T - 1, at least one in two seconds, so that T sampled
  evenly show the scene's plan exactly.
  """
  place = number % len(DURATIONS)
  duration = tuple(DURATIONS)[place]
  variant = world.VARIANTS[config.variant]
  if variant.seconds is None:
    return duration, DURATIONS[duration], FRAMES_PER_SECOND
  rng = np.random.default_rng((config.seed, SPLITS.index(split), number, 2))
  low, high = variant.seconds[place]
  seconds = int(rng.integers(low, high + 1))
  steps = variant.stage.num_frames - 1
  length = 1 + steps * -(-seconds // (2 * steps))
  return duration, length, fractions.Fraction(length, seconds)


def encode(path, frames, rate=FRAMES_PER_SECOND) -> None:
  """Writes uint8[h, w, 3] RGB frames, all of a size, as an H.264 mp4 file."""
  frames = iter(frames)
  first = next(frames)
  with (
    files.replacing(path) as partial,
    av.open(os.fspath(partial), "w", format="mp4") as container,
  ):
    stream = container.add_stream("libx264", rate=rate)
    stream.height, stream.width = first.shape[:2]
    stream.pix_fmt = "yuv420p"
    # Bytes that depend on the frames alone: several threads would make them
    # depend on the machine, and x264's macroblock tree reads memory that it
    # did not write (one clip in twenty differed from run to run).
    reproducible = {"threads": "1", "x264-params": "mbtree=0"}
    stream.options = dict(crf="12", preset="veryfast", g="32") | reproducible
    for frame in itertools.chain([first], frames):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      container.mux(stream.encode(picture))
    container.mux(stream.encode())


def draw(config: BuildConfig, split: str, number: int):
  """Returns (scene, questions) of a clip."""
  rng = np.random.default_rng((config.seed, SPLITS.index(split), number))
  variant = world.VARIANTS[config.variant]
  scene = world.sample_scene(rng, variant)
  asked = questions.sample_questions(
    rng, scene, config.questions_per_clip, variant.kind_shares
  )
  return scene, asked


def captions_of(config: BuildConfig, split: str, number: int, scene):
  """Returns one or two captions, of a random stream of their own."""
  key = (config.seed, SPLITS.index(split), number, 1)
  rng = np.random.default_rng(key)
  drawn = [questions.caption(rng, scene) for _ in range(2)]
  return list(dict.fromkeys(drawn))


def clip_path(config: BuildConfig, directory, split: str, number: int) -> str:
  """Returns where a clip's file is."""
  name = f"{config.variant}_{split}_{number:05d}.mp4"
  return os.path.join(directory, "videos", name)


def make_clip(config: BuildConfig, directory: str, split: str, number: int):
  """Writes a clip; returns (clip's name and captions, a row per question).

  Rows have id, clip, duration, question and decisive tokens.
  """
  scene, asked = draw(config, split, number)
  duration, length, rate = length_of(config, split, number)
  path = clip_path(config, directory, split, number)
  name = pathlib.Path(path).stem
  if not os.path.exists(path):
    encode(path, render.clip(scene, length), rate)
  row = {"clip": name, "duration": duration}
  told = {"clip": name, "captions": captions_of(config, split, number, scene)}
  return told, [
    row | {"id": f"{name}-{i}", "question": q, "tokens": q.tokens(scene)}
    for i, q in enumerate(asked)
  ]


def build(config, directory, *, num_workers=2, on_clip=lambda done: None):
  """Builds the benchmark unless it is there already; returns its directory.

  A directory with another build is refused. `num_workers` processes draw and
  encode; `on_clip` is called with the number of clips that are done.
  """
  directory = pathlib.Path(directory)
  stage = world.VARIANTS[config.variant].stage
  manifest = {
    **dataclasses.asdict(config),
    "clips": list(config.clips),
    "generator_hash": generator_hash(stage),
  }
  if not _is_there(directory, manifest):
    hint = "or give another --out"
    with files.claim(directory / "prepare", what=directory, hint=hint):
      # Another process may have ended in between.
      if not _is_there(directory, manifest):
        _build(config, directory, num_workers, on_clip)
        # Last: a directory with a manifest is complete.
        frames = {"num_frames": stage.num_frames}  # Of decisive tokens.
        files.write_json(directory / MANIFEST, manifest | frames)
  return str(directory)


def _is_there(directory, manifest) -> bool:
  """Returns whether a directory holds this build; refuses another one."""
  path = directory / MANIFEST
  if not path.exists():
    return False
  present = schema.read(path, dict, "give another --out or delete it")
  if different := [k for k in manifest if present.get(k) != manifest[k]]:
    raise errors.UserError(
      f"{directory} holds another build ({', '.join(different)} differ);"
      " give another --out or delete it"
    )
  return True


def _build(config, directory, num_workers, on_clip) -> None:
  """Writes all but the manifest."""
  if (directory / "videos").exists():
    # Unfinished: its clips may be of another build.
    shutil.rmtree(directory / "videos")
  files.make_folder(directory / "videos")
  jobs = [
    (split, number)
    for split, count in zip(SPLITS, config.clips, strict=True)
    for number in range(count)
  ]
  rows, captions = {split: [] for split, _ in jobs}, []
  made = _make_all(config, jobs, str(directory), num_workers)
  for done, ((split, _), found) in enumerate(zip(jobs, made, strict=True), 1):
    captions.append(found[0])
    rows[split].extend(found[1])
    on_clip(done)
  _write_lines(directory / "captions.jsonl", captions)
  _write_rows(directory, rows)


def _write_lines(path, entries) -> None:
  files.write(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def prepare(config, num_workers=None, *, variant="", directory="") -> None:
  """Builds a config's benchmark unless it is there.

  By default its first variant, in `data.root`.
  """
  section = config.prepare
  if len(section.clips) != len(SPLITS):
    raise errors.UserError(
      f"--clips takes {len(SPLITS)} whole numbers, for {', '.join(SPLITS)}"
    )
  variant, clips = variant or section.variants[0], tuple(section.clips)
  count = section.questions_per_clip
  wanted = BuildConfig(
    variant=variant, seed=section.seed, clips=clips, questions_per_clip=count
  )
  workers = num_workers or section.num_workers or os.cpu_count()
  directory = directory or config.data.root
  with progress_lib.Progress(sum(clips), description=f"{variant} clips") as bar:
    build(wanted, directory, num_workers=workers, on_clip=bar.update)


def _make_all(config, jobs, directory, num_workers):
  """Yields what `make_clip` returns of each job, (split, number)."""
  make = functools.partial(make_clip, config, directory)
  if num_workers < 2:
    yield from itertools.starmap(make, jobs)
    return
  # Not a pool of processes: each would import the command that was started.
  with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
    ask = functools.partial(_ask_a_child, config, directory)
    yield from pool.map(ask, jobs)


def _ask_a_child(config, directory, job):
  path = clip_path(config, directory, *job)
  # Drawing takes what it takes: limits are for clips from elsewhere.
  limits = video_stream.Limits(timeout_s=None)
  try:
    return decode_workers.run(_draw, path, config, *job, limits=limits)
  except video_stream.VideoError as error:
    told = error.reason, error.detail, "try --num_workers=1"
    raise video_stream.VideoError(path, *told) from error


def _draw(path, config, split, number, *, limits):
  """Returns what `make_clip` does of a clip's path, in a child."""
  del limits
  folder = os.path.dirname(os.path.dirname(path))
  return make_clip(config, folder, split, number)


def _video_r1_row(row) -> dict:
  question = row["question"]
  return {
    "problem_id": row["id"],
    "problem": question.text,
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": wording.letter_options(question.options),
    "solution": f"<answer>{questions.LETTERS[question.answer]}</answer>",
    "path": f"./videos/{row['clip']}.mp4",
    "data_source": f"synthetic/{question.kind}",
  }


def _videomme_row(row) -> dict:
  question = row["question"]
  return {
    "video_id": row["clip"].rsplit("_", 1)[1],
    "duration": row["duration"],
    "domain": "Synthetic",
    "sub_category": row["clip"].split("_", 1)[0],
    "url": "",
    "videoID": row["clip"],
    "question_id": row["id"],
    "task_type": question.kind,
    "question": question.text,
    "options": wording.letter_options(question.options),
    "answer": questions.LETTERS[question.answer],
  }


def _write_rows(directory, rows) -> None:
  """Writes every split's rows, their decisive tokens, and the TFDS files."""
  # Here: processes that draw clips do without TensorFlow Datasets.
  from cacovid_jax.data import tfds as tfds_lib

  splits = {}
  lines = [
    {"question_id": row["id"], "tokens": row["tokens"]}
    for row in itertools.chain(*rows.values())
  ]
  _write_lines(directory / "decisive.jsonl", lines)
  for split, found in rows.items():
    if split == "train":
      path = directory / "train.json"
      entries = list(map(_video_r1_row, found))
      files.write(path, json.dumps(entries, indent=1) + "\n")
      splits[split] = readers.read_video_r1(str(path), str(directory))
    else:
      path = directory / f"{split}.parquet"
      table = pa.Table.from_pylist(list(map(_videomme_row, found)))
      with files.replacing(path) as partial:
        pyarrow.parquet.write_table(table, partial)
      splits[split] = readers.read_videomme(
        str(path), str(directory), style="video-r1"
      )
  tfds_lib.prepare(splits, directory / "tfds")
