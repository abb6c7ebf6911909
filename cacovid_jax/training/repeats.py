"""Answers that a video's next iterations need no second time.

Letters: B videos, G combinations, r rows that repeat, K kept tokens of the
largest rung, N video tokens, M new tokens, V vocabulary.

All draws follow the scores of before the first iteration. So the greedy row of
each mode and the control rows keep the same tokens as long as a video stays on
its rung, but for near ties that the diversity rule's noise decides anew. What
they keep is compared, not assumed: if it differs, all G rows are asked, in one
batch, since two batches would read the weights twice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.policy import sampling
from cacovid_jax.training import rollout


class Answered(NamedTuple):
  """The rows that repeat, as they were last asked."""

  kept: jax.Array  # i32[B,r,K], see `_kept`; -1 before the first time.
  answers: rollout.Answers  # i32[B,r,M] and f32[B,r,V], or None.


def rows(modes: sampling.Modes) -> np.ndarray:
  """Returns i[r], the rows of G that repeat; none where that saves nothing.

  Nor where one row would be left to compute: products of one row and of several
  may differ in their last bits.
  """
  drawn = modes.token + modes.frame
  greedy = [0] * (modes.token > 0) + [modes.token] * (modes.frame > 0)
  found = np.array([*greedy, *range(drawn, sum(modes))], int)
  return found if len(found) <= sum(modes) - 2 else found[:0]


def nothing(config, num_videos: int, vocab_size: int) -> Answered | None:
  """Returns what stands for answers before the first iteration.

  None, to answer all rows in each, where none repeat. `config` is that of
  `training.step`.
  """
  shape = num_videos, len(rows(config.modes))
  if config.iterations == 1 or not shape[1]:
    return None
  length, logits = config.rollout.answer_length, None
  if length == 1:
    logits = jnp.zeros((*shape, vocab_size), jnp.float32)
  ids = jnp.zeros((*shape, length), jnp.int32)
  kept = jnp.full((*shape, config.ladder.num_keep[-1]), -1, jnp.int32)
  return Answered(kept, rollout.Answers(ids, logits))


def answer(
  ask: Callable, index, num_valid, before: Answered | None, *, modes, num_video
):
  """Returns (the rollout.Answers to G combinations, those that repeat).

  Args:
    ask: (index i32[B,n,K]) -> rollout.Answers, row by row.
    index: i32[B,G,K] kept tokens over the first `num_valid`.
    num_valid: i32[B].
    before: of the iteration before; None answers all rows.
    modes: of the G rows.
    num_video: N.
  """
  if before is None:
    return ask(index), None
  again = rows(modes)
  others = np.setdiff1d(np.arange(sum(modes)), again)
  kept = _kept(index[:, again], num_valid, num_video, before.kept.shape[-1])
  place = np.argsort(np.concatenate([others, again]))

  def rest():
    return jax.tree.map(
      lambda new, old: jnp.concatenate([new, old], axis=1)[:, place],
      ask(index[:, others]),
      before.answers,
    )

  answers = jax.lax.cond((kept == before.kept).all(), rest, lambda: ask(index))
  repeated = jax.tree.map(lambda leaf: leaf[:, again], answers)
  return answers, Answered(kept, repeated)


def _kept(index, num_valid, num_video: int, most: int):
  """Returns i32[B,r,most]: kept tokens, N behind those of a row.

  Behind the entries of the index stands N + 1: a program with room for more
  computes the same answers, but perhaps in other bits.
  """
  own = jnp.arange(index.shape[-1]) < num_valid[:, None, None]
  room = ((0, 0), (0, 0), (0, most - index.shape[-1]))
  kept = jnp.where(own, index, num_video)
  return jnp.pad(kept, room, constant_values=num_video + 1)
