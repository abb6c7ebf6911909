"""A tiny Qwen2.5-VL, clips of two shapes and questions about them, on disk."""

import json

from cacovid_jax.data import question as question_lib
from cacovid_jax.synthetic import tiny_checkpoints
from tests.data import clips
from tests.training import tiny

# Width and height of the clips' frames, and the grids of four of them.
SHAPES = {"wide": (48, 32), "square": (32, 32)}
GRIDS = {"wide": (2, 4, 6), "square": (2, 4, 4)}


def write(folder):
  """Writes folder/model and clips; returns questions about them."""
  tiny_checkpoints.write_tiny(folder / "model", "qwen2_5_vl")
  return write_clips(folder)


def write_clips(folder):
  """Writes the clips and folder/train.json; returns the questions."""
  rows = []
  for number in range(6):
    shape = ("wide", "square")[number % 2]
    name = f"{shape}{number}.mp4"
    width, height = SHAPES[shape]
    clips.write(folder / name, 8 + number, width=width, height=height)
    rows.append(
      question_lib.Question(
        id=f"q{number}",
        video=name,
        question="What?",
        options=("red", "blue"),
        answer="AB"[number // 2 % 2],
        prompt=f"What is {'this' * (number % 3)}?\nA. red\nB. blue\n",
      )
    )
  entries = [
    {
      "problem_id": number,
      "problem": f"What is in clip {number}?",
      "data_type": "video",
      "problem_type": "multiple choice",
      "options": ["A. red", "B. blue"],
      "solution": f"<answer>{row.answer}</answer>",
      "path": f"./{row.video}",
      "data_source": "",
    }
    for number, row in enumerate(rows)
  ]
  (folder / "train.json").write_text(json.dumps(entries))
  return rows


def config(folder, **changes):
  """Returns `tiny.config` for that model and folder; "a.b" keys."""
  return tiny.config(
    **{
      "model.path": str(folder / "model"),
      "data.root": str(folder),
      "ratio.adaptive": True,
      # Graded rewards, as of `tiny`, are for a fixed ratio.
      "rollout.reward": "accuracy",
      "ratio.rungs": (0.0625, 0.125, 0.25),
      "ratio.start": 0.125,
      "optimizer.lr_heads": 1e-3,
      "data.num_threads": 2,
    }
    | changes
  )
