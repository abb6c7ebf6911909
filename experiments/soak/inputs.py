"""The sections `fuzz` and `decode`: damaged files, and clips of every kind."""

import functools
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import traceback
from collections.abc import Callable
from typing import NamedTuple

from absl import logging
from flax import traverse_util

from cacovid_jax import base_config, errors, evaluate, files, metrics
from cacovid_jax import config as config_lib
from cacovid_jax.data import answer_log, decode_workers, frames, readers, video
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints, safetensors_io
from cacovid_jax.policy import loading
from experiments import clip_matrix

_BLOCK = 500  # Inputs of a row in the ledger.
_SECONDS, _BYTES = 10.0, 2 * 2**30  # Most that an input may take.
# Of ten blocks: 20 000, 30 000 and 50 000 of 100 000 inputs.
_GROUPS = ("media", "tables", "texts", "texts", "tables", "texts", "media",
           "texts", "tables", "texts")  # fmt: skip
_EVERY = 17  # Of the matrix's clips, so many are left out before one is taken.
_EDGE = 1024  # Bytes of a header or a footer, which most of the changes meet.
_WORD = re.compile(rb'"[^"\n]*"|[\w.+-]+')
_NASTY = (
  b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"1.5", b"true", b'""',
  b"9" * 20, b"9" * 5000, b"[]", b"{}", b"[" * 5000, b'"\\ud800"', b"\xff",
  b"\0", b'"', b"../../x", b"x" * 70_000, b"{{", b"%}", b"a=b", b"\xef\xbc\x92",
)  # fmt: skip
_OWN = {
  "own_json/questions.json": '[{"video": "a.mp4", "question": "What?",'
  ' "options": ["red", "blue"], "answer": "A", "split": "test", "id": 7}]',
  "own_csv/questions.csv": "video,question,option_a,option_b,answer,id\n"
  'a.mp4,"What, then?",red,blue,red,1\nb.mp4,How?,red,blue,B,2\n',
}


_MODEL = "data/llava_onevision"
_load = functools.cache(checkpoints.load)


def _clip(path) -> None:
  """Samples a clip, as evaluation does."""
  limits = video.Limits(timeout_s=_SECONDS / 2)
  decode_workers.run(video.decode, path, frames.FrameRule(8), limits=limits)


def _processor(path) -> None:
  """Reads what a model's folder says about pixels."""
  model = checkpoints.make_model(checkpoints.load_config(path.parent))
  model.read_processor(path.parent)


def _policy(path) -> None:
  """Loads a policy by its description."""
  model = _load(path.parents[1] / _flat(_MODEL))
  loading.load_policy(path.parent, model)


def _prompt(path) -> None:
  """Renders a chat template."""
  tokenizer_lib.Tokenizer.from_directory(path.parent).render("What?")


def _answers(path) -> None:
  """Opens a log of answers."""
  answer_log.AnswerLog(path, answer_log.header(path)).close()


def _override(path) -> None:
  """Gives a command a value for a key."""
  text = path.read_bytes().decode(errors="surrogateescape")
  evaluate.COMMAND.parse(["evaluate", f"--config.{text}"])


class _Sample(NamedTuple):
  """What is damaged."""

  group: str
  folder: str  # Below the ground's.
  pattern: str  # Of the files that are damaged one at a time.
  read: Callable[[pathlib.Path], object]


_SAMPLES = (
  _Sample("texts", "own_json", "*", readers.read_own),
  _Sample("media", "data/dense/videos", "*", _clip),
  _Sample("media", "matrix", "*", _clip),
  _Sample("tables", "data/dense", "*.parquet", readers.read_videomme),
  _Sample(
    "tables",
    _MODEL,
    "*.safetensors",
    lambda path: [
      tensor.view() for tensor in safetensors_io.list_tensors(path)
    ],
  ),
  _Sample("tables", "reference_train/policy", "*.safetensors", loading.read),
  _Sample("texts", "data/dense", "train.json", readers.read_video_r1),
  _Sample("texts", "own_csv", "*", readers.read_own),
  _Sample("texts", _MODEL, "config.json", _processor),
  _Sample("texts", _MODEL, "*processor*.json", _processor),
  _Sample("texts", _MODEL, "token*.json", _prompt),
  _Sample("texts", _MODEL, "chat_template*", _prompt),
  _Sample("texts", "reference_train/policy", "*.json", _policy),
  _Sample("texts", "reference_train", "config.json", config_lib.load),
  _Sample(
    "texts",
    "reference_train",
    metrics.FILE,
    lambda path: metrics.read(path.parent),
  ),
  _Sample("texts", "reference_evaluate", "answers.jsonl", _answers),
  _Sample("texts", "overrides", "*", _override),
)


def fuzz(ground, rng, number: int, size: int):
  """Reads damaged files, which must be read or refused.

  A fault is an exception that is no `UserError`, a hang, the end of the process
  or too much memory. What did it is kept in the folder `failed`.
  """
  group, folder, faults = _GROUPS[number % len(_GROUPS)], _copies(ground), []
  found = {
    which: sorted((folder / _flat(sample.folder)).glob(sample.pattern))
    for which, sample in enumerate(_SAMPLES)
    if sample.group == group
  }
  chosen = [(which, paths) for which, paths in found.items() if paths]
  with _Worker() as worker:
    for index in range(count := min(size, _BLOCK)):
      which, paths = chosen[index % len(chosen)]
      path = paths[rng.integers(len(paths))]
      before = path.read_bytes()
      path.write_bytes(damaged(before, rng, words=group == "texts"))
      if told := worker.read(which, path):
        kept = ground.workdir / "failed" / f"{number}_{index}_{path.name}"
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(path, kept)
        faults.append(f"{kept.name}: {told}")
      path.write_bytes(before)
  return {"kind": group, "count": count, "faults": len(faults), "told": faults}


def _copies(ground) -> pathlib.Path:
  """Returns a folder of all samples' folders, making those that are missing."""
  ground.reference("evaluate")
  for name, text in _OWN.items():
    (ground.workdir / name).parent.mkdir(exist_ok=True)
    files.write(ground.workdir / name, text)
  overrides, matrix = ground.workdir / "overrides", ground.workdir / "matrix"
  if not overrides.exists():
    overrides.mkdir()
    config = config_lib.to_dict(base_config.get_config())
    for key, value in traverse_util.flatten_dict(config, sep=".").items():
      (overrides / key).write_text(f"{key}={value}")
  if not matrix.exists():
    matrix.mkdir()
    for number, kind in enumerate(clip_matrix.kinds()[::_EVERY]):
      if path := clip_matrix.make(ground.workdir / "made", kind):
        shutil.copy(path, matrix / f"{number}_{path.name}")
  folder = ground.fresh("fuzz")
  for name in dict.fromkeys(sample.folder for sample in _SAMPLES):
    (folder / _flat(name)).mkdir()
    for path in (ground.workdir / name).iterdir():
      if path.is_file():
        shutil.copy(path, folder / _flat(name))
  return folder


def _flat(folder: str) -> str:
  """Returns the name of a folder's copy."""
  return folder.replace("/", "_")


def damaged(data: bytes, rng, *, words: bool) -> bytes:
  """Returns bytes with one to three changes; of texts, words as well."""
  out = bytearray(data)
  for _ in range(rng.integers(1, 4)):
    if words and rng.random() < 0.6:
      spans = [match.span() for match in _WORD.finditer(out)]
      if spans:
        start, end = spans[rng.integers(len(spans))]
        out[start:end] = _NASTY[rng.integers(len(_NASTY))]
        continue
    most = max(1, len(out))
    edge, tail = min(most, _EDGE), rng.random() < 0.5
    start = int(rng.integers(most if rng.random() < 0.3 else edge))
    start = most - 1 - start if tail else start
    end = start + int(rng.integers(1, 64))
    change = rng.integers(6)
    if change < 3 and out:
      out[start] ^= int(rng.integers(1, 256))
    elif change == 3:
      del out[start:end]
    elif change == 4:
      out[start:start] = out[start:end]
    else:
      del out[start + 1 :]
  return bytes(out)


class _Worker:
  """A process that imports the package once and reads file after file."""

  def __enter__(self):
    context = multiprocessing.get_context("spawn")
    self._here, there = context.Pipe()
    self._process = context.Process(target=_serve, args=(there,), daemon=True)
    self._process.start()
    there.close()
    self._here.recv()  # The imports are done.
    return self

  def __exit__(self, *unused):
    self._process.kill()
    self._process.join()
    self._here.close()

  def read(self, which: int, path: pathlib.Path) -> str:
    """Returns what is wrong with how a sample's file is read, or ""."""
    try:
      self._here.send((which, path))
      if not self._here.poll(_SECONDS):
        told = f"no end within {_SECONDS:g} s"
      else:
        told, used = self._here.recv()
        if used <= _BYTES:
          return told
        told = f"{used} bytes of memory"
    except (EOFError, OSError):
      self._process.join()
      told = f"the process ended with {self._process.exitcode}"
    self.__exit__()
    self.__enter__()
    return told


def _serve(connection) -> None:
  """Reads what it is sent; answers with (fault, most bytes of memory)."""
  quiet = os.open(os.devnull, os.O_WRONLY)
  os.dup2(quiet, 1)
  os.dup2(quiet, 2)
  logging.set_verbosity(logging.FATAL)
  # So much more is refused at once; JAX reserves some for each processor.
  resource.setrlimit(resource.RLIMIT_DATA, (8 * _BYTES, 8 * _BYTES))
  connection.send(None)
  while True:
    which, path = connection.recv()
    try:
      _SAMPLES[which].read(path)
      told = ""
    except errors.UserError:
      told = ""
    except BaseException:  # Panics of libraries in Rust among them.
      told = traceback.format_exc()[-2000:]
    used = decode_workers.peak_memory()
    connection.send((told, used))


def decode(ground, rng, number: int, size: int):
  """Compares a clip's frames with those of a whole decode in sequence.

  Of the generated matrix first, then of `ground.clips`; None behind the last.
  """
  del rng, size
  kinds = clip_matrix.kinds()
  if number >= len(kinds) + len(ground.clips):
    return None
  if number < len(kinds):
    # Some containers do not take some streams.
    path = clip_matrix.make(ground.workdir / "made", kinds[number])
    kind = "generated"
  else:
    path, kind = pathlib.Path(ground.clips[number - len(kinds)]), "given"
  found = clip_matrix.faults(path) if path else []
  told = [f"{path.name}: {fault}" for fault in found]
  count = int(path is not None)
  return {"kind": kind, "count": count, "faults": len(told), "told": told}
