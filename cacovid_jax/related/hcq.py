"""Hybrid retrieval with product codes (HCQ).

A text and a video become one coarse embedding and L local ones, where level l
collects the tokens that are closest to the l-th of L shared clusters. Each is
coded in M parts; a query stays a float, an item is its codes.
Paper: https://arxiv.org/abs/2202.03384, sections 3.2 to 3.4.

Axes: B pairs, n tokens of an item, D width, L local levels, M parts, K
codewords of a part.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors.math import similarity
from cacovid_jax.related import fitting, quantisers, retrieval
from cacovid_jax.related import study as study_lib

_EXACT = jax.lax.Precision.HIGHEST
# Published: of the inner products, and the share of the coarse level.
TEMPERATURE = 0.05
COARSE = 0.125


class GhostVLAD(nn.Module):
  """Sums of residuals to L shared clusters; ghosts take what is noise.

  With `released`, as in that code, ghosts are cut off before the softmax, so
  that they take nothing, and padding is a token like another of even weights.
  """

  num_clusters: int
  num_ghosts: int = 1
  released: bool = False

  @nn.compact
  def __call__(self, x, mask):
    """Returns float32[B, L, D] of norm 1, of x float[B, n, D], bool[B, n]."""
    shape = (self.num_clusters + self.num_ghosts, x.shape[-1])
    init = nn.initializers.normal(shape[-1] ** -0.5)
    centres = self.param("centres", init, shape)
    logits = nn.Dense(shape[0], use_bias=False, name="assign")(x)
    if self.released:
      logits = logits[..., : self.num_clusters] * mask[..., None]
      share = nn.softmax(logits)
    else:
      share = nn.softmax(logits)[..., : self.num_clusters] * mask[..., None]
    total = jnp.einsum("bnl,bnd->bld", share, x, precision=_EXACT)
    weight = share.sum(axis=1)[..., None]
    return similarity.unit(total - weight * centres[: self.num_clusters])


class Hybrid(nn.Module):
  """Texts and videos into levels; clusters are shared by both."""

  width: int = 64
  hidden: int = 128
  num_local: int = 7
  num_ghosts: int = 1
  released: bool = False

  def setup(self):
    self.text = retrieval.Tower(self.width, self.hidden, 5)
    self.video = retrieval.Tower(self.width, self.hidden)
    own = (self.num_local, self.num_ghosts, self.released)
    self.vlad = GhostVLAD(*own)

  def __call__(self, text, video):
    """Returns levels float32[B, 1 + L, width] of both, given (x, mask) each."""
    return self.embed("text", *text), self.embed("video", *video)

  def embed(self, kind: str, x, mask):
    """Returns float32[B, 1 + L, width] of norm 1, the coarse level first."""
    tokens = getattr(self, kind)(x)
    count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    mean = jnp.einsum("bn,bnd->bd", mask / count, tokens, precision=_EXACT)
    coarse = similarity.unit(mean)[:, None]
    if not self.num_local:
      return coarse
    return jnp.concatenate([coarse, self.vlad(tokens, mask)], axis=1)


def weights(num_levels: int):
  """Returns the weight of each level: an eighth of all is the coarse one's."""
  local = num_levels - 1
  return [COARSE, *[(1 - COARSE) / local] * local] if local else [1.0]


def aq_loss(text, video, codebook, soft):
  """Returns float32[], the asymmetric contrast of one level.

  Float texts ask for coded videos, float videos for coded texts.

  Args:
    text: float32[B, D].
    video: float32[B, D], the pairs of the texts.
    codebook: float32[M, K, D / M]; no gradient reaches it.
    soft: share of the loss of floats alone, which a run begins with.
  """
  num_parts = codebook.shape[0]
  t, v = (quantisers.parts(x, num_parts) for x in (text, video))

  def alike(a, b):
    a, b = quantisers.joined(a), quantisers.joined(b)
    return jnp.matmul(a, b.T, precision=_EXACT) / TEMPERATURE

  def both(coded_text, coded_video):
    asked = retrieval.contrast(alike(t, coded_video))
    return asked + retrieval.contrast(alike(v, coded_text))

  coded = both(*(quantisers.quantise(x, codebook) for x in (t, v)))
  return (1 - soft) * coded + soft * both(t, v)


class Recipe(NamedTuple):
  """How a model is trained; compiled programs are told apart by it."""

  module: nn.Module  # Of (text, video) to levels of both.
  num_parts: int
  num_codewords: int
  settings: fitting.Schedule  # A chunk is an epoch.
  batch: int = 128
  coded: bool = True  # False trains the floats alone.
  reseed: bool = True  # False leaves codewords of nobody at zero, as released.


def _loss(recipe, params, data, rng, step):
  epochs = math.ceil(recipe.settings.steps / recipe.settings.chunk)
  pairs = retrieval.drawn(rng, data, recipe.batch)
  a, b = recipe.module.apply({"params": params["model"]}, *pairs)
  # From almost 1 in the first epoch to 0 in the last, as published.
  epoch = step // recipe.settings.chunk + 1
  soft = jnp.cos(jnp.pi / 2 * epoch / epochs) if recipe.coded else 1.0
  books = jax.lax.stop_gradient(params["codebooks"])
  return sum(
    weight * aq_loss(a[:, level], b[:, level], books[level], soft)
    for level, weight in enumerate(weights(a.shape[1]))
  )


def train(recipe: Recipe, params, data, rng, *, folder=None):
  """Returns {"model": ..., "codebooks": float32[1 + L, M, K, D / M]}.

  Args:
    recipe: how.
    params: of the model, to start from.
    data: (texts, videos), pytrees whose leaves have a leading axis of pairs.
    rng: key.
    folder: of a checkpoint, see `fitting.fit`.
  """
  number = len(jax.tree.leaves(data)[0])
  quantisers.check_enough(2 * number, recipe.num_codewords)
  made, _ = jax.eval_shape(recipe.module.apply, {"params": params}, *data)
  width = made.shape[2] // recipe.num_parts
  keys = jax.random.split(jax.random.fold_in(rng, 1 << 20), made.shape[1])
  make = functools.partial(
    quantisers.init_codebook,
    num_parts=recipe.num_parts, num_codewords=recipe.num_codewords, width=width,
  )  # fmt: skip
  start = {"model": params, "codebooks": jnp.stack([make(key) for key in keys])}
  # What becomes of unused codewords is no part of the loss's program.
  loss = _loss, recipe._replace(reseed=True)

  def between(params, data, step):
    if step and not recipe.coded:
      return params
    return params | {"codebooks": codebooks(recipe, params, data)}

  trained = fitting.fit(
    loss, start, data, rng, recipe.settings, folder=folder, between=between
  )
  return trained | {"codebooks": codebooks(recipe, trained, data)}


def codebooks(recipe: Recipe, params, data):
  """Returns codebooks moved to the embeddings of texts and videos together."""
  both = jnp.concatenate(_embed(recipe.module, params["model"], *data))
  found = [
    quantisers.refresh(
      quantisers.parts(both[:, level], recipe.num_parts),
      book,
      reseed=recipe.reseed,
    )  # fmt: skip
    for level, book in enumerate(params["codebooks"])
  ]
  return jnp.stack(found)


@functools.partial(jax.jit, static_argnums=0)
def _embed(module, params, text, video):
  return module.apply({"params": params}, text, video)


class Index(NamedTuple):
  """Coded items: all that a search keeps of them."""

  codes: jax.Array  # int32[1 + L, n, M].
  codebooks: jax.Array  # float32[1 + L, M, K, D / M].

  @classmethod
  def of(cls, items, codebooks) -> "Index":
    """Codes levels float32[n, 1 + L, D]."""
    found = [
      quantisers.codes(quantisers.parts(items[:, level], len(book)), book)
      for level, book in enumerate(codebooks)
    ]
    return cls(jnp.stack(found), codebooks)

  @property
  def num_bytes(self) -> float:
    """Bytes of an item."""
    levels, num_parts, num_codewords, _ = self.codebooks.shape
    return levels * quantisers.num_bytes(num_parts, num_codewords)

  def search(self, queries):
    """Returns float32[Q, n], by tables of levels float32[Q, 1 + L, D]."""
    total = 0.0
    for level, weight in enumerate(weights(len(self.codebooks))):
      book, codes = self.codebooks[level], self.codes[level]
      query = quantisers.parts(queries[:, level], len(book))
      query = quantisers.joined(query)
      total += weight * quantisers.search(query, codes, book)
    return total


def float_scores(queries, items, num_parts: int = 1):
  """Returns float32[Q, n] of levels float32[..., 1 + L, D], parts at norm 1."""
  total = 0.0
  for level, weight in enumerate(weights(queries.shape[1])):
    a, b = (
      quantisers.joined(quantisers.parts(x[:, level], num_parts))
      for x in (queries, items)
    )
    total += weight * jnp.matmul(a, b.T, precision=_EXACT)
  return total


class _Projection(nn.Module):
  """A hidden layer; what a planted pair is embedded by."""

  width: int

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Dense(2 * self.width, name="hidden")(x))
    return nn.Dense(self.width, name="out")(x)


class Pairs(nn.Module):
  """One level, of vectors: no tokens, no clusters."""

  width: int = 64

  def setup(self):
    self.text, self.video = _Projection(self.width), _Projection(self.width)

  def __call__(self, text, video):
    """Returns float32[B, 1, width] of both, of float32[B, any]."""
    return self.text(text)[:, None], self.video(video)[:, None]


def planted(seed: int, num_pairs: int, noise: float = 0.55):
  """Returns (texts, videos) float32[n, 128] of 64 shared numbers a pair."""
  rng = np.random.default_rng(seed)
  shared = rng.standard_normal((num_pairs, 64))
  sides = [
    shared @ rng.standard_normal((64, 128)) / 8
    + noise * rng.standard_normal((num_pairs, 128))
    for _ in range(2)
  ]
  return tuple(jnp.asarray(side, jnp.float32) for side in sides)


def _arms(module, settings, codes, seed, train_set, test, folder):
  """Returns the arms of one size of codes: floats first, then their codes.

  Post-hoc codes are k-means on what a model without them embeds.
  """
  rng = jax.random.key(seed)
  few = jax.tree.map(lambda x: x[:2], train_set)
  start = module.init(rng, *few)["params"]
  schedule = fitting.Schedule(**settings.fit)
  recipe = Recipe(module, *codes, schedule, settings.batch)
  out = {}
  for arm, changes in {
    "float": dict(coded=False),
    "HCQ": {},
    "HCQ, released": dict(reseed=False),
  }.items():
    own = recipe._replace(**changes)
    at = folder and folder / f"{arm}_{codes[0]}_{codes[1]}_{seed}"
    params = train(own, start, train_set, rng, folder=at)
    queries, items = _embed(module, params["model"], *test)
    index = Index.of(items, params["codebooks"])
    told = {"bytes": index.num_bytes}
    if own.reseed:
      scores = float_scores(queries, items, codes[0])
      size = {"bytes": 4.0 * items[0].size}
      out[f"{arm}, floats"] = retrieval.both_ways(scores) | size
    name = "float, coded post hoc" if arm == "float" else f"{arm}, coded"
    used = [len(np.unique(c)) for one in index.codes for c in one.T]
    told |= {"codewords used": float(np.mean(used) / codes[1])}
    out[name] = retrieval.both_ways(index.search(queries)) | told
  return out


def study(settings, clips, folder=None) -> study_lib.Study:
  """Returns the comparison with floats and with codes fitted afterwards."""
  errors.check(
    len(settings.codes) == len(settings.bounds),
    f"hcq.codes has {len(settings.codes)} sizes and hcq.bounds"
    f" {len(settings.bounds)}; give a bound, or None, for each",
  )

  def of_planted(codes, seed):
    pairs = planted(seed, settings.train + settings.test)
    train_set, test = (
      jax.tree.map(lambda x, at=at: x[at], pairs)
      for at in (slice(settings.train), slice(settings.train, None))
    )
    return _arms(Pairs(), settings, codes, seed, train_set, test, folder)

  def embedded(seed):
    own = settings.clips
    train_set, test = (clips.pairs(s, own.tokens) for s in clips.SPLITS)
    module = Hybrid(own.width, own.hidden, own.num_local)
    at = folder and folder / "clips"
    return _arms(module, own, own.codes, seed, train_set, test, at)

  planted_cases = {
    _case(codes): functools.partial(of_planted, codes)
    for codes in settings.codes
  }

  def bars(table):
    out = []
    for codes, bound in zip(settings.codes, settings.bounds, strict=True):
      case = _case(codes)
      gap = table.gap(case, "HCQ, coded", "float, coded post hoc", "t2v R@1")
      if bound is not None:
        text = f"{case}: trained over post-hoc codes, mean of seeds"
        out.append(study_lib.Bar.least(text, float(np.mean(gap)), bound))
    case = _case(settings.codes[-1])
    kept = table.mean(case, "HCQ, coded", "t2v R@1")
    kept /= table.mean(case, "HCQ, floats", "t2v R@1")
    text = f"{case}: share of its float's R@1"
    return [*out, study_lib.Bar.least(text, kept, 0.95)]

  cases = planted_cases | {"embedded clips": embedded}
  shown = list(planted_cases), "t2v R@1", "R@1, text to video"
  return study_lib.Study("HCQ", cases, bars, shown)


def _case(codes) -> str:
  return f"{codes[0]} x {codes[1]}"
