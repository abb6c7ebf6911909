"""Product codes and scalar levels against loops, and their gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.related import quantisers


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def case(seed, n=40, parts=3, width=4, codewords=6):
  rng = np.random.default_rng(seed)
  x = unit(rng.normal(size=(n, parts, width)))
  return np.float32(x), np.float32(
    unit(rng.normal(size=(parts, codewords, width)))
  )


def test_a_code_is_the_nearest_codeword():
  x, book = case(0)
  codes = np.asarray(quantisers.codes(x, book))
  for row, part in itertools.product(range(40), range(3)):
    alike = [float(word @ x[row, part]) for word in book[part]]
    assert codes[row, part] == int(np.argmax(alike))
  decoded = np.asarray(quantisers.decode(codes, book))
  np.testing.assert_array_equal(decoded[7, 2], book[2, codes[7, 2]])


def test_search_by_tables_is_decoding_and_multiplying():
  x, book = case(1)
  query = unit(np.random.default_rng(2).normal(size=(5, 12))).astype(np.float32)
  codes = np.asarray(quantisers.codes(x, book))
  found = quantisers.search(query, codes, book)
  items = np.stack(
    [np.concatenate([book[m, c] for m, c in enumerate(row)]) for row in codes]
  )
  np.testing.assert_allclose(found, query @ items.T / 3**0.5, atol=1e-6)


def test_the_gradient_of_a_code_goes_to_the_vector_and_to_no_codeword():
  x, book = case(3)
  weight = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)

  def value(x, book):
    return jnp.sum(weight * quantisers.quantise(x, book) ** 2)

  to_x, to_book = jax.grad(value, argnums=(0, 1))(x, book)
  decoded = quantisers.decode(quantisers.codes(x, book), book)
  np.testing.assert_allclose(to_x, 2 * weight * decoded, rtol=1e-5)
  assert not np.asarray(to_book).any()


def naive_refresh(x, book, rounds):
  """Spherical k-means of one part, empty codewords left where they are."""
  book = np.array(book, np.float64)
  for _ in range(rounds):
    nearest = np.argmax(x @ unit(book).T, axis=1)
    for k in range(len(book)):
      if (nearest == k).any():
        book[k] = x[nearest == k].mean(axis=0)
  return unit(book)


def test_refreshing_is_spherical_k_means():
  x, book = case(5, n=200)
  found = quantisers.refresh(x, book, rounds=4)
  for part in range(3):
    expected = naive_refresh(x[:, part].astype(np.float64), book[part], 4)
    np.testing.assert_allclose(found[part], expected, atol=2e-4)


def test_a_codeword_of_nobody_is_seeded_anew_or_is_zero_as_released():
  x, book = case(6, parts=1)
  # The last codeword is opposite to all vectors.
  x[..., 0] = np.abs(x[..., 0]) + 2
  x = unit(x)
  book[0, :, 0] = np.abs(book[0, :, 0])
  book[0, 5] = [-1, 0, 0, 0]
  released = np.asarray(quantisers.refresh(x, book, reseed=False))
  assert not released[0, 5].any()
  ours = np.asarray(quantisers.refresh(x, book))
  assert np.linalg.norm(ours[0, 5]) == pytest.approx(1, abs=1e-5)
  assert (x[:, 0] == ours[0, 5]).all(axis=-1).any()
  used = np.unique(quantisers.codes(x, ours))
  assert 5 in used


def test_more_parts_than_dimensions_and_too_few_clips_are_one_line():
  with pytest.raises(errors.UserError, match="16 parts do not divide .* 12"):
    quantisers.parts(jnp.ones([2, 12]), 16)
  x, book = case(7, n=4)
  with pytest.raises(errors.UserError, match="6 codewords .* 4 clips"):
    quantisers.refresh(x, book)


def test_a_code_takes_the_bytes_of_its_bits():
  assert quantisers.num_bytes(8, 16) == 4
  assert quantisers.num_bytes(32, 256) == 32


LEVELS = (8, 5, 3)


def test_every_scalar_code_has_a_number_of_its_own():
  numbers = np.arange(8 * 5 * 3)
  codes = quantisers.fsq_code(numbers, LEVELS)
  np.testing.assert_array_equal(quantisers.fsq_index(codes, LEVELS), numbers)
  assert np.abs(codes).max() <= 1


def test_every_scalar_code_is_reached_and_passes_a_gradient():
  x = np.random.default_rng(8).normal(size=(20000, 3)) * 3
  codes = quantisers.fsq(x, LEVELS)
  numbers = np.asarray(quantisers.fsq_index(codes, LEVELS))
  assert sorted(set(numbers)) == list(range(120))
  np.testing.assert_allclose(
    codes, quantisers.fsq_code(numbers, LEVELS), atol=1e-6
  )
  slope = jax.grad(lambda x: quantisers.fsq(x, LEVELS).sum())(jnp.zeros(3))
  assert (np.asarray(slope) > 0).all()
