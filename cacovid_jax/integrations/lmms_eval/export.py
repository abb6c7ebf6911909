r"""Writes a benchmark on disk as a task of lmms-eval, or says where ours are.

python -m cacovid_jax.integrations.lmms_eval.export \
    --benchmark=mlvu_test --data=DATA --out=TASKS
python -m lmms_eval --model cacovid_jax --tasks cacovid_mlvu_test \
    --include_path TASKS ...

Without --benchmark, prints the folder of the tasks that come with the package,
for `--include_path "$(python -m cacovid_jax.integrations.lmms_eval.export)"`.
"""

import json
import os
import pathlib

from cacovid_jax import command, files, terminal
from cacovid_jax.evals import benchmarks
from cacovid_jax.integrations.lmms_eval import functions

TASKS = pathlib.Path(__file__).parent / "tasks"
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
_FUNCTIONS = functions.__name__


def main(args):
  """Writes the task that the command line describes."""
  data, evals = args.config.data, args.config.evals
  if not evals.benchmark:
    print(TASKS)
    return
  COMMAND.require(args, "data", "out")
  asked = {"benchmark": evals.benchmark, "split": evals.split}
  path = write(data.root, args.out, media=data.media, **asked)
  terminal.tell(f"{path} (task {path.stem})")


def write(data, out, *, benchmark, split="", media="") -> pathlib.Path:
  """Writes OUT/cacovid_NAME.yaml and rows of a benchmark; returns its path."""
  out, name = pathlib.Path(out).absolute(), f"cacovid_{benchmark}"
  rows = out / f"{name}.jsonl"
  found = benchmarks.load(data, split, benchmark=benchmark, media=media)
  files.check_writable(rows, "--out")
  root = os.path.abspath(found.root)
  lines = []
  for question in found.questions:
    video = os.path.join(root, question.video)
    lines.append(json.dumps(functions.row(question, video, benchmark)) + "\n")
  files.write(rows, "".join(lines))
  path = out / f"{name}.yaml"
  files.write(path, _yaml(name, rows, found.task.max_new_tokens))
  return path


def _yaml(name: str, rows: pathlib.Path, max_new_tokens: int) -> str:
  metrics = "".join(
    f"""\
  - metric: {metric}
    aggregation: !function {_FUNCTIONS}.aggregate
    higher_is_better: true
"""
    for metric in functions.RULES
  )
  # A JSON text is a YAML scalar, whatever the path holds.
  return f"""\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(os.fspath(rows))}
test_split: test
output_type: generate_until
cluster_key: video
doc_to_visual: !function {_FUNCTIONS}.doc_to_visual
doc_to_text: !function {_FUNCTIONS}.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
process_results: !function {_FUNCTIONS}.process_results
metric_list:
{metrics}metadata:
  - version: 1.0
"""


if __name__ == "__main__":
  COMMAND.run(main)
