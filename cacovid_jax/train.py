r"""Trains a token policy: `python -m cacovid_jax.train --config F --workdir W`.

Any key of the config is set by `--config.key.subkey=value`. A run that was
stopped continues when the same command is given again. Several hosts: the same
command on each, with --coordinator, --num_processes and --process_id.
"""

from cacovid_jax import command, errors
from cacovid_jax import config as config_lib
from cacovid_jax.evals import evaluation
from cacovid_jax.parallel import mesh
from cacovid_jax.training import loop, setup

COMMAND = command.Command(
  __doc__,
  {
    "workdir": command.Flag(
      "Folder of the run's checkpoints, metrics and policy."
    ),
    "coordinator": command.Flag(
      "host:port of process 0, with several processes."
    ),
    "num_processes": command.Flag("Processes in all.", default=1),
    "process_id": command.Flag("Number of this process.", default=0),
  },
  config="required",
)


def main(args):
  """Runs the training that the command line describes."""
  config = args.config
  if not args.workdir:
    raise errors.UserError("no workdir given: add --workdir=FOLDER")
  mesh.start_processes(args.coordinator, args.num_processes, args.process_id)
  print(config_lib.dumps(config), end="", flush=True)
  checkpoint = setup.load_checkpoint(config)
  validate = None
  if config.validation.every_steps:
    validate = evaluation.validator(
      evaluation.Request(
        data=config.data.root,
        media=config.data.media,
        benchmark=config.evals.benchmark,
        template=config.evals.template,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        workdir=args.workdir,
        checkpoint=config.model.path,
        num_frames=config.data.num_frames,
        dtype=config.model.dtype,
        cache=config.data.feature_cache,
        batch_size=config.validation.batch_size,
        max_new_tokens=config.validation.max_new_tokens,
        select_questions=config.validation.num_questions,
      ),
      checkpoint,
      method=config.validation.method,
      ratio=config.validation.ratio,
    )
  result = loop.train(
    config, args.workdir, checkpoint=checkpoint, validate=validate
  )
  print(f"policy: {result.policy_path}")


if __name__ == "__main__":
  COMMAND.run(main)
