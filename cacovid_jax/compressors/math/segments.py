"""Windows of frames: where they begin, and their static tokens.

`unlike_neighbours`, `runs_of_labels` and `most_saved` cut frames into windows
in the ways of FastVID and FlashVID, PruneVID, and HoliTom. A place of the grid
that hardly changes within a window is static there, and its tokens become one
average, at the window's first frame. Each window's static tokens and each
frame's other ones are sets that get a share of the budget each.

Axes: T frames, P tokens of a frame, N = T * P, D width, K kept tokens. Static
and other tokens of a frame lie at different places, so that one array of T x P
tokens holds all sets, and one matrix of distances per frame serves them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import budgets, selection_ops
from cacovid_jax.compressors.math import similarity

STATIC, DYNAMIC, NOWHERE = 0, 1, -1


class Sets(NamedTuple):
  """The tokens after averaging, as disjoint sets.

  Attributes:
    tokens: float32[T, P, D]; the average where a window's first frame is
      static, else the token itself.
    kind: int32[T, P]: STATIC in the first frame of a window, DYNAMIC, or
      NOWHERE for static places of later frames.
    home: int32[T, P], the one of N tokens that holds a token's value now.
    sizes: int32[T, 2], tokens of each frame's STATIC and DYNAMIC set.
  """

  tokens: jax.Array
  kind: jax.Array
  home: jax.Array
  sizes: jax.Array


def first_frames(starts: jax.Array) -> jax.Array:
  """Returns int32[T], the first frame of each frame's window.

  Of `starts` bool[T], True where one begins; frame 0 always does.
  """
  place = jnp.arange(starts.shape[0], dtype=jnp.int32)
  return jax.lax.cummax(jnp.where(starts, place, 0))


def unlike_neighbours(cosine, num_segments, threshold):
  """Returns bool[T], True where a window begins.

  Of cosines float32[T - 1] of neighbouring frames, the num_segments - 1 lowest
  end a window, of equal ones the first; so do all below the threshold.
  """
  lowest = selection_ops.rank(-cosine) < num_segments - 1
  return jnp.append(jnp.ones(1, bool), lowest | (cosine < threshold))


def runs_of_labels(labels):
  """Returns bool[T], True where a segment begins, of cluster labels int32[T].

  A label's longest runs stay if they are longer than one frame, all of them if
  several are. A stretch of other frames joins the longer of the runs beside
  it, the left one on ties; runs on the left count the frames that joined them.
  """
  T = labels.shape[0]
  place = jnp.arange(T, dtype=jnp.int32)
  begins = jnp.concatenate([jnp.ones(1, bool), labels[1:] != labels[:-1]])
  first = first_frames(begins)
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
  _, new = jax.lax.scan(
    frame, initial, (stays, labels, right_label, right_length)
  )
  return jnp.concatenate([jnp.ones(1, bool), new[1:] != new[:-1]])


def most_saved(alike):
  """Returns int32[T], the first frame of each frame's window.

  The windows are those with the largest sum, over windows, of the places that
  stay alike all through it times its frames less one. Of equal sums the one
  with the longer last window, and so on backwards.

  `alike` is bool[T - 1, P], True where a place stays alike to the next frame.
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

  A video so static that it has fewer tokens than the budget keeps tokens of
  its least close places apart, as few as do.

  Returns `static` bool[T, P], equal within a window, without these: those of
  lowest `closeness` float32[T, P], also equal there, ties by place. `first` is
  int32[T] of `first_frames`.
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
  """Returns int32[T, 2], the budget in proportion to the sizes of the sets.

  Each set that is not empty gets at least one token, or the largest ones do
  if there are too many sets. The shares sum to K.
  """
  flat = sizes.reshape(-1)
  largest = selection_ops.rank(flat, flat > 0) < num_keep
  return budgets.largest_remainder_on_device(
    flat, num_keep, low=largest & (flat > 0), high=flat
  ).reshape(sizes.shape)


def of_kind(values, kind):
  """Returns [T, P], at each token the value [T, 2] of its set."""
  own = jnp.where(kind == STATIC, values[:, :1], values[:, 1:])
  return jnp.where(kind == NOWHERE, 0, own)
