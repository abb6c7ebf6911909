"""Rates of clips by what they tell (InfoTok).

A clip that a tokenizer reconstructs badly gets more tokens: its rate is
proportional to the error of a decode without gradient.
Paper: https://arxiv.org/abs/2512.16975. Ours counts tokens exactly (the largest
remainder), takes a power of the error, and tells the decoder which tokens are
there; the released code rounds rates down to quantiles and tells nothing.

Axes: n clips, C tokens of a clip, D numbers of a clip.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from cacovid_jax.compressors import allocators, budgets
from cacovid_jax.related import fitting, nested, quantisers
from cacovid_jax.related import study as study_lib

# Rates of training, one drawn for each clip; published.
TRAIN_RATES = (1.0, 0.75, 0.5, 0.25)


def counts(error, total: int, low: int, high: int, *, power: float = 1.0):
  """Returns int32[G] tokens in proportion to errors float[G], `total` in all.

  A power of 1 is published; errors fall slower than tokens grow, and a half
  comes nearer to what an exact allocator does.
  """
  weights = jnp.asarray(error, jnp.float32) ** power
  return budgets.largest_remainder_on_device(weights, total, low, high)


def released_counts(error, total: int, low: int, high: int):
  """Returns int32[G] as released: rounded down, so fewer than `total`."""
  budgets.check_feasible(total, low, high, len(error))
  rate = allocators.rates(jnp.asarray(error), total / (len(error) * high))
  return jnp.clip(jnp.floor(rate * high), low, high).astype(jnp.int32)


def kept_cells(error, rate: float, *, released: bool = False):
  """Returns bool[C], the cells of largest error float[C] that a rate keeps.

  Exactly round(rate * C), at least 1, of equal ones the first. `released` keeps
  what is strictly above the quantile of training, which at rate 1 leaves out
  the smallest, and of a constant clip keeps nothing.
  """
  error = jnp.asarray(error)
  number = error.shape[0]
  if released:
    at = int(np.floor((1 - rate) * (number - 1)))
    return error > jnp.sort(error)[at]
  most = max(1, round(rate * number))
  order = jnp.argsort(-error, stable=True)
  return jnp.zeros(number, bool).at[order[:most]].set(True)


def bits(counts, high: int, bits_per_token: float) -> float:
  """Returns the mean bits of a part: its tokens, and a mask bit a cell."""
  return float(np.mean(counts) * bits_per_token + high)


class ScalarTokenizer(nn.Module):
  """A code of scalar tokens in order, of which any first ones suffice.

  With `told`, the decoder also sees which tokens are there: 0 is a level like
  another.
  """

  num_tokens: int = 8
  hidden: int = 128
  levels: int = 3
  told: bool = True

  @nn.compact
  def __call__(self, x, mask):
    """Returns (float32[n, D] decoded, code float32[n, C]), of bool[n, C]."""
    z = nn.gelu(nn.Dense(self.hidden, name="encode")(x))
    z = nn.Dense(self.num_tokens, name="code")(z)
    code = quantisers.fsq(z[..., None], [self.levels])[..., 0]
    code = jnp.where(mask, code, 0.0)
    seen = [code, mask.astype(code.dtype)] if self.told else [code]
    y = nn.gelu(nn.Dense(self.hidden, name="decode")(jnp.concatenate(seen, -1)))
    return nn.Dense(x.shape[-1], name="out")(y), code


def source(seed: int, num_clips: int, num_features: int = 8, width: int = 32):
  """Returns (clips float32[n, D], bits int[n]) of a source that is known.

  k from 1 to 8 is drawn; the first k directions are there with a random sign
  each, so a clip tells k bits beside k itself.
  """
  rng = np.random.default_rng(seed)
  axes = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0]
  told = rng.integers(1, num_features + 1, num_clips)
  signs = rng.choice([-1.0, 1.0], (num_clips, num_features))
  signs *= np.arange(num_features) < told[:, None]
  return (signs @ axes[:num_features]).astype(np.float32), told


def _loss(net, batch, params, data, rng, step):
  rows_rng, rate_rng = jax.random.split(rng)
  x = data[jax.random.randint(rows_rng, [batch], 0, len(data))]
  rate = jax.random.choice(rate_rng, jnp.array(TRAIN_RATES), [batch, 1])
  mask = jnp.arange(net.num_tokens) < rate * net.num_tokens
  decoded, _ = net.apply({"params": params}, x, mask)
  return jnp.abs(x - decoded).mean()


@functools.partial(jax.jit, static_argnums=0)
def errors_by_count(net, params, x):
  """Returns float32[n, C + 1], squared error with 0, 1, ... first tokens."""

  def one(count):
    mask = jnp.broadcast_to(
      jnp.arange(net.num_tokens) < count, (len(x), net.num_tokens)
    )
    decoded, _ = net.apply({"params": params}, x, mask)
    return jnp.square(x - decoded).sum(axis=-1)

  return jax.vmap(one, out_axes=1)(jnp.arange(net.num_tokens + 1))


def _linear_arms(settings, mean_levels, seed):
  """Returns errors of allocators of exact curves, at equal tokens."""
  given = settings.clips, settings.clips
  code, _, asked, objects = nested.known_code(seed, *given)
  curves, high = code.errors(asked), nested.LEVELS
  total = len(curves) * mean_levels
  half = curves[:, high // 2]
  own = functools.partial(counts, total=total, low=1, high=high)
  chosen = {
    "uniform": allocators.uniform(half, total, 1, high),
    "full rate (published)": own(curves[:, high]),
    "half rate": own(half),
    "half rate, power 0.5": own(half, power=0.5),
    "energy": own(curves[:, 0]),
    "floor (released)": released_counts(half, total, 1, high),
    "exact (oracle)": allocators.adaptok(
      jnp.asarray(curves[:, 1:]), total, 1, high
    ),
  }
  out = nested.arms(curves, chosen, "dB over uniform")
  for arm, levels in chosen.items():
    rank = stats.spearmanr(levels, objects).statistic if np.std(levels) else 0.0
    out[arm]["rank with objects"] = float(rank)
  return out


def _source_arms(settings, folder, seed):
  """Returns what tokenizers of the known source give to clips of k bits."""
  train, _ = source(seed + 1000, settings.source)
  test, told = source(seed, settings.source_test)
  out = {}
  for arm, informed in (("mask told", True), ("not told (released)", False)):
    net = ScalarTokenizer(told=informed)
    rng = jax.random.key(seed)
    every = jnp.ones((1, net.num_tokens), bool)
    start = net.init(rng, train[:1], every)["params"]
    at = folder and folder / f"source_{informed}_{seed}"
    params = fitting.fit(
      (_loss, net, settings.batch), start, jnp.asarray(train), rng,
      settings.fit, folder=at,
    )  # fmt: skip
    curves = np.asarray(errors_by_count(net, params, jnp.asarray(test)))
    high, number = net.num_tokens, len(test)
    total = number * high // 2
    given = np.asarray(counts(curves[:, high // 2], total, 1, high, power=0.5))
    best = np.asarray(
      allocators.adaptok(jnp.asarray(curves[:, 1:]), total, 1, high)
    )
    # The fewest tokens that leave hardly anything of a direction's 1.
    enough = (curves < settings.enough).argmax(axis=1)
    enough = np.where((curves < settings.enough).any(axis=1), enough, high)
    plain = nested.error_of(curves, np.full(number, high // 2))
    out[arm] = {
      "rank of rate with bits": float(stats.spearmanr(given, told).statistic),
      "rank of exact with bits": float(stats.spearmanr(best, told).statistic),
      "tokens beyond bits": float(np.abs(enough - told).mean()),
      "dB over uniform": nested.decibels(nested.error_of(curves, given), plain),
    }
  return out


def study(settings, clips, folder=None) -> study_lib.Study:
  """Returns the comparison with equal counts and with the exact allocator."""
  del clips  # Its own are of squares.
  linear = {
    _case(levels): functools.partial(_linear_arms, settings, levels)
    for levels in settings.mean_levels
  }
  source = functools.partial(_source_arms, settings, folder)

  def bars(table):
    least, most = study_lib.Bar.least, study_lib.Bar.most
    out, ours = [], "half rate, power 0.5"
    for case in linear:
      gains = table.values(case, ours, "dB over uniform")
      out.append(least(f"{case}: dB over uniform, least seed", min(gains), 0.0))
      bound = table.mean(case, "exact (oracle)", "dB over uniform")
      share = float(np.mean(gains)) / max(bound, 1e-9)
      text = f"{case}: share of the exact gain, which bounds it"
      out.append(most(text, share, 1.0))
    rank = table.values(case, ours, "rank with objects")
    out.append(least(f"{case}: rank of rate with objects", min(rank), 0.6))
    known = functools.partial(table.values, "source of k bits", "mask told")
    out.append(
      least("rank of rate with bits", min(known("rank of rate with bits")), 0.8)
    )
    out.append(
      most("tokens beyond bits", max(known("tokens beyond bits")), 1.0)
    )
    return out

  cases = linear | {"source of k bits": source}
  shown = list(linear), "dB over uniform", "dB over equal counts"
  return study_lib.Study("InfoTok", cases, bars, shown)


def _case(levels) -> str:
  return f"{levels * nested.STEP} tokens"
