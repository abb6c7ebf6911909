"""The released implementation as an oracle, on another random Qwen2.5-VL.

Sizes differ from the golden folder's: patch, window, head sizes, one kv head,
untied embeddings; grids that the windows divide and that they do not, and one
slice alone. The config is written flat, as on the hub.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
import transformers
from absl.testing import absltest

from cacovid_jax.models import checkpoints, qwen2, qwen2_5_vl, qwen2_5_vl_vision
from cacovid_jax.parity import models
from tests.models import mrope_loop, towers

GOLDEN = os.path.join(
  os.path.dirname(__file__), os.pardir, "golden", "qwen2_5_vl_tiny"
)
VIDEO, PAD = 91, 94
CONFIG = qwen2_5_vl.Qwen2_5VLConfig(
  vision=qwen2_5_vl_vision.VisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=2,
    out_hidden_size=40,
    full_layers=(0, 2),
    patch_size=3,
    window_size=18,  # 3 x 3 tokens.
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
    rope_sections=(1, 1, 3),
    max_positions=512,
  ),
  image_token_id=90,
  video_token_id=VIDEO,
  vision_start_token_id=88,
  vision_end_token_id=89,
  tokens_per_second=3,
)
GRIDS = ((2, 3, 6), (1, 4, 5), (3, 1, 7))
SECONDS = (0.5, 1.0, 0.75)
TEXT = ((2, 6), (4, 3), (1, 8))  # Tokens before and behind.
NEW = 4


def _params(gen):
  model = qwen2_5_vl.Qwen2_5VLModel(CONFIG)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: gen.standard_normal(leaf.shape, np.float32) * 0.25, shapes
  )


def _inputs(gen):
  """Returns the left-padded batch that both implementations read."""
  rows = [
    [
      *gen.integers(0, 88, before),
      88,
      *[VIDEO] * int(np.prod(grid)),
      89,
      *gen.integers(0, 88, behind),
    ]
    for grid, (before, behind) in zip(GRIDS, TEXT, strict=True)
  ]
  length = max(map(len, rows))
  mask = np.array([[0] * (length - len(r)) + [1] * len(r) for r in rows])
  ids = np.array([[PAD] * (length - len(row)) + row for row in rows])
  patches = 4 * sum(int(np.prod(grid)) for grid in GRIDS)
  return {
    "input_ids": ids,
    "attention_mask": mask,
    "mm_token_type_ids": np.where(ids == VIDEO, 2, 0),
    "pixel_values_videos": gen.standard_normal(
      (patches, CONFIG.vision.patch_values), np.float32
    ),
    "video_grid_thw": np.array(GRIDS) * (1, 2, 2),
    "second_per_grid_ts": np.array(SECONDS, np.float32),
  }


def _positions_of_4_50(ids, mask):
  """Returns (int[3, B, L], deltas int[B, 1]), from the loop."""
  found, deltas = np.ones((3, *ids.shape), np.int64), []
  for row, (grid, seconds) in enumerate(zip(GRIDS, SECONDS, strict=True)):
    valid = mask[row].astype(bool)
    found[:, row, valid], following = mrope_loop.positions(
      ids[row, valid], VIDEO, grid, seconds, 3, "4.50"
    )
    deltas.append([following - ids.shape[1]])
  return found, np.array(deltas)


def _reference(oracle, inputs):
  """Returns the arrays of a golden.npz, from transformers."""
  tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
  ids, mask = inputs["input_ids"], inputs["attention_mask"]
  core, seen = oracle.model, {}
  core.visual.patch_embed.register_forward_hook(
    lambda module, arguments, out: seen.update(patch_embed=out)
  )
  core.visual.merger.register_forward_pre_hook(
    lambda module, arguments: seen.update(tower=arguments[0])
  )

  def decode(x, mask, positions):
    out = core.language_model(
      inputs_embeds=x,
      attention_mask=torch.from_numpy(mask),
      position_ids=torch.as_tensor(positions),
      output_hidden_states=True,
      use_cache=False,
    )
    last = out.last_hidden_state
    return out.hidden_states, last, oracle.lm_head(last)

  with torch.no_grad():
    features = core.visual(
      tensors["pixel_values_videos"], grid_thw=tensors["video_grid_thw"]
    ).pooler_output
    positions, deltas = core.get_rope_index(
      tensors["input_ids"],
      mm_token_type_ids=tensors["mm_token_type_ids"],
      video_grid_thw=tensors["video_grid_thw"],
      second_per_grid_ts=tensors["second_per_grid_ts"],
      attention_mask=tensors["attention_mask"],
    )
    embedded = core.get_input_embeddings()(tensors["input_ids"])
    is_video = (tensors["input_ids"] == VIDEO)[..., None]
    x = embedded.masked_scatter(is_video.expand_as(embedded), features)
    states, last, logits = decode(x, mask, positions)
    old_positions, old_deltas = _positions_of_4_50(ids, mask)
    _, old_last, old_logits = decode(x, mask, old_positions)
    # Every other video token of the first prompt, original positions.
    kept = (mask[0] == 1) & ~((ids[0] == VIDEO) & (np.arange(len(ids[0])) % 2))
    index = np.flatnonzero(kept)
    _, short, short_logits = decode(
      x[:1, index], mask[:1, index], positions[:, :1, index]
    )
    core.rope_deltas = None
    oracle.generation_config.eos_token_id = None
    oracle.generation_config.pad_token_id = PAD
    answers = oracle.generate(**tensors, max_new_tokens=NEW, do_sample=False)

  # Tokens in the order of windows, from their places alone.
  order, ends, start = [], [0], 0
  for slices, height, width in GRIDS:
    windows = {}
    for token in range(slices * height * width):
      time, place = divmod(token, height * width)
      row, column = divmod(place, width)
      name = (time, row // 3, column // 3)
      windows.setdefault(name, []).append(start + token)
    for name in sorted(windows):
      order += windows[name]
      ends.append(ends[-1] + 4 * len(windows[name]))
    start += slices * height * width
  found = dict(
    inputs,
    window_index=np.array(order),
    cu_window_seqlens=np.array(ends),
    patch_embed=seen["patch_embed"],
    vision_tower_output=seen["tower"],
    video_features=features,
    inputs_embeds=x,
    position_ids=positions,
    rope_deltas=deltas,
    hidden_states=torch.stack(states),
    last_hidden_state=last,
    logits=logits,
    generated_ids=answers[:, -NEW:],
    v4_position_ids=old_positions,
    v4_rope_deltas=old_deltas,
    v4_last_hidden_state=old_last,
    v4_logits=old_logits,
    dropped_keep_index=index,
    dropped_last_hidden_state=short,
    dropped_logits=short_logits,
  )
  return {name: np.asarray(value) for name, value in found.items()}


class TransformersTest(absltest.TestCase):
  def test_exported_model_agrees_at_every_stage(self):
    gen = np.random.default_rng(3)
    params = _params(gen)
    folder = self.create_tempdir().full_path
    checkpoints.save(folder, CONFIG, params, eos_ids=[93], pad_id=PAD)
    oracle, info = (
      transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
      )
    )
    self.assertEmpty(info["missing_keys"])
    self.assertEmpty(info["unexpected_keys"])
    arrays = _reference(oracle, _inputs(gen))

    loaded = checkpoints.load(folder)
    self.assertEqual(loaded.model.config, CONFIG)
    found = models.compare(loaded.model, loaded.params, arrays)
    self.assertEqual([stage for stage in found if not stage.ok], [])
    self.assertIn("dropped_logits", [stage.name for stage in found])

  def test_what_transformers_saves_is_the_same_model(self):
    folder, saved = (self.create_tempdir().full_path for _ in range(2))
    params = _params(np.random.default_rng(0))
    checkpoints.save(folder, CONFIG, params, eos_ids=[93], pad_id=PAD)
    oracle = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
      folder
    )
    oracle.save_pretrained(saved)  # With a text section in config.json.
    config = checkpoints.load_config(saved)
    self.assertEqual(config, CONFIG)
    again = checkpoints.load_params(saved, config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # The modules' own names, which 4.52 and later may have written.
    modules = set(map(qwen2_5_vl.hub_name, oracle.state_dict()))
    file = safetensors.numpy.load_file(f"{folder}/model.safetensors")
    self.assertEqual(modules, set(file))

  def test_half_precision_strays_as_far_as_in_transformers(self):
    # The golden model in bfloat16, against its own float32 intermediates.
    arrays = models.read(GOLDEN)
    config = checkpoints.load_config(GOLDEN)
    model = qwen2_5_vl.Qwen2_5VLModel(config, jnp.bfloat16)
    params = checkpoints.load_params(GOLDEN, config, jnp.bfloat16)
    oracle = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
      GOLDEN, attn_implementation="eager", dtype=torch.bfloat16
    )
    patches, x = arrays["pixel_values_videos"], arrays["inputs_embeds"][:1]
    positions = arrays["position_ids"][:, :1]
    self.assertTrue(arrays["attention_mask"][0].all())
    with torch.no_grad():
      theirs = oracle.model.visual(
        torch.from_numpy(patches).bfloat16(),
        grid_thw=torch.from_numpy(arrays["video_grid_thw"]),
      ).pooler_output
      hidden = oracle.model.language_model(
        inputs_embeds=torch.from_numpy(x).bfloat16(),
        attention_mask=torch.ones(x.shape[:2], dtype=torch.long),
        position_ids=torch.from_numpy(positions),
      ).last_hidden_state
      their_logits = oracle.lm_head(hidden)
    starts = np.cumsum(arrays["video_grid_thw"].prod(axis=1))[:-1]
    encode = jax.jit(towers.features(model))
    ours = [
      encode(params, video, model.layout(grid // (1, 2, 2)))
      for video, grid in zip(
        np.split(patches, starts), arrays["video_grid_thw"], strict=True
      )
    ]
    hidden, _ = jax.jit(model.forward)(
      params, jnp.asarray(x), positions.transpose(1, 0, 2)
    )
    logits = model.logits(params, hidden)

    def error(actual, expected):
      difference = np.asarray(actual, np.float32) - expected
      return np.sqrt(np.square(difference).mean())

    for actual, reference, expected in (
      (np.concatenate(ours), theirs, arrays["video_features"]),
      (logits, their_logits, arrays["logits"][:1]),
    ):
      most = error(reference.float().numpy(), expected)
      self.assertGreater(most, 0.0)
      self.assertLess(error(actual, expected), 1.25 * most)


if __name__ == "__main__":
  absltest.main()
