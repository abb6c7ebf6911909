"""What a vision tower can tell besides features: attention and keys.

Axes: S segments that attend within themselves (frames, slices or windows),
R patches of a segment, P = S·R patches, N heads, H head dimension.
"""

import jax
import jax.numpy as jnp

# "vision_attention": attention that a token receives from its own frame in
# the last layer, mean over heads. "vision_keys": that layer's keys, mean over
# heads. Both pooled to the token grid, float32.
#
# The attention of SigLIP's pooling head is not among them: LLaVA-OneVision's
# checkpoints come without that head (`"vision_use_head": false`).
NAMES = ("vision_attention", "vision_keys")

# Queries whose rows of the map are held at a time.
_CHUNK = 1024


def check(want) -> tuple[str, ...]:
  """Returns the wanted names in the order of `NAMES`; refuses others."""
  unknown = set(want) - set(NAMES)
  if unknown:
    raise ValueError(
      f"no vision signal is called {', '.join(map(repr, sorted(unknown)))};"
      f" there are {', '.join(NAMES)}"
    )
  return tuple(name for name in NAMES if name in want)


def shapes(num_tokens, head_dim):
  """Returns the shape of each signal of that many patches or tokens."""
  return {
    "vision_attention": (num_tokens,),
    "vision_keys": (num_tokens, head_dim),
  }


def attention_received(q, k, lengths=None):
  """Returns float32[S, R]: the attention that each key gets in all.

  Softmax of q k / sqrt(H), averaged over heads and summed over queries. The
  maps exist one segment at a time, of long segments some rows at a time.

  Args:
    q: float[S, R, N, H].
    k: float[S, R, N, H].
    lengths: int32[S] valid patches of each segment, at least 1, which come
      first; those behind ask for nothing and get nothing. None for all.
  """
  num_patches, head_dim = q.shape[1], q.shape[3]
  patch = jnp.arange(num_patches)
  chunk = min(num_patches, _CHUNK)
  num_chunks = -(-num_patches // chunk)

  def segment(arguments):
    q, k, length = arguments
    k = k.astype(jnp.float32)
    rows = jnp.pad(q, [(0, num_chunks * chunk - num_patches), (0, 0), (0, 0)])
    rows = rows.reshape(num_chunks, chunk, *q.shape[1:])

    def some_rows(total, numbered):
      number, q = numbered
      scores = jnp.einsum(
        "RNH,SNH->NRS", q.astype(jnp.float32), k, precision="highest"
      )
      scores = jnp.where(
        patch < length, scores * head_dim**-0.5, jnp.finfo(jnp.float32).min
      )
      asks = number * chunk + jnp.arange(chunk) < length
      seen = jax.nn.softmax(scores, axis=-1).mean(axis=0)  # [R, S]
      return total + jnp.where(asks[:, None], seen, 0).sum(axis=0), None

    total = jnp.zeros([num_patches], jnp.float32)
    total, _ = jax.lax.scan(some_rows, total, (jnp.arange(num_chunks), rows))
    return total

  if lengths is None:
    lengths = jnp.full(q.shape[:1], num_patches, jnp.int32)
  return jax.lax.map(segment, (q, k, lengths))
