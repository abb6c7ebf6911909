"""Greedy generation, for every model with `prefill` and `decode_step`.

Axes: B batch, L prompt tokens, D width, P position rows.
"""

import jax
import jax.numpy as jnp


def greedy(
  model, params, x, positions, lengths, next_positions, *, max_new_tokens,
  eos_ids, pad_id, **options,
):  # fmt: skip
  """Returns int32[B, max_new_tokens] of the most likely continuation.

  Of a `video_llm.VideoLLM` and prompts as of its `prefill`, with its options.
  Stops as soon as every row has ended. Ties go to the lowest id.

  Args:
    next_positions: int32[B] position of the first generated token. A pruned
      prompt goes on where the *whole* prompt would, so this is not `lengths`.
    max_new_tokens: static, at least 1.
    eos_ids: static, token ids that end an answer; they are part of it.
    pad_id: id written behind the end.
  """
  room = x.shape[1] + max_new_tokens - 1
  logits, cache, _ = model.prefill(
    params, x, positions, lengths, cache_length=room, **options
  )
  return extend(
    model, params, logits, cache, next_positions,
    max_new_tokens=max_new_tokens, eos_ids=eos_ids, pad_id=pad_id,
  )  # fmt: skip


def extend(
  model, params, logits, cache, next_positions, *, max_new_tokens, eos_ids,
  pad_id, decided=None,
):  # fmt: skip
  """Returns what `greedy` returns, after a prefill that the caller ran.

  Of its logits float32[B, V] and its cache, with room for max_new_tokens - 1
  more rows; the other arguments are those of `greedy`. `decided` gives bool[B]
  of tokens int32[B]: True also ends an answer, of which no more is read.
  """
  ends = jnp.asarray(tuple(eos_ids), jnp.int32)
  first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if max_new_tokens == 1:
    return first[:, None]  # A loop that never runs would be compiled.
  ids = jnp.full((logits.shape[0], max_new_tokens), pad_id, jnp.int32)

  def ended(token):
    at_end = (token[:, None] == ends[None]).any(axis=-1)
    return at_end if decided is None else at_end | decided(token)

  def unfinished(carry):
    step, _, _, done, _ = carry
    return (step < max_new_tokens) & ~done.all()

  def one_more(carry):
    step, token, ids, done, cache = carry
    where = _positions(model, next_positions, step)
    logits, cache = model.decode_step(params, token, where, cache)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jnp.where(done, pad_id, token)
    ids = ids.at[:, step].set(token)
    return step + 1, token, ids, done | ended(token), cache

  carry = (1, first, ids.at[:, 0].set(first), ended(first), cache)
  return jax.lax.while_loop(unfinished, one_more, carry)[2]


def score(model, params, logits, cache, next_positions, ids, lengths):
  """Returns (log_probs float32[B], greedy bool[B]) of given continuations.

  Sums over a continuation's tokens, and whether each of them is what `greedy`
  would say; none give (0, True). Arguments are those of `extend`, the cache
  with room for M - 1 more rows, and the continuations int32[B, M], right padded
  by any id to `lengths` int32[B].
  """

  def mark(logits, token, step):
    """Returns what the token at a step adds, nothing behind the end."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
    inside = step < lengths
    likeliest = jnp.argmax(logits, axis=-1) == token
    return jnp.where(inside, chosen, 0.0), likeliest | ~inside

  def one_more(carry, step):
    logits, cache, total, greedy = carry
    # The token before is read, the token of this step is marked.
    where = _positions(model, next_positions, step)
    logits, cache = model.decode_step(params, ids[:, step - 1], where, cache)
    added, likeliest = mark(logits, ids[:, step], step)
    return (logits, cache, total + added, greedy & likeliest), None

  carry = logits, cache, *mark(logits, ids[:, 0], 0)
  steps = jnp.arange(1, ids.shape[1])
  (_, _, total, greedy), _ = jax.lax.scan(one_more, carry, steps)
  return total, greedy


def _positions(model, next_positions, step):
  """Returns int32[B, P] of the token before a step; its rows are alike."""
  where = (next_positions + step - 1)[:, None]
  return jnp.broadcast_to(where, (len(where), model.num_position_rows))
