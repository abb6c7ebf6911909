"""What a file of one's own replaces in a run: sampler, objective, reward.

A config selects each by name; the options are further keys of the section.

  sampling.module: a frozen dataclass with
    modes -> sampling.Modes
    sample(rng, scores, features, plan) -> sampling.Combinations
  objective.module: a frozen dataclass that is called, or a function
    (scores, old_scores, memory, grid) -> (loss f32[], {name: f32[]})
  rollout.reward: likewise, on the device, for the answers of ONE video
    (rollout.Answers, rollout.Target) -> f32[G]
  or on the host, if it has `on_host = True`
    (question, texts of G answers) -> G numbers
  A reward with `first_token = True` reads the logits of the first token, and
  no more are generated; one with `first_letter = True` reads of `ids` nothing
  behind the first token that `Target.letters` knows, and answers end there; one
  with `graded = False` is 0 or 1, which an adaptive ratio needs.

All work on ONE video. `plan.num_keep` is how many tokens a combination keeps,
`plan.shape.num_keep` the entries of its row. Memory and grid are as in
`policy.objective.loss`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import base_config, errors, extensions
from cacovid_jax.data import rewards as rewards_lib
from cacovid_jax.policy import loading, network, objective, sampling
from cacovid_jax.training import replay, rollout, step


class Seams(NamedTuple):
  """What a config selects."""

  sampler: Any  # Of combinations.
  objective: Callable  # The loss of a video's memory.
  rollout: rollout.RolloutConfig  # How the model answers, what that earns.
  code: dict[str, str]  # {key of the config: sha256} of files of one's own.


def load(config) -> Seams:
  """Returns what a config selects, its options checked; reads no weights."""
  code = {}
  options = {k: v for k, v in config.policy.items() if k != "init"}
  _, digest, _ = loading.find_policy(options)
  if digest:
    code["policy.module"] = digest
  sampler = _make(config, "sampling", sampling.SamplingConfig, code)
  lacking = [x for x in ("modes", "sample") if not hasattr(sampler, x)]
  if lacking:
    raise errors.UserError(
      f"sampling.module={config.sampling.module!r} lacks {lacking[0]}; see"
      " training.seams"
    )
  loss = _make(config, "objective", objective.ObjectiveConfig, code)
  keys = extensions.SECTIONS["rollout"]
  answers = {key: config.rollout[key] for key in keys}
  if extensions.own(config, "rollout"):
    answers["reward"] = _make(config, "rollout", None, code)
  else:
    extensions.fitting(rollout.RolloutConfig, "rollout", config.rollout)
  found = Seams(
    sampler, loss, rollout.RolloutConfig(**answers, rouge=config.rouge), code
  )
  # The bounds at which the ratio moves would mean nothing.
  if config.ratio.adaptive and found.rollout.graded:
    raise errors.UserError(
      f"config.rollout.reward={config.rollout.reward} is graded, and the"
      " adaptive ratio follows the share of right answers; set"
      " config.ratio.adaptive=False, or rollout.reward=accuracy"
    )
  return found


def _make(config, section, usual, code):
  """Returns what a section selects; its sha256 goes into `code`."""
  keys = extensions.SECTIONS[section]
  options = {k: v for k, v in config[section].items() if k not in keys}
  key, spec = keys[0], config[section][keys[0]]
  if not spec:
    return extensions.make(usual, section, options)
  found, digest = extensions.load(spec, f"config.{section}.{key}")
  told = f"config.{section}.{key}={spec!r} is no class or function"
  errors.check(callable(found), told)
  if digest:
    code[f"{section}.{key}"] = digest
  # Options of the paper's that it does not have are not set for it.
  known = base_config.get_config()[section]
  return extensions.make(found, section, options, known)


def check(config, step_config: step.StepConfig, questions) -> None:
  """Stops at a wrong shape or dtype of one's own, before anything compiles."""
  checks = {
    "sampling": _check_sampler,
    "objective": _check_objective,
    "rollout": functools.partial(_check_reward, questions),
  }
  for section, look in checks.items():
    name = extensions.own(config, section)
    if name:
      key = extensions.SECTIONS[section][0]
      look(f"config.{section}.{key}={name!r}", step_config)


def _check_sampler(name, config):
  ladder, modes = config.ladder, config.modes
  bucket, width = ladder.bucket, config.model.config.text.hidden_size
  if len(modes) != 3 or sum(modes) < 1 or min(modes) < 0:
    raise errors.UserError(
      f"{name} has modes {modes!r}; return sampling.Modes with at least one"
      " combination"
    )
  plans = ladder.plans
  if not plans:
    stacked = ladder.rungs(ladder.largest).plans
    plans = [jax.tree.map(lambda leaf: leaf[0], stacked)]
  key = jax.eval_shape(lambda: jax.random.key(0))
  features = _array((bucket.tokens, width), config.model.dtype)
  for plan in plans:
    drawn = jax.eval_shape(
      lambda *given, plan=plan: ladder.sampler.sample(*given, plan),
      key,
      _scores(bucket),
      features,
    )
    index = _array((sum(modes), plan.shape.num_keep), jnp.int32)
    frame_mask = _array((modes.frame, bucket.frames), bool)
    _compare(name, drawn, sampling.Combinations(index, frame_mask))


def _check_objective(name, config):
  ladder = config.ladder

  def loss_of_empty(scores):
    memory = replay.empty(
      scores, modes=config.modes, iterations=config.iterations, rung=0
    )
    grid = ladder.place(ladder.largest)
    return config.objective(scores, scores, memory.rows, grid)

  loss = jax.eval_shape(loss_of_empty, _scores(ladder.bucket))
  is_pair = isinstance(loss, tuple) and len(loss) == 2
  metrics = loss[1] if is_pair and isinstance(loss[1], dict) else ("name",)
  _compare(name, loss, (_array(()), {key: _array(()) for key in metrics}))


def _scores(bucket):
  return network.Scores(_array((bucket.frames, 2)), _array((bucket.tokens, 2)))


def _check_reward(questions, name, config):
  answers, text = config.rollout, config.model.config.text
  count, length = config.ladder.num_combinations, answers.answer_length
  if getattr(answers.function, "on_host", False):
    for question in questions[:1]:  # On empty answers.
      host_reward(answers, question, [""] * count)
    return
  logits = _array((count, text.vocab_size)) if length == 1 else None
  given = rollout.Answers(_array((count, length), jnp.int32), logits)
  # As many letters as a question may have.
  shapes = (), (26,), (text.vocab_size,)
  target = rollout.Target(*[_array(shape, jnp.int32) for shape in shapes])
  rewards = jax.eval_shape(answers.function, given, target)
  _compare(name, rewards, _array((count,)))


def host_reward(config, question, texts: Sequence[str]) -> np.ndarray:
  """Returns f32[G] rewards of the answers to ONE question."""
  if isinstance(config.reward, str):
    return rewards_lib.rewards(
      question.problem_type, texts, question.answer, config.rouge
    )
  rewards = np.asarray(config.function(question, list(texts)))
  if rewards.shape != (len(texts),) or rewards.dtype.kind not in "biuf":
    raise errors.UserError(
      f"config.rollout.reward returns {rewards.dtype}{list(rewards.shape)} for"
      f" question {question.id}; return one number for each of the"
      f" {len(texts)} answers"
    )
  return rewards.astype(np.float32)


def check_code(recorded, code: dict[str, str], accepted: bool) -> None:
  """Stops where code is not that of the checkpoint (None: without a record)."""
  if recorded is None or accepted:
    return
  for key in sorted({*recorded, *code}):
    before, now = recorded.get(key, "none"), code.get(key, "none")
    if before != now:
      raise errors.UserError(
        f"the file of config.{key} is not the one that this run was trained"
        f" with: sha256 {before:.12}, now {now:.12}; restore it, or go on with"
        " --config.ckpt.accept_changed_code=true"
      )


def _array(shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _compare(name, found, wanted) -> None:
  """Stops where a result is not of the shapes and dtypes that it must be."""
  if jax.tree.structure(found) == jax.tree.structure(wanted):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    if all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs):
      return
  raise errors.UserError(
    f"{name} returns {_text(found)}; it must return {_text(wanted)}: reshape or"
    " cast what it returns"
  )


def _text(tree) -> str:
  """Returns a result's shapes and dtypes in one line."""
  if hasattr(tree, "shape"):
    return f"{jnp.dtype(tree.dtype).name}{list(tree.shape)}"
  if isinstance(tree, dict):
    inside = ", ".join(f"{name}: {_text(x)}" for name, x in tree.items())
    return f"{{{inside}}}"
  if isinstance(tree, (tuple, list)):
    return f"({', '.join(map(_text, tree))})"
  return repr(tree)
