"""Batches of a training run: which questions, their clips, static shapes.

Which question stands in slot i of step s is a pure function of the seed, so
there is no iterator state to save. Clips are loaded ahead, see `data_order`, of
several processes each by the one whose devices hold their slots.

Letters: B videos of a step, T frames, N video tokens, D width, L prompt tokens,
P position rows, A letters; N and T are those of a bucket.
"""

import functools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cacovid_jax import errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import evidence, left_out
from cacovid_jax.data import question as question_lib
from cacovid_jax.models import prompt_batch, token_grid
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.training import data_order, ratio, step


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
    self._order = data_order.Order(len(questions), self._config.seed)
    count = self._config.videos_per_step
    self._own = mesh_lib.own_rows(experiment.mesh, count)
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
    """Yields this process's rows of each batch, and all its questions."""
    config = self._config
    loading = data_order.load_ahead(
      self._questions,
      self._store,
      batch_size=config.videos_per_step,
      seed=config.seed,
      steps=(start, config.total_steps),
      num_threads=config.data.num_threads,
      num_workers=config.data.num_workers,
      own=self._own,
      rejected=left_out.RejectedClips(self._rejected),
    )
    for number, (questions, loaded) in enumerate(loading, start):
      batch, hashes = self._batch(questions, self._store.finish(loaded))
      known = dict(zip(self._own, questions, strict=True))
      first = number * config.videos_per_step
      yield (
        batch,
        [
          known.get(slot) or self._question(first + slot, found)
          for slot, found in enumerate(hashes)
        ],
      )

  def _question(self, position: int, wanted: int):
    """Returns what another process has found at a position, by its hash."""
    for index in self._order.candidates(position):
      row = self._questions[index]
      if question_lib.question_hash(row.id) == wanted:
        return row
    raise errors.UserError(
      f"another process has a question at position {position} that is not here;"
      " give all processes the same data"
    )

  def shapes(self, batch: step.Batch) -> Iterator[step.Batch]:
    """Yields a batch like this of each bucket and length of prompts.

    Of `ShapeDtypeStruct`s where their sizes differ, as of `whole`.
    """
    for ladder in self._ladders.values():
      for text_rows in self.prompts.text_rows:
        length = ladder.bucket.tokens + text_rows
        yield self.whole(_resized(batch, ladder, length, self._shared_rows))

  def whole(self, batch: step.Batch) -> step.Batch:
    """Returns the shapes of a batch of which these rows are a process's own."""
    count = self._config.videos_per_step

    def grown(leaf):
      if len(leaf.shape) == 0 or leaf.shape[0] == count:
        return leaf
      return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map(grown, batch)

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
    hashes = [question_lib.question_hash(row.id) for row in questions]
    hashes = np.array(hashes, np.uint32)
    ladder, length, shared, everyone = self._shape(grids, text, first, hashes)
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
    made = step.Batch(
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
      question_hash=hashes,
      decisive_frames=shown,
      grid=_stacked(map(ladder.place, grids)),
      rungs=_stacked(map(ladder.rungs, grids)),
      shared_rows=shared,
    )
    return made, everyone

  def _shape(self, grids, text_rows: int, first_row: int, hashes):
    """Returns what every process knows of a step, from each one's own rows.

    (Ladder, L, shared rows, hashes of all questions).
    """
    found = np.zeros((self._config.videos_per_step, 7), np.int32)
    found[self._own, 0], found[self._own, 1:4] = 1, grids
    found[self._own, 4:6] = text_rows, first_row
    found[self._own, 6] = hashes.view(np.int32)
    if jax.process_count() > 1:
      found = multihost_utils.process_allgather(found)
      owner = found[..., 0].argmax(axis=0)
      found = found[owner, np.arange(len(owner))]
    bucket = together([tuple(row) for row in found[:, 1:4].tolist()],
                      self._ladders)  # fmt: skip
    length = bucket.tokens + self.prompts.pick(int(found[:, 4].max()))
    shared = self._shared_rows if self._shared_rows <= found[:, 5].min() else 0
    hashes = np.ascontiguousarray(found[:, 6]).view(np.uint32)
    return self._ladders[bucket], length, shared, hashes.tolist()

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
  """Returns a batch's rows in another bucket and L."""
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
