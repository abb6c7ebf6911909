"""The interface: budgets, options, and the builders of selections."""

import dataclasses
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base, registry
from cacovid_jax.compressors.math import similarity
from tests.compressors import given, quick

GRID = (5, 2, 3)
NUM_VIDEO = 30


def features_of(seed, num_video=NUM_VIDEO, width=4):
  return jax.random.normal(jax.random.key(seed), [num_video, width])


def check_valid(selection, num_video):
  """What ARCHITECTURE promises of every selection."""
  index, mask, mass, assign = (
    np.asarray(part)
    for part in (
      selection.index,
      selection.mask,
      selection.mass,
      selection.assign,
    )
  )
  valid = int(mask.sum())
  assert mask[:valid].all() and not mask[valid:].any()
  assert np.all(np.diff(index[:valid]) > 0)
  assert (index[valid:] == num_video).all()
  assert not np.asarray(selection.features)[valid:].any()
  assert not mass[valid:].any()
  assert mass.sum() == (assign >= 0).sum()
  np.testing.assert_array_equal(
    mass, np.bincount(assign[assign >= 0], minlength=len(mass))
  )


@pytest.mark.parametrize("num_rows", [1, 9, 30])
def test_take_mask_compacts_and_pads(num_rows):
  features = features_of(0)
  rng = np.random.default_rng(num_rows)
  take = quick.jit(base.take_mask, static_argnums=2)
  for count in (0, 1, num_rows, 30):
    mask = np.zeros(NUM_VIDEO, bool)
    mask[rng.permutation(NUM_VIDEO)[:count]] = True
    out = take(features, mask, num_rows)
    check_valid(out, NUM_VIDEO)
    kept = np.flatnonzero(mask)[:num_rows]
    np.testing.assert_array_equal(out.index[: len(kept)], kept)
    np.testing.assert_array_equal(
      out.features[: len(kept)], np.asarray(features)[kept]
    )
    assert int(out.mask.sum()) == len(kept)


def test_merge_equals_a_loop_over_groups():
  rng = np.random.default_rng(0)
  merge = quick.jit(base.merge)
  for seed in range(6):
    features = np.asarray(features_of(seed))
    representative = rng.permutation(NUM_VIDEO)[:7].astype(np.int32)
    assign = rng.integers(-1, 7, NUM_VIDEO).astype(np.int32)
    num_valid = [7, 7, 5, 1, 0, 6][seed]
    out = merge(features, representative, assign, jnp.int32(num_valid))
    check_valid(out, NUM_VIDEO)
    order = sorted(range(num_valid), key=lambda g: representative[g])
    for row, group in enumerate(order):
      members = np.flatnonzero(assign == group)
      assert out.index[row] == representative[group]
      assert out.mass[row] == len(members)
      np.testing.assert_array_equal(
        np.flatnonzero(np.asarray(out.assign) == row), members
      )
      expected = features[representative[group]]
      if len(members):
        expected = features[members].mean(axis=0)
      np.testing.assert_allclose(out.features[row], expected, atol=1e-6)
    assert int(out.mask.sum()) == num_valid


def test_merge_without_a_count_takes_every_group():
  features = features_of(1)
  out = base.merge(features, jnp.array([4, 2]), jnp.zeros(NUM_VIDEO, jnp.int32))
  check_valid(out, NUM_VIDEO)
  np.testing.assert_array_equal(out.index, [2, 4])
  # Group 1 has no token: its representative stands there, for nothing.
  np.testing.assert_array_equal(out.features[0], features[2])
  np.testing.assert_array_equal(out.mass, [0, NUM_VIDEO])


def test_merge_of_bfloat16_sums_in_float32():
  features = jnp.ones([300, 2], jnp.bfloat16).at[0].set(256)
  out = base.merge(features, jnp.array([0]), jnp.zeros(300, jnp.int32))
  assert out.features.dtype == jnp.bfloat16
  # A sum kept in bfloat16 would stay at 256 whatever is added.
  np.testing.assert_array_equal(
    out.features[0], jnp.full(2, 555 / 300, jnp.bfloat16)
  )


def halves(features, *, grid, num_keep, text=None, aux=None, rng=None,
           ratio=None, rounding="exact", shift=0):  # fmt: skip
  """Keeps the first tokens; its reference rounds to the nearest even."""
  del text, aux, rng
  count = num_keep
  if rounding == "reference":
    count = round(ratio * grid[0] * grid[1] * grid[2])
  mask = jnp.arange(features.shape[0]) < count + shift
  return base.take_mask(features, mask, num_keep)


def halves_rows(grid, ratio, shift=0):
  return round(ratio * grid[0] * grid[1] * grid[2]) + shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(base.Compressor):
  """`halves` as a class; a shift is the question's."""

  name: str = "halves"
  shift: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.shift > 1:
      object.__setattr__(self, "requires", frozenset(["text"]))

  def choose(self, inputs, num_keep, ratio):
    rounding = "exact" if self.exact_budget else "reference"
    return halves(
      inputs.features, grid=inputs.grid, num_keep=num_keep, ratio=ratio,
      rounding=rounding, shift=self.shift,
    )  # fmt: skip

  def reference_rows(self, grid, ratio):
    return halves_rows(grid, ratio, self.shift)


@pytest.fixture(name="rule", params=["function", "class"])
def fixture_rule(request):
  if request.param == "class":
    return Halves()
  return registry.FunctionCompressor(
    name="halves", function=halves, own_rows=halves_rows
  )


def test_rows_follow_the_rounding(rule):
  # 0.05 * 30 = 1.5 and 0.15 * 30 = 4.5.
  assert [rule.rows(GRID, r) for r in (0.05, 0.15, 1.0)] == [1, 4, 30]
  loose = rule.with_options(exact_budget=False)
  assert not loose.exact_budget and rule.exact_budget
  assert [loose.rows(GRID, r) for r in (0.05, 0.15, 1.0)] == [2, 4, 30]
  shifted = loose.with_options(shift=1)
  assert shifted.rows(GRID, 0.05) == 3
  assert shifted.rows(GRID, 1.0) == 30
  assert shifted.options == {"shift": 1}
  with pytest.raises(errors.UserError, match="keeps nothing"):
    loose.with_options(shift=-9).rows(GRID, 0.05)
  with pytest.raises(errors.UserError, match="outside"):
    loose.rows(GRID, 1.5)


def test_the_function_is_told_the_rounding(rule):
  loose = rule.with_options(exact_budget=False)
  features = features_of(0)
  exact = given.compress(rule, features, grid=GRID, num_keep=1, ratio=0.05)
  assert exact.index.shape == (1,)
  out = given.compress(loose, features, grid=GRID, num_keep=2, ratio=0.05)
  np.testing.assert_array_equal(out.index, [0, 1])
  with pytest.raises(ValueError, match="needs the ratio"):
    given.compress(loose, features, grid=GRID, num_keep=2)


def test_a_bound_of_everything_is_not_the_identity(rule):
  loose = rule.with_options(exact_budget=False)
  features = features_of(0)
  out = given.compress(loose, features, grid=GRID, num_keep=30, ratio=0.5)
  check_valid(out, NUM_VIDEO)
  assert int(out.mask.sum()) == 15
  out = given.compress(loose, features, grid=GRID, num_keep=30, ratio=1.0)
  assert int(out.mask.sum()) == 30


def test_methods_without_a_rounding_of_their_own_keep_the_exact_budget():
  for exact in (True, False):
    method = compressors.get("uniform", exact_budget=exact)
    assert method.rows(GRID, 0.35) == 10
    out = given.compress(
      method, features_of(0), grid=GRID, num_keep=10, ratio=0.35
    )
    assert int(out.mask.sum()) == 10


def test_exact_budget_is_an_option_of_every_method():
  assert compressors.get("uniform").exact_budget
  assert not compressors.get("uniform?exact_budget=False").exact_budget
  assert not compressors.get("uniform", exact_budget=False).exact_budget
  method = compressors.get("divprune?scope=frame&exact_budget=False")
  assert method.options == {"scope": "frame"} and not method.exact_budget
  with pytest.raises(errors.UserError, match="'no'; give True or False"):
    compressors.get("uniform?exact_budget=no")
  with pytest.raises(errors.UserError, match="give True or False"):
    compressors.get("uniform", exact_budget=0)


def test_options_may_change_what_is_needed():
  assert not Halves().with_options(shift=0).sees_question
  asked = Halves().with_options(shift=2)
  assert asked.sees_question and asked.requirements == ("text",)
  with pytest.raises(ValueError, match="needs text"):
    given.compress(asked, features_of(0), grid=GRID, num_keep=3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_before_selection(bad):
  broken = features_of(0).at[3, 1].set(bad)
  with pytest.raises(errors.UserError, match="video features hold NaN"):
    given.compress(compressors.get("divprune"), broken, grid=GRID, num_keep=3)
  with pytest.raises(errors.UserError, match="video features hold NaN"):
    given.compress(compressors.get("uniform"), broken, grid=GRID, num_keep=30)
  attention = jnp.ones([3, 30]).at[2, 0].set(bad)
  with pytest.raises(errors.UserError, match="attention hold NaN"):
    given.compress(
      compressors.get("last_query"),
      features_of(0),
      grid=GRID,
      num_keep=3,
      aux=given.Aux(attention=attention),
    )


def test_a_program_may_be_traced_around_given_values():
  aux = given.Aux(attention=jnp.arange(90.0).reshape(3, 30))
  method = compressors.get("last_query")
  features = features_of(0)
  expected = [27, 28, 29]
  inputs = quick.jit(
    lambda x: given.compress(method, x, grid=GRID, num_keep=3, aux=aux).index
  )
  np.testing.assert_array_equal(inputs(features), expected)
  constants = quick.jit(
    lambda: (
      given.compress(method, features, grid=GRID, num_keep=3, aux=aux).index
    )
  )
  np.testing.assert_array_equal(constants(), expected)


def test_requirements_are_words():
  assert compressors.get("uniform").requirements == ()
  assert compressors.get("cacovid").requirements == ("text", "training")
  assert compressors.get("last_query").requirements == ("text", "LLM attention")
  vision = dataclasses.replace(
    compressors.get("uniform"),
    requires=frozenset(["vision_keys", "vision_attention", "depth"]),
  )
  assert vision.requirements == ("vision attention", "vision keys", "depth")


def test_what_the_vision_tower_saw_does_not_depend_on_the_question():
  method = dataclasses.replace(
    compressors.get("uniform"), requires=base.VISION_SIGNALS
  )
  assert not method.sees_question
  assert compressors.get("last_query").sees_question
  assert compressors.get("random").sees_question


def test_the_names_of_the_methods():
  assert compressors.names() == tuple(
    "cacovid random uniform evs vidcom2 fastv visionzip divprune prunevid"
    " framefusion holitom fastvid flashvid unicomp floc scissor dyto em"
    " vqtoken last_query density_peaks cacovid_untrained"
    " cacovid_other_question".split()
  )


def test_a_users_own_rule_says_what_it_reads_and_how_it_rounds(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    textwrap.dedent("""
      from cacovid_jax.compressors import base

      def seen(features, *, grid, num_keep, text=None, aux=None, rng=None):
        return base.take_top(features, aux.vision_attention, num_keep)

      seen.requires = ["vision_attention"]
      seen.stochastic = True
      seen.reference_rows = lambda grid, ratio, **options: 7
    """)
  )
  method = compressors.get(f"{path}:seen")
  assert method.name == "seen" and method.stochastic
  assert method.requirements == ("vision attention",)
  assert method.rows(GRID, 0.5) == 15
  loose = compressors.get(f"{path}:seen?exact_budget=False")
  assert loose.rows(GRID, 0.5) == 7
  attention = jnp.arange(30.0)
  out = given.compress(
    method,
    features_of(0),
    grid=GRID,
    num_keep=3,
    aux=given.Aux(vision_attention=attention),
    rng=jax.random.key(0),
  )
  np.testing.assert_array_equal(out.index, [27, 28, 29])


def test_segment_mean_equals_a_loop_and_leaves_out_foreign_labels():
  rng = np.random.default_rng(3)
  x = rng.normal(size=[20, 5]).astype(np.float32)
  label = rng.integers(-1, 8, 20).astype(np.int32)
  label[label == 3] = 4
  expected = np.zeros([7, 5])
  for group in range(7):
    if np.any(label == group):
      expected[group] = x[label == group].mean(axis=0)
  mean = similarity.segment_mean(x, label, 7)
  np.testing.assert_allclose(mean, expected, atol=1e-6)
  assert not np.any(mean[3])
