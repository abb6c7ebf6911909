"""Draws scenes of the embedded benchmark as RGB frames.

Objects are pasted from small tables at whole pixels, so that a NumPy loop here
and an accelerator program elsewhere draw the same from the same slots.
"""

import functools

import numpy as np

from cacovid_jax.synthetic import world

_OVERSAMPLING = 8
_DISTRACTOR = len(world.SHAPES) * len(world.PATTERNS)
# Rows of 5 pixels of each of `world.SYMBOLS`.
_GLYPHS = {
  "H": "10001 10001 11111 10001 10001",
  "K": "10001 10010 11100 10010 10001",
  "L": "10000 10000 10000 10000 11111",
  "O": "01110 10001 10001 10001 01110",
  "T": "11111 00100 00100 00100 00100",
  "U": "10001 10001 10001 10001 11111",
  "X": "10001 01010 00100 01010 10001",
  "Z": "11111 00010 00100 01000 11111",
}


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
  """Returns (opacity, shade), each float32[289, 15, 15] in [0, 1].

  Row `pattern * 8 + shape`; row 32 is the distractor, a soft square; then come
  those of the first 32 with each symbol. Shade multiplies the object's color.
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
  for symbol in world.SYMBOLS:
    glyph = [list(map(int, row)) for row in _GLYPHS[symbol].split()]
    # A dark plate in the lower right corner, letters in the object's color.
    plate = np.pad(np.float64(glyph), 1) * 0.95 + 0.05
    for row in range(_DISTRACTOR):
      opacity.append(opacity[row].copy())
      shade.append(shade[row].copy())
      opacity[-1][-len(plate) :, -len(plate) :] = 1.0
      shade[-1][-len(plate) :, -len(plate) :] = plate
  return np.float32(opacity), np.float32(shade)


def _sprites(attributes: np.ndarray) -> np.ndarray:
  """Returns int[M], the rows of `sprite_tables` of objects int8[M, 3 or 4]."""
  _, pattern, shape, *symbol = attributes.T.astype(int)
  plain = pattern * len(world.SHAPES) + shape
  if not symbol:
    return plain
  carries = symbol[0] >= 0
  return plain + carries * (_DISTRACTOR * (symbol[0] + 1) + 1)


def slots(scene: world.Scene, time: float):
  """What to draw at a time, 0 to T - 1 in sampled frames, distractors first.

  Returns (sprite int16[S], corner int16[S, 2], color float32[S, 3]); `corner`
  is the (y, x) of the sprite's first pixel; unused slots have sprite -1.
  """
  most = scene.stage.max_slots
  sprite = np.full(most, -1, np.int16)
  corner = np.zeros((most, 2), np.int16)
  color = np.zeros((most, 3), np.float32)
  grey = np.flatnonzero(world.visible(scene.distractor_life, time))
  shown = np.flatnonzero(world.visible(scene.life, time))
  grey, shown = grey[:most], shown[: most - len(grey)]
  a, b = len(grey), len(grey) + len(shown)
  sprite[:a] = _DISTRACTOR
  color[:a] = 120.0
  sprite[a:b] = _sprites(scene.attributes[shown])
  palette = np.float32(list(world.COLORS.values()))
  color[a:b] = palette[scene.attributes[shown, 0]] + scene.tint[shown]
  life = np.concatenate([scene.distractor_life[grey], scene.life[shown]])
  path = np.concatenate([scene.distractor_path[grey], scene.path[shown]])
  places = world.centres(life, path, time)
  corner[:b] = places[:, ::-1] - world.SPRITE // 2
  return sprite, corner, np.clip(color, 0, 255)


def background(params: np.ndarray, time, size: int, xp=np, *, planes=False):
  """Returns float32[size, size, 3] moving texture; `xp` is NumPy or JAX's.

  With `planes` float32[3, size, size]: NumPy is slow where the last axis is 3.
  """
  axis = xp.arange(size, dtype=xp.float32)
  y, x = axis[:, None], axis[None, :]
  shape = [size, size]
  shape.insert(0 if planes else 2, 3)
  colors = params[:, :3, None, None] if planes else params[:, :3]
  picture = xp.broadcast_to(colors[0], shape)
  for row in range(1, 4):
    wave = params[row, 3] * x + params[row, 4] * y
    wave = xp.sin(wave + params[row, 5] + params[row, 6] * time)
    picture = picture + (wave if planes else wave[..., None]) * colors[row]
  return picture


def grain(scene: world.Scene) -> np.ndarray:
  """Returns float32[h, w, 1], the clip's static noise in grey levels."""
  rng = np.random.default_rng(scene.noise_seed)
  size = scene.stage.image_size
  return rng.normal(0, 4, (size, size, 1)).astype(np.float32)


def frame(scene: world.Scene, time: float, noise: np.ndarray) -> np.ndarray:
  """Returns uint8[h, w, 3], the scene at a time in sampled frames."""
  sprite, corner, color = slots(scene, time)
  used = sprite >= 0
  opacity, shade = (table[sprite[used], None] for table in sprite_tables())
  paint = opacity * (shade * color[used, :, None, None])
  size = scene.stage.image_size
  picture = background(scene.background, np.float32(time), size, planes=True)
  picture = picture + noise[..., 0]
  layers = zip(corner[used], 1 - opacity, paint, strict=True)
  for (y, x), through, own in layers:
    window = picture[:, y : y + world.SPRITE, x : x + world.SPRITE]
    window *= through
    window += own
  picture = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
  return np.ascontiguousarray(np.moveaxis(picture, 0, -1))


def clip(scene: world.Scene, num_frames: int):
  """Yields `num_frames` uint8[h, w, 3] frames that span the scene."""
  noise = grain(scene)
  for index in range(num_frames):
    time = index * (scene.stage.num_frames - 1) / (num_frames - 1)
    yield frame(scene, time, noise)
