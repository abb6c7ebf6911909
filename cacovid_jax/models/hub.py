"""Checkpoints by their name on the Hugging Face hub, in its local cache.

`org/name` is the snapshot that models--org--name/refs/main of the cache names;
the layout is huggingface_hub's. Nothing is asked over a network.
"""

import os
import pathlib
import re

from cacovid_jax import errors
from cacovid_jax.models import safetensors_io

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def cache() -> pathlib.Path:
  """Returns the folder of the cache, by the hub's environment variables."""
  known = os.environ.get
  base = known("XDG_CACHE_HOME") or "~/.cache"
  home = known("HF_HOME") or os.path.join(base, "huggingface")
  folder = known("HF_HUB_CACHE") or os.path.join(home, "hub")
  # Unlike pathlib's, this one leaves "~" where there is no home.
  return pathlib.Path(os.path.expanduser(os.path.expandvars(folder)))


def find(path: str | os.PathLike) -> str:
  """Returns the folder of a path, or of a name in the cache.

  What exists, cannot be a name or is not there is returned as it is. A
  snapshot of which a part is missing is a UserError.
  """
  path = os.fspath(path)
  folder = cache() / f"models--{path.replace('/', '--')}"
  if os.path.lexists(path) or not (_NAME.fullmatch(path) and folder.is_dir()):
    return path
  if lacking := _lacking(folder):
    raise errors.UserError(
      f"{path} in the Hugging Face cache is not whole: {lacking}; finish it by:"
      f" hf download {path} (or huggingface-cli download {path})"
    )
  return os.fspath(_snapshot(folder))


def directory(path: str | os.PathLike) -> str:
  """Returns the folder of a path or a name; one not in the cache is refused."""
  found = find(path)
  if _NAME.fullmatch(found) and not os.path.lexists(found):
    raise errors.UserError(
      f"{path} is no folder, and not in the Hugging Face cache {cache()}"
      " (HF_HUB_CACHE, HF_HOME); give a checkpoint directory or, if it is a"
      f" name on the hub, get it by: hf download {path} (or huggingface-cli"
      f" download {path})"
    )
  return found


def _snapshot(folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the revision main."""
  main, revision = folder / "refs" / "main", ""
  if main.is_file():
    revision = main.read_text("utf-8", "replace").strip()
  # A revision is a name, not a way to elsewhere.
  return folder / "snapshots" / (re.sub(r"\W", "_", revision) or "main")


def _lacking(folder: pathlib.Path) -> str:
  """Returns what a download of a repository left out, "" of a whole one."""
  snapshot = _snapshot(folder)
  if not snapshot.is_dir():
    named = (folder / "refs" / "main").is_file()
    why = "which refs/main names" if named else "and no refs/main"
    return f"there is no {snapshot}, {why}"
  for file in sorted(snapshot.rglob("*")):
    if not file.exists():
      return f"{file} leads to a file that is not there"
  for name in sorted(safetensors_io.indexed(snapshot)):
    if not (snapshot / name).is_file():
      return f"{snapshot / name} is missing"
  for blob in sorted((folder / "blobs").glob("*.incomplete")):
    # Beside its whole file, it is the rest of an earlier attempt.
    if not blob.with_name(blob.name.partition(".")[0]).exists():
      return f"{blob} is a part of a file (remove it if it is an old one)"
  return ""
