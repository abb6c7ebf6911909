"""What evs, vidcom2, visionzip, prunevid, holitom and fastvid all promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from tests.compressors import given, naive, videos

METHODS = ["evs", "vidcom2", "visionzip", "prunevid", "holitom", "fastvid"]
GRID = (7, 3, 3)
NUM_VIDEO = math.prod(GRID)


@pytest.mark.parametrize("kind", ["noise", "scenes", "static", "zeros"])
@pytest.mark.parametrize("name", METHODS)
def test_exactly_k_rows_of_every_kind_of_video(name, kind):
  for num_keep in (1, 20):
    run = videos.program(name, GRID, num_keep)
    x = videos.features(kind, GRID)
    out = run(x, videos.aux(GRID))
    naive.check_valid(out, NUM_VIDEO, num_keep)
    again = run(x, videos.aux(GRID))
    jax.tree.map(np.testing.assert_array_equal, out, again)


@pytest.mark.parametrize("grid,num_keep", [((1, 3, 3), 4), ((2, 3, 3), 17)])
@pytest.mark.parametrize("name", METHODS)
def test_few_frames_and_all_but_one_token(name, grid, num_keep):
  run = videos.program(name, grid, num_keep)
  for kind in ("noise", "static", "equal", "zeros"):
    out = run(videos.features(kind, grid), videos.aux(grid))
    naive.check_valid(out, math.prod(grid), num_keep)


@pytest.mark.parametrize("num_keep", [NUM_VIDEO, NUM_VIDEO + 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_of_everything_is_the_identity(name, num_keep):
  x = videos.features("scenes", GRID)
  out = videos.program(name, GRID, num_keep)(x, videos.aux(GRID))
  np.testing.assert_array_equal(out.features, x)
  np.testing.assert_array_equal(out.index, np.arange(NUM_VIDEO))


@pytest.mark.parametrize("name", METHODS)
def test_eight_videos_by_vmap_are_eight_single_runs(name):
  kinds = ["noise", "scenes", "static", "zeros"] * 2
  x = np.stack([videos.features(k, GRID, i) for i, k in enumerate(kinds)])
  aux = [videos.aux(GRID, i) for i in range(8)]
  run = videos.program(name, GRID, 20)
  together = videos.program(name, GRID, 20, batched=True)
  batch = together(x, jax.tree.map(lambda *a: np.stack(a), *aux))
  for i in range(8):
    out = run(x[i], aux[i])
    np.testing.assert_array_equal(batch.index[i], out.index)
    np.testing.assert_array_equal(batch.assign[i], out.assign)
    np.testing.assert_allclose(batch.features[i], out.features, atol=1e-5)
  # One program for all of them, whatever is in the videos.
  assert run._cache_size() == together._cache_size() == 1


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_keeps_most_of_the_same_tokens(name, record_property):
  run = videos.program(name, GRID, 20)
  overlaps = []
  for seed in range(4):
    x, aux = videos.features("scenes", GRID, seed), videos.aux(GRID, seed)
    wide, narrow = run(x, aux), run(jnp.asarray(x, jnp.bfloat16), aux)
    assert narrow.features.dtype == jnp.bfloat16
    naive.check_valid(narrow, NUM_VIDEO, 20)
    same = np.intersect1d(wide.index, narrow.index)
    overlaps.append(len(same) / 20)
  record_property("overlap", float(np.mean(overlaps)))
  assert np.mean(overlaps) > 0.7


@pytest.mark.parametrize("name", METHODS)
def test_tokens_of_bfloat16_are_ranked_in_float32(name):
  x = jnp.asarray(videos.features("scenes", GRID, 3), jnp.bfloat16)
  run, aux = videos.program(name, GRID, 20), videos.aux(GRID)
  narrow, wide = run(x, aux), run(x.astype(jnp.float32), aux)
  np.testing.assert_array_equal(narrow.index, wide.index)
  np.testing.assert_array_equal(narrow.assign, wide.assign)
  np.testing.assert_allclose(
    narrow.features.astype(jnp.float32), wide.features, atol=0.05
  )


@pytest.mark.parametrize("name", METHODS)
def test_reference_rounding_fits_its_rows(name):
  method = compressors.get(name, exact_budget=False)
  num_rows = method.rows(GRID, 0.35)
  run = videos.program(name, GRID, ratio=0.35, exact_budget=False)
  for kind in ("noise", "scenes", "static", "zeros"):
    out = run(videos.features(kind, GRID), videos.aux(GRID))
    naive.check_valid(out, NUM_VIDEO)
    assert out.index.shape == (num_rows,)
    assert 1 <= int(out.mask.sum()) <= num_rows


@pytest.mark.parametrize(
  "name,needs",
  [
    ("evs", set()),
    ("vidcom2", set()),
    ("visionzip", {"vision_attention", "vision_keys"}),
    ("prunevid", set()),
    ("holitom", {"vision_attention"}),
    ("fastvid", {"vision_attention"}),
  ],
)
def test_needs_are_named(name, needs):
  method = compressors.get(name)
  assert method.requires == needs
  assert not method.sees_question and not method.stochastic
  if needs:
    with pytest.raises(ValueError, match=f"{name} needs vision_attention"):
      given.compress(
        method, videos.features("noise", GRID), grid=GRID, num_keep=3
      )


def test_the_fallback_of_fastvid_is_labelled():
  assert compressors.get("fastvid").note.startswith("fallback: ")


@pytest.mark.parametrize(
  "spec,said",
  [
    ("vidcom2?temperature=0", "temperature is 0; give a number above 0"),
    ("vidcom2?temperature=hot", "temperature is 'hot'; give a number"),
    ("visionzip?scope=clip", "scope is 'clip'; use 'frame' or 'video'"),
    ("visionzip?contextual_reduce=max", "is 'max'; use 'sum' or 'mean'"),
    ("visionzip?dominant_share=1.5", "at least 0 and at most 1"),
    ("prunevid?frame_share=0", "frame_share is 0; give a number above 0"),
    ("prunevid?threshold=high", "threshold is 'high'; give a number"),
    ("prunevid?num_neighbours=0", "is 0; give an integer at least 1"),
    ("holitom?threshold=None", "threshold is None; give a number"),
    ("holitom?centre_weight=2", "centre_weight is 2;"),
    ("holitom?num_neighbours=7.5", "is 7.5; give an integer"),
    ("fastvid?num_segments=0", "num_segments is 0;"),
    ("fastvid?threshold=low", "threshold is 'low';"),
    ("fastvid?anchor_stride=True", "anchor_stride is True; give an integer"),
    ("fastvid?context_share=-1", "context_share is -1;"),
    ("fastvid?anchor_weight=nan", "anchor_weight is 'nan'; give a number"),
  ],
)
def test_bad_options_are_one_line(spec, said):
  with pytest.raises(errors.UserError) as caught:
    compressors.get(spec)
  assert str(caught.value).startswith(spec.partition("?")[0] + ": ")
  assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0, 2, "'half'"])
def test_a_bad_share_of_clusters_is_one_line(share):
  with pytest.raises(errors.UserError, match="prunevid: cluster_share is"):
    compressors.get(f"prunevid?cluster_share={share}", exact_budget=False)


@pytest.mark.parametrize("name", ["visionzip", "fastvid"])
def test_a_frame_that_keeps_nothing_is_one_line(name):
  method = compressors.get(name, exact_budget=False)
  with pytest.raises(errors.UserError, match="keeps nothing"):
    method.rows(GRID, 0.1)
