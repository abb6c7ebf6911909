"""Drawing of scenes: the same picture from NumPy and from JAX."""

import dataclasses

import jax
import numpy as np

from cacovid_jax.synthetic import losses, render, world
from tests.synthetic.world_test import scene_of


def test_all_sprites_differ():
  opacity, shade = render.sprite_tables()
  assert opacity.shape == shade.shape == (33 + 8 * 32, 15, 15)
  assert opacity.min() >= 0 and opacity.max() <= 1
  drawn = opacity[:32] * shade[:32]
  flat = drawn.reshape(len(drawn), -1)
  apart = np.abs(flat[:, None] - flat[None]).mean(-1)
  apart[np.arange(len(flat)), np.arange(len(flat))] = np.inf
  assert apart.min() > 0.03


def test_slots_hold_what_is_visible_and_nothing_else():
  scene = scene_of()
  for time in range(world.SMALL.num_frames):
    sprite, corner, color = render.slots(scene, float(time))
    shown = world.visible(scene.life, time).sum()
    grey = world.visible(scene.distractor_life, time).sum()
    assert shown + grey <= world.SMALL.max_slots
    assert (sprite >= 0).sum() == shown + grey
    assert corner[sprite >= 0].min() >= 0
    assert corner.max() <= world.SMALL.image_size - world.SPRITE
    assert color.min() >= 0 and color.max() <= 255


def test_a_clip_spans_the_scene_at_any_length():
  scene = scene_of("sparse")
  noise = render.grain(scene)
  short = list(render.clip(scene, 16))
  long = list(render.clip(scene, 31))
  assert len(short) == 16 and len(long) == 31
  assert short[0].shape == (112, 112, 3) and short[0].dtype == np.uint8
  for time in (0, 7, 15):
    np.testing.assert_array_equal(
      short[time], render.frame(scene, float(time), noise)
    )
    np.testing.assert_array_equal(short[time], long[2 * time])


def halve_chroma(frames):
  """4:2:0 by hand: luma stays, color is averaged over 2 x 2 pixels."""
  out = np.empty_like(frames)
  luma = frames @ np.array([0.299, 0.587, 0.114])
  for row in range(0, frames.shape[1], 2):
    for col in range(0, frames.shape[2], 2):
      part = np.s_[:, row : row + 2, col : col + 2]
      chroma = frames[part] - luma[part][..., None]
      out[part] = luma[part][..., None] + chroma.mean((1, 2), keepdims=True)
  return out


def test_jax_draws_what_numpy_draws(monkeypatch):
  scenes = [scene_of("dense", 5), scene_of("sparse", 6)]
  for scene in scenes:
    # NumPy clips before it averages color, so stay within the range.
    scene.background[1:, :3] *= 0.3
  slots = [
    [render.slots(scene, float(t)) for t in range(world.SMALL.num_frames)]
    for scene in scenes
  ]
  sprite, corner, color = (
    np.stack([np.stack([s[part] for s in one]) for one in slots])
    for part in range(3)
  )
  batch = dict(
    sprite=sprite,
    corner=corner,
    color=color.astype(np.uint8),
    background=np.stack([scene.background for scene in scenes]),
  )
  monkeypatch.setattr(losses, "_NOISE", 0.0)
  monkeypatch.setattr(losses, "_GRAIN", 0.0)
  drawn = losses.draw_frames(jax.random.key(0), batch)
  drawn = (np.asarray(drawn) + 1) * 127.5
  still = np.zeros((112, 112, 1), np.float32)
  for scene, ours in zip(scenes, drawn, strict=True):
    expected = np.stack(
      [
        render.frame(scene, float(t), still).astype(np.float64)
        for t in range(world.SMALL.num_frames)
      ]
    )
    # Rounding of pixels and of colors, one grey level each.
    error = np.abs(ours - np.clip(halve_chroma(expected), 0, 255))
    assert error.max() < 2.5, error.max()
    assert error.mean() < 0.6


def test_grain_belongs_to_the_scene():
  first, other = scene_of(seed=1), scene_of(seed=2)
  np.testing.assert_array_equal(render.grain(first), render.grain(first))
  assert not np.array_equal(render.grain(first), render.grain(other))
  moved = dataclasses.replace(first, noise_seed=first.noise_seed + 1)
  assert not np.array_equal(render.grain(first), render.grain(moved))
