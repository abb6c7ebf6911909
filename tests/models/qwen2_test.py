"""Decoder: cache, padding, precision; its values are compared elsewhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from cacovid_jax import errors
from cacovid_jax.models import attention, llava_onevision, products, qwen2, rope

CONFIG = qwen2.Qwen2Config.tiny()
MODEL = qwen2.Qwen2(CONFIG)


# One compilation per shape: eager calls compile every small operation.
_apply = jax.jit(
  MODEL.apply,
  static_argnames=(
    "causal",
    "method",
    "want_attention",
    "want_cache",
    "want_hidden",
  ),
)


@functools.cache
def _params():
  x = jnp.zeros((1, 4, CONFIG.hidden_size))
  positions = jnp.zeros((1, 1, 4), jnp.int32)
  params = jax.jit(MODEL.init)(jax.random.key(0), x, positions)
  # Biases and scales away from their neutral start.
  noise = jax.random.key(1)
  return jax.tree.map(
    lambda leaf: leaf + 0.1 * jax.random.normal(noise, leaf.shape), params
  )


def _inputs(batch=2, length=9, seed=0):
  gen = np.random.default_rng(seed)
  x = gen.standard_normal((batch, length, CONFIG.hidden_size))
  positions = np.broadcast_to(np.arange(length), (batch, 1, length))
  return jnp.asarray(x, jnp.float32), jnp.asarray(positions)


class Qwen2Test(parameterized.TestCase):
  def test_decoding_equals_the_whole_sequence(self):
    model = llava_onevision.LlavaOnevisionModel(
      llava_onevision.LlavaOnevisionConfig.tiny()
    )
    self.assertEqual(model.config.text, CONFIG)
    params = {"language_model": _params()["params"]}
    ids = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 9))
    x = model.embed_text(params, ids)
    _, positions = _inputs()
    lengths = jnp.array([4, 6])
    hidden, _ = _apply(_params(), x, positions)
    whole = _apply(_params(), hidden, method="logits")
    _, out = _apply(
      _params(), x[:, :6], positions[..., :6], lengths=lengths, want_cache=True
    )
    cache = qwen2.Cache(out["keys"], out["values"], lengths)
    cache = qwen2.with_room(cache, 3)
    decode = jax.jit(model.decode_step)
    rows = jnp.arange(2)
    for step in range(3):
      where = lengths + step
      logits, cache = decode(params, ids[rows, where], where[:, None], cache)
      np.testing.assert_allclose(logits, whole[rows, where], atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, lengths + 3)

  def test_right_padding_does_not_change_valid_rows(self):
    x, positions = _inputs(batch=1)
    alone, _ = _apply(_params(), x[:, :5], positions[..., :5])
    padded, _ = _apply(_params(), x, positions, lengths=jnp.array([5]))
    np.testing.assert_allclose(padded[:, :5], alone, atol=1e-5)

  def test_left_padding_by_mask_does_not_change_valid_rows(self):
    x, positions = _inputs(batch=1)
    alone, _ = _apply(_params(), x[:, 4:], positions[..., :5])
    shifted = jnp.maximum(positions - 4, 0)
    mask = jnp.broadcast_to(jnp.arange(9) >= 4, (1, 9, 9))
    padded, _ = _apply(_params(), x, shifted, mask=mask)
    np.testing.assert_allclose(padded[:, 4:], alone, atol=1e-5)

  def test_packed_block_mask_equals_separate_prompts(self):
    # Two questions of 3 tokens behind one shared prefix of 3.
    x, _ = _inputs(batch=1)
    positions = jnp.array([[[0, 1, 2, 3, 4, 5, 3, 4, 5]]])
    block = jnp.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    mask = (block[None] == 0) | (block[None] == block[:, None])
    packed, _ = _apply(_params(), x, positions, mask=mask[None])
    for name in (1, 2):
      rows = jnp.flatnonzero((block == 0) | (block == name))
      alone, _ = _apply(_params(), x[:, rows], positions[..., rows])
      np.testing.assert_allclose(packed[:, rows], alone, atol=1e-5)

  def test_bidirectional_pass_sees_what_follows(self):
    x, positions = _inputs(batch=1)
    changed = x.at[0, -1].add(1.0)
    apply = functools.partial(_apply, _params())
    causal = [apply(v, positions)[0] for v in (x, changed)]
    np.testing.assert_array_equal(causal[0][0, 0], causal[1][0, 0])
    both = [apply(v, positions, causal=False)[0] for v in (x, changed)]
    self.assertGreater(np.abs(both[0][0, 0] - both[1][0, 0]).max(), 1e-4)

  def test_attention_of_the_last_token_comes_from_every_layer(self):
    x, positions = _inputs()
    lengths = jnp.array([5, 9])
    _, out = _apply(
      _params(),
      x,
      positions,
      lengths=lengths,
      want_attention=True,
      want_hidden=True,
    )
    rows = out["last_query_attention"]
    self.assertEqual(rows.shape, (CONFIG.num_layers, 2, 9))
    np.testing.assert_allclose(rows.sum(axis=-1), 1.0, atol=1e-5)
    # Layer 2 by hand, from the hidden states before it.
    layer = jax.tree.map(lambda leaf: leaf[2], _params()["params"]["layers"])

    @jax.jit
    def by_hand(h):
      h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps)
      h = h * layer["input_layernorm"]["scale"]
      angles = rope.angles(
        jnp.moveaxis(positions, 1, 0), CONFIG.head_dim, CONFIG.rope_theta
      )

      def heads(name, number):
        y = h @ layer[name]["kernel"] + layer[name]["bias"]
        return rope.apply(y.reshape(2, 9, number, CONFIG.head_dim), *angles)

      return attention.last_query_attention(
        heads("q_proj", 4), heads("k_proj", 2), lengths
      )

    expected = by_hand(out["hidden"][1])
    np.testing.assert_allclose(rows[2], expected, atol=1e-5)

  def test_rematerialised_gradients_are_the_same(self):
    x, positions = _inputs()

    def total(remat, params):
      model = qwen2.Qwen2(CONFIG, remat=remat)
      return jnp.sin(model.apply(params, x, positions)[0]).sum()

    gradient = jax.jit(jax.grad(total, argnums=1), static_argnums=0)
    plain, again = gradient(False, _params()), gradient(True, _params())
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), plain, again
    )

  def test_tied_head_reads_the_embedding_table(self):
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = {"params": dict(_params()["params"])}
    del params["params"]["lm_head"]
    hidden = _inputs()[0]
    logits = qwen2.Qwen2(config).apply(params, hidden, method="logits")
    table = params["params"]["embed_tokens"]
    np.testing.assert_allclose(logits, hidden @ table.T, atol=1e-5)

  def test_bfloat16_logits_are_float32(self):
    model = qwen2.Qwen2(CONFIG, jnp.bfloat16)
    x, positions = _inputs()
    hidden, _ = jax.eval_shape(model.apply, _params(), x, positions)
    self.assertEqual(hidden.dtype, jnp.bfloat16)
    head = functools.partial(model.apply, method="logits")
    logits = jax.eval_shape(head, _params(), hidden)
    self.assertEqual(logits.dtype, jnp.float32)

  def test_logits_of_one_row_are_a_sum_on_a_gpu(self):
    model, hidden = qwen2.Qwen2(CONFIG, jnp.bfloat16), _inputs()[0][:1, 0]
    hidden = hidden.astype(jnp.bfloat16)
    table = _params()["params"]["lm_head"].astype(jnp.bfloat16)
    found = products.of_one_row(hidden, table)
    expected = np.float64(hidden) @ np.float64(table).T
    np.testing.assert_allclose(found, expected, atol=1e-5)
    head = jax.jit(functools.partial(model.apply, method="logits"))
    for platform, rows in (("cuda", 1), ("cuda", 2), ("cpu", 1)):
      x = jnp.repeat(hidden, rows, axis=0)
      lowered = head.trace(_params(), x).lower(lowering_platforms=(platform,))
      by_product = "dot_general" in lowered.as_text()
      self.assertEqual(by_product, (platform, rows) != ("cuda", 1))


class RMSNormTest(absltest.TestCase):
  def test_scale_multiplies_the_rounded_value(self):
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    x = jnp.asarray(x, jnp.bfloat16)
    scale = jnp.linspace(0.5, 1.7, 32)
    norm = qwen2.RMSNorm(1e-6, jnp.bfloat16)
    out = norm.apply({"params": {"scale": scale}}, x)
    full = np.asarray(x, np.float32)
    full = full / np.sqrt((full**2).mean(-1, keepdims=True) + 1e-6)
    two = full.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)
    one = (full * scale).astype(jnp.bfloat16)
    np.testing.assert_array_equal(out, two)
    self.assertTrue((np.asarray(out) != np.asarray(one)).any())


class Qwen2ConfigTest(parameterized.TestCase):
  def test_round_trip(self):
    config = qwen2.Qwen2Config.qwen2_0_5b()
    self.assertEqual(qwen2.Qwen2Config.from_hf(config.to_hf()), config)

  def test_rotary_base_of_either_library_version(self):
    old = CONFIG.to_hf()
    new = {k: v for k, v in old.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    self.assertEqual(
      qwen2.Qwen2Config.from_hf(new), qwen2.Qwen2Config.from_hf(old)
    )

  def test_tied_in_either_place_means_tied(self):
    inside = CONFIG.to_hf() | {"tie_word_embeddings": True}
    self.assertTrue(qwen2.Qwen2Config.from_hf(inside).tie_embeddings)
    outside = qwen2.Qwen2Config.from_hf(CONFIG.to_hf(), tie_embeddings=True)
    self.assertTrue(outside.tie_embeddings)
    self.assertFalse(qwen2.Qwen2Config.from_hf(CONFIG.to_hf()).tie_embeddings)

  @parameterized.parameters(
    ("rope_theta", None, "lacks text_config.rope_theta"),
    ("hidden_size", "wide", "hidden_size is 'wide'"),
    ("num_hidden_layers", 0, "num_hidden_layers is 0"),
    ("num_key_value_heads", 3, "4 is no multiple of num_key_value_heads 3"),
    ("use_sliding_window", True, "use_sliding_window is True"),
    ("hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("rope_scaling", {"type": "yarn"}, "type 'yarn'"),
  )
  def test_what_is_not_implemented_stops_with_its_name(self, key, value, text):
    with self.assertRaisesRegex(errors.UserError, text):
      qwen2.Qwen2Config.from_hf(CONFIG.to_hf() | {key: value})


if __name__ == "__main__":
  absltest.main()
