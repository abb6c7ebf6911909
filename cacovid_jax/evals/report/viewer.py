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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import evaluator as evaluator_lib
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
  """An answer.

  Attributes:
    text: of the model, stripped.
    letter: the option in it, "" if none.
    right: whether it is the right one; None if that is not known.
  """

  text: str
  letter: str
  right: bool | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One question, its clip, and what methods kept of it.

  Attributes:
    question: the question.
    frames: uint8[T, h, w, 3], one for each row of the grid's first axis.
    grid: (T, H, W).
    views: (method, ratio) -> its `inference.batch.KeptTokens`.
    answers: method -> ratio -> what was said; vanilla's ratio is 1.
    shown: the (method, ratio) that is shown first, one of `views`.
    decisive: tokens that decide the question; empty if not known.
    frames_per_slice: frames of the clip that a row of the grid stands for.
  """

  question: question_lib.Question
  frames: np.ndarray
  grid: tuple[int, int, int]
  views: Mapping[tuple[str, float], Any]
  answers: Mapping[str, Mapping[float, Said]]
  shown: tuple[str, float]
  decisive: frozenset[int] = frozenset()
  frames_per_slice: int = 1

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
  failures: Mapping[tuple[str, float], evaluator_lib.Failure] | None = None,
) -> list[Example]:
  """Returns right and wrong answers, half each as far as there are such.

  Right and wrong from what the learned method kept, at the ratio nearest to a
  tenth. Clips differ from each other where possible, and kinds of question take
  turns. The choice depends on the answers alone.

  Args:
    table: of the run.
    answers: its ledger.
    engine: that asked.
    decisive: question id -> tokens that decide it, where known.
    count: at most as many examples.
    failures: what could not be asked.
  """
  failures = failures or {}
  ratio = min(table.ratios, key=lambda r: (abs(r - SHOWN_RATIO), r))
  method = table.shown_method(ratio, failures)
  if method is None or not count:
    return []

  def able(method, ratio):
    return (method.spec, ratio) not in failures

  def cell(method, ratio):
    seed = table.seeds[0] if method.per_seed else 0
    return methods_lib.Condition(method, ratio, seed)

  shown = cell(method, ratio)
  usable = [
    question
    for question in table.questions
    if question.lettered and "fault" not in answers[shown.key(question.id)]
  ]
  accuracies = {
    other.label: _mean(answers, cell(other, ratio), usable)
    for other in table.methods
    if able(other, ratio)
  }
  asked = [
    cell(each, r)
    for each in table.methods
    for r in table.ratios
    if able(each, r)
  ]
  looked = {method.label, *_others(table, method, accuracies)}
  views = [one for one in asked if one.method.label in looked]
  picked = _pick(usable, answers, shown, count)
  kept = engine.kept(picked, views)
  examples = []
  for question in picked:
    said = collections.defaultdict(dict)
    for one in (methods_lib.Condition(), *asked):
      found = answers[one.key(question.id)]
      right = found["score"] == 1
      said[one.label][one.ratio] = Said(found["text"], found["letter"], right)
    frames = engine.source.frames(question.video)
    first, per_slice = slices(frames, engine.grid_of(question)[0])
    examples.append(
      Example(
        question=question,
        frames=first,
        grid=engine.grid_of(question),
        views={
          (one.method.label, one.ratio): found
          for one, found in zip(views, kept[question.id], strict=True)
        },
        answers=dict(said),
        shown=(method.label, ratio),
        decisive=frozenset(decisive.get(question.id, ())),
        frames_per_slice=per_slice,
      )
    )
  return examples


def slices(frames: np.ndarray, num_slices: int) -> tuple[np.ndarray, int]:
  """Returns the first frame of each slice, and how many a slice stands for.

  A row of the grid's first axis is one frame, or several (Qwen2.5-VL).
  """
  step = -(-len(frames) // num_slices)
  return frames[::step], step


def _others(table, shown, accuracies) -> list[str]:
  """Returns the labels of the best methods besides the shown one.

  Other methods before variants of the same one; oracles know too much.
  """
  name = shown.label.partition("?")[0]
  found = [
    (method.label.startswith(name), -accuracies[method.label], method.label)
    for method in table.methods
    if method.label in accuracies
    and method.label != shown.label
    and not method.compressor.oracle
  ]
  return [label for *_, label in sorted(found)[:_NUM_OTHERS]]


def _mean(answers, cell, questions) -> float:
  scores = [answers[cell.key(question.id)]["score"] for question in questions]
  return float(np.mean(scores)) if scores else 0.0


def _pick(usable, answers, cell, count):
  """Returns right ones, then wrong ones."""
  scores = {q.id: answers[cell.key(q.id)]["score"] for q in usable}
  right = _by_turns([q for q in usable if scores[q.id] == 1])
  wrong = _by_turns([q for q in usable if scores[q.id] < 1])
  num_wrong = min(len(wrong), max(count // 2, count - len(right)))
  return right[: count - num_wrong] + wrong[:num_wrong]


def _by_turns(questions):
  """Returns questions, new clips first, kinds of question taking turns."""
  groups = collections.defaultdict(list)
  seen = set()
  for question in sorted(
    questions, key=lambda q: (question_lib.question_hash(q.id), q.id)
  ):
    again = question.video in seen
    seen.add(question.video)
    groups[again, question.category or ""].append(question)
  out = []
  for repeated in (False, True):
    queues = [groups[key] for key in sorted(groups) if key[0] == repeated]
    while any(queues):
      out += [queue.pop(0) for queue in queues if queue]
  return out


def clips(examples: Sequence[Example]) -> list[dict[str, Any]]:
  """Returns what the template shows of each example."""
  pictures = _pictures([example.frames for example in examples])
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
  # Whatever is looked at has a row of its own.
  apart = {methods_lib.VANILLA} - {method for method, _ in example.views}
  methods = [name for name in example.answers if name not in apart]
  ratios = dict.fromkeys(r for name in methods for r in example.answers[name])
  rows = []
  for name in methods:
    row = example.answers[name]
    cells = [
      {"ratio": ratio_key(r), "said": _brief(row.get(r))} for r in ratios
    ]
    rows.append({"name": name, "cells": cells})
  vanilla = None
  if apart & example.answers.keys():
    (vanilla,) = map(_brief, example.answers[methods_lib.VANILLA].values())
  return {"ratios": list(ratios), "rows": rows, "vanilla": vanilla}


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


def _brief(said: Said | None) -> Said | None:
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
