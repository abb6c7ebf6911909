r"""Writes a benchmark on disk as a task of lmms-eval, or says where ours are.

python -m cacovid_jax.integrations.lmms_eval.export \
    --benchmark=mlvu_test --data=DATA --out=TASKS
python -m lmms_eval --model cacovid_jax --tasks cacovid_mlvu_test \
    --include_path TASKS ...

Without --benchmark, prints the folder of the tasks that come with the package,
for `--include_path "$(python -m cacovid_jax.integrations.lmms_eval.export)"`.
"""

from cacovid_jax import command, errors
from cacovid_jax.integrations.lmms_eval import local_tasks

COMMAND = command.Command(
  __doc__,
  {
    "benchmark": command.Flag(
      "What --data holds; see cacovid_jax.evals.benchmarks.names().",
      "evals.benchmark",
    ),
    "data": command.Flag(
      "Folder of a benchmark, as `cacovid_jax.evaluate` takes it.", "data.root"
    ),
    "media": command.Flag(
      "Folder of the clips, below --data or absolute; empty is --data.",
      "data.media",
    ),
    "split": command.Flag("Empty is the benchmark's own.", "evals.split"),
    "out": command.Flag("Folder for the task; made if it is missing."),
  },
  defaults={"evals.benchmark": ""},
)


def main(args):
  """Writes the task that the command line describes."""
  data, evals = args.config.data, args.config.evals
  if not evals.benchmark:
    print(local_tasks.TASKS)
    return
  for name, folder in (("data", data.root), ("out", args.out)):
    if not folder:
      raise errors.UserError(f"nothing says which {name}: add --{name}=FOLDER")
  path = local_tasks.write(
    data.root,
    args.out,
    benchmark=evals.benchmark,
    split=evals.split,
    media=data.media,
  )
  print(f"{path} (task {path.stem})")


if __name__ == "__main__":
  COMMAND.run(main)
