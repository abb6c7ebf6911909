"""AdamW with one rate for heads and norm, a lower one for the pretrained layer.

METHOD.md 6: weight decay on matrices only, a cosine decay of the rates,
gradient norm clipped, `mode_selection` frozen (its loss is never added, so the
public code never moves it either). A running average of the parameters is ours.
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cacovid_jax import config_limits
from cacovid_jax.parallel import mesh as mesh_lib

# Top-level parameter names of the policy. Anything else, a user's own module
# included, counts as a head: new weights, hence the higher rate.
_LAYER = re.compile(r"^layers?(_\d+)?(/|$)")
_FROZEN = re.compile(r"^mode_selection(/|$)")
_NO_DECAY = re.compile(r"(^|/)[^/]*norm[^/]*(/|$)|(^|/)(bias|scale)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Rates and limits."""

  lr_heads: float = 1e-6  # Largest rate of heads and norm.
  lr_layer: float = 1e-7  # And of the pretrained layer.
  weight_decay: float = 0.01  # Of matrices.
  clip: float = 5.0  # Bound of the gradient's norm.
  warmup: int = 0  # Optimiser steps.
  # "cosine" is one decay to 0 over the run. "cosine_repeated" is what the
  # public code does: its horizon counts videos while each of their I iterations
  # moves it on, so that the rate is 0 after 1/I of the run, full after 2/I, and
  # so on.
  schedule: str = "cosine"
  average: float = 0.0  # Decay of `Averaged` parameters; 0 for none.

  def __post_init__(self):
    config_limits.check({"optimizer": dataclasses.asdict(self)})


def _map_named(function, params):
  """Maps f(name, leaf), without the `params/` that Linen puts in front."""

  def named(path, leaf):
    return function(mesh_lib.path_name(path).removeprefix("params/"), leaf)

  return jax.tree_util.tree_map_with_path(named, params)


def labels(params):
  """Returns "heads", "layer" or "frozen" for every parameter."""

  def label(name, _):
    if _FROZEN.search(name):
      return "frozen"
    return "layer" if _LAYER.search(name) else "heads"

  return _map_named(label, params)


def trained(params):
  """Returns the parameters with None for those that are frozen."""
  return _map_named(
    lambda name, leaf: None if _FROZEN.search(name) else leaf, params
  )


def decay_mask(params):
  """Returns True for parameters that weight decay pulls to zero.

  Norms and biases are told by name first: stacked over layers they have two
  axes like a matrix.
  """
  return _map_named(
    lambda name, leaf: leaf.ndim > 1 and not _NO_DECAY.search(name), params
  )


def schedule(peak, config: OptimizerConfig, total_steps, iterations=1):
  """Returns rate(optimiser step), of `total_steps`, `iterations` a video."""
  if config.schedule == "cosine_repeated":
    horizon = max(total_steps // iterations - config.warmup, 1)

    def cosine(step):
      return peak * 0.5 * (1 + jnp.cos(jnp.pi * step / horizon))
  else:
    horizon = max(total_steps - config.warmup, 1)
    cosine = optax.cosine_decay_schedule(peak, horizon)
  if not config.warmup:
    return cosine
  warmup = optax.linear_schedule(0.0, peak, config.warmup)
  return optax.join_schedules([warmup, cosine], [config.warmup])


def make(config: OptimizerConfig, total_steps: int, iterations: int = 1):
  """Returns the optimiser of a run; the arguments are as for `schedule`."""

  def adamw(peak):
    rate = schedule(peak, config, total_steps, iterations)
    decay = config.weight_decay
    return optax.adamw(rate, weight_decay=decay, mask=decay_mask)

  groups = {
    "heads": adamw(config.lr_heads),
    "layer": adamw(config.lr_layer),
    "frozen": optax.set_to_zero(),
  }
  clip = optax.clip_by_global_norm(config.clip)
  tx = optax.chain(clip, optax.multi_transform(groups, labels))
  return _averaging(tx, config.average) if config.average else tx


class Averaged(NamedTuple):
  """An optimiser's state, and the running average of what it optimises."""

  inner: Any
  count: jax.Array  # i32[], of parameters in the average: one per update.
  average: Any  # Like the parameters; the first ones until there is an update.


def _averaging(tx, decay):
  def init(params):
    # A copy: a step gives up its buffers, each once.
    average = jax.tree.map(jnp.array, params)
    return Averaged(tx.init(params), jnp.zeros((), jnp.int32), average)

  def update(grads, state, params):
    updates, inner = tx.update(grads, state.inner, params)
    count = state.count + 1
    # (1 - decay) / (1 - decay^count), which float32 has no digits for: the bias
    # of the start is taken off at once. Unlike `optax.ema`, bits of what does
    # not move stay.
    share = (decay - 1.0) / jnp.expm1(count * math.log(decay))
    new = optax.apply_updates(params, updates)
    moved = optax.tree.sub(new, state.average)
    average = optax.tree.add_scale(state.average, share, moved)
    return updates, Averaged(inner, count, average)

  return optax.GradientTransformation(init, update)
