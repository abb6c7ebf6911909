r"""What makes the method train, and what it carries over to: a row each.

python -m experiments.ablations --seconds_per_video=0.00625    # plans alone
python -m experiments.ablations --row=ours-objective.kl_weight --seed=42
python -m experiments.ablations --rows=all       # what is missing

`ours` is --config, `paper` the same with its argument `paper`. Of every key in
which they differ there are two rows: `ours-KEY` takes it alone back to the
paper's value, `paper+KEY` brings ours alone into the paper's recipe. `public_*`
are ours with what the public code does, `ours+KEY` with an option of neither.
Transfer asks policies of `ours` about sparse clips, with twice the frames, and
with --other_base; `sparse` and `other_base_own` train on what they are asked.

WORKDIR/policies/HASH/  a training; rows that only ask otherwise share it
WORKDIR/ROW/seed_N/     its evaluation, and row.json: what the table needs
WORKDIR/table.md        all rows measured there, mean and deviation over seeds;
                        `evidence`: how often the best frames hold a decisive
                        one; differences: same questions and seeds, over clips
WORKDIR/accuracy.svg    ablations at 5 %, or at the first ratio

Given again, it goes on, and so do several side by side: what one works on, the
others leave to the end. What failed is tried once a command.
"""

import functools
import hashlib
import json
import pathlib
import re
import statistics
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from cacovid_jax import base_config, command, errors, files, metrics, schema
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax import train as train_lib
from cacovid_jax.data import answer_log
from cacovid_jax.evals import benchmarks, evaluation, results, tables
from cacovid_jax.evals import statistics as statistics_lib
from cacovid_jax.evals.report import charts
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import checkpoints, hub
from cacovid_jax.policy import loading
from experiments import reporting

_CONFIG = "configs/synthetic.py:size=small"
_CANDIDATES = "evals.candidates.cacovid"
# What a recipe is, of a config.
_RECIPE = ("iterations", "sampling.", "ratio.", "objective.", "policy.",
           "optimizer.", "rollout.", _CANDIDATES)  # fmt: skip
_NAMES = {_CANDIDATES: "importance_ratio"}
_KNOWN, _TRAINED = "row.json", "policy/policy.safetensors"
# Of the table, beside accuracies at ratios: their units in what is written.
_COLUMNS = {"seconds": 1, "all tokens": 100, "validation": 100, "evidence": 100}
PARTS = ("ablations", "transfer")
_weights = functools.cache(checkpoints.identity)
_MANY = command.Flag("", default=(), many=True)
COMMAND = command.Command(
  __doc__,
  {
    "row": _MANY._replace(help="A row, by its name."),
    "rows": command.Flag("Several rows.", default="", choices=("all", *PARTS)),
    "seed": command.Flag("Of training, comma-separated.", default=(42, 43, 44)),
    "plan": command.Flag("Print rows and minutes alone.", default=False),
    "workdir": command.Flag("Of all.", default="workdirs/ablations"),
    "ratios": command.Flag("Shares kept.", default=(0.1, 0.05, 0.02)),
    "also": _MANY._replace(help="A row more: `ours` with KEY=VALUE;KEY=VALUE."),
    "other_base": command.Flag("Another of the same shape.", default=""),
    "seconds_per_video": command.Flag("Of `ours`.", default=0.0, least=0),
    "seconds_per_row": command.Flag("Beside training.", default=0.0, least=0),
  },
  default=_CONFIG,
)


class Row(NamedTuple):
  """A recipe, and what its policies are asked."""

  recipe: str  # "ours" or "paper".
  changes: dict[str, Any] = {}  # Of its config: key -> value.
  asked: dict[str, Any] = {}  # Further ones, after training.
  reference: str = "ours"  # Row that differences are from.
  part: str = PARTS[0]

  @property
  def told(self) -> str:
    """What is changed, as a text."""
    told = [f"{_NAMES.get(k, k)}={v}" for k, v in self.changes.items()]
    told += [f"asked with {k}={v}" for k, v in self.asked.items()]
    return ", ".join(told)


class RowRun(NamedTuple):
  """A row with one seed."""

  name: str
  seed: int
  row: Row
  trained: Any  # Config.
  asked: Any  # Config.
  folder: pathlib.Path  # Of the evaluation.
  policy: pathlib.Path  # Of the training.
  identity: dict[str, Any]  # What its answers depend on.


def main(args):
  """Runs the rows that the command line names, and writes the table."""
  workdir, recipes = pathlib.Path(args.workdir), read_recipes(args)
  rows = make_rows(recipes, args.also, args.other_base)
  for name in args.row:
    errors.check_known("row", name, rows)
  _weights.cache_clear()  # Files change between commands.
  known = read_known(workdir)
  seeds = {seed for found in known.values() for seed in found}
  runs = [
    make_run(workdir, recipes[row.recipe], name, row, seed)
    for name, row in rows.items()
    for seed in dict.fromkeys((*args.seed, *sorted(seeds)))
  ]
  wanted = args.rows or ("" if args.row else "all")
  todo = [
    run for run in runs
    if not is_known(run, known) and run.seed in args.seed
    and (run.name in args.row or wanted in ("all", run.row.part))
  ]  # fmt: skip
  root = pathlib.Path(recipes["ours"].data.root)
  fits = root.name == "dense" or PARTS[1] not in [run.row.part for run in todo]
  told = "transfer is from a folder `dense`; use it, or --rows=ablations"
  errors.check(fits, f"data.root={root}: {told}")
  print_plan(todo, args, recipes["ours"])
  if args.plan or not (args.row or args.rows):
    return
  files.check_writable(workdir / "table.md", "--workdir")
  found = {}
  for wait in (False, True):  # At last for what others work on.
    for run in todo:
      if not wait or isinstance(found[run.folder], errors.TakenError):
        try:
          found[run.folder] = perform(run, wait=wait)
        except errors.UserError as error:
          found[run.folder] = error
  failed = {at: errors.one_line(told) for at, told in found.items() if told}
  print(write_table(workdir, rows, recipes["ours"].evals.ratios, failed))
  told = f"{len(failed)} of {len(todo)} failed, see {workdir / 'table.md'}"
  errors.check(not failed, told)


def read_recipes(args) -> dict[str, Any]:
  """Returns the configs of `ours` and of `paper`, which ask one method."""
  spec, found = args.spec or _CONFIG, {}
  ratios = results.check_ratios(args.ratios)
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
    rows[text] = Row("ours", departures(ours, changed, ""))
  rows["paper"] = Row("paper")
  for key, value in departures(paper, ours).items():
    rows[f"paper+{_NAMES.get(key, key)}"] = Row("paper", {key: value})
  # The paper's own rates, for 7B, in place of a small model's.
  rates = departures(paper, base_config.get_config(), "optimizer.lr_")
  rows["paper_rates_7b"] = Row("paper", rates)
  rows["public_decay"] = Row("ours", {"optimizer.schedule": "cosine_repeated"})
  rows["public_frame_cap"] = Row("ours", {"sampling.frame_cap": "public"})
  options = {"policy.frame_residual": True, "objective.frame_credit": "frame"}
  rows |= {f"ours+{key}": Row("ours", {key: x}) for key, x in options.items()}
  sparse = {"data.root": str(pathlib.Path(ours.data.root).with_name("sparse"))}
  frames = {"data.num_frames": 2 * ours.data.num_frames}
  transfer = {
    "sparse": Row("ours", sparse, {}, "sparse"),
    "dense_to_sparse": Row("ours", {}, sparse, "sparse"),
    "sparse_to_dense": Row("ours", sparse, {"data.root": ours.data.root}),
    "twice_the_frames": Row("ours", {}, frames),
  }
  if other_base:
    other, own = {"model.path": other_base}, "other_base_own"
    transfer[own] = Row("ours", other, {}, own)
    transfer["other_base"] = Row("ours", {}, other, own)
  return rows | {n: r._replace(part=PARTS[1]) for n, r in transfer.items()}


def make_run(workdir, recipe, name, row, seed) -> RowRun:
  """Returns a row with a seed; its configs were checked."""
  trained = config_lib.replace(recipe, {**row.changes, "seed": seed})
  asked = config_lib.replace(trained, row.asked) if row.asked else trained
  made = [
    {
      "config": config_lib.config_hash(config),
      "base_model": _weights(hub.directory(config.model.path))["sha256"],
      "data": benchmarks.read_manifest(config.data.root),
    }
    for config in (trained, asked)
  ]
  evals = config_lib.to_dict(asked.evals)
  identity = {"trained": made[0], "asked": made[1], "evals": evals}
  # Through JSON and back, so that it compares equal to what is read.
  identity = json.loads(json.dumps(identity, sort_keys=True))
  policy, digest = (
    hashlib.sha256(text.encode()).hexdigest()[:16]
    for text in (json.dumps(identity["trained"]), name)
  )
  # Of a row of one's own, whose name is a text of any length.
  short = f"{re.sub(r'[^a-zA-Z0-9.=_]', '_', name)[:40]}-{digest}"
  folder = workdir / (short if "=" in name else name) / f"seed_{seed}"
  policy = workdir / "policies" / policy
  return RowRun(name, seed, row, trained, asked, folder, policy, identity)


def read_known(workdir: pathlib.Path) -> dict[str, dict[int, Any]]:
  """Returns row -> seed -> its row.json, of all rows measured in a workdir."""
  found, mend = {}, "delete that folder"
  for path in sorted(workdir.glob(f"*/seed_*/{_KNOWN}")):
    entry = schema.read(path, mend=mend)
    known = found.setdefault(entry["name"], {})
    known[entry["seed"]] = entry
    asked = [one["questions"] for one in known.values()]
    told = f"{path.parent}: other questions than those of another seed; {mend}"
    errors.check(asked[0] == asked[-1], told)
  return found


def is_known(run: RowRun, known) -> bool:
  """Returns whether a run is among `known`; refuses one of another making."""
  if entry := known.get(run.name, {}).get(run.seed):
    there, later = entry["identity"], base_config.get_config().evals
    there["evals"] = json.loads(config_lib.dumps(later)) | there["evals"]
    differing = config_lib.differences(there, run.identity)
    told = f"{'; '.join(differing[:2])}; use another --workdir"
    errors.check(not differing, f"{run.folder} is of another run: {told}")
  return entry is not None


def print_plan(runs, args, ours) -> None:
  """Prints what is to be run, and minutes as the flags estimate them."""
  lines, total, planned = [], 0.0, set()
  unit = ours.iterations * ours.sampling.num_combinations
  for run in runs:
    made, videos = run.trained, 0
    if not (run.policy / _TRAINED).is_file() and run.policy not in planned:
      planned.add(run.policy)
      videos = made.total_steps * made.videos_per_step
    work = made.iterations * made.sampling.num_combinations / unit
    minutes = args.seconds_per_row + videos * work * args.seconds_per_video
    total += (minutes := minutes / 60)
    lines.append((run.name, run.seed, run.row.told, videos, f"{minutes:.1f}"))
  title = f"{len(lines)} to run, {total:.1f} minutes"
  reporting.table(("row", "seed", "changes", "videos", "minutes"), lines, title)


def perform(run: RowRun, *, wait: bool) -> None:
  """Runs a row, unless it is done by now; `wait` is that of `files.claim`."""
  path = run.folder / _KNOWN
  with files.claim(run.folder / "row", wait=wait):
    if path.is_file():
      return
    print(run.folder, flush=True)
    ledger = answer_log.AnswerLog(None, {})
    key = answer_log.Key(run.name, 1.0, run.seed, "all")
    found = reporting.once(ledger, key, lambda: measure(run, wait=wait))
    told = {"name": run.name, "seed": run.seed, "row": run.row._asdict()}
    files.write_json(path, {"identity": run.identity, **told, **found})


def measure(run: RowRun, *, wait: bool) -> dict[str, Any]:
  """Trains where that is not done, asks, and returns what a table needs.

  Accuracies and scores are fractions; scores are in the order of `questions`,
  and of `clips`, one for each.
  """
  policy = run.policy
  with files.claim(policy / "row", wait=wait):  # Of rows that share it.
    if not (policy / _TRAINED).is_file():
      train_lib.train(run.trained, policy)
  if run.asked.model.path != run.trained.model.path:
    loading.lend(policy / "policy", run.folder / "policy")
    policy = run.folder
  config = {"evals.policies": (f"policy={policy}",)}
  config = config_lib.replace(run.asked, config)
  asked = experiment_lib.Experiment.from_config(config, run.folder)
  out = evaluation.evaluate(asked)
  path = run.folder / "answers.jsonl"
  answers = answer_log.AnswerLog(None, answer_log.header(path))
  answers.look([path])
  answers.confirm_all()
  chosen, evals = out["chosen"].get("cacovid", {}), config.evals
  specs = evals.candidates["cacovid"] if chosen else ("cacovid",)
  listed = {m.label: m.spec for m in map(methods_lib.Method.parse, specs)}
  spec = listed[chosen.get("best", "cacovid")]
  tried = [one["accuracy"] for one in chosen.get("candidates", ())]
  asked = evaluation.load_benchmark(asked)
  return {
    "all tokens": out["vanilla"]["accuracy"],
    "validation": max(tried, default=None),
    "evidence": (out["frame_head"] or {}).get("hit"),
    "seconds": metrics.seconds(run.policy),
    "questions": [one.id for one in asked.questions],
    "clips": [one.video for one in asked.questions],
    "scores": {
      key: [answers[spec, ratio, 0, one.id]["score"] for one in asked.questions]
      for key, ratio in {results.ratio_key(x): x for x in evals.ratios}.items()
      if out["methods"]["cacovid"][key]["status"] == "ok"
    },
  }


def write_table(workdir, rows, ratios, failed) -> str:
  """Writes table.md and accuracy.svg, of all rows; returns the Markdown."""
  found, points = read_known(workdir), {}
  keys = list(map(results.ratio_key, ratios))
  shown = "0.05" if "0.05" in keys else keys[0]
  lines = {part: [] for part in PARTS}
  first = {name: next(iter(known.values())) for name, known in found.items()}
  old = {n: Row(**one["row"]) for n, one in first.items() if n not in rows}
  for name, row in (rows | old).items():
    known = found.get(name, {})
    cells = [name, row.told, str(len(known))]
    for column, scale in _COLUMNS.items():
      values = [one.get(column) for one in known.values()]
      cells.append(_spread([scale * x for x in values if x is not None]))
    others = found.get(row.reference, {}) if name != row.reference else {}
    cells += [_accuracy(known, others, key) for key in keys]
    lines[row.part].append(cells)
    if row.part == PARTS[0] and (scores := _scores(known, shown)):
      points[name] = [100 * statistics.fmean(x) for x in scores.values()]
  head = ["row", "changes", "seeds", *_COLUMNS]
  head += [f"{float(key):.0%}" for key in keys]
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


def _scores(known, key) -> dict[int, list[float]]:
  """Returns the scores of each seed at a ratio."""
  return {n: x["scores"][key] for n, x in known.items() if key in x["scores"]}


def _accuracy(known, others, key) -> str:
  """Returns "81.8 ± 0.9 (-3.2 [-4.1, -2.3])", less that of others.

  The difference is that of the seeds of both; none if questions differ.
  """
  scores, reference = _scores(known, key), _scores(others, key)
  text = _spread([100 * statistics.fmean(one) for one in scores.values()])
  seeds = sorted(scores.keys() & reference.keys())
  asked = [of[seeds[0]]["questions"] for of in (known, others) if seeds]
  if not seeds or asked[0] != asked[1]:
    return text
  sample = statistics_lib.Sample(tuple(known[seeds[0]]["clips"]))
  means = (np.mean([of[n] for n in seeds], 0) for of in (scores, reference))
  mean, low, high = (100 * value for value in sample.difference(*means))
  return f"{text} ({mean:+.1f} [{low:+.1f}, {high:+.1f}])"


if __name__ == "__main__":
  COMMAND.run(main)
