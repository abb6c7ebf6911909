r"""What makes the method train, and what it carries over to: a row each.

python -m experiments.ablations --plan --seconds_per_video=0.00625
python -m experiments.ablations --row=ours-objective.kl_weight --seed=42
python -m experiments.ablations --rows=all       # what is missing

`ours` is --config, `paper` the same with its argument `paper`. Of every key in
which they differ there are two rows: `ours-KEY` takes it alone back to the
paper's value, `paper+KEY` brings ours alone into the paper's recipe. Transfer
asks policies of `ours` about sparse clips, with twice the frames, and with
--other_base; `sparse` and `other_base_own` are trained on what they are asked.

WORKDIR/policies/HASH/  a training; rows that only ask otherwise share it
WORKDIR/ROW/seed_N/     its evaluation, and row.jsonl: what the table needs
WORKDIR/table.md        means and standard deviations over seeds, differences
                        on the same questions with their 95 % intervals
WORKDIR/accuracy.svg    ablations at 5 %, or at the first ratio

Given again, it goes on where it was. Started several times, side by side, each
takes rows that no other one works on; seconds of training are longer then. A
row that fails is tried again at the end, and does not stop the others.
"""

import pathlib
import shutil
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from cacovid_jax import (
  base_config,
  command,
  errors,
  files,
  metrics,
  schema,
  terminal,
  train,
)
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import answer_log
from cacovid_jax.evals import evaluation, results, tables
from cacovid_jax.evals import statistics as statistics_lib
from cacovid_jax.evals.report import charts
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.policy import loading
from experiments import reporting

_CONFIG = "configs/synthetic.py:size=small"
_CANDIDATES = "evals.candidates.cacovid"
# What a recipe is, of a config.
_RECIPE = ("iterations", "sampling.", "ratio.", "objective.", "policy.",
           "optimizer.", "rollout.", _CANDIDATES)  # fmt: skip
_NAMES = {_CANDIDATES: "importance_ratio"}
_LEDGER = "row.jsonl"
_KEY = answer_log.Key("row", 1.0, 0, "all")  # Of a ledger's only entry.
# Of the table, beside accuracies at ratios: their units in what is written.
_COLUMNS = {"seconds": 1, "all tokens": 100, "validation": 100}
_SEEDS = (42, 43, 44)
PARTS = ("ablations", "transfer")
_MANY = command.Flag("", default=(), many=True)
_SECONDS = command.Flag("", default=0.0, least=0)
COMMAND = command.Command(
  __doc__,
  {
    "row": _MANY._replace(help="A row, by its name."),
    "rows": command.Flag("Several rows.", default="", choices=("all", *PARTS)),
    "seed": command.Flag("Of training, comma-separated.", default=_SEEDS),
    "plan": command.Flag("Print rows and minutes alone.", default=False),
    "workdir": command.Flag("Of all.", default="workdirs/ablations"),
    "ratios": command.Flag("Shares kept.", default=(0.1, 0.05, 0.02)),
    "also": _MANY._replace(help="A row more: `ours` with KEY=VALUE;KEY=VALUE."),
    "other_base": command.Flag(
      "Another base model of the same shape.", default=""
    ),
    "seconds_per_video": _SECONDS._replace(help="Measured, of `ours`."),
    "seconds_per_row": _SECONDS._replace(help="Measured, beside training."),
  },
  default=_CONFIG,
)


class Row(NamedTuple):
  """A recipe, and what its policies are asked."""

  recipe: str  # "ours" or "paper".
  changes: Mapping[str, Any] = {}  # Of its config: key -> value.
  asked: Mapping[str, Any] = {}  # Further ones, after training.
  reference: str = "ours"  # Row that differences are from.
  part: str = PARTS[0]

  @property
  def told(self) -> str:
    """What is changed, as a text."""
    told = [f"{_NAMES.get(k, k)}={v}" for k, v in self.changes.items()]
    told += [f"asked with {k}={v}" for k, v in self.asked.items()]
    return ", ".join(told)


class Run(NamedTuple):
  """A row with one seed."""

  name: str
  seed: int
  trained: Any  # Config.
  asked: Any  # Config.
  folder: pathlib.Path  # Of the evaluation.
  policy: pathlib.Path  # Of the training.

  @property
  def identity(self) -> dict[str, Any]:
    """What a ledger's entry depends on."""
    trained, asked = map(config_lib.config_hash, (self.trained, self.asked))
    evals = config_lib.to_dict(self.asked.evals)
    return {"trained": trained, "asked": asked, "evals": evals}

  @property
  def known(self) -> dict[str, Any] | None:
    """What `measure` returned; None if that is to be done."""
    ledger = answer_log.AnswerLog(None, self.identity)
    ledger.look([self.folder / _LEDGER])
    return ledger.get(_KEY)


def main(args):
  """Runs the rows that the command line names, and writes the table."""
  workdir, recipes = pathlib.Path(args.workdir), read_recipes(args)
  rows = make_rows(recipes, args.also, args.other_base)
  if unknown := [name for name in args.row if name not in rows]:
    listed = ", ".join(rows)
    raise errors.UserError(f"no row {unknown[0]!r}; --row is one of {listed}")
  runs = [
    make_run(workdir, recipes[row.recipe], name, row, seed)
    for name, row in rows.items()
    for seed in dict.fromkeys((*args.seed, *_SEEDS))
  ]
  wanted = args.rows or ("" if args.row else "all")
  todo = [
    run for run in runs
    if not run.known and run.seed in args.seed
    and (run.name in args.row or wanted in ("all", rows[run.name].part))
  ]  # fmt: skip
  print_plan(todo, rows, args, recipes["ours"])
  if args.plan or not (args.row or args.rows):
    return
  files.check_writable(workdir / "table.md", "--workdir")
  for wait in (False, True):  # At last for what others work on.
    failed = {}
    for run in todo:
      try:
        perform(run, wait=wait)
      except errors.UserError as error:
        failed[run.folder] = errors.one_line(error)
        terminal.tell(f"{run.folder}: {error}", error=True)
  print(write_table(workdir, rows, runs, failed))
  if failed:
    folder, reason = next(iter(failed.items()))
    told = f"{len(failed)} of {len(todo)} failed, first {folder}: {reason}"
    raise errors.UserError(told)


def read_recipes(args) -> dict[str, Any]:
  """Returns the configs of `ours` and of `paper`, which ask one method."""
  spec, found = args.spec or _CONFIG, {}
  ratios = results.check_ratios(map(base.check_ratio, args.ratios))
  papers = f"{spec}{',' if ':' in spec else ':'}paper"
  for name, text in (("ours", spec), ("paper", papers)):
    config = config_lib.load(text, args.overrides, fill=True)
    candidates = config.evals.candidates.get("cacovid", ("cacovid",))
    changes = {
      "evals.methods": ("cacovid",),
      "evals.oracles": (),
      "evals.candidates": {"cacovid": tuple(candidates)},
      "evals.ratios": ratios,
      "evals.num_examples": 0,
    }
    found[name] = config_lib.replace(config, changes)
  return found


def departures(there, here, keys=_RECIPE) -> dict[str, Any]:
  """Returns key -> its value `here`, of keys that begin so and differ."""
  before, now = (
    traverse_util.flatten_dict(config_lib.to_dict(config), sep=".")
    for config in (there, here)
  )
  return {
    key: config_lib.value_of(here, key)
    for key in now
    if key.startswith(keys) and before.get(key) != now[key]
  }


def make_rows(recipes, also=(), other_base="") -> dict[str, Row]:
  """Returns all rows by name."""
  ours, paper = recipes["ours"], recipes["paper"]
  rows = {"ours": Row("ours")}
  for key, value in departures(ours, paper).items():
    rows[f"ours-{_NAMES.get(key, key)}"] = Row("ours", {key: value})
  for text in also:
    changed = config_lib.replace(ours, {}, text.split(";"))
    rows[text.replace("/", "_")] = Row("ours", departures(ours, changed, ""))
  rows["paper"] = Row("paper")
  for key, value in departures(paper, ours).items():
    rows[f"paper+{_NAMES.get(key, key)}"] = Row("paper", {key: value})
  # The paper's own rates, for 7B, in place of a small model's.
  rates = base_config.get_config().optimizer
  rates = {f"optimizer.{k}": rates[k] for k in ("lr_heads", "lr_layer")}
  rows["paper_rates_7b"] = Row("paper", rates)
  root = pathlib.Path(ours.data.root)
  sparse = {"data.root": str(root.with_name("sparse"))}
  frames = {"data.num_frames": 2 * ours.data.num_frames}
  transfer = {
    "sparse": Row("ours", sparse, {}, "sparse"),
    "dense_to_sparse": Row("ours", {}, sparse, "sparse"),
    "sparse_to_dense": Row("ours", sparse, {"data.root": str(root)}),
    "twice_the_frames": Row("ours", {}, frames),
  }
  if other_base:
    if not pathlib.Path(other_base, "config.json").is_file():
      told = "no config.json is there; give a base model's folder"
      raise errors.UserError(f"--other_base={other_base}: {told}")
    other, own = {"model.path": other_base}, "other_base_own"
    transfer[own] = Row("ours", other, {}, own)
    transfer["other_base"] = Row("ours", {}, other, own)
  return rows | {n: r._replace(part=PARTS[1]) for n, r in transfer.items()}


def make_run(workdir, recipe, name, row, seed) -> Run:
  """Returns a row with a seed; its configs were checked."""
  trained = config_lib.replace(recipe, {**row.changes, "seed": seed})
  asked = config_lib.replace(trained, row.asked) if row.asked else trained
  policy = workdir / "policies" / config_lib.config_hash(trained)
  return Run(
    name, seed, trained, asked, workdir / name / f"seed_{seed}", policy
  )


def is_trained(run: Run) -> bool:
  """Returns whether a run's policy is there."""
  return (run.policy / "policy" / "policy.safetensors").is_file()


def print_plan(runs, rows, args, ours) -> None:
  """Prints what is to be run, and minutes as the flags estimate them."""
  lines, total, planned = [], 0.0, set()
  for run in runs:
    videos, seconds = 0, args.seconds_per_row
    if not is_trained(run) and run.policy not in planned:
      planned.add(run.policy)
      videos = run.trained.total_steps * run.trained.videos_per_step
      work, unit = (
        config.iterations * config.sampling.num_combinations
        for config in (run.trained, ours)
      )
      seconds += videos * work / unit * args.seconds_per_video
    total += seconds / 60
    told = rows[run.name].told
    lines.append((run.name, run.seed, told, videos, f"{seconds / 60:.1f}"))
  title = f"{len(lines)} to run, {total:.1f} minutes"
  reporting.table(("row", "seed", "changes", "videos", "minutes"), lines, title)


def perform(run: Run, *, wait: bool) -> None:
  """Runs a row, unless it is done by now.

  Raises:
    UserError: it failed, or another process has it and this one shall not
      `wait` for it.
  """
  if not run.known:
    with files.claim(run.folder / "row", wait=wait):
      print(run.folder, flush=True)
      with answer_log.AnswerLog(run.folder / _LEDGER, run.identity) as rows:
        reporting.once(rows, _KEY, lambda: measure(run))


def measure(run: Run) -> dict[str, Any]:
  """Trains where that is not done, asks, and returns what a table needs.

  Accuracies and scores are fractions; scores are in the order of `clips`, one
  for each question.
  """
  policy = run.policy
  with files.claim(policy / "row", wait=True):  # Of rows that share it.
    if not is_trained(run):
      train.train(run.trained, policy)
  if run.asked.model.path != run.trained.model.path:
    policy = lend(policy, run.folder)
  config = {"evals.policies": (f"policy={policy}",)}
  config = config_lib.replace(run.asked, config)
  asked = experiment_lib.Experiment.from_config(config, run.folder)
  out = evaluation.evaluate(asked)
  path = run.folder / "answers.jsonl"
  answers = answer_log.AnswerLog(None, answer_log.header(path))
  answers.look([path])
  answers.confirm_all()
  found = {
    (results.ratio_key(key.ratio), key.question): record["score"]
    for key, record in answers.items()
    if key.method != methods_lib.VANILLA
  }
  questions = evaluation.load_benchmark(
    asked, config.evals.split, config.evals.num_questions
  ).questions
  tried = out["chosen"].get("cacovid", {}).get("candidates", ())
  return {
    "all tokens": out["vanilla"]["accuracy"],
    "validation": max((one["accuracy"] for one in tried), default=None),
    "seconds": seconds_of(run.policy),
    "clips": [question.video for question in questions],
    "scores": {
      ratio: [found[ratio, question.id] for question in questions]
      for ratio, cell in out["methods"]["cacovid"].items()
      if cell["status"] == "ok"
    },
  }


def lend(policy: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Copies a policy for another base model than its own; returns the folder."""
  shutil.copytree(policy / "policy", folder / "policy", dirs_exist_ok=True)
  path = folder / "policy" / loading.CONFIG
  described = schema.read(path, dict)
  files.write_json(path, described | {"base_model": {}})
  return folder


def seconds_of(workdir) -> float:
  """Returns what a training took, without compilation and interruptions."""
  total, last = 0.0, 0
  for line in metrics.read(workdir):
    if "seconds_per_step" in line:
      total += line["seconds_per_step"] * (line["step"] - last)
      last = line["step"]
  return total


def write_table(workdir, rows, runs, failed) -> str:
  """Writes table.md and accuracy.svg, of all rows; returns the Markdown."""
  found = {name: [] for name in rows}
  for run in runs:
    if known := run.known:
      found[run.name].append(known)
  ratios, points = runs[0].asked.evals.ratios, {}
  keys = list(map(results.ratio_key, ratios))
  shown = "0.05" if "0.05" in keys else keys[0]
  lines = {part: [] for part in PARTS}
  for name, row in rows.items():
    known, cells = found[name], [name, row.told, str(len(found[name]))]
    for column, scale in _COLUMNS.items():
      values = [one[column] for one in known if one[column] is not None]
      cells.append(_spread([scale * value for value in values]))
    others = found[row.reference] if name != row.reference else []
    cells += [_accuracy(known, others, key) for key in keys]
    lines[row.part].append(cells)
    if row.part == PARTS[0] and (scores := _scores(known, shown)):
      points[name] = [100 * statistics.fmean(one) for one in scores]
  head = ["row", "changes", "seeds", *_COLUMNS, *(f"{r:.0%}" for r in ratios)]
  numbers = range(2, len(head))
  texts = [tables.as_markdown(head, lines[part], numbers) for part in PARTS]
  texts += [f"failed: {folder}: {reason}" for folder, reason in failed.items()]
  files.write(workdir / "table.md", text := "\n\n".join(texts) + "\n")
  label = f"accuracy at {float(shown):.0%} of the tokens (%), seeds and mean"
  files.write(workdir / "accuracy.svg", charts.by_name(points, label))
  return text


def _spread(values) -> str:
  """Returns "81.8 ± 0.9", mean and standard deviation as far as known."""
  text = tables.number(statistics.fmean(values) if values else None)
  return f"{text} ± {statistics.stdev(values):.1f}" if values[1:] else text


def _scores(known, key) -> list[list[float]]:
  """Returns the scores of each seed at a ratio."""
  return [one["scores"][key] for one in known if key in one["scores"]]


def _accuracy(known, others, key) -> str:
  """Returns "81.8 ± 0.9 (-3.2 [-4.1, -2.3])", less that of others."""
  scores, reference = _scores(known, key), _scores(others, key)
  text = _spread([100 * statistics.fmean(one) for one in scores])
  if not (scores and reference):
    return text
  sample = statistics_lib.Sample(tuple(known[0]["clips"]))
  means = np.mean(scores, axis=0), np.mean(reference, axis=0)
  mean, low, high = (100 * value for value in sample.difference(*means))
  return f"{text} ({mean:+.1f} [{low:+.1f}, {high:+.1f}])"


if __name__ == "__main__":
  COMMAND.run(main)
