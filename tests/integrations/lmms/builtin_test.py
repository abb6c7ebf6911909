"""Tasks that come with lmms-eval, without a network, and our own beside them.

lmms-eval takes a folder of the data set's name for the data set, and looks for
clips below `HF_HOME`: both are made of the fixtures of the seven benchmarks.
"""

import dataclasses
import pathlib
import shutil

import pytest

from cacovid_jax.data import frames
from cacovid_jax.evals import benchmarks, clips, ledger, runner
from cacovid_jax.integrations.lmms_eval import export, functions
from tests.data import benchmark_files
from tests.evals import tiny
from tests.integrations.lmms import conftest

# Benchmark -> task, folder of its data set, the configuration of its README,
# and where its clips go below HF_HOME.
_PLACES = {
  "videomme": ("videomme", "lmms-eval/Video-MME", "videomme", "videomme"),
  "mlvu_dev": ("mlvu_dev", "sy1998/MLVU_dev", "", "mlvu"),
  "mlvu_test": ("mlvu_test_paper", "sy1998/MLVU_Test", "", "mlvu_test"),
  "longvideobench": (
    "longvideobench_val_v",
    "longvideobench/LongVideoBench",
    "",
    "datasets/longvideobench",
  ),
  "mvbench": (
    "mvbench_object_interaction",
    "OpenGVLab/MVBench",
    "object_interaction",
    "mvbench_video",
  ),
  "egoschema": (
    "egoschema_subset",
    "lmms-eval/egoschema",
    "Subset",
    "egoschema",
  ),
  "nextqa": ("nextqa_mc_test", "lmms-eval/NExTQA", "MC", "nextqa"),
}
_README = """\
---
configs:
- config_name: {name}
  data_files:
  - split: {split}
    path: {path}
---
"""
# Short, for a model that never ends an answer.
_LENGTH = 6


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
  return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
  """Returns (folder to run in, {name: questions}, folder of the fixtures)."""
  written = tmp_path_factory.mktemp("fixtures")
  folder = tmp_path_factory.mktemp("hub")
  questions = {}
  for name, (_, data_set, config, media) in _PLACES.items():
    root = written / name
    fixture = benchmark_files.write(name, root)
    found = benchmarks.load(root, benchmark=name).questions
    files = fixture.files
    if name == "mvbench":
      found = [question for question in found if question.category == config]
      files = [path for path in files if path.stem == config]
    questions[name] = found
    for path in files:
      place = folder / data_set / path.relative_to(root)
      place.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(path, place)
      if config:
        text = _README.format(
          name=config,
          split="train" if name == "mvbench" else "test",
          path=path.relative_to(root),
        )
        (folder / data_set / "README.md").write_text(text)
    for clip in fixture.clips:
      place = pathlib.Path(conftest.HOME) / media / clip
      place.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(root / clip, place)
  return folder, questions, written


@pytest.fixture(scope="module")
def expected(fixtures, checkpoint_dir):
  """Returns {name: answers} of our evaluator, asked of all at once."""
  _, questions, written = fixtures
  asked = {
    name: [
      dataclasses.replace(
        question, id=f"{name}/{question.id}", video=f"{name}/{question.video}"
      )
      for question in found
    ]
    for name, found in questions.items()
  }
  rows = [question for found in asked.values() for question in found]
  checkpoint = tiny.load_checkpoint(checkpoint_dir)
  cell = runner.Cell(runner.Method.parse("divprune"), 0.25, 0)
  with clips.ClipSource(
    str(written),
    checkpoint.model,
    checkpoint.params,
    frames.Preprocessing.from_directory(checkpoint_dir),
    num_frames=tiny.FRAMES,
  ) as source:
    settings = runner.Settings(
      num_frames=tiny.FRAMES, batch_size=8, max_new_tokens=_LENGTH
    )
    evaluator = runner.Evaluator(checkpoint, source, rows, settings)
    answers = ledger.Ledger(None, {})
    evaluator.run(rows, [cell], answers)
  return {
    name: [answers[cell.key(question.id)]["text"] for question in found]
    for name, found in asked.items()
  }


@pytest.mark.parametrize("chat", [False, True], ids=["simple", "chat"])
def test_the_seven_benchmarks_are_answered_as_by_our_evaluator(
  chat, fixtures, expected, checkpoint_dir, monkeypatch
):
  folder, questions, _ = fixtures
  monkeypatch.chdir(folder)
  tasks = {name: place[0] for name, place in _PLACES.items()}
  found = conftest.run(
    list(tasks.values()),
    export.TASKS,
    defaults=True,
    chat=chat,
    pretrained=checkpoint_dir,
    max_frames_num=tiny.FRAMES,
    method="divprune",
    ratio=0.25,
    batch_size="8",
    gen_kwargs=f"max_new_tokens={_LENGTH}",
  )
  for name, task in tasks.items():
    said = conftest.answers(found, task)
    assert [said[row] for row in range(len(said))] == expected[name], task
    if name in ("longvideobench", "egoschema", "nextqa"):
      continue  # Answers without an option get one at random there.
    rule, metric = "lmms_0_7_3", benchmarks.task(name).metric
    if name == "mlvu_test":
      rule = metric = "paper"
    scored = [
      functions.process_results(functions.row(question, "", name), [text])[rule]
      for question, text in zip(questions[name], expected[name], strict=True)
    ]
    score = found["results"][task][f"{metric},none"]
    assert score == pytest.approx(functions.aggregate(scored))
  # Of a model without training, but not all the same.
  assert len({text for texts in expected.values() for text in texts}) > 7
