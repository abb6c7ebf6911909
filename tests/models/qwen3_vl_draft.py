"""Qwen3-VL as a `VideoLLM`, for one video at a time: does the protocol hold?

Temporal patches stand apart in the prompt, each behind its time as text, and
feature maps of three layers of the tower enter the decoder's first layers.

Axes: T temporal patches, H W token grid of one, N = T·H·W video tokens, P rows
of patches, D width, S auxiliary feature maps. Paper:
https://arxiv.org/abs/2511.21631.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import (
  attention,
  checkpoints,
  placement,
  processors,
  qwen2,
  qwen2_5_vl_vision,
  siglip,
  video_llm,
)
from tests.models import tensors as tensor_files

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """Sizes of the tower; `table_side` is that of its learned positions."""

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  out_hidden_size: int
  table_side: int
  deep_layers: tuple[int, ...]
  patch_size: int
  temporal_patch_size: int
  merge_size: int

  @property
  def head_dim(self):
    return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Tower, decoder and token ids."""

  vision: VisionConfig
  text: qwen2.Qwen2Config
  video_token_id: int
  vision_start_token_id: int
  vision_end_token_id: int

  @classmethod
  def from_hf(cls, config):
    """Reads a config.json."""
    vision, text = config["vision_config"], config["text_config"]
    decoder = qwen2.Qwen2Config.from_hf(
      text,
      tie_embeddings=config["tie_word_embeddings"],
      model_type="qwen3_vl_text",
      num_sections=3,
    )
    return cls(
      vision=VisionConfig(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_layers=vision["depth"],
        num_heads=vision["num_heads"],
        out_hidden_size=vision["out_hidden_size"],
        table_side=math.isqrt(vision["num_position_embeddings"]),
        deep_layers=tuple(vision["deepstack_visual_indexes"]),
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
      ),
      text=dataclasses.replace(
        decoder,
        rope_interleaved=True,
        attention_bias=text["attention_bias"],
        qk_norm=True,
      ),
      video_token_id=config["video_token_id"],
      vision_start_token_id=config["vision_start_token_id"],
      vision_end_token_id=config["vision_end_token_id"],
    )


def coordinates(grid, merge):
  """Returns int32[2, P] row and column of each patch, tokens apart."""
  _, height, width = grid
  rows, columns = np.indices((height * merge, width * merge))

  def by_token(x):
    x = x.reshape(height, merge, width, merge).transpose(0, 2, 1, 3)
    return np.tile(x.ravel(), grid[0])

  return np.stack([by_token(rows), by_token(columns)]).astype(np.int32)


def interpolation(places, size, side):
  """Returns (index int[4, P], weight float32[4, P]) into a side x side table.

  Args:
    places: int32[2, P] of `coordinates`.
    size: (rows, columns) of patches of a frame, whose corners are the table's.
    side: of the table.
  """
  scale = (side - 1) / np.maximum(np.array(size) - 1, 1)
  exact = places * scale[:, None]
  low = np.floor(exact).astype(int)
  high = np.minimum(low + 1, side - 1)
  part = exact - low
  index, weight = [], []
  for row, by_row in ((low[0], 1 - part[0]), (high[0], part[0])):
    for column, by_column in ((low[1], 1 - part[1]), (high[1], part[1])):
      index.append(row * side + column)
      weight.append(by_row * by_column)
  return np.stack(index), np.stack(weight).astype(np.float32)


class Merger(nn.Module):
  """Joins the patches of a token, behind a norm of each or of all of them."""

  config: VisionConfig
  norm_joined: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    cfg = self.config
    width = cfg.hidden_size * cfg.merge_size**2
    if self.norm_joined:
      x = x.reshape(-1, width)
    x = siglip.LayerNorm(_EPSILON, self.dtype, name="norm")(x)
    x = nn.Dense(width, dtype=self.dtype, name="linear_fc1")(
      x.reshape(-1, width)
    )
    x = nn.gelu(x, approximate=False)
    return nn.Dense(cfg.out_hidden_size, dtype=self.dtype, name="linear_fc2")(x)


class Tower(nn.Module):
  """Patches, learned and rotary positions, blocks, and 1 + S mergers."""

  config: VisionConfig
  dtype: jnp.dtype
  backend: str

  @nn.compact
  def __call__(self, patches, layout):
    """Returns (features float[N, D], out) of patches float[P, ...]."""
    cfg = self.config
    places, index, weight, by_patch = layout

    def dense(size, name):
      return nn.Dense(size, dtype=self.dtype, name=name)

    def norm(name):
      return siglip.LayerNorm(_EPSILON, self.dtype, name=name)

    x = dense(cfg.hidden_size, "patch_embed")(patches.astype(self.dtype))
    out = {"patch_embed": x}
    shape = (cfg.table_side**2, cfg.hidden_size)
    table = self.param("pos_embed", nn.initializers.normal(0.02), shape)
    x = x + (table[index] * weight[..., None]).sum(axis=0).astype(self.dtype)
    cos, sin = qwen2_5_vl_vision.rotary(places, cfg.head_dim, 1e4)

    deep = []
    for number in range(cfg.num_layers):
      name = f"blocks_{number}"
      h = dense(3 * cfg.hidden_size, f"{name}_qkv")(norm(f"{name}_norm1")(x))
      h = h.reshape(-1, 3, cfg.num_heads, cfg.head_dim)
      q, k = (qwen2_5_vl_vision.rotate(h[:, i], cos, sin) for i in range(2))
      # No patch sees another time.
      h = attention.attention(
        *(a.reshape(len(by_patch), -1, *a.shape[1:]) for a in (q, k, h[:, 2])),
        backend=self.backend,
      )
      x = x + dense(cfg.hidden_size, f"{name}_proj")(h.reshape(x.shape))
      h = dense(cfg.intermediate_size, f"{name}_fc1")(norm(f"{name}_norm2")(x))
      h = nn.gelu(h, approximate=True)
      x = x + dense(cfg.hidden_size, f"{name}_fc2")(h)
      if number in cfg.deep_layers:
        merger = Merger(cfg, True, self.dtype, name=f"deep_{len(deep)}")
        deep.append(merger(x))
    out |= {"vision_tower_output": x, "deep": jnp.stack(deep)}
    return Merger(cfg, False, self.dtype, name="merger")(x), out


@dataclasses.dataclass(frozen=True)
class Qwen3VLModel(video_llm.VideoLLM):
  """Qwen3-VL as a `VideoLLM`; its towers hand out no signals yet."""

  config: Config

  @property
  def num_deep(self):
    return len(self.config.vision.deep_layers)

  @property
  def _tower(self):
    return Tower(self.config.vision, self.dtype, self.backend)

  @property
  def processor(self):
    vision = self.config.vision
    return processors.Qwen2_5VLProcessor(
      patch_size=vision.patch_size,
      temporal_patch_size=vision.temporal_patch_size,
      merge_size=vision.merge_size,
      mean=(0.5, 0.5, 0.5),
      std=(0.5, 0.5, 0.5),
    )

  def read_processor(self, directory):
    return processors.Qwen2_5VLProcessor.from_files(directory)

  def tower_inputs(self, inputs, bucket=None):
    assert bucket is None, "one video at a time"
    grid, vision = tuple(map(int, inputs.grid)), self.config.vision
    merge = vision.merge_size
    places = coordinates(grid, merge)
    size = (grid[1] * merge, grid[2] * merge)
    weights = interpolation(places, size, vision.table_side)
    return inputs._replace(layout=(places, *weights, np.arange(grid[0])))

  def encode_stages(self, params, inputs, signals=()):
    assert not signals, "none yet"
    return self._tower.apply(
      {"params": params["visual"]}, inputs.values, inputs.layout
    )

  def encode_prompt(self, tokenizer, text, grid, second_per_grid_t=1.0):
    """Writes each temporal patch behind the time of its middle, as text."""
    cfg = self.config
    ids = tokenizer.encode(tokenizer.render(text))
    place = ids.index(cfg.video_token_id)
    before, after = ids[: place - 1], ids[place + 2 :]  # Without the tags.
    rows = []
    for patch in range(grid[0]):
      # Of its frames, half a patch apart.
      seconds = (patch + 1 / 4) * second_per_grid_t
      before = before + tokenizer.encode(f"<{seconds:.1f} seconds>")
      before = before + [cfg.vision_start_token_id]
      rows += range(len(before), len(before) + grid[1] * grid[2])
      before = before + [cfg.video_token_id] * (grid[1] * grid[2])
      before = before + [cfg.vision_end_token_id]
    return tokenizer_lib.Prompt(
      np.array(before + after, np.int32), np.array(rows, np.int32)
    )

  def positions(self, ids, video):
    """Time stands still within a temporal patch and is text otherwise."""
    found, current, seen = [], 0, 0
    _, height, width = map(int, video.grid)
    for token in ids:
      if token != self.config.video_token_id:
        found.append((current,) * 3)
        current += 1
        continue
      place = seen % (height * width)
      found.append((current, current + place // width, current + place % width))
      seen += 1
      if place == height * width - 1:
        current += max(height, width)
    return np.array(found, np.int32).T, int(np.max(found)) + 1

  def init(self, rng):
    vision = self.config.vision
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = self.tower_inputs(
      processors.TowerInputs(
        np.zeros((vision.merge_size**2, values)), (1, 1, 1)
      )
    )
    decoder = qwen2.Qwen2(self.config.text)
    x = jnp.zeros((1, 1, self.config.text.hidden_size))

    def touch(module, x):
      hidden, _ = module(x, jnp.zeros((1, 3, 1), jnp.int32))
      return module.logits(hidden)

    return {
      "visual": self._tower.init(rng, inputs.values, inputs.layout)["params"],
      "language_model": decoder.init(rng, x, method=touch)["params"],
    }


def weight_table(config):
  """Returns the rows of the weights, see `placement.rows`."""
  hub = "model.visual"
  patches = {"patch_embed.proj": "dense patch_embed", "pos_embed": "table"}
  rows = placement.rows(hub, "visual", **patches)
  source = f"{hub}.patch_embed.proj.weight"
  rows[source] = (rows[source][0], "conv3d", None)
  for number in range(config.vision.num_layers):
    kinds = {
      "norm1": "norm",
      "norm2": "norm",
      "attn.qkv": "dense",
      "attn.proj": "dense",
      "mlp.linear_fc1": "dense fc1",
      "mlp.linear_fc2": "dense fc2",
    }
    for name, kind in kinds.items():
      kind, _, ours = kind.partition(" ")
      ours = ours or name.rpartition(".")[2]
      kinds[name] = f"{kind} blocks_{number}_{ours}"
    rows |= placement.rows(f"{hub}.blocks.{number}", "visual", **kinds)
  mergers = {"merger": "merger"} | {
    f"deepstack_merger_list.{i}": f"deep_{i}"
    for i in range(len(config.vision.deep_layers))
  }
  for theirs, ours in mergers.items():
    rows |= placement.rows(
      f"{hub}.{theirs}",
      f"visual/{ours}",
      norm="norm",
      linear_fc1="dense",
      linear_fc2="dense",
    )
  return rows | qwen2.decoder_rows(
    config.text, "model.language_model", "lm_head.weight"
  )


def load(directory):
  """Returns (model, params) of a checkpoint directory, in float32."""
  model = Qwen3VLModel(
    Config.from_hf(checkpoints.read_json(directory / "config.json"))
  )
  tensors = tensor_files.read(directory)
  params = {}
  for name, (path, layout, layers) in weight_table(model.config).items():
    if layers is None:
      params[path] = placement.to_ours(layout, tensors.pop(name))
    else:
      params[path] = np.stack(
        [
          placement.to_ours(layout, tensors.pop(name.format(layer)))
          for layer in range(layers)
        ]
      )
  assert not tensors, sorted(tensors)
  params = traverse_util.unflatten_dict(params, sep="/")
  return model, jax.tree.map(jnp.asarray, params)
