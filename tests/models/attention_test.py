"""Attention against loops in NumPy, for every backend this platform has."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from cacovid_jax.models import attention

_attend = jax.jit(attention.attention, static_argnames=("causal", "backend"))


def _inputs(batch=2, queries=6, keys=6, heads=4, kv_heads=2, dim=8, seed=0):
  gen = np.random.default_rng(seed)
  shapes = (
    (batch, queries, heads, dim),
    (batch, keys, kv_heads, dim),
    (batch, keys, kv_heads, dim),
  )
  return [gen.standard_normal(s).astype(np.float32) for s in shapes]


def _loop(q, k, v, visible):
  """Attention one query at a time; visible(b, t, s) -> bool."""
  batch, queries, heads, dim = q.shape
  out = np.zeros(q.shape)
  for b in range(batch):
    for t in range(queries):
      keys = [s for s in range(k.shape[1]) if visible(b, t, s)]
      for n in range(heads):
        kv = n // (heads // k.shape[2])
        scores = np.array([q[b, t, n] @ k[b, s, kv] for s in keys])
        weights = np.exp(scores / np.sqrt(dim))
        weights /= weights.sum()
        values = (v[b, s, kv] for s in keys)
        out[b, t, n] = sum(
          weight * value for weight, value in zip(weights, values, strict=True)
        )
  return out


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters("auto", "xla")
  def test_causal_with_lengths(self, backend):
    q, k, v = _inputs()
    lengths = np.array([4, 6])
    out = _attend(q, k, v, causal=True, lengths=lengths, backend=backend)
    expected = _loop(q, k, v, lambda b, t, s: s <= t and s < lengths[b])
    np.testing.assert_allclose(out, expected, atol=1e-5)

  def test_bidirectional(self):
    q, k, v = _inputs(queries=5, keys=7)
    out = _attend(q, k, v)
    expected = _loop(q, k, v, lambda b, t, s: True)
    np.testing.assert_allclose(out, expected, atol=1e-5)

  def test_mask(self):
    q, k, v = _inputs()
    mask = np.random.default_rng(1).random((2, 6, 6)) < 0.5
    mask |= np.eye(6, dtype=bool)
    out = _attend(q, k, v, causal=True, mask=mask)
    expected = _loop(q, k, v, lambda b, t, s: s <= t and mask[b, t, s])
    np.testing.assert_allclose(out, expected, atol=1e-5)

  def test_chunked_queries_give_the_same_values_and_gradients(self):
    q, k, v = _inputs(queries=11, keys=11)
    lengths = jnp.array([8, 11])
    mask = np.random.default_rng(1).random((2, 11, 11)) < 0.5
    mask[:, :, 0] = True

    def total(q):
      out = attention.attention(
        q, k, v, causal=True, lengths=lengths, mask=mask
      )
      return jnp.sin(out).sum(), out

    def run():
      # Traced anew each time.
      found = jax.value_and_grad(lambda q: total(q), has_aux=True)
      return jax.jit(found)(q)

    (_, whole), whole_grad = run()
    with (
      mock.patch.object(attention, "_LARGEST_MAP", 10),
      mock.patch.object(attention, "_CHUNK", 4),
    ):
      (_, parts), parts_grad = run()
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    np.testing.assert_allclose(parts_grad, whole_grad, atol=1e-6)

  @parameterized.parameters(True, False)
  def test_splash_kernel_equals_xla(self, causal):
    q, k, v = map(jnp.asarray, _inputs(queries=140, keys=140, dim=12))
    lengths = jnp.array([100, 140])
    kernel = attention._splash(q, k, v, causal, lengths, interpret=True)
    expected = _attend(q, k, v, causal=causal, lengths=lengths, backend="xla")
    np.testing.assert_allclose(kernel, expected, atol=1e-5)

  @parameterized.parameters(
    ("cudnn", jnp.float32, None),  # A half-precision kernel.
    ("splash", jnp.float32, True),
  )
  def test_a_kernel_that_cannot_gives_way(self, backend, dtype, mask):
    q, k, v = (jnp.asarray(x, dtype) for x in _inputs())
    mask = None if mask is None else jnp.ones((2, 6, 6), bool)
    kwargs = dict(causal=True, mask=mask)
    np.testing.assert_array_equal(
      _attend(q, k, v, backend=backend, **kwargs),
      _attend(q, k, v, backend="xla", **kwargs),
    )

  @parameterized.parameters((6, 6), (7, 7), (7, 10))
  def test_cudnn_is_given_even_sides_where_it_may_be_trained(
    self, queries, keys
  ):
    inputs = _inputs(queries=queries, keys=keys)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs)
    lengths, plain = jnp.array([4, keys]), jax.nn.dot_product_attention

    def kernel(q, k, v, *, implementation, **options):
      self.assertEqual(implementation, "cudnn")
      self.assertEqual((q.shape[1] % 2, k.shape[1] % 2), (0, 0))
      return plain(q, k, v, **options)

    with mock.patch.object(jax.nn, "dot_product_attention", kernel):
      found = attention.attention(q, k, v, lengths=lengths, backend="cudnn")
    expected = _attend(q, k, v, lengths=lengths, backend="xla")
    np.testing.assert_allclose(
      found.astype(np.float32), expected.astype(np.float32), atol=0.02
    )

  @parameterized.parameters("auto", "xla")
  def test_half_precision_is_near_float32(self, backend):
    inputs = _inputs(queries=160, keys=160, dim=16)
    lengths = jnp.array([100, 160])
    half = _attend(
      *(jnp.asarray(x, jnp.bfloat16) for x in inputs),
      causal=True,
      lengths=lengths,
      backend=backend,
    )
    full = _attend(*inputs, causal=True, lengths=lengths, backend="xla")
    self.assertEqual(half.dtype, jnp.bfloat16)
    for row, length in enumerate(lengths):
      np.testing.assert_allclose(
        half[row, :length].astype(np.float32), full[row, :length], atol=0.05
      )

  def test_unknown_backend_is_an_error(self):
    with self.assertRaisesRegex(ValueError, "'flash' is not one of"):
      _attend(*_inputs(), backend="flash")

  @parameterized.parameters("xla", "splash")
  def test_lowers_for_tpu_with_gradients(self, backend):
    q, k, v = (
      jnp.asarray(x, jnp.bfloat16) for x in _inputs(queries=130, keys=130)
    )

    def total(q, k, v, lengths):
      out = attention.attention(
        q, k, v, causal=True, lengths=lengths, backend=backend
      )
      return out.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(
      q, k, v, jnp.array([100, 130])
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    self.assertEqual("tpu_custom_call" in text, backend == "splash")


class OneQueryTest(parameterized.TestCase):
  def test_over_a_cache_equals_the_last_row_of_the_whole(self):
    q, k, v = _inputs(queries=1, keys=8)
    lengths = np.array([3, 7])
    out = attention.attention_over_cache(
      q, k[:, -1:], v[:, -1:], k[:, :-1], v[:, :-1], lengths
    )
    # The new key is the last one; the cache holds `lengths` valid ones.
    expected = _loop(q, k, v, lambda b, t, s: s < lengths[b] or s == 7)
    np.testing.assert_allclose(out, expected, atol=1e-5)

  @parameterized.parameters("cudnn", "xla")
  def test_in_a_cache_reads_valid_rows_and_own_heads_alone(self, kernel):
    patch = mock.patch.object(attention, "flash_backend", lambda: kernel)
    self.enter_context(patch)
    q, k, v = _inputs(queries=1, keys=8)
    lengths = np.array([3, 8])
    out = attention.attention_in_cache(q, k, v, lengths)
    expected = _loop(q, k, v, lambda b, t, s: s < lengths[b])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    # What another head or a row behind the length has is never seen.
    other = v.copy()
    other[0, 3:], other[:, :, 1] = 1e30, 1e30
    found = attention.attention_in_cache(q, k, other, lengths)
    np.testing.assert_array_equal(found[:, :, :2], out[:, :, :2])

  def test_attention_of_the_last_query_is_the_softmax_row(self):
    q, k, _ = _inputs()
    lengths = np.array([4, 6])
    out = attention.last_query_attention(q, k, lengths)
    expected = np.zeros((2, 6))
    for b, length in enumerate(lengths):
      for n in range(4):
        scores = k[b, :length, n // 2] @ q[b, length - 1, n] / np.sqrt(8)
        expected[b, :length] += np.exp(scores) / np.exp(scores).sum() / 4
    np.testing.assert_allclose(out, expected, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
