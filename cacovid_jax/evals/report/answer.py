"""The answers to one question in words: a table, and a page with pictures."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from cacovid_jax import errors, files
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import provenance
from cacovid_jax.evals.report import html, viewer
from cacovid_jax.inference import answerer as answerer_lib

COLUMNS = (
  "tokens from", "tokens kept", "embed ms", "scores ms", "select ms",
  "answer ms", "in all ms", "answer",
)  # fmt: skip


def write(
  path: str | os.PathLike,
  answerer: answerer_lib.Answerer,
  asked: answerer_lib.ClipAnswers,
) -> None:
  """Writes an HTML page that shows the kept tokens on the frames.

  Folders that do not exist are made; `asked` is what the answerer returned.
  """
  path = check_path(path)
  source = answerer.source(asked.grid)
  shown = source.frames(asked.question.video)
  clip = source[asked.question.video]
  described = provenance.describe(
    frame_hashes={asked.question.id: clip.frame_hash},
    index_hashes={asked.question.id: clip.index_hash},
    template=answerer.checkpoint.tokenizer.template,
    checkpoint=answerer.checkpoint.identity,
    policies={name: p.identity for name, p in answerer.policies.items()},
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write(path, render(asked, shown, described))


def check_path(path: str | os.PathLike) -> pathlib.Path:
  """Returns the path of a report to be written, if one can be there."""
  path = pathlib.Path(path)
  if path.is_dir():
    raise errors.UserError(
      f"{path} is a folder; give the report a file name in it"
    )
  for parent in path.parents:
    if parent.exists() and not parent.is_dir():
      raise errors.UserError(f"{parent} is no folder; give another --report")
  return path


def render(asked, frames: np.ndarray, provenance: Mapping[str, Any]) -> str:
  """Returns the HTML text of a page that shows the kept tokens.

  Args:
    asked: `answerer.ClipAnswers`.
    frames: uint8[..., h, w, 3], all that the model was shown.
  """
  pruned = [answer for answer in asked.answers if answer.ratio < 1]
  first = min(
    pruned or asked.answers,
    key=lambda answer: abs(answer.ratio - viewer.SHOWN_RATIO),
  )
  # Everything kept is the same whatever the method: one more ratio of it.
  method = first.method
  said = {a.ratio: viewer.Said(a.text, a.letter) for a in asked.answers}
  example = viewer.Example(
    question=asked.question,
    frames=frames,
    grid=asked.grid,
    views={(method, answer.ratio): answer.trace for answer in asked.answers},
    answers={method: said},
    shown=(method, first.ratio),
  )
  facts = {
    "question": asked.question.question,
    "clip": asked.question.id,
    "lead": _lead(asked),
    "note": _note(asked),
    "columns": COLUMNS,
    "provenance": provenance,
  }
  rows = [_row(asked, answer) for answer in asked.answers]
  return html.render_answers(facts, rows, [example])


def show(asked, console: rich.console.Console | None = None) -> None:
  """Prints the answers, tokens kept and times as a table."""
  if console is None:
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:  # A log has no width to keep to.
      console = rich.console.Console(width=120, highlight=False)

  def line(text):
    console.print(text, markup=False, soft_wrap=True)

  line(f"question: {asked.question.question}")
  line(_lead(asked))
  table = rich.table.Table(box=rich.box.SIMPLE)
  for place, column in enumerate(COLUMNS):
    last = place == len(COLUMNS) - 1
    justify = "left" if place == 0 or last else "right"
    table.add_column(column, justify=justify, overflow="fold")
  for answer in asked.answers:
    # Brackets of an answer are no markup.
    table.add_row(*map(rich.text.Text, _row(asked, answer)))
  console.print(table)
  line(_note(asked))


def _row(asked, answer) -> list[str]:
  """Returns the cells of an answer's row, by `COLUMNS`."""
  stages = ("embed", "scores", "select", "answer")
  times = map(answer.milliseconds.get, stages)
  text = answer.text or "(nothing)"
  if answer.letter:
    place = question_lib.LETTERS.index(answer.letter)
    text = f"{text} ({asked.question.options[place]})"
  share = answer.kept / asked.num_video
  return [
    answer.method,
    f"{answer.kept} of {asked.num_video} ({100 * share:.3g} %)",
    *map(_time, (*times, asked.total(answer))),
    text,
  ]


def _time(milliseconds: float | None) -> str:
  return "" if milliseconds is None else f"{milliseconds:.1f}"


def _lead(asked) -> str:
  """Returns what was shown to the model, and what that took."""
  T, H, W = asked.grid
  clip = asked.clip
  return (
    f"{asked.question.id}: {clip.num_frames} frames, {clip.duration:.1f} s;"
    f" shown as {T} x {H} x {W} = {asked.num_video} tokens (time,"
    f" rows, columns). Decoding {asked.milliseconds['decode']:.1f} ms,"
    f" vision tower {asked.milliseconds['tower']:.1f} ms, once for all rows."
  )


def _note(asked) -> str:
  """Returns what the times include and what they do not."""
  stages = (
    "Scores: the policy, or what else the method reads. Answer: prefill and"
    " decoding. In all: with decoding and the tower."
  )
  if asked.warm_up is None:
    return f"{stages} First run: the times include compilation."
  return (
    f"{stages} Times of a second run; the first one, with compilation, took"
    f" {asked.warm_up:.1f} s."
  )
