"""A second environment, in which lmms-eval is installed: `make lmms-test`.

Clips and questions are those of the embedded benchmark, in its smallest form;
the model is the one that comes with the package.
"""

import json
import os
import pathlib
import tempfile

# Read when lmms-eval's modules are imported: nothing is fetched, and nothing
# of the user's own cache is looked at.
HOME = tempfile.mkdtemp(prefix="lmms_home_")
os.environ |= {
  "HF_HOME": HOME,
  "HF_HUB_OFFLINE": "1",
  "HF_DATASETS_OFFLINE": "1",
  "NLTK_DATA": HOME,
}

import pytest  # noqa: E402
from lmms_eval import evaluator, tasks  # noqa: E402

from cacovid_jax import experiment as experiment_lib  # noqa: E402
from cacovid_jax.evals import evaluation  # noqa: E402
from cacovid_jax.integrations.lmms_eval import export, model  # noqa: E402
from cacovid_jax.synthetic import build  # noqa: E402
from tests.evals import tiny  # noqa: E402

BATCH_SIZE = 4


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """Returns a prepared directory: 2 clips, their questions."""
  config = build.BuildConfig(clips=(0, 0, 2, 0), seed=5)
  return build.build(
    config, tmp_path_factory.mktemp("data") / "dense", num_workers=1
  )


@pytest.fixture(scope="session")
def task_dir(data_dir, tmp_path_factory):
  """Returns the folder of the same as a task, `cacovid_prepared`."""
  path = tmp_path_factory.mktemp("tasks")
  export.write(data_dir, path, benchmark="prepared", split="test")
  return path


@pytest.fixture(scope="session")
def evaluated(data_dir, tmp_path_factory):
  """Returns (results.json, {(spec, question id): answer}) of our evaluator."""
  workdir = tmp_path_factory.mktemp("evaluated")
  out = evaluation.evaluate(
    tiny.experiment(
      workdir,
      data=str(data_dir),
      checkpoint=os.fspath(experiment_lib.SHIPPED_MODEL),
      policies={"policy": os.fspath(experiment_lib.SHIPPED_POLICY)},
      methods=("cacovid", "divprune", "random"),
      ratios=(0.1,),
      num_frames=16,
      batch_size=BATCH_SIZE,
    )
  )
  return out, read_answers(workdir)


def read_answers(workdir):
  """Returns {(spec, question id): text} of an evaluation's ledger."""
  lines = (pathlib.Path(workdir) / "answers.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return {
    (record["method"], record["question"]): record["text"]
    for record in records
    if "question" in record
  }


def run(
  task: str | list[str],
  include_path=None,
  *,
  defaults=False,
  chat=False,
  gen_kwargs=None,
  **arguments,
):
  """Returns lmms-eval's own results of tasks, asked of our model.

  Args:
    task: name or names.
    include_path: folder of YAML files.
    defaults: whether tasks of lmms-eval itself are among them.
    chat: in which form.
    gen_kwargs: in place of the tasks' own.
    **arguments: of the model.
  """
  arguments = {"batch_size": str(BATCH_SIZE), **arguments}
  kind = model.Chat if chat else model.Simple
  return evaluator.simple_evaluate(
    model=kind(**arguments),
    tasks=[task] if isinstance(task, str) else task,
    task_manager=tasks.TaskManager(
      "WARNING",
      include_path=None if include_path is None else str(include_path),
      include_defaults=defaults,
    ),
    gen_kwargs=gen_kwargs,
    log_samples=True,
    process_docs_parallel=1,
    bootstrap_iters=0,
  )


def answers(results, task: str) -> dict[int, str]:
  """Returns row -> what was answered, of results with samples."""
  return {
    sample["doc_id"]: sample["filtered_resps"][0]
    for sample in results["samples"][task]
  }
