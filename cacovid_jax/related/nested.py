"""Clips of moving squares, and a linear code whose first tokens matter most.

The best linear code with nested tokens is known, principal components by
falling variance, so the error of a block at each number of tokens is exact: an
oracle for what allocators gain. Blocks are the frames that a tokenizer codes
together.

Axes: n clips, G blocks in all, L levels of a block, D pixels of a block.
"""

import dataclasses

import numpy as np
from scipy import fft

from cacovid_jax import errors

FRAMES, SIDE = 8, 16
BLOCK = 2  # Frames of a block.
BLOCKS = FRAMES // BLOCK
STEP = 4  # Components of a level.
LEVELS = 16
PATCH = 4  # Pixels along a patch.
PATCHES = (SIDE // PATCH) ** 2  # Of a block.


def squares(seed: int, num_clips: int):
  """Returns (clips float32[n, 8, 16, 16] in [0, 1], number of squares int[n]).

  One to six squares of 2 to 4 pixels, half of which move by a pixel a frame.
  """
  rng = np.random.default_rng(seed)
  clips = np.zeros((num_clips, FRAMES, SIDE, SIDE), np.float32)
  counts = rng.integers(1, 7, num_clips)
  for clip, count in zip(clips, counts, strict=True):
    for _ in range(count):
      size = rng.integers(2, 5)
      place = rng.integers(0, SIDE - size + 1, 2)
      speed = rng.integers(-1, 2, 2) * rng.integers(0, 2)
      shade = rng.uniform(0.4, 1.0)
      for frame in clip:
        row, column = np.clip(place, 0, SIDE - size)
        frame[row : row + size, column : column + size] = shade
        place = place + speed
  return clips, counts


def blocks(clips) -> np.ndarray:
  """Returns float32[n * 4, D], the blocks of clips one after another."""
  return clips.reshape(len(clips) * BLOCKS, -1)


def patches(clips):
  """Returns float32[n, b, P, 32] of clips float32[n, 8, 16, 16]."""
  side = SIDE // PATCH
  shape = (len(clips), BLOCKS, BLOCK, side, PATCH, side, PATCH)
  x = clips.reshape(shape).transpose(0, 1, 3, 5, 2, 4, 6)
  return x.reshape(len(clips), BLOCKS, PATCHES, -1)


@dataclasses.dataclass(frozen=True)
class LinearCode:
  """Principal axes of blocks, the strongest first."""

  mean: np.ndarray  # float32[D].
  axes: np.ndarray  # float32[L * STEP, D].

  @classmethod
  def fit(cls, x) -> "LinearCode":
    if len(x) <= LEVELS * STEP:
      raise errors.UserError(
        f"{len(x)} blocks cannot show {LEVELS * STEP} directions; give more"
        f" than {LEVELS * STEP // BLOCKS} clips"
      )
    mean = x.mean(axis=0)
    _, _, axes = np.linalg.svd(x - mean, full_matrices=False)
    return cls(mean, axes[: LEVELS * STEP])

  def errors(self, x) -> np.ndarray:
    """Returns float64[G, L + 1], squared errors with 0, 1, ... levels."""
    x = (x - self.mean).astype(np.float64)
    energy = np.square(x @ self.axes.T).reshape(len(x), -1, STEP).sum(axis=2)
    held = np.concatenate(
      [np.zeros((len(x), 1)), energy.cumsum(axis=1)], axis=1
    )
    return np.maximum(np.square(x).sum(axis=1)[:, None] - held, 0.0)


def features(x) -> np.ndarray:
  """Returns float64[G, 17] of blocks float32[G, D], that a scorer may see.

  Energies of the frames' sum and of their difference, each in 8 bands of
  spatial frequency, and 1.
  """
  frames = x.reshape(len(x), BLOCK, SIDE, SIDE).astype(np.float64)
  first, second = frames[:, 0], frames[:, 1]
  energy = np.stack([
    np.square(fft.dctn(part, axes=(1, 2), norm="ortho"))
    for part in (first + second, first - second)
  ])  # fmt: skip
  wave = np.add.outer(np.arange(SIDE), np.arange(SIDE))
  band = np.minimum(wave // 2, 7)
  sums = [energy[..., band == one].sum(axis=-1) for one in range(8)]
  return np.column_stack([*np.concatenate(sums), np.ones(len(x))])


def ridge(x, y, penalty: float = 1e-3) -> np.ndarray:
  """Returns the weights of a ridge regression of y float[G, L] on x."""
  scale = np.abs(x).max(axis=0) + 1e-12
  x = x / scale
  gram = x.T @ x + penalty * np.eye(x.shape[1])
  return np.linalg.solve(gram, x.T @ y) / scale[:, None]


def error_of(curves, counts) -> float:
  """Returns the mean error of blocks, of curves float[G, L + 1], int[G]."""
  return float(curves[np.arange(len(counts)), counts].mean())


def decibels(error: float, than: float) -> float:
  """Returns how many dB less an error is than another."""
  return float(10 * np.log10(than / error))


def known_code(seed: int, num_known: int, num_asked: int):
  """Returns (code, blocks that it is of, blocks asked about, their squares)."""
  known, _ = squares(seed + 100, num_known)
  asked, counts = squares(seed, num_asked)
  known = blocks(known)
  return LinearCode.fit(known), known, blocks(asked), np.repeat(counts, BLOCKS)


def arms(curves, chosen, gain: str):
  """Returns what counts {arm: int[G]} reach, `gain` that over the first's."""
  chosen = {arm: np.asarray(counts) for arm, counts in chosen.items()}
  plain, out = error_of(curves, next(iter(chosen.values()))), {}
  for arm, counts in chosen.items():
    error = error_of(curves, counts)
    out[arm] = {
      "tokens": float(counts.mean() * STEP),
      "squared error": error,
      gain: decibels(error, plain),
    }
  return out
