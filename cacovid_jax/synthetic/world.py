"""Scenes of the embedded benchmark: which object is where, and when.

A scene is a plan over the T sampled frames of a stage of cells; a cell is one
video token. Objects live for a few frames in one cell and drift a little. At
most one is in a cell at a time, so that tokens can point at it.

Variants, because one alone misleads: on `sparse` a handful of striking
objects can be found by diversity alone; on `dense` there are more equally
askable objects than a 10 % budget has tokens, so that a selection must look at
the question. Both are of 16 x 7 x 7 tokens; `plain` and `full` are their
likes at the paper's 32 x 14 x 14, where some objects also carry a symbol, move
across the picture, or turn into another one in their place. `full8` and
`plain8` are the same in eight frames, for a base model to begin with.
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
# Of the stages that have them: no option letters, and no two alike.
SYMBOLS = tuple("HKLOTUXZ")
ATTRIBUTES = (COLOR_NAMES, PATTERNS, SHAPES)  # In the order of `Scene`.
NAME = (0, 1, 2)  # Which of them make an object's full name.

CELL = 16  # Pixels per side of a cell, which is one video token.
SPRITE = 15  # Pixels per side of a drawn object.


@dataclasses.dataclass(frozen=True)
class Stage:
  """What the scenes of some variants have in common: sizes and attributes."""

  num_frames: int  # Sampled ones, T.
  side: int  # Cells per side of the picture: H = W.
  symbols: tuple[str, ...] = ()  # That objects may carry.

  @property
  def image_size(self) -> int:
    """Pixels per side of the picture."""
    return self.side * CELL

  @property
  def grid(self) -> tuple[int, int, int]:
    return self.num_frames, self.side, self.side

  @property
  def num_tokens(self) -> int:
    return self.num_frames * self.max_slots

  @property
  def max_slots(self) -> int:
    """Objects and distractors in one frame, at most: one in each cell."""
    return self.side * self.side

  @property
  def attributes(self) -> tuple[tuple[str, ...], ...]:
    """Words of the columns of `Scene.attributes`."""
    return (*ATTRIBUTES, self.symbols) if self.symbols else ATTRIBUTES


SMALL = Stage(16, 7)
FULL = Stage(32, 14, SYMBOLS)
FULL8 = Stage(8, 14, SYMBOLS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
  """How crowded and how textured the scenes of a variant are."""

  stage: Stage = SMALL
  num_objects: tuple[int, int]  # Askable ones per clip, inclusive range.
  life: tuple[int, int]  # Sampled frames that show an object, as well.
  num_distractors: tuple[int, int]  # Grey patches per clip, as well.
  distractor_life: tuple[int, int] = (2, 5)  # As `life`.
  texture: float  # Amplitude of the moving background, in grey levels.
  repeats: int = 1  # Of a color and shape at most; 1 leaves it to chance.
  # Sizes of groups of objects that have all of a name in common, and share of
  # objects with a symbol: of stages that have some.
  groups: tuple[int, ...] = ()
  symbol_share: float = 0.0
  # Further objects that cross the picture until the last frame, and ones that
  # change an attribute, inclusive ranges, and frames that show either.
  num_movers: tuple[int, int] = (0, 0)
  num_changers: tuple[int, int] = (0, 0)
  long_life: tuple[int, int] = (8, 16)
  # How often each of `questions.KINDS` is asked; what is left out never is.
  kind_shares: tuple[float, ...] = (0.3, 0.15, 0.2, 0.2, 0.15)
  # Ranges of seconds of short, medium and long clips; None is that of `build`.
  seconds: tuple[tuple[int, int], ...] | None = None


_AT_FULL_SIZE = dict(
  stage=FULL,
  life=(4, 12),
  distractor_life=(4, 12),
  groups=(2, 3, 4),
  symbol_share=0.4,
  # The five kinds that are asked of these alone.
  kind_shares=(0, 0, 0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0.2),
  seconds=((10, 31), (32, 62), (63, 120)),
)

VARIANTS = {
  "dense": WorldConfig(
    num_objects=(128, 136), life=(2, 3), num_distractors=(6, 10), texture=22.0
  ),
  "sparse": WorldConfig(
    num_objects=(5, 7), life=(3, 5), num_distractors=(1, 3), texture=5.0,
    repeats=3,
  ),
  "full": WorldConfig(
    **_AT_FULL_SIZE, num_objects=(370, 390), num_distractors=(20, 30),
    texture=22.0, num_movers=(8, 12), num_changers=(8, 12),
  ),
  "plain": WorldConfig(
    **_AT_FULL_SIZE, num_objects=(12, 15), num_distractors=(2, 5),
    texture=5.0, num_movers=(2, 3), num_changers=(1, 2),
  ),
}  # fmt: skip
_FEW = dict(stage=FULL8, life=(2, 4), distractor_life=(2, 4), long_life=(6, 8))
VARIANTS["plain8"] = dataclasses.replace(VARIANTS["plain"], **_FEW)
VARIANTS["full8"] = dataclasses.replace(
  VARIANTS["full"], **_FEW, num_objects=(190, 200), num_distractors=(10, 15)
)


@dataclasses.dataclass(frozen=True)
class Scene:
  """One clip's plan; M objects and D distractors, all arrays NumPy.

  An object that changes is two, one after the other in the same place.
  """

  # int8[M, 3] color, pattern and shape; of stages with symbols int8[M, 4], -1
  # for none.
  attributes: np.ndarray
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
  stage: Stage = SMALL
  changes: tuple[tuple[int, int], ...] = ()  # Objects before and after.

  @functools.cached_property
  def coverage(self) -> np.ndarray:
    """float64[M, N], the share of each object on each token."""
    shares = np.zeros((len(self.life), *self.stage.grid))
    for frame in range(self.stage.num_frames):
      seen = np.flatnonzero(visible(self.life, frame))
      places = centres(self.life[seen], self.path[seen], float(frame))
      shares[seen, frame] = _shares(places, self.stage)
    return shares.reshape(len(shares), self.stage.num_tokens)

  def moves(self, obj: int) -> bool:
    """Whether an object leaves its cell, rather than drifts in it."""
    return bool(np.abs(np.diff(self.path[obj], axis=0)).max() >= CELL)


def _shares(places: np.ndarray, stage: Stage) -> np.ndarray:
  """Returns float64[M, H, W], of objects at int[M, 2] in each cell."""
  edges = np.arange(stage.side) * CELL
  low = places.T[..., None] - SPRITE // 2  # [(x, y), M, 1]
  span = np.minimum(edges + CELL, low + SPRITE) - np.maximum(edges, low)
  columns, rows = np.maximum(span, 0) / SPRITE
  return rows[:, :, None] * columns[:, None]


def _between(rng, inclusive: tuple[int, int]) -> int:
  return int(rng.integers(inclusive[0], inclusive[1] + 1))


def _place(rng, occupied, life_range):
  """Finds a free cell and life, marks them; None when 32 tries all fail."""
  num_frames, num_rows, num_cols = occupied.shape
  for _ in range(32):
    length = _between(rng, life_range)
    first = int(rng.integers(0, num_frames - length + 1))
    row, col = int(rng.integers(num_rows)), int(rng.integers(num_cols))
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
  path = np.clip(path, half, occupied.shape[1] * CELL - half)
  return placed[:, :2].astype(np.int8), path.astype(np.float32)


def _place_mover(rng, occupied, config):
  """Marks a way to the last frame; returns (life, path), empty if none is."""
  stage = config.stage
  for _ in range(32):
    first = stage.num_frames - _between(rng, config.long_life)
    life = np.array([[first, stage.num_frames - 1]], np.int8)
    cells = rng.integers(stage.side, size=(1, 2, 2))
    path = ((cells + 0.5) * CELL).astype(np.float32)
    if np.abs(np.diff(cells, axis=1)).max() < stage.side // 4:
      continue
    times = np.arange(first, stage.num_frames)
    trail = np.zeros(stage.grid, bool)
    trail[first:] = _shares(centres(life, path, times), stage) > 0
    if not (trail & occupied).any():
      occupied |= trail
      return life, path
  return np.zeros((0, 2), np.int8), np.zeros((0, 2, 2), np.float32)


def _place_changers(rng, occupied, config):
  """Returns (life, path) of objects before a change, then of those after."""
  count = _between(rng, config.num_changers)
  life, path = _place_all(rng, occupied, count, config.long_life)
  length = life[:, 1] - life[:, 0] + 1
  # Either is seen in at least three frames.
  seen = rng.integers(3, length - 2)
  share = (seen / length).astype(np.float32)[:, None]
  middle = path[:, 0] * (1 - share) + path[:, 1] * share
  first, cut, last = life[:, 0], life[:, 0] + seen, life[:, 1]
  ends = first, cut - 1, cut, last
  life = np.stack(ends, axis=1).reshape(-1, 2, 2).swapaxes(0, 1)
  ends = path[:, 0], middle, middle, path[:, 1]
  path = np.stack(ends, axis=1).reshape(-1, 2, 2, 2).swapaxes(0, 1)
  life, path = life.reshape(-1, 2), path.reshape(-1, 2, 2)
  return life.astype(np.int8), path.astype(np.float32)


def _place_special(rng, occupied, config):
  """Returns (life, path) of movers, then of changers, and the changes."""
  count = _between(rng, config.num_movers)
  placed = [_place_mover(rng, occupied, config) for _ in range(count)]
  placed.append(_place_changers(rng, occupied, config))
  life, path = map(np.concatenate, zip(*placed, strict=True))
  count = len(placed[-1][0]) // 2
  changes = [(at, at + count) for at in range(len(life))[-2 * count :][:count]]
  return life, path, tuple(changes)


def neighbours(name) -> list[tuple[int, ...]]:
  """Returns the names (of `NAME`) that differ from one in one attribute."""
  return [
    (*name[:part], value, *name[part + 1 :])
    for part in NAME
    for value in range(len(ATTRIBUTES[part]))
    if value != name[part]
  ]


def _attributes(rng, config, count):
  """Returns int8[M, 3], with a few alike if the variant has repeats."""
  drawn = [rng.integers(len(names), size=count) for names in ATTRIBUTES]
  attributes = np.stack(drawn, axis=1).astype(np.int8)
  repeats = int(rng.integers(1, config.repeats + 1))
  attributes[:repeats, 0] = attributes[0, 0]
  attributes[:repeats, 2] = attributes[0, 2]
  return attributes


def _attributes_with_symbols(rng, config, count, num_special, changes):
  """Returns int8[M, 4]; special objects come first and have own names.

  But that what an object changes into is drawn evenly from the `neighbours` of
  its name, which others may have too.
  """
  sizes = tuple(map(len, ATTRIBUTES))
  order = rng.permutation(np.prod(sizes))
  others = rng.choice(order[num_special:], count - num_special)
  start = 0
  for size in config.groups:
    others[start : start + size] = others[start : start + 1]
    start += size
  codes = np.concatenate([order[:num_special], others])
  names = np.stack(np.unravel_index(codes, sizes), axis=1)
  symbols = rng.integers(len(config.stage.symbols), size=count)
  symbols[rng.random(count) >= config.symbol_share] = -1
  for before, after in changes:
    symbols[after] = symbols[before]
    names[after] = rng.choice(neighbours(tuple(names[before])))
  return np.column_stack([names, symbols]).astype(np.int8)


def _place_objects(rng, occupied, config):
  """Returns (attributes, life, path, changes) of all but the distractors."""
  special = config.num_movers[1] or config.num_changers[1]
  found = _place_special(rng, occupied, config) if special else None
  count = _between(rng, config.num_objects)
  life, path = _place_all(rng, occupied, count, config.life)
  if found is None:
    return _attributes(rng, config, len(life)), life, path, ()
  life = np.concatenate([found[0], life])
  path = np.concatenate([found[1], path])
  attributes = _attributes_with_symbols(
    rng, config, len(life), len(found[0]), found[2]
  )
  return attributes, life, path, found[2]


def sample_scene(rng: np.random.Generator, config: WorldConfig) -> Scene:
  """Draws one clip's plan."""
  occupied = np.zeros(config.stage.grid, bool)
  attributes, life, path, changes = _place_objects(rng, occupied, config)
  count = _between(rng, config.num_distractors)
  distractor_life, distractor_path = _place_all(
    rng, occupied, count, config.distractor_life
  )
  background = np.zeros((4, 7), np.float32)
  background[0, :3] = rng.uniform(40, 80) + rng.uniform(-12, 12, 3)
  background[1:, :3] = rng.uniform(-1, 1, (3, 3)) * config.texture
  background[1:, 3:5] = rng.uniform(-0.5, 0.5, (3, 2))
  background[1:, 5] = rng.uniform(0, 2 * np.pi, 3)
  background[1:, 6] = rng.uniform(-0.6, 0.6, 3)
  tint = rng.uniform(-10, 10, (len(life), 3))
  for before, after in changes:
    tint[after] = tint[before]
  return Scene(
    attributes=attributes,
    life=life,
    path=path,
    tint=tint.astype(np.float32),
    distractor_life=distractor_life,
    distractor_path=distractor_path,
    background=background,
    noise_seed=int(rng.integers(2**31)),
    stage=config.stage,
    changes=changes,
  )


def centres(life: np.ndarray, path: np.ndarray, time) -> np.ndarray:
  """Returns int[M, 2] centres (x, y) in pixels at `time`, in sampled frames.

  A time for all, or float[M] one for each; a single object may have several.
  """
  start = life[:, 0] - 0.5
  share = (time - start) / (life[:, 1] - life[:, 0] + 1.0)
  share = np.clip(share, 0.0, 1.0)[:, None]
  return np.rint(path[:, 0] * (1 - share) + path[:, 1] * share).astype(int)


def visible(life: np.ndarray, time: float) -> np.ndarray:
  """Returns bool[M], True for what is seen at `time`, in sampled frames."""
  return (life[:, 0] - 0.5 <= time) & (time < life[:, 1] + 0.5)


def covered_tokens(
  scene: Scene, objects, frames=None, min_share: float = 0.25
) -> list[int]:
  """Returns the flat tokens that hold at least `min_share` of an object.

  Of some sampled frames, or without `frames` of all.
  """
  covered = scene.coverage[list(objects)].max(axis=0) >= min_share
  if frames is not None:
    shown = np.isin(np.arange(scene.stage.num_frames), frames)
    covered &= np.repeat(shown, scene.stage.max_slots)
  return np.flatnonzero(covered).tolist()


def token_owners(scene: Scene) -> np.ndarray:
  """Returns int16[T, H, W], the object on each token, or -1."""
  numbers = np.arange(len(scene.attributes), dtype=np.int16)
  owners = np.where(scene.coverage >= 0.5, numbers[:, None], np.int16(-1))
  return owners.max(axis=0, initial=-1).reshape(scene.stage.grid)
