"""Compares the policy with golden files, inputs and outputs of the public code.

A file's kind is the prefix of its name: `policy_*` (with a safetensors file
beside it), `select*`, `sampling*`, `clip_max_probability*`, `density_peaks*`,
`objective*`. Each but the first holds any number of cases: arrays `name_i` and
a JSON list `meta` with the numbers of case i.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors, schema
from cacovid_jax.models import qwen2
from cacovid_jax.parity import stage
from cacovid_jax.policy import (
  diversity,
  loading,
  network,
  objective,
  sampling,
  selection,
)

# Both sides are float32 and sum in different orders.
SCORES = dict(relative=1e-4, tolerance=1e-5)
# Multiplied by 100 at the end.
MODE_SCORES = dict(relative=1e-4, tolerance=1e-4)
PROBABILITIES = dict(relative=1e-5)
LOSSES = dict(relative=1e-5, tolerance=1e-7)
GRADIENTS = dict(relative=1e-5, tolerance=1e-8)
EXACT = {}

# The paper's constants. Golden files bring their own for most of these, so a
# changed default would pass unseen.
_PAPER = {
  sampling.SamplingConfig: dict(
    num_combinations=32, group_size=2, max_group_prob=2.0, min_group_cap=0.1,
    max_group_cap=0.9, max_frame_prob=3.0, frame_ratio=0.125,
    min_token_weight=0.5, max_token_weight=2.0, mass_epsilon=1e-8,
    num_neighbours=4, density_noise=1e-6,
  ),
  objective.ObjectiveConfig: dict(
    clip_low=0.2, clip_high=0.28, kl_weight=0.0, std_epsilon=1e-4,
    weight_epsilon=1e-7,
  ),
  selection.budget: dict(
    importance_ratio=0.5, max_frame_share=1.5, frame_sharpness=3.0,
    min_frame_prob=0.5, by_frame=True,
  ),
}  # fmt: skip


def check(folder):
  """Returns the list of `stage.Stage` of all golden files of a folder.

  None at all, or one that cannot be read as its kind, is a UserError.
  """
  told = f"{folder} is not a folder; name one of golden files"
  errors.check(os.path.isdir(folder), told)
  found = []
  for name in sorted(os.listdir(folder)):
    kind = next((kind for kind in _KINDS if name.startswith(kind)), None)
    if kind and name.endswith(".npz"):
      found.append((kind, os.path.join(folder, name)))
  if not found:
    raise errors.UserError(
      f"{folder} holds no golden file; names start with {', '.join(_KINDS)} "
      "and end in .npz"
    )
  checked = _check_defaults()
  with jax.default_matmul_precision("highest"):
    for kind, path in found:
      for case in _cases(path, kind == "policy_"):
        for name, ours, theirs, tolerance in _KINDS[kind](case):
          name = f"{case.label} {name}"
          checked.append(stage.compare(name, ours, theirs, **tolerance))
  return checked


@dataclasses.dataclass(frozen=True)
class _Case:
  """Arrays and numbers of one case; what it lacks is a user's mistake."""

  path: str
  arrays: Mapping[str, np.ndarray]
  entry: str  # Where the numbers stand.
  numbers: Any
  label: str
  suffix: str = ""

  def array(self, name, *shape):
    """Returns an array; sizes given as None are free."""
    name += self.suffix
    told = f"{self.path} has no array {name}; make the golden file again"
    errors.check(name in self.arrays, told)
    array = self.arrays[name]
    fits = len(shape) == array.ndim and all(
      want in (None, size)
      for want, size in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in "biuf":
      raise errors.UserError(
        f"{self.path}: {name} is {array.dtype}{list(array.shape)}, expected "
        f"numbers of shape {['any' if s is None else s for s in shape]}"
      )
    return array

  def scores(self, num_frames, num_tokens, prefix=""):
    """Returns the `network.Scores` of two arrays."""
    return network.Scores(
      frame=jnp.asarray(self.array(f"{prefix}frame_logits", num_frames, 2)),
      token=jnp.asarray(self.array(f"{prefix}token_logits", num_tokens, 2)),
    )

  def number(self, name, kind=float):
    """Returns a number of the case."""
    known = self.numbers if isinstance(self.numbers, dict) else {}
    where = f"{self.path}: {self.entry}"
    return schema.fit(known.get(name), kind, where, key=name)


def _cases(path, whole):
  """Returns the cases of a file, or the `whole` file as one."""
  arrays = stage.read(path)
  entry, kind = ("config", dict) if whole else ("meta", list[dict])
  errors.check(entry in arrays, f"{path} has no entry {entry}")
  found = schema.parse(str(arrays[entry]), kind, f"{path}: {entry}")
  stem = os.path.basename(path).removesuffix(".npz")
  case = functools.partial(_Case, path, arrays, entry)
  if whole:
    return [case(found, stem)]
  return [case(x, f"{stem}[{i}]", f"_{i}") for i, x in enumerate(found)]


def _check_defaults():
  checked = []
  for owner, paper in _PAPER.items():
    parameters = inspect.signature(owner).parameters
    ours = [parameters[name].default for name in paper]
    label = f"defaults {owner.__module__.rpartition('.')[2]}"
    checked.append(stage.compare(label, ours, list(paper.values())))
  return checked


# Checks yield (name, ours, theirs, tolerances) of the stages of a case.


def _policy(case):
  policy, variables = _read_policy(case)
  grid = tuple(int(size) for size in case.array("grid_thw", 3))
  width = policy.config.llm.hidden_size
  x = case.array("inputs_embeds", 1, None, width)[0]
  mask = case.array("video_mask", 1, len(x))[0].astype(bool)
  if mask.sum() != np.prod(grid):
    raise errors.UserError(
      f"{case.path}: video_mask marks {mask.sum()} rows, the grid {grid} has "
      f"{np.prod(grid)}"
    )
  positions = case.array("position_ids", 1, len(x)).astype(np.int32)
  prompt = (jnp.asarray(x), jnp.asarray(positions), np.flatnonzero(mask))
  run = jax.jit(lambda variables, *p: policy.apply(variables, *p, grid))
  scores = run(variables, *prompt)
  theirs = case.scores(None, None)
  yield "token_logits", scores.token, theirs.token, SCORES
  yield "frame_logits", scores.frame, theirs.frame, SCORES
  # Older public checkpoints do not have the third head.
  if "mode_selection" in variables["params"] and "mode_logits" in case.arrays:
    run = jax.jit(functools.partial(policy.apply, method="mode_scores"))
    theirs = case.array("mode_logits", 1, 3)[0]
    yield "mode_logits", run(variables, *prompt), theirs, MODE_SCORES


def _read_policy(case):
  """Returns (policy, variables) of the weights beside a file."""
  width = case.number("hidden_size", int)
  num_heads = case.number("num_attention_heads", int)
  head_dim = width // max(num_heads, 1)
  if "head_dim" in case.numbers:
    head_dim = case.number("head_dim", int)
  tensors = loading.read(case.path.removesuffix(".npz") + ".safetensors")
  num_layers = sum(
    ".token_compress." in name and name.endswith(".weight") for name in tensors
  )
  llm = qwen2.Qwen2Config(
    vocab_size=1, hidden_size=width, num_layers=1, num_heads=num_heads,
    intermediate_size=case.number("intermediate_size", int),
    num_kv_heads=case.number("num_key_value_heads", int), head_dim=head_dim,
    rope_theta=case.number("rope_theta"),
    rms_norm_eps=case.number("rms_norm_eps"),
  )  # fmt: skip
  config = network.PolicyConfig(llm=llm, num_halvings=max(num_layers - 1, 0))
  params = network.from_public(tensors, config)
  return network.Policy(config), {"params": params}


def _select(case):
  grid = tuple(case.number(side, int) for side in "thw")
  num_tokens = int(np.prod(grid))
  names = ("importance_ratio", "max_frame_ratio")
  ratios = {name: case.number(name) for name in names}
  budget = selection.budget(grid, case.number("retention_ratio"), **ratios)
  index = jax.jit(selection.select)(case.scores(grid[0], num_tokens), budget)
  keep = np.isin(np.arange(num_tokens), index)
  yield "keep", keep, case.array("keep", num_tokens), EXACT


def _sampling(case):
  num_tokens = case.number("num_tokens", int)
  fields = ("group_size", "max_group_prob")
  fields = {name: case.number(name) for name in fields}
  config = sampling.SamplingConfig(**fields)
  ratio = case.number("retention_ratio")
  plan = sampling.plan((1, 1, num_tokens), ratio, config)
  for name, ours in (
    ("num_groups", plan.group_cap.size),
    ("group_cap", plan.group_cap.cap),
    ("num_draws", plan.tokens_per_frame),
  ):
    if name in case.numbers:
      yield name, ours, case.number(name), PROBABILITIES
  rank = jax.jit(functools.partial(sampling.rank_groups, plan=plan))
  scores = case.array("token_scores", num_tokens, 2)
  groups = jax.device_get(rank(jnp.asarray(scores)))
  weights = np.zeros((len(groups.probs), num_tokens), np.float32)
  rows = np.arange(len(weights))[:, None]
  np.add.at(weights, (rows, groups.tokens), groups.weights)
  expected = case.array("group_probs", None)
  yield "group_probs", groups.probs, expected, PROBABILITIES
  expected = case.array("token_weights", None, num_tokens)
  yield "token_weights", weights, expected, PROBABILITIES


def _cap(case):
  size = case.number("n", int)
  cap = sampling.ProbabilityCap.of(size, case.number("max_prob"))
  flatten = jax.jit(functools.partial(sampling.capped_distribution, cap=cap))
  capped = flatten(jnp.asarray(case.array("p", size)))
  yield "q", capped, case.array("q", size), PROBABILITIES


def _diversity(case):
  size, width = case.number("n", int), case.number("d", int)
  features = jnp.asarray(case.array("x", size, width))
  peaks = jax.jit(diversity.density_peaks, static_argnums=1)
  keep = np.isin(np.arange(size), peaks(features, case.number("k", int)))
  yield "keep", keep, case.array("keep", size), EXACT


def _objective(case):
  num_tokens, num_frames = case.number("n", int), case.number("t", int)
  memory = {}
  for mode, size in (("token", num_tokens), ("frame", num_frames)):
    rows = case.number(f"g_{mode}", int)
    mask = case.array(f"{mode}_mask", rows, size).astype(bool)
    reward = case.array(f"{mode}_reward", rows).astype(np.float32)
    memory |= {f"{mode}_mask": mask, f"{mode}_reward": reward}
    memory[f"{mode}_valid"] = np.ones(rows, bool)
  numbers = map(case.number, ("eps_low", "eps_high", "kl_weight"))
  names = ("clip_low", "clip_high", "kl_weight")
  config = objective.ObjectiveConfig(**dict(zip(names, numbers, strict=True)))
  loss = functools.partial(objective.loss, config=config)
  new, old = (case.scores(num_frames, num_tokens, x) for x in ("new_", "old_"))
  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (total, metrics), grads = run(new, old, objective.Memory(**memory))
  losses = {name: metrics[name] for name in ("token_loss", "frame_loss")}
  for name, value in (losses | {"loss": total}).items():
    yield name, value, case.array(name), LOSSES
  for name, size in (("token", num_tokens), ("frame", num_frames)):
    expected = case.array(f"grad_{name}_logits", size, 2)
    yield f"grad_{name}", getattr(grads, name), expected, GRADIENTS


_KINDS = {
  "policy_": _policy,
  "select": _select,
  "sampling": _sampling,
  "clip_max_probability": _cap,
  "density_peaks": _diversity,
  "objective": _objective,
}
