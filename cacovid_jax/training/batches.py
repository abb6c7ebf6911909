"""Batches of a training run: which questions, their clips, static shapes.

Which question stands in slot i of step s is a pure function of the seed, so
there is no iterator state to save. Clips are loaded ahead (Grain). One that
cannot be used is logged and replaced by a question of its place alone.

Letters: B videos of a step, T frames, N video tokens, D width, L prompt tokens,
P position rows, A letters; N and T are those of a bucket.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cacovid_jax import errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import evidence, left_out, video
from cacovid_jax.data import question as question_lib
from cacovid_jax.models import prompt_batch, token_grid
from cacovid_jax.training import ratio, step

MAX_SUBSTITUTES = 16
# Share of bad clips among those tried that ends a run, once there are so many.
MAX_FAILURE_RATE, MIN_FAILURES = 0.05, 20


class Order:
  """Which question stands at a position; each epoch is another permutation."""

  def __init__(self, num_questions: int, seed: int):
    if num_questions < 1:
      raise errors.UserError("there are no questions; give at least one")
    self._num, self._seed = num_questions, seed
    order = grain.MapDataset.range(num_questions).seed(seed % 2**32)
    self._order = order.shuffle().repeat()

  def __getitem__(self, position: int) -> int:
    return int(self._order[position])

  def substitute(self, position: int, attempt: int) -> int:
    """Returns the question that stands in for one that cannot be used."""
    text = f"{self._seed} {position} {attempt}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % self._num


@dataclasses.dataclass
class _Slot:
  """A question, its loaded clip, and what was tried before."""

  question: question_lib.Question
  clip: Any
  failures: list


def _load(rows, store, order: Order, position) -> _Slot:
  """Loads the question at a position, or its first usable substitute."""
  position = int(position)
  index, failures = order[position], []
  for attempt in range(MAX_SUBSTITUTES + 1):
    question = rows[index]
    try:
      return _Slot(question, store.load(question.video), failures)
    except video.VideoError as error:
      failures.append((question, error))
    index = order.substitute(position, attempt)
  return _Slot(question, None, failures)


def load_ahead(
  rows: Sequence[question_lib.Question],
  store,
  *,
  batch_size: int,
  seed: int,
  steps: tuple[int, int],
  num_threads: int = 2,
  num_workers: int = 0,
  rejected: left_out.RejectedClips | None = None,
) -> Iterator[tuple[list[question_lib.Question], list[Any]]]:
  """Yields (questions, clips) of each step; clips are what `store.load` gives.

  The store is a `inference.features.FeatureStore`, or has its `load`. Steps are
  (first, number): a resumed run sees what it would have seen. Threads, or else
  worker processes, load ahead; without any, clips are loaded when asked for.
  """
  rejected = left_out.RejectedClips() if rejected is None else rejected
  start, end = steps
  slots = grain.MapDataset.range(
    start * batch_size, max(end, start) * batch_size
  ).map(functools.partial(_load, rows, store, Order(len(rows), seed)))
  slots = _prefetched(slots, num_threads, num_workers, min(4 * batch_size, 16))
  tried = failed = 0
  for _ in range(start, end):
    batch = [next(slots) for _ in range(batch_size)]
    for slot in batch:
      tried += 1 + len(slot.failures)
      failed += len(slot.failures)
      for question, error in slot.failures:
        rejected.add(question, error)
      if slot.clip is None:
        raise errors.UserError(
          f"{MAX_SUBSTITUTES + 1} clips in a row cannot be used, last:"
          f" {slot.failures[-1][1]}"
        )
    if failed >= MIN_FAILURES and failed > MAX_FAILURE_RATE * tried:
      raise errors.UserError(
        f"{failed} of {tried} clips cannot be used, more than"
        f" {MAX_FAILURE_RATE:.0%}, last: {rejected.entries[-1]['video']}"
        f" ({rejected.entries[-1]['reason']}); mend the data set (see the"
        " quarantine ledger)"
      )
    yield [slot.question for slot in batch], [slot.clip for slot in batch]


def _prefetched(dataset, num_threads: int, num_workers: int, buffer: int):
  """Iterates in order, loading ahead by processes, threads, or not at all."""
  if num_workers:
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    workers = grain.MultiprocessingOptions(num_workers, max(1, buffer))
    return iter(dataset.to_iter_dataset(options).mp_prefetch(workers))
  if num_threads:
    options = grain.ReadOptions(num_threads, max(buffer, num_threads))
    return iter(dataset.to_iter_dataset(options))
  return (dataset[i] for i in range(len(dataset)))


def prompt_buckets(config, questions, checkpoint, ladders):
  """Returns config.data.prompt_rows, or lengths that suit these questions."""
  if config.data.prompt_rows:
    return prompt_batch.PromptBuckets(tuple(config.data.prompt_rows))
  # Text between temporal patches, where a model writes some, is counted too.
  grid = (max(ladder.bucket.frames for ladder in ladders), 1, 1)
  encode = functools.partial(
    checkpoint.model.encode_prompt, checkpoint.tokenizer
  )
  bar = progress_lib.Progress(len(questions), description="prompt lengths")
  lengths = []
  with bar:
    for done, row in enumerate(questions, start=1):
      lengths.append(encode(row.prompt, grid).length - grid[0])
      bar.update(done)
  most = max(ladder.num_keep[-1] for ladder in ladders)
  return prompt_batch.PromptBuckets.of(lengths, beside=most)


class Batches:
  """Iterates over a run's batches from any step; `prompts` has its lengths."""

  def __init__(self, experiment, questions, store, ladders):
    """Looks at all prompts, and at no clip; ladders rise by their buckets."""
    self._config, checkpoint = experiment.config, experiment.loaded
    self._questions, self._store = questions, store
    self._ladders = {ladder.bucket: ladder for ladder in ladders}
    self._model, self._tokenizer = checkpoint.model, checkpoint.tokenizer
    self._rejected = rejected_path(experiment.workdir)
    letters = list(map(self._tokenizer.letter_id, question_lib.LETTERS))
    self._letters = np.array(letters, np.int32)
    largest = ladders[-1].bucket
    self._evidence = read_evidence(self._config, largest.tokens)
    self.prompts = prompt_buckets(self._config, questions, checkpoint, ladders)
    self._shared_rows = shared_rows(checkpoint, questions, largest)

  def __call__(self, start: int) -> Iterator[tuple[step.Batch, list]]:
    config = self._config
    for questions, loaded in load_ahead(
      self._questions,
      self._store,
      batch_size=config.videos_per_step,
      seed=config.seed,
      steps=(start, config.total_steps),
      num_threads=config.data.num_threads,
      num_workers=config.data.num_workers,
      rejected=left_out.RejectedClips(self._rejected),
    ):
      yield self._batch(questions, self._store.finish(loaded)), questions

  def shapes(self, batch: step.Batch) -> Iterator[step.Batch]:
    """Yields a batch like this of each bucket and length of prompts.

    Of `ShapeDtypeStruct`s where their sizes differ.
    """
    for ladder in self._ladders.values():
      for text_rows in self.prompts.text_rows:
        length = ladder.bucket.tokens + text_rows
        yield _resized(batch, ladder, length, self._shared_rows)

  def _batch(self, questions, clips) -> step.Batch:
    prompts = [
      self._model.encode_prompt(
        self._tokenizer, row.prompt, clip.grid, clip.second_per_grid_t
      )
      for row, clip in zip(questions, clips, strict=True)
    ]
    grids = [tuple(clip.grid) for clip in clips]
    lengths = [prompt.length for prompt in prompts]
    text = max(np.subtract(lengths, [len(clip.features) for clip in clips]))
    first = min(prompt.video_rows[0] for prompt in prompts)
    ladder, length, shared = self._shape(grids, text, first)
    bucket = ladder.bucket
    padded = self._tokenizer.pad(prompts, length, bucket.tokens)
    positions, following = prompt_batch.place(
      self._model, prompts, clips, length
    )
    options, shown = self._marks(questions, bucket)
    pad = functools.partial(prompt_batch.pad_tokens, size=bucket.tokens)
    deep = None
    if clips[0].deep is not None:
      deep = np.stack([pad(clip.deep, axis=1) for clip in clips])
    answers = [self._tokenizer.answer_id(row) for row in questions]
    hashes = [question_lib.question_hash(row.id) for row in questions]
    return step.Batch(
      prompts=prompt_batch.PromptBatch(
        x=None,
        positions=positions,
        lengths=padded.length,
        video_rows=padded.video_rows,
        next_position=following,
        deep=deep,
        features=np.stack([pad(clip.features) for clip in clips]),
        ids=padded.ids,
      ),
      answer_id=np.array(answers, np.int32),
      option_ids=options,
      question_hash=np.array(hashes, np.uint32),
      decisive_frames=shown,
      grid=_stacked(map(ladder.place, grids)),
      rungs=_stacked(map(ladder.rungs, grids)),
      shared_rows=shared,
    )

  def _shape(self, grids, text_rows: int, first_row: int):
    """Returns (ladder, L, shared rows) of a step, alike in every process."""
    found = np.array([[*grids, (text_rows, first_row, 0)]], np.int32)
    if jax.process_count() > 1:
      found = multihost_utils.process_allgather(found[0])
    everywhere = [tuple(grid) for row in found for grid in row[:-1].tolist()]
    bucket = together(everywhere, self._ladders)
    text_rows = int(found[:, -1, 0].max())
    length = bucket.tokens + self.prompts.pick(text_rows)
    fits = self._shared_rows <= found[:, -1, 1].min()
    return self._ladders[bucket], length, self._shared_rows if fits else 0

  def _marks(self, questions, bucket):
    """Returns (letters i32[B,A], frames with evidence bool[B,T])."""
    options = np.full((len(questions), len(self._letters)), -1, np.int32)
    shown = np.zeros((len(questions), bucket.frames), bool)
    for row, question in enumerate(questions):
      count = len(question.options)
      options[row, :count] = self._letters[:count]
      tokens = self._evidence.get(question.id)
      if tokens is not None:
        shown[row, np.asarray(tokens, int) // bucket.frame_tokens] = True
    return options, shown


def shared_rows(checkpoint, questions, bucket) -> int:
  """Returns how many rows of text a step reads once, in front of its videos.

  Those of the first question. None in float32, whose recorded runs would change
  in last bits: products of fewer rows may add up in another order.
  """
  if checkpoint.model.dtype == jnp.float32:
    return 0
  model, text = checkpoint.model, questions[0].prompt
  encode = functools.partial(model.encode_prompt, checkpoint.tokenizer, text)
  count = bucket.frames
  prompt = encode((count, 1, 1))
  shared = int(prompt.video_rows[0])
  if not model.processor.tells_time:
    return shared
  # Times begin with any digit.
  for digit in range(10):
    other = encode((count, 1, 1), (float(digit),) * count)
    differs = other.ids[:shared] != prompt.ids[:shared]
    shared = int(differs.argmax()) if differs.any() else shared
  return shared


def _resized(batch: step.Batch, ladder: ratio.Ladder, length, shared):
  """Returns the shapes of a batch of another bucket and L."""
  bucket, videos = ladder.bucket, len(batch.answer_id)

  def sized(array, axis, size):
    if array is None:
      return None
    shape = list(array.shape)
    shape[axis] = size
    return jax.ShapeDtypeStruct(shape, array.dtype)

  prompts = batch.prompts
  return batch.replace(
    prompts=prompts._replace(
      positions=sized(prompts.positions, 2, length),
      ids=sized(prompts.ids, 1, length),
      video_rows=sized(prompts.video_rows, 1, bucket.tokens),
      features=sized(prompts.features, 1, bucket.tokens),
      deep=sized(prompts.deep, 2, bucket.tokens),
    ),
    decisive_frames=sized(batch.decisive_frames, 1, bucket.frames),
    grid=_stacked([ladder.place(ladder.largest)] * videos),
    rungs=_stacked([ladder.rungs(ladder.largest)] * videos),
    shared_rows=shared,
  )


def together(grids, ladders) -> token_grid.GridBucket:
  """Returns the smallest bucket that holds all grids (T, H, W) of a step."""

  def told(grid):
    return " x ".join(map(str, grid))

  for grid in grids:
    for ladder in ladders.values():
      if ladder.plans and tuple(ladder.grid) != tuple(grid):
        raise errors.UserError(
          f"a clip has {told(grid)} video tokens, but the run is for"
          f" {told(ladder.grid)}; correct num_frames"
        )
    token_grid.pick(grid, ladders)  # Says which one fits nowhere.
  fits = [bucket for bucket in ladders if all(map(bucket.holds, grids))]
  if not fits:
    raise errors.UserError(
      "no bucket holds the videos of one step together:"
      f" {', '.join(map(told, grids))} tokens; add one as large as the largest"
      " of each side"
    )
  return min(fits, key=lambda b: (b.tokens, b.frames * b.frame_tokens))


def rejected_path(workdir) -> str:
  """Returns where a workdir lists clips that cannot be used."""
  return os.path.join(workdir, "quarantine.jsonl")


def read_evidence(config, num_tokens: int) -> dict[str, tuple[int, ...]]:
  """Returns {question id: tokens} that answers rest on, config.data's file.

  Those of another grid than that of videos of so many tokens are refused.
  """
  if not config.data.decisive_file:
    return {}
  path = os.path.join(config.data.root, config.data.decisive_file)
  mend = "correct config.data.decisive_file or leave it empty"
  found = evidence.read(path, mend)
  most = max((max(tokens) for tokens in found.values() if tokens), default=-1)
  if most >= num_tokens:
    raise errors.UserError(
      f"config.data.decisive_file names token {most}, and a video of"
      f" {config.data.num_frames} frames has {num_tokens}: take as many frames"
      " as the data was prepared for, or leave the file empty"
    )
  return found


def _stacked(trees):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
