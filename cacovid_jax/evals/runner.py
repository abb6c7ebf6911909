"""Asks a video model the same questions with many selections of its tokens.

Per batch of questions: each clip is encoded once, the whole prompts are
embedded once, and side information (policy scores, attention of the prompt's
last token, the vision tower's) is computed only if a method to be run looks at
it. Methods that keep the same number of tokens share one answering program; the
whole prompt has one of its own, and so has each method that acts inside the
language model, at each ratio. Shapes are static: every batch has the same size
and length, the last one padded.

Where the grid follows the shape of a clip, questions are grouped by it: a batch
holds clips of one grid, and each grid has its own set of programs.

A method that cannot be run at a ratio does not stop the others: `run` returns
why, and the table shows it.

Letters: B batch, N video tokens, K kept tokens, T frames.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cacovid_jax import compressors, errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import answer_log, letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import asker as asker_lib
from cacovid_jax.evals import benchmarks, prompting, provenance, scoring
from cacovid_jax.evals import programs as programs_lib
from cacovid_jax.inference import clip_queue
from cacovid_jax.policy import loading

VANILLA = "vanilla"
# What answer logs know of a question, under the names that they have for it.
# The right answer is among it: scores are kept in the log. A clip that is not
# there yet may turn up in another folder with another ending.
_QUESTION = {
  "id": lambda question: question.id,
  "video": lambda question: pathlib.PurePosixPath(question.video).stem,
  "question": lambda question: question.question,
  "options": lambda question: question.options,
  "answer": lambda question: question.answer,
  "problem_type": lambda question: question.problem_type,
  "duration": lambda question: question.duration,
  "category": lambda question: question.category,
  "groups": lambda question: question.groups,
  "source": lambda question: question.source,
  "prompt": lambda question: question.prompt,
  "stream": lambda question: question.stream,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """A compressor in a table.

  Attributes:
    label: its row's name, unique in a run.
    spec: name and options in full; answers are kept under it, so that a row
      whose options were chosen anew is not mistaken for what it was.
    compressor: the rule, before or inside the language model.
    policy: name of the policy whose scores it follows.
  """

  label: str
  spec: str
  compressor: Any
  policy: str = ""

  @classmethod
  def parse(cls, spec: str) -> "Method":
    """Returns the method of `name?option=value`, or `label=name?option=value`.

    Without a label, the row is called as the spec reads, less the path of a
    method of one's own. One option is the evaluation's: `policy=NAME` follows
    another policy than the first one.
    """
    label, spec = split_label(spec)
    name, options = compressors.parse(spec)
    policy = str(options.pop("policy", ""))
    compressor = compressors.get(name, **options)
    # Answers of a file that has changed since are not its own.
    if compressor.fingerprint:
      spec = f"{spec}#{compressor.fingerprint}"
    return cls(label, spec, compressor, policy)

  @property
  def needs(self) -> frozenset[str]:
    return self.compressor.requires

  @property
  def per_seed(self) -> bool:
    """True if the evaluation seed changes its answers."""
    seeded = {"untrained_scores", "other_scores"}
    return self.compressor.stochastic or bool(seeded & self.needs)


def split_label(text: str) -> tuple[str, str]:
  """Returns (label, spec) of `label=spec`, or of a spec alone."""
  text = text.strip()
  label, equals, spec = text.partition("=")
  # The first "=" of a spec stands behind the "?" of its options.
  if equals and "?" not in label:
    return label, spec
  return text.rpartition(".py:")[2], text


@dataclasses.dataclass(frozen=True)
class Settings:
  """What an evaluation's answers depend on besides weights and questions.

  Attributes:
    num_frames: T.
    batch_size: B, questions asked at once.
    max_new_tokens: longest answer in tokens.
    rule: how letters are taken from answers, see `scoring`.
  """

  num_frames: int = 16
  batch_size: int = 8
  max_new_tokens: int = 16
  rule: str = "paper"

  @property
  def identity(self) -> dict[str, Any]:
    """As answer logs have it; names here do not follow those of attributes."""
    return {
      "num_frames": self.num_frames,
      "batch_size": self.batch_size,
      "max_new_tokens": self.max_new_tokens,
      "rule": self.rule,
    }

  def __post_init__(self):
    for field in ("num_frames", "batch_size", "max_new_tokens"):
      if getattr(self, field) < 1:
        raise errors.UserError(
          f"evals.{field}={getattr(self, field)} must be at least 1"
        )
    if self.rule not in letters.EXTRACTORS:
      raise errors.UserError(
        f"evals.rule={self.rule!r}: use {' or '.join(letters.EXTRACTORS)}"
      )


class Trace(NamedTuple):
  """One question's selection, opened up for a viewer.

  Attributes:
    text: the answer.
    letter: the option letter in it, "" if none.
    index: int32[K] kept tokens; of methods that act inside the language model,
      those left in its last layer.
    token_gap: float32[N] keep - drop, None for methods without a policy.
    frame_gap: float32[T], likewise.
  """

  text: str
  letter: str
  index: np.ndarray
  token_gap: np.ndarray | None
  frame_gap: np.ndarray | None


class Kept(NamedTuple):
  """What a method kept of one question's clip; fields as in `Trace`."""

  index: np.ndarray
  token_gap: np.ndarray | None = None
  frame_gap: np.ndarray | None = None


class Failure(NamedTuple):
  """Why a method cannot be run at a ratio.

  Attributes:
    reason: one line.
    minimum_ratio: the lowest ratio that it can, where the method knows.
    batch: number of the batch that showed it, -1 before any was asked.
  """

  reason: str
  minimum_ratio: float | None = None
  batch: int = -1


class NothingToAsk(errors.UserError):
  """None of the methods can be run; the message is the first one's reason."""


class Cell(NamedTuple):
  """One thing to ask all questions with: a row, column and seed."""

  method: Method | None  # None is vanilla.
  ratio: float
  seed: int

  def key(self, question: str) -> answer_log.Key:
    return answer_log.Key(self.spec, self.ratio, self.seed, question)

  @property
  def spec(self) -> str:
    return self.method.spec if self.method else VANILLA

  @property
  def place(self) -> tuple[str, float]:
    """Where it stands in a table, whatever the seed: (spec, ratio)."""
    return self.spec, self.ratio


def cells(
  methods: Sequence[Method], ratios: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
  """Returns vanilla and every method at every ratio, seeds where they count.

  Rows of one spec share their answers.
  """
  by_spec = {method.spec: method for method in reversed(methods)}
  methods = [method for method in methods if by_spec[method.spec] is method]
  out = [Cell(None, 1.0, 0)]
  for ratio in ratios:
    for method in methods:
      used = seeds if method.per_seed else (0,)
      out += [Cell(method, ratio, seed) for seed in used]
  return out


class Tools(NamedTuple):
  """What clips of one grid are asked about with.

  Attributes:
    grid: (T, H, W).
    prompts: of all questions that may be asked.
    programs: compiled functions.
  """

  grid: tuple[int, int, int]
  prompts: prompting.Prompts
  programs: programs_lib.Programs

  @property
  def num_video(self) -> int:
    """N, the video tokens of a clip."""
    return math.prod(self.grid)


class Evaluator:
  """A model, its prompts and its programs; `run` asks, the ledger keeps.

  Attributes:
    settings: of the evaluation.
    source: of the clips' features.
    seconds: spent so far, by what they were spent on.
    policies: by name; the first one is what plain `cacovid` follows.
    checkpoint: the base model.
    decisive: question id -> tokens that decide it, where known.
    task: how answers are scored.
    mesh: that shares a batch; None is one device.
  """

  def __init__(
    self,
    checkpoint: Any,
    source: clip_queue.ClipQueue,
    questions: Sequence[question_lib.Question],
    settings: Settings,
    *,
    policies: Mapping[str, loading.LoadedPolicy] | None = None,
    decisive: Mapping[str, Sequence[int]] | None = None,
    task: benchmarks.Task | None = None,
    programs: programs_lib.Programs | None = None,
    mesh: Mesh | None = None,
  ):
    """Prepares; compiles and computes nothing yet.

    Args:
      checkpoint: `models.checkpoints.Checkpoint` with a tokenizer.
      source: features of the questions' clips, with what `wanted` lists.
      questions: every question that will be asked.
      settings: see there.
      policies: by name; the first one is what plain `cacovid` follows.
      decisive: question id -> tokens that decide it, where known.
      task: how answers are scored; None is as of prepared data.
      programs: of an earlier evaluator of this checkpoint and number of new
        tokens, so that nothing compiles twice for clips of its grid; None makes
        new ones.
      mesh: whose `data` axis shares the questions of a batch, if their number
        divides; None is one device.
    """
    self.settings = settings
    self.source = source
    self.mesh = _usable(mesh, settings.batch_size)
    self.seconds = collections.defaultdict(float)
    self.policies = dict(policies or {})
    self.checkpoint = checkpoint
    self.decisive = decisive or {}
    self.task = task or benchmarks.task(benchmarks.PREPARED)
    # What `cacovid_other_question` draws from; in a run, what is being asked.
    self._pool = _by_id(questions)
    self._texts = prompting.Texts(checkpoint, questions)
    source.survey(question.video for question in questions)
    self._tools: dict[tuple[int, int, int], Tools] = {}
    if programs is not None:
      self._tools[programs.grid] = self._make_tools(programs.grid, programs)
    for question in questions:
      # Prompts that are too long are told before anything runs.
      num_video = self.tools(question).num_video
      tokens = self.decisive.get(question.id)
      if tokens and not 0 <= min(tokens) <= max(tokens) < num_video:
        raise errors.UserError(
          f"decisive.jsonl: the tokens of {question.id} lie outside the model's"
          f" grid {self.tools(question).grid}; was the data made for another"
          " model or frame count?"
        )
    self._untrained = {}

  @property
  def grid(self) -> tuple[int, int, int]:
    """(T, H, W) of the clips; where they differ, of most of them."""
    return self.source.grid

  @property
  def programs(self) -> programs_lib.Programs:
    """The compiled functions for clips of `grid`."""
    return self._of_grid(self.grid).programs

  @property
  def num_compiled(self) -> int:
    """Programs compiled so far, for all grids; the vision tower's aside."""
    return sum(tools.programs.num_compiled for tools in self._tools.values())

  def grid_of(self, question: question_lib.Question) -> tuple[int, int, int]:
    """Returns (T, H, W) of the clip of a question."""
    return tuple(self.source.grid_of(question.video))

  def tools(self, question: question_lib.Question) -> Tools:
    """Returns what a question is asked with; made once for a grid."""
    return self._of_grid(self.grid_of(question))

  def _of_grid(self, grid: tuple[int, int, int]) -> Tools:
    if grid not in self._tools:
      programs = programs_lib.Programs(
        self.checkpoint, grid, self.settings.max_new_tokens, self.mesh
      )
      self._tools[grid] = self._make_tools(grid, programs)
    return self._tools[grid]

  def _make_tools(self, grid, programs) -> Tools:
    prompts = prompting.Prompts(
      self.checkpoint, self._texts, grid, self.settings.batch_size
    )
    return Tools(grid, prompts, programs)

  def identity(
    self, questions: Sequence[question_lib.Question]
  ) -> dict[str, Any]:
    """Returns what the answers to `questions` depend on, for a ledger."""
    return {
      "checkpoint": self.checkpoint.identity["sha256"],
      "dtype": str(jnp.dtype(self.checkpoint.model.dtype)),
      "policies": {name: p.identity for name, p in self.policies.items()},
      "questions": self._digest(questions),
      "settings": self.settings.identity,
      "template": provenance.digest(self.checkpoint.tokenizer.template),
      **self.source.identity,
      "task": self.task.name,
    }

  def _digest(self, questions) -> str:
    """Returns a sha256 of all that is known of these questions.

    A clip that is not there yet has no grid: prompts are as of clips of one
    token.
    """
    digest = hashlib.sha256()
    for question in _by_id(questions):
      fields = {name: get(question) for name, get in _QUESTION.items()}
      digest.update(json.dumps(fields, sort_keys=True).encode() + b"\0")
      digest.update(self._texts.prompt(question.id, (1, 1, 1)).ids.tobytes())
    return digest.hexdigest()

  def run(
    self,
    questions: Sequence[question_lib.Question],
    cells: Sequence[Cell],
    ledger: answer_log.Ledger,
    *,
    description: str = "evaluate",
    shard: tuple[int, int] = (0, 1),
  ) -> dict[tuple[str, float], Failure]:
    """Asks what the ledger lacks, batch by batch, and writes it down.

    The composition of batches depends on the questions and the shapes of their
    clips alone, so that an evaluation that was stopped, or shared among several
    processes, gives the same answers.

    Args:
      questions: to ask.
      cells: to ask them with.
      ledger: of the answers.
      description: of the progress bar.
      shard: (i, n): batches i, i + n, i + 2 n, ... are asked.

    Returns:
      Cell.place -> why it could not be run, the lowest ratio known. Nothing of
      it is kept in the ledger, so that what was mended is tried again.

    Raises:
      NothingToAsk: no method can be run.
    """
    failures = {}
    batches = self.batches(questions)
    grids = {self.grid_of(batch[0]): batch[0] for batch in batches}
    for cell in cells:
      if cell.method is not None:
        for grid, example in grids.items():
          base.budget(grid, cell.ratio)
          if cell.place not in failures:
            self._note(failures, cell, example, self._check)
    self._check_any_left(cells, failures)
    self._pool = _by_id(questions)
    index, count = shard
    own = list(enumerate(batches))[index::count]
    total = len(cells) * sum(len(batch) for _, batch in own)
    with progress_lib.Progress(total, description=description) as progress:
      done = 0
      for place, (number, batch) in enumerate(own):
        self._confirm_faults(batch, cells, ledger)
        todo = _lacking(batch, cells, ledger, failures)
        # What is known, and what cannot be run, is no work that is left.
        done += len(batch) * (len(cells) - len(todo))
        if todo:
          following = self._following(own, place, cells, ledger, failures)
          ahead = [*(question.video for question in batch), *following]
          self.source.discard(keep=ahead)
          self.source.prefetch(ahead)

          def tell(asked, what, start=done, rows=batch):
            progress.update(start + asked * len(rows), note=what)

          ledger.add(self._ask(batch, todo, failures, number, tell))
          done += len(batch) * len(todo)
          self._check_any_left(cells, failures)
        progress.update(done)
    self.source.discard()
    return failures

  def _confirm_faults(self, batch, cells, ledger) -> None:
    """Keeps the answers about clips that still cannot be used, unasked."""
    for question in batch:
      keys = [cell.key(question.id) for cell in cells]
      known = {key: ledger.fault(key) for key in keys if ledger.fault(key)}
      if known:
        fault = self.source[question.video].fault
        size = self.tools(question).num_video
        ledger.confirm(
          key
          for key, record in known.items()
          if (record["fault"], record["of"]) == (fault, size)
        )

  def _following(self, own, place, cells, ledger, failures) -> list[str]:
    """Returns the clips of the next batch of which something is not known."""
    for _, batch in itertools.islice(own, place + 1, None):
      lacking = _lacking(batch, cells, ledger, failures)
      if not lacking:
        continue
      faulty = {
        question.id: any(
          ledger.fault(cell.key(question.id)) is not None for cell in lacking
        )
        for question in batch
      }
      # Where only faults are left, the other clips are as a rule not needed.
      only_faults = all(
        cell.key(question.id) in ledger or faulty[question.id]
        for question in batch
        for cell in lacking
      )
      return [q.video for q in batch if faulty[q.id] or not only_faults]
    return []

  def batches(
    self, questions: Sequence[question_lib.Question]
  ) -> list[list[question_lib.Question]]:
    """Returns at most B questions each, about clips of one grid.

    Questions about one clip stand side by side.
    """
    groups = collections.defaultdict(list)
    for question in by_clip(questions):
      groups[self.grid_of(question)].append(question)
    size = self.settings.batch_size
    return [
      group[start : start + size]
      for group in groups.values()
      for start in range(0, len(group), size)
    ]

  def trace(
    self, question: question_lib.Question, method: Method | None, ratio: float
  ) -> Trace:
    """Returns one question's answer together with what led to it.

    Args:
      question: one of those that the evaluator was made for.
      method: None is vanilla.
      ratio: retention ratio; vanilla keeps everything.
    """
    cell = Cell(method, ratio, 0)
    if method is not None:
      base.budget(self.grid_of(question), ratio)
      self._check(cell, question)
    asker = asker_lib.Asker(self, [question])
    if asker.faults:
      raise errors.UserError(f"{question.video}: {asker.faults[0]}")
    if method is None:
      text = self._decode(asker.vanilla().ids)[0]
      letter = self._score(question, text).letter
      every = np.arange(self.tools(question).num_video)
      return Trace(text, letter, every, None, None)
    reply = asker.reply(cell)
    text = self._decode(reply.ids)[0]
    letter = self._score(question, text).letter
    (kept,) = self._kept(asker, cell, 1, reply)
    return Trace(text, letter, *kept)

  def kept(
    self, questions: Sequence[question_lib.Question], cells: Sequence[Cell]
  ) -> dict[str, list[Kept]]:
    """Returns question id -> what each cell keeps of its clip.

    Nothing is answered but by methods that choose inside the language model.

    Args:
      questions: of those that the evaluator was made for, about clips that can
        be used.
      cells: of methods; none is vanilla.
    """
    found = {}
    for batch in self.batches(questions):
      asker = asker_lib.Asker(self, batch)
      rows = [self._kept(asker, cell, len(batch)) for cell in cells]
      for place, question in enumerate(batch):
        found[question.id] = [row[place] for row in rows]
    return found

  def _kept(self, asker, cell: Cell, count: int, chosen=None) -> list[Kept]:
    """Returns the first `count` rows of what a cell has `chosen`, opened up."""
    if chosen is None:
      first = cell.method.compressor.selects_first
      chosen = asker.select(cell) if first else asker.reply(cell)
    index, mask = np.asarray(chosen.index), np.asarray(chosen.mask)
    tokens = frames = [None] * count
    field = next((n for n in cell.method.needs if n.endswith("scores")), None)
    if field:
      scores = asker.scores(field, self.policy_name(cell.method), cell.seed)
      tokens = np.asarray(scores.token[..., 1] - scores.token[..., 0])
      frames = np.asarray(scores.frame[..., 1] - scores.frame[..., 0])
    return [
      Kept(index[row][mask[row]], tokens[row], frames[row])
      for row in range(count)
    ]

  def policy_name(self, method: Method) -> str:
    """Returns the name of the policy that a method follows."""
    if not self.policies:
      raise errors.UserError(
        f"{method.label} needs a trained policy; give --policy"
      )
    name = method.policy or next(iter(self.policies))
    if name not in self.policies:
      raise errors.UserError(
        f"{method.label}: there is no policy {name!r}; given:"
        f" {', '.join(self.policies)}"
      )
    return name

  def policy_params(self, field: str, name: str, seed: int):
    """Returns the parameters behind a field of `Aux`."""
    policy = self.policies[name]
    if field != "untrained_scores":
      return policy.params
    if (name, seed) not in self._untrained:
      self._untrained[name, seed] = policy.module.init_from_llm(
        jax.random.key(seed), self.checkpoint.params
      )
    return self._untrained[name, seed]

  def other(self, question: question_lib.Question, seed: int) -> str:
    """Returns the id of another question, see `other_question`."""
    return other_question(question, self._pool, seed)

  @contextlib.contextmanager
  def timed(self, name: str):
    """Adds what the block takes to `seconds`."""
    start = time.perf_counter()
    yield
    self.seconds[name] += time.perf_counter() - start

  def _check(self, cell: Cell, example: question_lib.Question) -> None:
    """Refuses what is known not to run before anything is computed.

    Args:
      cell: what is to be run.
      example: a question about a clip of the grid in question.
    """
    method = cell.method
    for need in sorted(method.needs):
      if need.endswith("scores"):
        self.policies[self.policy_name(method)]
      elif need in base.VISION_SIGNALS:
        if need not in self.source.want:
          raise errors.UserError(
            f"{method.label} needs {need.replace('_', ' ')}, which the clips"
            " of this evaluation come without"
          )
      elif need not in base.OFFERED:
        raise errors.UserError(
          f"{method.label} needs {need!r}, which this evaluation does not"
          f" offer; it offers {', '.join(base.OFFERED)}"
        )
    self.tools(example).programs.check(method.compressor, cell.ratio)

  def _note(self, failures, cell: Cell, example, action, batch: int = -1):
    """Returns action(cell, example); of a mistake, None and its reason noted.

    Args:
      failures: where a user's mistake is noted.
      cell: what is to be run.
      example: a question of the grid in question.
      action: see above.
      batch: number of the batch that is asked.
    """
    try:
      return action(cell, example)
    except errors.UserError as error:
      lowest = [
        tools.programs.minimum_ratio(cell.method.compressor)
        for tools in self._tools.values()
      ]
      failures[cell.place] = Failure(
        errors.one_line(error),
        max((ratio for ratio in lowest if ratio is not None), default=None),
        batch,
      )
      return None

  def _check_any_left(self, cells, failures) -> None:
    """Refuses to go on where no method can be run."""
    asked = [cell.place for cell in cells if cell.method is not None]
    if asked and all(place in failures for place in asked):
      raise NothingToAsk(failures[asked[0]].reason)

  def _ask(self, questions, todo, failures, number: int, tell):
    """Returns records of one batch of at most B questions.

    Args:
      questions: about clips of one grid.
      todo: cells to ask them with.
      failures: of earlier batches; those of this one are added.
      number: of the batch.
      tell: takes how many cells are done, and what is being done now.
    """
    tell(0, "clips")
    asker = asker_lib.Asker(self, questions)
    num_video = self.tools(questions[0]).num_video
    # One prefill gives both the answers and what methods read of it.
    methods = [cell.method for cell in todo]
    if any(method and "attention" in method.needs for method in methods):
      tell(0, VANILLA)
      asker.vanilla(want_attention=True)
    records = []
    for asked, cell in enumerate(todo):
      if cell.place in failures:
        continue  # With an earlier seed.
      tell(asked, _words(cell))
      if cell.method is None:
        ids = asker.vanilla().ids
        kept = np.full(len(ids), num_video)
        top = None
      else:
        reply = self._note(
          failures,
          cell,
          questions[0],
          lambda cell, _: asker.reply(cell),
          number,
        )
        if reply is None:
          continue
        ids, kept = reply.ids, reply.mask.sum(axis=1)
        top = asker.top_frames(cell)
      texts = self._decode(ids)
      for row, question in enumerate(questions):
        fault = asker.faults.get(row, "")
        text = "" if fault else texts[row]
        # A clip that cannot be used is wrong, whatever a rule would guess.
        scored = scoring.Scored(0.0) if fault else self._score(question, text)
        fields = {
          "text": text,
          "letter": scored.letter,
          "score": scored.score,
          "kept": int(kept[row]),
          "of": num_video,
          **_facts(question),
        }
        if scored.fallback:
          fields["fallback"] = True
        if fault:
          fields["fault"] = fault
        elif cell.method is None:
          clip = self.source[question.video]
          fields["frame_hash"] = clip.frame_hash
          fields["index_hash"] = clip.index_hash
        if cell.method and not cell.method.compressor.selects_first:
          # Before the language model it follows from what was kept.
          fields["equivalent"] = round(float(reply.equivalent[row]), 9)
          if reply.forced[row]:
            fields["forced"] = True
        if top is not None and not fault:
          fields["frames"] = top[row]
        records.append((cell.key(question.id), fields))
    return records

  def _decode(self, ids) -> list[str]:
    decode = self.checkpoint.tokenizer.decode
    return [decode(row).strip() for row in np.asarray(ids)]

  def _score(self, question, text) -> scoring.Scored:
    return self.task.score(question, text, rule=self.settings.rule)


def wanted(methods: Sequence[Method]) -> frozenset[str]:
  """Returns what the clips must bring along for these methods."""
  needs = frozenset().union(*[method.needs for method in methods])
  return needs & base.VISION_SIGNALS


def _lacking(batch, cells, ledger, failures) -> list[Cell]:
  """Returns the cells that some question of a batch is still to be asked."""
  return [
    cell
    for cell in cells
    if cell.place not in failures
    and any(cell.key(question.id) not in ledger for question in batch)
  ]


def _facts(question: question_lib.Question) -> dict[str, Any]:
  """Returns what a line says of its question, for a table made of lines."""
  facts = {
    "video": question.video,
    "answer": question.answer,
    "category": question.category,
    "duration": question.duration,
  }
  if question.groups:
    facts["groups"] = dict(question.groups)
  return {name: value for name, value in facts.items() if value is not None}


def _words(cell: Cell) -> str:
  if cell.method is None:
    return VANILLA
  return f"{cell.method.label} at {100 * cell.ratio:g} %"


def _usable(mesh, batch_size: int) -> Mesh | None:
  """Returns the mesh if it shares the rows of a batch, else None.

  Several processes of a training run each ask all of it.
  """
  if mesh is None or mesh.size == 1 or jax.process_count() > 1:
    return None
  return None if batch_size % mesh.shape["data"] else mesh


def _by_id(questions):
  return sorted(questions, key=lambda question: question.id)


def by_clip(
  questions: Sequence[question_lib.Question],
) -> list[question_lib.Question]:
  """Returns the questions with those about one clip side by side."""
  first = {}
  for place, question in enumerate(questions):
    first.setdefault(question.video, place)
  return sorted(questions, key=lambda question: first[question.video])


def other_question(
  question: question_lib.Question,
  pool: Sequence[question_lib.Question],
  seed: int,
) -> str:
  """Returns the id of a question about another clip, in other words.

  Drawn by the seed and the question's id, the same in every run.
  """
  key = question_lib.question_hash(f"{seed}/{question.drawn_by}")
  rng = np.random.default_rng(key)
  for place in rng.permutation(len(pool)):
    other = pool[int(place)]
    if other.video != question.video and other.prompt != question.prompt:
      return other.id
  raise errors.UserError(
    "cacovid_other_question needs questions about at least two clips"
  )
