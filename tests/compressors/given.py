"""Compressors called on one video, with the parts of their inputs apart."""

from typing import Any, NamedTuple

from cacovid_jax.compressors import base
from cacovid_jax.policy import selection


class Aux(NamedTuple):
  """What a method may look at besides features, question and key."""

  scores: Any = None
  untrained_scores: Any = None
  other_scores: Any = None
  attention: Any = None
  decisive: Any = None
  vision_attention: Any = None
  vision_keys: Any = None


def inputs(features, grid, aux=None, text=None, rng=None):
  """Returns `base.CompressorInputs` of one video, or of a batch of them."""
  parts = Aux() if aux is None else aux
  return base.CompressorInputs(
    features=features, grid=grid, text=text, rng=rng, **parts._asdict()
  )


def compress(
  method, features, *, grid, num_keep, text=None, aux=None, rng=None, ratio=None
):
  """Returns what a method selects of one video."""
  return method.select(
    inputs(features, grid, aux, text, rng), num_keep=num_keep, ratio=ratio
  )


def cacovid_in_bucket(features, budget, *, aux):
  """Returns what `cacovid` selects of a video inside a bucket."""
  index = selection.select(aux.scores, budget)
  return base.take(features, index, budget.kept)
