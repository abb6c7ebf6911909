"""Plans of scenes: who is where when, and which tokens that makes."""

import dataclasses

import numpy as np
import pytest

from cacovid_jax.synthetic import render, world

VARIANTS = ("dense", "sparse")


def scene_of(variant="dense", seed=0):
  return world.sample_scene(
    np.random.default_rng(seed), world.VARIANTS[variant]
  )


def without(scene, obj):
  """Returns the scene with one object less."""
  return dataclasses.replace(
    scene,
    **{
      name: np.delete(getattr(scene, name), obj, axis=0)
      for name in ("attributes", "life", "path", "tint")
    },
  )


def cells_changed(scene, obj):
  """Returns how many pixels an object changes in each token, int[T, H, W]."""
  less, still = without(scene, obj), np.zeros((112, 112, 1), np.float32)
  counts = []
  for time in range(world.SMALL.num_frames):
    here = render.frame(scene, float(time), still)
    there = render.frame(less, float(time), still)
    changed = (here != there).any(-1)
    counts.append(changed.reshape(7, 16, 7, 16).sum((1, 3)))
  return np.stack(counts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scene_is_a_function_of_its_seed(variant):
  first, again = scene_of(variant, 3), scene_of(variant, 3)
  for field in dataclasses.fields(world.Scene):
    np.testing.assert_array_equal(
      getattr(first, field.name), getattr(again, field.name)
    )
  other = scene_of(variant, 4)
  assert other.noise_seed != first.noise_seed


@pytest.mark.parametrize("variant", VARIANTS)
def test_scenes_keep_to_their_variant(variant):
  config = world.VARIANTS[variant]
  for seed in range(20):
    scene = scene_of(variant, seed)
    # Where the picture is full, a few objects may find no place.
    assert 0.9 * config.num_objects[0] <= len(scene.attributes)
    assert len(scene.attributes) <= config.num_objects[1]
    lengths = scene.life[:, 1] - scene.life[:, 0] + 1
    assert config.life[0] <= lengths.min() <= lengths.max() <= config.life[1]
    assert scene.life.min() >= 0 and scene.life.max() < world.SMALL.num_frames
    # Drawn objects lie within the picture.
    half = world.SPRITE // 2
    assert scene.path.min() >= half
    assert scene.path.max() <= world.SMALL.image_size - half


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_two_objects_share_a_cell(variant):
  for seed in range(10):
    scene = scene_of(variant, seed)
    taken = np.zeros(world.SMALL.grid, int)
    for life, path in (
      (scene.life, scene.path),
      (scene.distractor_life, scene.distractor_path),
    ):
      cells = np.floor(path.mean(1) / world.CELL).astype(int)
      for (first, last), (col, row) in zip(life, cells, strict=True):
        taken[first : last + 1, row, col] += 1
    assert taken.max() == 1


def test_objects_move_evenly_from_before_their_life_to_after_it():
  life = np.array([[2, 3]])
  path = np.float32([[[10, 20], [14, 28]]])
  # By hand: the path runs from time 1.5 to time 3.5.
  for time, expected in ((1.5, (10, 20)), (2.5, (12, 24)), (3.5, (14, 28))):
    np.testing.assert_array_equal(
      world.centres(life, path, time), [list(expected)]
    )
  seen = [bool(world.visible(life, t)[0]) for t in (1.4, 1.5, 3.4, 3.5)]
  assert seen == [False, True, True, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_decisive_tokens_hold_the_objects_pixels(variant):
  scene = scene_of(variant, 1)
  for obj in range(
    0, len(scene.attributes), max(1, len(scene.attributes) // 5)
  ):
    changed = cells_changed(scene, obj)
    tokens = world.covered_tokens(scene, [obj])
    assert tokens == sorted(set(tokens))
    covered = np.zeros(world.SMALL.num_tokens, bool)
    covered[tokens] = True
    covered = covered.reshape(world.SMALL.grid)
    assert (changed[covered] > 0).all()
    first, last = scene.life[obj]
    for time in range(world.SMALL.num_frames):
      alive = first <= time <= last
      assert covered[time].any() == alive
      if not alive:
        assert not changed[time].any()
        continue
      # What lies outside is at most the rim in neighbouring cells.
      assert changed[time][covered[time]].sum() >= 0.4 * changed[time].sum()
      assert covered[time].reshape(-1)[changed[time].argmax()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_owners_are_the_objects_that_fill_most_of_a_token(variant):
  scene = scene_of(variant, 2)
  owners = world.token_owners(scene)
  assert owners.shape == world.SMALL.grid
  for obj in range(len(scene.attributes)):
    mine = np.flatnonzero(owners.reshape(-1) == obj)
    assert set(mine) <= set(world.covered_tokens(scene, [obj]))
    frames = mine // (world.SMALL.max_slots)
    assert len(frames) == len(set(frames))
  lives = scene.life[:, 1].astype(int) - scene.life[:, 0] + 1
  assert (owners >= 0).sum() >= 0.8 * lives.sum()
