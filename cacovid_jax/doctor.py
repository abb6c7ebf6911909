r"""Looks at a set-up before it runs, and says what would stop it.

python -m cacovid_jax.doctor --config configs/llava_onevision.py:size=7b \
    --workdir workdirs/llava_onevision_7b
python -m cacovid_jax.doctor --config configs/llava_onevision.py:size=7b \
    --run evaluate --benchmark videomme --data DIR --workdir DIR

Weights, policy, data, clips, mesh, memory, disk, programs and hours, a line
each: ok, warning or failed, what was found, the remedy. Reads headers, rows and
a few clips; of weights, tied tables, and all for the sha256 that a policy is
compared by. Writes nothing, but on a store an object that it deletes. The exit
code is 1 if something failed.
"""

import rich.table

from cacovid_jax import command, evaluate, terminal
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.preflight import case as case_lib
from cacovid_jax.preflight import checks
from cacovid_jax.remote import mirror as remote

TRAIN, EVALUATE = "train", "evaluate"
_NUMBER = command.Flag("", default=0.0, least=0)
COMMAND = command.Command(
  __doc__,
  {
    "workdir": command.Flag("Folder that the run would write.", store=True),
    "run": command.Flag(
      "What the config is for: train or evaluate.",
      default=TRAIN,
      choices=(TRAIN, EVALUATE),
    ),
    "clips": command.Flag("Clips that are decoded.", default=4, least=0),
    "seconds_per_video": _NUMBER._replace(
      help="For the hours; 0 takes what a training measured in the workdir, or"
      " of an evaluation what its operations take on this device."
    ),
    "device_gib": _NUMBER._replace(
      help="Memory of a device; 0 is that of this machine's."
    ),
    **{
      name: evaluate.COMMAND.flags[name]
      for name in ("model", "checkpoint", "policy", "benchmark", "data")
    },
  },
  config="required",
)


def show(found: list[checks.Finding]) -> None:
  """Prints the findings, a line each."""
  table = rich.table.Table()
  for head in checks.Finding._fields:
    table.add_column(head, overflow="fold")
  for one in found:
    table.add_row(*one)
  terminal.Console().print(table)


def main(args) -> int:
  """Examines what the command line describes; returns the exit code."""
  COMMAND.require(args, "workdir")
  with remote.mirrored(args.workdir) as args.workdir:
    if args.run == TRAIN:
      experiment = experiment_lib.Experiment.from_config(
        args.config, args.workdir, split="videos_per_step"
      )
    else:
      args.shard = "0/1"
      experiment = evaluate.experiment_of(args)
    size = int(args.device_gib * 2**30)
    case = case_lib.Case(experiment, args.clips, args.seconds_per_video, size)
    found = checks.examine(case)
  show(found)
  failed = [one.check for one in found if one.verdict == checks.FAILED]
  told = f"failed: {', '.join(failed)}" if failed else "nothing failed"
  terminal.tell(told)
  return 1 if failed else 0


if __name__ == "__main__":
  COMMAND.run(main)
