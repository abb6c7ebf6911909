"""report.html: one static file that shows an evaluation.

No scripts, no network: charts are inline SVG, frames are data URIs, and the
page forbids everything else. All text of the data set is escaped.
"""

import base64
import collections
import dataclasses
import functools
import importlib.resources
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from cacovid_jax.data import questions as questions_lib
from cacovid_jax.evals import plots, results, runner

# Pixels of a frame's longer side in the file.
_FRAME_SIDE = 168
_SHOWN_RATIO = 0.1
_STRONG = "#0b5fa5"
_COLOURS = (
  "#b4541a", "#2f7d4f", "#8a4fa3", "#8c7300", "#b03060", "#4d7c8a", "#6b6257",
  "#c2762b", "#5564a8",
)  # fmt: skip
# Reward curves of the training metrics: name, title, colour, strong, dashed.
_CURVES = (
  ("reward_token", "token mode, mean", _STRONG, False, False),
  ("reward_token_greedy", "token mode, greedy", _STRONG, True, False),
  ("reward_frame", "frame mode, mean", "#b4541a", False, False),
  ("reward_frame_greedy", "frame mode, greedy", "#b4541a", True, False),
  ("reward_content", "content control", "#6b6b70", False, True),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One question, its clip, and what a method kept of it.

  Attributes:
    question: the question.
    frames: uint8[T, h, w, 3].
    grid: (T, H, W).
    method: whose selection is shown.
    ratio: retention ratio.
    trace: answer, kept tokens and scores.
    others: label -> letter of other methods at the same ratio.
    decisive: tokens that decide the question; empty if not known.
  """

  question: questions_lib.Question
  frames: np.ndarray
  grid: tuple[int, int, int]
  method: str
  ratio: float
  trace: runner.Trace
  others: Mapping[str, str]
  decisive: frozenset[int]

  @property
  def right(self) -> bool:
    return self.trace.letter == self.question.answer

  @property
  def known(self) -> bool:
    """Whether there is a right answer to compare with."""
    return bool(self.question.answer)


def choose_examples(
  table: results.Table,
  answers: Any,
  evaluator: runner.Evaluator,
  decisive: Mapping[str, Sequence[int]],
  count: int,
  *,
  failures: Mapping[tuple[str, float], runner.Failure] | None = None,
) -> list[Example]:
  """Returns right and wrong answers, half each as far as there are such.

  Clips differ from each other where possible, and kinds of question take turns.
  The choice depends on the answers alone.
  """
  failures = failures or {}
  ratio = min(table.ratios, key=lambda r: (abs(r - _SHOWN_RATIO), r))
  method = table.shown_method(ratio, failures)
  if method is None:
    return []
  methods = {
    method.label: method
    for method in table.methods
    if (method.spec, ratio) not in failures
  }
  cell = runner.Cell(method, ratio, table.seeds[0] if method.per_seed else 0)
  usable = [
    question
    for question in table.questions
    if question.lettered and "fault" not in answers[cell.key(question.id)]
  ]
  right = _by_turns([q for q in usable if _score(answers, cell, q) == 1])
  wrong = _by_turns([q for q in usable if _score(answers, cell, q) < 1])
  half = count // 2
  num_wrong = min(len(wrong), max(half, count - len(right)))
  picked = right[: count - num_wrong] + wrong[:num_wrong]
  examples = []
  for question in picked:
    others = {
      runner.VANILLA: _letter(answers, runner.Cell(None, 1, 0), question)
    }
    for label, other in methods.items():
      seed = table.seeds[0] if other.per_seed else 0
      if other is not method:
        others[label] = _letter(
          answers, runner.Cell(other, ratio, seed), question
        )
    grid = evaluator.grid_of(question)
    examples.append(
      Example(
        question=question,
        frames=_first_of_slices(
          evaluator.source.frames(question.video), grid[0]
        ),
        grid=grid,
        method=method.label,
        ratio=ratio,
        trace=evaluator.trace(question, method, ratio),
        others=others,
        decisive=frozenset(decisive.get(question.id, ())),
      )
    )
  return examples


def _first_of_slices(frames: np.ndarray, num_slices: int) -> np.ndarray:
  """Returns one frame for each row of the grid's first axis."""
  return frames[:: -(-len(frames) // num_slices)]


def _score(answers, cell, question) -> float:
  return answers[cell.key(question.id)]["score"]


def _letter(answers, cell, question) -> str:
  return answers[cell.key(question.id)]["letter"]


def _by_turns(questions):
  """Returns questions, new clips first, kinds of question taking turns."""
  groups = collections.defaultdict(list)
  seen = set()
  for question in sorted(questions, key=_shuffled):
    again = question.video in seen
    seen.add(question.video)
    groups[again, question.category or ""].append(question)
  out = []
  for repeated in (False, True):
    queues = [groups[key] for key in sorted(groups) if key[0] == repeated]
    while any(queues):
      out += [queue.pop(0) for queue in queues if queue]
  return out


def _shuffled(question):
  return questions_lib.question_hash(question.id), question.id


def write(
  path: str | os.PathLike,
  out: Mapping[str, Any],
  examples: Sequence[Example],
  curves: Sequence[Mapping[str, Any]] = (),
) -> None:
  """Writes the report, all or nothing.

  Args:
    path: of the HTML file.
    out: results.json.
    examples: see `choose_examples`.
    curves: lines of a training run's metrics.jsonl.
  """
  write_page(path, render(out, examples, curves))


def write_page(path: str | os.PathLike, text: str) -> None:
  """Writes an HTML file so that a reader sees the old one or the new one."""
  path = pathlib.Path(path)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def render(
  out: Mapping[str, Any],
  examples: Sequence[Example],
  curves: Sequence[Mapping[str, Any]] = (),
) -> str:
  """Returns the HTML text of the report."""
  rows = {**out["methods"], **out["oracles"]}
  ratios = list(next(iter(rows.values())))
  shown = min(ratios, key=lambda r: (abs(float(r) - _SHOWN_RATIO), r))
  return (
    _templates()
    .get_template("report.html.jinja")
    .render(
      out=out,
      ratios=ratios,
      shown=shown,
      rows=_rows(out, ratios),
      reference=results.REFERENCE,
      cards=_cards(out, ratios),
      ratio_chart=_ratio_chart(out, ratios),
      reward_chart=_reward_chart(curves),
      breakdown=_breakdown(out, rows, shown),
      clips=[_clip(example) for example in examples],
      num_right=sum(example.right for example in examples),
    )
  )


def render_answers(
  facts: Mapping[str, Any],
  rows: Sequence[Sequence[str]],
  examples: Sequence[Example],
) -> str:
  """Returns the HTML text of a page about one question.

  Args:
    facts: `question`, `clip`, `lead` and `note` in words, `columns` of the
      table, and `provenance` as in results.json.
    rows: the table's cells, in words; the first column is its name.
    examples: what is shown frame by frame.
  """
  return (
    _templates()
    .get_template("answer.html.jinja")
    .render(
      facts=facts, rows=rows, clips=[_clip(example) for example in examples]
    )
  )


@functools.cache
def _templates() -> jinja2.Environment:
  folder = importlib.resources.files("cacovid_jax.evals") / "templates"

  def source(name):
    return (folder / name).read_text(encoding="utf-8")

  environment = jinja2.Environment(
    loader=jinja2.FunctionLoader(source),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["percent"] = _percent
  environment.filters["points"] = _points
  environment.filters["options"] = _options
  environment.filters["grids"] = results.grid_words
  return environment


def _percent(value: float, digits: int = 1) -> str:
  return f"{100 * value:.{digits}f}"


def _points(value: float) -> str:
  """Returns a difference in percentage points, with a true minus sign."""
  return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _options(spec: str) -> str:
  """Returns the options of a method's spec, as "layer = 3"."""
  name, _, query = spec.partition("?")
  return query.replace("&", ", ").replace("=", " = ") or name


def _cards(out, ratios):
  """Returns (title, figure, note) of the figures on top."""
  cards = [
    (
      "vanilla",
      f"{_percent(out['vanilla']['accuracy'])} %",
      f"all {out['vanilla']['kept_tokens']} video tokens",
    )
  ]
  row = out["methods"].get(results.REFERENCE, {})
  for ratio in ratios:
    cell = row.get(ratio)
    if cell and cell["status"] == "ok":
      note = f"{_number(cell['kept_tokens'])} tokens"
      if cell["of_vanilla"] is not None:
        note += f", {_percent(cell['of_vanilla'])} % of vanilla"
      title = f"{results.REFERENCE} at {_percent(float(ratio), 0)} %"
      cards.append((title, f"{_percent(cell['accuracy'])} %", note))
  return cards


def _number(value) -> str:
  return f"{value:g}" if value == int(value) else f"{value:.1f}"


def _rows(out, ratios):
  """Returns the rows of the main table, best of the methods marked."""
  differences = {
    (entry["method"], entry["ratio"]): entry
    for entry in out["paired"]
    if entry["vs"] == results.REFERENCE
  }
  best = {
    ratio: max(
      (row[ratio].get("accuracy", -1) for row in out["methods"].values()),
      default=-1,
    )
    for ratio in ratios
  }
  rows = []
  for oracle, group in ((False, out["methods"]), (True, out["oracles"])):
    for name, row in group.items():
      cells = []
      for ratio in ratios:
        cell = dict(row[ratio])
        if cell["status"] == "ok":
          cell["best"] = not oracle and cell["accuracy"] == best[ratio]
          cell["difference"] = differences.get((name, ratio))
        cells.append(cell)
      rows.append(
        {
          "name": name,
          "oracle": oracle,
          "cells": cells,
          "options": row[ratios[0]].get("options"),
          "note": row[ratios[0]].get("note", ""),
        }
      )
  return rows


def _breakdown(out, rows, ratio):
  """Returns groups of questions, and the accuracies of every row in them."""
  order = {"short": 0, "medium": 1, "long": 2}
  groups = []
  for field in ("by_category", "by_duration"):
    found = out["vanilla"][field]
    for name in sorted(found, key=lambda name: (order.get(name, 3), name)):
      first = bool(groups) and groups[-1]["field"] != field
      n = found[name]["n"]
      groups.append({"field": field, "name": name, "n": n, "first": first})

  def values(cell):
    found = [cell.get(g["field"], {}).get(g["name"]) for g in groups]
    return [group and group["accuracy"] for group in found]

  table = [("vanilla", values(out["vanilla"]))]
  table += [(name, values(row[ratio])) for name, row in rows.items()]
  return {"groups": groups, "rows": table} if groups else None


def _ratio_chart(out, ratios):
  lines = []
  rows = list(out["methods"].items()) + list(out["oracles"].items())
  for place, (name, row) in enumerate(rows):
    points = []
    for ratio in sorted(ratios, key=float):
      cell = row[ratio]
      if cell["status"] == "ok":
        low, high = cell["ci95"]
        value = cell["accuracy"]
        points.append((100 * float(ratio), 100 * value, 100 * low, 100 * high))
    strong = name == results.REFERENCE
    colour = _STRONG if strong else _COLOURS[place % len(_COLOURS)]
    if points:
      lines.append(
        plots.Line(name, points, colour, strong, name in out["oracles"])
      )
  if not lines or len(ratios) < 2:
    return None
  return plots.line_chart(
    lines,
    x_label="video tokens kept (%, logarithmic)",
    y_label="accuracy (%)",
    x_ticks=[
      (100 * float(r), f"{100 * float(r):g}") for r in sorted(ratios, key=float)
    ],
    rules=[
      plots.Rule("vanilla", 100 * out["vanilla"]["accuracy"]),
      plots.Rule("guessing", 100 * out["chance"]),
    ],
    log_x=True,
    most=100,
    # A line of text for each name.
    height=max(460, 18 * (len(lines) + 6)),
  )


def _reward_chart(curves):
  """Returns the reward curves, smoothed over a twentieth of the run."""
  lines = []
  for name, title, colour, strong, dashed in _CURVES:
    found = [
      (line["step"], line[name])
      for line in curves
      if line.get(name) is not None
    ]
    if len(found) < 2:
      continue
    means = plots.smooth([value for _, value in found], len(found) // 20 or 1)
    points = [
      (step, mean, mean, mean)
      for (step, _), mean in zip(found, means, strict=True)
    ]
    lines.append(plots.Line(title, points, colour, strong, dashed))
  if not lines:
    return None
  last = max(point[0] for line in lines for point in line.points)
  ticks = [x for x in plots.nice_ticks(0, last) if x <= last and x % 1 == 0]
  return plots.line_chart(
    lines,
    x_label="training step",
    y_label="mean reward",
    x_ticks=[(x, f"{x:g}") for x in ticks],
    markers=False,
    height=330,
  )


def _clip(example: Example) -> dict[str, Any]:
  """Returns what the template shows of an example."""
  T, H, W = example.grid
  kept = set(example.trace.index.tolist())
  heat = _heat(example.trace.token_gap)
  frame_share = _softmax(example.trace.frame_gap)
  frames = []
  for t in range(T):
    tokens = range(t * H * W, (t + 1) * H * W)
    frames.append(
      {
        "number": t + 1,
        "image": _data_uri(example.frames[t]),
        "kept": [_place(i, H, W) for i in tokens if i in kept],
        "decisive": [_place(i, H, W) for i in tokens if i in example.decisive],
        "heat": None
        if heat is None
        else [(*_place(i, H, W), heat[i]) for i in tokens],
        "share": None if frame_share is None else float(frame_share[t]),
        "gap": None
        if frame_share is None
        else f"{example.trace.frame_gap[t]:+.2f}".replace(
          "-", "\N{MINUS SIGN}"
        ),
      }
    )
  question = example.question
  decisive = len(example.decisive)
  return {
    "question": question,
    "options": [
      (letter, text, letter == question.answer, letter == example.trace.letter)
      for letter, text in zip(
        questions_lib.LETTERS, question.options, strict=False
      )
    ],
    "right": example.right,
    "known": example.known,
    "letter": example.trace.letter or "no letter",
    "answer": example.trace.text,
    "method": example.method,
    "others": [
      (label, letter or "none", letter == question.answer)
      for label, letter in example.others.items()
    ],
    "ratio": f"{_percent(example.ratio, 0)} %",
    "num_kept": len(kept),
    "num_video": T * H * W,
    "decisive": decisive,
    "decisive_kept": len(example.decisive & kept),
    "frames": frames,
    "grid": (H, W),
    # Of the largest share, so that bars can be compared within a clip.
    "most": None if frame_share is None else float(frame_share.max()),
  }


def _place(token: int, H: int, W: int) -> tuple[int, int]:
  """Returns (column, row) of a token in its frame."""
  place = token % (H * W)
  return place % W, place // W


def _heat(gap) -> list[str] | None:
  """Returns a CSS colour per token: paper to ink blue, over the clip.

  The extreme 2 % at either end share a colour, so that one outlier does not
  wash out the rest.
  """
  if gap is None:
    return None
  low, high = np.quantile(gap, [0.02, 0.98])
  scaled = np.clip((gap - low) / max(high - low, 1e-12), 0, 1)
  stops = np.array(
    [[247, 245, 240], [191, 214, 230], [72, 138, 190], [8, 48, 107]], float
  )
  place = scaled * (len(stops) - 1)
  lower = np.minimum(place.astype(int), len(stops) - 2)
  rest = (place - lower)[:, None]
  colours = stops[lower] * (1 - rest) + stops[lower + 1] * rest
  return ["#%02x%02x%02x" % tuple(c) for c in colours.round().astype(int)]  # noqa: UP031


def _softmax(gap):
  if gap is None:
    return None
  shifted = np.exp(gap - gap.max())
  return shifted / shifted.sum()


def _data_uri(frame: np.ndarray) -> str:
  """Returns a JPEG of uint8[h, w, 3] as a data URI."""
  image = Image.fromarray(frame)
  image.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=85, subsampling=0)
  text = base64.b64encode(buffer.getvalue()).decode("ascii")
  return f"data:image/jpeg;base64,{text}"
