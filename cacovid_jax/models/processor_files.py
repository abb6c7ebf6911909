"""What the files of a checkpoint say of the frames that its tower takes."""

import json
import math
import os

from cacovid_jax import errors

_MAX_BYTES = 2**20
# Steps of the reference processors that we take, as they do by default.
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True}
_STEPS |= {"do_center_crop": False}
# Files and keys in them, in the reference's order: transformers 5 stores the
# video part in the first, earlier releases wrote the others.
_FILES = {
  "processor_config.json": "video_processor",
  "video_preprocessor_config.json": None,
  "preprocessor_config.json": None,
}
# What reading a file raises that holds something else than it should.
_UNUSABLE = (OSError, ValueError, TypeError, LookupError, AttributeError)
_UNUSABLE += (OverflowError, RecursionError)


def read(directory, find, make):
  """Returns `make(find(entry))` of a directory's first file with an entry.

  The `UserError`s of both and what `find` cannot use name the file.
  """
  for name, key in _FILES.items():
    path = os.path.join(directory, name)
    try:
      if os.path.isfile(path) and (found := _find(path, key, find)) is not None:
        return make(found)
    except errors.UserError as error:
      raise errors.UserError(f"{path}: {error}") from error
  raise errors.UserError(
    f"{directory}: no preprocessor_config.json or"
    " video_preprocessor_config.json; copy it from the checkpoint's origin"
  )


def statistics(entry, needed):
  """Returns the fields that every processor has, three numbers a statistic.

  Those that are not there are left out, unless they are needed.
  """
  found = {}
  for name in ("mean", "std"):
    if needed or entry.get(f"image_{name}") is not None:
      first, second, third = map(float, entry[f"image_{name}"])
      found[name] = (first, second, third)
  if entry.get("resample") is not None:
    found["resample"] = int(entry["resample"])
  return found


def _find(path, key, find):
  """Returns `find(entry)` of a file, or None if it has no entry."""
  try:
    if not isinstance(entry := _read(path, key), dict):
      return None
    _check_steps(entry)
    return find(entry)
  except _UNUSABLE as error:
    reason = f"no {error}" if isinstance(error, KeyError) else error
    raise errors.UserError(
      f"not a usable processor file ({reason}); copy it again from the"
      " checkpoint's origin"
    ) from error


def _read(path, key):
  """Returns the JSON object in a small file, or what is under a key of it."""
  if os.path.getsize(path) > _MAX_BYTES:
    raise ValueError(f"above {_MAX_BYTES} bytes")
  with open(path, encoding="utf-8") as file:
    entry = json.load(file)
  if not isinstance(entry, dict):
    raise ValueError("no JSON object")
  return entry if key is None else entry.get(key)


def _check_steps(entry):
  """Refuses steps other than ours: they would give other pixels."""
  for name, ours in _STEPS.items():
    value = entry.get(name)
    if value is not None and bool(value) != ours:
      raise errors.UserError(
        f"{name}={value} is not supported; set it to {json.dumps(ours)}, or use"
        " the checkpoint's original file"
      )
  factor = entry.get("rescale_factor")
  if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
    raise errors.UserError(
      f"rescale_factor={factor} is not supported; pixels are divided by 255"
    )
