r"""Trains a token policy: `python -m cacovid_jax.train --config F --workdir W`.

Any key of the config is set by `--config.key.subkey=value`. A run that was
stopped continues when the same command is given again. Several hosts: the same
command on each, with --coordinator, --num_processes and --process_id.
"""

from absl import flags

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax.evals import evaluation
from cacovid_jax.parallel import mesh
from cacovid_jax.training import loop, setup

config_lib.define_flag()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run's checkpoints, metrics and policy."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, with several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Processes in all.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Number of this process.")


def main(argv):
  """Runs the training that the flags describe."""
  if len(argv) > 1:
    raise errors.UserError(
      f"unexpected argument {argv[1]!r}; flags start by --"
    )
  config = config_lib.from_flags()
  if not _WORKDIR.value:
    raise errors.UserError("no workdir given: add --workdir=FOLDER")
  mesh.start_processes(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )
  print(config_lib.dumps(config), end="", flush=True)
  checkpoint = setup.load_checkpoint(config)
  validate = None
  if config.validation.every_steps:
    validate = evaluation.validator(
      evaluation.Request(
        data=config.data.root,
        media=config.data.media,
        benchmark=config.evals.benchmark if "evals" in config else "prepared",
        template=config.evals.template if "evals" in config else "",
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        workdir=_WORKDIR.value,
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
    config, _WORKDIR.value, checkpoint=checkpoint, validate=validate
  )
  print(f"policy: {result.policy_path}")


if __name__ == "__main__":
  errors.run(main)
