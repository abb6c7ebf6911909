"""HCQ's loss, levels and index against SciPy and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from cacovid_jax import errors
from cacovid_jax.related import fitting, hcq, quantisers, retrieval


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive_loss(text, video, book, soft):
  """Both directions, of floats against codes and of floats alone."""
  num_parts = len(book)

  def parts(x):
    return unit(x.reshape(len(x), num_parts, -1))

  def coded(x):
    out = np.zeros_like(x)
    for i, m in np.ndindex(*x.shape[:2]):
      out[i, m] = book[m, np.argmax(book[m] @ x[i, m])]
    return out

  def ask(a, b):
    a, b = (unit(x.reshape(len(x), -1)) for x in (a, b))
    logits = a @ b.T / 0.05
    return (special.logsumexp(logits, axis=1) - np.diag(logits)).mean()

  t, v = parts(text), parts(video)
  hard = ask(t, coded(v)) + ask(v, coded(t))
  return (1 - soft) * hard + soft * (ask(t, v) + ask(v, t))


@pytest.mark.parametrize("soft", [0.0, 0.3, 1.0])
def test_the_loss_asks_codes_by_floats_in_both_directions(soft):
  text, video = draw(0, 7, 12), draw(1, 7, 12)
  book = unit(draw(2, 3, 5, 4))
  found = hcq.aq_loss(text, video, book, soft)
  expected = naive_loss(text, video, book, soft)
  assert float(found) == pytest.approx(expected, rel=1e-4)


def test_no_gradient_reaches_a_codeword():
  book = jnp.asarray(unit(draw(3, 3, 5, 4)))
  text, video = draw(4, 6, 12), draw(5, 6, 12)
  grads = jax.grad(hcq.aq_loss, argnums=(0, 1))(text, video, book, 0.5)
  assert all(np.abs(one).max() > 0 for one in grads)
  # The loss's only way to them is the straight-through of `quantise`.
  to_book = jax.grad(lambda b: hcq.aq_loss(text, video, b, 0.5))(book)
  assert not np.asarray(to_book).any()


def test_vlad_sums_residuals_and_ghosts_take_their_share():
  x, mask = draw(6, 2, 5, 4), np.arange(5) < [[5], [3]]
  module = hcq.GhostVLAD(3, 2)
  params = module.init(jax.random.key(0), x, mask)
  found = module.apply(params, x, mask)
  centres = np.asarray(params["params"]["centres"])
  kernel = np.asarray(params["params"]["assign"]["kernel"])
  for i in range(2):
    total = np.zeros((3, 4))
    for token in x[i][mask[i]]:
      share = special.softmax(token @ kernel)
      assert share[:3].sum() < 1
      total += share[:3, None] * (token - centres[:3])
    np.testing.assert_allclose(found[i], unit(total), atol=1e-5)
  # Without ghosts in the softmax, padding counts as well.
  released = hcq.GhostVLAD(3, 2, released=True)
  other = np.where(mask[..., None], x, 7.0).astype(np.float32)
  same = [module.apply(params, one, mask) for one in (x, other)]
  np.testing.assert_allclose(*same, atol=1e-6)
  moved = [released.apply(params, one, mask) for one in (x, other)]
  assert np.abs(moved[0] - moved[1]).max() > 1e-3


def test_an_index_scores_what_decoding_would():
  queries, items = draw(7, 6, 3, 8), draw(8, 20, 3, 8)
  books = np.stack([unit(draw(9 + i, 2, 4, 4)) for i in range(3)])
  index = hcq.Index.of(items, books)
  total = np.zeros((6, 20))
  for level, weight in enumerate([0.125, 0.4375, 0.4375]):
    q = unit(queries[:, level].reshape(6, 2, 4)).reshape(6, 8) / 2**0.5
    part = unit(items[:, level].reshape(20, 2, 4))
    nearest = np.einsum("nmd,mkd->nmk", part, books[level]).argmax(-1)
    decoded = books[level][np.arange(2), nearest].reshape(20, 8) / 2**0.5
    total += weight * (q @ decoded.T)
  np.testing.assert_allclose(index.search(queries), total, atol=1e-5)
  assert index.num_bytes == 3 * 2 * 2 / 8


def test_finer_codes_lose_less():
  items = draw(12, 200, 1, 16)
  errors_of = []
  for num_parts, num_codewords in ((2, 4), (2, 16), (4, 16), (8, 16)):
    x = quantisers.parts(items[:, 0], num_parts)
    book = quantisers.init_codebook(
      jax.random.key(0), num_parts, num_codewords, 16 // num_parts
    )
    book = quantisers.refresh(x, book)
    decoded = quantisers.decode(quantisers.codes(x, book), book)
    errors_of.append(float(jnp.mean((x - decoded) ** 2) * (16 // num_parts)))
  assert errors_of == sorted(errors_of, reverse=True)


def recipe(module, **changes):
  settings = fitting.Schedule(steps=120, lr=3e-3, chunk=30)
  return hcq.Recipe(module, 4, 4, settings, 64)._replace(**changes)


def test_training_makes_codes_that_keep_more_than_codes_fitted_afterwards():
  pairs = hcq.planted(0, 500)
  train, test = (
    jax.tree.map(lambda x, at=at: x[at], pairs)
    for at in (slice(300), slice(300, None))
  )
  module = hcq.Pairs(16)
  start = module.init(jax.random.key(0), *test)["params"]
  found = {}
  for coded in (False, True):
    own = recipe(module, coded=coded)
    params = hcq.train(own, start, train, jax.random.key(1))
    queries, items = module.apply({"params": params["model"]}, *test)
    index = hcq.Index.of(items, params["codebooks"])
    found[coded] = retrieval.measures(index.search(queries))["mean rank"]
  assert found[True] < found[False]


def test_a_resumed_training_is_the_same(tmp_path):
  train = hcq.planted(1, 80)
  module = hcq.Pairs(8)
  start = module.init(jax.random.key(0), *train)["params"]
  short = fitting.Schedule(steps=2, lr=1e-3, chunk=1)
  own = recipe(module, settings=short, num_parts=2, batch=32)
  whole = hcq.train(own, start, train, jax.random.key(2))
  for _ in range(2):  # The second time from the checkpoint alone.
    again = hcq.train(own, start, train, jax.random.key(2), folder=tmp_path)
  jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_fewer_clips_than_codewords_are_one_line():
  module = hcq.Pairs(8)
  train = hcq.planted(0, 1)
  start = module.init(jax.random.key(0), *train)["params"]
  own = recipe(module)
  with pytest.raises(errors.UserError, match="4 codewords .* 2 clips"):
    hcq.train(own, start, train, jax.random.key(0))


def test_a_loss_that_is_no_number_stops_the_run():
  def loss(params, data, rng, step):
    return params["w"] * jnp.nan

  settings = fitting.Schedule(steps=2, lr=0.5, chunk=2)
  with pytest.raises(errors.UserError, match="loss is nan at step 2.*0.5"):
    fitting.fit((loss,), {"w": jnp.ones(())}, (), jax.random.key(0), settings)
