r"""A grid of config values times seeds: a run each, and one table of all.

python -m experiments.sweep --config=configs/own_videos.py \
    --grid=optimizer.lr_heads=1e-3,3e-3 --grid=sampling.ratio=0.02,0.05 \
    --seeds=0,1,2 --workdir=workdirs/rates
python -m experiments.sweep ... --dry_run   # the runs, and which are done
python -m experiments.sweep ... --slurm     # a job array instead, printed

Every run is trained and, where the config has a section `evals`, evaluated.
Values of a key are separated by commas, or by semicolons if they hold commas.

WORKDIR/key=value,.../seed_N/   a run
WORKDIR/table.md, table.csv     a row per point of the grid: mean and standard
                                deviation, over seeds, of the rewards in the
                                last tenth of training and of the accuracies

Given again, it goes on where it was. A run that fails does not stop the next
ones, and has no part in the table. After a job array, the same command without
--slurm writes the table.
"""

import collections
import hashlib
import itertools
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cacovid_jax import command, errors, files, metrics, terminal
from cacovid_jax import config as config_lib
from cacovid_jax.evals import results, tables

COMMAND = command.Command(
  __doc__,
  {
    "grid": command.Flag(
      "KEY=VALUE,VALUE,...; several of them make a grid.", default=(), many=True
    ),
    "seeds": command.Flag(
      "Of every point.", default=(0, 1, 2), old=["table_seeds"]
    ),
    "workdir": command.Flag(
      "Folder of the sweep.", default="workdirs/sweep", old=["table_workdir"]
    ),
    "dry_run": command.Flag("List the runs, and end.", default=False),
    "slurm": command.Flag(
      "Print the lines of a SLURM job array, a task per run.", default=False
    ),
  },
  config="required",
  # Runs are told apart by what their config says.
  sections=False,
)
_REWARDS = ("reward_token", "reward_token_greedy", "reward_frame",
            "reward_frame_greedy")  # fmt: skip
_DONE = "sweep_done"


class PointRun(NamedTuple):
  """One point of the grid with one seed."""

  point: Mapping[str, str]  # Key -> value, as they were written.
  seed: int
  workdir: pathlib.Path
  digest: str  # Of the resolved config; a finished run of another one goes on.
  commands: Sequence[Sequence[str]]  # That make it, one after the other.

  @property
  def done(self) -> bool:
    path = self.workdir / _DONE
    return path.is_file() and path.read_text("utf-8").strip() == self.digest


def main(args):
  """Runs the sweep that the command line describes."""
  workdir, grid = pathlib.Path(args.workdir), parse_grid(args.grid)
  runs = plan(args.spec, args.overrides, grid, args.seeds, workdir)
  if not (args.dry_run or args.slurm):
    files.check_writable(workdir / "table.md", "--workdir")
  if args.dry_run:
    for number, run in enumerate(runs):
      terminal.tell(f"{number} {'done' if run.done else 'to do'} {run.workdir}")
  elif args.slurm:
    print(job_array(runs))
  else:
    failed = [run for run in runs if not run.done and not perform(run)]
    done = [run for run in runs if run not in failed]
    terminal.tell(write_table(workdir, done))
    if failed:
      raise errors.UserError(
        f"{len(failed)} of {len(runs)} runs failed, first {failed[0].workdir};"
        " see what it told above, and give the command again"
      )


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
  """Returns key -> its values, of "key=value,value" each."""
  grid = {}
  for text in texts:
    key, equals, listed = text.partition("=")
    values = listed.split(";" if ";" in listed else ",")
    values = [value.strip() for value in values]
    if not equals or not key or "" in values:
      raise errors.UserError(f"--grid={text}: write KEY=VALUE,VALUE")
    told = f"--grid names {key} twice; give it all its values"
    errors.check(key not in grid, told)
    errors.check(key != "seed", "--grid=seed: seeds are --seeds=0,1,2")
    grid[key] = values
  return grid


def plan(spec, overrides, grid, seeds, workdir: pathlib.Path) -> list[PointRun]:
  """Returns all runs, seeds next to each other; every config was resolved."""
  runs = []
  points = itertools.product(*grid.values())
  for values, seed in itertools.product(points, seeds):
    point = dict(zip(grid, values, strict=True))
    listed = [f"{key}={value}" for key, value in point.items()]
    name = re.sub(r"[^\w.=+,-]", "_", ",".join(listed)) or "all"
    given = [*overrides, *listed, f"seed={seed}"]
    config = config_lib.load(spec, given)
    folder = workdir / name / f"seed_{seed}"
    changes = [f"--config.{text}" for text in given]
    arguments = [f"--config={spec}", *changes, f"--workdir={folder}"]
    modules = ["train", "evaluate"] if "evals" in config else ["train"]
    commands = [["-m", f"cacovid_jax.{m}", *arguments] for m in modules]
    digest = hashlib.sha256(config_lib.dumps(config).encode()).hexdigest()
    runs.append(PointRun(point, seed, folder, digest, commands))
  for run, other in itertools.combinations(runs, 2):
    if run.digest == other.digest or run.workdir == other.workdir:
      raise errors.UserError(
        f"{run.workdir} and {other.workdir} are one run: --grid or"
        " --seeds lists a value twice"
      )
  return runs


def job_array(runs: Sequence[PointRun]) -> str:
  """Returns the lines of a SLURM script, behind its first one."""
  lines = [f"#SBATCH --array=0-{len(runs) - 1}", "case $SLURM_ARRAY_TASK_ID in"]
  for number, run in enumerate(runs):
    steps = [shlex.join(["python", *command]) for command in run.commands]
    done = shlex.quote(str(run.workdir / _DONE))
    steps.append(f"echo {run.digest} > {done}")
    lines.append(f"{number}) {' && '.join(steps)} ;;")
  return "\n".join([*lines, "esac"])


def perform(run: PointRun) -> bool:
  """Returns whether a run came to its end; goes on with one that was begun.

  Raises:
    SystemExit: a signal ended it, which ends the sweep as well.
  """
  terminal.tell(f"{run.workdir}")
  for arguments in run.commands:
    process = subprocess.Popen([sys.executable, *arguments])
    # It saves what it has, and says so by its exit code.
    before = signal.signal(signal.SIGTERM, lambda *_, p=process: p.terminate())
    try:
      code = process.wait()
    finally:
      signal.signal(signal.SIGTERM, before)
    if code < 0 or code == 128 + signal.SIGTERM:
      sys.exit(128 - code if code < 0 else code)
    if code:
      return False
  files.write(run.workdir / _DONE, run.digest + "\n")
  return True


def read(workdir: pathlib.Path) -> dict[str, float]:
  """Returns a finished run's numbers by name, accuracies in per cent."""
  lines, found = metrics.read(workdir), {}
  last = lines[-max(1, len(lines) // 10) :]
  for name in _REWARDS:
    values = [line[name] for line in last if line.get(name) is not None]
    if values:
      found[name] = statistics.fmean(values)
  path = workdir / "results.json"
  if path.is_file():
    out = results.read(workdir)
    for ratio, cell in out["methods"].get(results.REFERENCE, {}).items():
      if cell["status"] == "ok":
        found[f"accuracy_{ratio}"] = 100 * cell["accuracy"]
  return found


def write_table(workdir: pathlib.Path, runs: Sequence[PointRun]) -> str:
  """Writes table.md and table.csv of finished runs; returns the Markdown."""
  points = collections.defaultdict(list)
  for run in runs:
    points[tuple(run.point.items())].append(read(run.workdir))
  every = [name for found in points.values() for one in found for name in one]
  names, keys = [*dict.fromkeys(every)], [k for k, _ in next(iter(points), ())]
  rows, cells = [], []
  for point, found in points.items():
    row = dict(point) | {"seeds": len(found)}
    shown = [*map(str, row.values())]
    for name in names:
      values = [one[name] for one in found if name in one]
      mean = round(statistics.fmean(values), 6) if values else None
      spread = round(statistics.stdev(values), 6) if values[1:] else None
      row |= {name: mean, f"{name}_sd": spread}
      text = "" if mean is None else f"{mean:.4g}"
      shown.append(text if spread is None else f"{text} ± {spread:.2g}")
    rows.append(row)
    cells.append(shown)
  columns = [*keys, "seeds", *(n + end for n in names for end in ("", "_sd"))]
  head = [*keys, "seeds", *(name.replace("_", " ") for name in names)]
  text = tables.as_markdown(head, cells, range(len(keys), len(head))) + "\n"
  files.write(workdir / "table.md", text)
  files.write(workdir / "table.csv", tables.as_csv(columns, rows))
  return text


if __name__ == "__main__":
  COMMAND.run(main)
