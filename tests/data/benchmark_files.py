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
    rows: as they stand in the files.
    clips: below the root.
  """

  name: str
  root: pathlib.Path
  split: str
  files: tuple[pathlib.Path, ...]
  rows: tuple[dict, ...]
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
  return Fixture(
    name,
    root,
    split,
    tuple(root / place for place in files),
    tuple(row for rows in files.values() for row in rows),
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
  return "dev", files, videos


LAYOUTS = {
  "videomme": {"": _videomme},
  "mlvu_dev": {"": _mlvu_dev, "original": _mlvu_dev_original},
  "mlvu_test": {"": _mlvu_test},
}
