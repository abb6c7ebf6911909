"""Stages of answering and of training, timed through the package's programs.

An engine makes, of a stage and a share of kept tokens, (f() that runs it, f()
whose time is subtracted or None, how often the rest was done): `Ours` here, and
`torch_peers.Peer` beside it.

Letters: I iterations, G combinations, B videos.
"""

import collections
import dataclasses
import functools
import gc
import importlib
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp

from cacovid_jax import command, errors, files
from cacovid_jax.data import answer_log
from cacovid_jax.evals import cost, tables, timing
from cacovid_jax.evals.report import charts
from cacovid_jax.inference import clips
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.models import checkpoints
from cacovid_jax.parallel import mesh as mesh_lib
from experiments import made_up, reporting, training_stage

# Those that depend on the share of tokens that are kept, and all.
_BY_RATIO = ("select", "prefill", "first_token", "decode")
_TRAININGS = ("train", "train_adaptive")
STAGES = ("load", "clip", "tower", "scores", *_BY_RATIO, "rollout", *_TRAININGS)
FILES = ("stages.md", "stages.json", "stages.svg")
OURS = "ours"
PEERS = {
  "peers": command.Flag(
    "PyTorch engines beside ours: transformers, twin.", default=()
  ),
  "torch_device": command.Flag("Where they compute.", default="cuda"),
}
ROLLOUTS = 32  # Combinations that are asked about at once.
_NEW_TOKENS = 32  # Over which the time of a token is a mean.
_MOST_LOADS = 3  # Each of seconds, at a released size.


class Ours:
  """The package's own programs, on B copies of a made-up prompt."""

  wait = staticmethod(jax.block_until_ready)
  facts = {}  # Told beside each time.

  def __init__(self, subject, batch: int = 1, *, workdir=None, training=None):
    """Compiles nothing yet.

    `training` is the config whose numbers a training takes; its files and a
    clip go to `workdir`.
    """
    self._subject, self._training = subject, training
    self._workdir, self._params = workdir, subject.checkpoint.params
    self._method = methods_lib.Method.parse("cacovid")
    given = subject.inputs(methods_lib.Condition(self._method, 0.5))
    copies = jnp.zeros(batch, jnp.int32)
    self._batch, self._inputs = jax.tree.map(
      lambda leaf: leaf[copies], (subject.batch, given)
    )

  def function(self, stage: str, ratio: float):
    """Returns what an engine makes, see the module; None of what it lacks."""
    subject = self._subject
    if stage == "load":
      return functools.partial(load, subject.checkpoint), None, 1
    if stage == "read":
      path = subject.checkpoint.identity["path"]
      return functools.partial(read_plainly, path), None, 1
    if stage == "clip":
      return made_up.reader(subject, self._workdir), None, 1
    if stage in _TRAININGS:
      given = subject, self._training, self._workdir, stage == "train_adaptive"
      return self._training and (training_stage.trainer(*given), None, 1)
    if stage == "rollout":
      return self._rollout(), None, 1
    if stage not in ("prefill", "decode"):
      return functools.partial(getattr(self, f"_{stage}"), ratio), None, 1
    selection = None if ratio == 1 else self._select(ratio)
    given = ratio, self._batch, selection
    first = functools.partial(self._answer, subject.programs, *given)
    if stage == "prefill":
      return first, None, 1
    endless = dataclasses.replace(subject.checkpoint, eos_ids=())
    longer = programs_lib.Programs(endless, 1 + _NEW_TOKENS)
    return functools.partial(self._answer, longer, *given), first, _NEW_TOKENS

  def _tower(self, ratio):
    return [self._subject.encode() for _ in range(len(self._batch.x))]

  def _scores(self, ratio, batch=None):
    policy = self._subject.policy(self._method)
    given = policy.module, policy.params, batch or self._batch
    return self._subject.programs.scores(*given, self._subject.grid, ratio)

  def _select(self, ratio, batch=None):
    batch = batch or self._batch
    inputs = dataclasses.replace(
      self._inputs, features=batch.features, deep=batch.deep,
      scores=self._scores(ratio, batch),
    )  # fmt: skip
    given = self._method.compressor, ratio, self._subject.grid
    return self._subject.programs.select(*given)(inputs)

  def _answer(self, programs, ratio, batch, selection):
    if ratio == 1:
      return programs.vanilla(self._params, batch)
    return programs.answer(self._params, batch, selection)

  def _first_token(self, ratio):
    programs, batch = self._subject.programs, self._batch
    found = {name: x[None] for name, x in self._subject.encode().items()}
    given = batch.ids, found[clips.FEATURES], batch.video_rows
    x = programs.embed(self._params, *given)
    batch = batch._replace(x=x, **found)
    selection = None if ratio == 1 else self._select(ratio, batch)
    return self._answer(programs, ratio, batch, selection)

  def _rollout(self):
    """Returns f() that reads `ROLLOUTS` pruned prompts, as a training does.

    The text in front of the video, which a training reads once, is not read.
    """
    model, params = self._subject.checkpoint.model, self._params
    prompt = jax.tree.map(lambda leaf: leaf[:1], self._batch)
    kept = training_stage.rollout_tokens(self._subject.grid)
    index = jnp.broadcast_to(kept, (1, ROLLOUTS, len(kept)))
    count = jnp.full(1, len(kept), jnp.int32)

    def read(params, prompt, index, count, earlier):
      return programs_lib.read_rows(
        model, params, prompt, index, count, room=0, earlier=earlier
      )[0]

    earlier = programs_lib.read_text(model, params, prompt, made_up.START)
    given = params, prompt, index, count, earlier
    return functools.partial(mesh_lib.jit(read, "training"), *given)


def load(checkpoint) -> Any:
  """Returns the weights, read again from the files they came from."""
  model, path = checkpoint.model, checkpoint.identity["path"]
  return checkpoints.load_params(path, model.config, model.dtype)


def read_plainly(directory) -> int:
  """Reads the safetensors of a folder into one buffer; returns their bytes."""
  buffer, total = bytearray(2**26), 0
  for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
    with open(path, "rb", buffering=0) as file:
      while count := file.readinto(buffer):
        total += count
  return total


def load_peers(args, config) -> dict[str, Callable[[Any], Any]]:
  """Returns {name: f(subject) -> engine} of `PEERS`, for a model's config."""
  if not args.peers:
    return {}
  try:
    peers = importlib.import_module("experiments.torch_peers")
  except ImportError as error:
    raise errors.UserError(
      f"--peers needs PyTorch ({error}); pip install 'cacovid_jax[hf]'"
    ) from error
  known, unknown = peers.ENGINES, {*args.peers} - {*peers.ENGINES}
  errors.check(not unknown, f"--peers={unknown}: choose of {', '.join(known)}")
  for name in args.peers:
    kinds = [kind.__name__.removesuffix("Config") for kind in known[name]]
    errors.check(
      type(config) in known[name],
      f"the peer {name} is of {' and '.join(kinds)}; leave it out of --peers,"
      " or change --size",
    )
  errors.check(
    args.torch_device == "cpu" or peers.torch.cuda.is_available(),
    f"PyTorch finds no {args.torch_device}; add --torch_device=cpu",
  )
  # Both share the device's memory; JAX would take most of it at once.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  return {
    name: functools.partial(peers.Peer, name, args.torch_device)
    for name in args.peers
  }


def limits(subject, speed, training=None) -> Callable[[str, float], float]:
  """Returns f(stage, ratio) -> milliseconds by operations or bytes alone.

  Of one video, at the speed of the device; causal attention counts what a row
  may see. Decoding is bound by the bytes that a token reads.
  """
  model, grid = subject.checkpoint.model, subject.grid
  text, rows = model.config.text, subject.batch.x.shape[1]
  outside, layers = rows - math.prod(grid), text.num_layers
  policy = subject.policy(methods_lib.Method.parse("cacovid")).module.config
  tower = cost.tower_flops(model.config, grid)
  score = cost.policy_flops(policy, rows, grid)

  def prefill(count):
    return cost.prefill_flops(text, [count + outside] * layers, causal=True)

  def limit(stage, ratio):
    """Returns 0 for what is not counted."""
    kept = int(ratio * math.prod(grid))
    if stage == "decode":
      read = cost.decode_bytes(text, [kept + outside] * layers, model.dtype)
      return 1e3 * read / speed.bytes
    if stage in _TRAININGS and training:
      rungs = [training_stage.ratio_of(grid)]
      if stage != "train":
        least = training.ratio.start
        rungs = [r for r in sorted(training.ratio.rungs) if r >= least]
      rungs += [rungs[-1]] * training.iterations
      rungs = rungs[: training.iterations]
      answers = sum(prefill(training_stage.num_kept(grid, r)) for r in rungs)
      # A backward pass is two forward ones.
      scores = (3 * training.iterations + 1) * score
      total = training.sampling.num_combinations * answers + scores
      return 1e3 * total / speed.flops
    flops = {
      "tower": tower, "scores": score, "select": score, "prefill": prefill(kept)
    }  # fmt: skip
    # The text in front is read once for all.
    each = prefill(len(training_stage.rollout_tokens(grid)) - made_up.START)
    flops["rollout"] = ROLLOUTS * each
    flops["first_token"] = tower + score * (ratio < 1) + flops["prefill"]
    return 1e3 * flops.get(stage, 0) / speed.flops

  return limit


def timed(engine, stage, ratio, repeats) -> dict[str, float]:
  """Returns milliseconds of a stage: median, quartiles, and the first run's."""
  made = engine.function(stage, ratio)
  errors.check(bool(made), "not measured")
  run, less, count = made
  if stage in ("load", "read"):
    repeats = min(repeats, _MOST_LOADS)
  found, base = timing.measure(run, repeats, engine.wait), 0.0
  if less is not None:
    base = timing.measure(less, repeats, engine.wait).ms
  names = "ms", "low", "high"
  each = {name: (getattr(found, name) - base) / count for name in names}
  each |= engine.facts | {"first_s": found.first_s}
  if stage == "load":
    each["limit_ms"] = timed(engine, "read", ratio, repeats)["ms"]
  held = timing.peak_gib(jax.devices()[:1])
  if held and engine.wait is jax.block_until_ready:  # Not of another library.
    each["peak_gib"] = held
  return each


def measure(
  engines: Mapping[str, Callable[[], Any]], cells, rows, repeats, limit=None
) -> list[dict[str, Any]]:
  """Returns a dict per engine and cell; what cannot be run says why.

  Engines, by name, are made when there is something to measure. Times go to
  `rows`, an `AnswerLog`; `limit` is as of `limits`.
  """
  out = []
  for name, make in engines.items():
    make = _at_most_once(make)  # One engine's weights at a time.
    gc.collect()
    for stage, ratio in cells:
      row = {"engine": name, "stage": stage, "ratio": ratio, "status": "ok"}
      key = answer_log.Key(name, ratio, 0, stage)
      run = lambda s=stage, r=ratio, m=make: timed(m(), s, r, repeats)  # noqa: E731
      try:
        row |= reporting.once(rows, key, run)
      except errors.UserError as error:
        row["status"] = errors.one_line(error)
      except Exception as error:  # Of another library: all else is measured.
        if name == OURS:
          raise
        row["status"] = f"{type(error).__name__}: {errors.one_line(error)}"
      if name == OURS and limit:
        row.setdefault("limit_ms", limit(stage, ratio))
      out.append(row)
  return out


def _at_most_once(make: Callable[[], Any]) -> Callable[[], Any]:
  """Returns `make`, which is called once, also if it fails."""
  job = futures.Future()

  def get():
    if not job.done():
      try:
        job.set_result(make())
      except Exception as error:
        job.set_exception(error)
    return job.result()

  return get


def cells(stages: Iterable[str], ratios: Iterable[float]):
  """Returns (stage, ratio) of what is to be measured, each once."""
  kept = [*dict.fromkeys(ratios)]
  found = [(s, r) for s in stages for r in (kept if s in _BY_RATIO else (1.0,))]
  # To keep all tokens, none is chosen.
  return [cell for cell in found if cell != ("select", 1.0)]


def markdown(rows) -> str:
  """Returns a table, a line per stage and ratio, peers beside ours."""
  by = {(row["engine"], row["stage"], row["ratio"]): row for row in rows}
  peers = [name for name in dict.fromkeys(k[0] for k in by) if name != OURS]
  head = ["stage", "kept", "ours, ms", "quartiles", "first run, s", "limit, ms"]
  head += ["of the limit", *(f"{name}, ms" for name in peers)]
  head += [f"ours / {name}" for name in peers]
  lines = []
  for _, stage, ratio in (key for key in by if key[0] == OURS):
    ours, *others = (by[name, stage, ratio] for name in (OURS, *peers))
    line, own = [stage, f"{ratio:.0%}", told(ours)], ours.get("ms")
    if own is None:
      line += [""] * 4
    else:
      line.append(f"{ours['low']:.4g} to {ours['high']:.4g}")
      line.append(f"{ours['first_s']:.3g}")
      least = ours["limit_ms"]
      line += [f"{least:.4g}", f"{least / own:.0%}"] if least else ["", ""]
    found = [own and "ms" in o and f"{own / o['ms']:.2f}" for o in others]
    lines.append([*line, *map(told, others), *(x or "" for x in found)])
  return tables.as_markdown(head, lines, range(1, len(head)))


def told(row) -> str:
  """Returns a row's milliseconds, or why there are none."""
  return f"{row['ms']:.4g}" if "ms" in row else row["status"].partition(" (")[0]


def write(workdir, rows, facts: Mapping[str, Any]) -> None:
  """Writes `FILES`; prints the table and where they are."""
  lines = collections.defaultdict(list)
  for row in sorted(rows, key=lambda row: row["ratio"]):
    if row["stage"] in ("prefill", "first_token") and "ms" in row:
      name = f"{row['engine']}, {row['stage'].replace('_', ' ')}"
      lines[name].append((100 * row["ratio"], row["ms"]))
  text = f"{markdown(rows)}\n"
  files.write(workdir / FILES[0], text)
  files.write_json(workdir / FILES[1], {**facts, "stages": rows})
  told = charts.lines(lines, "video tokens kept (%)", "milliseconds")
  files.write(workdir / FILES[2], told.file(facts["size"]))
  print(text)
  reporting.files(workdir, FILES)
