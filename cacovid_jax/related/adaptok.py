"""A causal tokenizer whose blocks may end early, and who ends where (AdapTok).

Blocks of frames become latents in order; training cuts the tail of each block
at random, so that any first ones suffice. A scorer predicts each block's error
at each length, and an exact allocator shares a total out.
Paper: https://arxiv.org/abs/2505.17011. Ours is small (L1, codebook, tails; no
adversary, perceptual loss or prior) and shares out between all blocks at once;
the released code goes block by block with fixed targets for each.

Axes: n clips, b blocks, P patches of a block, L latents of a block, D width.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import allocators
from cacovid_jax.compressors.math import similarity
from cacovid_jax.related import fitting, nested, quantisers
from cacovid_jax.related import study as study_lib

# Published latents of the four blocks at a mean of 64, of 256 each.
_RELEASED_SHARES = np.array([142, 40, 36, 36]) / 254
_TEMPERATURE = 0.03  # Of the draw of a code while training; published.
_COMMIT = 0.25


class Layer(nn.Module):
  """Attention of a mask and a hidden layer, norms in front."""

  heads: int = 4

  @nn.compact
  def __call__(self, x, mask):
    """Returns float32[n, S, D], of bool[n or 1, 1, S, S], True where seen."""
    y = nn.LayerNorm(name="norm_1")(x)
    x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(
      y, mask=mask
    )
    y = nn.LayerNorm(name="norm_2")(x)
    y = nn.gelu(nn.Dense(4 * x.shape[-1], name="hidden")(y))
    return x + nn.Dense(x.shape[-1], name="out")(y)


class BlockTokenizer(nn.Module):
  """Latents of blocks that see themselves and what came before."""

  latents: int = 8  # L.
  width: int = 64
  layers: int = 2
  code_width: int = 8
  num_codes: int = 256

  def setup(self):
    draw = nn.initializers.normal(0.02)
    b, P, L = nested.BLOCKS, nested.PATCHES, self.latents
    self.patch_in = nn.Dense(self.width)
    self.patch_place = self.param("patch_place", draw, (b, P, self.width))
    self.query = self.param("query", draw, (b, L, self.width))
    self.encoder = [Layer() for _ in range(self.layers)]
    self.to_code = nn.Dense(self.code_width)
    shape = (self.num_codes, self.code_width)
    self.codebook = self.param("codebook", nn.initializers.normal(), shape)
    self.from_code = nn.Dense(self.width)
    self.latent_place = self.param("latent_place", draw, (b, L, self.width))
    self.target = self.param("target", draw, (b, P, self.width))
    self.decoder = [Layer() for _ in range(self.layers)]
    self.patch_out = nn.Dense(nested.BLOCK * nested.PATCH**2)

  def encode(self, x):
    """Returns (latents float32[n, b, L, D], codes' vectors) of patches.

    The vectors float32[n, b, L, code_width] have norm 1.
    """
    x, n = self.patch_in(x) + self.patch_place, len(x)
    query = jnp.broadcast_to(self.query, (n, *self.query.shape))
    rows = jnp.concatenate([x, query], axis=2)
    block = np.repeat(np.arange(nested.BLOCKS), rows.shape[2])
    mask = (block[:, None] >= block[None, :])[None, None]
    rows = rows.reshape(n, -1, self.width)
    for layer in self.encoder:
      rows = layer(rows, mask)
    latent = rows.reshape(n, nested.BLOCKS, -1, self.width)[
      :, :, nested.PATCHES :
    ]
    return latent, similarity.unit(self.to_code(latent))

  def quantise(self, z, rng=None):
    """Returns (straight-through codewords, loss per latent, int32 codes).

    The nearest codeword, or with a key one drawn by its cosine.
    """
    book = similarity.unit(self.codebook)
    alike = z @ book.T
    if rng is None:
      code = jnp.argmax(alike, axis=-1)
    else:
      code = jax.random.categorical(rng, alike / _TEMPERATURE)
    q = book[code]
    fixed = jax.lax.stop_gradient
    commit = jnp.square(fixed(q) - z).mean(axis=-1)
    move = jnp.square(q - fixed(z)).mean(axis=-1)
    return quantisers.straight_through(z, q), _COMMIT * commit + move, code

  def decode(self, q, counts):
    """Returns patches of the first int[n, b] latents of each block."""
    n, L = len(q), self.latents
    kept = jnp.arange(L) < counts[..., None]
    # Zero before the place is added, and nobody's to see.
    latent = self.from_code(jnp.where(kept[..., None], q, 0.0))
    latent = latent * kept[..., None] + self.latent_place
    target = jnp.broadcast_to(self.target, (n, *self.target.shape))
    rows = jnp.concatenate([latent, target], axis=2)
    is_latent = np.arange(rows.shape[2]) < L
    kind = np.tile(is_latent, nested.BLOCKS)
    block = np.repeat(np.arange(nested.BLOCKS), rows.shape[2])
    earlier = block[:, None] >= block[None, :]
    own = block[:, None] == block[None, :]
    # A patch sees its own block's, and latents up to it; a latent latents.
    sees = np.where(kind[None, :], earlier, own & ~kind[:, None])
    there = jnp.concatenate(
      [kept, jnp.ones((n, nested.BLOCKS, nested.PATCHES), bool)], axis=2
    ).reshape(n, 1, 1, -1)
    mask = (sees[None, None] & there) | np.eye(len(block), dtype=bool)
    rows = rows.reshape(n, -1, self.width)
    for layer in self.decoder:
      rows = layer(rows, mask)
    rows = rows.reshape(n, nested.BLOCKS, -1, self.width)[:, :, L:]
    return self.patch_out(rows)

  def __call__(self, x, counts, rng=None):
    """Returns (decoded patches, loss of the codes) of patches."""
    _, z = self.encode(x)
    q, cost, _ = self.quantise(z, rng)
    kept = jnp.arange(self.latents) < counts[..., None]
    cost = jnp.sum(cost * kept) / jnp.maximum(kept.sum(), 1)
    return self.decode(q, counts), cost


class Scorer(nn.Module):
  """The error of a block at each length, from what the encoder has by then."""

  hidden: int = 128

  @nn.compact
  def __call__(self, latent):
    """Returns float32[n, b, L] of float32[n, b, L, D]; logarithms of errors."""
    # Only latents up to a length are read for it, and nothing of later blocks.
    share = 1.0 / jnp.arange(1, latent.shape[2] + 1)[:, None]
    x = jnp.concatenate([latent, jnp.cumsum(latent, axis=2) * share], axis=-1)
    place = jnp.broadcast_to(
      jnp.eye(latent.shape[2]), (*x.shape[:3], x.shape[2])
    )
    x = nn.Dense(self.hidden, name="hidden")(jnp.concatenate([x, place], -1))
    return nn.Dense(1, name="out")(nn.gelu(x))[..., 0]


def tails(rng, shape, latents: int):
  """Returns int32[shape] lengths from a normal of half and a quarter of L."""
  low, high = ((x - latents / 2) / (latents / 4) for x in (0.5, latents + 0.5))
  drawn = jax.random.truncated_normal(rng, low, high, shape)
  found = jnp.round(latents / 2 + drawn * latents / 4)
  return jnp.clip(found, 1, latents).astype(jnp.int32)


def _loss(net, batch, params, data, rng, step):
  keys = jax.random.split(rng, 3)
  x = data[jax.random.randint(keys[0], [batch], 0, len(data))]
  counts = tails(keys[1], x.shape[:2], net.latents)
  decoded, cost = net.apply({"params": params}, x, counts, keys[2])
  return jnp.abs(x - decoded).mean() + 0.1 * cost


def _scorer_loss(scorer, batch, params, data, rng, step):
  rows = jax.random.randint(rng, [batch], 0, len(data[0]))
  latent, curves = jax.tree.map(lambda x: x[rows], data)
  return jnp.square(scorer.apply({"params": params}, latent) - curves).mean()


@functools.partial(jax.jit, static_argnums=0)
def _encode(net, params, x):
  latent, z = net.apply({"params": params}, x, method="encode")
  q, _, _ = net.apply({"params": params}, z, method="quantise")
  return latent, q


@functools.partial(jax.jit, static_argnums=0)
def block_errors(net, params, x, q, counts):
  """Returns float32[n, b], the squared error of each block at given lengths."""
  decoded = net.apply({"params": params}, q, counts, method="decode")
  return jnp.square(x - decoded).mean(axis=(2, 3))


def curves(net, params, x, q) -> np.ndarray:
  """Returns float32[n, b, L], errors at 1 to L latents, other blocks whole."""
  out = np.zeros((*x.shape[:2], net.latents), np.float32)
  for block in range(nested.BLOCKS):
    for count in range(1, net.latents + 1):
      counts = np.full(x.shape[:2], net.latents, np.int32)
      counts[:, block] = count
      found = block_errors(net, params, x, q, counts)
      out[:, block, count - 1] = found[:, block]
  return out


def allocate(curves, total: int) -> np.ndarray:
  """Returns int[n, b] lengths of least total error, of curves [n, b, L].

  Between all blocks of all clips: the result depends on the batch.

  Raises:
    UserError: fewer latents than blocks, or more than there are.
  """
  n, b, L = curves.shape
  if total < n * b:
    raise errors.UserError(
      f"a budget of {total} tokens is below one for each of {n * b} blocks;"
      " give more"
    )
  flat = jnp.asarray(curves.reshape(n * b, L))
  return np.asarray(allocators.adaptok(flat, total, 1, L)).reshape(n, b)


def allocate_released(curves, total: int) -> np.ndarray:
  """Returns int[n, b], shared out between clips, each block with its target.

  Targets are the published shares of blocks, moved into what L allows.
  """
  n, b, L = curves.shape
  targets = np.clip(total * _RELEASED_SHARES, n, n * L)
  # What a bound takes goes to the blocks that have room.
  for _ in range(8):
    room = (targets < n * L) & (targets > n)
    missing = total - targets.sum()
    targets = targets + np.where(room, missing / max(room.sum(), 1), 0)
    targets = np.clip(targets, n, n * L)
  totals = np.floor(targets).astype(int)
  chosen = [
    allocators.adaptok(jnp.asarray(curves[:, block]), int(most), 1, L)
    for block, most in enumerate(totals)
  ]
  return np.stack(chosen, axis=1)


def _trained(settings, seed, folder):
  """Returns (net, parameters, scorer's parameters)."""
  net = BlockTokenizer(settings.latents, settings.width, settings.layers)
  clips, _ = nested.squares(seed + 1000, settings.train)
  x = jnp.asarray(nested.patches(clips))
  rng = jax.random.key(seed)
  whole = jnp.full(x[:1].shape[:2], settings.latents)
  start = net.init(rng, x[:1], whole)["params"]
  params = fitting.fit(
    (_loss, net, settings.batch), start, x, rng, settings.fit,
    folder=folder and folder / f"net_{seed}",
  )  # fmt: skip
  few = x[: settings.scored]
  latent, q = _encode(net, params, few)
  # Errors span decades: their logarithms, of a spread that is about 1.
  told = jnp.log(jnp.asarray(curves(net, params, few, q)) + 1e-6)
  scorer = Scorer()
  start = scorer.init(rng, latent[:1])["params"]
  scores = fitting.fit(
    (_scorer_loss, scorer, settings.batch), start, (latent, told), rng,
    settings.scorer_fit, folder=folder and folder / f"scorer_{seed}",
  )  # fmt: skip
  return net, params, scores


def _arms(settings, folder, seed):
  """Returns what the allocations of a trained tokenizer's latents reach."""
  net, params, scores = _trained(settings, seed, folder)
  clips, objects = nested.squares(seed, settings.test)
  x = jnp.asarray(nested.patches(clips))
  latent, q = _encode(net, params, x)
  true = curves(net, params, x, q)
  predicted = np.exp(Scorer().apply({"params": scores}, latent))
  total = len(x) * nested.BLOCKS * settings.mean
  even = np.full(x.shape[:2], settings.mean)
  chosen = {
    "fixed length": even,
    "scorer": allocate(predicted, total),
    "block targets (released)": allocate_released(predicted, total),
    "measured (oracle)": allocate(true, total),
  }
  out, plain = {}, None
  for arm, counts in chosen.items():
    error = float(block_errors(net, params, x, q, counts).mean())
    plain = error if plain is None else plain
    spread = (
      np.corrcoef(counts.sum(axis=1), objects)[0, 1] if counts.std() else 0
    )
    out[arm] = {
      "tokens": float(counts.mean()),
      "PSNR": -10 * math.log10(error),
      "dB over fixed": nested.decibels(error, plain),
      "correlation with objects": float(spread),
    }
  return out


def _lengths(settings, folder, seed):
  """Returns the PSNR of each length, equal for all blocks."""
  net, params, _ = _trained(settings, seed, folder)
  x = jnp.asarray(nested.patches(nested.squares(seed, settings.test)[0]))
  _, q = _encode(net, params, x)
  out = {}
  for count in range(1, settings.latents + 1):
    counts = np.full(x.shape[:2], count)
    error = float(block_errors(net, params, x, q, counts).mean())
    told = {"tokens": float(count), "PSNR": -10 * math.log10(error)}
    out[f"{count} of {settings.latents} latents"] = told
  return out


def _linear_arms(settings, mean_levels, seed):
  """Returns the same with exact curves of a linear code, and of its scorer."""
  code, known, asked, _ = nested.known_code(seed, *settings.linear)
  weights = nested.ridge(nested.features(known), code.errors(known))
  true = code.errors(asked)
  predicted = nested.features(asked) @ weights
  high, total = nested.LEVELS, len(asked) * mean_levels
  own = functools.partial(allocators.adaptok, total=total, low=1, high=high)
  chosen = {
    "fixed length": np.full(len(asked), mean_levels),
    "scorer": own(jnp.asarray(predicted[:, 1:])),
    "exact (oracle)": own(jnp.asarray(true[:, 1:])),
  }
  return nested.arms(true, chosen, "dB over fixed")


def study(settings, clips, folder=None) -> study_lib.Study:
  """Returns the comparison with fixed lengths at equal tokens."""
  del clips  # Its own are of squares.
  linear = {
    _case(levels): functools.partial(_linear_arms, settings, levels)
    for levels in settings.mean_levels
  }
  trained = {
    case: functools.partial(arms, settings, folder)
    for case, arms in (("tokenizer", _arms), ("every length", _lengths))
  }

  def bars(table):
    least = study_lib.Bar.least
    known = functools.partial(table.values, measure="dB over fixed")
    out = []
    for case, oracle in [
      *((case, "exact (oracle)") for case in linear),
      ("tokenizer", "measured (oracle)"),
    ]:
      gain, most = known(case, "scorer"), known(case, oracle)
      share = np.mean(gain) / max(np.mean(most), 1e-9)
      out.append(least(f"{case}: dB over fixed, least seed", min(gain), 0.3))
      out.append(least(f"{case}: share of the oracle's gain", share, 0.6))
    names = [arm for case, arm in table.rows if case == "every length"]
    steps = np.diff([table.mean("every length", arm, "PSNR") for arm in names])
    out.append(least("least gain of a further latent, dB", steps.min(), 0.0))
    return out

  shown = [*linear, "tokenizer"], "dB over fixed", "dB over fixed lengths"
  return study_lib.Study("AdapTok", linear | trained, bars, shown)


def _case(levels) -> str:
  return f"linear, {levels * nested.STEP} tokens"
