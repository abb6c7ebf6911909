"""Windows of frames whose unchanging tokens are averaged, then clustered.

What PruneVID and HoliTom share. Frames are cut into windows; a place of the
grid that hardly changes within a window is static there, and its tokens become
one average, at the window's first frame. Each window's static tokens and each
frame's other ones are sets that get a share of the budget each.

Axes: T frames, P tokens of a frame, N = T * P, D width, K kept tokens. Static
and other tokens of a frame lie at different places, so that one array of T x P
tokens holds all sets, and one matrix of distances per frame serves them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import budgets, rows, similarity

STATIC, DYNAMIC, NOWHERE = 0, 1, -1


class Sets(NamedTuple):
  """The tokens after averaging, as disjoint sets.

  Attributes:
    tokens: float32[T, P, D]; the average where a window's first frame is
      static, else the token itself.
    kind: int32[T, P]: STATIC at the first frame of a window, DYNAMIC, or
      NOWHERE for static places of later frames.
    home: int32[T, P], where among the N tokens a token's value is now: itself
      or the average that it is part of.
    sizes: int32[T, 2], tokens of each frame's STATIC and DYNAMIC set.
  """

  tokens: jax.Array
  kind: jax.Array
  home: jax.Array
  sizes: jax.Array


def first_frames(starts: jax.Array) -> jax.Array:
  """Returns int32[T], the first frame of each frame's window.

  Args:
    starts: bool[T], True where a window begins; frame 0 always does.
  """
  place = jnp.arange(starts.shape[0], dtype=jnp.int32)
  return jax.lax.cummax(jnp.where(starts, place, 0))


def together(first: jax.Array) -> jax.Array:
  """Returns bool[T, T]: row t, the first of a window, has its frames u."""
  place = jnp.arange(first.shape[0])
  return first[None, :] == place[:, None]


def keep_apart(static, closeness, first, num_keep):
  """Takes back static places where fewer than K tokens would be left.

  A video so static that it has fewer tokens than the budget keeps tokens of
  its least close places apart, as few as do.

  Args:
    static: bool[T, P], equal within a window.
    closeness: float32[T, P], likewise; the lowest go first, ties by place.
    first: int32[T] of `first_frames`.
    num_keep: K, static.

  Returns:
    bool[T, P], `static` without these.
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
  """Averages static tokens over their windows.

  Args:
    frames: float[T, P, D] video tokens.
    static: bool[T, P], equal within a window.
    first: int32[T] of `first_frames`.
  """
  T, P, _ = frames.shape
  member = together(first)
  length = jnp.maximum(member.sum(axis=-1), 1)
  total = similarity.pooled(frames.reshape(T, -1), member).reshape(frames.shape)
  average = total / length[:, None, None]
  leads = (first == jnp.arange(T))[:, None]
  kind = jnp.where(static, jnp.where(leads, STATIC, NOWHERE), DYNAMIC)
  place = jnp.arange(P, dtype=jnp.int32)
  frame = jnp.where(static, first[:, None], jnp.arange(T)[:, None])
  return Sets(
    tokens=jnp.where(kind[..., None] == STATIC, average, frames),
    kind=kind,
    home=frame * P + place,
    sizes=jnp.stack(
      [(kind == STATIC).sum(axis=-1), (kind == DYNAMIC).sum(axis=-1)], axis=-1
    ),
  )


def shares(sizes, num_keep):
  """Returns int32[T, 2], the budget in proportion to the sizes of the sets.

  Each set that is not empty gets at least one token, or the largest ones do
  if there are too many sets. The shares sum to K.
  """
  flat = sizes.reshape(-1)
  largest = rows.rank(flat, flat > 0) < num_keep
  return budgets.largest_remainder_on_device(
    flat, num_keep, low=largest & (flat > 0), high=flat
  ).reshape(sizes.shape)


def of_kind(values, kind):
  """Returns [T, P], at each token the value [T, 2] of its set."""
  own = jnp.where(kind == STATIC, values[:, :1], values[:, 1:])
  return jnp.where(kind == NOWHERE, 0, own)
