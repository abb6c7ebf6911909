"""Directories that transformers reads from us, and writes for us."""

import jax
import numpy as np
import pytest
import torch
import transformers

from cacovid_jax.models import (
  checkpoints,
  llava_onevision,
  qwen2_5_vl,
  safetensors_io,
)
from tests.models import tensors as tensor_files

MODELS = {
  "llava_onevision": (
    llava_onevision.LlavaOnevisionModel(
      llava_onevision.LlavaOnevisionConfig.tiny()
    ),
    transformers.LlavaOnevisionForConditionalGeneration,
  ),
  "qwen2_5_vl": (
    qwen2_5_vl.Qwen2_5VLModel(qwen2_5_vl.Qwen2_5VLConfig.tiny()),
    transformers.Qwen2_5_VLForConditionalGeneration,
  ),
}


@pytest.mark.parametrize("max_shard_bytes", [None, 60_000])
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_bits_there_and_back(kind, max_shard_bytes, tmp_path):
  model, oracle_class = MODELS[kind]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  ours, theirs = tmp_path / "ours", tmp_path / "theirs"
  checkpoints.save(
    ours,
    model.config,
    params,
    eos_ids=[5],
    pad_id=7,
    max_shard_bytes=max_shard_bytes,
  )
  oracle, info = oracle_class.from_pretrained(
    ours, output_loading_info=True, dtype=torch.float32
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  assert not info["mismatched_keys"]
  written = tensor_files.read(ours)
  # Not one value is left as their initialisation made it.
  values = {id(p): p for p in oracle.parameters()}.values()
  assert sum(p.numel() for p in values) == sum(v.size for v in written.values())

  shard = "10GB" if max_shard_bytes is None else max_shard_bytes
  oracle.save_pretrained(theirs, max_shard_size=shard)
  assert (theirs / safetensors_io.INDEX).exists() == (
    max_shard_bytes is not None
  )
  loaded = checkpoints.load(theirs, None)
  assert loaded.model == model
  assert (loaded.eos_ids, loaded.pad_id) == ((5,), 7)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
