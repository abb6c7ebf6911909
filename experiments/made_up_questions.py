"""Clips that are drawn, and questions about them in several layouts."""

import json
import pathlib
import shutil

import pyarrow as pa
import pyarrow.parquet

from cacovid_jax import files
from cacovid_jax.data import wording
from experiments import made_up

# Seconds of the clips of each split of the questions.
CLIPS = {"train": (4, 10, 20, 100), "validation": (6, 40), "test": (8, 50)}
_COLOURS = ("red", "blue", "green", "black")


def _videomme(folder, asked):
  """Writes questions as Video-MME's; returns the folder of their clips."""
  rows = [
    {
      "question_id": row["id"],
      "videoID": pathlib.Path(row["video"]).stem,
      "duration": "short",
      "question": row["question"],
      "options": [f"{one}." for one in wording.letter_options(_COLOURS)],
      "answer": row["answer"],
    }
    for row in asked
  ]
  path = folder / "videomme" / "test-00000-of-00001.parquet"
  files.make_folder(path.parent)
  pa.parquet.write_table(pa.Table.from_pylist(rows), path)
  return folder / "data"


def _mvbench(folder, asked):
  """Writes questions as MVBench's; returns the folder of their clips."""
  rows = [
    {
      "video": row["video"],
      "question": row["question"],
      "candidates": row["options"],
      "answer": _COLOURS["ABCD".index(row["answer"])],
    }
    for row in asked
  ]
  files.make_folder(folder / "json")
  files.write_json(folder / "json" / "action_sequence.json", rows)
  return folder / "star" / "Charades_segment"


RELEASED = {"videomme": _videomme, "mvbench": _mvbench}


def write(folder) -> None:
  """Writes clips, `train.json` as of Video-R1, and `questions.json` of all.

  Those of the test also in a folder of each of `RELEASED`.
  """
  folder = pathlib.Path(folder)
  rows, asked = [], []
  for split, lengths in CLIPS.items():
    for number, seconds in enumerate(lengths):
      name = f"{split}_{seconds:03d}s.mp4"
      made_up.write_clip(folder / name, seconds, (160, 90), held=5)
      letter = "ABCD"[number % 4]
      text = f"Which colour is seen first in clip {number}?"
      known = {"id": f"{split}-{number}", "video": name, "question": text}
      asked.append(
        known | {"options": _COLOURS, "answer": letter, "split": split}
      )
      if split == "train":
        rows.append(
          {
            "problem_id": number,
            "problem": text,
            "data_type": "video",
            "problem_type": "multiple choice",
            "options": wording.letter_options(_COLOURS),
            "solution": f"<answer>{letter}</answer>",
            "path": f"./{name}",
            "data_source": "made",
          }
        )
  files.write(folder / "train.json", json.dumps(rows, indent=1) + "\n")
  files.write(folder / "questions.json", json.dumps(asked, indent=1) + "\n")
  tested = [row for row in asked if row["split"] == "test"]
  for name, lay_out in RELEASED.items():
    media = lay_out(folder / name, tested)
    files.make_folder(media)
    for row in tested:
      shutil.copyfile(folder / row["video"], media / row["video"])
