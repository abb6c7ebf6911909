"""Meshes, sharding rules and start-up arguments."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cacovid_jax import errors
from cacovid_jax.inference import clips, programs
from cacovid_jax.models import llava_onevision
from cacovid_jax.parallel import mesh as mesh_lib


def test_data_takes_what_model_leaves():
  mesh = mesh_lib.make_mesh(0, 2, devices=jax.devices()[:8])
  assert dict(mesh.shape) == {"data": 4, "model": 2}
  assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize("data,model", [(9, 1), (4, 4), (1, 0), (-1, 1)])
def test_impossible_mesh_is_named(data, model):
  with pytest.raises(errors.UserError, match="mesh"):
    mesh_lib.make_mesh(data, model, devices=jax.devices()[:8])


def test_base_weights_split_by_rule():
  mesh = mesh_lib.make_mesh(1, 2, devices=jax.devices()[:2])
  model = llava_onevision.LlavaOnevisionModel(
    llava_onevision.LlavaOnevisionConfig.tiny()
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  specs = mesh_lib.partition_specs(params, mesh)
  layers = specs["language_model"]["layers"]
  assert layers["q_proj"]["kernel"] == P(None, None, "model")
  assert layers["q_proj"]["bias"] == P(None, "model")
  assert layers["o_proj"]["kernel"] == P(None, "model", None)
  assert layers["down_proj"]["kernel"] == P(None, "model", None)
  assert layers["input_layernorm"]["scale"] == P()
  assert specs["language_model"]["embed_tokens"] == P("model", None)
  assert specs["image_newline"] == P()


def test_axis_that_does_not_divide_is_replicated():
  mesh = mesh_lib.make_mesh(1, 2, devices=jax.devices()[:2])
  params = {"q_proj": {"kernel": jnp.zeros((4, 3))}}
  assert mesh_lib.partition_specs(params, mesh)["q_proj"]["kernel"] == P()


def test_heads_that_do_not_divide_are_one_line():
  mesh = mesh_lib.make_mesh(1, 8, devices=jax.devices()[:8])
  with pytest.raises(errors.UserError) as caught:
    mesh_lib.check_heads(28, mesh)
  assert str(caught.value) == (
    "config.mesh.model=8 does not divide the base model's 28 attention heads;"
    " use one of 1, 2, 4, 7, 14, 28"
  )
  mesh_lib.check_heads(16, mesh)


def test_one_device_replicates_everything():
  mesh = mesh_lib.make_mesh(1, 1, devices=jax.devices()[:1])
  params = {"q_proj": {"kernel": jnp.zeros((4, 4))}}
  assert mesh_lib.partition_specs(params, mesh)["q_proj"]["kernel"] == P()


def test_put_splits_over_data():
  mesh = mesh_lib.make_mesh(4, 1, devices=jax.devices()[:4])
  placed = mesh_lib.put({"x": np.arange(8)}, mesh, P("data"))["x"]
  assert placed.sharding.shard_shape((8,)) == (2,)
  np.testing.assert_array_equal(placed, np.arange(8))


def test_programs_are_compiled_with_the_options_of_their_kind(monkeypatch):
  told = {"xla_gpu_enable_triton_gemm": False}
  apart = {"xla_gpu_dot_merger_threshold_mb": 0}
  for kind, more in (("tower", apart), ("prefill", {}), ("training", {})):
    assert mesh_lib.compiler_options(kind, "gpu") == told | more
    assert not mesh_lib.compiler_options(kind, "cpu")
  assert not mesh_lib.compiler_options("", "gpu")
  with pytest.raises(ValueError, match="kind 'other'"):
    mesh_lib.compiler_options("other", "cpu")
  run = functools.partial(mesh_lib.jit_rows, lambda x: x + 1, None, weights=())
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert run("tower")(1) == 2  # The compiler here knows the option.

  def unknown(kind, platform):
    return {"no_such_option": 1} if kind else {}

  monkeypatch.setattr(mesh_lib, "compiler_options", unknown)
  assert run("")(1) == 2
  with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
    run("tower")(1)


def test_what_reads_prompts_and_videos_says_so_to_the_compiler(monkeypatch):
  config = llava_onevision.LlavaOnevisionConfig.tiny()
  model, kinds = llava_onevision.LlavaOnevisionModel(config), []

  def jit(function, kind="", **_):
    kinds.append(kind)
    return function

  monkeypatch.setattr(mesh_lib, "jit", jit)
  checkpoint = types.SimpleNamespace(model=model, eos_ids=(), pad_id=0)
  programs.Programs(checkpoint, 1)
  clips.tower_program(model, (), None)
  # Embedding and the question's text; answers, with and without a video, and
  # what is read for likelihoods; the tower.
  assert kinds == ["", "", "prefill", "prefill", "prefill", "tower"]
