"""An evaluation from start to end: choose on validation, read the test once.

WORKDIR/frames.jsonl               frames of every clip, see `frame_manifest`
WORKDIR/answers.jsonl              every answer, appended as it comes
WORKDIR/validation_answers.jsonl   answers that options were chosen by
WORKDIR/results.json               what it says (see `results`)
WORKDIR/timings.json               seconds and host facts
WORKDIR/report.html                to look at, without a network

Several processes may share a workdir, see `shards`.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from absl import logging

from cacovid_jax import config as config_lib
from cacovid_jax import errors, files, metrics
from cacovid_jax.compressors import base
from cacovid_jax.data import (
  answer_log,
  feature_cache,
  frames,
  qwen_frames,
  readers,
)
from cacovid_jax.data import chat_template as chat_template_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.evals import (
  benchmarks,
  clips,
  defaults,
  frame_manifest,
  provenance,
  results,
  runner,
  shards,
)
from cacovid_jax.evals.report import html, viewer
from cacovid_jax.models import checkpoints, qwen2_5_vl
from cacovid_jax.policy import loading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What to evaluate; fields as in `evals.defaults`, and where things lie.

  Attributes:
    data: folder of the benchmark, see `benchmarks.load`.
    benchmark: one of `benchmarks.names()`.
    on_bad_row: "raise", or "skip" to leave unfit rows out and list them.
    on_missing: "raise" if clips are not there, or "count" to count their
      questions as wrong.
    media: folder of its clips, below it or absolute; "" is itself.
    workdir: where results go.
    checkpoint: base model's directory.
    policies: name -> policy file or folder, see `loading.load_policy`; the
      first is the main one.
    template: chat template, that of the "processor" or of the "tokenizer"; ""
      is the checkpoint's default, see `with_template`.
    num_frames: T.
    dtype: of the base model.
    cache: folder of cached features, "" for none.
    min_pixels: least pixels of a frame of models whose grid follows the clip; 0
      for the paper's, see `qwen_frames.ProcessorConfig.with_paper_bounds`.
    max_pixels: most pixels, likewise.
    frame_manifest: file of another run's frames; "" for none.
    shard: (i, n): this is process i of n that share the work.
    metrics: workdir of the training run whose curves the report shows; ""
      takes that of the main policy, if it is a training workdir.
  """

  data: str
  workdir: str
  checkpoint: str
  policies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  benchmark: str = benchmarks.PREPARED
  media: str = ""
  num_frames: int = 16
  dtype: str = "float32"
  cache: str = ""
  min_pixels: int = 0
  max_pixels: int = 0
  frame_manifest: str = ""
  shard: tuple[int, int] = (0, 1)
  metrics: str = ""
  methods: Sequence[str] = ("random", "uniform", "divprune", "density_peaks")
  oracles: Sequence[str] = ()
  ratios: Sequence[float] = (0.25, 0.1, 0.05)
  split: str = ""
  seeds: Sequence[int] = (0,)
  batch_size: int = 8
  max_new_tokens: int = 0
  rule: str = "paper"
  prompt_style: str = ""
  template: str = ""
  on_bad_row: str = "raise"
  on_missing: str = "raise"
  num_questions: int = 0
  select_on: str = "validation"
  select_ratio: float = 0.1
  select_questions: int = 200
  candidates: Mapping[str, Sequence[str]] = dataclasses.field(
    default_factory=dict
  )
  num_examples: int = 8

  def __post_init__(self):
    if self.select_on not in ("validation", "none"):
      raise errors.UserError(
        f"select_on={self.select_on!r}: use validation or none"
      )
    if self.template not in ("", "processor", "tokenizer"):
      raise errors.UserError(
        f"template={self.template!r}: use processor or tokenizer, or leave it"
        " empty for the checkpoint's default"
      )
    if self.on_missing not in ("raise", "count"):
      raise errors.UserError(
        f"on_missing={self.on_missing!r}: use raise or count"
      )
    shards.Shard(*self.shard).checked()
    for name in ("min_pixels", "max_pixels"):
      if getattr(self, name) < 0:
        raise errors.UserError(
          f"{name}={getattr(self, name)}: give a number of pixels, or 0 for the"
          " paper's"
        )
    if not self.seeds:
      raise errors.UserError("no evaluation seed given; for example seeds=0")
    labels = [
      runner.split_label(spec)[0] for spec in (*self.methods, *self.oracles)
    ]
    twice = sorted({name for name in labels if labels.count(name) > 1})
    if twice:
      raise errors.UserError(f"method {twice[0]!r} is listed twice")
    if not labels:
      raise errors.UserError("no method given; for example methods=random")


def request_fields(config=None) -> dict[str, Any]:
  """Returns the fields of a `Request` that a config sets.

  Args:
    config: with sections `model`, `data` and `evals` as far as there are such;
      None gives the defaults of `evals`.
  """
  section = defaults.get_config()
  fields = {}
  if config is not None:
    if "evals" in config:
      section.update(config.evals)
    if "model" in config:
      fields["checkpoint"] = config.model.get("path", "")
      fields["dtype"] = config.model.get("dtype", "float32")
    if "data" in config:
      fields["data"] = config.data.get("root", "")
      fields["media"] = config.data.get("media", "")
      fields["num_frames"] = config.data.get("num_frames", 16)
      fields["cache"] = config.data.get("feature_cache", "")
      for name in ("min_pixels", "max_pixels"):
        fields[name] = config.data.get(name, 0)
  known = {field.name for field in dataclasses.fields(Request)}
  for name, value in config_lib.to_dict(section).items():
    if name not in known:
      raise errors.UserError(
        f"unknown config key 'evals.{name}'; known: {', '.join(sorted(known))}"
      )
    fields[name] = tuple(value) if isinstance(value, list) else value
  return fields


def evaluate(
  request: Request,
  measure: Callable[[dict[str, Any]], Mapping] | None = None,
) -> dict[str, Any] | None:
  """Evaluates, writes all files of the workdir, and returns results.json.

  Of several processes that share the work, those that find it unfinished when
  they are done return None; the last one makes the files.

  Args:
    request: what to evaluate.
    measure: returns the report's `times` of results.json; called when that is
      written and the model's memory is free again.
  """
  found = _evaluate(request)
  if found is None:
    return None
  out, shown = found
  times = measure(out) if measure else {}
  path = os.path.join(request.workdir, "report.html")
  html.write(path, out, shown, _curves(request), times)
  return out


def _evaluate(request: Request):
  """Returns (results.json as a dict, examples for the report), or None."""
  ratios = results.check_ratios(map(base.check_ratio, request.ratios))
  test = load_benchmark(request, request.split, request.num_questions)
  specs = [*request.methods, *(request.oracles if test.decisive else ())]
  methods = [runner.Method.parse(spec) for spec in specs]
  checkpoint = with_template(
    checkpoints.load(request.checkpoint, jnp.dtype(request.dtype)),
    request.checkpoint,
    request.template,
  )
  candidates = _candidates(request, methods, checkpoint)
  validation = None
  if candidates:
    validation = load_benchmark(request, "validation", request.select_questions)
  policies = {
    name: loading.load_policy(path, checkpoint)
    for name, path in request.policies.items()
  }
  workdir = pathlib.Path(request.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  shard = shards.Shard(*request.shard)
  questions = [*test.questions, *(validation.questions if validation else ())]
  manifest = frame_manifest.FrameManifest(
    workdir / frame_manifest.FILE,
    num_frames=request.num_frames,
    given=request.frame_manifest,
  )
  manifest.require(question.video for question in questions)
  tried = [*methods, *(m for found in candidates.values() for m in found)]
  wanted = runner.wanted(tried)
  with open_source(request, checkpoint, wanted, manifest=manifest) as source:
    evaluator = runner.Evaluator(
      checkpoint,
      source,
      questions,
      settings(request),
      policies=policies,
      task=test.task,
      decisive={**(validation.decisive if validation else {}), **test.decisive},
    )
    chosen = {}
    if validation:
      identity = evaluator.identity(validation.questions)
      with shards.ledger(
        workdir, shard, "validation_answers.jsonl", identity
      ) as answers:
        methods, chosen = choose(
          evaluator,
          validation,
          methods,
          candidates,
          base.check_ratio(request.select_ratio),
          answers,
        )
    table = results.Table(
      test.name,
      test.split,
      test.questions,
      methods,
      ratios,
      tuple(request.seeds),
      evaluator.grid,
      test.task,
      {q.video: evaluator.grid_of(q) for q in test.questions},
    )
    identity = evaluator.identity(test.questions)
    with shards.ledger(workdir, shard, "answers.jsonl", identity) as answers:
      failures = _ask(table, evaluator, answers, workdir, shard, identity)
      _write_timings(workdir / shard.file("timings.json"), table, evaluator)
      if failures is None:
        return None
      out = results.build(
        table,
        answers,
        provenance=_provenance(
          table, answers, failures, evaluator, test.generator_hash
        ),
        failures=failures,
        chosen=chosen,
        decisive=test.decisive,
        rule=request.rule,
        left_out=test.left_out(),
      )
      if len(out["unreadable"]) == out["num_clips"]:
        raise errors.UserError(
          f"none of the {out['num_clips']} clips below {test.root} can be read"
          f" (first: {out['unreadable'][0]['video']},"
          f" {out['unreadable'][0]['reason']}); prepare the data again"
        )
      files.write_json(workdir / "results.json", out)
      shown = viewer.choose(
        table,
        answers,
        evaluator,
        test.decisive,
        request.num_examples,
        failures=failures,
      )
  return out, shown


def _ask(table, evaluator, answers, workdir, shard, identity):
  """Asks this process's share; returns all failures, None if work is left."""
  cells = runner.cells(table.methods, table.ratios, table.seeds)
  board = shards.Board(
    workdir, shard, shards.work(identity, cells, table.questions)
  )
  board.start()
  description = f"{table.split} answers"
  if not shard.alone:
    description += f" {shard.index}/{shard.count}"
  failures = evaluator.run(
    table.questions, cells, answers, description=description, shard=shard
  )
  if shard.alone:
    return failures
  board.done(failures)
  missing = board.missing()
  if missing:
    listed = ", ".join(f"{index}/{shard.count}" for index in missing)
    print(
      f"{description}: done, left to {listed}; the last one writes the table",
      file=sys.stderr,
      flush=True,
    )
    return None
  answers.look(shards.ledgers(workdir, "answers.jsonl"))
  answers.confirm_all()
  failures = board.failures()
  lacking = [key for key in results.keys(table, failures) if key not in answers]
  if lacking:
    raise errors.UserError(
      f"{workdir}: {len(lacking)} answers are missing although all processes"
      f" are done (first: {lacking[0].method}, {lacking[0].question}); a ledger"
      f" was cut or deleted: start --shard=0/{shard.count} to"
      f" {shard.count - 1}/{shard.count} again"
    )
  return failures


def _provenance(table, answers, failures, evaluator, generator_hash):
  checkpoint = evaluator.checkpoint
  return provenance.describe(
    frame_hashes=results.frame_hashes(table, answers),
    index_hashes=results.frame_hashes(table, answers, "index_hash"),
    environments=answers.environments(results.keys(table, failures)),
    template=checkpoint.tokenizer.template,
    checkpoint=checkpoint.identity,
    policies={name: p.identity for name, p in evaluator.policies.items()},
    generator_hash=generator_hash,
    settings={
      **dataclasses.asdict(evaluator.settings),
      **evaluator.source.identity,
    },
  )


def _write_timings(path, table, evaluator) -> None:
  timings = {
    "seconds": dict(evaluator.seconds),
    "host": provenance.host(),
    "grids": len(set(map(table.grid_of, table.questions))),
    "programs": evaluator.num_compiled,
  }
  files.write_json(path, timings)


def choose(
  evaluator: runner.Evaluator,
  validation: benchmarks.Benchmark,
  methods: Sequence[runner.Method],
  candidates: Mapping[str, Sequence[runner.Method]],
  ratio: float,
  answers: answer_log.Ledger,
) -> tuple[list[runner.Method], dict[str, Any]]:
  """Returns the methods with options chosen on validation, and the record.

  Args:
    evaluator: over the validation questions, among others.
    validation: what to choose by.
    methods: all methods; those without candidates are returned as they are.
    candidates: label -> methods to choose from; the first of equals wins, and
      where none can be run, the row stays as it is.
    ratio: at which they are compared.
    answers: ledger of the validation answers.
  """
  cells = [
    runner.Cell(method, ratio, 0)
    for found in candidates.values()
    for method in found
  ]
  try:
    failures = evaluator.run(
      validation.questions, cells, answers, description="choosing on validation"
    )
  except runner.NothingToAsk:
    return list(methods), {}

  def accuracy(method):
    cell = runner.Cell(method, ratio, 0)
    keys = [cell.key(question.id) for question in validation.questions]
    return float(np.mean([answers[key]["score"] for key in keys]))

  chosen, out = {}, []
  for method in methods:
    able = [
      m
      for m in candidates.get(method.label, ())
      if (m.spec, ratio) not in failures
    ]
    if not able:
      out.append(method)
      continue
    found = [(accuracy(m), m) for m in able]
    best = max(found, key=lambda pair: pair[0])[1]
    out.append(dataclasses.replace(best, label=method.label))
    chosen[method.label] = {
      "split": validation.split,
      "n": len(validation.questions),
      "ratio": results.ratio_key(ratio),
      "best": best.label,
      "candidates": [
        {"method": m.label, "accuracy": round(value, 6)} for value, m in found
      ],
    }
  return out, chosen


def validator(
  request: Request,
  checkpoint: checkpoints.Checkpoint,
  *,
  method: str = "cacovid",
  ratio: float = 0.1,
) -> Callable[[Any, Any], dict[str, float]]:
  """Returns (policy module, params) -> accuracy on validation, for training.

  Programs and clips are kept from one call to the next.

  Args:
    request: `data`, `template`, `select_questions` and the settings are read.
    checkpoint: the base model that the policy is trained with.
    method: how the policy's scores are followed.
    ratio: retention ratio.
  """
  checkpoint = with_template(checkpoint, request.checkpoint, request.template)
  validation = load_benchmark(request, "validation", request.select_questions)
  cell = runner.Cell(runner.Method.parse(method), base.check_ratio(ratio), 0)
  evaluator = runner.Evaluator(
    checkpoint,
    open_source(request, checkpoint, runner.wanted([cell.method])),
    validation.questions,
    settings(request),
    task=validation.task,
  )

  def validate(module, params):
    evaluator.policies = {"policy": loading.LoadedPolicy(module, params)}
    answers = answer_log.Ledger(None, {})
    evaluator.run(
      validation.questions, [cell], answers, description="validation"
    )
    keys = [cell.key(question.id) for question in validation.questions]
    return {"accuracy": float(np.mean([answers[k]["score"] for k in keys]))}

  return validate


def with_template(
  checkpoint: checkpoints.Checkpoint, directory: str, template: str
) -> checkpoints.Checkpoint:
  """Returns a checkpoint that writes prompts by the chat template asked for.

  Args:
    checkpoint: as loaded, with its default template: the processor's, or where
      there is none the tokenizer's.
    directory: where it was loaded from.
    template: "" or "processor" is that default; "tokenizer" takes the template
      of tokenizer_config.json and gives it plain texts, as the paper's
      evaluation does.
  """
  if template in ("", "processor"):
    return checkpoint
  if not chat_template_lib.has_tokenizer_template(directory):
    raise errors.UserError(
      f"{directory}: tokenizer_config.json has no chat_template, which"
      " template=tokenizer takes; copy that file from the checkpoint's origin,"
      " or use template=processor"
    )
  tokenizer = tokenizer_lib.Tokenizer.from_directory(
    directory, template=template
  )
  return dataclasses.replace(checkpoint, tokenizer=tokenizer)


def load_benchmark(
  request: Request, split: str = "", count: int = 0
) -> benchmarks.Benchmark:
  """Returns a split of a request's data.

  Clips that are not there are an error before anything is asked, or are
  listed and counted as wrong, as the request says.

  Args:
    request: see there.
    split: "" takes the benchmark's first one.
    count: questions taken, in order; 0 takes all.
  """
  found = benchmarks.load(
    request.data,
    split,
    benchmark=request.benchmark,
    media=request.media,
    style=request.prompt_style,
    on_bad_row=request.on_bad_row,
  ).limited(count)
  if request.on_missing == "raise":
    readers.require_media(found.questions, found.root)
  elif missing := readers.check_media(found.questions, found.root):
    logging.warning(
      "%s: %d clips are missing, %d questions count as wrong, first: %s",
      found.root,
      len(missing),
      sum(missing.values()),
      ", ".join(list(missing)[:5]),
    )
  return found


def settings(request: Request) -> runner.Settings:
  """Returns what the answers of a request depend on besides weights."""
  return runner.Settings(
    num_frames=request.num_frames,
    batch_size=request.batch_size,
    max_new_tokens=(
      request.max_new_tokens
      or benchmarks.task(request.benchmark).max_new_tokens
    ),
    rule=request.rule,
  )


def open_source(
  request: Request,
  checkpoint: checkpoints.Checkpoint,
  want: frozenset[str] = frozenset(),
  *,
  manifest: frame_manifest.FrameManifest | None = None,
) -> clips.ClipSource:
  """Returns the encoded clips of a request's data.

  Args:
    request: see there.
    checkpoint: the base model.
    want: names of `vision_signals` that clips bring along.
    manifest: what their frames must agree with; None for nothing.
  """
  model = checkpoint.model
  if isinstance(model, qwen2_5_vl.Qwen2_5VLModel):
    kind = clips.PatchSource
    preprocessing = qwen_frames.ProcessorConfig.with_paper_bounds(
      request.checkpoint,
      min_pixels=request.min_pixels,
      max_pixels=request.max_pixels,
    )
  else:
    if request.min_pixels or request.max_pixels:
      raise errors.UserError(
        f"min_pixels and max_pixels: {request.checkpoint} has frames of one"
        " size; leave them out"
      )
    kind = clips.ClipSource
    preprocessing = frames.Preprocessing.from_directory(request.checkpoint)
  dtype = jnp.dtype(model.dtype).name
  return kind(
    os.path.join(request.data, request.media),
    model,
    checkpoint.params,
    preprocessing,
    num_frames=request.num_frames,
    cache=feature_cache.FeatureCache(request.cache) if request.cache else None,
    cache_key=f"{checkpoint.identity['sha256']} {dtype}",
    # The clips of this batch and of the next one.
    keep=2 * request.batch_size,
    want=want,
    manifest=manifest,
  )


def show(out: Mapping[str, Any], console: rich.console.Console | None = None):
  """Prints accuracies, intervals and shares of vanilla as a table."""
  if console is None:
    console = rich.console.Console()
    if not console.is_terminal:  # A log has no width to keep to.
      console = rich.console.Console(width=120)
  vanilla = out["vanilla"]
  low, high = vanilla["ci95"]
  several = len(out["grid"]) if isinstance(out["grid"][0], Mapping) else 0
  mean = f" on average, {several} grids" if several else ""
  table = rich.table.Table(
    title=f"{out['benchmark']} {out['split']}: {vanilla['n']} questions about"
    f" {out['num_clips']} clips, accuracy in %",
    caption=f"vanilla (all {vanilla['kept_tokens']} video tokens{mean}):"
    f" {100 * vanilla['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]."
    " Per cell: accuracy, 95 % interval clustered by clip, share of vanilla.",
  )
  rows = {**out["methods"], **out["oracles"]}
  ratios = list(next(iter(rows.values())))
  table.add_column("method")
  for ratio in ratios:
    table.add_column(f"{float(ratio):.0%} kept", justify="right")
  for name, cells in rows.items():
    label = f"{name} (oracle)" if name in out["oracles"] else name
    table.add_row(label, *[_cell_text(cells[ratio]) for ratio in ratios])
  console.print(table)
  for line in caveats(out):
    console.print(line, markup=False)
  head = out["frame_head"]
  if head:
    console.print(
      f"frame head: its best {head['frames']} of {head['of']} frames hold a"
      f" decisive one for {head['hit']:.1%} of {head['n']} questions (chance"
      f" {head['chance']:.1%})"
    )


def caveats(out: Mapping[str, Any]) -> list[str]:
  """Returns what was not asked, counted as wrong or guessed, a line each."""
  found = out["left_out"]
  lines = [
    f"counted as wrong: {entry['questions']} questions about"
    f" {entry['video']} ({entry['reason']})"
    for entry in out["unreadable"]
  ]
  if bad := found.get("bad_rows"):
    first = bad[0]
    lines.append(
      f"left out: {len(bad)} bad rows, first {first['file']} row"
      f" {first['row']}, field {first['field']!r}: {first['reason']}"
    )
  for kind, count in found.get("other_rows", {}).items():
    lines.append(f"left out: {count} rows, {kind}")
  if missing := found.get("not_there"):
    lines.append(f"not there: {', '.join(missing)}")
  if guesses := out["vanilla"].get("num_fallbacks"):
    lines.append(
      f"guessed: {guesses} of {out['vanilla']['n']} vanilla answers named no"
      " option"
    )
  return lines


def _cell_text(cell) -> str:
  if cell["status"] != "ok":
    return cell["status"]
  low, high = cell["ci95"]
  text = f"{100 * cell['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
  if cell["of_vanilla"] is not None:
    text += f" {cell['of_vanilla']:.0%}"
  # Brackets are markup to rich.
  return text.replace("[", "\\[")


def _candidates(request, methods, checkpoint) -> dict[str, list[runner.Method]]:
  """Returns label -> methods to choose from on validation."""
  if request.select_on == "none":
    return {}
  task = benchmarks.task(request.benchmark)
  if not task.can_choose(request.split):
    if request.candidates:
      raise errors.UserError(
        f"candidates are given, and {task.name} has no validation split apart"
        " from what is asked; name the options in the methods themselves"
      )
    return {}
  out = {}
  for method in methods:
    name = method.label.partition("?")[0]
    listed = request.candidates.get(method.label)
    if listed:
      out[method.label] = list(listed)
    elif name == "last_query" and "layer" not in method.compressor.options:
      layers = range(checkpoint.model.config.text.num_layers)
      out[method.label] = [f"last_query?layer={layer}" for layer in layers]
  unknown = sorted(set(request.candidates) - {m.label for m in methods})
  if unknown:
    raise errors.UserError(
      f"candidates are given for {unknown[0]!r}, which is not among the methods"
    )
  return {
    label: [runner.Method.parse(spec) for spec in specs]
    for label, specs in out.items()
  }


def _curves(request) -> list[dict[str, Any]]:
  """Returns the metrics of the training run that made the main policy."""
  if request.metrics:
    return metrics.read(request.metrics)
  for spec in list(request.policies.values())[:1]:
    path = pathlib.Path(loading.split(spec)[0])
    for folder in (path, *path.parents[:2]):
      if (folder / metrics.FILE).is_file():
        return metrics.read(folder)
  return []
