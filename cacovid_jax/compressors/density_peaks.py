"""Density peaks: tokens that are dense and far from denser ones.

The diversity rule of CaCoVID's sampler (METHOD.md 2.2) used on its own as a
rule without question and without training.
"""

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import allocators, base
from cacovid_jax.policy import diversity


def compress(
  features,
  *,
  grid,
  num_keep,
  text=None,
  aux=None,
  rng=None,
  scope="frame",
  allocator=None,
):
  """Returns the density peaks of each frame, or of the whole video.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: what the allocator needs.
    rng: unused; ties go to the earlier token instead of to noise, so that an
      evaluation has no randomness here.
    scope: "frame", or "video" for one competition over all tokens.
    allocator: how frames share the budget, a name of `allocators`; None for
      evenly.
  """
  del text, rng
  if scope == "video":
    if allocator is not None:
      raise errors.UserError(
        f"density_peaks: allocator {allocator!r} shares out the budget between"
        " frames; it needs scope 'frame'"
      )
    return base.take(features, peaks(features, num_keep=num_keep))
  if scope != "frame":
    raise errors.UserError(
      f"density_peaks: unknown scope {scope!r}; use 'frame' or 'video'"
    )
  return allocators.select_per_frame(
    peaks,
    features,
    grid=grid,
    num_keep=num_keep,
    allocator=allocator,
    aux=aux,
  )


def peaks(features, *, num_keep):
  """Returns int32[k] rows of features f[n, D] by falling rho * delta."""
  _, index = jax.lax.top_k(diversity.peak_scores(features), num_keep)
  return index.astype(jnp.int32)


COMPRESSOR = base.Compressor(
  name="density_peaks", function=compress, configure=allocators.configure
)
