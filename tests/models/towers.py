"""Encodes pixels or patches without a processor, for the tests."""

from cacovid_jax.models import processors


def encode(model, params, values, layout=None, signals=()):
  """Returns (features, signals) of ONE video's pixels or patches."""
  inputs = processors.TowerInputs(values, (1, 1, 1), layout=layout)
  found = model.encode(params, inputs, signals=signals)
  return found.features, found.signals


def features(model):
  """Returns f(params, values, layout=None) -> features of ONE video."""
  return lambda *args: encode(model, *args)[0]
