"""What a result was made with: code, packages, decoder, frames, host."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import jax

import cacovid_jax
from cacovid_jax.data import frame_record

# Packages whose version can change a number in a table.
_PACKAGES = ("av", "flax", "jax", "jaxlib", "jinja2", "numpy", "pillow",
             "safetensors", "tokenizers")  # fmt: skip


def describe(
  *,
  frame_hashes: Mapping[str, str],
  checkpoint: Mapping[str, str],
  policies: Mapping[str, str],
  generator_hash: str | None = None,
  settings: Mapping[str, Any] | None = None,
  index_hashes: Mapping[str, str] | None = None,
  template: str | None = None,
  environments: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
  """Returns the provenance section of results.json.

  No paths, times or host names: the same run gives the same bytes.

  Hashes are by clip, of its decoded frames and of which they are; policies are
  digests by name. `environments` are those that answers were computed in, by
  default this one: all are listed, and a field in which they differ names all.
  """
  # Once each, in a fixed order.
  found = [environment()] if environments is None else environments
  texts = {json.dumps(dict(one), sort_keys=True) for one in found}
  environments = list(map(json.loads, sorted(texts)))
  versions = [one["packages"] for one in environments]
  names = sorted(set().union(*versions))
  return {
    "checkpoint": checkpoint.get("sha256", ""),
    "decoder": _joined(environments, "decoder"),
    "device": _joined(environments, "device"),
    "environments": environments,
    "frame_hash": combined(frame_hashes),
    "frame_index_hash": combined(index_hashes or {}),
    "generator_hash": generator_hash,
    "git_commit": _joined(environments, "git_commit"),
    "packages": {name: _joined(versions, name) for name in names},
    "policies": dict(policies),
    "python": _joined(environments, "python"),
    "settings": dict(settings or {}),
    "template_hash": None if template is None else digest(template),
  }


def digest(text: str) -> str:
  """Returns the sha256 of a text."""
  return hashlib.sha256(text.encode()).hexdigest()


def combined(hashes: Mapping[str, str]) -> str:
  """Returns one sha256 of {name: hash}, whatever the order."""
  return digest("".join(f"{name}\0{hashes[name]}\n" for name in sorted(hashes)))


def _joined(entries: Iterable[Mapping[str, str]], name: str) -> str:
  """Returns the distinct values of a field, as a rule a single one."""
  return ", ".join(sorted({entry[name] for entry in entries if name in entry}))


def environment() -> dict[str, Any]:
  """Returns what computes here: nothing that two equal machines differ in."""
  return {
    "decoder": frame_record.decoder(),
    "device": device_kind(),
    "git_commit": git_commit(),
    "packages": packages(),
    "python": platform.python_version(),
  }


def device_kind() -> str:
  """Returns what computes here, as in "gpu NVIDIA H100"."""
  kind, backend = jax.devices()[0].device_kind, jax.default_backend()
  return kind if kind == backend else f"{backend} {kind}"


def host() -> dict[str, Any]:
  """Returns facts of this machine, for timings.json."""
  devices = jax.devices()
  return {
    "platform": platform.platform(),
    "cpu_count": os.cpu_count(),
    "device": devices[0].device_kind,
    "num_devices": len(devices),
    "backend": jax.default_backend(),
  }


def packages() -> dict[str, str]:
  """Returns the installed versions of the packages that matter."""
  found = dict.fromkeys(_PACKAGES, "not installed")
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def git_commit() -> str:
  """Returns the commit of this code, "-dirty" if tracked files differ.

  "unknown" for a copy outside its repository, whatever it lies inside.
  """
  package = pathlib.Path(cacovid_jax.__file__).resolve().parent

  def git(*arguments):
    return subprocess.check_output(
      ["git", "-C", str(package), *arguments],
      stderr=subprocess.DEVNULL,
      text=True,
      timeout=20,
    ).strip()

  try:
    if pathlib.Path(git("rev-parse", "--show-toplevel")) != package.parent:
      return "unknown"
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
  except (OSError, subprocess.SubprocessError):
    return "unknown"
