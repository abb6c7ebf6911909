"""Which question stands in which slot of a step, and its clip, loaded ahead.

A question is a pure function of seed and place. Clips are loaded ahead (Grain);
one that cannot be used is logged and replaced by a question of its place alone.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain

from cacovid_jax import errors
from cacovid_jax.data import left_out, video
from cacovid_jax.data import question as question_lib

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

  def candidates(self, position: int) -> Iterator[int]:
    """Yields the question at a position, then all that may stand in for it."""
    yield self[position]
    for attempt in range(MAX_SUBSTITUTES):
      yield self.substitute(position, attempt)


@dataclasses.dataclass
class _Slot:
  """A question, its loaded clip, and what was tried before."""

  question: question_lib.Question
  clip: Any
  failures: list


def _load(rows, store, order: Order, slots, number) -> _Slot:
  """Loads the question of a slot, or its first usable substitute.

  Slots are (those of a step, which of these are loaded); `number` counts the
  loaded ones.
  """
  step, place = divmod(int(number), len(slots[1]))
  failures = []
  for index in order.candidates(step * slots[0] + slots[1][place]):
    question = rows[index]
    try:
      return _Slot(question, store.load(question.video), failures)
    except video.VideoError as error:
      failures.append((question, error))
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
  own: Sequence[int] | None = None,
  rejected: left_out.RejectedClips | None = None,
) -> Iterator[tuple[list[question_lib.Question], list[Any]]]:
  """Yields (questions, clips) of each step; clips are what `store.load` gives.

  The store is a `inference.features.FeatureStore`, or has its `load`. Steps are
  (first, number): a resumed run sees what it would have seen. Threads, or else
  worker processes, load ahead; without any, clips are loaded when asked for.
  Of a step's slots `own` are loaded, None for all.
  """
  rejected = left_out.RejectedClips() if rejected is None else rejected
  (start, end), own = steps, range(batch_size) if own is None else own
  count, order = len(own), Order(len(rows), seed)
  load = functools.partial(_load, rows, store, order, (batch_size, own))
  slots = grain.MapDataset.range(start * count, max(end, start) * count)
  slots = slots.map(load)
  slots = _prefetched(slots, num_threads, num_workers, min(4 * count, 16))
  tried = failed = 0
  for _ in range(start, end):
    batch = [next(slots) for _ in own]
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
