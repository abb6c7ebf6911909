"""Row map of a prompt from which video tokens were dropped.

Axes: L prompt tokens, N video tokens, K kept tokens.
"""

import jax.numpy as jnp


def pruned_rows(
  index, num_valid, *, video_start, num_video, length, out_length
):
  """Returns (rows, new_length) of ONE pruned prompt.

  The prompt is prefix text, video tokens, suffix text, padding; the pruned one
  keeps all of it but the video tokens outside `index`, in order and without
  holes. A newline row that ends the video (LLaVA-OneVision) counts as text.
  `x[rows]` are its embeddings and `positions[:, rows]` its positions (with
  plain RoPE, `rows` themselves): kept tokens keep those of the whole prompt.

  Args:
    index: int32[K] kept video tokens, ascending in 0..N-1; only the first
      `num_valid` entries are read.
    num_valid: int or int32[], at most K.
    video_start: int or int32[], row of the first video token.
    num_video: N, int or int32[].
    length: int or int32[], rows of the whole prompt without padding.
    out_length: static number of rows to return; L - N + K holds every prompt
      of at most L rows.

  Returns:
    rows int32[out_length], strictly ascending over the first `new_length`
    entries; entries behind repeat the last valid row. new_length int32[].
  """
  index = jnp.asarray(index, jnp.int32)
  num_valid = jnp.asarray(num_valid, jnp.int32)
  new_length = jnp.asarray(length, jnp.int32) - num_video + num_valid
  place = jnp.minimum(jnp.arange(out_length, dtype=jnp.int32), new_length - 1)
  among_kept = place - video_start
  kept = jnp.take(index, among_kept, mode="clip") + video_start
  behind = place + (num_video - num_valid)  # The suffix text.
  rows = jnp.where(among_kept < 0, place, kept)
  rows = jnp.where(among_kept >= num_valid, behind, rows)
  return rows, new_length
