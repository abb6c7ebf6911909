"""AdapTok: causality, tails, the allocator against SciPy, a study."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from cacovid_jax import errors
from cacovid_jax.related import adaptok, nested
from cacovid_jax.related import study as study_lib
from configs import related_systems


@pytest.fixture(scope="module")
def small():
  """Returns (net, parameters, patches) of a net that is not trained."""
  net = adaptok.BlockTokenizer(4, 16, 1, 4, 16)
  x = jnp.asarray(nested.patches(nested.squares(0, 3)[0]))
  counts = jnp.full(x.shape[:2], 4)
  params = jax.jit(net.init)(jax.random.key(0), x, counts)["params"]
  return net, params, x


def test_patches_are_cut_block_by_block():
  clips = np.random.default_rng(0).normal(size=(2, 8, 16, 16))
  x = nested.patches(clips)
  for i, b, row, column in ((0, 0, 0, 0), (1, 3, 2, 1), (0, 2, 3, 3)):
    own = clips[i, 2 * b : 2 * b + 2, 4 * row : 4 * row + 4]
    own = own[:, :, 4 * column : 4 * column + 4]
    np.testing.assert_array_equal(x[i, b, 4 * row + column], own.reshape(-1))


def test_later_frames_change_no_earlier_code_or_picture(small):
  """Bit by bit: of blocks up to the one that changes."""
  net, params, x = small
  other = x.at[:, 2].add(1.0)
  counts = np.full(x.shape[:2], 3)
  found = []
  for one in (x, other):
    _, q = adaptok._encode(net, params, one)
    decoded = net.apply({"params": params}, q, counts, method="decode")
    found.append((np.asarray(q), np.asarray(decoded)))
  for first, second in zip(*found, strict=True):
    np.testing.assert_array_equal(first[:, :2], second[:, :2])
    assert np.abs(first[:, 2:] - second[:, 2:]).max() > 0


def test_what_is_cut_off_is_not_read(small):
  net, params, x = small
  _, q = adaptok._encode(net, params, x)
  counts = np.full(x.shape[:2], 2)
  other = q.at[:, :, 2:].set(9.0)
  pair = [
    net.apply({"params": params}, one, counts, method="decode")
    for one in (q, other)
  ]
  np.testing.assert_array_equal(*pair)
  later = q.at[:, :, 1].set(9.0)
  moved = net.apply({"params": params}, later, counts, method="decode")
  assert np.abs(moved - pair[0]).max() > 1e-4


def test_the_codes_loss_of_all_latents_is_the_plain_one(small):
  net, params, x = small
  _, z = net.apply({"params": params}, x, method="encode")
  q, cost, code = net.apply({"params": params}, z, method="quantise")
  book = np.asarray(params["codebook"])
  book = book / np.linalg.norm(book, axis=1, keepdims=True)
  np.testing.assert_array_equal(code, np.argmax(z @ book.T, axis=-1))
  np.testing.assert_allclose(q, book[code], atol=1e-6)
  plain = 1.25 * np.square(book[code] - z).mean()
  whole = net.apply({"params": params}, x, jnp.full(x.shape[:2], 4))[1]
  np.testing.assert_allclose(whole, plain, rtol=1e-5)


def test_tails_lie_around_half():
  found = np.asarray(adaptok.tails(jax.random.key(0), (4000,), 8))
  assert set(found) == set(range(1, 9)) and abs(found.mean() - 4) < 0.6


def milp(curves, total):
  """Returns the least sum of errors by SciPy's integer programming."""
  parts, levels = curves.shape
  one_each = np.kron(np.eye(parts), np.ones(levels))
  tokens = np.tile(np.arange(1, levels + 1), parts)
  limits = [
    optimize.LinearConstraint(one_each, 1, 1),
    optimize.LinearConstraint(tokens, total, total),
  ]
  found = optimize.milp(
    curves.ravel(), constraints=limits, integrality=1, bounds=(0, 1)
  )
  return found.fun


def test_the_allocator_is_scipys_integer_program():
  rng = np.random.default_rng(2)
  for total in (8, 13, 20, 31):
    curves = rng.exponential(size=(2, 4, 4)).astype(np.float32)
    counts = adaptok.allocate(curves, total)
    assert counts.sum() == total
    flat = curves.reshape(8, 4)
    error = flat[np.arange(8), counts.ravel() - 1].sum()
    assert error == pytest.approx(milp(flat, total), rel=1e-5)


def test_released_targets_go_block_by_block():
  curves = np.random.default_rng(3).exponential(size=(6, 4, 8))
  counts = adaptok.allocate_released(np.float32(curves), 6 * 4 * 4)
  totals = counts.sum(axis=0)
  assert totals[0] == 48 and 6 * 16 - 4 < totals.sum() <= 6 * 16
  # Within a block as good as every other choice of equal sum, by force.
  few = np.float32(curves[:3])
  counts = adaptok.allocate_released(few, 3 * 4 * 4)
  for block in range(4):
    best = min(
      sum(few[i, block, k] for i, k in enumerate(levels))
      for levels in itertools.product(range(8), repeat=3)
      if sum(levels) + 3 == counts[:, block].sum()
    )
    chosen = few[np.arange(3), block, counts[:, block] - 1].sum()
    assert chosen == pytest.approx(best, rel=1e-5)


def test_a_budget_below_one_token_a_block_is_one_line():
  with pytest.raises(errors.UserError, match="7 tokens is below one .* 8 blo"):
    adaptok.allocate(np.ones((2, 4, 4)), 7)


def test_the_smallest_study_runs(tmp_path):
  config = related_systems.get_config("debug").adaptok
  study = adaptok.study(config, None, tmp_path)
  found = [(case, 0, run(0)) for case, run in study.cases.items()]
  table = study_lib.Outcome(found)
  case = "linear, 16 tokens"
  oracle = table.mean(case, "exact (oracle)", "dB over fixed")
  assert 0 < oracle and table.mean(case, "scorer", "tokens") == 16
  assert oracle >= table.mean(case, "scorer", "dB over fixed")
  assert len(study.bars(table)) == 5
  assert study.picture(table).startswith("<?xml")
