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
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.evals import results
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import features
from cacovid_jax.inference import methods as methods_lib

SHOWN_RATIO = 0.1
# Methods whose kept tokens can be looked at, besides the shown one.
_NUM_OTHERS = 3
# Longer side of a frame in pixels, the largest whose files stay within the
# budget; the smallest is taken in any case.
_SIDES = (features.SHOWN_SIDE, 256, 208, 168, 128, 96)
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
  def labels(self) -> list[str]:
    """The frames of each row, counted from 1."""
    count = self.frames_per_slice
    firsts = [t * count + 1 for t in range(self.grid[0])]
    if count == 1:
      return list(map(str, firsts))
    return [f"{first}–{first + count - 1}" for first in firsts]

  @property
  def options(self) -> list[tuple[str, str]]:
    return list(zip(question_lib.LETTERS, self.question.options, strict=False))

  @property
  def said(self) -> Said:
    """What was said from the tokens that are shown first."""
    method, ratio = self.shown
    return self.answers[method][ratio]

  @property
  def kept(self) -> frozenset[int]:
    """The tokens that are shown first."""
    return frozenset(self.views[self.shown].index.tolist())

  @property
  def table(self) -> tuple[Said | None, list[float], Mapping[str, Any]]:
    """What was said: vanilla's if it has no row, ratios, and all rows."""
    rows, vanilla = dict(self.answers), None
    # Whatever is looked at has a row of its own.
    if methods_lib.VANILLA not in {method for method, _ in self.views}:
      if unshown := rows.pop(methods_lib.VANILLA, None):
        (vanilla,) = unshown.values()
    return vanilla, list(dict.fromkeys(itertools.chain(*rows.values()))), rows


def choose(
  table: results.Table,
  answers: Any,
  engine: engine_lib.Engine,
  decisive: Mapping[str, Sequence[int]],
  count: int,
  *,
  failures: evaluator_lib.Failures | None = None,
) -> list[Example]:
  """Returns right and wrong answers, half each of `count` where there are such.

  Right and wrong from what the learned method kept, at the ratio nearest to a
  tenth. Clips differ from each other where possible, and kinds of question take
  turns. The choice depends on the answers alone.
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
  pairs = itertools.product(table.methods, table.ratios)
  asked = [cell(one, r) for one, r in pairs if (one.spec, r) not in failures]
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
  said = collections.defaultdict(dict)
  for cell in (methods_lib.Condition(), *cells):
    found = answers[cell.key(question.id)]
    right = found["score"] == 1
    said[cell.label][cell.ratio] = Said(found["text"], found["letter"], right)
  return dict(said)


def _others(answers, shown, rivals, questions) -> list[str]:
  """Returns the labels of the best methods besides the shown one."""
  name, found = shown.label.partition("?")[0], []
  for cell in rivals:
    label = cell.method.label
    # Oracles know too much.
    if label != shown.label and not cell.method.compressor.oracle:
      scores = [answers[cell.key(q.id)]["score"] for q in questions]
      accuracy = float(np.mean(scores)) if scores else 0.0
      # Other methods before variants of the same one.
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


def frames(examples: Sequence[Example]) -> list[list[dict[str, Any]]]:
  """Returns what the template shows of each example's frames."""
  pictures = _pictures([example.slices for example in examples])
  return list(map(_frames, examples, pictures))


def _frames(example, images) -> list[dict[str, Any]]:
  _, H, W = example.grid
  sets, found = (example.kept, example.decisive), []
  for t, label in enumerate(example.labels):
    kept, decisive = (
      sorted(i - t * H * W for i in tokens if i // (H * W) == t)
      for tokens in sets
    )
    shown = {"label": label, "image": images[t], "num_kept": len(kept)}
    paths = {"kept": _path(kept, W), "decisive": _path(decisive, W)}
    found.append(shown | paths)
  return found


def _path(tokens, width: int) -> str:
  """Returns SVG path data of unit squares, one per token of a frame."""
  return "".join(f"M{i % width} {i // width}h1v1h-1z" for i in tokens)


def data(examples: Sequence[Example]) -> dict[str, Any]:
  """Returns what the script needs, ready for JSON."""
  return {"clips": [_data(example) for example in examples]}


def _data(example) -> dict[str, Any]:
  count = int(np.prod(example.grid))
  views, scores = {}, {}
  for (method, ratio), view in example.views.items():
    views.setdefault(method, {})[f"{ratio:g}"] = _pack(view.index, count)
    # Scores are those of the policy, whatever the ratio.
    if view.token_gap is not None and method not in scores:
      # Shares after the softmax, of the clip's best.
      shares = np.exp(view.frame_gap - np.max(view.frame_gap))
      scores[method] = {
        "tokens": _heat(view.token_gap),
        "frames": [round(float(share), 4) for share in shares],
        "gaps": [round(float(gap), 2) for gap in view.frame_gap],
      }
  method, ratio = example.shown
  return {
    "id": example.question.id,
    "grid": list(example.grid),
    "labels": example.labels,
    "gold": example.question.answer,
    "answers": {
      name: {f"{r:g}": [s.letter, s.brief, s.right] for r, s in row.items()}
      for name, row in example.answers.items()
    },
    "views": views,
    "scores": scores,
    "decisive": _pack(example.decisive, count) if example.decisive else "",
    "shown": [method, f"{ratio:g}"],
  }


def _pack(tokens: Iterable[int], count: int) -> str:
  """Returns a set of tokens as base64 of a bit mask, lowest bit first."""
  bits = np.zeros(count, np.uint8)
  bits[list(tokens)] = 1
  return _base64(np.packbits(bits, bitorder="little").tobytes())


def _heat(gap: np.ndarray) -> str:
  """Returns scores as base64 of a byte each, low to high over the clip."""
  # The extreme 2 % at either end share a value: one outlier does not wash out
  # the rest.
  low, high = np.quantile(gap, [0.02, 0.98])
  scaled = np.clip((gap - low) / max(high - low, 1e-12), 0, 1)
  return _base64((255 * scaled).round().astype(np.uint8).tobytes())


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
