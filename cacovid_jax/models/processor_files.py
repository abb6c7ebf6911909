"""What the files of a checkpoint say of the frames that its tower takes."""

import math
import os

import msgspec

from cacovid_jax import errors, schema
from cacovid_jax.models import hf_config

_MAX_BYTES = 2**20
_MEND = "copy it again from the checkpoint's origin"
# Steps of the reference processors that we take, as they do by default.
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True}
_STEPS |= {"do_center_crop": False}
# Files and keys in them, in the reference's order: transformers 5 stores the
# video part in the first, earlier releases wrote the others.
_OF_IMAGES = "preprocessor_config.json"
_FILES = {
  "processor_config.json": "video_processor",
  "video_preprocessor_config.json": None,
  _OF_IMAGES: None,
}
_Statistic = tuple[float, float, float]


class Entry(msgspec.Struct):
  """What a file says that any of our processors reads."""

  image_mean: _Statistic | None = None
  image_std: _Statistic | None = None
  resample: int | None = None
  size: schema.Count | dict[str, schema.Count | None] | None = None
  patch_size: schema.Count | None = None
  temporal_patch_size: schema.Count | None = None
  merge_size: schema.Count | None = None
  min_pixels: schema.Count | None = None
  max_pixels: schema.Count | None = None
  cap_pixels_per_frame: bool | None = None
  max_video_tokens: schema.Count | None = None
  rescale_factor: float | None = None
  do_resize: bool | None = None
  do_rescale: bool | None = None
  do_normalize: bool | None = None
  do_center_crop: bool | None = None


def read(directory, find, make, images=True):
  """Returns `make(find(entry))` of a directory's first file with an `Entry`.

  `images` says whether a file about images will do. The `UserError`s of both
  name the file.
  """
  for name, key in _FILES.items():
    if name == _OF_IMAGES and not images:
      continue
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
      continue
    found = schema.read(path, dict, _MEND, most_bytes=_MAX_BYTES)
    found = found if key is None else found.get(key)
    if found is None:
      continue
    entry = schema.fit(found, Entry, path, _MEND, key=key or "")
    try:
      _check_steps(entry)
      return make(find(entry))
    except errors.UserError as error:
      raise errors.UserError(f"{path}: {error}") from error
  names = [f"{_OF_IMAGES} or "] * images + ["video_preprocessor_config.json"]
  raise errors.UserError(
    f"{directory}: no {''.join(names)}; copy it from the checkpoint's origin"
  )


def statistics(entry, needed):
  """Returns the fields that every processor has, three numbers a statistic.

  Those that are not there are left out, unless they are needed.
  """
  found = {"mean": entry.image_mean, "std": entry.image_std}
  for name, value in found.items():
    fine = value is not None or not needed
    errors.check(fine, f"it lacks image_{name}; {_MEND}")
  found["resample"] = entry.resample
  return {name: value for name, value in found.items() if value is not None}


def _check_steps(entry):
  """Refuses steps other than ours: they would give other pixels."""
  for name, ours in _STEPS.items():
    value = getattr(entry, name)
    errors.check(
      value in (None, ours),
      f"{name}={value} is not supported; set it to {str(ours).lower()}, or use"
      " the checkpoint's original file",
    )
  factor = entry.rescale_factor
  errors.check(
    factor is None or math.isclose(factor, 1 / 255, rel_tol=1e-6),
    f"rescale_factor={factor} is not supported; pixels are divided by 255",
  )


def default_num_frames(directory) -> int:
  """Returns the frames per clip that a checkpoint's files ask for, else 32."""
  path = os.path.join(directory, "video_preprocessor_config.json")
  found = hf_config.read_json(path) if os.path.isfile(path) else {}
  number = found.get("num_frames")
  kind, mend = schema.within(int, 1, 2**16), "correct it, or give --num_frames"
  return schema.fit(
    32 if number is None else number, kind, path, mend, key="num_frames"
  )
