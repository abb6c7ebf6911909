"""Training of the small models here: many steps a program, resumable.

A loss is `loss(*static, params, data, rng, step)` -> float32[]; it draws its
own batch of `data`, a pytree of arrays, so that no step waits for the host.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.training import checkpointing
from cacovid_jax.training import optimizer as optimizer_lib


class Schedule(NamedTuple):
  """How long and how fast to train; AdamW with a cosine decay."""

  steps: int
  lr: float
  chunk: int  # Steps of one program, between which `between` is called.
  warmup: int = 0
  weight_decay: float = 0.0
  clip: float = 1.0


class _State(NamedTuple):
  step: jax.Array  # int32[], steps done.
  params: Any
  opt_state: Any


def fit(
  loss: tuple[Any, ...],
  params: Any,
  data: Any,
  rng: jax.Array,
  settings: Schedule | Mapping[str, Any],
  *,
  folder: str | pathlib.Path | None = None,
  between: Callable[..., Any] | None = None,
) -> Any:
  """Returns trained parameters.

  Args:
    loss: (loss, *static), see above; equal ones are compiled once.
    params: to start from.
    data: what the loss draws from.
    rng: key; step i uses `fold_in(rng, i)`, so a resumed run is the same.
    settings: steps and rates, or what `Schedule` is made of.
    folder: of an Orbax checkpoint, written after each chunk and gone on from;
      None for none.
    between: `between(params, data, step)` -> params, before each chunk.

  Raises:
    UserError: the loss is no longer finite.
  """
  if not isinstance(settings, Schedule):
    settings = Schedule(**settings)
  tx = _optimizer(settings)
  state = _State(jnp.int32(0), params, tx.init(params))
  found = folder and checkpointing.restore_latest(folder, state)
  if found:
    state = found[1]
  for start in range(int(state.step), settings.steps, settings.chunk):
    if between is not None:
      state = state._replace(params=between(state.params, data, start))
    count = min(settings.chunk, settings.steps - start)
    state, value = _advance(state, data, rng, loss=loss, tx=tx, count=count)
    if not np.isfinite(value):
      raise errors.UserError(
        f"the loss is {float(value)} at step {start + count}; lower the"
        f" learning rate of {settings.lr}"
      )
    if folder:
      checkpointing.save(folder, start + count, state, keep=1)
  return state.params


@functools.lru_cache(maxsize=32)
def _optimizer(settings):
  config = optimizer_lib.OptimizerConfig(
    lr_heads=settings.lr,
    lr_layer=settings.lr,
    weight_decay=settings.weight_decay,
    clip=settings.clip,
    warmup=settings.warmup,
  )
  return optimizer_lib.make(config, settings.steps)


@functools.partial(jax.jit, static_argnames=("loss", "tx", "count"))
def _advance(state, data, rng, *, loss, tx, count):
  """Returns the state after `count` steps, and their mean loss."""
  loss = functools.partial(*loss)

  def step(state, _):
    key = jax.random.fold_in(rng, state.step)
    value, grads = jax.value_and_grad(loss)(state.params, data, key, state.step)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    return _State(state.step + 1, params, opt_state), value

  state, values = jax.lax.scan(step, state, length=count)
  return state, values.mean()
