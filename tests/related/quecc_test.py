"""QueCC against plain convolution and masked attention, and as a method."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base
from cacovid_jax.related import quecc
from cacovid_jax.related import study as study_lib
from configs import related_systems

NAME = "cacovid_jax.related.quecc:Cells"


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("side, grid", [(2, 6), (4, 7), (1, 7), (7, 7)])
def test_cells_hold_every_token_once(side, grid):
  number = np.arange(2 * grid * grid).reshape(2, grid, grid, 1)
  parts, there = quecc.cells(jnp.asarray(number), side)
  found = np.asarray(parts)[:, there, 0]
  assert sorted(found.ravel()) == list(range(2 * grid * grid))
  k = -(-grid // side)
  for row in range(grid):
    for column in range(grid):
      cell = (row // k) * side + column // k
      assert number[1, row, column, 0] in np.asarray(parts)[1, cell]


def naive(params, x, question, side, heads):
  """A loop over cells, of parameters of a module with width D."""

  def features(p, x):
    x = nn.gelu(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    x = x @ p["out"]["kernel"] + p["out"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-6
    )
    return x * p["norm"]["scale"] + p["norm"]["bias"]

  told = question @ params["question"]["kernel"]
  told = (told - told.mean()) / np.sqrt(told.var() + 1e-6)
  asked = x + told
  query, key, value = (
    np.asarray(features(params[name], one))
    for name, one in (("query", asked), ("key", x), ("value", x))
  )
  grid, k = x.shape[0], -(-x.shape[0] // side)
  p, out = params["attention"], []
  for i in range(side):
    for j in range(side):
      own = np.s_[i * k : (i + 1) * k, j * k : (j + 1) * k]
      places = [(a, b) for a in range(k) for b in range(k)
                if i * k + a < grid and j * k + b < grid]  # fmt: skip
      q = params["bias"] + sum(
        query[i * k + a, j * k + b] * params["kernel"][a * k + b]
        for a, b in places
      )
      keys = key[own].reshape(-1, key.shape[-1])
      values = value[own].reshape(-1, key.shape[-1])
      total = 0.0
      for head in range(heads):

        def project(name, x, head=head):
          return x @ p[name]["kernel"][:, head] + p[name]["bias"][head]

        one = project("query", q)
        weight = project("key", keys) @ one / len(one) ** 0.5
        weight = np.exp(weight - weight.max())
        mixed = weight / weight.sum() @ project("value", values)
        total = total + mixed @ p["out"]["kernel"][head]
      total = nn.gelu(total + p["out"]["bias"])
      last = params["projector_out"]
      out.append(total @ last["kernel"] + last["bias"])
  return np.stack(out)


@pytest.mark.parametrize("side, grid", [(2, 4), (2, 5)])
def test_a_token_is_attention_in_its_own_cell(side, grid):
  x, question = draw(0, 1, grid, grid, 8), draw(1, 5)
  module = quecc.QueCC(side, 8, 2)
  params = module.init(jax.random.key(0), x, question)
  found = module.apply(params, x, question)[0]
  own = jax.tree.map(np.asarray, params["params"])
  expected = naive(own, x[0], question, side, 2)
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_query_is_a_depthwise_convolution():
  x = draw(2, 1, 6, 6, 4)
  kernel, bias = draw(3, 9, 4), draw(4, 4)
  conv = nn.Conv(4, (3, 3), (3, 3), feature_group_count=4)
  given = {"kernel": kernel.reshape(3, 3, 1, 4), "bias": bias}
  expected = conv.apply({"params": given}, x).reshape(4, 4)
  parts, _ = quecc.cells(jnp.asarray(x), 2)
  found = np.einsum("ckd,kd->cd", parts[0], kernel) + bias
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_question_moves_the_tokens_unless_it_is_left_out():
  x = draw(5, 2, 4, 4, 8)
  for blind in (False, True):
    module = quecc.QueCC(2, 8, 2, blind)
    params = module.init(jax.random.key(0), x, draw(6, 5))
    one, other = (module.apply(params, x, draw(s, 5)) for s in (6, 7))
    assert bool(np.abs(one - other).max() > 1e-4) != blind


def method(tmp_path, side=2, grid=(3, 5, 5), **options):
  module = quecc.QueCC(side, 16, 2)
  x = draw(8, grid[0], *grid[1:], 8)
  params = module.init(jax.random.key(1), x, draw(9, 8))["params"]
  quecc.save(tmp_path / "w.safetensors", params)
  spec = f"{NAME}?weights={tmp_path}/w.safetensors&width=16&heads=2"
  text = np.concatenate([draw(10, 4, 8), np.zeros((2, 8), np.float32)])
  inputs = base.CompressorInputs(
    features=jnp.asarray(x.reshape(-1, 8)), grid=grid, text=jnp.asarray(text)
  )
  own = compressors.get(spec, **options)
  return own, inputs, module, params


def test_it_is_a_method_by_its_dotted_name(tmp_path):
  own, inputs, module, params = method(tmp_path)
  found = own.select(inputs, num_keep=12, params=own.load())
  x = inputs.features.reshape(3, 5, 5, 8)
  expected = module.apply({"params": params}, x, inputs.text[:4].mean(axis=0))
  np.testing.assert_allclose(
    np.sort(found.features, axis=0), np.sort(expected.reshape(12, 8), axis=0),
    atol=1e-5,
  )  # fmt: skip
  index = np.asarray(found.index)
  assert (np.diff(index) > 0).all() and found.mass.sum() == 75
  assert found.mask.all()
  # Each token is in the cell whose middle its row has.
  cell = lambda i: (i // 25, i % 25 // 5 // 3, i % 5 // 3)  # noqa: E731
  for token, row in enumerate(np.asarray(found.assign)):
    assert cell(token) == cell(index[row])
  batched = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)
  # As evaluations do it.
  select = jax.jit(functools.partial(own.select_batch, num_keep=12))
  twice = select(batched, params=own.load())
  np.testing.assert_allclose(twice.features[1], found.features, atol=1e-5)


@pytest.mark.parametrize("num_keep", [2, 6, 11])
def test_a_budget_that_is_no_square_a_frame_is_one_line(tmp_path, num_keep):
  own, inputs, _, params = method(tmp_path)
  with pytest.raises(errors.UserError, match=f"{num_keep} tokens of 3 frames"):
    own.select(inputs, num_keep=num_keep, params=params)


def test_cells_that_would_be_empty_and_missing_weights_are_one_line(tmp_path):
  with pytest.raises(errors.UserError, match="5 x 5 cells do not fit .* 7 x 7"):
    quecc.cells(jnp.zeros((1, 7, 7, 1)), 5)
  own, inputs, _, _ = method(tmp_path)
  for other, num_keep in ((own, 3), (own.with_options(width=8), 12)):
    with pytest.raises(errors.UserError, match="weights do not fit width="):
      other.select(inputs, num_keep=num_keep, params=own.load())
  with pytest.raises(errors.UserError, match="is trained: give"):
    compressors.get(NAME)


def test_the_toy_asks_for_a_colour_that_is_there():
  x, asked, colour = quecc.grids(jax.random.key(0), 6, 16)
  codes, places = (
    jax.random.normal(jax.random.key(i), (n, 16)) for i, n in ((0, 8), (1, 36))
  )
  for one, cell, right in zip(x.reshape(6, 36, 16), asked, colour, strict=True):
    np.testing.assert_allclose(
      one[cell] - places[cell], codes[right], atol=1e-5
    )


def test_the_smallest_study_runs():
  config = related_systems.get_config("debug").quecc
  study = quecc.study(config, None)
  found = [(case, 0, run(0)) for case, run in study.cases.items()]
  outcome = study_lib.Outcome(found)
  assert [arm for _, arm in outcome.rows] == ["quecc", "blind", "average"]
  assert len(study.bars(outcome)) == 3
