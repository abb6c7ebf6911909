r"""From nothing to a table: clips, a trained policy, its evaluation, a report.

make quickstart, or python -m experiments.quickstart [--smoke]

  prepare   draws and encodes the clips, writes their questions
  load      reads the shipped base model
  train     trains the policy on the base model's answers
  evaluate  asks the test questions with every method, writes the report

What was done stays done: given again, the command goes on where it stopped.
Other settings: --config.total_steps=600 and so on, with another --workdir.
"""

import contextlib
import json
import time

import rich.console
import rich.table

from cacovid_jax import command
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.evals import evaluation, results
from cacovid_jax.synthetic import build
from cacovid_jax.training import loop

# The budget in minutes for two idle cores, compilation included: from the
# processor time that each stage of the config takes. Change both together.
PLANNED = {"prepare": 0.8, "load": 0.1, "train": 4.5, "evaluate": 4.5}
_FILES = ("results.json", "report.html", "metrics.jsonl", "config.json")

COMMAND = command.Command(
  __doc__,
  {
    "smoke": command.Flag(
      "The shortest form, to see that everything runs.", default=False
    ),
    "workdir": command.Flag("Folder of the run; below workdirs/ by default."),
    "ratios": command.Flag("Retention ratios of the table.", "evals.ratios"),
  },
  default="configs/synthetic.py",
)


def main(args):
  """Runs the quickstart that the command line describes."""
  workdir = f"workdirs/{'smoke' if args.smoke else 'quickstart'}"
  run(args.config, args.workdir or workdir, planned=not args.smoke)


def run(config, workdir, *, planned=False):
  """Runs all stages and returns results.json as a dict.

  Args:
    config: see configs/synthetic.py:size=quickstart.
    workdir: one of another config is refused.
    planned: whether to show the planned minutes, which are those of the
      config as it stands.
  """
  # Mistakes are told before minutes of work, not after.
  ratios = results.check_ratios(map(base.check_ratio, config.evals.ratios))
  config_lib.claim_workdir(workdir, config)
  stages = Stages(PLANNED if planned else {})
  training = experiment_lib.Experiment.from_config(
    config, workdir, split="videos_per_step"
  )
  with stages("prepare"):
    build.prepare(config)
  with stages("load"):
    processor = training.loaded.model.processor
    grid = processor.fixed_grid(config.data.num_frames)
    for ratio in ratios:
      base.budget(grid, ratio)
  with stages("train"):
    loop.train(training)
  policy = config_lib.replace(
    config, {"evals.policies": (f"policy={workdir}",)}
  )
  asking = experiment_lib.Experiment.from_config(policy, workdir)
  with stages("evaluate"):
    out = evaluation.evaluate(asking)
  evaluation.show(out)
  stages.show()
  # A line for every start: a run that goes on takes less time.
  with open(asking.workdir / "stages.jsonl", "a", encoding="utf-8") as f:
    f.write(json.dumps({"minutes": stages.minutes}) + "\n")
  for name in _FILES:
    print(asking.workdir / name)
  print(f"\nopen {asking.workdir / 'report.html'} in a browser")
  return out


class Stages:
  """Minutes of each stage: planned ahead, measured as they go."""

  def __init__(self, planned: dict[str, float]):
    """Tells what is planned by stage; nothing if that is empty."""
    self.minutes, self._planned = {}, planned
    self._console = rich.console.Console(highlight=False)
    if planned:
      listed = ", ".join(f"{n} {m:g}" for n, m in planned.items())
      self._console.print(
        f"time budget in minutes, on two idle cores: {listed}; in all"
        f" {sum(planned.values()):g}"
      )

  @contextlib.contextmanager
  def __call__(self, name: str):
    self._console.print(f"[bold]{name}[/bold]")
    start = time.monotonic()
    yield
    self.minutes[name] = round((time.monotonic() - start) / 60, 2)
    self._console.print(f"{name}: done in {self.minutes[name]:.1f} minutes")

  def show(self) -> None:
    """Prints the minutes of all stages."""
    table = rich.table.Table(title="time in minutes")
    table.add_column("stage")
    table.add_column("planned", justify="right")
    table.add_column("measured", justify="right")
    rows = [(n, self._planned.get(n), m) for n, m in self.minutes.items()]
    planned = sum(self._planned.values()) or None
    rows.append(("in all", planned, sum(self.minutes.values())))
    for name, *minutes in rows:
      shown = ("" if value is None else f"{value:.1f}" for value in minutes)
      table.add_row(name, *shown)
    self._console.print(table)


if __name__ == "__main__":
  COMMAND.run(main)
