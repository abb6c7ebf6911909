"""The clip viewer: which questions are shown, their pictures, and its data.

The page itself holds the frames, the answers and the tokens that are shown
first, so that it can be read without scripts. What the script adds, the tokens
at every ratio and their scores, comes as JSON: sets of tokens as one bit each,
scores as one byte each.
"""

import base64
import collections
import dataclasses
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import results
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib

SHOWN_RATIO = 0.1
# Methods whose kept tokens can be looked at, besides the shown one.
_NUM_OTHERS = 3
# Longer side of a frame in pixels, the largest whose files stay within the
# budget; the smallest is taken in any case.
_SIDES = (320, 256, 208, 168, 128, 96)
_MAX_BYTES = 3_200_000
# Characters of an answer that are shown; the ledger holds all of them.
_MAX_TEXT = 400


class Said(NamedTuple):
  """An answer."""

  text: str  # Of the model, stripped.
  letter: str  # The option in it, "" if none.
  # Whether it is the right one; None if that is not known.
  right: bool | None = None

  @property
  def brief(self) -> str:
    """The text, cut where it is too long for a page."""
    count = len(self.text)
    if count <= _MAX_TEXT:
      return self.text
    return f"{self.text[:_MAX_TEXT]}… ({count} characters)"


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One question, its clip, and what methods kept of it."""

  question: question_lib.Question
  frames: np.ndarray  # uint8[F, h, w, 3], all that the model was shown.
  grid: tuple[int, int, int]
  # (method, ratio) -> its `inference.batch.KeptTokens`.
  views: Mapping[tuple[str, float], Any]
  # Method -> ratio -> what was said; vanilla's ratio is 1.
  answers: Mapping[str, Mapping[float, Said]]
  # The (method, ratio) that is shown first, one of `views`.
  shown: tuple[str, float]
  # Tokens that decide the question; empty if not known.
  decisive: frozenset[int] = frozenset()

  @property
  def frames_per_slice(self) -> int:
    """Frames that a row of the grid's first axis stands for."""
    return -(-len(self.frames) // self.grid[0])

  @property
  def slices(self) -> np.ndarray:
    """uint8[T, h, w, 3], the first frame of each row."""
    return self.frames[:: self.frames_per_slice]

  @property
  def said(self) -> Said:
    """What was said from the tokens that are shown first."""
    method, ratio = self.shown
    return self.answers[method][ratio]


def choose(
  table: results.Table,
  answers: Any,
  engine: engine_lib.Engine,
  decisive: Mapping[str, Sequence[int]],
  count: int,
  *,
  failures: results.Failures | None = None,
) -> list[Example]:
  """Returns right and wrong answers, half each as far as there are such.

  Right and wrong from what the learned method kept, at the ratio nearest to a
  tenth. Clips differ from each other where possible, and kinds of question take
  turns. The choice depends on the answers alone.

  Args:
    answers: its ledger.
    decisive: question id -> tokens that decide it, where known.
    count: at most as many examples.
  """
  failures = failures or {}
  ratio = min(table.ratios, key=lambda r: (abs(r - SHOWN_RATIO), r))
  method = _shown(table, ratio, failures)
  if method is None or not count:
    return []

  def cell(method, ratio):
    seed = table.seeds[0] if method.per_seed else 0
    return methods_lib.Condition(method, ratio, seed)

  shown = cell(method, ratio)
  asked = [
    cell(each, r)
    for each in table.methods
    for r in table.ratios
    if (each.spec, r) not in failures
  ]
  usable = [
    question
    for question in table.questions
    if question.lettered and "fault" not in answers[shown.key(question.id)]
  ]
  rivals = [one for one in asked if one.ratio == ratio]
  looked = {method.label, *_others(answers, method, rivals, usable)}
  views = [one for one in asked if one.method.label in looked]
  picked = _pick(usable, answers, shown, count)
  kept = engine.kept(picked, views)
  places = [(one.method.label, one.ratio) for one in views]
  return [
    Example(
      question=question,
      frames=engine.source.frames(question.video),
      grid=engine.grid_of(question),
      views=dict(zip(places, kept[question.id], strict=True)),
      answers=_said(question, answers, asked),
      shown=(method.label, ratio),
      decisive=frozenset(decisive.get(question.id, ())),
    )
    for question in picked
  ]


def _shown(table, ratio, failures) -> methods_lib.Method | None:
  """Returns the learned method, or the first row that can be run."""
  able = [m for m in table.methods if (m.spec, ratio) not in failures]
  named = (m for m in able if m.label == results.REFERENCE)
  return next(named, able[0] if able else None)


def _said(question, answers, cells) -> dict[str, dict[float, Said]]:
  """Returns method -> ratio -> what was said, vanilla's first."""
  said = collections.defaultdict(dict)
  for cell in (methods_lib.Condition(), *cells):
    found = answers[cell.key(question.id)]
    right = found["score"] == 1
    said[cell.label][cell.ratio] = Said(found["text"], found["letter"], right)
  return dict(said)


def _others(answers, shown, rivals, questions) -> list[str]:
  """Returns the labels of the best methods besides the shown one.

  Other methods before variants of the same one; oracles know too much.
  """
  name, found = shown.label.partition("?")[0], []
  for cell in rivals:
    label = cell.method.label
    if label != shown.label and not cell.method.compressor.oracle:
      scores = [answers[cell.key(q.id)]["score"] for q in questions]
      accuracy = float(np.mean(scores)) if scores else 0.0
      found.append((label.startswith(name), -accuracy, label))
  return [label for *_, label in sorted(found)[:_NUM_OTHERS]]


def _pick(usable, answers, cell, count):
  """Returns right ones, then wrong ones."""
  scores = {q.id: answers[cell.key(q.id)]["score"] for q in usable}
  right = _by_turns([q for q in usable if scores[q.id] == 1])
  wrong = _by_turns([q for q in usable if scores[q.id] < 1])
  num_wrong = min(len(wrong), max(count // 2, count - len(right)))
  return right[: count - num_wrong] + wrong[:num_wrong]


def _by_turns(questions):
  """Returns questions, new clips first, kinds of question taking turns."""
  groups, seen = collections.defaultdict(list), set()
  for question in sorted(
    questions, key=lambda q: (question_lib.question_hash(q.id), q.id)
  ):
    again = question.video in seen
    seen.add(question.video)
    groups[again, question.category or ""].append(question)
  out = []
  for repeated in (False, True):
    queues = [groups[key] for key in sorted(groups) if key[0] == repeated]
    for turn in itertools.zip_longest(*queues):
      out += [question for question in turn if question]
  return out


def clips(examples: Sequence[Example]) -> list[dict[str, Any]]:
  """Returns what the template shows of each example."""
  pictures = _pictures([example.slices for example in examples])
  return [
    _clip(example, images)
    for example, images in zip(examples, pictures, strict=True)
  ]


def data(examples: Sequence[Example]) -> dict[str, Any]:
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
    mine, deciding = (
      [i - t * H * W for i in tokens if i // (H * W) == t]
      for tokens in (kept, example.decisive)
    )
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
  question, said = example.question, example.said
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
  # Whatever is looked at has a row of its own.
  apart = {methods_lib.VANILLA} - {method for method, _ in example.views}
  methods = {k: v for k, v in example.answers.items() if k not in apart}
  ratios = list(dict.fromkeys(r for row in methods.values() for r in row))
  rows = [
    {
      "name": name,
      "cells": [{"ratio": ratio_key(r), "said": row.get(r)} for r in ratios],
    }
    for name, row in methods.items()
  ]
  vanilla = None
  if apart & example.answers.keys():
    (vanilla,) = example.answers[methods_lib.VANILLA].values()
  return {"ratios": ratios, "rows": rows, "vanilla": vanilla}


def _data(example) -> dict[str, Any]:
  T, H, W = example.grid
  views, scores = {}, {}
  for (method, ratio), view in example.views.items():
    row = views.setdefault(method, {})
    row[ratio_key(ratio)] = pack(view.index, T * H * W)
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
        ratio_key(ratio): [said.letter, said.brief, said.right]
        for ratio, said in row.items()
      }
      for name, row in example.answers.items()
    },
    "views": views,
    "scores": scores,
    "decisive": pack(example.decisive, T * H * W) if example.decisive else "",
    "shown": [method, ratio_key(ratio)],
  }


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
