r"""Writes a benchmark on disk as a task of lmms-eval, or says where ours are.

python -m cacovid_jax.integrations.lmms_eval.export \
    --benchmark=mlvu_test --data=DATA --out=TASKS
python -m lmms_eval --model cacovid_jax --tasks cacovid_mlvu_test \
    --include_path TASKS ...

Without --benchmark, prints the folder of the tasks that come with the package,
for `--include_path "$(python -m cacovid_jax.integrations.lmms_eval.export)"`.
"""

from absl import flags

from cacovid_jax import errors
from cacovid_jax.integrations.lmms_eval import local_tasks

for _name, _help in {
  "benchmark": "What --data holds; see cacovid_jax.evals.benchmarks.names().",
  "data": "Folder of a benchmark, as `cacovid_jax.evaluate` takes it.",
  "media": "Folder of the clips, below --data or absolute; empty is --data.",
  "split": "Split; empty is the benchmark's own.",
  "out": "Folder for the task; made if it is missing.",
}.items():
  flags.DEFINE_string(_name, "", _help)


def main(argv):
  """Runs the command."""
  if len(argv) > 1:
    raise errors.UserError(
      f"unexpected argument {argv[1]!r}; flags start by --"
    )
  values = flags.FLAGS
  if not values.benchmark:
    print(local_tasks.TASKS)
    return
  for name in ("data", "out"):
    if not values[name].value:
      raise errors.UserError(f"nothing says which {name}: add --{name}=FOLDER")
  path = local_tasks.write(
    values.data,
    values.out,
    benchmark=values.benchmark,
    split=values.split,
    media=values.media,
  )
  print(f"{path} (task {path.stem})")


if __name__ == "__main__":
  errors.run(main)
