"""What the clip viewer shows: pictures for the page, numbers for its script.

The page itself holds the frames, the answers and the tokens that are shown
first, so that it can be read without scripts. What the script adds, the tokens
at every ratio and their scores, comes as JSON: sets of tokens as one bit each,
scores as one byte each.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import examples as examples_lib
from cacovid_jax.evals import runner

# Longer side of a frame in pixels, the largest whose files stay within the
# budget; the smallest is taken in any case.
_SIDES = (320, 256, 208, 168, 128, 96)
_MAX_BYTES = 3_200_000
# Characters of an answer that are shown; the ledger holds all of them.
_MAX_TEXT = 400


def clips(examples: Sequence[examples_lib.Example]) -> list[dict[str, Any]]:
  """Returns what the template shows of each example."""
  pictures = _pictures([example.frames for example in examples])
  return [
    _clip(example, images)
    for example, images in zip(examples, pictures, strict=True)
  ]


def data(examples: Sequence[examples_lib.Example]) -> dict[str, Any]:
  """Returns what the script needs, ready for JSON."""
  return {"clips": [_data(example) for example in examples]}


def ratio_key(ratio: float) -> str:
  """Returns a ratio as the page's attributes and the script name it."""
  return f"{ratio:g}"


def path(tokens: Iterable[int], width: int) -> str:
  """Returns SVG path data of unit squares, one per token of a frame."""
  squares = (f"M{i % width} {i // width}h1v1h-1z" for i in sorted(tokens))
  return "".join(squares)


def pack(tokens: Iterable[int], count: int) -> str:
  """Returns a set of tokens as base64 of a bit mask, lowest bit first."""
  bits = np.zeros(count, np.uint8)
  bits[list(tokens)] = 1
  return _base64(np.packbits(bits, bitorder="little").tobytes())


def heat(gap: np.ndarray) -> str:
  """Returns scores as base64 of a byte each, low to high over the clip.

  The extreme 2 % at either end share a value, so that one outlier does not
  wash out the rest.
  """
  low, high = np.quantile(gap, [0.02, 0.98])
  scaled = np.clip((gap - low) / max(high - low, 1e-12), 0, 1)
  return _base64((255 * scaled).round().astype(np.uint8).tobytes())


def shares(gap: np.ndarray) -> list[float]:
  """Returns each frame's share after the softmax, of the clip's best."""
  return [round(float(share), 4) for share in np.exp(gap - np.max(gap))]


def _clip(example, images) -> dict[str, Any]:
  T, H, W = example.grid
  method, ratio = example.shown
  view = example.views[example.shown]
  kept = set(view.index.tolist())
  frames = []
  for t in range(T):
    first = t * H * W
    mine = [i - first for i in kept if first <= i < first + H * W]
    deciding = [i - first for i in example.decisive
                if first <= i < first + H * W]  # fmt: skip
    frames.append(
      {
        "label": _label(t, example.frames_per_slice),
        "image": images[t],
        "num_kept": len(mine),
        "kept": path(mine, W),
        "veil": f"M0 0H{W}V{H}H0z{path(mine, W)}",
        "decisive": path(deciding, W),
      }
    )
  question, said = example.question, _brief(example.said)
  return {
    "question": question,
    "options": list(zip(question_lib.LETTERS, question.options, strict=False)),
    "said": said,
    "known": said.right is not None,
    "method": method,
    "ratio": ratio_key(ratio),
    "num_kept": len(kept),
    "num_video": T * H * W,
    "decisive": len(example.decisive),
    "decisive_kept": len(example.decisive & kept),
    "frames": frames,
    "grid": (H, W),
    "answers": _answers(example),
  }


def _answers(example) -> dict[str, Any]:
  """Returns the table of answers: ratios, and a row for each method."""
  looked = {method for method, _ in example.views}
  # Whatever is looked at has a row of its own.
  apart = {runner.VANILLA} - looked
  methods = [name for name in example.answers if name not in apart]
  ratios = dict.fromkeys(r for name in methods for r in example.answers[name])
  rows = []
  for name in methods:
    row = example.answers[name]
    cells = [
      {
        "ratio": ratio_key(ratio),
        "said": _brief(row.get(ratio)),
        "view": (name, ratio) in example.views,
      }
      for ratio in ratios
    ]
    rows.append({"name": name, "looked": name in looked, "cells": cells})
  vanilla = None
  if apart & example.answers.keys():
    (vanilla,) = map(_brief, example.answers[runner.VANILLA].values())
  return {"ratios": list(ratios), "rows": rows, "vanilla": vanilla}


def _data(example) -> dict[str, Any]:
  T, H, W = example.grid
  methods = dict.fromkeys(method for method, _ in example.views)
  views = {
    method: {
      ratio_key(ratio): pack(view.index, T * H * W)
      for (name, ratio), view in example.views.items()
      if name == method
    }
    for method in methods
  }
  scores = {}
  for (method, _), view in example.views.items():
    # Scores are those of the policy, whatever the ratio.
    if view.token_gap is not None and method not in scores:
      scores[method] = {
        "tokens": heat(view.token_gap),
        "frames": shares(view.frame_gap),
        "gaps": [round(float(gap), 2) for gap in view.frame_gap],
      }
  method, ratio = example.shown
  return {
    "id": example.question.id,
    "grid": [T, H, W],
    "labels": [_label(t, example.frames_per_slice) for t in range(T)],
    "gold": example.question.answer,
    "answers": {
      name: {
        ratio_key(ratio): [said.letter, said.text, said.right]
        for ratio, said in ((r, _brief(s)) for r, s in row.items())
      }
      for name, row in example.answers.items()
    },
    "views": views,
    "scores": scores,
    "decisive": pack(example.decisive, T * H * W) if example.decisive else "",
    "shown": [method, ratio_key(ratio)],
  }


def _brief(said: examples_lib.Said | None) -> examples_lib.Said | None:
  """Returns an answer whose text is not too long for a page."""
  if said is None or len(said.text) <= _MAX_TEXT:
    return said
  return said._replace(
    text=f"{said.text[:_MAX_TEXT]}… ({len(said.text)} characters)"
  )


def _label(t: int, per_slice: int) -> str:
  """Returns the frames of a slice, counted from 1."""
  first = t * per_slice + 1
  return str(first) if per_slice == 1 else f"{first}–{first + per_slice - 1}"


def _pictures(clips) -> list[list[str]]:
  """Returns data URIs of all frames of all clips, within the budget."""
  for side in _SIDES:
    files = [[_jpeg(frame, side) for frame in frames] for frames in clips]
    if sum(len(file) for row in files for file in row) <= _MAX_BYTES:
      break
  return [
    [f"data:image/jpeg;base64,{_base64(file)}" for file in row] for row in files
  ]


def _jpeg(frame: np.ndarray, side: int) -> bytes:
  """Returns a JPEG of uint8[h, w, 3], its longer side at most `side`."""
  image = Image.fromarray(frame)
  image.thumbnail((side, side))
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=82)
  return buffer.getvalue()


def _base64(content: bytes) -> str:
  return base64.b64encode(content).decode("ascii")
