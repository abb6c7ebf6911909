"""Scenes of the embedded benchmark: which object is where, and when.

A scene is a plan over T = 16 sampled frames of 7 x 7 cells; a cell is one
video token. Objects live for a few frames in one cell and drift a little. At
most one is in a cell at a time, so that tokens can point at it.

Two variants, because one alone misleads: on `sparse` a handful of striking
objects can be found by diversity alone; on `dense` there are more equally
askable objects than a 10 % budget has tokens, so that a selection must look at
the question.
"""

import dataclasses
import functools

import numpy as np

_SHAPES = "circle square triangle diamond star cross heart moon"
SHAPES = tuple(_SHAPES.split())
PATTERNS = ("solid", "hollow", "striped", "halved")
COLORS = {
  "red": (232, 44, 40),
  "orange": (250, 146, 26),
  "yellow": (244, 232, 60),
  "green": (46, 190, 66),
  "cyan": (60, 222, 232),
  "blue": (58, 86, 244),
  "pink": (250, 120, 214),
  "white": (244, 244, 244),
}
COLOR_NAMES = tuple(COLORS)
ATTRIBUTES = (COLOR_NAMES, PATTERNS, SHAPES)  # In the order of `Scene`.

NUM_FRAMES = 16
NUM_ROWS = NUM_COLS = 7
CELL = 16  # Pixels per side of a cell, which is one video token.
SPRITE = 15  # Pixels per side of a drawn object.
IMAGE_SIZE = NUM_ROWS * CELL
GRID = (NUM_FRAMES, NUM_ROWS, NUM_COLS)
NUM_TOKENS = NUM_FRAMES * NUM_ROWS * NUM_COLS
# Objects and distractors drawn in one frame, at most: one in each cell.
MAX_SLOTS = NUM_ROWS * NUM_COLS


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
  """How crowded and how textured the scenes of a variant are."""

  num_objects: tuple[int, int]  # Askable ones per clip, inclusive range.
  life: tuple[int, int]  # Sampled frames that show an object, as well.
  num_distractors: tuple[int, int]  # Grey patches per clip, as well.
  texture: float  # Amplitude of the moving background, in grey levels.
  repeats: int  # Of one color and shape pair at most; 1 leaves it to chance.


VARIANTS = {
  "dense": WorldConfig(
    num_objects=(128, 136),
    life=(2, 3),
    num_distractors=(6, 10),
    texture=22.0,
    repeats=1,
  ),
  "sparse": WorldConfig(
    num_objects=(5, 7),
    life=(3, 5),
    num_distractors=(1, 3),
    texture=5.0,
    repeats=3,
  ),
}


@dataclasses.dataclass(frozen=True)
class Scene:
  """One clip's plan; M objects and D distractors, all arrays NumPy."""

  attributes: np.ndarray  # int8[M, 3] color, pattern and shape.
  life: np.ndarray  # int8[M, 2] first and last sampled frame that shows it.
  # float32[M, 2, 2] centre (x, y) in pixels half a frame before the first and
  # half a frame after the last.
  path: np.ndarray
  tint: np.ndarray  # float32[M, 3] grey levels, so that no two are equal.
  distractor_life: np.ndarray  # int8[D, 2], as for objects.
  distractor_path: np.ndarray  # float32[D, 2, 2], likewise.
  # float32[4, 7]; row 0 the base color, rows 1 to 3 waves with amplitudes (3),
  # wave numbers (2), phase and drift.
  background: np.ndarray
  noise_seed: int  # Of the static grain.

  @functools.cached_property
  def coverage(self) -> np.ndarray:
    """float64[M, N], the share of each object on each token."""
    edges = np.arange(NUM_ROWS) * CELL
    shares = np.zeros((len(self.life), *GRID))
    for frame in range(NUM_FRAMES):
      seen = np.flatnonzero(visible(self.life, frame))
      places = centres(self.life[seen], self.path[seen], float(frame))
      low = places.T[..., None] - SPRITE // 2  # [(x, y), M, 1]
      span = np.minimum(edges + CELL, low + SPRITE) - np.maximum(edges, low)
      columns, rows = np.maximum(span, 0) / SPRITE
      shares[seen, frame] = rows[:, :, None] * columns[:, None]
    return shares.reshape(len(shares), NUM_TOKENS)


def _between(rng, inclusive: tuple[int, int]) -> int:
  return int(rng.integers(inclusive[0], inclusive[1] + 1))


def _place(rng, occupied, life_range):
  """Finds a free cell and life, marks them; None when 32 tries all fail."""
  for _ in range(32):
    length = _between(rng, life_range)
    first = int(rng.integers(0, NUM_FRAMES - length + 1))
    row, col = int(rng.integers(NUM_ROWS)), int(rng.integers(NUM_COLS))
    if not occupied[first : first + length, row, col].any():
      occupied[first : first + length, row, col] = True
      return first, first + length - 1, row, col
  return None


def _place_all(rng, occupied, count, life_range):
  placed = (_place(rng, occupied, life_range) for _ in range(count))
  placed = np.array([p for p in placed if p is not None], np.int64)
  placed = placed.reshape(-1, 4)
  centre = (placed[:, [3, 2]] + 0.5) * CELL
  jitter = rng.uniform(-2.5, 2.5, centre.shape)
  drift = rng.uniform(-2.5, 2.5, centre.shape)
  path = np.stack([centre + jitter - drift, centre + jitter + drift], axis=1)
  # Sprites at the rim stay inside the picture.
  half = SPRITE // 2 + 1
  path = np.clip(path, half, IMAGE_SIZE - half)
  return placed[:, :2].astype(np.int8), path.astype(np.float32)


def sample_scene(rng: np.random.Generator, config: WorldConfig) -> Scene:
  """Draws one clip's plan."""
  occupied = np.zeros(GRID, bool)
  count = _between(rng, config.num_objects)
  life, path = _place_all(rng, occupied, count, config.life)
  drawn = [rng.integers(len(names), size=len(life)) for names in ATTRIBUTES]
  attributes = np.stack(drawn, axis=1).astype(np.int8)
  repeats = int(rng.integers(1, config.repeats + 1))
  attributes[:repeats, 0] = attributes[0, 0]
  attributes[:repeats, 2] = attributes[0, 2]
  count = _between(rng, config.num_distractors)
  distractor_life, distractor_path = _place_all(rng, occupied, count, (2, 5))
  background = np.zeros((4, 7), np.float32)
  background[0, :3] = rng.uniform(40, 80) + rng.uniform(-12, 12, 3)
  background[1:, :3] = rng.uniform(-1, 1, (3, 3)) * config.texture
  background[1:, 3:5] = rng.uniform(-0.5, 0.5, (3, 2))
  background[1:, 5] = rng.uniform(0, 2 * np.pi, 3)
  background[1:, 6] = rng.uniform(-0.6, 0.6, 3)
  return Scene(
    attributes=attributes,
    life=life,
    path=path,
    tint=rng.uniform(-10, 10, (len(life), 3)).astype(np.float32),
    distractor_life=distractor_life,
    distractor_path=distractor_path,
    background=background,
    noise_seed=int(rng.integers(2**31)),
  )


def centres(life: np.ndarray, path: np.ndarray, time: float) -> np.ndarray:
  """Returns int[M, 2] centres (x, y) in pixels at `time`, in sampled frames."""
  start = life[:, 0] - 0.5
  share = (time - start) / (life[:, 1] - life[:, 0] + 1.0)
  share = np.clip(share, 0.0, 1.0)[:, None]
  return np.rint(path[:, 0] * (1 - share) + path[:, 1] * share).astype(int)


def visible(life: np.ndarray, time: float) -> np.ndarray:
  """Returns bool[M], True for what is seen at `time`, in sampled frames."""
  return (life[:, 0] - 0.5 <= time) & (time < life[:, 1] + 0.5)


def covered_tokens(scene: Scene, objects, min_share: float = 0.25) -> list[int]:
  """Returns the flat tokens that hold at least `min_share` of an object."""
  covered = scene.coverage[list(objects)].max(axis=0) >= min_share
  return np.flatnonzero(covered).tolist()


def token_owners(scene: Scene) -> np.ndarray:
  """Returns int16[T, H, W], the object on each token, or -1."""
  numbers = np.arange(len(scene.attributes), dtype=np.int16)
  owners = np.where(scene.coverage >= 0.5, numbers[:, None], np.int16(-1))
  return owners.max(axis=0, initial=-1).reshape(GRID)
