"""Folders of benchmarks in exactly the layout in which they are released.

Rows and clips are made up here; columns, types, names of files and folders are
those of the releases. A few questions each, every category once.
"""

import dataclasses
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet

from tests.data import clips

COLOURS = ("red", "green", "blue", "grey", "pink", "teal")


@dataclasses.dataclass(frozen=True)
class Fixture:
  """A benchmark's folder.

  Attributes:
    name: of the benchmark.
    root: where it was written, also the media root.
    split: the one that was written.
    files: with the questions.
    rows: the questions, as they stand in the files.
    num_left_out: rows that are no multiple choice.
    clips: below the root.
  """

  name: str
  root: pathlib.Path
  split: str
  files: tuple[pathlib.Path, ...]
  rows: tuple[dict, ...]
  num_left_out: int
  clips: tuple[str, ...]

  @property
  def data_dir(self) -> str:
    return str(self.root)

  @property
  def num_questions(self) -> int:
    return len(self.rows)


def write(name: str, root, layout: str = "") -> Fixture:
  """Writes a benchmark; returns what was written.

  Args:
    name: as in `benchmarks.names()`.
    root: folder, made if need be.
    layout: "" is that of lmms-eval's copy on the Hugging Face hub; some have
      another, see `LAYOUTS`.
  """
  root = pathlib.Path(root)
  split, files, videos = LAYOUTS[name][layout]()
  for place, rows in files.items():
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
      path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    else:
      pa.parquet.write_table(pa.Table.from_pylist(rows), path)
  for number, place in enumerate(dict.fromkeys(videos)):
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of different lengths, so that no two of them are alike.
    clips.write(path, 8 + number)
  rows = [row for found in files.values() for row in found]
  asked = tuple(row for row in rows if "scoring_points" not in row)
  return Fixture(
    name,
    root,
    split,
    tuple(root / place for place in files),
    asked,
    len(rows) - len(asked),
    tuple(dict.fromkeys(videos)),
  )


def options(number: int, count: int) -> list[str]:
  """Returns colours, in another order for every number."""
  return [COLOURS[(number + i) % len(COLOURS)] for i in range(count)]


def _lettered(number: int, count: int, form: str) -> list[str]:
  return [
    form.format(letter, option)
    for letter, option in zip("ABCDEF", options(number, count), strict=False)
  ]


def _videomme():
  rows = [
    {
      "video_id": f"{clip + 1:03}",
      "duration": duration,
      "domain": domain,
      "sub_category": sub_category,
      "url": f"https://www.example.org/watch?v=clip_{clip}",
      "videoID": f"clip_{clip}",
      "question_id": f"{clip + 1:03}-{number + 1}",
      "task_type": task_type,
      "question": f"Which colour is bar {2 * clip + number}?",
      "options": _lettered(2 * clip + number, 4, "{}. {}."),
      "answer": "ABCD"[(2 * clip + number) % 4],
    }
    for clip, (duration, domain, sub_category) in enumerate(
      [
        ("short", "Knowledge", "Astronomy"),
        ("medium", "Sports Competition", "Football"),
        ("long", "Multilingual", "Multilingual"),
      ]
    )
    for number, task_type in enumerate(["Counting Problem", "OCR Problems"])
  ]
  videos = [f"data/{row['videoID']}.mp4" for row in rows]
  return "test", {"videomme/test-00000-of-00001.parquet": rows}, videos


_MLVU_DEV = (
  "plotQA", "findNeedle", "ego", "count", "order", "anomaly_reco",
  "topic_reasoning",
)  # fmt: skip
_MLVU_TEST = (
  "topic_reasoning", "anomaly_reco", "needleQA", "ego", "plotQA", "sportsQA",
  "order", "count", "tutorialQA",
)  # fmt: skip


def _mlvu(kinds, count):
  rows = []
  for number, kind in enumerate(kinds):
    shown = "\n".join(_lettered(number, count, "({}) {}"))
    rows.append(
      {
        "video_name": f"{kind}_{number % 3}.mp4",
        "duration": 246.0 + number,
        "question": f"What colour is coat {number}?\n{shown}",
        "candidates": options(number, count),
        # From the end, so that E and F are there.
        "answer": "ABCDEF"[count - 1 - number % count],
        "task_type": kind.replace("findNeedle", "needle"),
        "question_id": f"{kind}_{number}",
      }
    )
  return rows, [row["video_name"] for row in rows]


def _mlvu_dev():
  rows, videos = _mlvu(_MLVU_DEV, 4)
  return "dev", {"mlvu/test-00000-of-00001.parquet": rows}, videos


def _mlvu_test():
  rows, videos = _mlvu(_MLVU_TEST, 6)
  return "test", {"mlvu/test-00000-of-00001.parquet": rows}, videos


def _mlvu_dev_original():
  files, videos = {}, []
  names = ("plotQA", "needle", *_MLVU_DEV[2:])
  for number, (name, kind) in enumerate(zip(names, _MLVU_DEV, strict=True)):
    given = options(number, 4)
    folder = f"{number + 1}_{name}"
    files[f"json/{folder}.json"] = [
      {
        "video": f"{name}_0.mp4",
        "duration": 246 + number,
        "question": f"What colour is coat {number}?",
        "candidates": given,
        "answer": given[3 - number % 4],
        "question_type": kind,
      }
    ]
    videos.append(f"video/{folder}/{name}_0.mp4")
  for folder, kind in (("8_sub_scene", "subPlot"), ("9_summary", "summary")):
    files[f"json/{folder}.json"] = [
      {
        "video": "told_0.mp4",
        "duration": 300,
        "question": "Please tell what happens.",
        "answer": "A man walks in.",
        "question_type": kind,
        "scoring_points": ["a man"],
      }
    ]
  return "dev", files, videos


_LVB = (
  "S2E", "S2O", "S2A", "E2O", "O2E", "T2E", "T2O", "T2A", "E3E", "O3O", "SSS",
  "SOS", "SAA", "T3E", "T3O", "TOS", "TAA",
)  # fmt: skip


def _longvideobench_rows():
  """Returns rows without their options, and the options."""
  rows, given = [], []
  for number, category in enumerate(_LVB):
    clip = f"vX{number % 4}"
    # Two to five options.
    found = options(number, 2 + number % 4)
    group = (15, 60, 600, 3600)[number % 4]
    given.append(found)
    rows.append(
      {
        "video_id": clip,
        "id": f"{clip}_{number}",
        "video_path": f"{clip}.mp4",
        "subtitle_path": f"{clip}_en.json",
        "correct_choice": number % len(found),
        "question": f"In a kitchen, what colour is door {number}?",
        "duration": 0.7 * group,
        "duration_group": group,
        "question_category": category,
        "topic_category": ("KC-Cooking-Recipes", "NP-News")[number % 2],
        "starting_timestamp_for_subtitles": 0.0,
      }
    )
  return rows, given, [f"videos/{row['video_path']}" for row in rows]


def _longvideobench():
  rows, given, videos = _longvideobench_rows()
  for row, found in zip(rows, given, strict=True):
    padded = [*found, *["N/A"] * 5][:5]
    row |= {f"option{i}": option for i, option in enumerate(padded)}
  return "validation", {"validation-00000-of-00001.parquet": rows}, videos


def _longvideobench_json():
  rows, given, videos = _longvideobench_rows()
  for row, found in zip(rows, given, strict=True):
    row |= {"candidates": found, "position": [1, 2], "level": "L1-Perception"}
  return "validation", {"lvb_val.json": rows}, videos


_MVBENCH = {
  "object_interaction": "star/Charades_segment",
  "action_sequence": "data0613/star/Charades_segment",
  "action_prediction": "star/Charades_segment",
  "action_localization": "sta/sta_video_segment",
  "moving_count": "clevrer/video_validation",
  "moving_direction": "data0613/clevrer/video_validation",
  "moving_attribute": "clevrer/video_validation",
  "counterfactual_inference": "clevrer/video_validation",
  "object_existence": "clevrer/video_validation",
  "fine_grained_pose": "nturgbd_convert",
  "character_order": "perception/videos",
  "object_shuffle": "perception/videos",
  "state_change": "perception/videos",
  "action_count": "perception/videos",
  "egocentric_navigation": "vlnqa",
  "episodic_reasoning": "tvqa/video_fps3_hq_segment",
  "fine_grained_action": "Moments_in_Time_Raw/videos",
  "scene_transition": "scene_qa/video",
  "action_antonym": "ssv2_video_mp4",
  "unexpected_action": "FunQA_test/test",
}


def _mvbench():
  files, videos = {}, []
  for number, (task, folder) in enumerate(_MVBENCH.items()):
    found = options(number, 2 + number % 4)
    files[f"json/{task}.json"] = [
      {
        # Those of the dated folder are not in the other one.
        "video": f"{'0613' if 'data' in folder else '0001'}.mp4",
        "question": f"What colour is cup {number}?",
        "candidates": found,
        "answer": found[number % len(found)],
      }
    ]
    videos.append(f"{folder}/{files[f'json/{task}.json'][0]['video']}")
  return "test", files, videos


def _egoschema():
  rows = [
    {
      "question_idx": str(10 + number),
      "question": f"What colour does C paint wall {number}?",
      "video_idx": f"00aa0000-0000-4000-8000-00000000000{number // 2}",
      "option": _lettered(number, 5, "{}. C paints it {}."),
      "answer": str(4 - number),
    }
    for number in range(5)
  ]
  videos = [f"videos/{row['video_idx']}.mp4" for row in rows]
  return "subset", {"Subset/test-00000-of-00001.parquet": rows}, videos


def _nextqa():
  rows = []
  types = ("CW", "CH", "TN", "TC", "TP", "DL", "DC", "DO", "DB")
  for number, kind in enumerate(types):
    row = {
      "video": 1234567890 + number // 3,
      "frame_count": 369,
      "width": 640,
      "height": 480,
      "question": f"why did the boy take cup {number}",
      "answer": number % 5,
      # Counted from 0 for every clip.
      "qid": number % 3,
      "type": kind,
    }
    row |= {f"a{i}": option for i, option in enumerate(options(number, 5))}
    rows.append(row)
  videos = [f"NExTVideo/{row['video']}.mp4" for row in rows]
  return "test", {"MC/test-00000-of-00001.parquet": rows}, videos


LAYOUTS = {
  "videomme": {"": _videomme},
  "mlvu_dev": {"": _mlvu_dev, "original": _mlvu_dev_original},
  "mlvu_test": {"": _mlvu_test},
  "longvideobench": {"": _longvideobench, "json": _longvideobench_json},
  "mvbench": {"": _mvbench},
  "egoschema": {"": _egoschema},
  "nextqa": {"": _nextqa},
}
