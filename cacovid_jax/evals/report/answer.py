"""The answers to one question in words: a table, and a page with pictures."""

import functools
import os

import rich.box
import rich.table

from cacovid_jax import files, terminal
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
  path = files.check_writable(path, "the report")
  question, source = asked.question, answerer.source(asked.grid)
  frames, clip = source.frames(question.video), source[question.video]
  described = provenance.describe(
    frame_hashes={question.id: clip.frame_hash},
    index_hashes={question.id: clip.index_hash},
    template=answerer.checkpoint.tokenizer.template,
    checkpoint=answerer.checkpoint.identity,
    policies={name: p.identity for name, p in answerer.policies.items()},
  )
  first = min(
    [answer for answer in asked.answers if answer.ratio < 1] or asked.answers,
    key=lambda answer: abs(answer.ratio - viewer.SHOWN_RATIO),
  )
  # Everything kept is the same whatever the method: one more ratio of it.
  method = first.method
  said = {a.ratio: viewer.Said(a.text, a.letter) for a in asked.answers}
  example = viewer.Example(
    question=question,
    frames=frames,
    grid=asked.grid,
    views={(method, answer.ratio): answer.trace for answer in asked.answers},
    answers={method: said},
    shown=(method, first.ratio),
  )
  content = html.page(
    "answer.html.jinja",
    [example],
    question=question,
    lead=_lead(asked),
    note=_note(asked),
    warnings=asked.warnings,
    columns=COLUMNS,
    rows=[_row(asked, answer) for answer in asked.answers],
    provenance=described,
  )
  files.write(path, content)


def show(asked: answerer_lib.ClipAnswers) -> None:
  """Prints the answers, tokens kept and times as a table."""
  console = terminal.Console()
  line = functools.partial(console.print, soft_wrap=True)
  line(f"question: {asked.question.question}")
  line(_lead(asked))
  table = rich.table.Table(box=rich.box.SIMPLE)
  for column in COLUMNS:
    justify = "left" if column in (COLUMNS[0], COLUMNS[-1]) else "right"
    table.add_column(column, justify=justify, overflow="fold")
  for answer in asked.answers:
    table.add_row(*_row(asked, answer))
  console.print(table)
  line(_note(asked))


def _row(asked, answer) -> list[str]:
  """Returns the cells of an answer's row, by `COLUMNS`."""
  stages = ("embed", "scores", "select", "answer")
  times = (*map(answer.milliseconds.get, stages), asked.total(answer))
  text = answer.text or "(nothing)"
  if answer.letter:
    place = question_lib.LETTERS.index(answer.letter)
    text = f"{text} ({asked.question.options[place]})"
  share = answer.kept / asked.num_video
  return [
    answer.method,
    f"{answer.kept} of {asked.num_video} ({100 * share:.3g} %)",
    *("" if time is None else f"{time:.1f}" for time in times),
    text,
  ]


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
  told = "First run: the times include compilation."
  several = f" of {asked.together} questions at once" * (asked.together > 1)
  if asked.warm_up is not None:
    told = (
      f"Times of a second run{several}; the first one, with compilation, took"
      f" {asked.warm_up:.1f} s."
    )
  return (
    "Scores: the policy, or what else the method reads. Answer: prefill and"
    f" decoding. In all: with decoding and the tower. {told}"
  )
