"""Product codes and their search against Faiss."""

import faiss
import jax
import numpy as np

from cacovid_jax.related import quantisers


def test_codes_and_search_are_those_of_faiss():
  items, queries = (
    np.random.default_rng(seed).normal(size=(n, 16)).astype(np.float32)
    for seed, n in ((13, 300), (14, 9))
  )
  parts = np.asarray(quantisers.parts(items, 4))
  book = quantisers.init_codebook(jax.random.key(0), 4, 16, 4)
  book = np.array(quantisers.refresh(parts, book))
  known = faiss.IndexPQ(16, 4, 4, faiss.METRIC_INNER_PRODUCT)
  faiss.copy_array_to_vector(book.reshape(-1), known.pq.centroids)
  known.is_trained = True
  known.add(parts.reshape(300, 16))
  # Two codes of four bits a byte, the first one in the lower half.
  packed = faiss.vector_to_array(known.codes).reshape(300, 2)
  codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(300, 4)
  ours = quantisers.codes(parts, book)
  np.testing.assert_array_equal(ours, codes)
  query = quantisers.joined(quantisers.parts(queries, 4))
  scores, order = known.search(np.asarray(query), 300)
  found = np.asarray(quantisers.search(query, ours, book)) * 2
  np.testing.assert_allclose(
    np.take_along_axis(found, order, axis=1), scores, atol=1e-5
  )
