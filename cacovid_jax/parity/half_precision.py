"""How often our model and transformers' agree when both compute in bfloat16."""

import os
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import checkpoints
from cacovid_jax.parity import models, transformers

# Two tokens may change places whose logits are this close, as a share of the
# largest: bfloat16 resolves 0.4 % of it.
TIE = 1e-2
LEAST_SHARE, LEAST_POSITIONS = 0.99, 500


class Agreement(NamedTuple):
  """How often two models hold the same token most likely."""

  positions: int  # Prompt tokens compared.
  ties: int  # Best two logits within `TIE` of the largest, of the reference.
  same: int  # Of the others, where the best token is the same.
  near: int  # Positions whose best two logits are within `TIE` itself.
  same_but_near: int  # Of the others, where the best token is the same.

  @property
  def share(self) -> float:
    return self.same / max(1, self.positions - self.ties)

  @property
  def strict_share(self) -> float:
    return self.same_but_near / max(1, self.positions - self.near)

  @property
  def ok(self) -> bool:
    return self.positions >= LEAST_POSITIONS and self.share >= LEAST_SHARE


def agree(
  directory: str | os.PathLike, *, device="cpu"
) -> tuple[Agreement, Agreement]:
  """Returns two `Agreement`s on a checkpoint directory, PyTorch on a device.

  Of ours with transformers', and of transformers' with itself, by another of
  its attention kernels: what rounding alone does to the checkpoint.
  """
  directory = os.fspath(directory)
  sizes = transformers.frame_sizes(checkpoints.load_config(directory))
  # As many as the verdict asks for, without the text.
  tokens = sum(rows * columns for rows, columns in sizes)
  num_frames = -(-LEAST_POSITIONS // tokens)
  settings = dict(num_frames=num_frames, max_new_tokens=1, device=device)
  other, arrays = (
    transformers.reference(directory, dtype="bfloat16", attention=x, **settings)
    for x in ("sdpa", "eager")
  )
  checkpoint = checkpoints.load(directory, jnp.bfloat16)
  mine, theirs = models.logits(checkpoint.model, checkpoint.params, arrays)
  valid = arrays["attention_mask"].astype(bool)
  other, eager = (x["logits"][valid] for x in (other, arrays))
  return agreement(mine, theirs), agreement(other, eager)


def agreement(ours: np.ndarray, theirs: np.ndarray) -> Agreement:
  """Returns the `Agreement` of logits float[n, V]."""
  second, best = np.partition(theirs, -2, axis=-1)[:, -2:].T
  tie = best - second <= TIE * np.maximum(1.0, np.abs(best))
  near = best - second <= TIE
  same = ours.argmax(axis=-1) == theirs.argmax(axis=-1)
  counts = (tie, same & ~tie, near, same & ~near)
  return Agreement(len(theirs), *(int(count.sum()) for count in counts))


def report(directory, ours, control) -> bool:
  """Prints two `Agreement`s; returns whether ours is enough."""
  print(
    f"\n{directory}, all in bfloat16: {ours.positions} positions (at least"
    f" {LEAST_POSITIONS})\n"
    "same top token                             ties left out  share  strict"
  )
  for name, found in (
    ("ours and transformers'", ours),
    ("transformers' two kernels, to compare", control),
  ):
    shares = f"{found.share:6.2%}  {found.strict_share:6.2%}"
    print(f"{name:41}  {found.ties:13}  {shares}")
  print(
    f"ties: two logits within {TIE:.0%} of the largest; strict: within"
    f" {TIE:g}\nat least {LEAST_SHARE:.0%}: {'ok' if ours.ok else 'MISS'}"
  )
  return ours.ok
