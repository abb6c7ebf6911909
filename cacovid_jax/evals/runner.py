"""Asks a video model the same questions with many selections of its tokens.

Per batch of questions: each clip is encoded once, the whole prompts are
embedded once, and side information (policy scores, attention of the prompt's
last token) is computed only if a method to be run looks at it. All methods
share one answering program per ratio, because all keep the same number of
tokens; the whole prompt has one of its own. Shapes are static: every batch has
the same size and length, the last one padded.

Letters: B batch, L prompt tokens, N video tokens, D width, K kept tokens,
T frames, P position rows.
"""

import collections
import contextlib
import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base
from cacovid_jax.data import questions as questions_lib
from cacovid_jax.evals import clips as clips_lib
from cacovid_jax.evals import ledger as ledger_lib
from cacovid_jax.evals import scoring
from cacovid_jax.models import generation, pruning
from cacovid_jax.training import metrics

VANILLA = "vanilla"
# Prompts are padded to a multiple of this, so that a few texts more or less
# do not mean another program.
_LENGTH_STEP = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
  """A policy to evaluate.

  Attributes:
    module: Linen module; `apply(params, x, positions, video_rows, grid,
      length)` gives `Scores`.
    params: trained parameters.
    identity: digest of the parameters.
  """

  module: Any
  params: Any
  identity: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """A compressor in a table.

  Attributes:
    label: its row's name, unique in a run.
    spec: name and options in full; answers are kept under it, so that a row
      whose options were chosen anew is not mistaken for what it was.
    compressor: the rule.
    policy: name of the policy whose scores it follows.
  """

  label: str
  spec: str
  compressor: base.Compressor
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
    if ".py:" in name:
      # Answers of a file that has changed since are not its own.
      content = pathlib.Path(name.rpartition(":")[0]).read_bytes()
      spec = f"{spec}#{hashlib.sha256(content).hexdigest()[:12]}"
    return cls(label, spec, compressor, policy)

  @property
  def needs(self) -> frozenset[str]:
    return self.compressor.needs

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

  def __post_init__(self):
    for field in ("num_frames", "batch_size", "max_new_tokens"):
      if getattr(self, field) < 1:
        raise errors.UserError(
          f"evals.{field}={getattr(self, field)} must be at least 1"
        )
    if self.rule not in scoring.EXTRACTORS:
      raise errors.UserError(
        f"evals.rule={self.rule!r}: use {' or '.join(scoring.EXTRACTORS)}"
      )


class Batch(NamedTuple):
  """B whole prompts on device.

  Attributes:
    features: float[B, N, D].
    ids: int32[B, L].
    length: int32[B] rows without padding.
    video_start: int32[B] row of the first video token.
    positions: int32[B, P, L].
    next_position: int32[B] of the first generated token.
    seconds: float32[B], from one row of the grid's first axis to the next.
    x: float[B, L, D] embeddings.
  """

  features: jax.Array
  ids: jax.Array
  length: jax.Array
  video_start: jax.Array
  positions: jax.Array
  next_position: jax.Array
  seconds: jax.Array
  x: jax.Array


class Trace(NamedTuple):
  """One question's selection, opened up for a viewer.

  Attributes:
    text: the answer.
    letter: the option letter in it, "" if none.
    index: int32[K] kept tokens.
    token_gap: float32[N] keep - drop, None for methods without a policy.
    frame_gap: float32[T], likewise.
  """

  text: str
  letter: str
  index: np.ndarray
  token_gap: np.ndarray | None
  frame_gap: np.ndarray | None


class Cell(NamedTuple):
  """One thing to ask all questions with: a row, column and seed."""

  method: Method | None  # None is vanilla.
  ratio: float
  seed: int

  def key(self, question: str) -> ledger_lib.Key:
    spec = self.method.spec if self.method else VANILLA
    return ledger_lib.Key(spec, self.ratio, self.seed, question)


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


class Evaluator:
  """A model, its prompts and its programs; `run` asks, the ledger keeps."""

  def __init__(
    self,
    checkpoint: Any,
    source: clips_lib.ClipSource,
    questions: Sequence[questions_lib.Question],
    settings: Settings,
    *,
    policies: Mapping[str, Policy] | None = None,
    decisive: Mapping[str, Sequence[int]] | None = None,
    programs: "Programs | None" = None,
  ):
    """Prepares; compiles and computes nothing yet.

    Args:
      checkpoint: `models.checkpoints.Checkpoint` with a tokenizer.
      source: features of the questions' clips.
      questions: every question that will be asked; the longest sets L.
      settings: see there.
      policies: by name; the first one is what plain `cacovid` follows.
      decisive: question id -> tokens that decide it, where known.
      programs: of an earlier evaluator of this checkpoint, grid and number of
        new tokens, so that nothing compiles twice; None makes new ones.
    """
    self.settings = settings
    self.grid = source.grid
    self.source = source
    self.seconds = collections.defaultdict(float)
    self.policies = dict(policies or {})
    self._checkpoint = checkpoint
    self._decisive = decisive or {}
    # What `cacovid_other_question` draws from: the questions being asked.
    self._pool = []
    self._num_video = self.grid[0] * self.grid[1] * self.grid[2]
    for name, tokens in self._decisive.items():
      if tokens and not 0 <= min(tokens) <= max(tokens) < self._num_video:
        raise errors.UserError(
          f"decisive.jsonl: the tokens of {name} lie outside the model's grid"
          f" {self.grid}; was the data made for another model or frame count?"
        )
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
      raise errors.UserError(
        "the checkpoint has no tokenizer.json; evaluation needs a complete"
        " checkpoint directory"
      )
    self._prompts = {
      question.id: tokenizer.encode_prompt(question.prompt, self._num_video)
      for question in questions
    }
    longest = max(prompt.length for prompt in self._prompts.values())
    self._length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    self._programs = programs or Programs(
      checkpoint, self.grid, settings.max_new_tokens
    )
    self._untrained = {}

  def identity(
    self, questions: Sequence[questions_lib.Question]
  ) -> dict[str, Any]:
    """Returns what the answers to `questions` depend on, for a ledger."""
    prompts = hashlib.sha256()
    for name in sorted(question.id for question in questions):
      prompts.update(name.encode() + b"\0")
      prompts.update(self._prompts[name].ids.tobytes())
    return {
      "checkpoint": self._checkpoint.identity["sha256"],
      "dtype": str(jnp.dtype(self._checkpoint.model.dtype)),
      "policies": {name: p.identity for name, p in self.policies.items()},
      "questions": prompts.hexdigest(),
      "settings": dataclasses.asdict(self.settings),
    }

  def run(
    self,
    questions: Sequence[questions_lib.Question],
    cells: Sequence[Cell],
    ledger: ledger_lib.Ledger,
    *,
    description: str = "evaluate",
  ) -> None:
    """Asks what the ledger lacks, batch by batch, and writes it down.

    The composition of batches depends on the questions alone, so that an
    evaluation that was stopped gives the same answers.
    """
    for cell in cells:
      if cell.method is not None:
        self._check(cell)
    self._pool = sorted(questions, key=lambda question: question.id)
    order = by_clip(questions)
    size = self.settings.batch_size
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    with metrics.Progress(len(order), description=description) as progress:
      for number, batch in enumerate(batches):
        todo = [
          cell
          for cell in cells
          if any(cell.key(question.id) not in ledger for question in batch)
        ]
        if todo:
          ahead = batch + (
            batches[number + 1] if number + 1 < len(batches) else []
          )
          self.source.prefetch(question.video for question in ahead)
          ledger.add(self._ask(batch, todo))
        progress.update(min((number + 1) * size, len(order)))

  def trace(
    self, question: questions_lib.Question, method: Method | None, ratio: float
  ) -> Trace:
    """Returns one question's answer together with what led to it.

    Args:
      question: one of those that the evaluator was made for.
      method: None is vanilla.
      ratio: retention ratio; vanilla keeps everything.
    """
    if method is not None:
      self._check(Cell(method, ratio, 0))
    batch, faults = self._load([question])
    if faults:
      raise errors.UserError(f"{question.video}: {faults[0]}")
    asker = _Asker(self, [question], batch)
    if method is None:
      text = self._decode(asker.vanilla().ids)[0]
      letter = self._letter(question, text)
      return Trace(text, letter, np.arange(self._num_video), None, None)
    selection = asker.select(Cell(method, ratio, 0))
    text = self._decode(asker.answer(selection))[0]
    token_gap = frame_gap = None
    field = next((n for n in method.needs if n.endswith("scores")), None)
    if field:
      scores = asker.scores(field, self._policy_name(method), 0)
      token_gap = np.asarray(scores.token[0, :, 1] - scores.token[0, :, 0])
      frame_gap = np.asarray(scores.frame[0, :, 1] - scores.frame[0, :, 0])
    letter = self._letter(question, text)
    index = np.asarray(selection.index[0])[np.asarray(selection.mask[0])]
    return Trace(text, letter, index, token_gap, frame_gap)

  def _check(self, cell: Cell) -> None:
    base.budget(self.grid, cell.ratio)
    if any(need.endswith("scores") for need in cell.method.needs):
      self.policies[self._policy_name(cell.method)]

  def _policy_name(self, method: Method) -> str:
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

  def _ask(self, questions, todo):
    """Returns records of one batch of at most B questions."""
    batch, faults = self._load(questions)
    asker = _Asker(self, questions, batch)
    # One prefill gives both the answers and what methods read of it.
    methods = [cell.method for cell in todo]
    if any(method and "attention" in method.needs for method in methods):
      asker.vanilla(want_attention=True)
    records = []
    for cell in todo:
      if cell.method is None:
        texts = self._decode(asker.vanilla().ids)
        kept = np.full(len(texts), self._num_video)
      else:
        selection = asker.select(cell)
        texts = self._decode(asker.answer(selection))
        kept = np.asarray(selection.mask.sum(axis=1))
      top = asker.top_frames(cell)
      for row, question in enumerate(questions):
        fault = faults.get(row, "")
        text = "" if fault else texts[row]
        fields = {
          "text": text,
          "letter": self._letter(question, text),
          "score": scoring.score(question, text, rule=self.settings.rule),
          "kept": int(kept[row]),
        }
        if fault:
          fields["fault"] = fault
        elif cell.method is None:
          fields["frame_hash"] = self.source[question.video].frame_hash
        if top is not None and not fault:
          fields["frames"] = top[row]
        records.append((cell.key(question.id), fields))
    return records

  def _load(self, questions):
    """Returns (`Batch`, {row: fault}) of at most B questions."""
    with self._timed("clips"):
      rows = [self.source[question.video] for question in questions]
    faults = {row: clip.fault for row, clip in enumerate(rows) if clip.fault}
    with self._timed("prompts"):
      return self._batch(
        np.stack([clip.features for clip in rows]),
        [question.id for question in questions],
        [clip.seconds_per_slice for clip in rows],
      ), faults

  def _batch(self, features, ids, seconds) -> Batch:
    """Returns the prompts `ids` about `features`, padded to B rows."""
    rows = _pad_rows(len(ids), self.settings.batch_size)
    prompts = [self._prompts[ids[row]] for row in rows]
    padded = self._checkpoint.tokenizer.pad(prompts, self._length)
    seconds = np.asarray(seconds, np.float32)
    seconds = seconds[np.minimum(rows, len(seconds) - 1)]
    placed = [
      self._positions(prompt.ids, gap)
      for prompt, gap in zip(prompts, seconds, strict=True)
    ]
    positions, following = map(np.array, zip(*placed, strict=True))
    features = jnp.asarray(features)
    if features.shape[0] != len(rows):
      features = features[np.array(rows)]
    ids, length, start = map(
      jnp.asarray, (padded.ids, padded.length, padded.video_start)
    )
    # Awaited, so that its time is not taken for that of what follows.
    x = jax.block_until_ready(
      self._programs.embed(self._checkpoint.params, ids, features, start)
    )
    return Batch(
      features,
      ids,
      length,
      start,
      jnp.asarray(positions),
      jnp.asarray(following, jnp.int32),
      jnp.asarray(seconds),
      x,
    )

  def _positions(self, ids, seconds):
    """Returns (int32[P, L], next position), counting on behind the prompt."""
    positions, following = self._checkpoint.model.positions(
      ids, grid=self.grid, seconds_per_slice=float(seconds)
    )
    behind = np.arange(1, self._length - len(ids) + 1, dtype=np.int32)
    behind = positions[:, -1:] + behind
    return np.concatenate([positions, behind], axis=1), following

  def _decode(self, ids) -> list[str]:
    decode = self._checkpoint.tokenizer.decode
    return [decode(row).strip() for row in np.asarray(ids)]

  def _letter(self, question, text) -> str:
    if not question.lettered:
      return ""
    num_options = len(question.options) or 4
    return scoring.extract(
      text, num_options=num_options, rule=self.settings.rule
    )

  def _policy_params(self, field: str, name: str, seed: int):
    policy = self.policies[name]
    if field != "untrained_scores":
      return policy.params
    if (name, seed) not in self._untrained:
      self._untrained[name, seed] = policy.module.init_from_llm(
        jax.random.key(seed), self._checkpoint.params
      )
    return self._untrained[name, seed]

  @contextlib.contextmanager
  def _timed(self, name: str):
    start = time.perf_counter()
    yield
    self.seconds[name] += time.perf_counter() - start


class _Asker:
  """One batch and what has been computed for it so far."""

  def __init__(self, evaluator: Evaluator, questions, batch: Batch):
    self._e, self._questions, self._batch = evaluator, questions, batch
    self._programs = evaluator._programs
    self._params = evaluator._checkpoint.params
    self._scores = {}
    self._blind = {}
    self._vanilla = None

  def vanilla(self, want_attention: bool = False) -> "Vanilla":
    """Returns the answers to the whole prompts; computed once."""
    if self._vanilla is None or (
      want_attention and self._vanilla.attention is None
    ):
      with self._e._timed("vanilla"):
        self._vanilla = jax.block_until_ready(
          self._programs.vanilla(
            self._params, self._batch, want_attention=want_attention
          )
        )
    return self._vanilla

  def scores(self, field: str, name: str, seed: int):
    """Returns the policy's Scores of the batch.

    Args:
      field: field of `Aux` that they are for.
      name: which policy.
      seed: of the untrained policy, or of the draw of another question.
    """
    key = field, name, seed if field != "scores" else 0
    if key not in self._scores:
      batch = self._batch
      if field == "other_scores":
        with self._e._timed("prompts"):
          batch = self._e._batch(
            batch.features, self._others(seed), batch.seconds
          )
      with self._e._timed("policy"):
        scores = self._programs.scores(
          self._e.policies[name].module,
          self._e._policy_params(field, name, seed),
          batch,
        )
        if not _finite(scores):
          raise errors.UserError(
            f"{field.replace('_', ' ')} of policy {name!r} hold NaN or"
            " infinity; check how it was trained"
          )
      self._scores[key] = scores
    return self._scores[key]

  def select(self, cell: Cell) -> base.Selection:
    """Returns the tokens that a method keeps, leading axis B."""
    method = cell.method
    # Whatever it reads is timed apart from the selection itself.
    aux = self._aux(cell)
    keys = self._keys(cell.seed) if method.compressor.stochastic else None
    with self._e._timed(f"select {method.label}"):
      program = self._programs.select(method.compressor, cell.ratio)
      if method.compressor.sees_question:
        selection = program(self._batch.features, aux, keys)
      else:
        selection = self._select_by_clip(program)
      return jax.block_until_ready(selection)

  def answer(self, selection: base.Selection):
    """Returns int32[B, M] ids of the answers to the pruned prompts."""
    num_keep = selection.index.shape[1]
    with self._e._timed(f"answer from {num_keep} tokens"):
      return jax.block_until_ready(
        self._programs.answer(self._params, self._batch, selection)
      )

  def top_frames(self, cell: Cell) -> list[list[int]] | None:
    """Returns all frames of each question, best first, by frame score."""
    if cell.method is None or "scores" not in cell.method.needs:
      return None
    name = self._e._policy_name(cell.method)
    frame = np.asarray(self.scores("scores", name, 0).frame)
    gap = frame[..., 1] - frame[..., 0]
    return np.argsort(-gap, axis=1, kind="stable").tolist()

  def _select_by_clip(self, program):
    """Runs a rule that never sees the question once per clip, not question."""
    names = [question.video for question in self._questions]
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    per_clip = {
      name: program(self._batch.features[row : row + 1], base.Aux(), None)
      for name, row in first.items()
    }
    rows = _pad_rows(len(names), self._e.settings.batch_size)
    return jax.tree.map(
      lambda *leaves: jnp.concatenate(leaves),
      *[per_clip[names[row]] for row in rows],
    )

  def _aux(self, cell: Cell) -> base.Aux:
    parts = {}
    for need in cell.method.needs:
      if need.endswith("scores"):
        name = self._e._policy_name(cell.method)
        parts[need] = self.scores(need, name, cell.seed)
      elif need == "attention":
        parts[need] = self.vanilla(want_attention=True).attention
      elif need == "decisive":
        parts[need] = self._decisive()
      else:
        raise errors.UserError(
          f"{cell.method.label} needs {need!r}, which this evaluation does not"
          f" offer; it offers {', '.join(base.Aux._fields)}"
        )
    return base.Aux(**parts)

  def _decisive(self):
    mask = np.zeros(self._batch.features.shape[:2], bool)
    for row, question in enumerate(self._questions):
      if question.id not in self._e._decisive:
        raise errors.UserError(
          f"decisive.jsonl does not name the tokens of question {question.id}"
        )
      mask[row, list(self._e._decisive[question.id])] = True
    return jnp.asarray(mask)

  def _keys(self, seed: int):
    """Returns one key per question, from the seed and the question's id."""
    hashes = [questions_lib.question_hash(q.id) for q in self._questions]
    rows = _pad_rows(len(hashes), self._e.settings.batch_size)
    hashes = jnp.asarray(np.array(hashes, np.uint32)[np.array(rows)])
    key = jax.random.key(seed)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)

  def _others(self, seed: int) -> list[str]:
    return [
      other_question(question, self._e._pool, seed)
      for question in self._questions
    ]


class Vanilla(NamedTuple):
  """Answers to whole prompts: ids int32[B, M], attention float32[B, layers, N].

  Attention is None unless asked for.
  """

  ids: jax.Array
  attention: jax.Array | None


class Programs:
  """The compiled functions of an evaluation."""

  def __init__(self, checkpoint, grid, max_new_tokens: int):
    self._model, self._grid = checkpoint.model, grid
    self._num_video = grid[0] * grid[1] * grid[2]
    self._ending = dict(
      max_new_tokens=max_new_tokens,
      eos_ids=tuple(checkpoint.eos_ids),
      pad_id=checkpoint.pad_id,
    )
    self.embed = jax.jit(jax.vmap(self._model.embed_prompt, (None, 0, 0, 0)))
    self.vanilla = jax.jit(self._vanilla, static_argnames="want_attention")
    self.scores = jax.jit(self._scores, static_argnums=0)
    self.answer = jax.jit(self._answer)
    self._selects = {}

  def select(self, compressor: base.Compressor, ratio: float):
    """Returns f(features [B, N, D], aux, keys) -> `Selection` [B, ...]."""
    if (compressor, ratio) not in self._selects:
      self._selects[compressor, ratio] = self._select(compressor, ratio)
    return self._selects[compressor, ratio]

  def _select(self, compressor, ratio):
    num_keep = base.budget(self._grid, ratio)

    def one(features, aux, key):
      return compressor.compress(
        features,
        grid=self._grid,
        num_keep=num_keep,
        aux=aux,
        rng=key,
        ratio=ratio,
      )

    return jax.jit(jax.vmap(one))

  def _vanilla(self, params, batch: Batch, *, want_attention: bool) -> Vanilla:
    logits, cache, out = self._model.prefill(
      params,
      batch.x,
      batch.positions,
      batch.length,
      cache_length=batch.x.shape[1] + self._ending["max_new_tokens"] - 1,
      want_attention=want_attention,
    )
    ids = generation.extend(
      self._model,
      params,
      logits,
      cache,
      batch.next_position,
      num_position_rows=batch.positions.shape[1],
      **self._ending,
    )
    if not want_attention:
      return Vanilla(ids, None)
    rows = jax.vmap(
      lambda row, start: jax.lax.dynamic_slice_in_dim(
        row, start, self._num_video, axis=-1
      ),
      in_axes=(1, 0),
    )(out["last_query_attention"], batch.video_start)
    return Vanilla(ids, rows)

  def _scores(self, module, params, batch: Batch):
    video = jnp.arange(self._num_video, dtype=jnp.int32)

    def one(x, positions, length, start):
      return module.apply(
        {"params": params}, x, positions, start + video, self._grid, length
      )

    return jax.vmap(one)(
      batch.x, batch.positions, batch.length, batch.video_start
    )

  def _answer(self, params, batch: Batch, selection: base.Selection):
    num_keep = selection.index.shape[1]
    length = batch.x.shape[1]
    out_length = length - self._num_video + num_keep

    def prune(x, positions, length, start, selection):
      num_valid = selection.mask.sum()
      rows, new_length = pruning.pruned_rows(
        selection.index,
        num_valid,
        video_start=start,
        num_video=self._num_video,
        length=length,
        out_length=out_length,
      )
      # A method may have changed the rows that it keeps (merged tokens).
      place = jnp.arange(out_length) - start
      kept = selection.features.astype(x.dtype)
      kept = jnp.take(kept, place, axis=0, mode="clip")
      changed = (place >= 0) & (place < num_valid)
      x = jnp.where(changed[:, None], kept, x[rows])
      return x, positions[:, rows], new_length

    x, positions, lengths = jax.vmap(prune)(
      batch.x, batch.positions, batch.length, batch.video_start, selection
    )
    # Kept tokens keep their positions, and the answer goes on where that of
    # the whole prompt would.
    return generation.greedy(
      self._model,
      params,
      x,
      positions,
      lengths,
      batch.next_position,
      **self._ending,
    )


def by_clip(
  questions: Sequence[questions_lib.Question],
) -> list[questions_lib.Question]:
  """Returns the questions with those about one clip side by side."""
  first = {}
  for place, question in enumerate(questions):
    first.setdefault(question.video, place)
  return sorted(questions, key=lambda question: first[question.video])


def other_question(
  question: questions_lib.Question,
  pool: Sequence[questions_lib.Question],
  seed: int,
) -> str:
  """Returns the id of a question about another clip, in other words.

  Drawn by the seed and the question's id, the same in every run.
  """
  key = questions_lib.question_hash(f"{seed}/{question.id}")
  rng = np.random.default_rng(key)
  for place in rng.permutation(len(pool)):
    other = pool[int(place)]
    if other.video != question.video and other.prompt != question.prompt:
      return other.id
  raise errors.UserError(
    "cacovid_other_question needs questions about at least two clips"
  )


def _pad_rows(count: int, size: int) -> list[int]:
  """Returns `size` row numbers below `count`; the last one is repeated."""
  return [min(row, count - 1) for row in range(size)]


def _finite(tree) -> bool:
  return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
