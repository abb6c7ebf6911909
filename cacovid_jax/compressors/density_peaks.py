"""Density peaks: tokens that are dense and far from denser ones.

The diversity rule of CaCoVID's sampler (METHOD.md 2.2) used on its own as a
rule without question and without training.
"""

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.policy import diversity


def compress(
  features, *, grid, num_keep, text=None, aux=None, rng=None, scope="frame"
):
  """Returns the density peaks of each frame, the budget split evenly.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: unused.
    rng: unused; ties go to the earlier token instead of to noise, so that an
      evaluation has no randomness here.
    scope: "frame", or "video" for one competition over all tokens.
  """
  del text, aux, rng
  if scope == "video":
    return base.take(features, peaks(features, num_keep=num_keep))
  if scope != "frame":
    raise errors.UserError(
      f"density_peaks: unknown scope {scope!r}; use 'frame' or 'video'"
    )
  return base.take(features, base.per_frame(peaks, features, grid, num_keep))


def peaks(features, *, num_keep):
  """Returns int32[k] rows of features f[n, D] with the largest rho * delta."""
  return diversity.density_peaks(features, num_keep)


COMPRESSOR = base.Compressor(name="density_peaks", function=compress)
