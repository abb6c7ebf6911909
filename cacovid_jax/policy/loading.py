"""A policy by name, one's own included, and from its files on disk.

A policy of one's own is a Linen module, selected by the config value
`path/to/file.py:Class` (or `package.module:Class`). A policy_config.json says
which one a policy was trained with; it is run only if whoever loads the policy
names it, too: `PATH?module=path/to/file.py:Class`.

  class MyPolicy(nn.Module):
    @classmethod
    def from_llm_config(cls, llm, **options): ...  # -> module
    # May declare a keyword `ratio`: scores then are of a retention ratio.
    def __call__(self, x, positions, video_rows, grid, length=None): ...
    @nn.nowrap
    def init_from_llm(self, rng, llm_params): ...  # -> params
    @nn.nowrap  # May be absent: params as evaluations hold them.
    def for_inference(self, params): ...  # -> params

`__call__` gets ONE prompt and returns `network.Scores`. `grid` is (T, H, W), or
a `TokenGrid` where programs serve videos of different grids;
`TokenGrid.of(grid).frame_means` takes either. `options` are the keys of the
config's policy section (`dtype` and `num_halvings` among them; ignore what does
not apply). Parameters under a top-level name `layer` are trained with the lower
rate of pretrained weights, all others with that of the heads.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import traverse_util

from cacovid_jax import config_limits, errors, extensions, files, schema
from cacovid_jax.models import checkpoints, hub, safetensors_io
from cacovid_jax.policy import network

CONFIG = "policy_config.json"
_log = logging.getLogger(__name__)
_ENTRY_POINTS = ("from_llm_config", "init_from_llm", "__call__")


class _BaseModel(msgspec.Struct):
  sha256: str | None = None


class _Described(msgspec.Struct):
  """What policy_config.json says and loading needs."""

  policy: dict = {}
  ratios: list[float] = []  # That it was trained at.
  base_model: _BaseModel = msgspec.field(default_factory=_BaseModel)
  weights_sha256: dict[str, list[str]] = {}
  module_sha256: str | None = None


class Training(msgspec.Struct):
  """What policy_config.json says of a policy's training."""

  ratios: list[float] = []
  # Of all videos (T, H, W), or the sizes of each bucket.
  grid: list[int | list[int]] = []


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedPolicy:
  """A policy with its weights."""

  module: Any  # Linen module, applied as `network.Policy` is.
  params: Any  # Trained parameters.
  identity: str = ""  # Digest of the parameters, as the file has them.
  ratios: tuple[float, ...] = ()  # That it was trained at; empty if unknown.

  @classmethod
  def of(cls, module, params, identity="", ratios=()):
    """Returns the policy with `for_inference` of params, where it has one."""
    cast = getattr(module, "for_inference", lambda params: params)
    return cls(module, cast(params), identity, tuple(ratios))

  def check_ratio(self, name: str, ratio: float) -> None:
    """Warns, once, of a ratio that it reads and was not trained around."""
    if not self.ratios or not network.reads_ratio(self.module):
      return
    low, high = min(self.ratios), max(self.ratios)
    if not low <= ratio <= high:
      _warn_once(
        f"policy {name!r} reads the ratio and was trained from {low:g} to"
        f" {high:g}: its scores at {ratio:g} are a guess"
      )


@functools.cache
def _warn_once(text: str) -> None:
  _log.warning(text)


def find_policy(options, where="config") -> tuple[type, str, dict[str, Any]]:
  """Returns a policy's class, its file's sha256, and the options it takes."""
  options = dict(options)
  config_limits.check({"policy": options}, where)
  spec = options.pop("module", "")
  if spec in extensions.BUILT_IN:
    return network.Policy, "", options
  found, digest = extensions.load(spec, "policy.module")
  if not inspect.isclass(found):
    raise errors.UserError(f"policy.module {spec!r} is no class")
  lacking = [name for name in _ENTRY_POINTS if not hasattr(found, name)]
  if lacking:
    raise errors.UserError(
      f"policy.module {spec!r} lacks {', '.join(lacking)}; see policy.loading"
    )
  known = extensions.SECTIONS["policy"]
  return found, digest, extensions.fitting(found, "policy", options, known)


def make_policy(llm, options, *, where="config", dtype=None):
  """Returns the policy of a language model's config, and its file's sha256.

  Options are the section's without `init`, from `where`; `dtype` replaces one.
  """
  found, digest, options = find_policy(options, where)
  if "dtype" in options:
    options["dtype"] = jnp.dtype(options["dtype"]) if dtype is None else dtype
  try:
    return found.from_llm_config(llm, **options), digest
  except TypeError as error:
    raise errors.UserError(
      f"{where}: {found.__name__} takes other options: {errors.one_line(error)}"
    ) from error


def load_policy(spec: str | os.PathLike, checkpoint) -> LoadedPolicy:
  """Returns a policy that training exported, for the base model it had.

  `spec` is a safetensors file; or a folder (or a training workdir that holds
  `policy/`), whose `best.safetensors` is taken if validation chose one, else
  `policy.safetensors`; or a checkpoint directory with the public policy among
  its weights. `?module=NAME` behind it names one's own module.
  """
  path, module = split(spec)
  file = _find_policy(pathlib.Path(path))
  if file is None:
    raise errors.UserError(
      f"there is no policy in {path}; give the workdir of a finished training"
      " run, or a .safetensors file"
    )
  config = (file if file.is_dir() else file.parent) / CONFIG
  described = _Described()
  if config.is_file():
    described = schema.read(config, _Described)
    config_limits.check({"policy": described.policy}, config)
  trained_with = described.base_model.sha256
  if trained_with not in (None, checkpoint.identity["sha256"]):
    raise errors.UserError(
      f"policy {path} was trained with another base model; give that one's"
      " --checkpoint"
    )
  options = dict(described.policy)
  recorded = options.get("module", "")
  if not module and recorded not in extensions.BUILT_IN:
    raise errors.UserError(
      f"policy {path} was trained with {recorded!r}, and a file of data runs no"
      f" code: give --policy={path}?module={recorded!r} if you trust it"
    )
  if module:
    options["module"] = module
  elif not options:
    options = _sizes(file)
  # The dtype of the base model here, not of the accelerator it was trained on.
  llm, dtype = checkpoint.model.config.text, checkpoint.model.dtype
  policy, digest = make_policy(llm, options, where=config, dtype=dtype)
  identity = _identity(file, described.weights_sha256)
  before = described.module_sha256
  if digest and before not in (None, digest):
    _log.warning(
      f"policy {path} was trained with another text of {options['module']}:"
      f" sha256 {before:.12}, now {digest:.12}"
    )
  params = load(file, policy)
  return LoadedPolicy.of(policy, params, identity, described.ratios)


def split(spec: str | os.PathLike) -> tuple[str, str]:
  """Returns the path and the module of `PATH?module=NAME`; "" for no module.

  The path may be the name of a checkpoint in the Hugging Face cache.
  """
  path, _, module = os.fspath(spec).partition("?module=")
  return hub.find(path), module


def has_policy(spec: str | os.PathLike) -> bool:
  """Returns whether `spec` is, or holds, an exported policy."""
  path, _ = split(spec)
  return bool(path) and _find_policy(pathlib.Path(path)) is not None


def description(spec: str | os.PathLike) -> Training | None:
  """Returns what policy_config.json says of a policy; None without one."""
  file = _find_policy(pathlib.Path(split(spec)[0]))
  path = file and (file if file.is_dir() else file.parent) / CONFIG
  return schema.read(path, Training) if path and path.is_file() else None


def _find_policy(path: pathlib.Path) -> pathlib.Path | None:
  names = ("best.safetensors", "policy.safetensors")
  inside = [path / part / name for part in ("", "policy") for name in names]
  found = next(filter(os.path.isfile, (path, *inside)), None)
  # The public release keeps it among the base model's weights.
  return found or (path if _released(path) else None)


def _identity(file: pathlib.Path, known: dict[str, list[str]]) -> str:
  """Returns the sha256 of a policy's weights, compared with the recorded."""
  if not file.is_file():
    return checkpoints.identity(os.fspath(file))["sha256"]
  found = files.sha256(file)
  recorded = known.get(file.name)
  if recorded is None:
    _log.info(f"{file}: read unverified, no sha256 of it is recorded beside it")
  elif found not in recorded:
    raise errors.UserError(
      f"{file} is not what training wrote: its sha256 {found:.12} is not among"
      " weights_sha256 of the policy_config.json beside it; copy the folder"
      " again, or export it again by resuming the run"
    )
  return found


def _sizes(file: pathlib.Path) -> dict[str, int]:
  """Returns the options of a policy in a file of the public format."""
  layer = re.compile(r"compression_policy\.token_compress\..*\.weight")
  tensors = read(file)
  count = sum(map(bool, map(layer.fullmatch, tensors)))
  if not count:
    raise errors.UserError(
      f"{file} holds no policy under the public names, and no"
      " policy_config.json lies beside it"
    )
  found = {"num_halvings": count - 1}
  if (name := network.OWN["budget"]) in tensors:
    found["budget_embedding"] = tensors[name].shape[-1] // 2
  if network.OWN["frame_residual"] in tensors:
    found["frame_residual"] = True
  return found


def save(path, policy, params, dtype=np.float32):
  """Writes params as safetensors.

  The paper's policy under public names in `dtype`, of which float32 loses
  nothing; one's own under its own names, joined by `/`, in its own types.
  """
  if isinstance(policy, network.Policy):
    tensors = network.to_public(params, dtype)
  else:
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = {key: np.asarray(leaf) for key, leaf in flat.items()}
  safetensors_io.write_safetensors(path, tensors)


def export(path: pathlib.Path, policy, params, described) -> None:
  """Writes weights, and beside them a policy_config.json with their sha256.

  The config comes first and lists the earlier files' sha256, too: whenever a
  kill comes, the weights that are there are among those listed.
  """
  files.make_folder(path.parent)
  config, known = path.parent / CONFIG, {}
  with contextlib.suppress(errors.UserError):  # None, or one to write anew.
    known = schema.read(config, _Described).weights_sha256
  if path.is_file() and path.name not in known:  # Of an earlier version.
    known = {**known, path.name: [files.sha256(path)]}
  with files.replacing(path) as partial:
    save(partial, policy, params)
    digests = dict.fromkeys([files.sha256(partial), *known.get(path.name, [])])
    known = {**known, path.name: list(digests)[:3]}
    files.write_json(config, {**described, "weights_sha256": known})


def lend(folder: pathlib.Path, to: pathlib.Path) -> None:
  """Copies an exported policy, for another base model than its own."""
  shutil.copytree(folder, to, dirs_exist_ok=True)
  described = schema.read(to / CONFIG)
  files.write_json(to / CONFIG, described | {"base_model": {}})


def load(path, policy, params=None):
  """Returns params as `save` wrote them, or as a public checkpoint holds them.

  Of one's own, shapes are compared with those of `params`, which training
  starts from; there a policy without one of `network.OWN` has it of zeros. What
  is unreadable, or has tensors missing, left over or misshaped, is a UserError.
  """
  tensors = read(path)
  if isinstance(policy, network.Policy):
    for own in network.OWN.keys() & (params or {}).keys():
      zeros = np.zeros(params[own]["kernel"].shape[::-1], np.float32)
      tensors.setdefault(network.OWN[own], zeros)
    return network.from_public(tensors, policy.config)
  if params is not None:
    flat = traverse_util.flatten_dict(params, sep="/")
    shapes = [{k: x.shape for k, x in tree.items()} for tree in (tensors, flat)]
    network.check_shapes(*shapes, f"{path}")
  tensors = jax.tree.map(jnp.asarray, tensors)
  return traverse_util.unflatten_dict(tensors, sep="/")


def _released(directory):
  """Returns the policy's tensors of a checkpoint directory, unread."""
  names = (safetensors_io.WEIGHTS, safetensors_io.INDEX)
  if not any(os.path.isfile(os.path.join(directory, name)) for name in names):
    return []
  found = safetensors_io.list_directory(directory)
  return [x for x in found if x.name.startswith(checkpoints.POLICY_PREFIX)]


def read(path):
  """Returns {name: array} of a file, or of a checkpoint directory's policy."""
  if os.path.isdir(path):
    found = _released(path)
    if not found:
      raise errors.UserError(
        f"{path}: no tensor of it begins with {checkpoints.POLICY_PREFIX}; name"
        " a checkpoint that holds a policy, or a policy's file"
      )
  else:
    mend = "name a file that training or the public release wrote"
    found = safetensors_io.list_tensors(path, mend)
  return {tensor.name: np.array(tensor.view()) for tensor in found}
