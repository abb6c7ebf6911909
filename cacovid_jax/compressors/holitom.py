"""HoliTom before the language model: windows that save the most, then a choice.

Frames are cut into windows so that averaging the places that stay alike within
a window saves the most tokens. Of the others each frame keeps those that the
vision tower looks at; the averages of a window are clustered. The merging
inside the language model that the paper adds is left out.
Paper: https://arxiv.org/abs/2505.21334 (section on the outer merging)

A row of averages stands in the first frame of its window. All sets keep the
same share of their tokens, which brings the sum to the budget.

Axes: T frames, P tokens of a frame, N = T * P, D width, K kept tokens.
"""

import math

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base, dpc_knn, rows, similarity, windows
from cacovid_jax.policy import diversity


def compress(
  features,
  *,
  grid,
  num_keep,
  text=None,
  aux=None,
  rng=None,
  ratio=None,
  rounding="exact",
  threshold=0.8,
  centre_weight=0.6,
  num_neighbours=7,
):
  """Returns attended tokens unchanged and static tokens merged.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: with `vision_attention` float32[N].
    rng: unused.
    ratio: retention ratio behind K, for the reference rounding.
    rounding: "exact" splits K over the sets by largest remainder; "reference"
      cuts off each set's count.
    threshold: cosine of neighbouring frames above which a place stays alike;
      the paper takes 0.65 to keep 10 %.
    centre_weight: of a cluster's central token; the mean of the others has
      the rest.
    num_neighbours: of the density.
  """
  del text, rng
  if not 0 <= centre_weight <= 1:
    raise errors.UserError(
      f"holitom: centre_weight {centre_weight} is outside [0, 1]; the paper's"
      " is 0.6"
    )
  if num_neighbours < 1:
    raise errors.UserError(
      f"holitom: num_neighbours {num_neighbours} is below 1; use 7"
    )
  T, H, W = grid
  P = H * W
  frames = features.reshape(T, P, -1)
  cosine = similarity.adjacent(frames)
  first = best_windows(cosine > threshold)
  closeness = least_cosine(cosine, first)
  static = closeness > threshold
  if rounding == "exact":
    static = windows.keep_apart(static, closeness, first, num_keep)
  sets = windows.sets(frames, static, first)
  if rounding == "exact":
    count = windows.shares(sets.sizes, num_keep)
  else:
    share = jnp.minimum(ratio * T * P / sets.sizes.sum(), 1.0)
    count = jnp.floor(share * sets.sizes).astype(jnp.int32)

  def frame(x, kind, count, attention):
    dynamic = kind == windows.DYNAMIC
    looked_at = rows.rank(attention, dynamic) < count[1]
    merged, centre = _merge(
      x,
      (kind == windows.STATIC) & (count[0] > 0),
      count[0],
      centre_weight,
      num_neighbours,
    )
    place = jnp.arange(P, dtype=jnp.int32)
    into = jnp.where(dynamic, jnp.where(looked_at, place, P), centre)
    values = jnp.where(dynamic[:, None], x, merged)
    return values, into

  values, into = jax.vmap(frame)(
    sets.tokens,
    sets.kind,
    count,
    aux.vision_attention.astype(jnp.float32).reshape(T, P),
  )
  start = jnp.arange(T, dtype=jnp.int32)[:, None] * P
  into = jnp.where(into < P, into + start, T * P).reshape(-1)
  return rows.collect(
    values.reshape(features.shape),
    into == jnp.arange(T * P),
    into[sets.home.reshape(-1)],
    num_keep,
    dtype=features.dtype,
  )


def _merge(x, valid, count, centre_weight, num_neighbours):
  """Returns float32[P, D], merged at centres, and int32[P], centres or P."""
  found = dpc_knn.from_distances(
    diversity.squared_distances(x),
    count,
    num_neighbours=num_neighbours,
    valid=valid,
  )
  place = jnp.arange(x.shape[0])
  joins = (found.centre[None, :] == place[:, None]) & (place[:, None] != place)
  others = similarity.pooled(x, joins)
  merged = rows.anchored(x, others, joins.sum(axis=-1), centre_weight)
  return merged, found.centre


def best_windows(alike):
  """Returns int32[T], the first frame of each frame's window.

  The windows are those with the largest sum, over windows, of the places that
  stay alike all through it times its frames less one. Of equal sums the one
  with the longer last window, and so on backwards.

  Args:
    alike: bool[T - 1, P], True where a place stays alike to the next frame.
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


def least_cosine(cosine, first):
  """Returns float32[T, P], the least cosine of neighbours in a window.

  Args:
    cosine: float32[T - 1, P] of `similarity.adjacent`.
    first: int32[T], the first frame of each frame's window; in a window of one
      frame the value is -inf.
  """
  P = cosine.shape[1]
  to_last = jnp.concatenate([jnp.full([1, P], jnp.inf), cosine])
  begins = first == jnp.arange(first.shape[0])
  to_last = jnp.where(begins[:, None], jnp.inf, to_last)
  member = windows.together(first)
  least = jnp.where(member[..., None], to_last[None], jnp.inf).min(axis=1)
  return jnp.where(jnp.isinf(least), -jnp.inf, least)[first]


def reference_rows(grid, ratio):
  """Returns a bound of the rows: cutting off keeps the sum below ratio * N."""
  # What rounding in float32 may add to the sum.
  T, H, W = grid
  return math.floor(ratio * T * H * W + 1e-3)


COMPRESSOR = base.Compressor(
  name="holitom",
  function=compress,
  needs=frozenset(["vision_attention"]),
  reference_rows=reference_rows,
)
