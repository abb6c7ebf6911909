"""Products in 8-bit floating point, for towers that may lose some precision.

Values are `float8_e4m3fn`: three bits of mantissa, up to 448. What layers read
is rounded as it is, weights (of a size around 1/32 in released towers) after
they are multiplied by a power of two. GPUs from compute capability 8.9 on
multiply these twice as fast as bfloat16; elsewhere the same values are
computed, and nothing is gained.
Paper of the formats: https://arxiv.org/abs/2209.05433.
"""

import jax
import jax.numpy as jnp

from cacovid_jax import errors

TYPE = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(TYPE).max)
# Of weights: from 2**-12 to 7 none loses more than its last bits.
_SCALE = 2.0**6
_CAPABILITY = 8.9


def check_device() -> None:
  """Refuses a GPU that cannot multiply them."""
  device = jax.devices()[0]
  known = getattr(device, "compute_capability", None)
  errors.check(
    device.platform != "gpu" or known is None or float(known) >= _CAPABILITY,
    f"model.float8_tower needs compute capability {_CAPABILITY}, and"
    f" {device.device_kind} has {known}; leave it out",
  )


def rounded(x, scale: float = 1.0):
  """Returns x, of its shape and dtype, with the values it has in 8 bits.

  Of x times `scale`, a power of two; what is too large is cut.
  """
  scaled = jnp.clip(x.astype(jnp.float32) * scale, -LARGEST, LARGEST)
  return scaled.astype(TYPE).astype(x.dtype) * jnp.asarray(1 / scale, x.dtype)


def dot_general(x, kernel, dimensions, precision=None, **options):
  """Returns `jax.lax.dot_general` of rounded values, in the dtype of x.

  As the argument `dot_general` of `nn.Dense`. Written so that XLA makes one
  8-bit product of it, scales, bias and GELU included.
  """
  del precision  # There is but one.
  return jax.lax.dot_general(
    rounded(x), rounded(kernel, _SCALE), dimensions, **options
  )
