"""Compares the policy with golden files, inputs and outputs of the public code.

A file's kind is the prefix of its name: `policy_*` (with a safetensors file
beside it), `select*`, `sampling*`, `clip_max_probability*`, `density_peaks*`,
`objective*`. Each but the first holds any number of cases: arrays `name_i` and
a JSON list `meta` with the numbers of case i.

A stage's error is taken where it lies closest to, or furthest beyond, what is
allowed at that entry: absolute tolerance + relative tolerance * |expected|.
"""

import functools
import inspect
import json
import os
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
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


class Tolerance(NamedTuple):
  """Both sides are float32 and sum in different orders."""

  relative: float
  absolute: float = 0.0


SCORES = Tolerance(1e-4, 1e-5)
# Multiplied by 100 at the end.
MODE_SCORES = Tolerance(1e-4, 1e-4)
PROBABILITIES = Tolerance(1e-5)
LOSSES = Tolerance(1e-5, 1e-7)
GRADIENTS = Tolerance(1e-5, 1e-8)
EXACT = Tolerance(0.0)

# The paper's constants. Golden files bring their own for most of these, so a
# changed default would pass unseen.
_PAPER = {
  sampling.SamplingConfig: dict(
    num_combinations=32,
    group_size=2,
    max_group_prob=2.0,
    min_group_cap=0.1,
    max_group_cap=0.9,
    max_frame_prob=3.0,
    frame_ratio=0.125,
    min_token_weight=0.5,
    max_token_weight=2.0,
    mass_epsilon=1e-8,
    num_neighbours=4,
    density_noise=1e-6,
  ),
  objective.ObjectiveConfig: dict(
    clip_low=0.2,
    clip_high=0.28,
    kl_weight=0.0,
    std_epsilon=1e-4,
    weight_epsilon=1e-7,
  ),
  selection.budget: dict(
    importance_ratio=0.5,
    max_frame_share=1.5,
    frame_sharpness=3.0,
    min_frame_prob=0.5,
  ),
}


def check(folder):
  """Returns the list of `stages.Stage` of all golden files of a folder.

  Raises:
    UserError: no golden file there, or one that cannot be read as its kind.
  """
  if not os.path.isdir(folder):
    raise errors.UserError(
      f"{folder} is not a folder; name one of golden files"
    )
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
      checked += _KINDS[kind](_File(path))
  return checked


class _File:
  """A golden file; what it lacks is a user's mistake."""

  def __init__(self, path):
    self.path = path
    self.stem = os.path.basename(path)[: -len(".npz")]
    try:
      with np.load(path, allow_pickle=False) as arrays:
        self._arrays = {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise errors.UserError(
        f"{path} cannot be read ({error}); make the golden file again"
      ) from error

  def array(self, name, *shape):
    """Returns an array; sizes given as None are free."""
    if name not in self._arrays:
      raise errors.UserError(
        f"{self.path} has no array {name}; make the golden file again"
      )
    array = self._arrays[name]
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

  def has(self, name):
    return name in self._arrays

  def record(self, name, kind):
    """Returns the dict or list (`kind`) of a JSON entry."""
    if name not in self._arrays:
      raise errors.UserError(f"{self.path} has no entry {name}")
    try:
      value = json.loads(str(self._arrays[name]))
    except json.JSONDecodeError as error:
      raise errors.UserError(
        f"{self.path}: {name} is not JSON ({error})"
      ) from error
    if not isinstance(value, kind):
      raise errors.UserError(f"{self.path}: {name} is not a {kind.__name__}")
    return value

  def cases(self):
    """Yields (label, case): one for each entry of the meta list."""
    for i, meta in enumerate(self.record("meta", list)):
      yield f"{self.stem}[{i}]", _Case(self, i, meta)


class _Case:
  """Arrays and numbers of one case of a file."""

  def __init__(self, file, index, meta):
    self._file, self._index, self._meta = file, index, meta

  def array(self, name, *shape):
    return self._file.array(f"{name}_{self._index}", *shape)

  def has(self, name):
    return name in self._meta

  def number(self, name, kind=float):
    return _number(self._meta, name, kind, f"{self._file.path}: meta")


def _number(record, name, kind, where):
  value = record.get(name) if isinstance(record, dict) else None
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise errors.UserError(f"{where} has no number {name}")
  if kind is int and value != int(value):
    raise errors.UserError(f"{where}: {name}={value} is not whole")
  return kind(value)


def _compare(name, actual, expected, tolerance=EXACT):
  """Returns the Stage of two arrays."""
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(expected, np.float64)
  if actual.shape != expected.shape:
    return stage.Stage(name, float("inf"), tolerance.absolute, False)
  if not expected.size:
    return stage.Stage(name, 0.0, tolerance.absolute, True)
  error = np.where(actual == expected, 0.0, np.abs(actual - expected))
  error = np.where(np.isfinite(error), error, np.inf).reshape(-1)
  allowed = tolerance.absolute + tolerance.relative * np.abs(expected)
  allowed = allowed.reshape(-1)
  worst = np.argmax(np.where(error > 0, error / np.maximum(allowed, 1e-300), 0))
  return stage.Stage(
    name,
    float(error[worst]),
    float(allowed[worst]),
    bool((error <= allowed).all()),
  )


def _check_defaults():
  checked = []
  for owner, paper in _PAPER.items():
    parameters = inspect.signature(owner).parameters
    ours = [parameters[name].default for name in paper]
    label = f"defaults {owner.__module__.rpartition('.')[2]}"
    checked.append(_compare(label, ours, list(paper.values())))
  return checked


def _check_policy(file):
  record = file.record("config", dict)
  config = functools.partial(_number, record, where=f"{file.path}: config")
  width = config("hidden_size", kind=int)
  num_heads = config("num_attention_heads", kind=int)
  head_dim = width // max(num_heads, 1)
  if "head_dim" in record:
    head_dim = config("head_dim", kind=int)
  tensors = loading.read(file.path[: -len(".npz")] + ".safetensors")
  layers = [
    name
    for name in tensors
    if ".token_compress." in name and name.endswith(".weight")
  ]
  policy_config = network.PolicyConfig(
    llm=qwen2.Qwen2Config(
      vocab_size=1,
      hidden_size=width,
      intermediate_size=config("intermediate_size", kind=int),
      num_layers=1,
      num_heads=num_heads,
      num_kv_heads=config("num_key_value_heads", kind=int),
      head_dim=head_dim,
      rope_theta=config("rope_theta", kind=float),
      rms_norm_eps=config("rms_norm_eps", kind=float),
    ),
    num_halvings=max(len(layers) - 1, 0),
  )
  policy = network.Policy(policy_config)
  variables = {"params": network.from_public(tensors, policy_config)}

  grid = tuple(int(size) for size in file.array("grid_thw", 3))
  x = file.array("inputs_embeds", 1, None, width)[0]
  length = x.shape[0]
  mask = file.array("video_mask", 1, length)[0].astype(bool)
  if mask.sum() != np.prod(grid):
    raise errors.UserError(
      f"{file.path}: video_mask marks {mask.sum()} rows, the grid {grid} has "
      f"{np.prod(grid)}"
    )
  positions = file.array("position_ids", 1, length).astype(np.int32)
  prompt = (jnp.asarray(x), jnp.asarray(positions), np.flatnonzero(mask))
  run = jax.jit(lambda variables, *p: policy.apply(variables, *p, grid))
  scores = run(variables, *prompt)
  token = file.array("token_logits", None, 2)
  frame = file.array("frame_logits", None, 2)
  checked = [
    _compare(f"{file.stem} token_logits", scores.token, token, SCORES),
    _compare(f"{file.stem} frame_logits", scores.frame, frame, SCORES),
  ]
  # Older public checkpoints do not have the third head.
  if "mode_selection" in variables["params"] and file.has("mode_logits"):
    run = jax.jit(functools.partial(policy.apply, method="mode_scores"))
    mode = run(variables, *prompt)
    checked.append(
      _compare(
        f"{file.stem} mode_logits",
        mode,
        file.array("mode_logits", 1, 3)[0],
        MODE_SCORES,
      )
    )
  return checked


def _check_select(file):
  checked = []
  for label, case in file.cases():
    grid = tuple(case.number(side, int) for side in "thw")
    num_tokens = int(np.prod(grid))
    budget = selection.budget(
      grid,
      case.number("retention_ratio"),
      importance_ratio=case.number("importance_ratio"),
      max_frame_ratio=case.number("max_frame_ratio"),
    )
    scores = network.Scores(
      frame=jnp.asarray(case.array("frame_logits", grid[0], 2)),
      token=jnp.asarray(case.array("token_logits", num_tokens, 2)),
    )
    index = jax.jit(selection.select)(scores, budget)
    keep = sampling.token_masks(index, num_tokens)
    checked.append(
      _compare(f"{label} keep", keep, case.array("keep", num_tokens))
    )
  return checked


def _check_sampling(file):
  checked = []
  for label, case in file.cases():
    num_tokens = case.number("num_tokens", int)
    plan = sampling.plan(
      (1, 1, num_tokens),
      case.number("retention_ratio"),
      sampling.SamplingConfig(
        group_size=case.number("group_size"),
        max_group_prob=case.number("max_group_prob"),
      ),
    )
    for name, ours, kind in (
      ("num_groups", plan.group_cap.size, int),
      ("group_cap", plan.group_cap.cap, float),
      ("num_draws", plan.tokens_per_frame, int),
    ):
      if case.has(name):
        expected = case.number(name, kind)
        checked.append(
          _compare(f"{label} {name}", ours, expected, PROBABILITIES)
        )
    rank = jax.jit(functools.partial(sampling.rank_groups, plan=plan))
    scores = case.array("token_scores", num_tokens, 2)
    groups = jax.device_get(rank(jnp.asarray(scores)))
    weights = np.zeros((len(groups.probs), num_tokens), np.float32)
    rows = np.arange(len(weights))[:, None]
    np.add.at(weights, (rows, groups.tokens), groups.weights)
    probs = case.array("group_probs", None)
    expected = case.array("token_weights", None, num_tokens)
    checked += [
      _compare(f"{label} group_probs", groups.probs, probs, PROBABILITIES),
      _compare(f"{label} token_weights", weights, expected, PROBABILITIES),
    ]
  return checked


def _check_cap(file):
  checked = []
  for label, case in file.cases():
    size = case.number("n", int)
    cap = sampling.ProbabilityCap.of(size, case.number("max_prob"))
    flatten = jax.jit(functools.partial(sampling.capped_distribution, cap=cap))
    capped = flatten(jnp.asarray(case.array("p", size)))
    expected = case.array("q", size)
    checked.append(_compare(f"{label} q", capped, expected, PROBABILITIES))
  return checked


def _check_diversity(file):
  checked = []
  for label, case in file.cases():
    size, width = case.number("n", int), case.number("d", int)
    features = jnp.asarray(case.array("x", size, width))
    peaks = jax.jit(diversity.density_peaks, static_argnums=1)
    index = peaks(features, case.number("k", int))
    keep = sampling.token_masks(index, size)
    checked.append(_compare(f"{label} keep", keep, case.array("keep", size)))
  return checked


def _check_objective(file):
  checked = []
  for label, case in file.cases():
    num_tokens, num_frames = case.number("n", int), case.number("t", int)
    rows = case.number("g_token", int), case.number("g_frame", int)
    new, old = (
      network.Scores(
        frame=jnp.asarray(case.array(f"{age}_frame_logits", num_frames, 2)),
        token=jnp.asarray(case.array(f"{age}_token_logits", num_tokens, 2)),
      )
      for age in ("new", "old")
    )
    memory = objective.Memory(
      token_mask=case.array("token_mask", rows[0], num_tokens).astype(bool),
      token_reward=case.array("token_reward", rows[0]).astype(np.float32),
      token_valid=np.ones(rows[0], bool),
      frame_mask=case.array("frame_mask", rows[1], num_frames).astype(bool),
      frame_reward=case.array("frame_reward", rows[1]).astype(np.float32),
      frame_valid=np.ones(rows[1], bool),
    )
    config = objective.ObjectiveConfig(
      clip_low=case.number("eps_low"),
      clip_high=case.number("eps_high"),
      kl_weight=case.number("kl_weight"),
    )
    loss = functools.partial(objective.loss, config=config)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, metrics), grads = step(new, old, memory)
    token_grad = case.array("grad_token_logits", num_tokens, 2)
    frame_grad = case.array("grad_frame_logits", num_frames, 2)
    checked += [
      _compare(f"{label} {name}", ours, case.array(name), LOSSES)
      for name, ours in (
        ("token_loss", metrics["token_loss"]),
        ("frame_loss", metrics["frame_loss"]),
        ("loss", total),
      )
    ]
    checked += [
      _compare(f"{label} grad_token", grads.token, token_grad, GRADIENTS),
      _compare(f"{label} grad_frame", grads.frame, frame_grad, GRADIENTS),
    ]
  return checked


_KINDS = {
  "policy_": _check_policy,
  "select": _check_select,
  "sampling": _check_sampling,
  "clip_max_probability": _check_cap,
  "density_peaks": _check_diversity,
  "objective": _check_objective,
}
