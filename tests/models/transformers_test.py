"""The released implementation as an oracle, on another random model.

Sizes differ from the golden folder's: another image, patch, head size, tied
embeddings and one kv head.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl.testing import absltest

from cacovid_jax.models import (
  checkpoints,
  generation,
  llava_onevision,
  qwen2,
  siglip,
)
from tests.models import towers

CONFIG = llava_onevision.LlavaOnevisionConfig(
  vision=siglip.SiglipConfig(
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=2,
    image_size=33,  # 6 x 6 patches of 5, three rows of pixels left over.
    patch_size=5,
  ),
  text=qwen2.Qwen2Config(
    vocab_size=96,
    hidden_size=40,
    intermediate_size=56,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=10,
    rope_theta=5e4,
    tie_embeddings=True,
  ),
  image_token_id=90,
  video_token_id=91,
)
FRAMES = 3
NEW = 5


class TransformersTest(absltest.TestCase):
  def test_exported_model_gives_the_same_logits_and_answers(self):
    gen = np.random.default_rng(7)
    model = llava_onevision.LlavaOnevisionModel(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(
      lambda leaf: gen.standard_normal(leaf.shape).astype(np.float32) * 0.2,
      shapes,
    )
    directory = self.create_tempdir().full_path
    checkpoints.save(directory, CONFIG, params, eos_ids=[93], pad_id=94)
    self.assertIn("model.safetensors", os.listdir(directory))
    oracle, info = (
      transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
      )
    )
    self.assertEmpty(info["missing_keys"])
    self.assertEmpty(info["unexpected_keys"])

    num_video = int(np.prod(model.grid(FRAMES, 33, 33)))
    self.assertEqual(num_video, 27)
    pixels = gen.standard_normal((FRAMES, 3, 33, 33)).astype(np.float32)
    ids = np.concatenate(
      [gen.integers(0, 90, 4), [91] * (num_video + 1), gen.integers(0, 90, 6)]
    )
    inputs = dict(
      input_ids=torch.from_numpy(ids)[None],
      attention_mask=torch.ones(1, len(ids), dtype=torch.long),
      pixel_values_videos=torch.from_numpy(pixels)[None],
    )
    oracle.generation_config.eos_token_id = None
    with torch.no_grad():
      expected = oracle(**inputs).logits[0].numpy()
      answer = oracle.generate(**inputs, max_new_tokens=NEW, do_sample=False)

    @jax.jit
    def run(params, pixels, ids):
      features, _ = towers.encode(model, params, pixels)
      x = model.embed_prompt(params, ids, features, 4 + jnp.arange(27))[None]
      positions = jnp.arange(len(ids))[None, None]
      hidden, _ = model.forward(params, x, positions)
      lengths = jnp.array([len(ids)])
      answer = generation.greedy(
        model,
        params,
        x,
        positions,
        lengths,
        lengths,
        max_new_tokens=NEW,
        eos_ids=(),
        pad_id=94,
      )
      return model.logits(params, hidden)[0], answer[0]

    with jax.default_matmul_precision("highest"):
      logits, mine = run(params, pixels.transpose(0, 2, 3, 1), ids)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(mine, answer[0, -NEW:].numpy())


if __name__ == "__main__":
  absltest.main()
