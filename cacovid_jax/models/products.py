"""Matrix products as accelerators do them best: rows, one row, 8 bits.

Products in 8 bits are for towers that may lose some precision. Values are
`float8_e4m3fn`: three bits of mantissa, up to 448. What layers read is rounded
as it is, weights (of a size around 1/32 in released towers) after they are
multiplied by a power of two. GPUs from compute capability 8.9 on multiply these
twice as fast as bfloat16; elsewhere the same values are computed, and nothing
is gained. Paper of the formats: https://arxiv.org/abs/2209.05433.
"""

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.models import attention

_FLOAT8 = jnp.float8_e4m3fn
_LARGEST = float(jnp.finfo(_FLOAT8).max)
# Of weights: from 2**-12 to 7 none loses more than its last bits.
_SCALE = 2.0**6
_CAPABILITY = 8.9


def padded_rows(count, batch=1, before=0, backend="auto"):
  """Returns how many rows each of a batch best has on this device, as int.

  On NVIDIA GPUs XLA copies what a product reads and writes if there are no
  multiples of eight rows in all, and what cuDNN reads if a side is odd. Padding
  a prompt once saves these copies in every layer. Elsewhere it is `count`.

  Args:
    count: rows of each one of the batch.
    batch: how many of them a product reads at once.
    before: rows of each that keys have besides.
    backend: as of `attention.attention`.
  """
  chosen = attention.flash_backend() if backend == "auto" else backend
  if chosen != "cudnn":
    return count
  fine = [n for n in range(count, count + 16) if batch * n % 8 == 0]
  return next((n for n in fine if (before + n) % 2 == 0), fine[0])


def of_one_row(hidden, table):
  """Returns float32[..., V] of ONE hidden float[..., D], table float[V, D].

  By a sum, not by a product: for one row, XLA writes the whole table out in
  float32 on a GPU, and reads it again.
  """
  row = hidden.reshape(1, -1).astype(jnp.float32)
  found = (table.astype(jnp.float32) * row).sum(axis=-1)
  return found.reshape(*hidden.shape[:-1], -1)


def check_float8() -> None:
  """Refuses a GPU that cannot multiply in 8 bits."""
  device = jax.devices()[0]
  if "cuda" not in device.client.platform_version:
    return  # Elsewhere it is a matter of speed alone.
  known = device.compute_capability
  errors.check(
    float(known) >= _CAPABILITY,
    f"model.float8_tower needs compute capability {_CAPABILITY}, and"
    f" {device.device_kind} has {known}; leave it out",
  )


def float8(x, scale: float = 1.0):
  """Returns x, of its shape and dtype, with the values it has in 8 bits.

  Of x times `scale`, a power of two; what is too large is cut.
  """
  scaled = jnp.clip(x.astype(jnp.float32) * scale, -_LARGEST, _LARGEST)
  return scaled.astype(_FLOAT8).astype(x.dtype) * jnp.asarray(
    1 / scale, x.dtype
  )


def float8_dot_general(x, kernel, dimensions, precision=None, **options):
  """Returns `jax.lax.dot_general` of rounded values, in the dtype of x.

  As the argument `dot_general` of `nn.Dense`. Written so that XLA makes one
  8-bit product of it, scales, bias and GELU included.
  """
  del precision  # There is but one.
  given = float8(x), float8(kernel, _SCALE)
  return jax.lax.dot_general(*given, dimensions, **options)
