"""Checkpoints that are complete and verified, or do not exist.

Orbax writes the arrays; it leaves open that a flipped bit in one of its files
mostly loads without an error, and an empty step directory counts as the latest
step. So a step is written to `N.partial/` and synced, a manifest with the size
and sha256 of every file is put inside, and one rename makes it `N/`. Before
use, every byte is compared with the manifest.

  DIR/120/manifest.json   sizes, sha256, step, config hash, names and shapes
  DIR/120/state/          Orbax, one entry per leaf under its dotted name
  DIR/100.bad/            a step that did not verify, kept aside

In the mirror of an object store (see `remote.mirror`) a step is written here,
by the first process, then to the store, its manifest last.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from cacovid_jax import errors, files
from cacovid_jax.remote import mirror as remote

MANIFEST = "manifest.json"
_STATE = "state"
_SCHEMA = 1
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What verification found out about one entry of a checkpoint directory."""

  name: str  # Of the entry: "120", "120.partial", "100.bad".
  step: int  # Its number.
  ok: bool  # True if it is a step and every byte of it is as it was written.
  reason: str  # "ok", or what is wrong.
  num_bytes: int  # Of the files present.
  manifest: dict | None  # None where it could not be read.


def save(directory, step, tree, metadata=None, *, config_hash="", keep=None):
  """Writes one step, all or nothing, and returns its path.

  Every process must call it. `tree` is a pytree of arrays; `metadata` are JSON
  values to keep with it (see `read_manifest`). Of all steps `keep` of the
  newest are kept; None keeps all.
  """
  directory = pathlib.Path(directory).absolute()
  if keep is not None and keep < 1:
    raise errors.UserError(f"cannot keep {keep} checkpoints: keep at least 1")
  final, partial = directory / str(step), directory / f"{step}.partial"
  leaves = _named_leaves(tree)
  is_first_process = jax.process_index() == 0
  try:
    if is_first_process:
      files.make_folder(directory)
      _remove_leftovers(directory)
      partial.mkdir()
    _barrier(f"checkpoint_{step}_begin")
    # Orbax refuses arrays without elements: the manifest alone has them.
    stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
    if remote.of(directory) is None or jax.process_count() == 1:
      _write_arrays(partial / _STATE, stored)
    elif is_first_process:
      only = ocp.options.MultiprocessingOptions(active_processes={0})
      stored = {name: _whole(final, name, x) for name, x in stored.items()}
      _write_arrays(partial / _STATE, stored, multiprocessing_options=only)
    _barrier(f"checkpoint_{step}_written")
    if is_first_process:
      manifest = {
        "schema": _SCHEMA,
        "step": step,
        "config_hash": config_hash,
        "metadata": metadata or {},
        "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
      }
      _publish(partial, final, manifest, keep)
    _barrier(f"checkpoint_{step}_end")
  except Exception as error:
    if is_first_process:
      shutil.rmtree(partial, ignore_errors=True)  # Room for others.
    if (refused := _os_error(error)) is None:
      raise
    raise files.unwritable(f"checkpoint {final}", refused) from error
  return final


def _write_arrays(path, stored, **options):
  """Writes named arrays; all processes call it, or those of the options."""
  with _without_tracebacks(), ocp.StandardCheckpointer(**options) as writer:
    writer.save(path, stored)
    writer.wait_until_finished()  # Raises what went wrong.


def _whole(path, name, leaf) -> np.ndarray:
  """Returns an array that each of several processes has."""
  told = f"{path}: {name} is spread over several processes, and a workdir on a"
  told += " store is written by the first; use a folder that all of them see"
  errors.check(leaf.is_fully_replicated, told)
  return np.asarray(leaf)


@contextlib.contextmanager
def _without_tracebacks():
  """Keeps Orbax from printing the errors of its threads, which it raises."""
  logger = logging.getLogger("absl")

  def is_told(record):
    return not record.exc_info or "orbax" not in record.pathname

  logger.addFilter(is_told)
  try:
    yield
  finally:
    logger.removeFilter(is_told)


def _os_error(error: Exception) -> OSError | None:
  """Returns what the system refused, also where Orbax tells it in words."""
  if isinstance(error, OSError):
    return error
  number = re.search(r"os_error_code='(\d+)'", str(error))
  return number and OSError(int(number[1]), os.strerror(int(number[1])))


def _publish(partial, final, manifest, keep):
  """Makes a written step the newest one, and deletes those not to keep."""
  manifest["files"] = found = {}
  for name, size in _file_sizes(partial).items():
    files.sync(partial / name)
    found[name] = {"bytes": size, "sha256": files.sha256(partial / name)}
  files.append(partial / MANIFEST, _encode_manifest(manifest))
  for folder, _, _ in os.walk(partial):
    files.sync(folder)
  if final.exists():
    # The same step again, after a run went back: the new one counts.
    _rename(final, f"{final.name}.replaced")
  os.rename(partial, final)
  directory = final.parent
  files.sync(directory)
  remote.publish_folder(final, MANIFEST)
  if keep is not None:
    for old in steps(directory)[:-keep]:
      # Renamed first: a kill while deleting must not leave half a step.
      shutil.rmtree(_rename(directory / str(old), f"{old}.deleted"))
      remote.remove_folder(directory / str(old), MANIFEST)
  _remove_leftovers(directory)
  remote.remove_leftovers(directory, MANIFEST)


def restore_latest(directory, like, *, config_hash=None):
  """Returns (step, tree) of the newest step that verifies, or None.

  Steps that do not verify are renamed to `N.bad` and named in the log. Without
  any step left the answer is None: a run that starts anew computes the same.
  `like` has the structure, shapes, dtypes and shardings to restore. A step of
  another config is refused, unless no `config_hash` is given.
  """
  directory = pathlib.Path(directory).absolute()
  newest = -1
  if jax.process_index() == 0:
    for step in reversed(steps(directory)):
      verdict = verify(directory / str(step))
      if verdict.ok:
        newest = step
        break
      aside = _rename(directory / str(step), f"{step}.bad")
      remote.remove_folder(directory / str(step), MANIFEST)
      remote.publish_folder(aside, MANIFEST)
      _log.warning(
        f"checkpoint step {step} does not verify ({verdict.reason}): kept aside"
        f" as {aside}, going back to an earlier step"
      )
  newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
  if newest < 0:
    return None
  path = directory / str(newest)
  remote.fetch_folder(path)
  manifest = read_manifest(directory, newest)
  if config_hash is not None and manifest["config_hash"] != config_hash:
    raise errors.UserError(
      f"checkpoint {path} belongs to another config "
      f"({manifest['config_hash']}, here {config_hash}): "
      "use that config or another workdir"
    )
  wanted = _named_leaves(like)
  _check_leaves(path, manifest["leaves"], wanted)
  stored = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for name, x in wanted.items()
    if x.size
  }
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(path / _STATE, stored)
  leaves = [
    found[name] if name in found else jnp.zeros(leaf.shape, leaf.dtype)
    for name, leaf in wanted.items()
  ]
  return newest, jax.tree.unflatten(jax.tree.structure(like), leaves)


def steps(directory):
  """Returns the numbers of all finished steps, ascending, not yet verified."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    return []
  return sorted(
    int(entry.name)
    for entry in directory.iterdir()
    if re.fullmatch(r"0|[1-9]\d*", entry.name) and entry.is_dir()
  )


def read_manifest(directory, step):
  """Returns the manifest of a step, its own checksum verified."""
  path = pathlib.Path(directory) / str(step) / MANIFEST
  try:
    return _decode_manifest(path.read_bytes())
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{path} cannot be read ({errors.one_line(error)}): use another step"
    ) from error


def verify(path):
  """Returns the `Verdict` on one step directory; reads every byte of it."""
  path = pathlib.Path(path)
  remote.fetch_folder(path)
  step, manifest = int(path.name.partition(".")[0]), None
  sizes = _file_sizes(path)
  try:
    manifest = _decode_manifest((path / MANIFEST).read_bytes())
  except FileNotFoundError:
    reason = f"no {MANIFEST}" if sizes else "empty directory"
  except (OSError, ValueError) as error:
    reason = f"{MANIFEST}: {errors.one_line(error)}"
  else:
    reason = next(_faults(path, step, sizes, manifest), "ok")
  num_bytes = sum(sizes.values())
  return Verdict(path.name, step, reason == "ok", reason, num_bytes, manifest)


def _faults(path, step, sizes, manifest) -> Iterator[str]:
  """Yields where a step is not as its manifest says, as far as it is asked."""
  if path.name.isdigit() and manifest["step"] != step:
    yield f"written as step {manifest['step']}"
  for name, file in manifest["files"].items():
    if name not in sizes:
      yield f"{name}: missing"
    elif sizes[name] != file["bytes"]:
      yield f"{name}: {sizes[name]} bytes instead of {file['bytes']}"
    elif files.sha256(path / name) != file["sha256"]:
      yield f"{name}: content changed"
  for name in sorted(sizes.keys() - manifest["files"].keys()):
    # Orbax might read a file that it did not write here.
    if name.startswith(f"{_STATE}/"):
      yield f"{name}: not in the manifest"


def doctor(directory):
  """Returns a `Verdict` per step and leftover of a directory, by step."""
  directory = pathlib.Path(directory)
  verdicts = []
  for entry in directory.iterdir():
    if not entry.is_dir() or not re.match(r"\d+(\.|$)", entry.name):
      continue
    verdict = verify(entry)
    if not entry.name.isdigit():
      aside = f"kept aside: {verdict.reason}"
      reasons = {"partial": "unfinished, ignored", "bad": aside}
      reason = reasons.get(entry.name.split(".")[1], "leftover, ignored")
      verdict = dataclasses.replace(verdict, ok=False, reason=reason)
    verdicts.append(verdict)
  return sorted(verdicts, key=lambda verdict: (verdict.step, verdict.name))


def rehash(directory, hashes):
  """Gives steps the config hash of today's keys, of {earlier: today's}.

  A manifest as it was stays beside the new one, as `manifest.before.json`.
  Returns the steps' numbers.
  """
  found = {}
  for step in steps(directory):
    manifest = read_manifest(directory, step)
    if manifest["config_hash"] in hashes:
      found[step] = manifest
    elif manifest["config_hash"] not in hashes.values():
      raise errors.UserError(
        f"checkpoint {pathlib.Path(directory) / str(step)} belongs to another"
        f" config ({manifest['config_hash']}) than config.json; nothing was"
        " changed"
      )
  for step, manifest in found.items():
    path = pathlib.Path(directory) / str(step) / MANIFEST
    files.write(path.with_name("manifest.before.json"), path.read_bytes())
    manifest["config_hash"] = hashes[manifest["config_hash"]]
    files.write(path, _encode_manifest(manifest))
  return list(found)


def _check_leaves(path, found, wanted):
  """Raises an error that lists all missing, extra and misshaped leaves."""
  faults = [f"{name} is missing" for name in wanted if name not in found]
  faults += [f"{name} is not expected" for name in found if name not in wanted]
  for name in wanted:
    here = _describe(wanted[name])
    if name in found and found[name] != here:
      faults.append(f"{name} is {_show(found[name])}, not {_show(here)}")
  if faults:
    shown = "; ".join(faults[:20])
    more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
    raise errors.UserError(
      f"checkpoint {path} does not fit: {shown}{more}. "
      "Use the config it was written with, or another workdir"
    )


def _named_leaves(tree):
  """Returns {"params.dense.kernel": leaf} in the order of `jax.tree.leaves`."""
  named = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
    if name in named:
      raise ValueError(f"two leaves are called {name}")
    named[name] = leaf
  return named


def _describe(leaf):
  return {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}


def _show(description):
  return f"{description['dtype']}{description['shape']}"


def _file_sizes(path):
  """Returns {relative path: bytes} of all files below a directory."""
  return {
    file.relative_to(path).as_posix(): file.stat().st_size
    for file in sorted(path.rglob("*"))
    if file.is_file()
  }


def _encode_manifest(manifest):
  """Returns the manifest as JSON that ends with the sha256 of itself."""
  body = json.dumps(manifest, indent=1, sort_keys=True)
  digest = hashlib.sha256(body.encode()).hexdigest()
  return f"{body}\n{digest}\n".encode()


def _decode_manifest(data):
  """Returns the manifest; a ValueError if any byte of it changed."""
  body, _, tail = data.rpartition(b"}\n")
  body += b"}"
  if tail != f"{hashlib.sha256(body).hexdigest()}\n".encode():
    raise ValueError("content changed")
  manifest = json.loads(body)
  if manifest.get("schema") != _SCHEMA:
    raise ValueError(f"schema {manifest.get('schema')} instead of {_SCHEMA}")
  return manifest


def _remove_leftovers(directory):
  """Deletes what interrupted saves and deletions left behind."""
  for entry in directory.iterdir():
    if re.fullmatch(r"\d+\.(partial|deleted|replaced)(\.\d+)?", entry.name):
      shutil.rmtree(entry)


def _rename(path, name):
  """Renames an entry, with a number behind it if the name is taken."""
  free, count = path.with_name(name), 1
  while free.exists():
    free, count = path.with_name(f"{name}.{count}"), count + 1
  os.rename(path, free)
  return free


def _barrier(name):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
