"""Policy network: padding, positions, precision, weights in and out."""

import dataclasses
import functools
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.models import qwen2, qwen3_vl, token_grid
from cacovid_jax.policy import loading, network

GRID = (2, 3, 2)
ROWS = np.arange(3, 15)  # 3 rows of text, 12 video tokens, newline, question.
LENGTH = 20
WIDTH = 32


@pytest.fixture(scope="module")
def config():
  return network.PolicyConfig.tiny()


@pytest.fixture(scope="module")
def llm_params(config):
  """Random parameters of a decoder, stacked by depth."""
  module = qwen2.Qwen2(config.llm)
  x, positions = jnp.zeros((1, 2, WIDTH)), jnp.zeros((1, 1, 2), jnp.int32)

  def touch(module):
    return module(x, positions), module.embed(jnp.zeros(2, jnp.int32))

  return jax.jit(lambda r: module.init(r, method=touch)["params"])(
    jax.random.key(7)
  )


@pytest.fixture(scope="module")
def params(config, llm_params):
  return network.Policy(config).init_from_llm(jax.random.key(0), llm_params)


@pytest.fixture(scope="module")
def prompt():
  x = jax.random.normal(jax.random.key(1), (LENGTH, WIDTH))
  return x, jnp.arange(LENGTH, dtype=jnp.int32)[None]


@functools.partial(jax.jit, static_argnames="config")
def score(config, params, x, positions, video_rows, length=None):
  policy = network.Policy(config)
  return policy.apply(
    {"params": params}, x, positions, video_rows, GRID, length
  )


def assert_close(actual, expected, rtol=1e-5, atol=2e-6):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol),
    actual,
    expected,
  )


def test_shapes_and_types(config, params, prompt):
  scores = score(config, params, *prompt, ROWS)
  assert scores.frame.shape == (2, 2) and scores.token.shape == (12, 2)
  assert scores.frame.dtype == scores.token.dtype == jnp.float32
  assert np.ptp(scores.token[:, 1] - scores.token[:, 0]) > 0


@pytest.mark.parametrize("filler", [0.0, 100.0])
def test_a_padded_prompt_equals_the_unpadded(config, params, prompt, filler):
  x, positions = prompt
  expected = score(config, params, x, positions, ROWS)
  padded = jnp.pad(x, ((0, 5), (0, 0)), constant_values=filler)
  positions = jnp.pad(positions, ((0, 0), (0, 5)))
  scores = score(config, params, padded, positions, ROWS, jnp.int32(LENGTH))
  assert_close(scores, expected)


def test_the_question_behind_the_video_changes_the_scores(
  config, params, prompt
):
  x, positions = prompt
  other = x.at[-1].add(3.0)
  first = score(config, params, x, positions, ROWS).token
  second = score(config, params, other, positions, ROWS).token
  assert np.abs(first - second).max() > 1e-4


def test_positions_may_be_in_any_order_and_have_gaps(config, params, prompt):
  x, _ = prompt
  positions = jnp.cumsum(jnp.arange(LENGTH, dtype=jnp.int32) % 4)[None]
  expected = score(config, params, x, positions, ROWS)
  # Rotary positions are relative.
  assert_close(score(config, params, x, positions + 50, ROWS), expected)
  # Without a causal mask, only the position id says where a row stands.
  order = np.random.default_rng(0).permutation(LENGTH)
  moved = np.argsort(order)[ROWS]
  permuted = score(config, params, x[order], positions[:, order], moved)
  assert_close(permuted, expected)
  # And it does say so.
  contiguous = jnp.arange(LENGTH, dtype=jnp.int32)[None]
  without_gaps = score(config, params, x, contiguous, ROWS)
  assert np.abs(without_gaps.token - expected.token).max() > 1e-4


def test_vmap_over_prompts_of_different_lengths_equals_a_loop(config, params):
  x = jax.random.normal(jax.random.key(2), (2, LENGTH, WIDTH))
  positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, 1, LENGTH))
  rows = jnp.stack([jnp.arange(1, 13), jnp.arange(3, 15)])
  lengths = jnp.array([16, 20])
  run = functools.partial(score, config, params)
  batched = jax.vmap(run)(x, positions, rows, lengths)
  for i in range(2):
    one = run(x[i], positions[i], rows[i], lengths[i])
    assert_close(jax.tree.map(lambda s, i=i: s[i], batched), one)


def test_half_precision_stays_close_and_scores_are_float32(
  config, params, prompt
):
  half = network.PolicyConfig(
    llm=config.llm, num_halvings=config.num_halvings, dtype=jnp.bfloat16
  )
  scores = score(half, params, *prompt, ROWS)
  assert scores.token.dtype == jnp.float32
  assert_close(scores, score(config, params, *prompt, ROWS), 0.1, 0.05)


def test_the_third_head_costs_nothing_and_gets_no_gradient(
  config, params, prompt
):
  def total(params):
    scores = score(config, params, *prompt, ROWS)
    return scores.frame.sum() + scores.token.sum()

  grads = jax.jit(jax.grad(total))(params)
  assert not any(np.any(g) for g in jax.tree.leaves(grads["mode_selection"]))
  assert np.any(grads["layer"]["q_proj"]["kernel"])
  without = {k: p for k, p in params.items() if k != "mode_selection"}
  assert_close(
    score(config, without, *prompt, ROWS), score(config, params, *prompt, ROWS)
  )


def test_mode_scores_ignore_padding(config, params, prompt):
  x, positions = prompt
  policy = network.Policy(config)
  run = jax.jit(
    functools.partial(policy.apply, {"params": params}, method="mode_scores")
  )
  expected = run(x, positions, ROWS)
  padded = jnp.pad(x, ((0, 4), (0, 0)), constant_values=9.0)
  positions = jnp.pad(positions, ((0, 0), (0, 4)))
  assert_close(run(padded, positions, ROWS, LENGTH), expected, atol=1e-4)


# Videos of different grids in one program, and three position rows.


BUCKET = token_grid.GridBucket(5, 24, 75)
ROOM = 85
GRIDS = [(4, 5, 3), (3, 4, 6), (5, 3, 5), (1, 2, 1)]


@pytest.fixture(scope="module")
def mrope():
  """The tiny policy with sections of M-RoPE, and its parameters."""
  config = network.PolicyConfig.tiny()
  half = config.llm.head_dim // 2
  sections = (half - 2 * (half // 3), half // 3, half // 3)
  # Fast enough that a few positions matter in the last section too.
  llm = dataclasses.replace(config.llm, rope_sections=sections, rope_theta=20.0)
  config = dataclasses.replace(config, llm=llm)
  policy = network.Policy(config)
  init = jax.jit(lambda r: policy.init(r, method="initialise")["params"])
  return config, init(jax.random.key(5))


def prompt_of(seed, grid):
  """A prompt of 3 + N + 4 rows: x, its three position rows, video rows."""
  num_tokens = int(np.prod(grid))
  x = np.random.default_rng(seed).standard_normal((num_tokens + 7, WIDTH))
  cells = np.indices(grid).reshape(3, -1) * np.array([[2], [1], [1]])
  after = 3 + cells.max() + 1
  positions = np.concatenate(
    [
      np.tile(np.arange(3), (3, 1)),
      3 + cells,
      np.tile(np.arange(after, after + 4), (3, 1)),
    ],
    axis=1,
  )
  rows = np.arange(3, 3 + num_tokens)
  return x.astype(np.float32), positions.astype(np.int32), rows


def in_bucket(x, positions, rows, grid, filler=50.0):
  """The same prompt, padded to the bucket's room."""
  padded = np.full((ROOM, WIDTH), filler, np.float32)
  padded[: len(x)] = x
  more = np.zeros((3, ROOM), np.int32)
  more[:, : len(x)] = positions
  padded_rows = np.full(BUCKET.tokens, ROOM, np.int32)
  padded_rows[: len(rows)] = rows
  placed = token_grid.TokenGrid.of(grid, BUCKET)
  return padded, more, padded_rows, placed, np.int32(len(x))


@functools.partial(jax.jit, static_argnums=0)
def score_in_bucket(config, params, *prompt):
  return network.Policy(config).apply({"params": params}, *prompt)


def assert_padded_equals(found, alone, grid):
  frames, tokens = grid[0], int(np.prod(grid))
  assert found.frame.shape == (5, 2) and found.token.shape == (75, 2)
  cut = network.Scores(found.frame[:frames], found.token[:tokens])
  assert_close(cut, alone, rtol=2e-5, atol=5e-6)
  assert not np.any(found.frame[frames:]) and not np.any(found.token[tokens:])


def test_one_program_scores_every_grid_as_a_program_of_its_own(mrope):
  config, params = mrope
  policy = network.Policy(config)
  compiled = score_in_bucket._cache_size()
  for seed, grid in enumerate(GRIDS):
    x, positions, rows = prompt_of(seed, grid)
    alone = jax.jit(functools.partial(policy.apply, grid=grid))(
      {"params": params}, x, positions, rows
    )
    found = score_in_bucket(
      config, params, *in_bucket(x, positions, rows, grid)
    )
    assert_padded_equals(found, alone, grid)
  assert score_in_bucket._cache_size() - compiled <= 1


def test_vmap_over_videos_of_different_grids(mrope):
  config, params = mrope
  prompts = [
    in_bucket(*prompt_of(i, grid), grid) for i, grid in enumerate(GRIDS)
  ]
  batch = jax.tree.map(lambda *leaves: np.stack(leaves), *prompts)
  batched = jax.jit(
    jax.vmap(functools.partial(score_in_bucket, config, params))
  )(*batch)
  for i, prompt in enumerate(prompts):
    alone = score_in_bucket(config, params, *prompt)
    assert_close(jax.tree.map(lambda s, i=i: s[i], batched), alone, atol=5e-6)


def test_gradients_do_not_see_the_padding(mrope):
  config, params = mrope
  grid = GRIDS[0]
  policy = network.Policy(config)
  weights = np.random.default_rng(0).standard_normal((5 + 75, 2))

  def total(scores):
    frame = (scores.frame * weights[: len(scores.frame)]).sum()
    return frame + (scores.token * weights[5 : 5 + len(scores.token)]).sum()

  x, positions, rows = prompt_of(0, grid)
  alone = jax.jit(
    jax.grad(
      lambda p: total(policy.apply({"params": p}, x, positions, rows, grid))
    )
  )(params)
  grads = jax.jit(
    jax.grad(lambda p, *prompt: total(policy.apply({"params": p}, *prompt)))
  )
  for filler in (0.0, 50.0):
    found = grads(params, *in_bucket(x, positions, rows, grid, filler))
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(alone))
    assert_close(found, alone, rtol=1e-4, atol=1e-6 * largest)


def test_each_of_three_position_rows_matters_and_equal_ones_are_plain(mrope):
  config, params = mrope
  x, positions, rows = prompt_of(1, GRIDS[1])
  policy = network.Policy(config)
  run = jax.jit(
    lambda positions: policy.apply(
      {"params": params}, x, positions, rows, GRIDS[1]
    )
  )
  expected = run(positions)
  for row in range(3):
    moved = positions.copy()
    moved[row, rows] = moved[row, rows][::-1]
    assert np.abs(run(moved).token - expected.token).max() > 1e-4
  llm = dataclasses.replace(config.llm, rope_sections=None)
  plain = network.Policy(dataclasses.replace(config, llm=llm))
  line = np.arange(len(x), dtype=np.int32)[None]
  assert_close(
    run(np.tile(line, (3, 1))),
    jax.jit(functools.partial(plain.apply, grid=GRIDS[1]))(
      {"params": params}, x, line, rows
    ),
  )


def test_mode_scores_ignore_the_padding_of_a_bucket(mrope):
  config, params = mrope
  x, positions, rows = prompt_of(0, GRIDS[0])
  policy = network.Policy(config)
  run = jax.jit(
    functools.partial(policy.apply, {"params": params}, method="mode_scores")
  )
  x_in, positions_in, rows_in, _, length = in_bucket(
    x, positions, rows, GRIDS[0]
  )
  found = run(x_in, positions_in, rows_in, length)
  assert_close(found, run(x, positions, rows), atol=1e-4)


def test_video_rows_of_another_size_than_the_grid_are_refused(mrope):
  config, params = mrope
  x, positions, rows = prompt_of(0, GRIDS[0])
  for grid in (GRIDS[1], token_grid.TokenGrid.of(GRIDS[0], BUCKET)):
    with pytest.raises(AssertionError, match="shape"):
      network.Policy(config).apply({"params": params}, x, positions, rows, grid)


def test_a_cast_before_all_calls_is_the_cast_in_each(params, prompt, config):
  half = dataclasses.replace(config, dtype=jnp.bfloat16)
  cast = network.Policy(half).for_inference(params)
  assert cast["layer"]["q_proj"]["kernel"].dtype == jnp.bfloat16
  assert cast["token_compress"]["score"]["kernel"].dtype == jnp.float32
  found, expected = (score(half, p, *prompt, ROWS) for p in (cast, params))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  same = network.Policy(config).for_inference(params)
  jax.tree.map(np.testing.assert_array_equal, same, params)


# Initialisation.


def test_starts_from_the_first_layer_of_the_llm(params, llm_params):
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_array_equal(ours, theirs[0]),
    params["layer"],
    llm_params["layers"],
  )
  assert set(params) == {
    "layer", "layernorm", "token_compress", "frame_compress", "mode_selection",
  }  # fmt: skip


def test_starts_from_a_whole_model_in_half_precision(config, llm_params):
  half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), llm_params)
  params = network.Policy.from_llm_config(
    config.llm, num_halvings=3
  ).init_from_llm(jax.random.key(0), {"language_model": half, "tower": {}})
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


def test_same_key_same_heads(config, params, llm_params):
  again = network.Policy(config).init_from_llm(jax.random.key(0), llm_params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  other = network.Policy(config).init_from_llm(jax.random.key(1), llm_params)
  assert np.any(
    other["token_compress"]["score"]["kernel"]
    != params["token_compress"]["score"]["kernel"]
  )


def test_an_llm_of_another_shape_is_refused(config, llm_params):
  layers = dict(llm_params["layers"])
  layers["up_proj"] = {"kernel": jnp.zeros((3, WIDTH, 99))}
  with pytest.raises(errors.UserError, match="layer/up_proj/kernel"):
    network.Policy(config).init_from_llm(jax.random.key(0), {"layers": layers})
  with pytest.raises(errors.UserError, match="no `layers`"):
    network.Policy(config).init_from_llm(jax.random.key(0), {"blocks": layers})


@pytest.mark.parametrize("num_halvings", [-1, 5])
def test_too_many_halvings_are_refused(config, num_halvings):
  with pytest.raises(errors.UserError, match="choose 0 to 4"):
    network.PolicyConfig(llm=config.llm, num_halvings=num_halvings)


def test_widths_of_the_7b_policy():
  config = network.PolicyConfig(llm=qwen2.Qwen2Config.qwen2_7b())
  shapes = network.shapes(config)
  widths = [
    shapes[f"token_compress/hidden_{i}/kernel"][1] for i in range(4)
  ] + [shapes["token_compress/score/kernel"][1]]
  assert widths == [1792, 896, 448, 224, 2]
  assert shapes["mode_selection/score/kernel"] == (224, 3)
  assert set(shapes) == set(network.public_names(4))


# Weights in and out.


def test_public_names_round_trip(config, params):
  public = network.to_public(params)
  assert all(name.startswith("compression_policy.") for name in public)
  assert public["compression_policy.token_compress.0.weight"].shape == (16, 32)
  assert public["compression_policy.frame_compress.6.weight"].shape == (2, 4)
  assert public["compression_policy.layers.0.mlp.down_proj.weight"].shape == (
    32, 48,
  )  # fmt: skip
  back = network.from_public(public, config)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_checkpoint_without_the_third_head_stays_without(config, params):
  public = {
    name: tensor
    for name, tensor in network.to_public(params).items()
    if ".mode_selection." not in name
  }
  back = network.from_public(public, config)
  assert "mode_selection" not in back
  assert set(network.to_public(back)) == set(public)


def test_a_checkpoint_that_does_not_fit_lists_every_name(config, params):
  public = network.to_public(params)
  del public["compression_policy.layernorm.weight"]
  del public["compression_policy.mode_selection.0.bias"]
  public["compression_policy.extra"] = np.zeros(1)
  public["compression_policy.token_compress.0.bias"] = np.zeros(7)
  with pytest.raises(errors.UserError) as raised:
    network.from_public(public, config)
  message = str(raised.value)
  assert re.search(r"missing [^;]*layernorm\.weight", message)
  assert re.search(r"missing [^;]*mode_selection\.0\.bias", message)
  assert re.search(r"not known [^;]*compression_policy\.extra", message)
  assert re.search(r"misshaped .*token_compress\.0\.bias is \(7,\)", message)
  assert "\n" not in message


def test_files_round_trip_and_bad_files_are_refused(config, params, tmp_path):
  policy = network.Policy(config)
  path = tmp_path / "policy.safetensors"
  loading.save(path, policy, params)
  back = loading.load(path, policy)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert [p.name for p in tmp_path.iterdir()] == [path.name]
  path.write_bytes(path.read_bytes()[:100])
  os.mkfifo(tmp_path / "pipe")
  for bad in (path, tmp_path / "absent.safetensors", tmp_path / "pipe"):
    with pytest.raises(errors.UserError, match="not a readable safetensors"):
      loading.load(bad, policy)
  # A type that NumPy has not.
  head = {"w": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}
  head = json.dumps(head).encode()
  path.write_bytes(len(head).to_bytes(8, "little") + head + b"1234")
  with pytest.raises(errors.UserError, match="w is F8_E5M2; give float16"):
    loading.load(path, policy)


def test_the_policy_lowers_for_tpu_at_full_size():
  config = network.PolicyConfig(
    llm=qwen2.Qwen2Config.qwen2_7b(), dtype=jnp.bfloat16
  )
  policy = network.Policy(config)
  params = jax.eval_shape(
    lambda r: policy.init(r, method="initialise"), jax.random.key(0)
  )
  shape = jax.ShapeDtypeStruct
  run = jax.jit(
    lambda params, x, positions, rows: policy.apply(
      params, x, positions, rows, (32, 14, 14)
    )
  )
  traced = run.trace(
    params,
    shape((6350, 3584), jnp.bfloat16),
    shape((1, 6350), jnp.int32),
    shape((6272,), jnp.int32),
  )
  assert traced.lower(lowering_platforms=("tpu",)).as_text()


def test_a_layer_of_qwen3_keeps_its_norms_and_its_rotary_order():
  llm = qwen3_vl.Qwen3VLConfig.tiny().text
  policy = network.Policy(network.PolicyConfig(llm=llm, num_halvings=2))
  params = policy.init(jax.random.key(0), method="initialise")["params"]
  public = network.to_public(params)
  name = "compression_policy.layers.0.self_attn.q_norm.weight"
  assert public[name].shape == (llm.head_dim,)
  again = network.from_public(public, policy.config)
  jax.tree.map(np.testing.assert_array_equal, again, params)

  x = jax.random.normal(jax.random.key(1), (6, llm.hidden_size))
  positions = jnp.array(
    [[0, 1, 1, 1, 1, 5], [0, 1, 1, 2, 2, 5], [0, 1, 2, 1, 2, 5]]
  )
  given = ({"params": params}, x, positions, np.arange(1, 5), (1, 2, 2))
  blocks = dataclasses.replace(llm, rope_interleaved=False)
  blocks = network.Policy(dataclasses.replace(policy.config, llm=blocks))
  mine, other = (
    jax.jit(p.apply, static_argnums=4)(*given) for p in (policy, blocks)
  )
  assert np.abs(mine.token - other.token).max() > 1e-6
