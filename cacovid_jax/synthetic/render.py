"""Draws scenes of the embedded benchmark as RGB frames.

Objects are pasted from small tables at whole pixels, so that a NumPy loop here
and an accelerator program elsewhere draw the same from the same slots.
"""

import functools

import numpy as np

from cacovid_jax.synthetic import world

_OVERSAMPLING = 8
_DISTRACTOR = len(world.SHAPES) * len(world.PATTERNS)


def _inside(shape, x, y):
  """Whether points lie in a shape; x, y in [-1, 1], y pointing down."""
  radius = np.hypot(x, y)
  if shape == "circle":
    return radius <= 0.92
  if shape == "square":
    return np.maximum(abs(x), abs(y)) <= 0.8
  if shape == "triangle":
    return (y <= 0.8) & (abs(x) <= (y + 0.95) * 0.55)
  if shape == "diamond":
    return abs(x) * 1.25 + abs(y) <= 1.0
  if shape == "star":
    angle = np.arctan2(x, -y) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    return radius * (np.cos(angle) + 1.35 * np.sin(angle)) <= 0.98
  if shape == "cross":
    thin, long = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    return (thin <= 0.32) & (long <= 0.95)
  if shape == "heart":
    lobes = np.hypot(abs(x) - 0.45, y + 0.35) <= 0.5
    return lobes | ((y > -0.35) & (abs(x) * 0.95 + y <= 0.9) & (abs(x) < 0.95))
  if shape == "moon":
    return (radius <= 0.95) & (np.hypot(x - 0.5, y) > 0.75)
  raise KeyError(shape)


@functools.cache
def sprite_tables() -> tuple[np.ndarray, np.ndarray]:
  """Returns (opacity, shade), each float32[33, 15, 15] in [0, 1].

  Row `pattern * 8 + shape`; the last row is the distractor, a soft square.
  Shade multiplies the object's color.
  """
  size = world.SPRITE * _OVERSAMPLING
  axis = (np.arange(size) + 0.5) / size * 2 - 1
  x, y = np.meshgrid(axis, axis)

  def pooled(values):
    cells = values.reshape((world.SPRITE, _OVERSAMPLING) * 2)
    return cells.mean((1, 3))

  opacity, shade = [], []
  for pattern in world.PATTERNS:
    for shape in world.SHAPES:
      mask = _inside(shape, x, y)
      bright = np.ones_like(x)
      if pattern == "hollow":
        # A crescent shrinks towards its own middle, not the circle's.
        middle = -0.62 if shape == "moon" else 0.0
        inner = (x - middle) * 1.75 + middle
        mask = mask & ~_inside(shape, inner, y * 1.75)
      elif pattern == "striped":
        bright = np.where((y * 4.2) % 2 < 1, 1.0, 0.12)
      elif pattern == "halved":
        bright = np.where(y < 0, 1.0, 0.12)
      opacity.append(pooled(mask.astype(float)))
      shade.append(pooled(bright))
  opacity.append(pooled((np.maximum(abs(x), abs(y)) <= 0.9) * 0.8))
  shade.append(pooled(np.where((x * 3 + y * 2) % 2 < 1, 1.0, 0.7)))
  return np.float32(opacity), np.float32(shade)


def slots(scene: world.Scene, time: float):
  """What to draw at a time, 0 to 15 in sampled frames, distractors first.

  Returns (sprite int8[S], corner int16[S, 2], color float32[S, 3]); `corner` is
  the (y, x) of the sprite's first pixel; unused slots have sprite -1.
  """
  sprite = np.full(world.MAX_SLOTS, -1, np.int8)
  corner = np.zeros((world.MAX_SLOTS, 2), np.int16)
  color = np.zeros((world.MAX_SLOTS, 3), np.float32)
  grey = np.flatnonzero(world.visible(scene.distractor_life, time))
  shown = np.flatnonzero(world.visible(scene.life, time))
  grey, shown = grey[: world.MAX_SLOTS], shown[: world.MAX_SLOTS - len(grey)]
  a, b = len(grey), len(grey) + len(shown)
  sprite[:a] = _DISTRACTOR
  color[:a] = 120.0
  colors, patterns, shapes = scene.attributes[shown].T
  sprite[a:b] = patterns * len(world.SHAPES) + shapes
  palette = np.float32(list(world.COLORS.values()))
  color[a:b] = palette[colors] + scene.tint[shown]
  life = np.concatenate([scene.distractor_life[grey], scene.life[shown]])
  path = np.concatenate([scene.distractor_path[grey], scene.path[shown]])
  places = world.centres(life, path, time)
  corner[:b] = places[:, ::-1] - world.SPRITE // 2
  return sprite, corner, np.clip(color, 0, 255)


def background(params: np.ndarray, time, xp=np, *, planes=False):
  """Returns float32[112, 112, 3] moving texture; `xp` is numpy or jax.numpy.

  With `planes` float32[3, 112, 112]: NumPy is slow where the last axis is 3.
  """
  axis = xp.arange(world.IMAGE_SIZE, dtype=xp.float32)
  y, x = axis[:, None], axis[None, :]
  size = [world.IMAGE_SIZE] * 2
  size.insert(0 if planes else 2, 3)
  colors = params[:, :3, None, None] if planes else params[:, :3]
  picture = xp.broadcast_to(colors[0], size)
  for row in range(1, 4):
    wave = params[row, 3] * x + params[row, 4] * y
    wave = xp.sin(wave + params[row, 5] + params[row, 6] * time)
    picture = picture + (wave if planes else wave[..., None]) * colors[row]
  return picture


def grain(scene: world.Scene) -> np.ndarray:
  """Returns float32[112, 112, 1], the clip's static noise in grey levels."""
  rng = np.random.default_rng(scene.noise_seed)
  size = (world.IMAGE_SIZE, world.IMAGE_SIZE, 1)
  return rng.normal(0, 4, size).astype(np.float32)


def frame(scene: world.Scene, time: float, noise: np.ndarray) -> np.ndarray:
  """Returns uint8[112, 112, 3], the scene at a time in sampled frames."""
  sprite, corner, color = slots(scene, time)
  used = sprite >= 0
  opacity, shade = (table[sprite[used], None] for table in sprite_tables())
  paint = opacity * (shade * color[used, :, None, None])
  picture = background(scene.background, np.float32(time), planes=True)
  picture = picture + noise[..., 0]
  layers = zip(corner[used], 1 - opacity, paint, strict=True)
  for (y, x), through, own in layers:
    window = picture[:, y : y + world.SPRITE, x : x + world.SPRITE]
    window *= through
    window += own
  picture = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
  return np.ascontiguousarray(np.moveaxis(picture, 0, -1))


def clip(scene: world.Scene, num_frames: int):
  """Yields `num_frames` uint8[112, 112, 3] frames that span the scene."""
  noise = grain(scene)
  for index in range(num_frames):
    time = index * (world.NUM_FRAMES - 1) / (num_frames - 1)
    yield frame(scene, time, noise)
