"""Greedy generation against one whole forward pass per token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from cacovid_jax.models import generation, llava_onevision

CONFIG = llava_onevision.LlavaOnevisionConfig.tiny()
MODEL = llava_onevision.LlavaOnevisionModel(CONFIG)
NEW = 6


@functools.cache
def _params():
  params = jax.jit(MODEL.init)(jax.random.key(0))
  # Large embeddings make the answer depend on what was just said.
  decoder = dict(params["language_model"])
  decoder["embed_tokens"] = decoder["embed_tokens"] * 50
  return params | {"language_model": decoder}


def _prompts():
  gen = np.random.default_rng(0)
  x = gen.standard_normal((3, 7, 32)).astype(np.float32)
  positions = np.sort(gen.permutation(20)[:7])  # A pruned prompt's.
  positions = np.broadcast_to(positions, (3, 1, 7))
  return jnp.asarray(x), jnp.asarray(positions), jnp.array([5, 7, 6])


def _greedy(x, positions, lengths, next_positions, eos_ids=()):
  return jax.jit(
    functools.partial(
      generation.greedy, MODEL, max_new_tokens=NEW, eos_ids=eos_ids, pad_id=63
    )
  )(_params(), x, positions, lengths, next_positions)


@functools.cache
def _by_whole_passes():
  """int[3, NEW], with the whole sequence run anew for every token."""
  x, positions, lengths = map(np.asarray, _prompts())
  table = np.asarray(_params()["language_model"]["embed_tokens"])

  @jax.jit
  def read(params, x, positions):
    hidden, _ = MODEL.forward(params, x[None], positions[None, None])
    return MODEL.logits(params, hidden[0])

  rows = []
  for row, length in enumerate(lengths):
    sequence = np.zeros((7 + NEW, 32), np.float32)
    sequence[:length] = x[row, :length]
    where = np.zeros(7 + NEW, np.int32)
    where[:length] = positions[row, 0, :length]
    ids = []
    for step in range(NEW):
      logits = read(_params(), sequence, where)[length + step - 1]
      ids.append(int(logits.argmax()))
      sequence[length + step] = table[ids[-1]]
      where[length + step] = 30 + row + step
    rows.append(ids)
  return np.array(rows)


class GreedyTest(absltest.TestCase):
  def test_equals_a_whole_pass_per_token(self):
    ids = _greedy(*_prompts(), jnp.array([30, 31, 32]))
    np.testing.assert_array_equal(ids, _by_whole_passes())
    self.assertGreater(len(np.unique(ids)), 3)  # Not one token over and over.

  def test_rows_end_alone_and_are_padded(self):
    expected = _by_whole_passes().copy()
    end = int(expected[1, 2])
    for row in expected:
      found = np.flatnonzero(np.isin(row, [end, 62]))
      if found.size:
        row[found[0] + 1 :] = 63
    ids = _greedy(*_prompts(), jnp.array([30, 31, 32]), eos_ids=(end, 62))
    np.testing.assert_array_equal(ids, expected)
    self.assertEqual(ids[1, 3], 63)

  def test_no_token_is_computed_once_all_rows_are_decided(self):
    asked = []

    class Counting:
      num_position_rows = 1

      def decode_step(self, params, ids, positions, cache):
        del params, positions
        asked.append(ids.tolist())
        return jax.nn.one_hot(ids + 1, 64), cache

    def extend(first, decided):
      del asked[:]
      with jax.disable_jit():
        return generation.extend(
          Counting(), None, jax.nn.one_hot(jnp.array(first), 64), None,
          jnp.array([7, 9]), max_new_tokens=4, eos_ids=(12,), pad_id=0,
          decided=decided,
        ).tolist()  # fmt: skip

    def even(tokens):
      return tokens % 2 == 0

    self.assertEqual(extend([3, 6], even), [[3, 4, 0, 0], [6, 0, 0, 0]])
    self.assertEqual(asked, [[3, 6]])
    self.assertEqual(extend([8, 6], even), [[8, 0, 0, 0], [6, 0, 0, 0]])
    self.assertEqual(asked, [])
    # Undecided, answers go on to their end or to the last token.
    self.assertEqual(extend([3, 11], None), [[3, 4, 5, 6], [11, 12, 0, 0]])
    self.assertLen(asked, 3)

  def test_position_of_the_answer_matters(self):
    x, positions, lengths = _prompts()
    prefill = jax.jit(MODEL.prefill, static_argnames="cache_length")
    decode = jax.jit(MODEL.decode_step)
    near, cache, _ = prefill(_params(), x, positions, lengths, cache_length=8)
    first, second = (
      decode(_params(), near.argmax(-1), jnp.full((3, 1), where), cache)[0]
      for where in (30, 7)
    )
    self.assertGreater(np.abs(first - second).max(), 1e-3)


if __name__ == "__main__":
  absltest.main()
