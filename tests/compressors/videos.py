"""Small videos of several kinds, and one program per method and shape."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from cacovid_jax import compressors
from tests.compressors import given, quick

WIDTH = 10


def features(kind, grid, seed=0):
  """Returns float32[N, D] tokens of a video.

  Args:
    kind: "noise"; "scenes", with two scenes in which some places hardly
      change; "static", the same frame again and again; "equal", the same
      token everywhere; "zeros".
    grid: (T, H, W).
    seed: of the generator.
  """
  rng = np.random.default_rng(seed)
  T, P = grid[0], grid[1] * grid[2]
  if kind == "noise":
    x = rng.normal(size=[T, P, WIDTH])
  elif kind == "scenes":
    scene = np.arange(T) >= (T + 1) // 2
    base_frames = rng.normal(size=[2, P, WIDTH])
    change = rng.choice([0.05, 0.4, 1.5], size=[2, P, 1])
    noise = rng.normal(size=[T, P, WIDTH])
    which = scene.astype(int)
    x = base_frames[which] + change[which] * noise
  elif kind == "static":
    x = np.broadcast_to(rng.normal(size=[1, P, WIDTH]), [T, P, WIDTH])
  elif kind == "equal":
    x = np.ones([T, P, WIDTH])
  else:
    x = np.zeros([T, P, WIDTH])
  return x.reshape(T * P, WIDTH).astype(np.float32)


def aux(grid, seed=0):
  """Returns what a vision tower would hand out, at random."""
  rng = np.random.default_rng(seed + 1000)
  num_video = math.prod(grid)
  return given.Aux(
    vision_attention=rng.random(num_video).astype(np.float32),
    vision_keys=rng.normal(size=[num_video, 4]).astype(np.float32),
  )


class Scores(NamedTuple):
  """Frame and token scores, with the fields of the policy's."""

  frame: jax.Array
  token: jax.Array


def scores(grid, seed=0):
  """Returns what a policy would say of a video, at random."""
  rng = np.random.default_rng(seed + 2000)
  shapes = [grid[0], 2], [math.prod(grid), 2]
  return Scores(*(rng.normal(size=s).astype(np.float32) for s in shapes))


@functools.cache
def _program(name, options, grid, num_keep, ratio, batched):
  options = dict(options)
  method = compressors.get(name, **options)

  def one(features, aux):
    return given.compress(
      method, features, grid=grid, num_keep=num_keep, aux=aux, ratio=ratio
    )

  return quick.jit(jax.vmap(one) if batched else one)


def program(name, grid, num_keep=None, ratio=None, batched=False, **options):
  """Returns the compiled f(features, aux) of a method; options as for `get`.

  Either the number of rows or the ratio may be given; with the ratio the rows
  follow from the method's rounding.
  """
  if num_keep is None:
    num_keep = compressors.get(name, **options).rows(grid, ratio)
  items = tuple(sorted(options.items()))
  return _program(name, items, grid, num_keep, ratio, batched)
