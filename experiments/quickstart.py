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
import time

from cacovid_jax import command, json_lines
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.evals import evaluation, results
from cacovid_jax.synthetic import build
from cacovid_jax.training import loop
from experiments import reporting

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
  """Runs all stages as the command line describes, and tells their minutes."""
  config = args.config
  name = "smoke" if args.smoke else "quickstart"
  workdir = args.workdir or f"workdirs/{name}"
  # Mistakes are told before minutes of work, not after.
  ratios = results.check_ratios(config.evals.ratios)
  config_lib.claim_workdir(workdir, config)
  # Those of the config as it stands.
  planned = {} if args.smoke else PLANNED
  if planned:
    listed = ", ".join(f"{stage} {m:g}" for stage, m in planned.items())
    print(
      f"time budget in minutes, on two idle cores: {listed}; in all"
      f" {sum(planned.values()):g}"
    )
  minutes = {}
  training = experiment_lib.Experiment.from_config(
    config, workdir, split="videos_per_step"
  )
  with _stage("prepare", minutes):
    build.prepare(config)
  with _stage("load", minutes):
    processor = training.loaded.model.processor
    grid = processor.fixed_grid(config.data.num_frames)
    for ratio in ratios:
      base.budget(grid, ratio)
  with _stage("train", minutes):
    loop.train(training)
  policy = config_lib.replace(
    config, {"evals.policies": (f"policy={workdir}",)}
  )
  asking = experiment_lib.Experiment.from_config(policy, workdir)
  with _stage("evaluate", minutes):
    out = evaluation.evaluate(asking)
  evaluation.show(out)
  columns = (planned, minutes)
  rows = [
    [stage, *(f"{times[stage]:.1f}" if times else "" for times in columns)]
    for stage in minutes
  ]
  total = [f"{sum(times.values()):.1f}" if times else "" for times in columns]
  head = ("stage", "planned", "measured")
  reporting.table(head, [*rows, ["in all", *total]], "time in minutes")
  # A line for every start: a run that goes on takes less time.
  json_lines.append(asking.workdir / "stages.jsonl", [{"minutes": minutes}])
  reporting.files(asking.workdir, _FILES)
  print(f"\nopen {asking.workdir / 'report.html'} in a browser")


@contextlib.contextmanager
def _stage(name, minutes):
  """Prints a stage's start and end, and adds what it takes to `minutes`."""
  print(name, flush=True)
  start = time.monotonic()
  yield
  minutes[name] = round((time.monotonic() - start) / 60, 2)
  print(f"{name}: done in {minutes[name]:.1f} minutes", flush=True)


if __name__ == "__main__":
  COMMAND.run(main)
