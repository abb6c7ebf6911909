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
from collections.abc import Callable, Mapping
from typing import Any

import rich.table
from absl import logging

from cacovid_jax import errors, files, metrics, terminal
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import answer_log, readers, video
from cacovid_jax.evals import (
  benchmarks,
  frame_manifest,
  option_search,
  provenance,
  results,
  shards,
  throughput,
)
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.evals.report import html, viewer
from cacovid_jax.inference import clip_queue, device_watch
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.policy import loading


def evaluate(
  experiment: experiment_lib.Experiment,
  measure: Callable[[dict[str, Any]], Mapping] | None = None,
) -> dict[str, Any] | None:
  """Evaluates, writes all files of the workdir, and returns results.json.

  Of several processes that share the work, those that find it unfinished when
  they are done return None; the last one makes the files. `measure` returns the
  report's `times` of results.json; it is called when that is written.
  """
  check(experiment.config)
  shard, workdir = shards.Shard(*experiment.shard).checked(), experiment.workdir
  with files.claim(
    workdir / shard.file("evaluate"),
    "evaluation",
    what=workdir,
    hint=answer_log.MEND,
  ):
    found = _evaluate(experiment)
    if found is None:
      return None
    out, shown = found
    times = measure(out) if measure else {}
    path = workdir / "report.html"
    html.write(path, out, shown, _curves(experiment), times)
  return out


def check(config) -> None:
  """Refuses what is wrong with config.evals whatever the data and the model."""
  evals = config.evals
  errors.check(evals.seeds, "no evaluation seed given; for example seeds=0")
  specs = (*evals.methods, *evals.oracles)
  labels = [methods_lib.split_label(spec)[0] for spec in specs]
  twice = sorted({name for name in labels if labels.count(name) > 1})
  if twice:
    raise errors.UserError(f"method {twice[0]!r} is listed twice")
  errors.check(labels, "no method given; for example methods=random")
  curves = os.path.join(evals.metrics, metrics.FILE)
  told = f"there is no {curves}; name a training workdir, or leave it empty"
  errors.check(not evals.metrics or os.path.isfile(curves), told)
  results.check_ratios(evals.ratios)


def _evaluate(experiment):
  """Returns (results.json as a dict, examples for the report), or None."""
  config, evals = experiment.config, experiment.config.evals
  shard = shards.Shard(*experiment.shard)
  ratios = results.check_ratios(evals.ratios)
  test = load_benchmark(experiment)
  methods, search, validation = plan(experiment, test)
  tried = [*methods, *(search.candidates if search else ())]
  others, decisive = (), test.decisive
  if validation:
    others, decisive = validation.questions, validation.decisive | decisive
  policies, workdir = experiment.policies, experiment.workdir
  manifest = frame_manifest.FrameManifest(
    workdir / frame_manifest.FILE,
    num_frames=config.data.num_frames,
    given=evals.frame_manifest,
  )
  manifest.require(q.video for q in (*test.questions, *others))
  wanted = methods_lib.wanted(tried)
  made = {"manifest": manifest, "watch": device_watch.DeviceWatch()}
  with clip_queue.open_queue(experiment, wanted, **made) as source:
    engine = engine_lib.Engine.of(
      experiment, source, test.questions, settings(experiment), others=others,
      policies=policies, decisive=decisive,
    )  # fmt: skip
    evaluator, chosen = evaluator_lib.Evaluator(engine, test.task), {}
    if search:
      identity = evaluator.identity(others)
      with shards.ledger(
        workdir, shard, "validation_answers.jsonl", identity
      ) as answers:
        methods, chosen = search.run(evaluator, validation, methods, answers)
    given = engine, validation, methods, ratios
    methods, calibrated = option_search.calibrate(*given)
    table = results.Table(
      test.name, test.split, test.questions, methods, ratios,
      tuple(evals.seeds), engine.grid, test.task,
      {q.video: engine.grid_of(q) for q in test.questions},
    )  # fmt: skip
    identity = evaluator.identity(test.questions)
    with shards.ledger(workdir, shard, "answers.jsonl", identity) as answers:
      failures = _ask(table, evaluator, answers, workdir, shard, identity)
      throughput.write(workdir / shard.file("timings.json"), evaluator)
      if failures is None:
        return None
      out = results.build(
        table,
        answers,
        provenance=_provenance(table, answers, failures, engine, test),
        failures=failures,
        chosen=chosen,
        decisive=test.decisive,
        rule=engine.settings.rule,
        rouge=config.rouge,
        left_out=test.left_out(),
        **calibrated,
      )
      if len(out["unreadable"]) == out["num_clips"]:
        raise errors.UserError(
          f"none of the {out['num_clips']} clips below {test.root} can be read"
          f" (first: {out['unreadable'][0]['video']},"
          f" {out['unreadable'][0]['reason']}); prepare the data again"
        )
      files.write_json(workdir / "results.json", out)
      count = evals.num_examples
      return out, viewer.choose(
        table, answers, engine, test.decisive, count, failures=failures
      )


def plan(experiment, test: benchmarks.Benchmark):
  """Returns (methods, the search for their options, validation's questions).

  The search is None without candidates, validation where nothing is to be
  chosen. Needs no weights.
  """
  evals, found = experiment.config.evals, None
  specs = [*evals.methods, *(evals.oracles if test.decisive else ())]
  methods = [methods_lib.Method.parse(spec) for spec in specs]
  search = option_search.Search.of(experiment, methods)
  if search or option_search.calibrates(experiment, methods):
    found = load_benchmark(experiment, "validation", evals.select_questions)
  return methods, search, found


def _ask(table, evaluator, answers, workdir, shard, identity):
  """Asks this process's share; returns all failures, None if work is left."""
  conditions = methods_lib.conditions(table.methods, table.ratios, table.seeds)
  status = shards.ShardStatus(
    workdir, shard, shards.work(identity, conditions, table.questions)
  )
  status.start()
  description = f"{table.split} answers"
  if not shard.alone:
    description += f" {shard.index}/{shard.count}"
  failures = evaluator.run(
    table.questions, conditions, answers, description=description, shard=shard
  )
  if shard.alone:
    return failures
  status.done(failures)
  missing, failures = status.read()
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
  lacking = [key for key in results.keys(table, failures) if key not in answers]
  if lacking:
    raise errors.UserError(
      f"{workdir}: {len(lacking)} answers are missing although all processes"
      f" are done (first: {lacking[0].method}, {lacking[0].question}); a ledger"
      f" was cut or deleted: start --shard=0/{shard.count} to"
      f" {shard.count - 1}/{shard.count} again"
    )
  return failures


def _provenance(table, answers, failures, engine, test):
  checkpoint = engine.checkpoint
  return provenance.describe(
    frame_hashes=results.frame_hashes(table, answers),
    index_hashes=results.frame_hashes(table, answers, "index_hash"),
    environments=answers.environments(results.keys(table, failures)),
    template=checkpoint.tokenizer.template,
    checkpoint=checkpoint.identity,
    policies={name: p.identity for name, p in engine.policies.items()},
    generator_hash=test.generator_hash,
    settings={**engine.settings.identity, **engine.source.identity},
  )


def validator(
  experiment: experiment_lib.Experiment,
) -> Callable[[Any, Any], dict[str, float]]:
  """Returns (policy module, params) -> accuracy on validation, for training.

  Programs and clips are kept from one call to the next.
  """
  config = experiment.config.validation
  validation = load_benchmark(experiment, "validation", config.num_questions)
  method = methods_lib.Method.parse(config.method)
  condition = methods_lib.Condition(method, base.check_ratio(config.ratio))
  asked = dataclasses.replace(
    settings(experiment),
    batch_size=config.batch_size,
    max_new_tokens=config.max_new_tokens,
  )
  source = clip_queue.open_queue(
    experiment, methods_lib.wanted([method]), keep=2 * config.batch_size
  )
  questions = validation.questions
  engine = engine_lib.Engine.of(experiment, source, questions, asked)
  evaluator = evaluator_lib.Evaluator(engine, validation.task)

  def validate(module, params):
    engine.policies = {"policy": loading.LoadedPolicy.of(module, params)}
    log = answer_log.AnswerLog(None, {})
    evaluator.run(questions, [condition], log, description="validation")
    return {"accuracy": option_search.accuracy(condition, questions, log)}

  return validate


def load_benchmark(
  experiment: experiment_lib.Experiment, split: str = "", count: int = 0
) -> benchmarks.Benchmark:
  """Returns what config.evals asks, or `count` questions of another split.

  In order; 0 takes all. Clips that are not there are an error, or are listed
  and count as wrong, as the config says.
  """
  data, evals = experiment.config.data, experiment.config.evals
  if not split:
    split, count = evals.split, evals.num_questions
  found = benchmarks.load(
    data.root,
    split,
    benchmark=evals.benchmark,
    media=data.media,
    style=evals.prompt_style,
    on_bad_row=evals.on_bad_row,
  ).limited(count)
  # Of other frames than are shown now, they would name other places.
  if found.decisive and found.num_frames not in (None, data.num_frames):
    told = "%s: decisive.jsonl is of %d frames, not %d, and left out"
    frames = found.num_frames, data.num_frames
    logging.log_first_n(logging.WARNING, told, 1, data.root, *frames)
    found = dataclasses.replace(found, decisive={})
  names = [question.video for question in found.questions]
  if missing := readers.find_missing(
    names, found.root, on_missing=evals.on_missing
  ):
    logging.warning(
      "%s: %d clips are missing, %d questions count as wrong, first: %s",
      found.root,
      len(missing),
      sum(missing.values()),
      ", ".join(list(missing)[:5]),
    )
  return found


def settings(experiment: experiment_lib.Experiment) -> engine_lib.Settings:
  """Returns what the answers depend on besides weights and questions."""
  evals = experiment.config.evals
  task = benchmarks.task(evals.benchmark)
  return engine_lib.Settings(
    num_frames=experiment.config.data.num_frames,
    batch_size=evals.batch_size,
    max_new_tokens=evals.max_new_tokens or task.max_new_tokens,
    rule=evals.rule or task.rule,
    rouge=experiment.config.rouge,
    empty_frames=evals.empty_frames,
  )


def show(out: Mapping[str, Any], console: terminal.Console | None = None):
  """Prints accuracies, intervals and shares of vanilla as a table."""
  console = terminal.Console() if console is None else console
  vanilla, head = out["vanilla"], out["frame_head"]
  several = len(out["grid"]) if isinstance(out["grid"][0], Mapping) else 0
  mean = f" on average, {several} grids" if several else ""
  table = rich.table.Table(
    title=f"{out['benchmark']} {out['split']}: {vanilla['n']} questions about"
    f" {out['num_clips']} clips, accuracy in %",
    caption=f"vanilla (all {vanilla['kept_tokens']} video tokens{mean}):"
    f" {_interval(vanilla)}. Per cell: accuracy, 95 % interval clustered by"
    " clip, share of vanilla.",
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
    console.print(line)
  if head:
    console.print(
      f"frame head: its best {head['frames']} of {head['of']} frames hold a"
      f" decisive one for {head['hit']:.1%} of {head['n']} questions (chance"
      f" {head['chance']:.1%})"
    )


def caveats(out: Mapping[str, Any]) -> list[str]:
  """Returns what was not asked or not whole, wrong or guessed, a line each."""
  found, vanilla = out["left_out"], out["vanilla"]
  lines = [
    f"counted as wrong: {entry['questions']} questions about"
    f" {entry['video']} ({entry['reason']})"
    for entry in out["unreadable"]
  ]
  lines += [
    f"{entry['video']}: {video.told(entry)}" for entry in out.get("damaged", ())
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
  if guesses := vanilla.get("num_fallbacks"):
    lines.append(
      f"guessed: {guesses} of {vanilla['n']} vanilla answers named no option"
    )
  return lines


def _cell_text(cell) -> str:
  if cell["status"] != "ok":
    return cell["status"]
  share = cell["of_vanilla"]
  text = _interval(cell) + ("" if share is None else f" {share:.0%}")
  if most := cell.get("kept_tokens_p95"):
    text += f", {cell['kept_tokens']:.0f} tokens (95 %: {most:.0f})"
  return text


def _interval(row) -> str:
  low, high = row["ci95"]
  return f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _curves(experiment) -> list[dict[str, Any]]:
  """Returns the metrics of the training run that made the main policy."""
  if experiment.config.evals.metrics:
    return metrics.read(experiment.config.evals.metrics)
  for spec in list(experiment.policy_paths.values())[:1]:
    path = pathlib.Path(loading.split(spec)[0])
    for folder in (path, *path.parents[:2]):
      if os.path.isfile(folder / metrics.FILE):
        return metrics.read(folder)
  return []
