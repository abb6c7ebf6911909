"""Rollouts: what the frozen model's answers to combinations of tokens earn.

Letters: G combinations, B videos, V vocabulary, M new tokens, A letters.
METHOD.md 3. Everything here runs on the device; marks of other than lettered
answers are `data.rewards`, on the host.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import config_limits, errors
from cacovid_jax.data import rewards


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
  """How the model answers, and what its answers earn."""

  max_new_tokens: int = 768
  # A name of `REWARDS`, or a function of one's own (`training.seams`).
  reward: str | Callable = "accuracy"
  marking: str = "auto"  # Where answers are marked: device, host or auto.
  rouge: str = rewards.UNICODE  # See `rewards.reward`.

  def __post_init__(self):
    if isinstance(self.reward, str) and self.reward not in REWARDS:
      raise errors.UserError(
        f"rollout.reward={self.reward!r}: choose one of {tuple(REWARDS)}, or"
        " name your own as path/to/file.py:name"
      )
    ranged = {"marking": self.marking, "max_new_tokens": self.max_new_tokens}
    config_limits.check({"rouge": self.rouge, "rollout": ranged})
    on_host = getattr(self.function, "on_host", False)
    if on_host and self.marking == "device":
      raise errors.UserError(
        "rollout.marking=device, but rollout.reward says that it runs on the"
        " host; set rollout.marking=auto"
      )
    if self.reward != "accuracy" and not on_host and self.marking == "host":
      raise errors.UserError(
        f"rollout.reward={self.reward!r} is read from the model's answers on"
        " the device; set rollout.marking=auto"
      )

  @property
  def answer_length(self) -> int:
    """Tokens generated; rewards of the first token's logits need no more."""
    first_token = getattr(self.function, "first_token", False)
    return 1 if first_token else self.max_new_tokens

  @property
  def function(self) -> Callable:
    """(Answers of ONE video, Target) -> f32[G]."""
    if isinstance(self.reward, str):
      return REWARDS[self.reward]
    return self.reward

  def decided(self, letters) -> Callable | None:
    """Returns f(tokens i32[B]) -> bool[B]: whether no later one is read.

    Of the table `first_letters`; None where a reward reads whole answers.
    """
    if not getattr(self.function, "first_letter", False):
      return None
    return lambda tokens: letters[tokens] >= 0

  @property
  def graded(self) -> bool:
    """Whether rewards are more than right or wrong."""
    return getattr(self.function, "graded", True)


class Answers(NamedTuple):
  """What the model answers."""

  ids: jax.Array  # i32[B,G,M].
  logits: jax.Array | None  # f32[B,G,V] of the first token.


class Target(NamedTuple):
  """What a reward on the device knows of ONE question."""

  answer_id: jax.Array  # i32[], token of the right letter, -1 if it is none.
  option_ids: jax.Array  # i32[A] tokens of its letters, -1 where fewer.
  letters: jax.Array  # i32[V] of `first_letters`.


def first_letters(tokenizer, vocab_size: int) -> np.ndarray:
  """Returns i32[V]: the code of each token's first letter, -1 if it has none.

  Spaces and full stops in front do not count; special tokens have no text.
  """
  table = np.full((vocab_size,), -1, np.int32)
  for token in range(min(vocab_size, tokenizer.vocab_size)):
    text = tokenizer.decode([token]).strip().strip(".").strip()
    if text:
      table[token] = ord(text[0])
  return table


def accuracy(answers: Answers, target: Target):
  """Returns f32[G], 1 where an answer starts with the right letter.

  The host's rule for an answer without tags: the first character of its text
  once spaces and full stops are stripped; empty text earns 0.
  """
  codes = target.letters[answers.ids]  # [G, M]
  first = jnp.argmax(codes >= 0, axis=-1)
  code = jnp.take_along_axis(codes, first[:, None], axis=-1)[:, 0]
  answer_id = target.answer_id
  right = target.letters[jnp.maximum(answer_id, 0)]
  return ((code == right) & (code >= 0) & (answer_id >= 0)).astype(jnp.float32)


def log_likelihood(answers: Answers, target: Target):
  """Returns f32[G], log-probability of the right letter as first token."""
  log_probs = jax.nn.log_softmax(answers.logits.astype(jnp.float32))
  return log_probs[:, target.answer_id]


def margin(answers: Answers, target: Target):
  """Returns f32[G], `log_likelihood` less that of the best wrong letter."""
  log_probs = jax.nn.log_softmax(answers.logits.astype(jnp.float32))
  options = target.option_ids
  wrong = (options >= 0) & (options != target.answer_id)
  wrong = jnp.where(wrong, log_probs[:, options], -jnp.inf)
  return log_probs[:, target.answer_id] - jnp.max(wrong, axis=-1)


accuracy.graded = False
accuracy.first_letter = True
log_likelihood.first_token = margin.first_token = True
REWARDS = {mark.__name__: mark for mark in (accuracy, log_likelihood, margin)}


def reward(config: RolloutConfig, answers: Answers, target: Target):
  """Returns f32[B,G] rewards, on the device; all videos share the letters."""
  return jax.vmap(config.function, (0, Target(0, 0, None)))(answers, target)
