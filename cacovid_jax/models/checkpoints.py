"""Hugging Face checkpoint directories of the base models, in and out.

A directory holds config.json, generation_config.json, the weights (one
safetensors file, or several with an index) and the tokenizer's files.
config.json's `model_type` decides which model it is. Weights pass through one
readable table per model, source name -> (our path, layout, depth of the stack);
they are compared with it before the first byte of them is read.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding

from cacovid_jax import errors, files
from cacovid_jax.models import (
  hf_config,
  llava_onevision,
  placement,
  qwen2_5_vl,
  safetensors_io,
)
from cacovid_jax.parallel import mesh as mesh_lib

WEIGHTS = safetensors_io.WEIGHTS
INDEX = safetensors_io.INDEX

# What others read and write of a directory without its model.
read_json = hf_config.read_json
read_safetensors = safetensors_io.read_safetensors
write_safetensors = safetensors_io.write_safetensors
weight_files = safetensors_io.weight_files
identity = safetensors_io.identity

# A policy trained by the public code travels with its base model's weights;
# `cacovid_jax.policy` reads it.
POLICY_PREFIX = "compression_policy."

_READABLE = {
  np.dtype(np.float16),
  np.dtype(np.float32),
  np.dtype(np.float64),
  np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A loaded directory; everything generation needs.

  Attributes:
    model: the functions, computing in the dtype asked for.
    params: the weights.
    tokenizer: `data.tokenizer.Tokenizer`, None without a tokenizer.json.
    identity: {"path", "sha256"} of the weights.
    eos_ids: token ids that end an answer.
    pad_id: token id behind the end.
    extra: tensors of the files that no computation of ours reads, {hub name:
      array mapped from the file}: SigLIP's last norm, a second copy of tied
      embeddings, a policy. `save` writes them back.
  """

  model: Any
  params: Any
  tokenizer: Any
  identity: dict[str, str]
  eos_ids: tuple[int, ...]
  pad_id: int
  extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Family:
  """What tells one kind of model from another.

  Attributes:
    config: class of its config.
    model: class of its functions.
    table: config -> {source name: (path, layout, layers)}.
    hub_name: any spelling of a source name -> the table's.
    head: source name of the output embeddings.
    unused: beginnings of source names that no computation reads.
    kernel_shape: config -> sizes of the patch convolution's kernel behind the
      outputs, as the source has them.
    defaults: config -> {source name: array} written where a reader asks for
      what we do not keep.
  """

  config: type
  model: type
  table: Callable[[Any], dict[str, tuple]]
  hub_name: Callable[[str], str]
  head: str
  unused: tuple[str, ...]
  kernel_shape: Callable[[Any], tuple[int, ...]]
  defaults: Callable[[Any], dict[str, np.ndarray]]


def _identity_norm(config):
  """Returns SigLIP's unused norm as one that changes nothing."""
  width = config.vision.hidden_size
  norm = llava_onevision.POST_NORM
  return {
    f"{norm}weight": np.ones(width, np.float32),
    f"{norm}bias": np.zeros(width, np.float32),
  }


_FAMILIES = {
  "llava_onevision": _Family(
    config=llava_onevision.LlavaOnevisionConfig,
    model=llava_onevision.LlavaOnevisionModel,
    table=llava_onevision.weight_table,
    hub_name=llava_onevision.hub_name,
    head="language_model.lm_head.weight",
    unused=(llava_onevision.POST_NORM,),
    kernel_shape=lambda config: (3,) + (config.vision.patch_size,) * 2,
    defaults=_identity_norm,
  ),
  "qwen2_5_vl": _Family(
    config=qwen2_5_vl.Qwen2_5VLConfig,
    model=qwen2_5_vl.Qwen2_5VLModel,
    table=qwen2_5_vl.weight_table,
    hub_name=qwen2_5_vl.hub_name,
    head="lm_head.weight",
    unused=(),
    kernel_shape=lambda config: (
      3,
      config.vision.temporal_patch_size,
      config.vision.patch_size,
      config.vision.patch_size,
    ),
    defaults=lambda config: {},
  ),
}


def load_config(directory):
  """Returns the config of a checkpoint directory's model."""
  path = os.path.join(directory, "config.json")
  described = read_json(path)
  kind = described.get("model_type")
  if kind not in _FAMILIES:
    raise errors.UserError(
      f"{path}: model_type is {kind!r}; give a checkpoint of"
      f" {' or '.join(_FAMILIES)}"
    )
  return _FAMILIES[kind].config.from_hf(described)


def make_model(config, dtype=jnp.float32, backend="auto"):
  """Returns the functions of a config's model, without weights."""
  return _family(config).model(config, jnp.dtype(dtype), backend)


def param_shapes(config):
  """Returns the weights' tree, `jax.ShapeDtypeStruct` in float32 as leaves."""
  return traverse_util.unflatten_dict(
    {
      path: jax.ShapeDtypeStruct(shape, jnp.float32)
      for path, shape in _shapes(config).items()
    },
    sep="/",
  )


def _family(config):
  return next(f for f in _FAMILIES.values() if isinstance(config, f.config))


def load_params(
  directory,
  config,
  dtype=jnp.float32,
  *,
  mesh=None,
  rules=mesh_lib.BASE_MODEL_RULES,
):
  """Returns the weights, layers stacked, where they will be used.

  Args:
    directory: checkpoint directory.
    config: of its model.
    dtype: floating-point type of the parameters; None keeps the files' own.
    mesh: `parallel.mesh`; the default device without.
    rules: how weights are split over the mesh.

  Raises:
    UserError: tensors are missing, unknown, misshaped or not floating point;
      the message lists their names.
  """
  sources, shapes, _ = _plan(directory, config, dtype)
  shardings = None
  if mesh is not None:
    specs = mesh_lib.partition_specs(
      traverse_util.unflatten_dict(shapes, sep="/"), mesh, rules
    )
    shardings = {
      path: NamedSharding(mesh, spec)
      for path, spec in traverse_util.flatten_dict(specs, sep="/").items()
    }
  params = placement.fill(shapes, sources, shardings)
  return traverse_util.unflatten_dict(params, sep="/")


def load_extra(directory, config):
  """Returns {hub name: array mapped from its file}; see `Checkpoint.extra`."""
  return {name: t.view() for name, t in _plan(directory, config)[2].items()}


def _plan(directory, config, dtype=None):
  """Accounts for every tensor of a directory; reads none.

  Returns:
    [placement.Source] in the order of the files, {path: ShapeDtypeStruct} of
    our parameters, {hub name: Tensor} of what no parameter is made of.
  """
  family = _family(config)
  shapes = _shapes(config)

  # Every single tensor that should come: {name: (path, layout, layer)}.
  pending = {}
  for name, (path, layout, layers) in family.table(config).items():
    if layers is None:
      pending[name] = (path, layout, None)
    else:
      for layer in range(layers):
        pending[name.format(layer)] = (path, layout, layer)

  unused = (*family.unused, POLICY_PREFIX)
  if config.text.tie_embeddings:
    unused += (family.head,)  # A second copy of the embedding table.
  sources, extra, unknown, misshaped, not_float = [], {}, [], [], []
  for tensor in safetensors_io.list_directory(directory):
    name = family.hub_name(tensor.name)
    if name.startswith(unused) and name not in extra:
      extra[name] = tensor
      continue
    if name not in pending:
      unknown.append(tensor.name)  # Or one tensor under two spellings.
      continue
    path, layout, layer = pending.pop(name)
    shape = shapes[path] if layer is None else shapes[path][1:]
    expected = _source_shape(layout, shape, family.kernel_shape(config))
    if tensor.shape != expected:
      misshaped.append(f"{tensor.name} {tensor.shape} instead of {expected}")
    elif tensor.dtype not in _READABLE:
      not_float.append(f"{tensor.name} {tensor.dtype or tensor.code}")
    else:
      sources.append(placement.Source(tensor, path, layer, layout))

  problems = [
    f"{kind} {_listed(names)}"
    for kind, names in (
      ("missing", sorted(pending)),
      ("unknown", unknown),
      ("misshaped", misshaped),
      ("not floating point", not_float),
    )
    if names
  ]
  if problems:
    raise errors.UserError(
      f"{directory}: the weights do not fit config.json:"
      f" {'; '.join(problems)}; use the two files of one checkpoint"
    )
  stored = {}
  for source in sources:
    kind = jnp.dtype(dtype or source.tensor.dtype)
    # JAX has no float64 unless asked; no checkpoint needs it.
    kind = jnp.promote_types(stored.get(source.leaf, kind), kind)
    stored[source.leaf] = min(kind, jnp.dtype(jnp.float32), key=_itemsize)
  leaves = {
    path: jax.ShapeDtypeStruct(shape, stored[path])
    for path, shape in shapes.items()
  }
  return sources, leaves, extra


def _itemsize(dtype):
  return dtype.itemsize


def load(
  directory,
  dtype=jnp.float32,
  *,
  mesh=None,
  rules=mesh_lib.BASE_MODEL_RULES,
  backend="auto",
):
  """Returns the `Checkpoint` of a directory.

  Args:
    directory: Hugging Face checkpoint directory.
    dtype: of the weights and of the computation; None keeps the weights in the
      files' own types and computes in that of the embeddings.
    mesh: where the weights go, see `load_params`.
    rules: see `load_params`.
    backend: attention backend, see `models.attention`.
  """
  directory = os.fspath(directory)
  config = load_config(directory)
  eos_ids, pad_id = _ending(directory)
  tokenizer = _tokenizer(directory)
  params = load_params(directory, config, dtype, mesh=mesh, rules=rules)
  dtype = dtype or params["language_model"]["embed_tokens"].dtype
  return Checkpoint(
    model=make_model(config, dtype, backend),
    params=params,
    tokenizer=tokenizer,
    identity=identity(directory),
    eos_ids=eos_ids,
    pad_id=pad_id,
    extra=load_extra(directory, config),
  )


def save(
  directory,
  config,
  params,
  *,
  eos_ids,
  pad_id,
  bos_id=None,
  dtype=None,
  extra=None,
  max_shard_bytes=None,
):
  """Writes config, generation config and weights under the hub's names.

  The caller adds the tokenizer's and the processor's files. Tensors are fetched
  and written one at a time.

  Args:
    directory: made if it does not exist; earlier weights are replaced.
    config: of the model.
    params: the weights.
    eos_ids: token ids that end an answer.
    pad_id: token id behind the end.
    bos_id: token id of a beginning, where the tokenizer has one.
    dtype: floating-point type of the written weights; each parameter's own by
      default.
    extra: {hub name: array} written beside them as they are, such as
      `Checkpoint.extra` or a policy under its public names. What readers ask
      for and nothing uses, SigLIP's last norm, is the identity unless given.
    max_shard_bytes: size at which a new file is begun; None for one file.
  """
  os.makedirs(directory, exist_ok=True)
  dtype = None if dtype is None else jnp.dtype(dtype)
  tensors = _source_tensors(config, params, dtype)
  main = dtype or jnp.dtype(params["language_model"]["embed_tokens"].dtype)
  extra = dict(extra or {})
  for name, array in unused_tensors(config).items():
    if name not in extra:
      extra[name] = array.astype(main)
  if taken := sorted(tensors.keys() & extra.keys()):
    raise ValueError(f"extra names parameters: {', '.join(taken)}")
  for name, array in extra.items():
    array = np.asarray(array)
    make = functools.partial(np.asarray, array)
    tensors[name] = (array.dtype, array.shape, make)

  write_config(
    directory, config, eos_ids=eos_ids, pad_id=pad_id, bos_id=bos_id, dtype=main
  )
  # Last: a directory with weights is complete.
  safetensors_io.write_directory(directory, tensors, max_shard_bytes)


def write_config(directory, config, *, eos_ids, pad_id, bos_id=None, dtype):
  """Writes config.json and generation_config.json; arguments as in `save`."""
  ids = {"eos_token_id": list(eos_ids), "pad_token_id": pad_id}
  if bos_id is not None:
    ids["bos_token_id"] = bos_id
  described = config.to_hf() | {"torch_dtype": jnp.dtype(dtype).name}
  # Where the model keeps its text fields: a section, or the top level.
  described.get("text_config", described).update(ids)
  files.write_json(os.path.join(directory, "config.json"), described)
  files.write_json(
    os.path.join(directory, "generation_config.json"),
    ids | {"do_sample": False},
  )


def source_shapes(config):
  """Returns {hub name: shape} of every tensor that a checkpoint must have."""
  family, shapes = _family(config), _shapes(config)
  kernel_shape = family.kernel_shape(config)
  found = {}
  for name, (path, layout, layers) in family.table(config).items():
    shape = shapes[path]
    if layers is None:
      found[name] = _source_shape(layout, shape, kernel_shape)
    for layer in range(layers or 0):
      one = _source_shape(layout, shape[1:], kernel_shape)
      found[name.format(layer)] = one
  return found


def unused_tensors(config):
  """Returns {hub name: float32 array} of what readers expect and nothing uses.

  SigLIP's last norm, as the identity; see `save`.
  """
  return _family(config).defaults(config)


def _source_tensors(config, params, dtype):
  """Returns {hub name: (dtype, shape, function that makes the array)}."""
  family = _family(config)
  kernel_shape = family.kernel_shape(config)
  leaves = traverse_util.flatten_dict(params, sep="/")
  tensors = {}
  for name, (path, layout, layers) in family.table(config).items():
    leaf = leaves[path]
    stored = dtype or jnp.dtype(leaf.dtype)

    def make(leaf=leaf, layer=None, layout=layout, stored=stored):
      # One layer at a time leaves the device.
      value = np.asarray(leaf if layer is None else leaf[layer])
      value = value.astype(stored, copy=False)
      return placement.to_source(layout, value, kernel_shape)

    shape = leaf.shape if layers is None else leaf.shape[1:]
    shape = _source_shape(layout, shape, kernel_shape)
    if layers is None:
      tensors[name] = (stored, shape, make)
    for layer in range(layers or 0):
      made = functools.partial(make, layer=layer)
      tensors[name.format(layer)] = (stored, shape, made)
  return tensors


def _source_shape(layout, shape, kernel_shape):
  ours = np.broadcast_to(np.float32(0), shape)
  return placement.to_source(layout, ours, kernel_shape).shape


@functools.cache
def _shapes(config):
  """Returns {path: shape} of every parameter."""
  model = make_model(config)
  params = jax.eval_shape(model.init, jax.random.key(0))
  flat = traverse_util.flatten_dict(params, sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


def _ending(directory):
  """Returns (eos_ids, pad_id) of generation_config.json or config.json."""
  config = read_json(os.path.join(directory, "config.json"))
  sources = [config.get("text_config") or {}, config]
  path = os.path.join(directory, "generation_config.json")
  if os.path.exists(path):
    sources.insert(0, read_json(path))

  def first(name):
    found = (source.get(name) for source in sources)
    return next((value for value in found if value is not None), None)

  eos = first("eos_token_id")
  if eos is None:
    raise errors.UserError(f"{path} lacks eos_token_id; add it")
  eos = tuple(eos) if isinstance(eos, list) else (eos,)
  pad = first("pad_token_id")
  return eos, eos[0] if pad is None else pad


def _tokenizer(directory):
  if not os.path.exists(os.path.join(directory, "tokenizer.json")):
    return None
  # Here, so that weights can be read where no prompt is made.
  from cacovid_jax.data import tokenizer as tokenizer_lib

  return tokenizer_lib.Tokenizer.from_directory(directory)


def _listed(names, most=8):
  text = ", ".join(names[:most])
  return text if len(names) <= most else f"{text} and {len(names) - most} more"
