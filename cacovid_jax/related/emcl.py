"""Bases of a batch's features by expectation maximisation (EMCL).

The points are feature DIMENSIONS: each column of the stacked embeddings of a
batch is a point, and K bases are directions that groups of columns share.
What the bases say of the columns is added to the embeddings, without gradient.
Paper: https://arxiv.org/abs/2211.11427, section 3. `released` is what its code
does; `corrected` is ours: separate starts, and each column's own projection.

Axes: M rows, texts and videos stacked, D dimensions, K bases.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import em
from cacovid_jax.compressors.math import kmeans, similarity
from cacovid_jax.related import fitting, retrieval
from cacovid_jax.related import study as study_lib

_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMCL:
  """How bases are found and what is added of them."""

  num_bases: int = 32
  lam: float = 1.0  # Width of a basis, in units of the inner product.
  rounds: int = 9
  beta: float = 3.0
  # "released": the rows' mean of each basis, +1 or -1 before any training, so
  # that all bases start as one of two constants; "random"; "kmeans++".
  init: str = "released"
  # "released": responsibilities normalised over the dimensions, which leaves
  # under a hundredth of the features' norm; "matched": the same at the norm of
  # the features; "coefficients": responsibility times projection.
  form: str = "released"
  centred: bool = False  # Whether rows of each kind lose their mean before.

  @classmethod
  def released(cls, **options):
    return cls(**options)

  @classmethod
  def corrected(cls, **options):
    # On columns of norm 1 the width is one of cosines.
    own = dict(lam=0.05, init="kmeans++", form="coefficients")
    return cls(**(own | options))

  def __post_init__(self):
    if self.num_bases < 1 or self.rounds < 1 or not self.lam > 0:
      raise errors.UserError(
        f"EMCL: num_bases={self.num_bases}, rounds={self.rounds} and"
        f" lam={self.lam} have to be above 0"
      )


def init_state(rng, num_bases: int):
  """Returns float32[K], the released state: +1 or -1, whatever is drawn."""
  drawn = jax.random.normal(rng, [1, num_bases]) * (2.0 / num_bases) ** 0.5
  return (drawn / jnp.linalg.norm(drawn, axis=0))[0]


@functools.partial(jax.jit, static_argnums=0)
def enhance(config: EMCL, x, rng, state=None):
  """Returns (x with what its bases say added, bases float32[M, K]).

  Args:
    config: how.
    x: float32[M, D]; the released code gives it as it is, not at norm 1.
    rng: key of the start.
    state: float32[K] of the released start, None for a fresh one.
  """
  if x.shape[1] < config.num_bases:
    raise errors.UserError(
      f"EMCL: {config.num_bases} bases of {x.shape[1]} dimensions; choose at"
      " most as many"
    )
  columns = jax.lax.stop_gradient(x).T.astype(jnp.float32)  # [D, M]
  start = _start(config, columns, rng, state)
  own = config.form == "coefficients"
  points = similarity.unit(columns) if own else columns
  # The last round apart: what is added takes its responsibilities.
  bases = em.fit(points, start, lam=config.lam, rounds=config.rounds - 1)
  share = em.responsibilities(points, bases, lam=config.lam)
  bases = similarity.unit(jnp.matmul(share.T, points, precision=_EXACT))
  if own:
    weight = share * jnp.matmul(columns, bases.T, precision=_EXACT)
  else:
    weight = share / (1e-6 + share.sum(axis=0))
  added = jnp.matmul(weight, bases, precision=_EXACT).T
  if config.form == "matched":
    size = jnp.linalg.norm(columns) / jnp.linalg.norm(added)
    added = added * size
  return x + config.beta * added, bases.T


def _start(config, columns, rng, state):
  """Returns float32[K, M], the first bases."""
  shape = (config.num_bases, columns.shape[1])
  if config.init == "released":
    state = init_state(rng, config.num_bases) if state is None else state
    return jnp.broadcast_to(state[:, None], shape)
  if config.init == "random":
    return similarity.unit(jax.random.normal(rng, shape))
  x = similarity.unit(columns)
  return x[kmeans.seeds(rng, x, config.num_bases)]


def update(state, bases):
  """Returns the released state after a training step: rows' means, a tenth."""
  return 0.9 * state + 0.1 * bases.mean(axis=0)


def scores(text, video, *, enhanced=None):
  """Returns float32[A, B], cosines of rows, of pairs through `enhanced`."""
  a, b = text, video
  if enhanced is not None:
    both = enhanced(jnp.concatenate([text, video]))
    a, b = both[: len(text)], both[len(text) :]
  return similarity.between(a, b)


def centre(text, video):
  """Returns both without their own means, hence without an offset."""
  return text - text.mean(axis=0), video - video.mean(axis=0)


def principal(text, video, num_axes: int):
  """Returns both, projected on the principal axes of all rows."""
  x = jnp.concatenate([text, video])
  _, _, axes = jnp.linalg.svd(x - x.mean(axis=0), full_matrices=False)
  axes = axes[:num_axes]
  return text @ axes.T, video @ axes.T


class EMCLNet(nn.Module):
  """Texts and clips through their bases: a cosine for each pair.

  A clip is pooled anew for each text, `softmax(text . frame / 3)`; all pairs
  and the texts, none at norm 1, are one stack.
  """

  width: int = 128
  hidden: int = 128
  config: EMCL | None = None  # None leaves the embeddings as they are.

  def setup(self):
    self.text = retrieval.Tower(self.width, self.hidden, 5)
    self.frame = retrieval.Tower(self.width, self.hidden)
    self.neighbours = retrieval.Tower(self.width, self.hidden, 3)
    self.logit_scale = self.param("logit_scale", _initial_scale, ())

  def __call__(self, text, video, rng):
    """Returns (float32[A, B] cosines, scale), given (x, mask) of both.

    Tokens float[A, n, D] of texts, frames float[B, V, D] of clips.
    """
    x, mask = text
    words = self.text(x) * mask[..., None]
    c = words.sum(axis=1) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    frames, mask = video
    frames = self.frame(frames)
    frames = frames + self.neighbours(frames)
    share = jnp.einsum("ad,bvd->abv", c, frames, precision=_EXACT) / 3
    share = jnp.where(mask.astype(bool), share, -jnp.inf)
    v = jnp.einsum("abv,bvd->abd", nn.softmax(share), frames, precision=_EXACT)
    if self.config is not None:
      A, B, D = v.shape
      stack = jnp.concatenate([v.reshape(A * B, D), c])
      if self.config.centred:
        stack -= jnp.concatenate([
          jnp.broadcast_to(v.mean((0, 1)), (A * B, D)),
          jnp.broadcast_to(c.mean(axis=0), (A, D)),
        ])  # fmt: skip
      stack, _ = enhance(self.config, stack, rng)
      v, c = stack[: A * B].reshape(A, B, D), stack[A * B :]
    cosines = (similarity.unit(v) * similarity.unit(c)[:, None]).sum(axis=-1)
    return cosines, jnp.exp(jnp.minimum(self.logit_scale, np.log(100.0)))


def _initial_scale(rng, shape):
  return jnp.full(shape, np.log(1 / 0.07), jnp.float32)


def _loss(net, batch, params, data, rng, step):
  rows_rng, rng = jax.random.split(rng)
  text, video = retrieval.drawn(rows_rng, data, batch)
  cosines, scale = net.apply({"params": params}, text, video, rng)
  ways = (cosines, cosines.T)
  return 0.5 * sum(retrieval.contrast(scale * way) for way in ways)


@functools.partial(jax.jit, static_argnums=0)
def _cosines(net, params, text, video, rng):
  return net.apply({"params": params}, text, video, rng)[0]


def planted(seed: int, kind: str, num_pairs: int, noise: float, groups=32):
  """Returns (texts, videos) float32[n, 8 groups] of the same pairs.

  "groups": each of 32 signals is in 8 dimensions, with noise of their own and
  an offset between the kinds. "subspace": as strong a signal in 24 random
  directions, no dimension like another. "nuisance": a full signal, and 8 strong
  directions of no meaning that texts and videos have at random.
  """
  rng = np.random.default_rng(seed)
  width, draw = 8 * groups, rng.standard_normal
  if kind == "groups":
    signal = np.repeat(draw((num_pairs, groups)), 8, axis=1)
    offsets = 0.5 * draw((2, 1, width))
  elif kind == "subspace":
    signal = draw((num_pairs, 24)) @ draw((24, width)) / 24**0.5
    offsets = 0.5 * draw((2, 1, width))
  else:
    signal, axes = draw((num_pairs, width)), draw((8, width))
    offsets = draw((2, num_pairs, 8)) @ axes
  sides = signal + offsets + noise * draw((2, num_pairs, width))
  return tuple(sides.astype(np.float32))


def _planted_arms(settings, seed, kind, noise):
  """Returns the arms of a planted case, nothing trained."""
  t, v = map(jnp.asarray, planted(seed, kind, settings.pairs, noise))
  rng, K = jax.random.key(seed), settings.num_bases
  centred = centre(t, v)

  def through(config, pair=(t, v)):
    own = functools.partial(enhance, config, rng=rng)
    return scores(*pair, enhanced=lambda x: own(x)[0])

  found = {
    "plain": scores(t, v),
    "released": through(EMCL.released(num_bases=K)),
    "random start": through(EMCL.released(num_bases=K, init="random")),
    "random start, matched": through(
      EMCL.released(num_bases=K, init="random", form="matched")
    ),
    "corrected": through(EMCL.corrected(num_bases=K)),
    "corrected, centred": through(EMCL.corrected(num_bases=K), centred),
    "centred alone": scores(*centred),
    "PCA": scores(*principal(t, v, K)),
  }
  if kind == "groups":
    means = (x.reshape(len(x), -1, 8).mean(axis=-1) for x in (t, v))
    found["oracle: true groups"] = scores(*means)
  return {arm: retrieval.both_ways(one) for arm, one in found.items()}


def _trained_arms(settings, seed, train, test, folder):
  """Returns arms whose bases are in the loss, and in the test alone."""
  K = settings.num_bases
  configs = {
    "plain": None,
    "released": EMCL.released(num_bases=K),
    "corrected": EMCL.corrected(num_bases=K),
  }
  out, rng = {}, jax.random.key(seed)
  for arm, config in configs.items():
    net = EMCLNet(settings.width, settings.hidden, config)
    few = jax.tree.map(lambda x: x[:2], train)
    # The same start for all arms.
    start = EMCLNet(settings.width, settings.hidden).init(rng, *few, rng)
    own = folder and folder / f"{arm}_{seed}"
    params = fitting.fit(
      (_loss, net, settings.batch), start["params"], train, rng, settings.fit,
      folder=own,
    )  # fmt: skip
    out[arm] = retrieval.both_ways(_cosines(net, params, *test, rng))
    if arm == "plain":
      late = EMCLNet(settings.width, settings.hidden, configs["corrected"])
      cosines = _cosines(late, params, *test, rng)
      out["corrected, test alone"] = retrieval.both_ways(cosines)
  return out


def study(settings, clips, folder=None) -> study_lib.Study:
  """Returns the comparison of the forms; `clips` gives those with captions."""
  cases = {
    "groups": ("groups", settings.noise),
    "groups, less noise": ("groups", 0.75 * settings.noise),
    "no groups": ("subspace", settings.subspace_noise),
    "shared nuisance": ("nuisance", 1.0),
  }
  of_planted = {
    case: functools.partial(_planted_arms, settings, kind=kind, noise=noise)
    for case, (kind, noise) in cases.items()
  }

  def embedded(seed):
    train, test = (clips.pairs(split) for split in clips.SPLITS)
    return _trained_arms(settings, seed, train, test, folder)

  def bars(table):
    gap = functools.partial(table.gap, measure="t2v R@1")
    least, most = study_lib.Bar.least, study_lib.Bar.most
    groups = gap("groups", "corrected", "plain")
    released = np.abs(gap("groups", "released", "plain"))
    none = gap("no groups", "corrected", "plain")
    return [
      least("corrected over plain, groups of dimensions", min(groups), 0.1),
      most("released from plain, groups of dimensions", max(released), 0.02),
      most("corrected over plain, no groups", max(none), 0.0),
    ]

  cases = of_planted | {"embedded clips": embedded}
  shown = ["groups", "no groups"], "t2v R@1", "R@1, text to video"
  return study_lib.Study("EMCL-Net", cases, bars, shown)
