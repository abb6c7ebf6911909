"""AdamW with one rate for heads and norm, a lower one for the pretrained layer.

METHOD.md 6: weight decay on matrices only, cosine decay to 0 over the run,
gradient norm clipped, `mode_selection` frozen (its loss is never added, so the
public code never moves it either).
"""

import dataclasses
import re

import jax
import optax

from cacovid_jax import errors
from cacovid_jax.parallel import mesh as mesh_lib

# Top-level parameter names of the policy. Anything else, a user's own module
# included, counts as a head: new weights, hence the higher rate.
_LAYER = re.compile(r"^layers?(_\d+)?(/|$)")
_FROZEN = re.compile(r"^mode_selection(/|$)")
_NO_DECAY = re.compile(r"(^|/)[^/]*norm[^/]*(/|$)|(^|/)(bias|scale)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Rates and limits; `warmup` counts optimiser steps."""

  lr_heads: float = 1e-6
  lr_layer: float = 1e-7
  weight_decay: float = 0.01
  clip: float = 5.0
  warmup: int = 0

  def __post_init__(self):
    for name in ("lr_heads", "lr_layer", "weight_decay", "warmup"):
      if getattr(self, name) < 0:
        raise errors.UserError(
          f"optimizer.{name}={getattr(self, name)} must not be negative"
        )
    if self.clip <= 0:
      raise errors.UserError(
        f"optimizer.clip={self.clip} must be positive; it bounds the"
        " gradient's norm"
      )


def _strip(name: str) -> str:
  """Drops the `params/` collection that Linen puts in front."""
  return name.removeprefix("params/")


def labels(params):
  """Returns "heads", "layer" or "frozen" for every parameter."""

  def label(path, _):
    name = _strip(mesh_lib.path_name(path))
    if _FROZEN.search(name):
      return "frozen"
    return "layer" if _LAYER.search(name) else "heads"

  return jax.tree_util.tree_map_with_path(label, params)


def decay_mask(params):
  """Returns True for parameters that weight decay pulls to zero.

  Norms and biases are told by name first: stacked over layers they have two
  axes like a matrix.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf.ndim > 1 and not _NO_DECAY.search(_strip(mesh_lib.path_name(path)))
    ),
    params,
  )


def schedule(peak: float, config: OptimizerConfig, total_steps: int):
  """Returns rate(optimiser step): linear warm-up, then cosine to 0."""
  cosine = optax.cosine_decay_schedule(
    peak, max(total_steps - config.warmup, 1)
  )
  if not config.warmup:
    return cosine
  warmup = optax.linear_schedule(0.0, peak, config.warmup)
  return optax.join_schedules([warmup, cosine], [config.warmup])


def make(
  config: OptimizerConfig, total_steps: int
) -> optax.GradientTransformation:
  """Returns the optimiser of a run of `total_steps` optimiser steps."""

  def adamw(peak):
    return optax.adamw(
      schedule(peak, config, total_steps),
      weight_decay=config.weight_decay,
      mask=decay_mask,
    )

  return optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.multi_transform(
      {
        "heads": adamw(config.lr_heads),
        "layer": adamw(config.lr_layer),
        "frozen": optax.set_to_zero(),
      },
      labels,
    ),
  )
