"""A policy in public files of several types."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, llava_onevision, qwen2
from cacovid_jax.policy import loading, network

CONFIG = network.PolicyConfig.tiny()
POLICY = network.Policy(CONFIG)


@pytest.fixture(name="params", scope="module")
def fixture_params():
  """Returns parameters of which no value is a bfloat16."""
  rng = np.random.default_rng(0)
  return traverse_util.unflatten_dict(
    {
      path: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)
      for path, shape in network.shapes(CONFIG).items()
    },
    sep="/",
  )


@pytest.mark.parametrize("with_mode", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_files_have_the_type_asked_for(params, tmp_path, dtype, with_mode):
  if not with_mode:
    params = {k: v for k, v in params.items() if k != "mode_selection"}
  path = tmp_path / "policy.safetensors"
  loading.save(path, POLICY, params, dtype)
  tensors = safetensors.numpy.load_file(path)
  assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
  mode = [name for name in tensors if ".mode_selection." in name]
  assert len(mode) == (8 if with_mode else 0)
  back = loading.load(path, POLICY)
  assert ("mode_selection" in back) == with_mode
  assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {
    jnp.dtype("float32")
  }


@pytest.mark.parametrize("max_shard_bytes", [None, 30_000])
def test_a_policy_among_the_weights_of_its_base_model(
  params, tmp_path, max_shard_bytes
):
  """As the public release has it: one directory, names beside the model's."""
  config = llava_onevision.LlavaOnevisionConfig.tiny()
  assert config.text == CONFIG.llm == qwen2.Qwen2Config.tiny()
  model = llava_onevision.LlavaOnevisionModel(config)
  base = jax.tree.map(
    lambda leaf: np.ones(leaf.shape, np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  kwargs = dict(eos_ids=[1], pad_id=0, max_shard_bytes=max_shard_bytes)
  checkpoints.save(tmp_path, config, base, **kwargs)
  assert not loading.has_policy(tmp_path)
  with pytest.raises(errors.UserError, match="no tensor of it begins with"):
    loading.load(tmp_path, POLICY)

  public = network.to_public(params, ml_dtypes.bfloat16)
  checkpoints.save(tmp_path, config, base, extra=public, **kwargs)
  assert loading.has_policy(tmp_path)
  expected = jax.tree.map(
    lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params
  )
  found = loading.load(tmp_path, POLICY)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  # Reading the base model and writing it elsewhere keeps the policy.
  loaded = checkpoints.load(tmp_path)
  out = tmp_path / "out"
  checkpoints.save(out, config, loaded.params, extra=loaded.extra, **kwargs)
  found = loading.load(out, POLICY)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
