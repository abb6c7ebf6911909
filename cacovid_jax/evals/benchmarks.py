"""Which questions a benchmark asks, and where its clips lie."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cacovid_jax import errors, schema
from cacovid_jax.data import evidence, letters, readers, wording
from cacovid_jax.data import question as question_lib
from cacovid_jax.data.readers import longvideobench as longvideobench_files
from cacovid_jax.data.readers import mlvu as mlvu_files
from cacovid_jax.data.readers import mvbench as mvbench_files
from cacovid_jax.data.readers import own as own_files
from cacovid_jax.evals import scoring, statistics

PREPARED = "prepared"

_AGAIN = "prepare the data again"
_MLVU_PARQUET = ("mlvu/test-*.parquet", "test-*.parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """How a benchmark is read, prompted and counted."""

  name: str
  # Split -> the layouts that are read, best first; each is a pattern of
  # files below the data directory. The first split is the default.
  splits: Mapping[str, Sequence[str]]
  # (paths, media root, on_bad_row=..., report=...) -> questions.
  read: Callable[..., list[question_lib.Question]]
  # (question, text, rule=...) -> `scoring.Scored`.
  score: Callable[..., scoring.Scored]
  max_new_tokens: int = 16  # Longest answer.
  rule: str = "paper"  # Where config.evals.rule is empty.
  metric: str = "accuracy"  # The name that lmms-eval gives the number.
  # 100 where lmms-eval prints per cent, 1 for a fraction. Our results are
  # fractions throughout.
  scale: int = 1
  # Categories whose unweighted mean is the number; () takes the mean over
  # questions.
  macro: tuple[str, ...] = ()
  # Whether categories without questions are left out of that mean, rather
  # than counted as 0.
  macro_of_present: bool = False
  # Values of `Question.duration`, shortest first.
  duration_groups: tuple[str, ...] = ()
  # Whether all splits lie in one file; `read` then takes `split`.
  one_file: bool = False

  @property
  def default_split(self) -> str:
    return next(iter(self.splits))

  def can_choose(self, split: str) -> bool:
    """True if there is a validation split besides the one that is asked."""
    asked = split or self.default_split
    return self.name == PREPARED or (
      "validation" in self.splits and asked != "validation"
    )

  def sample(
    self, questions: Sequence[question_lib.Question]
  ) -> statistics.Sample:
    """Returns what the number of these questions is a mean over."""
    clips = [question.video for question in questions]
    if not self.macro:
      return statistics.Sample(clips)
    found = [str(question.category) for question in questions]
    names = self.macro
    if self.macro_of_present:
      names = tuple(name for name in names if name in found)
    return statistics.Sample(clips, found, names)

  def files(self, directory: pathlib.Path, split: str) -> list[str]:
    """Returns the files of a split, of the first layout that is there."""
    errors.check_known(f"{self.name} split", split, self.splits)
    for pattern in self.splits[split]:
      found = sorted(directory.glob(pattern))
      if found:
        return [str(path) for path in found]
    raise errors.UserError(
      f"{directory} holds none of {', '.join(self.splits[split])}; give the"
      f" folder of {self.name} as it was released, or another --benchmark"
    )


_MLVU = dict(metric="mlvu_percetion_score", scale=100)
_VIDEOMME = dict(duration_groups=("short", "medium", "long"))
_TASKS = [
  Task(name=PREPARED, read=readers.read_videomme, score=scoring.prepared,
       splits={name: (f"{name}.parquet",) for name in ("test", "validation")},
       **_VIDEOMME),
  Task(name="videomme", score=scoring.videomme,
       read=functools.partial(readers.read_videomme, released=True),
       splits={"test": ("videomme/test-*.parquet", "test-*.parquet")},
       metric="videomme_perception_score", scale=100, **_VIDEOMME),
  Task(name="mlvu_dev", read=readers.read_mlvu, score=scoring.mlvu_dev,
       splits={"dev": (*_MLVU_PARQUET, "json/[0-9]_*.json")},
       macro=mlvu_files.DEV_TYPES, **_MLVU),
  Task(name="mlvu_test", score=scoring.mlvu_test,
       read=functools.partial(
         readers.read_mlvu, types=mlvu_files.TEST_TYPES, most_options=6
       ),
       splits={"test": (*_MLVU_PARQUET, "json/*.json", "test*.json")},
       macro=mlvu_files.TEST_TYPES, **_MLVU),
  Task(name="longvideobench", read=readers.read_longvideobench,
       score=scoring.longvideobench,
       splits={"validation": ("validation-*.parquet", "lvb_val.json")},
       max_new_tokens=32, metric="lvb_acc",
       duration_groups=longvideobench_files.DURATION_GROUPS),
  Task(name="mvbench", read=readers.read_mvbench, score=scoring.mvbench,
       splits={"test": ("json/*.json",)}, metric="mvbench_accuracy", scale=100,
       macro=mvbench_files.TASKS, macro_of_present=True),
  Task(name="egoschema", read=readers.read_egoschema, score=scoring.egoschema,
       splits={"subset": ("Subset/test-*.parquet",)}, metric="score"),
  # NExT-QA's task sets no longest answer; 1024 is what the reference model
  # falls back to.
  Task(name="nextqa", read=readers.read_nextqa, score=scoring.nextqa,
       splits={"test": ("MC/test-*.parquet",)}, max_new_tokens=1024,
       metric="exact_match"),
  # The longest answer is one in words; a letter ends by itself.
  Task(name="own", read=readers.read_own, score=scoring.prepared,
       splits=dict.fromkeys(("test", "validation", "train"), own_files.FILES),
       max_new_tokens=64, one_file=True, rule=letters.OWN),
]  # fmt: skip
_BY_NAME = {task.name: task for task in _TASKS}


def names() -> tuple[str, ...]:
  """Returns the benchmarks that can be loaded, prepared data first."""
  return tuple(_BY_NAME)


def task(name: str) -> Task:
  """Returns the task of that name."""
  errors.check_known("benchmark", name, _BY_NAME)
  return _BY_NAME[name]


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
  """Questions of one split."""

  name: str
  split: str  # "validation", "test", or another that the data has.
  root: str  # Folder that video paths are relative to.
  questions: Sequence[question_lib.Question]  # In the order of the file.
  # Question id -> tokens of the grid that decide it, where that is known.
  decisive: Mapping[str, Sequence[int]]
  num_frames: int | None = None  # That these are tokens of, where known.
  # Of the program that made the clips, None for real ones.
  generator_hash: str | None = None
  task: Task = _BY_NAME[PREPARED]
  # What was left out.
  report: readers.Report = dataclasses.field(default_factory=readers.Report)

  def limited(self, count: int) -> "Benchmark":
    """Returns the first `count` questions; all of them for 0 or less."""
    if count <= 0 or count >= len(self.questions):
      return self
    return dataclasses.replace(self, questions=self.questions[:count])

  def left_out(self) -> dict[str, Any]:
    """Returns what is not asked, for results.json; nothing that is empty."""
    out = {
      "bad_rows": [
        # Results must not depend on where the data lies.
        {**dataclasses.asdict(bad), "file": os.path.basename(bad.file)}
        for bad in self.report.bad_rows
      ],
      "other_rows": dict(sorted(self.report.left_out.items())),
      "not_there": list(self.report.missing),
    }
    return {name: found for name, found in out.items() if found}


def load(
  directory,
  split: str = "",
  *,
  benchmark: str = PREPARED,
  media: str = "",
  style: str = "",
  on_bad_row: str = "raise",
) -> Benchmark:
  """Returns one split of a benchmark's folder.

  Args:
    directory: a benchmark as it was released; or prepared data: parquet files
      by split in VideoMME's columns, and of synthetic clips `decisive.jsonl`
      and `manifest.json`.
    media: folder of the clips, below `directory` or absolute.
    style: of the prompt: "" is the benchmark's own, and that of training for
      prepared data; "video-r1" is as in training, "videomme" as in VideoMME.
    on_bad_row: "raise", or "skip" to leave unfit rows out and report them.
  """
  directory = pathlib.Path(directory)
  found = task(benchmark)
  split = split or found.default_split
  if not os.path.isdir(directory):
    mend = "make it with `python -m cacovid_jax.prepare` or give another --data"
    if benchmark != PREPARED:
      mend = f"give the folder that holds {benchmark} as --data"
    raise errors.UserError(f"there is no data in {directory}; {mend}")
  root, report = os.path.join(directory, media), readers.Report()
  options = dict(on_bad_row=on_bad_row, report=report)
  told = dict(split=split, root=root, task=found, report=report)
  if benchmark != PREPARED:
    paths = found.files(directory, split)
    if found.one_file:
      options["split"] = split
    questions = found.read(paths, root, **options)
    questions = _restyled(questions, style, benchmark)
    return Benchmark(name=benchmark, questions=questions, decisive={}, **told)
  path = directory / f"{split}.parquet"
  if not os.path.isfile(path):
    splits = sorted(path.stem for path in directory.glob("*.parquet"))
    raise errors.UserError(
      f"{directory} has no {path.name}; its splits:"
      f" {', '.join(splits) or 'none'}"
    )
  questions = found.read(str(path), root, style or "video-r1", **options)
  manifest = read_manifest(directory)
  return Benchmark(
    name=str(manifest.get("name") or manifest.get("variant") or directory.name),
    questions=questions,
    decisive=_read_decisive(directory / "decisive.jsonl", questions),
    generator_hash=manifest.get("generator_hash"),
    num_frames=manifest.get("num_frames"),
    **told,
  )


def _restyled(questions, style: str, benchmark: str):
  """Returns the questions in another style of prompt than their own."""
  if style in ("", benchmark):
    return questions
  if style != "video-r1":
    raise errors.UserError(
      f"prompt style {style!r}: give 'video-r1', or '' for that of {benchmark}"
    )
  found = []
  for question in questions:
    options = wording.letter_options(question.options)
    told = question.question, options, question.problem_type
    prompt = wording.training_prompt(*told)
    found.append(dataclasses.replace(question, prompt=prompt))
  return found


def read_manifest(directory) -> dict[str, Any]:
  """Returns what prepared data are made of, {} where nothing tells."""
  path = pathlib.Path(directory, "manifest.json")
  return schema.read(path, dict, _AGAIN) if os.path.isfile(path) else {}


def _read_decisive(path: pathlib.Path, questions) -> dict[str, tuple[int, ...]]:
  """Returns the decisive tokens of the given questions."""
  if not os.path.isfile(path):
    return {}
  wanted = {question.id for question in questions}
  found = evidence.read(path, _AGAIN)
  return {name: tokens for name, tokens in found.items() if name in wanted}
