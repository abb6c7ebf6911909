"""What ARCHITECTURE promises of every method, checked for each by its name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base
from tests.compressors import given, quick, videos

GRID = (4, 2, 3)
NUM_VIDEO, WIDTH, KEEP = 24, 8, 7
RATIO = 0.3  # 7.2 of 24.
METHODS = {name: compressors.get(name) for name in compressors.names()}
BEFORE = [n for n, m in METHODS.items() if m.selects_first]


def degenerate():
  """Five videos float32[5, N, D], four of them degenerate."""
  plain = np.random.default_rng(0).standard_normal((NUM_VIDEO, WIDTH))
  frame = plain[: NUM_VIDEO // GRID[0]]
  one_zero = plain.copy()
  one_zero[3] = 0
  batch = [
    plain,
    np.zeros_like(plain),
    np.tile(frame, (GRID[0], 1)),
    np.ones_like(plain),
    one_zero,
  ]
  return np.stack(batch).astype(np.float32)


def arguments(num_video=NUM_VIDEO, num_frames=GRID[0], dtype=jnp.float32):
  """Everything that a method may ask for, of one video."""
  keys = jax.random.split(jax.random.key(1), 7)

  def scores(key):
    frame, token = jax.random.split(key)
    return videos.Scores(
      jax.random.normal(frame, [num_frames, 2]),
      jax.random.normal(token, [num_video, 2]),
    )

  attention = jax.random.uniform(keys[4], [num_video])
  aux = given.Aux(
    scores=scores(keys[0]),
    untrained_scores=scores(keys[1]),
    other_scores=scores(keys[2]),
    attention=jax.random.uniform(keys[3], [28, num_video]),
    vision_attention=attention / attention.sum(),
    vision_keys=jax.random.normal(keys[5], [num_video, 4]),
  )
  text = jax.random.normal(keys[6], [5, WIDTH]).at[3:].set(0).astype(dtype)
  return dict(text=text, aux=aux, rng=jax.random.key(2))


def check(selection, num_video, rows, valid):
  index, mask, mass, assign = (
    np.asarray(part)
    for part in (
      selection.index,
      selection.mask,
      selection.mass,
      selection.assign,
    )
  )
  assert index.shape == mask.shape == mass.shape == (rows,)
  assert assign.shape == (num_video,)
  assert index.dtype == assign.dtype == np.int32 and mass.dtype == np.float32
  count = int(mask.sum())
  if valid is not None:
    assert count == valid
  assert 1 <= count <= rows
  assert mask[:count].all() and (index[count:] == num_video).all()
  assert np.all(np.diff(index[:count]) > 0)
  assert 0 <= index[0] and index[count - 1] < num_video
  features = np.asarray(selection.features, np.float32)
  assert np.isfinite(features).all()
  assert not features[count:].any() and not mass[count:].any()
  assert assign.min() >= -1 and assign.max() < count
  # A row's mass may be made of parts of tokens; none is lost or invented.
  assert mass.min() >= 0
  np.testing.assert_allclose(mass.sum(), (assign >= 0).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", BEFORE)
def test_exactly_k_valid_rows_whatever_the_video(name):
  method = METHODS[name]
  others = arguments()

  @quick.jit
  @jax.vmap
  def run(features):
    return given.compress(
      method, features, grid=GRID, num_keep=KEEP, ratio=RATIO, **others
    )

  batch = degenerate()
  out = run(batch)
  assert out.features.shape == (len(batch), KEEP, WIDTH)
  for i in range(len(batch)):
    check(jax.tree.map(lambda x, i=i: x[i], out), NUM_VIDEO, KEEP, KEEP)
  # A program is compiled once for a grid and a budget.
  run(batch[::-1])
  assert run._cache_size() == 1


@pytest.mark.parametrize("name", BEFORE)
def test_one_token_of_one_frame_in_half_precision(name):
  method = METHODS[name]
  features = jnp.asarray(degenerate()[0][:6], jnp.bfloat16)
  others = arguments(6, 1, jnp.bfloat16)
  run = quick.jit(
    functools.partial(
      given.compress, method, grid=(1, 2, 3), num_keep=1, ratio=0.17
    )
  )
  out = run(features, **others)
  assert out.features.dtype == jnp.bfloat16
  check(out, 6, 1, 1)


@pytest.mark.parametrize("name", BEFORE)
def test_reference_rounding_stays_within_its_rows(name):
  method = compressors.get(name, exact_budget=False)
  rows = method.rows(GRID, RATIO)
  assert 1 <= rows <= NUM_VIDEO
  if not method.rounds_itself:
    assert rows == KEEP
    return  # The same program as with an exact budget.
  others = arguments()
  run = quick.jit(
    lambda features: given.compress(
      method, features, grid=GRID, num_keep=rows, ratio=RATIO, **others
    )
  )
  for features in degenerate()[:3]:
    check(run(features), NUM_VIDEO, rows, None)


@pytest.mark.parametrize("name", BEFORE)
def test_a_budget_of_everything_is_the_identity(name):
  features = degenerate()[0]
  out = given.compress(
    METHODS[name],
    features,
    grid=GRID,
    num_keep=NUM_VIDEO,
    ratio=1.0,
    **arguments(),
  )
  check(out, NUM_VIDEO, NUM_VIDEO, NUM_VIDEO)
  np.testing.assert_array_equal(out.features, features)


@pytest.mark.parametrize("name", compressors.names())
def test_says_what_it_is_called_needs_and_takes(name):
  method = METHODS[name]
  assert method.name == name and not method.oracle
  known = {"text", "LLM attention", "vision attention", "vision keys"}
  assert set(method.requirements) <= known | {"training"}
  assert isinstance(method.stochastic, bool)
  assert method.sees_question or not method.requires - base.VISION_SIGNALS
  assert dict(method.options) == {}
  with pytest.raises(errors.UserError, match="known options") as caught:
    compressors.get(name, not_an_option=1)
  assert "\n" not in str(caught.value)
  for option in method.known_options:
    assert option in str(caught.value)


@pytest.mark.parametrize("name", BEFORE)
def test_a_budget_of_nothing_is_refused(name):
  with pytest.raises(errors.UserError, match="raise the retention ratio"):
    given.compress(
      METHODS[name],
      degenerate()[0],
      grid=GRID,
      num_keep=0,
      ratio=0.01,
      **arguments(),
    )


def test_training_is_what_the_learned_policy_needs_and_nothing_else():
  trained = {
    name for name, m in METHODS.items() if "training" in m.requirements
  }
  assert trained == {"cacovid", "cacovid_other_question"}
