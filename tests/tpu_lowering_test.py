"""Programs of training, prompts and towers lower for a TPU, kernels included.

The splash kernel is asked for by name, so that it is in the lowered text on
any machine; it pads heads and rows to its least block of 128. Nothing is
compiled or run: what Mosaic makes of the kernel shows on a TPU alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.inference import clips
from cacovid_jax.models import (
  layers,
  llava_onevision,
  processors,
  qwen2_5_vl,
  token_grid,
)
from cacovid_jax.policy import network
from cacovid_jax.training import programs, ratio, step
from tests.training import tiny

KERNEL = "tpu_custom_call"
MODELS = {
  "llava_onevision": llava_onevision.LlavaOnevisionModel(
    llava_onevision.LlavaOnevisionConfig.tiny()
  ),
  "qwen2_5_vl": qwen2_5_vl.Qwen2_5VLModel(qwen2_5_vl.Qwen2_5VLConfig.tiny()),
}
_shape = jax.ShapeDtypeStruct


def _parts(family):
  """Returns (model, its weights' shapes, policy, its parameters' shapes)."""
  model = dataclasses.replace(
    MODELS[family], dtype=jnp.bfloat16, backend="splash"
  )
  # The form that accelerators have large weights in.
  weights = jax.eval_shape(
    lambda key: layers.convert(model.init(key), layers.FUSED), jax.random.key(0)
  )
  policy = network.Policy.from_llm_config(
    model.config.text, dtype=jnp.bfloat16, num_halvings=2, backend="splash"
  )
  params = jax.eval_shape(
    lambda key, given: policy.init_from_llm(key, given),
    jax.random.key(0), jax.eval_shape(model.init, jax.random.key(0)),
  )  # fmt: skip
  return model, weights, policy, params


def _text(function, *arguments):
  traced = jax.jit(function).trace(*arguments)
  return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("family", MODELS)
def test_tower_prefill_decode_and_policy_lower(family):
  model, weights, policy, params = _parts(family)
  rows, width = 40, model.config.text.hidden_size
  positions = _shape((2, model.num_position_rows, rows), jnp.int32)
  prompts = _shape((2, rows, width), jnp.bfloat16), positions
  lengths = _shape((2,), jnp.int32)
  prefill = functools.partial(model.prefill, cache_length=44)
  assert KERNEL in _text(prefill, weights, *prompts, lengths)
  _, cache, _ = jax.eval_shape(prefill, weights, *prompts, lengths)
  following = _shape((2, model.num_position_rows), jnp.int32)
  # One query a row: products, no kernel.
  assert _text(model.decode_step, weights, lengths, following, cache)
  grid = (2, 2, 3)
  values = _shape(model.config.vision.input_shape(grid), jnp.uint8)
  table = _shape((256, 3), jnp.float32)
  inputs = processors.TowerInputs(values, grid, table=table)
  inputs = model.tower_inputs(inputs)
  for signals in ((), ("vision_attention", "vision_keys")):
    tower = clips.tower_program(model, signals, None)
    traced = tower.trace(weights, inputs)
    assert KERNEL in traced.lower(lowering_platforms=("tpu",)).as_text()
  score = functools.partial(_scores, policy)
  x = _shape((rows, width), jnp.bfloat16)
  one = _shape(positions.shape[1:], jnp.int32)
  assert KERNEL in _text(score, params, x, one, _shape((12,), jnp.int32))


def _scores(policy, params, x, positions, video_rows):
  return policy.apply({"params": params}, x, positions, video_rows, (2, 2, 3))


def _batch(model, ladder):
  """Returns a batch's shapes, with the position rows of a model."""
  batch = tiny.batch(ladder=ladder)
  shape = len(batch.answer_id), model.num_position_rows, tiny.LENGTH
  prompts = batch.prompts._replace(positions=_shape(shape, jnp.int32))
  placed = [ladder.place(tiny.GRID)] * len(batch.answer_id)
  grid = jax.tree.map(lambda *leaves: np.stack(leaves), *placed)
  batch = batch.replace(prompts=prompts, grid=grid)
  return jax.eval_shape(lambda x: x, batch)


@pytest.mark.parametrize(
  ("family", "kind"),
  [
    ("llava_onevision", "fixed"),
    ("llava_onevision", "adaptive"),
    ("llava_onevision", "host"),
    ("llava_onevision", "bucket"),
    ("qwen2_5_vl", "fixed"),
  ],
)
def test_every_program_of_training_lowers(family, kind):
  model, weights, policy, params = _parts(family)
  config = tiny.step_config(
    fixed=0.125 if kind == "fixed" else None, policy=policy
  )
  if kind == "bucket":
    sizes = token_grid.GridBucket(*tiny.GRID[:1], tiny.NUM_VIDEO // 4)
    ladder = config.ladder
    ladder = ratio.make_ladder(sizes, ladder.sampler, ladder.config)
    config = dataclasses.replace(config, ladder=ladder)
  config = dataclasses.replace(config, model=model)
  made = programs.TrainingPrograms(
    [config], tiny.mesh(), host_rewards=kind == "host"
  )
  bucket = config.ladder.bucket
  state = jax.eval_shape(
    lambda given: step.TrainState.create(given, config.tx), params
  )
  constants = step.Constants(
    weights, _shape((tiny.VOCABULARY,), jnp.int32), _shape((), jnp.uint32)
  )
  batch = _batch(model, config.ladder)

  def lower(name, *arguments):
    program = made.jitted(bucket, name)
    traced = program.trace(*arguments)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert KERNEL in text, name
    return jax.eval_shape(program, *arguments)

  if kind == "fixed":
    lower("fixed_ratio_step", state, constants, batch)
  else:
    videos, memory = lower("prepare_videos", state, constants, batch)
    rung = len(config.ladder) - 1
    if kind == "host":
      _, masks, memory = lower(f"rollout_{rung}", constants, videos, memory)
      rewards = _shape((2, config.ladder.num_combinations), jnp.float32)
      lower("update", state, videos, memory, masks, rewards)
    else:
      lower(f"iterate_{rung}", state, constants, videos, memory)
