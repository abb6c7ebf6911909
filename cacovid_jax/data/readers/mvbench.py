"""MVBench (https://arxiv.org/abs/2311.17005), as its revision `video` is.

json/<task>.json for each of 20 tasks, and a folder of clips for each. The clips
are cut already: `start` and `end`, where a row has them, are not used. Some
sources need a licence of their own, so tasks may be missing; they are named.
"""

import pathlib

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import option_letters, tables, validation

_STAR = "star/Charades_segment"
_CLEVRER = "clevrer/video_validation"
_PERCEPTION = "perception/videos"

# Task -> folder of its clips below the media root.
FOLDERS = {
  "action_sequence": _STAR,
  "action_prediction": _STAR,
  "action_antonym": "ssv2_video_mp4",
  "fine_grained_action": "Moments_in_Time_Raw/videos",
  "unexpected_action": "FunQA_test/test",
  "object_existence": _CLEVRER,
  "object_interaction": _STAR,
  "object_shuffle": _PERCEPTION,
  "moving_direction": _CLEVRER,
  "action_localization": "sta/sta_video_segment",
  "scene_transition": "scene_qa/video",
  "action_count": _PERCEPTION,
  "moving_count": _CLEVRER,
  "moving_attribute": _CLEVRER,
  "state_change": _PERCEPTION,
  "fine_grained_pose": "nturgbd_convert",
  "character_order": _PERCEPTION,
  "egocentric_navigation": "vlnqa",
  "episodic_reasoning": "tvqa/video_fps3_hq_segment",
  "counterfactual_inference": _CLEVRER,
}
TASKS = tuple(FOLDERS)
# Some archives unpack into a folder of their date.
_DATED = "data0613/"


def read_mvbench(
  paths, root=None, *, report: tables.Report | None = None, **options
) -> list[question_lib.Question]:
  """Returns the questions of MVBench's files, one for each task.

  As `tables.Reader`; the report tells the tasks that are missing, too.
  """
  report = tables.Report() if report is None else report
  found = {pathlib.Path(path).stem: path for path in tables.split_paths(paths)}
  if not found.keys() & FOLDERS.keys():
    raise errors.UserError(
      f"{', '.join(map(str, found.values()))}: no task of MVBench; its files"
      " are called <task>.json, such as action_sequence.json"
    )
  report.missing += [task for task in TASKS if task not in found]
  for name in sorted(found.keys() - FOLDERS.keys()):
    report.left_out[f"{name}.json, no task of MVBench"] += 1
  files = [found[task] for task in TASKS if task in found]
  return _READER(files, root, report=report, **options)


def _question(row: validation.Row) -> question_lib.Question:
  question = row.text("question")
  options = row.choices("candidates", most=5)
  folder = FOLDERS[row.file]
  patterns = [f"{folder}/{{}}", f"video/{folder}/{{}}"]
  if folder in (_STAR, _CLEVRER):
    patterns.insert(1, f"{_DATED}{folder}/{{}}")
  answer = row.text("answer")
  shown = wording.letter_options(options, "({}) {}\n")
  return question_lib.Question(
    id=f"{row.file}:{row.number}",
    video=row.clip("video", *patterns),
    question=question,
    options=tuple(options),
    answer=option_letters.letter_of(answer, options, "answer"),
    category=row.file,
    source="mvbench",
    # No space stands behind "Question:".
    prompt=f"Question:{question}\nOption:\n{''.join(shown)}Only give the best"
    " option.\n",
  )


_READER = tables.Reader(
  "MVBench", ("video", "question", "candidates", "answer"), (), _question
)
