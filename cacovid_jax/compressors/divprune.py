"""Max-min diversity subset (DivPrune, https://arxiv.org/abs/2503.02175).

Start from the token whose nearest neighbour is farthest, then add, again and
again, the token farthest from all picked ones, in cosine distance. The subset
is taken over the whole video; the question plays no part. Distances are
compared in float32: those of bfloat16 would change the picks. Two differences
from the published code: picked tokens are excluded (there, duplicate tokens
make it pick the same index again), and survivors keep their position ids.

Axes: N video tokens, D width, K kept tokens.
"""

import functools

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import (
  allocators,
  base,
  greedy_kernel,
  similarity,
)

# Rows of the distance matrix held at a time while the first token is sought.
_BLOCK = 256
# Largest distance matrix that is held: 14188 tokens. A batch holds one of
# them for each video.
_MATRIX_BYTES = 768 * 2**20


def compress(
  features,
  *,
  grid,
  num_keep,
  text=None,
  aux=None,
  rng=None,
  scope="video",
  distances="auto",
  allocator=None,
):
  """Returns a max-min diverse subset of the video's tokens.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: what the allocator needs.
    rng: unused.
    scope: "video" picks over all frames at once; "frame" picks in each frame
      on its own (another, much faster method).
    distances: "matrix" computes all distances at once and holds them, "rows"
      computes those to a picked token when it is picked: less memory, and
      slower by far on an accelerator; "auto" holds them where they fit.
    allocator: how frames share the budget, a name of `allocators`; None for
      evenly. Only with scope "frame".
  """
  del text, rng
  pick = functools.partial(max_min_subset, distances=distances)
  if scope == "video":
    if allocator is not None:
      raise errors.UserError(
        f"divprune: allocator {allocator!r} shares out the budget between"
        " frames; it needs scope 'frame'"
      )
    return base.take(features, pick(features, num_keep=num_keep))
  if scope != "frame":
    raise errors.UserError(
      f"divprune: unknown scope {scope!r}; use 'video' or 'frame'"
    )
  return allocators.select_per_frame(
    pick,
    features,
    grid=grid,
    num_keep=num_keep,
    allocator=allocator,
    aux=aux,
  )


def reference_rows(grid, ratio, **options) -> int:
  """Returns K of the published code: half a token goes to the even number."""
  del options
  return round(ratio * grid[0] * grid[1] * grid[2])


def max_min_subset(
  features: jax.Array, *, num_keep: int, distances: str = "auto"
) -> jax.Array:
  """Returns int32[K] distinct rows of features f[N, D], in picking order."""
  num_tokens = features.shape[0]
  if distances == "auto":
    fits = 4 * num_tokens**2 <= _MATRIX_BYTES
    distances = "matrix" if fits else "rows"
  if distances == "matrix":
    return max_min_of_matrix(1.0 - similarity.between(features), num_keep)
  if distances != "rows":
    raise errors.UserError(
      f"divprune: unknown distances {distances!r}; use 'auto', 'matrix' or"
      " 'rows'"
    )
  inverse = similarity.inverse_norm(features)

  def distance_to(i):
    products = similarity.dot(features, features[i]) * (inverse * inverse[i])
    return 1.0 - jnp.clip(products, -1.0, 1.0)

  def nearest(i):
    return jnp.min(distance_to(i).at[i].set(jnp.inf))

  first = _farthest(
    jax.lax.map(nearest, jnp.arange(num_tokens), batch_size=_BLOCK)
  )
  return greedy_kernel.max_min_loop(distance_to, first, num_tokens, num_keep)


def max_min_of_matrix(distances: jax.Array, num_keep: int) -> jax.Array:
  """Returns int32[K] distinct items of distances float32[N, N], as picked.

  Row j holds the distances of all items to j. The first pick is the item whose
  nearest other one is farthest.
  """
  itself = jnp.eye(distances.shape[0], dtype=bool)
  nearest = jnp.where(itself, jnp.inf, distances).min(axis=0)
  return greedy_kernel.max_min(distances, _farthest(nearest), num_keep)


def _farthest(nearest):
  """Returns int32[], the first item with the largest of float32[N] distances.

  Two items that are nearest to each other have the same distance, but for the
  rounding of float32, which must not decide between them.
  """
  return jnp.argmax(similarity.settled(nearest)).astype(jnp.int32)


COMPRESSOR = base.Compressor(
  name="divprune",
  function=compress,
  reference_rows=reference_rows,
  configure=allocators.configure,
)
