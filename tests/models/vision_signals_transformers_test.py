"""Attention and keys of SigLIP against transformers' own attention maps."""

import jax
import numpy as np
import torch
import transformers
from absl.testing import absltest

from cacovid_jax.models import checkpoints, llava_onevision, siglip
from tests.models import towers

WANT = ("vision_attention", "vision_keys")


class VisionSignalsTransformersTest(absltest.TestCase):
  def test_siglip_signals_are_those_of_the_eager_maps(self):
    config = llava_onevision.LlavaOnevisionConfig.tiny()
    model = llava_onevision.LlavaOnevisionModel(config)
    gen = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(
      lambda leaf: gen.standard_normal(leaf.shape).astype(np.float32) * 0.3,
      shapes,
    )
    directory = self.create_tempdir().full_path
    checkpoints.save(directory, config, params, eos_ids=[3], pad_id=4)
    oracle = transformers.LlavaOnevisionForConditionalGeneration
    oracle = oracle.from_pretrained(directory, attn_implementation="eager")
    tower = oracle.model.vision_tower
    keys = []
    attention = [m for m in tower.modules() if hasattr(m, "k_proj")][-1]
    attention.k_proj.register_forward_hook(lambda *args: keys.append(args[2]))

    pixels = gen.standard_normal((3, 3, 30, 30)).astype(np.float32)
    with torch.no_grad():
      out = tower(torch.from_numpy(pixels), output_attentions=True)
    maps = out.attentions[-1].double().numpy()  # [F, N, P, P]
    received = maps.mean(axis=(1, 2))[..., None]
    heads = config.vision.num_heads
    keys = keys[-1].double().numpy()
    keys = keys.reshape(*keys.shape[:2], heads, -1).mean(axis=2)

    def pool(x):  # As the released code does, torch's own resize.
      side = config.vision.side
      x = torch.from_numpy(x).permute(0, 2, 1).reshape(3, -1, side, side)
      size = [config.pooled_side] * 2
      x = torch.nn.functional.interpolate(x, size=size, mode="bilinear")
      return x.flatten(2).permute(0, 2, 1).flatten(0, 1).numpy()

    encode = jax.jit(lambda *args: towers.encode(model, *args, signals=WANT))
    with jax.default_matmul_precision("highest"):
      _, signals = encode(params, pixels.transpose(0, 2, 3, 1))
    self.assertEqual(siglip.SiglipConfig.tiny().num_layers, len(out.attentions))
    np.testing.assert_allclose(
      signals["vision_attention"], pool(received)[:, 0], atol=1e-5
    )
    np.testing.assert_allclose(signals["vision_keys"], pool(keys), atol=1e-4)


if __name__ == "__main__":
  absltest.main()
