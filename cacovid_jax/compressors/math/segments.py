"""Windows of frames: where they begin, and their static tokens.

A place of the grid that hardly changes within a window is static there, and its
tokens become one average, at the window's first frame. Each window's static
tokens and each frame's other ones are sets that get a share of the budget each;
one array of T x P tokens holds them all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import budgets, selection_ops
from cacovid_jax.compressors.math import similarity

STATIC, DYNAMIC, NOWHERE = 0, 1, -1


class Sets(NamedTuple):
  """The tokens after averaging, as disjoint sets."""

  # float32[T, P, D]; the average where a window's first frame is static.
  tokens: jax.Array
  # int32[T, P]: STATIC in the first frame of a window, DYNAMIC, or NOWHERE for
  # static places of later frames.
  kind: jax.Array
  home: jax.Array  # int32[T, P], which of N tokens holds a token's value now.
  sizes: jax.Array  # int32[T, 2], tokens of a frame's STATIC and DYNAMIC set.


def first_frames(starts: jax.Array) -> jax.Array:
  """Returns int32[T], first frames of windows that start where bool[T]."""
  place = jnp.arange(starts.shape[0], dtype=jnp.int32)
  return jax.lax.cummax(jnp.where(starts, place, 0))


def unlike_neighbours(cosine, num_segments, threshold):
  """Returns bool[T], True where a window of FastVID or FlashVID begins.

  The num_segments - 1 lowest cosines float32[T - 1] of neighbouring frames end
  one, of equals the first; so do all below the threshold.
  """
  lowest = selection_ops.rank(-cosine) < num_segments - 1
  return jnp.append(jnp.ones(1, bool), lowest | (cosine < threshold))


def runs_of_labels(labels):
  """Returns bool[T], True where a segment of PruneVID begins, of int32[T].

  A label's longest runs stay if they are longer than one frame, all of them if
  several are. A stretch of other frames joins the longer of the runs beside
  it, the left one on ties; runs on the left count the frames that joined them.
  """
  T = labels.shape[0]
  place = jnp.arange(T, dtype=jnp.int32)
  first = first_frames(_changes(labels))
  same_run = first[:, None] == first[None, :]
  length = same_run.sum(axis=-1, dtype=jnp.int32)
  same_label = labels[:, None] == labels[None, :]
  longest = jnp.where(same_label, length[None, :], 0).max(axis=-1)
  stays = (length == longest) & (length > 1)
  # The next frame that stays, T if there is none.
  behind = jax.lax.cummin(jnp.where(stays, place, T), reverse=True)
  beside = jnp.minimum(behind, T - 1)
  right_length = jnp.where(behind < T, length[beside], 0)
  right_label = jnp.where(behind < T, labels[beside], 0)

  def frame(carry, now):
    label, run, stayed = carry
    stays, own, right_label, right_length = now
    # Within a stretch the first frame's choice holds for the others.
    starts_stretch = ~stays & stayed
    goes_right = starts_stretch & (right_length > run)
    new = jnp.where(stays, own, jnp.where(goes_right, right_label, label))
    run = jnp.where(new == label, run + 1, 1)
    return (new, run, stays), new

  # Before frame 0 there is a run of no length with a label of its own; if
  # nothing stays, all frames keep it.
  initial = (jnp.int32(-1), jnp.int32(0), jnp.bool_(True))
  every = (stays, labels, right_label, right_length)
  _, new = jax.lax.scan(frame, initial, every)
  return _changes(new)


def _changes(labels):
  return jnp.append(jnp.ones(1, bool), labels[1:] != labels[:-1])


def most_saved(alike):
  """Returns int32[T], the first frame of each frame's window, of HoliTom.

  The windows with the largest sum of the places that stay alike all through one
  times its frames less one; of equal sums with the longest last window, and so
  on backwards. Places stay alike to the next frame where bool[T - 1, P].
  """
  T = alike.shape[0] + 1
  place = jnp.arange(T, dtype=jnp.int32)
  # Since which frame a place has stayed alike, up to each frame.
  since = jnp.concatenate([jnp.zeros([1, alike.shape[1]], bool), alike])
  since = jax.lax.cummax(jnp.where(since, 0, place[:, None]), axis=0)
  # Row e, column s: what a window from s to e saves.
  stays = (since[:, None, :] <= place[:, None]).sum(axis=-1, dtype=jnp.int32)
  saved = stays * (place[:, None] - place[None, :])
  saved = jnp.where(place[None, :] <= place[:, None], saved, -1)

  def end(state, now):
    # best[s]: the most saved before frame s; first[s]: by these windows.
    best, first = state
    e, saved = now
    total = jnp.where(saved >= 0, best[:-1] + saved, -1)
    s = jnp.argmax(total)
    best = best.at[e + 1].set(total[s])
    row = jnp.where(place < s, first[s], s)
    return (best, first.at[e + 1].set(row)), None

  state = (jnp.zeros(T + 1, jnp.int32), jnp.zeros([T + 1, T], jnp.int32))
  (_, first), _ = jax.lax.scan(end, state, (place, saved))
  return first[T]


def together(first: jax.Array) -> jax.Array:
  """Returns bool[T, T]: row t, the first of a window, has its frames u."""
  place = jnp.arange(first.shape[0])
  return first[None, :] == place[:, None]


def keep_apart(static, closeness, first, num_keep):
  """Takes back static places where fewer than K tokens would be left.

  Returns `static` bool[T, P], equal within a window, without as few places as
  do, those of lowest `closeness` float32[T, P], also equal there, by place.
  `first` is int32[T] of `first_frames`.
  """
  T, P = static.shape
  leads = first == jnp.arange(T)
  length = together(first).sum(axis=-1)  # 0 behind the first of a window
  at_first = (static & leads[:, None]).reshape(-1)
  gain = jnp.where(at_first, jnp.repeat(length - 1, P), 0)
  missing = num_keep - (T * P - gain.sum())
  closeness = similarity.settled(closeness.reshape(-1))
  order = jnp.argsort(jnp.where(at_first, closeness, jnp.inf), stable=True)
  regained = jnp.cumsum(gain[order]) - gain[order]
  apart = jnp.zeros([T * P], bool).at[order].set(regained < missing)
  return static & ~apart.reshape(T, P)[first]


def sets(frames, static, first) -> Sets:
  """Averages static tokens bool[T, P] of frames over their windows."""
  T, P, _ = frames.shape
  member = together(first)
  length = jnp.maximum(member.sum(axis=-1), 1)
  total = similarity.pooled(frames.reshape(T, -1), member).reshape(frames.shape)
  average = total / length[:, None, None]
  leads = (first == jnp.arange(T))[:, None]
  kind = jnp.where(static, jnp.where(leads, STATIC, NOWHERE), DYNAMIC)
  place = jnp.arange(P, dtype=jnp.int32)
  frame = jnp.where(static, first[:, None], jnp.arange(T)[:, None])
  of_kind = kind[..., None] == jnp.array([STATIC, DYNAMIC])
  return Sets(
    tokens=jnp.where(kind[..., None] == STATIC, average, frames),
    kind=kind,
    home=frame * P + place,
    sizes=of_kind.sum(axis=1),
  )


def shares(sizes, num_keep):
  """Returns int32[T, 2] that sum to K, in proportion to the sizes of the sets.

  Each set gets a token, or the largest ones do if there are too many sets.
  """
  flat = sizes.reshape(-1)
  low = (selection_ops.rank(flat, flat > 0) < num_keep) & (flat > 0)
  return budgets.largest_remainder_on_device(
    flat, num_keep, low=low, high=flat
  ).reshape(sizes.shape)
