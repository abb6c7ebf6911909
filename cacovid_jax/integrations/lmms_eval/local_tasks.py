"""A benchmark on disk as a task of lmms-eval: a YAML file and its rows."""

import json
import os
import pathlib

from cacovid_jax.evals import benchmarks
from cacovid_jax.integrations.lmms_eval import functions

TASKS = pathlib.Path(__file__).parent / "tasks"
_FUNCTIONS = functions.__name__


def write(
  data: str | os.PathLike,
  out: str | os.PathLike,
  *,
  benchmark: str,
  split: str = "",
  media: str = "",
) -> pathlib.Path:
  """Writes OUT/cacovid_NAME.yaml and its rows; returns the YAML's path.

  Args:
    data: folder of the benchmark.
    out: where the files go.
    benchmark: one of `benchmarks.names()`.
    split: of the benchmark; "" is its own.
    media: folder of the clips, below `data` or absolute.
  """
  found = benchmarks.load(data, split, benchmark=benchmark, media=media)
  out = pathlib.Path(out).absolute()
  out.mkdir(parents=True, exist_ok=True)
  name = f"cacovid_{benchmark}"
  rows = out / f"{name}.jsonl"
  root = os.path.abspath(found.root)
  with open(rows, "w", encoding="utf-8") as file:
    for question in found.questions:
      video = os.path.join(root, question.video)
      file.write(json.dumps(functions.row(question, video, benchmark)) + "\n")
  path = out / f"{name}.yaml"
  path.write_text(_yaml(name, rows, found.task.max_new_tokens), "utf-8")
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
