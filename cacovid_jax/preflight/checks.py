"""What would stop a run, looked at before it: one function for each check.

A check takes a `case_lib.Case` and returns the fields of `Finding`s behind the
first, or raises what the library itself refuses. None loads weights.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax

from cacovid_jax import config as config_lib
from cacovid_jax import errors, metrics
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import decode_workers, readers
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.evals import cost, evaluation
from cacovid_jax.inference import clips
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import loading
from cacovid_jax.preflight import case as case_lib
from cacovid_jax.remote import mirror as remote
from cacovid_jax.training import batches, programs, run, seams

OK, WARNING, FAILED = "ok", "warning", "failed"
# Share of what there is above which an estimate is no comfort.
_TIGHT = 0.9


class Finding(NamedTuple):
  """One line of the table."""

  check: str
  verdict: str  # OK, WARNING or FAILED.
  found: str
  remedy: str = ""


_Found = Iterable[tuple[str, ...]]  # Fields of a `Finding`, but for `check`.


def examine(case: case_lib.Case) -> list[Finding]:
  """Returns the findings of all checks; what one refuses, it fails by."""
  found, told = [], set()
  for name, check in _CHECKS.items():
    try:
      for one in check(case):  # What was found before an error stays.
        found.append(Finding(name, *one))
    except (errors.UserError, OSError) as error:
      text = errors.one_line(error)
      if text in told:
        what = "not looked at: it needs what failed above"
        found.append(Finding(name, WARNING, what))
        continue
      told.add(text)
      what, _, remedy = text.rpartition("; ")
      found.append(Finding(name, FAILED, what or text, what and remedy))
  return found


def _weights(case: case_lib.Case) -> _Found:
  directory = case.directory
  count, size, kinds = case.survey
  words = case.tokenizer.vocab_size
  told = f"{directory}: {count} files of {_told(size)}, {', '.join(kinds)}"
  dtype = case.config.model.dtype
  return [
    (OK, f"{told}; names and shapes fit; {dtype} when loaded; {words} words")
  ]


def _policy(case: case_lib.Case) -> _Found:
  if case.trains:
    init, policy = case.config.policy.init, case.steps[0].policy
    if init:
      with _on_host():
        loading.load(init, policy, case.state.params)
    return [(OK, f"starts from {init or 'the base model and drawn heads'}")]
  paths = case.experiment.policy_paths
  for one in map(methods_lib.Method.parse, case.config.evals.methods):
    if one.score_fields:
      one.follows(paths)
  if not paths:
    return [(OK, "none, and no method asks one")]
  return [_one_policy(case, *one) for one in paths.items()]


def _one_policy(case: case_lib.Case, name: str, spec: str) -> tuple[str, ...]:
  checkpoint = case.bare.checkpoint
  checkpoint = dataclasses.replace(checkpoint, identity=case.identity)
  with _on_host():
    loading.load_policy(spec, checkpoint)
  described = loading.description(spec)
  told = f"{name}: {spec} is of this base model"
  if not described:
    told = f"{name}: {spec} fits; nothing says which base model it had"
    described = loading.Training()
  ratios = ", ".join(f"{ratio:.3g}" for ratio in described.ratios)
  told += f"; trained at ratios {ratios}" if ratios else ""
  frames = case.config.data.num_frames
  grid, own = described.grid, case.processor.fixed_grid(frames)
  # Of buckets, which hold several grids, there are lists.
  if own and grid and isinstance(grid[0], int) and grid != list(own):
    sizes = [" x ".join(map(str, one)) for one in (grid, own)]
    mend = "show as many frames as in training, or expect another accuracy"
    told += f" on {sizes[0]} video tokens, not the {sizes[1]} asked here"
    return (WARNING, told, mend)
  return (OK, told)


def _on_host():
  """Keeps arrays off an accelerator, which another run may be using."""
  try:
    return jax.default_device(jax.devices("cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS leaves it out.
    return contextlib.nullcontext()


def _data(case: case_lib.Case) -> _Found:
  config = case.config
  if not case.trains:
    evaluation.check(config)
    yield from _asked(case.benchmark)
    _, _, validation = evaluation.plan(case.bare, case.benchmark)
    if validation:
      yield from _asked(validation)
    return
  told = f"{len(case.rows)} questions about {len(case.videos)} clips to train"
  lines = case.left_out.lines()
  yield (WARNING if lines else OK, "; ".join([told, *lines]))
  validation = config.validation
  if validation.every_steps:
    methods_lib.Method.parse(validation.method)
    yield from _asked(
      evaluation.load_benchmark(
        case.experiment, "validation", validation.num_questions
      )
    )
  case.left_out.check(case.experiment.workdir)
  if config.data.decisive_file:
    batches.read_evidence(config, case.steps[-1].ladder.bucket.tokens)


def _asked(asked) -> Iterator[tuple[str, ...]]:
  names = [question.video for question in asked.questions]
  told = (
    f"{asked.name} {asked.split}: {len(names)} questions about"
    f" {len(set(names))} clips"
  )
  if missing := readers.find_missing(names, asked.root):
    count = sum(missing.values())
    told += f"; {len(missing)} clips are absent, {count} questions lost"
    yield (WARNING, told, "fetch them, or they count as wrong")
  elif asked.report.bad_rows:
    told += f"; {len(asked.report.bad_rows)} bad rows are left out"
    yield (WARNING, told, str(asked.report.bad_rows[0]))
  else:
    yield (OK, told)


def _clips(case: case_lib.Case) -> _Found:
  config, videos = case.config, case.videos
  data = config.data
  shown = data.frame_rule if case.trains else config.evals.frame_rule
  reader = clips.ClipReader(
    experiment_lib.media_root(config), case.processor,
    frames_lib.FrameRule(data.num_frames, shown),
    min_side=data.min_side if case.trains else 0, hashed=False,
    max_replaced=data.max_replaced, call=decode_workers.WAYS[data.decode],
  )  # fmt: skip
  # Evenly spread: folders are downloaded in order.
  count = min(case.num_clips, len(videos))
  chosen, bad = [videos[len(videos) * i // count] for i in range(count)], []
  for name in chosen:
    try:
      clip, _, _ = reader.read(name)
      reader.check(name, clip.record)
    except errors.UserError as error:
      bad.append(errors.one_line(error))
  if not videos:
    return [(WARNING, "none is there to decode", "fetch them")]
  if bad:
    told = f"{len(bad)} of {count} cannot be used, first: {bad[0]}"
    return [(FAILED, *told.rsplit("; ", 1))]
  frames = f"{data.num_frames} frames" + " or fewer" * (not reader.rule.fills)
  return [(OK, f"{count} decoded, {frames} of each")]


def _mesh(case: case_lib.Case) -> _Found:
  mesh, text = case.experiment.mesh, case.model.config.text
  data, model = mesh.shape["data"], mesh.shape["model"]
  told = f"data {data} x model {model} of {jax.device_count()} devices"
  told += f" ({mesh.devices.flat[0].device_kind})"
  mesh_lib.check_heads(text.num_heads, mesh)
  if text.num_kv_heads % model:
    told += f"; each device holds all {text.num_kv_heads} kv heads' cache"
    return [(WARNING, told, "a divisor of them as config.mesh.model saves it")]
  if mesh.size < jax.device_count():
    mend = "raise config.mesh.data, with the videos or questions it shares"
    return [(WARNING, f"{told}, the others idle", mend)]
  return [(OK, told)]


def _memory(case: case_lib.Case) -> _Found:
  device = case.experiment.mesh.devices.flat[0]
  parts = training_memory(case) if case.trains else case.estimate["memory"]
  parts = {k: v for k, v in parts.items() if v and k != "total"}
  there = case.device_bytes or _device_bytes(device)
  mend = (
    "raise config.mesh.model, or lower "
    + ("sampling.num_combinations" if case.trains else "evals.batch_size")
    + ", data.num_frames or new tokens"
  )
  yield _held("a device", sum(parts.values()), there, parts, mend)
  if device.platform != "cpu" and case.trains:
    data, config = case.config.data, case.model.config
    held = min(data.memory_items, len(case.videos))
    features = {"clips": held * cost.feature_bytes(config, case.grid)}
    mend = "lower config.data.memory_items"
    given = features["clips"], host_bytes(), features, mend
    yield _held("the host", *given)


def _held(where, needs, there, parts, mend) -> tuple[str, ...]:
  """Returns a finding about an estimate of bytes and those that there are."""
  listed = ", ".join(f"{name} {_told(size)}" for name, size in parts.items())
  told = f"{where}: about {_told(needs)} of {_told(there)} (estimate: {listed})"
  if needs <= _TIGHT * there:
    return (OK, told)
  return (WARNING if needs <= there else FAILED, told, mend)


def training_memory(case: case_lib.Case) -> dict[str, int]:
  """Returns the parts of a device's memory in a training step, in bytes."""
  config, model = case.config, case.model.config
  dtype, shards = config.model.dtype, config.mesh.model
  one, text, length = case.steps[-1], model.text, case.prompts[-1]
  videos = config.videos_per_step // case.experiment.mesh.shape["data"]
  tokens, asked = one.num_video, videos * one.ladder.num_combinations
  rows = one.ladder.num_keep[-1] + length
  # As in `cost.memory`: once as prefilled, once with room for the answer.
  layers = [2 * rows + one.rollout.answer_length - 1] * text.num_layers
  # Forwards, and backwards with what the forward pass kept.
  whole = tokens + length
  kind = config.policy.dtype
  scored = 3 * cost.prefill_bytes(text, whole, kind, batch=videos)
  return {
    "weights": cost.weight_bytes(model, dtype, shards),
    "policy and optimiser": _bytes(case.state) + _bytes(case.state.params),
    "videos": 4 * videos * (tokens + whole) * text.hidden_size,
    "cache": cost.kv_bytes(
      text, layers, dtype, batch=asked, model_shards=shards
    ),
    "activations": max(
      cost.prefill_bytes(text, rows, dtype, batch=asked),
      cost.tower_bytes(model, case.grid, dtype),
      scored,
    ),
  }


def _disk(case: case_lib.Case) -> _Found:
  config, workdir = case.config, case.experiment.workdir
  cache = config.data.feature_cache
  if mirror := remote.of(workdir):
    mirror.store.put(probe := "locks/doctor", b"")  # Where no run looks.
    mirror.store.delete(probe)
  if case.trains:
    needs = (config.ckpt.keep + 1) * _bytes(case.state)
    needs += 3 * _bytes(case.state.params)  # Last, best, and one in the making.
    features = cost.feature_bytes(case.model.config, case.grid)
    features *= len(case.videos)
  else:
    row = case.estimate["benchmarks"][""]
    needs = 1000 * row["answers"]
    features = row["feature_bytes"] * len(case.videos) // row["clips"]
  # {device: [a folder of it, bytes]}: one disk may hold both.
  asked, folders = {}, [(workdir, needs)]
  if cache:
    files = pathlib.Path(cache).rglob("*")
    there = sum(file.stat().st_size for file in files if file.is_file())
    folders.append((cache, max(features - there, 0)))
  for folder, size in folders:
    path = pathlib.Path(os.path.abspath(folder))
    path = next(one for one in (path, *path.parents) if one.exists())
    errors.check(
      path.is_dir() and os.access(path, os.W_OK),
      f"{path} is no folder that can be written; give another place than"
      f" {folder}",
    )
    asked.setdefault(path.stat().st_dev, {})[os.fspath(folder)] = size, path
  for parts in asked.values():
    free = shutil.disk_usage(next(iter(parts.values()))[1]).free
    sizes = {folder: size for folder, (size, _) in parts.items()}
    mend = "free some space, lower config.ckpt.keep, or use another disk"
    yield _held("free", sum(sizes.values()), free, sizes, mend)
  if case.trains:
    config_lib.check_workdir(workdir, config)


def _programs(case: case_lib.Case) -> _Found:
  if not case.trains:
    count = case.estimate["total"]["programs"]
    return [(OK, f"about {count} to compile (estimate)")]
  parts = seams.load(case.config)
  on_host = run.host_rewards(parts.rollout, case.rows, case.tokenizer)
  mesh, steps = case.experiment.mesh, case.steps
  made = programs.TrainingPrograms(steps, mesh, host_rewards=on_host)
  limits = sum(made.limit(one.ladder.bucket) for one in steps)
  count, lengths = limits * len(case.prompts), len(case.prompts)
  told = f"at most {count} to compile for {lengths} lengths of prompts and"
  return [(OK, f"{told} {len(steps)} sizes of videos, and the vision tower's")]


def _hours(case: case_lib.Case) -> _Found:
  each, how, config = case.seconds_per_video, "given", case.config
  videos = len(case.videos)
  if case.trains:
    total = run.with_total_steps(case.experiment, case.rows).config.total_steps
    videos = total * config.videos_per_step
    there = os.path.isdir(case.experiment.workdir)
    rows = metrics.read(case.experiment.workdir) if there else []
    took = [x["seconds_per_step"] for x in rows if x.get("seconds_per_step")]
    if not each and took:
      each, how = took[-1] / config.videos_per_step, "measured in the workdir"
  elif not each:
    row = case.estimate["benchmarks"][""]
    each, how = row["seconds"] / row["clips"], "estimate, of operations alone"
  if not videos:
    return [(WARNING, "unknown: no clip is there", "fetch them")]
  if not each:
    mend = "train a few steps in this workdir, or give --seconds_per_video"
    return [(WARNING, f"unknown for {videos} videos", mend)]
  told = f"{videos * each / 3600:.3g} for {videos} videos of {each:.3g} s"
  return [(OK, f"{told} ({how})")]


_CHECKS: dict[str, Callable[[case_lib.Case], _Found]] = {
  "weights": _weights,
  "data": _data,
  "policy": _policy,
  "clips": _clips,
  "mesh": _mesh,
  "memory": _memory,
  "disk": _disk,
  "programs": _programs,
  "hours": _hours,
}


def host_bytes() -> int:
  """Returns the memory of this machine, or what a container may have of it."""
  found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  limit = pathlib.Path("/sys/fs/cgroup/memory.max")
  text = limit.read_text("ascii").strip() if limit.is_file() else ""
  return min(found, int(text)) if text.isdecimal() else found


def _device_bytes(device) -> int:
  """Returns what JAX may use of a device; CPU devices share the host's."""
  limit = (device.memory_stats() or {}).get("bytes_limit")
  return limit or host_bytes() // jax.local_device_count()


def _bytes(tree) -> int:
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def _told(size: float) -> str:
  """Returns bytes in words."""
  for unit in ("bytes", "KiB", "MiB"):
    if size < 1000:
      return f"{size:.4g} {unit}"
    size /= 1024
  return f"{size:.4g} GiB"
