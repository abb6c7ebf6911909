r"""Trains a token policy: `python -m cacovid_jax.train --config F --workdir W`.

Any key of the config is set by `--config.key.subkey=value`. A run that was
stopped continues when the same command is given again. Several hosts: the same
command on each, with --coordinator, --num_processes and --process_id; when one
is lost, the others end with exit code 75.
"""

from cacovid_jax import command, terminal
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.evals import evaluation
from cacovid_jax.parallel import peers
from cacovid_jax.remote import mirror as remote
from cacovid_jax.training import loop

COMMAND = command.Command(
  __doc__,
  {
    "workdir": command.Flag(
      "Folder of the run's checkpoints, metrics and policy, or gs://..., one on"
      " a store.",
      store=True,
    ),
    "coordinator": command.Flag(
      "host:port of process 0, with several processes."
    ),
    "num_processes": command.Flag("Processes in all.", default=1),
    "process_id": command.Flag("Number of this process.", default=0),
    "start_timeout": command.Flag(
      "Seconds that processes wait for each other at the start.",
      default=300,
      least=1,
    ),
    "peer_timeout": command.Flag(
      "Seconds of silence after which a machine is lost; processes that end are"
      " lost at once.",
      default=100,
      least=1,
    ),
  },
  config="required",
)


def main(args):
  """Runs the training that the command line describes."""
  config = args.config
  COMMAND.require(args, "workdir")
  with peers.joined(
    args.coordinator,
    args.num_processes,
    args.process_id,
    start_timeout=args.start_timeout,
    peer_timeout=args.peer_timeout,
    workdir=args.workdir,
  ):
    print(config_lib.dumps(config), end="", flush=True)
    with remote.mirrored(args.workdir) as workdir:
      terminal.tell(f"policy: {train(config, workdir).policy_path}")


def train(config, workdir) -> loop.Result:
  """Trains what a config describes, validated where it says so."""
  experiment = experiment_lib.Experiment.from_config(
    config, workdir, split="videos_per_step"
  )
  validate = None
  if config.validation.every_steps:
    validate = evaluation.validator(experiment)
  return loop.train(experiment, validate=validate)


if __name__ == "__main__":
  COMMAND.run(main)
