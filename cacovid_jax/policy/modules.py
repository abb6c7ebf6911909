"""A policy module by name, one's own included, and its weights on disk.

A policy of one's own is a Linen module in any file, selected by the config
value `path/to/file.py:Class` (or `package.module:Class`):

  class MyPolicy(nn.Module):
    @classmethod
    def from_llm_config(cls, llm, **options): ...  # -> module
    def __call__(self, x, positions, video_rows, grid, length=None): ...
    @nn.nowrap
    def init_from_llm(self, rng, llm_params): ...  # -> params

`__call__` gets ONE prompt and returns `network.Scores`, as `network.Policy`
does. `grid` is (T, H, W), or a `buckets.Grid` where programs serve videos of
different grids; `buckets.as_grid(grid).frame_means` takes either. `options` are
the keys of the config's policy section (`dtype` and `num_halvings` among them;
ignore what does not apply). Parameters under a top-level name `layer` are
trained with the lower rate of pretrained weights, all others with that of the
heads.
"""

import importlib
import importlib.util
import inspect
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, safetensors_io
from cacovid_jax.policy import network

_ENTRY_POINTS = ("from_llm_config", "init_from_llm", "__call__")


def load_policy_module(spec=""):
  """Returns the policy class that a config names; the paper's for "".

  Args:
    spec: `path/to/file.py:Class` or `package.module:Class`.

  Raises:
    UserError: no such file, module or class, or it lacks an entry point.
  """
  if not spec:
    return network.Policy
  source, colon, name = spec.rpartition(":")
  if not colon or not source or not name:
    raise errors.UserError(
      f"policy.module={spec!r} must read path/to/file.py:Class or "
      "package.module:Class"
    )
  module = _import(source, spec)
  found = getattr(module, name, None)
  if not inspect.isclass(found):
    raise errors.UserError(
      f"policy.module={spec!r}: {source} has no class {name}"
    )
  lacking = [entry for entry in _ENTRY_POINTS if not hasattr(found, entry)]
  if lacking:
    raise errors.UserError(
      f"policy.module={spec!r}: {name} lacks {', '.join(lacking)}; see "
      "cacovid_jax/policy/modules.py"
    )
  return found


def _import(source, spec):
  try:
    if not source.endswith(".py"):
      return importlib.import_module(source)
    if not os.path.isfile(source):
      raise errors.UserError(f"policy.module={spec!r}: no file {source}")
    name = "_policy_" + os.path.basename(source)[:-3]
    location = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(location)
    # Dataclasses, hence Linen modules, look their own module up by name.
    sys.modules[name] = module
    location.loader.exec_module(module)
    return module
  except errors.UserError:
    raise
  except Exception as error:
    raise errors.UserError(
      f"policy.module={spec!r}: importing {source} failed with "
      f"{type(error).__name__}: {error}"
    ) from error


def save(path, policy, params, dtype=np.float32):
  """Writes params as safetensors; the paper's policy under public names.

  A policy of one's own is written under its own names, joined by `/`, and in
  its own types.

  Args:
    path: of the file.
    policy: the module.
    params: its parameters.
    dtype: of the paper's policy in the file; float32 loses nothing.
  """
  if isinstance(policy, network.Policy):
    tensors = network.to_public(params, dtype)
  else:
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = {key: np.asarray(leaf) for key, leaf in flat.items()}
  checkpoints.write_safetensors(path, tensors)


def load(path, policy, params=None):
  """Returns params read from a safetensors file.

  Args:
    path: written by `save`, or a public checkpoint's policy: the file, or the
      directory where it lies among the weights of its base model.
    policy: the module.
    params: for a policy of one's own, params (or their shapes) to compare with.

  Raises:
    UserError: unreadable, or tensors missing, left over or misshaped.
  """
  tensors = read(path)
  if isinstance(policy, network.Policy):
    return network.from_public(tensors, policy.config)
  given = {name: tensor.shape for name, tensor in tensors.items()}
  if params is not None:
    flat = traverse_util.flatten_dict(params, sep="/")
    expected = {name: leaf.shape for name, leaf in flat.items()}
    network.check_shapes(given, expected, f"{path}")
  tensors = jax.tree.map(jnp.asarray, tensors)
  return traverse_util.unflatten_dict(tensors, sep="/")


def is_released(directory):
  """Returns whether a checkpoint directory's weights hold a policy."""
  files = (checkpoints.WEIGHTS, checkpoints.INDEX)
  return any(
    os.path.isfile(os.path.join(directory, name)) for name in files
  ) and bool(_released(directory))


def _released(directory):
  """Returns the policy's tensors of a checkpoint directory, unread."""
  return [
    tensor
    for tensor in safetensors_io.list_directory(directory)
    if tensor.name.startswith(checkpoints.POLICY_PREFIX)
  ]


def read(path):
  """Returns {name: array} of a safetensors file.

  Of a checkpoint directory, it is the policy's tensors under public names.
  """
  if os.path.isdir(path):
    found = _released(path)
    if not found:
      raise errors.UserError(
        f"{path}: no tensor of it begins with {checkpoints.POLICY_PREFIX}; name"
        " a checkpoint that holds a policy, or a policy's file"
      )
    return {tensor.name: np.array(tensor.view()) for tensor in found}
  try:
    with safetensors.safe_open(path, framework="numpy") as tensors:
      return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UserError(
      f"{path}: cannot be read as safetensors ({error}); name a file that "
      "training or the public release wrote"
    ) from error
