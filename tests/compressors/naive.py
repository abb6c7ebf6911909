"""Definitions written out loop by loop, to compare compressors with.

All in float64 NumPy; nothing here imports what it is compared with.
"""

import math

import numpy as np


def cosine(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  norms = [max(float(np.linalg.norm(v)), 1e-12) for v in (a, b)]
  return float(a @ b) / norms[0] / norms[1]


def largest(values, count):
  """The places of the `count` largest values; earlier ones win ties."""
  order = sorted(range(len(values)), key=lambda i: (-values[i], i))
  return sorted(order[:count])


def dpc_knn(x, members, num_clusters, k=7):
  """Scores, centres in order, and each point's centre, of some points."""
  x = np.asarray(x, np.float64)
  members = [int(i) for i in members]
  d = {
    (i, j): np.linalg.norm(x[i] - x[j]) / math.sqrt(x.shape[1])
    for i in members
    for j in members
  }
  density = {}
  for i in members:
    near = sorted(d[i, j] ** 2 for j in members)[: min(k, len(members))]
    density[i] = math.exp(-sum(near) / len(near))
  score = {}
  for i in members:
    denser = [j for j in members if (density[j], -j) > (density[i], -i)]
    score[i] = density[i] * (
      min(d[i, j] for j in denser) if denser else max(d.values())
    )
  order = sorted(members, key=lambda i: (-score[i], i))
  centres = order[: max(1, num_clusters)]
  centre = {}
  for i in members:
    joined = min(sorted(centres), key=lambda j: d[i, j])
    centre[i] = i if i in centres else joined
  return score, centres, centre


def apportion(total, weights, most, least=None):
  """Largest remainder; shares at a limit are fixed and the others redone.

  Finds the scale by bisection, so it shares no arithmetic with the one under
  test.
  """
  n = len(weights)
  least = [0] * n if least is None else least
  low, high = 0.0, 1e9

  def shares(scale):
    return [
      min(max(scale * weights[i], least[i]), most[i]) for i in range(n)
    ]  # fmt: skip

  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if sum(shares(middle)) < total else (low, middle)
  wanted = [round(share, 6) for share in shares(high)]
  out = [math.floor(share) for share in wanted]
  open_places = [i for i in range(n) if out[i] < most[i]]
  open_places.sort(key=lambda i: (round(out[i] - wanted[i], 5), i))
  for i in open_places[: total - sum(out)]:
    out[i] += 1
  assert sum(out) == total
  return out


def shares_of_sets(sizes, total):
  """A budget over sets by size, at least one for each that has tokens."""
  filled = [s for s in range(len(sizes)) if sizes[s]]
  if len(filled) > total:
    filled = [filled[i] for i in largest([sizes[s] for s in filled], total)]
  least = [int(s in filled) for s in range(len(sizes))]
  return apportion(total, sizes, [max(s, 0) for s in sizes], least)


def check_valid(out, num_video, num_valid=None):
  """What every selection promises, whatever the method."""
  index, mask, mass, assign = (
    np.asarray(x) for x in (out.index, out.mask, out.mass, out.assign)
  )
  count = int(mask.sum())
  if num_valid is not None:
    assert count == num_valid
  assert mask[:count].all()
  assert index.dtype == assign.dtype == np.int32
  assert (np.diff(index[:count]) > 0).all()
  assert count == 0 or (index[0] >= 0 and index[count - 1] < num_video)
  assert (index[count:] == num_video).all()
  features = np.asarray(out.features, np.float32)
  assert np.isfinite(features).all() and not features[count:].any()
  assert assign.shape == (num_video,) and assign.min() >= -1
  np.testing.assert_array_equal(
    mass, np.bincount(assign[assign >= 0], minlength=len(index))
  )
  # The token at a row's place is one of those that went into the row, or lies
  # in a row of averages that stands for it.
  assert (mass[:count] > 0).all()


def check_rows(out, expected, num_video, atol=1e-5):
  """Compares a selection with {index: (row, tokens that went into it)}."""
  check_valid(out, num_video, len(expected))
  order = sorted(expected)
  np.testing.assert_array_equal(np.asarray(out.index)[: len(order)], order)
  assign = np.full(num_video, -1)
  for row, place in enumerate(order):
    value, tokens = expected[place]
    assign[list(tokens)] = row
    np.testing.assert_allclose(
      np.asarray(out.features[row], np.float64), value, atol=atol
    )
  np.testing.assert_array_equal(out.assign, assign)
