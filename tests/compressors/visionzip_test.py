"""VisionZip against its steps, and its two kinds of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import allocators
from tests.compressors import given, naive, quick, videos

GRID = (7, 3, 3)


def expected(x, aux, parts, num_keep, share=54 / 64, reduce="sum", counts=None):
  """Rows of the method, on `parts` equal stretches of the tokens.

  Each of them has the same budget, or that of `counts`.
  """
  size = len(x) // parts
  out = {}
  for p in range(parts):
    tokens = range(p * size, (p + 1) * size)
    budget = num_keep // parts + (p < num_keep % parts)
    if counts is not None:
      budget = int(counts[p])
    num_dominant = int(budget * share)
    num_contextual = budget - num_dominant
    attention = [float(aux.vision_attention[i]) for i in tokens]
    dominant = [p * size + n for n in naive.largest(attention, num_dominant)]
    for i in dominant:
      out[i] = x[i], [i]
    others = [i for i in tokens if i not in dominant]
    if not num_contextual:
      continue
    step = max(1, len(others) // num_contextual)
    targets = others[::step][:num_contextual]
    taken = {i: [] for i in targets}
    for i in others:
      if i not in targets:
        near = [
          naive.cosine(aux.vision_keys[i], aux.vision_keys[j]) for j in targets
        ]
        taken[targets[int(np.argmax(near))]].append(i)
    for i, merged in taken.items():
      row = np.asarray(x[i], np.float64)
      if merged and reduce == "sum":
        row = row + x[merged].mean(axis=0)
      elif merged:
        row = x[[i, *merged]].mean(axis=0)
      out[i] = row, [i, *merged]
  assert len(out) == num_keep
  return out


# In order: no contextual token in most frames, a frame kept whole but for
# one, and a few of both kinds.
@pytest.mark.parametrize(
  "grid,num_keep", [((1, 3, 3), 4), ((2, 3, 3), 17), (GRID, 1), (GRID, 20)]
)
def test_equals_the_steps(grid, num_keep):
  for seed in range(4):
    x, aux = videos.features("noise", grid, seed), videos.aux(grid, seed)
    out = videos.program("visionzip", grid, num_keep)(x, aux)
    naive.check_rows(out, expected(x, aux, grid[0], num_keep), len(x))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_reductions_and_shares(reduce):
  grid, num_keep = (2, 4, 4), 17
  options = {"contextual_reduce": reduce, "dominant_share": 0.6}
  run = videos.program("visionzip", grid, num_keep, **options)
  for seed in range(3):
    x, aux = videos.features("noise", grid, seed), videos.aux(grid, seed)
    naive.check_rows(
      run(x, aux), expected(x, aux, 2, num_keep, 0.6, reduce), 32
    )


def test_contextual_tokens_alone_and_over_the_video():
  options = {"scope": "video", "dominant_share": 0}
  run = videos.program("visionzip", (2, 4, 4), 5, **options)
  x, aux = videos.features("noise", (2, 4, 4)), videos.aux((2, 4, 4))
  naive.check_rows(run(x, aux), expected(x, aux, 1, 5, share=0), 32)


def test_dominant_tokens_are_untouched_and_every_token_goes_somewhere():
  x, aux = videos.features("noise", GRID), videos.aux(GRID)
  out = videos.program("visionzip", GRID, 20)(x, aux)
  # Three a frame and one more in the first six: int(3 * 54 / 64) dominant.
  alone = np.asarray(out.mass) == 1
  np.testing.assert_array_equal(
    np.asarray(out.features)[alone], x[np.asarray(out.index)[alone]]
  )
  assert alone.sum() >= 6 * 2 + 1
  assert (np.asarray(out.assign) >= 0).all()


def test_without_contextual_tokens_the_others_are_dropped():
  run = videos.program("visionzip", GRID, 20, dominant_share=1.0)
  x, aux = videos.features("noise", GRID), videos.aux(GRID)
  out = run(x, aux)
  naive.check_rows(out, expected(x, aux, 7, 20, share=1.0), 63)
  assert (np.asarray(out.assign) == -1).sum() == 43


def test_reference_cuts_off_each_frame():
  frame = compressors.get("visionzip", exact_budget=False)
  video = compressors.get("visionzip?scope=video", exact_budget=False)
  assert frame.rows((32, 14, 14), 0.255) == 32 * 49
  assert video.rows((32, 14, 14), 0.255) == 1599


KINDS = ("noise", "scenes", "static", "equal", "zeros")


@functools.cache
def counts_of(allocator, num_keep):
  """The compiled shares of frames whose tokens go by their attention."""

  def counts(x, aux):
    order = jnp.argsort(-aux.vision_attention.reshape(GRID[0], -1))
    return allocators.frame_counts(
      allocator, given.inputs(x, GRID, aux), order, num_keep
    )

  return quick.jit(counts)


@pytest.mark.parametrize("allocator", ["adaptok", "infotok", "cacovid"])
def test_frames_have_the_budget_of_the_allocator(allocator):
  num_keep = 20
  run = videos.program("visionzip", GRID, num_keep, allocator=allocator)
  inputs, outputs, differ = [], [], False
  for seed, kind in enumerate(KINDS):
    x, aux = videos.features(kind, GRID, seed), videos.aux(GRID, seed)
    x[9:18] *= 0.1  # A quiet frame.
    aux = aux._replace(scores=videos.scores(GRID, seed))
    counts = np.asarray(counts_of(allocator, num_keep)(x, aux))
    assert counts.sum() == num_keep and 1 <= counts.min()
    differ |= counts.max() > 3
    out = run(x, aux)
    naive.check_rows(
      out, expected(x, aux, GRID[0], num_keep, counts=counts), len(x)
    )
    inputs.append((x, aux))
    outputs.append(out)
  assert differ and run._cache_size() == 1
  if allocator != "adaptok":
    return  # One of them in a batch says enough.
  together = videos.program(
    "visionzip", GRID, num_keep, batched=True, allocator=allocator
  )
  batch = together(*jax.tree.map(lambda *a: np.stack(a), *inputs))
  for i, out in enumerate(outputs):
    np.testing.assert_array_equal(batch.index[i], out.index)
    np.testing.assert_array_equal(batch.assign[i], out.assign)


def test_fewer_tokens_than_frames_by_measured_errors():
  run = videos.program("visionzip", GRID, 3, allocator="adaptok")
  for seed, kind in enumerate(KINDS):
    x, aux = videos.features(kind, GRID, seed), videos.aux(GRID, seed)
    counts = np.asarray(counts_of("adaptok", 3)(x, aux))
    naive.check_rows(
      run(x, aux), expected(x, aux, GRID[0], 3, counts=counts), len(x)
    )


def test_equal_shares_by_name_are_the_default():
  x, aux = videos.features("noise", GRID), videos.aux(GRID)
  plain = videos.program("visionzip", GRID, 20)(x, aux)
  named = videos.program("visionzip", GRID, 20, allocator="uniform")(x, aux)
  np.testing.assert_array_equal(plain.index, named.index)
  np.testing.assert_array_equal(plain.assign, named.assign)
  np.testing.assert_allclose(plain.features, named.features, atol=1e-5)


def test_an_allocator_adds_what_it_needs_and_shares_between_frames_only():
  needs = {"vision_attention", "vision_keys"}
  assert compressors.get("visionzip?allocator=infotok").requires == needs
  by_policy = compressors.get("visionzip?allocator=cacovid")
  assert by_policy.requires == needs | {"scores"} and by_policy.sees_question
  x, aux = videos.features("noise", GRID), videos.aux(GRID)
  with pytest.raises(ValueError, match="needs scores"):
    given.compress(by_policy, x, grid=GRID, num_keep=5, aux=aux)
  with pytest.raises(errors.UserError, match="no allocator 'fair'; there are"):
    compressors.get("visionzip?allocator=fair")
  with pytest.raises(errors.UserError, match="needs scope 'frame'") as caught:
    compressors.get("visionzip?scope=video&allocator=infotok")
  assert "\n" not in str(caught.value)
