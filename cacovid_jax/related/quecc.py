"""A compressor that convolves and attends by the question (QueCC).

A frame's grid is cut into cells; each becomes one token. The question is added
to the tokens, a convolution of the cell's size makes the query, and it attends
to the tokens of its own cell.
Paper: https://arxiv.org/abs/2411.03312, section 4. Ours pads a grid that the
cells do not divide, without attending to what is padded, and takes the mean of
the question's embeddings where the paper runs the language model over it.

Axes: T frames, H W token grid of one, S cells along a side, k tokens along a
cell, D width of tokens, B batch.
"""

import dataclasses
import functools
import math

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.models import safetensors_io
from cacovid_jax.related import fitting
from cacovid_jax.related import study as study_lib

_EXACT = jax.lax.Precision.HIGHEST


def cells(x, side: int):
  """Returns (float[T, S * S, k * k, D], bool[S * S, k * k]) of [T, H, W, D].

  True where a place is in the grid; places that are not hold zeros.

  Raises:
    UserError: so many cells would leave one without a token.
  """
  T, H, W, D = x.shape
  k = -(-max(H, W) // side)
  if min(-(-H // k), -(-W // k)) < side:
    raise errors.UserError(
      f"quecc: {side} x {side} cells do not fit a grid of {H} x {W} tokens; use"
      " another number of tokens"
    )
  pad = ((0, side * k - H), (0, side * k - W))
  there = np.pad(np.ones((H, W), bool), pad)

  def cut(x):
    x = x.reshape(*x.shape[:1], side, k, side, k, x.shape[-1])
    return jnp.moveaxis(x, 2, 3).reshape(len(x), side**2, k * k, -1)

  x = cut(jnp.pad(x, ((0, 0), *pad, (0, 0))))
  return x, cut(there[None, ..., None])[0, ..., 0]


def places(grid, side: int):
  """Returns (int32[T * S * S], int32[T * H * W]) of cells in a grid (T, H, W).

  The flat place of each cell's middle token, and each token's cell.
  """
  T, H, W = grid
  number = np.arange(T * H * W).reshape(T, H, W, 1)
  with jax.ensure_compile_time_eval():
    parts, there = map(np.asarray, cells(jnp.asarray(number), side))
  parts = parts[..., 0]
  middle = np.array([np.flatnonzero(one)[one.sum() // 2] for one in there])
  index = np.take_along_axis(parts, middle[None, :, None], axis=2).reshape(-1)
  assign = np.zeros(T * H * W, np.int32)
  row = np.arange(T * side**2).reshape(T, side**2, 1)
  assign[parts[:, there]] = np.broadcast_to(row, parts.shape)[:, there]
  return np.int32(index), assign


class _Features(nn.Module):
  """Two layers and a norm: what queries, keys and values are made by."""

  width: int

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Dense(self.width, name="hidden")(x))
    return nn.LayerNorm(name="norm")(nn.Dense(self.width, name="out")(x))


class QueCC(nn.Module):
  """One token a cell; `blind` leaves the question out."""

  side: int
  width: int = 128
  heads: int = 8
  blind: bool = False

  @nn.compact
  def __call__(self, x, question):
    """Returns float32[T, S * S, D] of frames [T, H, W, D], question [q]."""
    D = x.shape[-1]
    asked = x
    if not self.blind:
      told = nn.Dense(D, use_bias=False, name="question")(question)
      asked = x + nn.LayerNorm(name="question_norm")(told)
    query, there = cells(_Features(self.width, name="query")(asked), self.side)
    kernel = self.param(
      "kernel", nn.initializers.normal(there.shape[1] ** -0.5),
      (there.shape[1], self.width),
    )  # fmt: skip
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    query = jnp.where(there[..., None], query, 0.0)
    query = jnp.einsum("tckd,kd->tcd", query, kernel, precision=_EXACT) + bias
    key, value = (
      cells(_Features(self.width, name=name)(x), self.side)[0]
      for name in ("key", "value")
    )
    attend = nn.MultiHeadDotProductAttention(self.heads, name="attention")
    mask = there[None, :, None, None, :]
    out = attend(query[:, :, None], key, value, mask=mask)[:, :, 0]
    return nn.Dense(D, name="projector_out")(nn.gelu(out))


def mean_of_cells(x, side: int):
  """Returns float32[T, S * S, D], the means of cells of [T, H, W, D]."""
  parts, there = cells(x, side)
  return parts.sum(axis=2) / there.sum(axis=1)[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells(base.Compressor, name="quecc"):
  """QueCC as a method: `cacovid_jax.related.quecc:Cells?weights=FILE`."""

  trained = True
  requires: frozenset[str] = frozenset(["text"])
  width: int = 128
  heads: int = 8
  blind: bool = False

  def read(self, path):
    """Returns the module's parameters, as `save` wrote them."""
    return traverse_util.unflatten_dict(super().read(path), sep=".")

  def choose(self, inputs, num_keep, ratio, params):
    """Returns a token a cell, at the place of the cell's middle."""
    T, H, W = inputs.grid
    side = math.isqrt(num_keep // T)
    if side < 1 or T * side**2 != num_keep:
      raise errors.UserError(
        f"quecc: {num_keep} tokens of {T} frames are no square number a frame,"
        f" at least 1; use a ratio like {1 / (H * W):.4f}"
      )
    x = inputs.features.astype(jnp.float32).reshape(T, H, W, -1)
    text = inputs.text.astype(jnp.float32)
    count = jnp.maximum(jnp.any(text != 0, axis=-1).sum(), 1)
    module = QueCC(side, self.width, self.heads, self.blind)
    try:
      rows = module.apply({"params": params}, x, text.sum(axis=0) / count)
    except flax.errors.FlaxError as error:
      raise errors.UserError(
        f"quecc: the weights do not fit width={self.width}, heads={self.heads},"
        f" blind={self.blind} and {side} x {side} tokens of {H} x {W} ones;"
        " give what they were trained with"
      ) from error
    index, assign = places(inputs.grid, side)
    rows = rows.reshape(num_keep, -1).astype(inputs.features.dtype)
    return base.arrange(rows, jnp.asarray(index), jnp.asarray(assign))


def save(path, params) -> None:
  """Writes a module's parameters for `Cells`, as safetensors."""
  flat = traverse_util.flatten_dict(params, sep=".")
  safetensors_io.write_safetensors(
    path, {k: np.asarray(v) for k, v in flat.items()}
  )


# A toy: which colour is in the cell that is asked for?
GRID, COLOURS = 6, 8


class Reader(nn.Module):
  """Compresses a grid and answers; `how` is quecc, blind or average."""

  how: str
  side: int
  width: int = 32

  @nn.compact
  def __call__(self, x, asked):
    """Returns float32[B, 8] logits of grids float[B, 6, 6, D], int[B]."""
    question = nn.Embed(GRID**2, self.width, name="asked")(asked)
    if self.how == "average":
      x = nn.Dense(self.width, name="in")(x)
      tokens = mean_of_cells(x, self.side)
    else:
      make = nn.vmap(
        QueCC, variable_axes={"params": None}, split_rngs={"params": False}
      )
      blind = self.how == "blind"
      make = make(self.side, self.width, 4, blind, name="quecc")
      tokens = make(x[:, None], question)[:, 0]
    tokens = tokens.reshape(len(x), -1)
    h = jnp.concatenate([tokens, question], axis=-1)
    for i in range(2):
      h = nn.gelu(nn.Dense(4 * self.width, name=f"hidden_{i}")(h))
    return nn.Dense(COLOURS, name="colour")(h)


def grids(rng, batch: int, width: int):
  """Returns (float32[B, 6, 6, D], asked int[B], its colour int[B])."""
  keys = jax.random.split(rng, 2)
  colour = jax.random.randint(keys[0], [batch, GRID**2], 0, COLOURS)
  asked = jax.random.randint(keys[1], [batch], 0, GRID**2)
  # The same world for all seeds: a code of each colour and of each place.
  codes, places = (
    jax.random.normal(jax.random.key(i), (n, width))
    for i, n in enumerate((COLOURS, GRID**2))
  )
  x = (codes[colour] + places).reshape(batch, GRID, GRID, width)
  return x, asked, colour[jnp.arange(batch), asked]


def _loss(reader, batch, params, data, rng, step):
  x, asked, colour = grids(rng, batch, reader.width)
  logits = reader.apply({"params": params}, x, asked)
  told = jax.nn.log_softmax(logits)[jnp.arange(batch), colour]
  return -told.mean()


def _toy_arms(settings, side, width, folder, seed):
  """Returns the accuracy of each compressor at S * S tokens of a width."""
  out = {}
  x, asked, colour = grids(jax.random.key(10**6 + seed), settings.test, width)
  for how in ("quecc", "blind", "average"):
    reader = Reader(how, side, width)
    start = reader.init(jax.random.key(seed), x[:1], asked[:1])["params"]
    at = folder and folder / f"{how}_{side}_{width}_{seed}"
    params = fitting.fit(
      (_loss, reader, settings.batch), start, (), jax.random.key(seed),
      settings.fit, folder=at,
    )  # fmt: skip
    logits = reader.apply({"params": params}, x, asked)
    right = jnp.argmax(logits, axis=-1) == colour
    out[how] = {"tokens": float(side**2), "accuracy": float(right.mean())}
  return out


def study(settings, clips, folder=None) -> study_lib.Study:
  """Returns the comparison with the blind variant and with average pooling."""
  del clips
  cases = {
    _case(*size): functools.partial(_toy_arms, settings, *size, folder)
    for size in settings.sizes
  }

  def bars(outcome):
    case = next(iter(cases))
    known = functools.partial(outcome.values, case, measure="accuracy")
    out = [study_lib.Bar.least(f"{case}: QueCC", min(known("quecc")), 0.9)]
    return out + [
      study_lib.Bar.most(f"{case}: {arm}", max(known(arm)), 0.6)
      for arm in ("blind", "average")
    ]

  shown = list(cases), "accuracy", "accuracy (chance 0.125)"
  return study_lib.Study("QueCC", cases, bars, shown)


def _case(side, width) -> str:
  return f"{side**2} tokens of width {width}"
