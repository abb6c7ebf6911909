"""The section `flip`: single bytes of checkpoints and logs are changed."""

import functools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence

from cacovid_jax import errors, metrics
from cacovid_jax.data import answer_log
from cacovid_jax.training import checkpointing

_BLOCK = 100  # Flips of a row in the ledger.
_ANSWERS = "answers.jsonl"


def flip(ground, rng, number: int, size: int):
  """Changes single bytes; each must be noticed."""
  kind = ("checkpoint", "answer log", "metrics")[number % 3]
  name, file, read = "train", metrics.FILE, _lines
  if kind == "answer log":
    name, file = "evaluate", _ANSWERS
    run = answer_log.header(ground.reference(name)[0] / file)
    read = functools.partial(_answers, run=run)
  source = ground.reference(name)[0]
  if kind == "checkpoint":
    source = sorted((source / "checkpoints").iterdir())[-1]
    file, read = "**/*", _state
  paths = [p for p in sorted(source.glob(file)) if p.is_file()]
  paths = [p.relative_to(source) for p in paths if p.stat().st_size]
  known, faults = read(_copy(ground, source, paths)), []
  for _ in range(count := min(size, _BLOCK)):
    copy, path = _copy(ground, source, paths), paths[rng.integers(len(paths))]
    data = bytearray((copy / path).read_bytes())
    place, bits = int(rng.integers(len(data))), int(rng.integers(1, 256))
    data[place] ^= bits
    (copy / path).write_bytes(data)
    if not noticed(read, copy, known):
      faults.append(f"{path}: byte {place} ^ {bits} is not noticed")
  return {"kind": kind, "count": count, "faults": len(faults), "told": faults}


def _copy(ground, source, paths) -> pathlib.Path:
  """Returns a folder of the same name, which tells a step, with some files."""
  copy = ground.fresh("flip") / source.name
  for path in paths:
    (copy / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / path, copy / path)
  return copy


def noticed(read: Callable, folder: pathlib.Path, known: Sequence[str]) -> bool:
  """Returns whether damage is refused, or told and without a wrong entry.

  Args:
    read: folder -> entries, or a `UserError`.
    folder: with the damage; a file that it gets tells of it, as a warning does.
    known: entries without the damage.
  """
  said, before = [], sorted(os.listdir(folder))
  handler = logging.Handler(logging.WARNING)
  handler.emit = said.append
  logging.getLogger().addHandler(handler)
  try:
    found = read(folder)
  except errors.UserError:
    return True
  finally:
    logging.getLogger().removeHandler(handler)
  told = bool(said) or sorted(os.listdir(folder)) != before
  return told and {*found} <= {*known}


def _state(folder) -> list[str]:
  """Verifies a step of a checkpoint, which has no entries."""
  verdict = checkpointing.verify(folder)
  errors.check(verdict.ok, verdict.reason)
  return []


def _lines(folder) -> list[str]:
  """Returns lines of metrics."""
  return [json.dumps(line, sort_keys=True) for line in metrics.read(folder)]


def _answers(folder, run) -> list[str]:
  """Returns the answers of a log."""
  with answer_log.AnswerLog(folder / _ANSWERS, run) as answers:
    return [json.dumps(item, sort_keys=True) for item in answers.items()]
