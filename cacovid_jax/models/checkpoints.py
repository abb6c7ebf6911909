"""Hugging Face checkpoint directories of the base models, in and out.

Weights pass through one readable table per model, source name -> (our path,
layout, depth of the stack); they are compared with it before the first byte of
them is read.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding

from cacovid_jax import errors, files, schema
from cacovid_jax.models import (
  hf_config,
  hub,
  llava_onevision,
  placement,
  qwen2_5_vl,
  qwen3_vl,
  safetensors_io,
)
from cacovid_jax.models import layers as layers_lib
from cacovid_jax.parallel import mesh as mesh_lib

read_json = hf_config.read_json
identity = safetensors_io.identity

# A policy trained by the public code travels with its base model's weights;
# `cacovid_jax.policy` reads it.
POLICY_PREFIX = "compression_policy."

_READABLE = ("F16", "BF16", "F32", "F64")
_COMPARED_ROWS = 4096  # Of two tables, at a time.
# Ends of names of buffers that old writers kept: they follow from config.json.
_BUFFERS = (
  "rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached",
  "rotary_emb.sin_cached", "embeddings.position_ids",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A loaded directory; everything generation needs."""

  model: Any  # `video_llm.VideoLLM`, computing in the dtype asked for.
  params: Any  # The weights.
  tokenizer: Any  # `data.tokenizer.Tokenizer`, None without a tokenizer.json.
  identity: dict[str, str]  # {"path", "sha256"} of the weights.
  eos_ids: tuple[int, ...]  # Token ids that end an answer.
  pad_id: int  # Token id behind the end.
  # Tensors of the files that no computation of ours reads, {hub name: array
  # mapped from the file}: SigLIP's last norm, a second copy of tied embeddings,
  # a policy. `save` writes them back.
  extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


# By config.json's `model_type`. A module has CONFIG and MODEL, its classes;
# `weight_table(config)`, see `placement.rows`; `hub_name`, which turns any
# spelling of a source name into the table's; HEAD, the source name of the
# output embeddings; POST_NORM, where names begin of a norm that nothing reads.
_MODULES = (llava_onevision, qwen2_5_vl, qwen3_vl)
_FAMILIES = {x.__name__.rpartition(".")[2]: x for x in _MODULES}
# Parts of kinds that one could take for these, and why they are not.
_RELATED = {
  "qwen3_vl_moe": "a mixture of experts, unlike the dense Qwen3-VL",
  "qwen3_5": "a decoder of linear attention, unlike Qwen3-VL's",
}


class _Entry(NamedTuple):
  """One tensor that a checkpoint must have, and what it fills of ours."""

  path: str
  layout: str  # Of `placement.to_ours`.
  layer: int | None  # Place in a stack; None for a parameter of its own.
  shape: tuple[int, ...]  # Of the tensor.


class _Ending(msgspec.Struct):
  """What a config.json or generation_config.json says of an answer's end."""

  eos_token_id: schema.Size | list[schema.Size] | None = None
  pad_token_id: schema.within(int, -1, 2**31 - 1) | None = None


@functools.cache
def _entries(config) -> dict[str, _Entry]:
  """Returns {hub name: `_Entry`}."""
  shapes, found = _shapes(config), {}
  table = _family(config).weight_table(config)
  for name, (path, layout, layers) in table.items():
    shape = shapes[path] if layers is None else shapes[path][1:]
    ours = np.broadcast_to(np.float32(0), shape)
    theirs = placement.to_source(layout, ours, config.vision.kernel_shape)
    for layer in [None] if layers is None else range(layers):
      found[name.format(layer)] = _Entry(path, layout, layer, theirs.shape)
  return found


def load_config(directory):
  """Returns the model's config of a directory, or of a name in the cache."""
  path = os.path.join(hub.directory(directory), "config.json")
  described = read_json(path)
  kind = described.get("model_type")
  if not isinstance(kind, str) or kind not in _FAMILIES:
    told = [f" ({why})" for part, why in _RELATED.items() if part in str(kind)]
    raise errors.UserError(
      f"{path}: model_type is {kind!r}{''.join(told)}; give a checkpoint of"
      f" {' or '.join(_FAMILIES)}"
    )
  try:
    return _FAMILIES[kind].CONFIG.from_hf(described)
  except errors.UserError as error:
    told = str(error).replace("config.json", path, 1)
    raise errors.UserError(told) from error


def make_model(config, dtype=jnp.float32, backend="auto"):
  """Returns the functions of a config's model, without weights."""
  return _family(config).MODEL(config, jnp.dtype(dtype), backend)


def param_shapes(config):
  """Returns the weights' tree, `jax.ShapeDtypeStruct` in float32 as leaves."""
  return jax.eval_shape(make_model(config).init, jax.random.key(0))


@functools.cache
def _shapes(config):
  """Returns {path: shape} of every parameter."""
  flat = traverse_util.flatten_dict(param_shapes(config), sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


def _family(config):
  return next(f for f in _FAMILIES.values() if isinstance(config, f.CONFIG))


def load_params(
  directory, config, dtype=jnp.float32, *, mesh=None, layers="auto"
):
  """Returns the weights where they will be used.

  Split over the mesh by `mesh.BASE_MODEL_RULES`; on the default device without
  one. `layers` is config.model.layers, see `layers.choose`. `dtype` None keeps
  the files' own. Tensors that are missing, unknown, misshaped or not floating
  point are a UserError that lists their names.
  """
  sources, shapes, extra = _plan(directory, config, dtype)
  _check_tied(directory, config, sources, extra)
  shardings, platform, shards = None, placement.platform(), 1
  if mesh is not None:
    platform, shards = mesh.devices.flat[0].platform, mesh.shape["model"]
  num_bytes = sum(x.size * x.dtype.itemsize for x in shapes.values())
  form = layers_lib.choose(layers, num_bytes, platform, shards)
  sources, shapes = layers_lib.arranged(sources, shapes, form)
  if mesh is not None:
    # A flat dict of paths is a tree, too.
    specs = mesh_lib.partition_specs(shapes, mesh)
    shardings = {path: NamedSharding(mesh, x) for path, x in specs.items()}
  params = placement.fill(shapes, sources, shardings)
  return traverse_util.unflatten_dict(params, sep="/")


def _plan(directory, config, dtype=None):
  """Accounts for every tensor of a directory; reads none.

  Returns [placement.Source] in the order of the files, {path: ShapeDtypeStruct}
  of our parameters, {hub name: Tensor} of what no parameter is made of.
  """
  module = _family(config)
  unused = (*filter(None, [module.POST_NORM]), POLICY_PREFIX)
  if config.text.tie_embeddings:
    unused += (module.HEAD,)  # A second copy of the embedding table.
  pending, sources, stored, extra = dict(_entries(config)), [], {}, {}
  kinds = ("missing", "unknown", "misshaped", "not floating point")
  problems = {kind: [] for kind in kinds}
  for tensor in safetensors_io.list_directory(directory):
    name = module.hub_name(tensor.name)
    if tensor.name.endswith(_BUFFERS):
      continue
    if name.startswith(unused) and name not in extra:
      extra[name] = tensor
      continue
    if name not in pending:  # Or one tensor under two spellings.
      problems["unknown"].append(tensor.name)
      continue
    path, layout, layer, shape = pending.pop(name)
    if tensor.shape != shape:
      told = f"{tensor.name} {tensor.shape} instead of {shape}"
      problems["misshaped"].append(told)
    elif tensor.code not in _READABLE:
      told = f"{tensor.name} {tensor.dtype or tensor.code}"
      problems["not floating point"].append(told)
    else:
      sources.append(placement.Source(tensor, path, layer, layout))
      kind = jnp.dtype(dtype or tensor.dtype)
      kind = jnp.promote_types(stored.get(path, kind), kind)
      # JAX has no float64 unless asked; no checkpoint needs it.
      stored[path] = jnp.dtype("float32") if kind.itemsize > 4 else kind
  problems["missing"] += sorted(pending)
  told = [f"{kind} {_listed(x)}" for kind, x in problems.items() if x]
  if told:
    raise errors.UserError(
      f"{directory}: the weights do not fit config.json: {'; '.join(told)}; use"
      " the two files of one checkpoint"
    )
  of = jax.ShapeDtypeStruct
  shapes = {path: of(x, stored[path]) for path, x in _shapes(config).items()}
  return sources, shapes, extra


def survey(directory, config) -> tuple[int, int, list[str]]:
  """Returns (files, bytes, dtypes) of the weights, by their headers.

  Those that do not fit the config are a UserError, as of `load_params`, tied
  tables that differ among them; so is a directory that does not say how answers
  end.
  """
  _ending(directory)
  sources, _, extra = _plan(directory, config)
  _check_tied(directory, config, sources, extra)
  tensors = [*(source.tensor for source in sources), *extra.values()]
  return (
    len({tensor.path for tensor in tensors}),
    sum(tensor.num_bytes for tensor in tensors),
    sorted({tensor.code for tensor in tensors}),
  )


def _check_tied(directory, config, sources, extra):
  """Refuses an output table that is another than the embeddings it is tied to.

  config.json says that they are one, and the files hold two: which one answers
  are to be computed with, nobody can know.
  """
  head, leaf = extra.get(_family(config).HEAD), "language_model/embed_tokens"
  if head is None:
    return
  (table,) = [source.tensor for source in sources if source.leaf == leaf]
  if (head.shape, head.code) == (table.shape, table.code):
    tables = head.view(), table.view()
    starts = range(0, head.shape[0], _COMPARED_ROWS)
    pieces = [[x[i : i + _COMPARED_ROWS] for x in tables] for i in starts]
    if all(np.array_equal(a.view("u1"), b.view("u1")) for a, b in pieces):
      return
  raise errors.UserError(
    f"{directory}: config.json ties the output table to the embeddings, and"
    f" {head.name} is not {table.name}; set tie_word_embeddings to false to use"
    " it, or leave it out of the files"
  )


def load(
  directory, dtype=jnp.float32, *, mesh=None, backend="auto", layers="auto"
):
  """Returns the `Checkpoint` of a directory; options as of `load_params`.

  The directory may be `org/name` of one in the Hugging Face cache, see `hub`.
  Weights and computing have `dtype`; None: the files' own, and the embeddings'.
  """
  given, directory = os.fspath(directory), hub.directory(directory)
  config = load_config(directory)
  mesh_lib.check_heads(config.text.num_heads, mesh)
  eos_ids, pad_id = _ending(directory)
  tokenizer = _tokenizer(directory)
  params = load_params(directory, config, dtype, mesh=mesh, layers=layers)
  dtype = dtype or params["language_model"]["embed_tokens"].dtype
  _, _, extra = _plan(directory, config)
  found = identity(directory)
  if given != directory:  # A name is the same on every machine.
    found["path"] = given
  return Checkpoint(
    make_model(config, dtype, backend), params, tokenizer, found, eos_ids,
    pad_id, {name: tensor.view() for name, tensor in extra.items()},
  )  # fmt: skip


def save(
  directory, config, params, *, eos_ids, pad_id, bos_id=None, dtype=None,
  extra=None, max_shard_bytes=None,
):  # fmt: skip
  """Writes config, generation config and weights under the hub's names.

  The caller adds the tokenizer's and the processor's files. Earlier weights are
  replaced; tensors are fetched and written one at a time.

  Args:
    eos_ids: token ids that end an answer; `pad_id` stands behind the end,
      `bos_id` begins a text, where the tokenizer has one.
    dtype: type of the written weights; each parameter's own by default.
    extra: {hub name: array} written beside them as they are, such as
      `Checkpoint.extra` or a policy under its public names. What readers ask
      for and nothing uses, SigLIP's last norm, is the identity unless given.
    max_shard_bytes: size at which a new file is begun; None for one file.
  """
  files.make_folder(directory)
  dtype = None if dtype is None else jnp.dtype(dtype)
  tensors = _source_tensors(config, params, dtype)
  main = dtype or jnp.dtype(params["language_model"]["embed_tokens"].dtype)
  unused = unused_tensors(config).items()
  extra = {name: array.astype(main) for name, array in unused} | (extra or {})
  if taken := sorted(tensors.keys() & extra.keys()):
    raise ValueError(f"extra names parameters: {', '.join(taken)}")
  write_config(
    directory, config, eos_ids=eos_ids, pad_id=pad_id, bos_id=bos_id, dtype=main
  )
  # Last: a directory with weights is complete.
  safetensors_io.write_directory(directory, tensors | extra, max_shard_bytes)


def write_config(directory, config, *, eos_ids, pad_id, bos_id=None, dtype):
  """Writes config.json and generation_config.json; arguments as in `save`."""
  ids = {"eos_token_id": list(eos_ids), "pad_token_id": pad_id}
  if bos_id is not None:
    ids["bos_token_id"] = bos_id
  described = config.to_hf() | {"torch_dtype": jnp.dtype(dtype).name}
  # Where the model keeps its text fields: a section, or the top level.
  described.get("text_config", described).update(ids)
  files.write_json(os.path.join(directory, "config.json"), described)
  path = os.path.join(directory, "generation_config.json")
  files.write_json(path, ids | {"do_sample": False})


def source_shapes(config):
  """Returns {hub name: shape} of every tensor that a checkpoint must have."""
  return {name: entry.shape for name, entry in _entries(config).items()}


def unused_tensors(config):
  """Returns {hub name: float32 array} of what readers want and nothing uses."""
  norm, width = _family(config).POST_NORM, config.vision.hidden_size
  ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
  return {f"{norm}weight": ones, f"{norm}bias": zeros} if norm else {}


def _source_tensors(config, params, dtype):
  """Returns {hub name: (dtype, shape, function that makes the array)}."""
  leaves = traverse_util.flatten_dict(params, sep="/")
  form = layers_lib.form_of(params["language_model"]["layers"])
  shapes = _shapes(config)

  def make(entry, place, stored):
    # One layer at a time leaves the device.
    leaf = leaves[place.path]
    value = leaf if place.layer is None else leaf[place.layer]
    if value.shape[-1:] != (width := shapes[entry.path][-1:]):
      value = value[..., place.start : place.start + width[0]]
    value = np.asarray(value).astype(stored, copy=False)
    return placement.to_source(entry.layout, value, config.vision.kernel_shape)

  def lazy(entry):
    place = layers_lib.place(entry.path, entry.layer, form, shapes)
    stored = dtype or jnp.dtype(leaves[place.path].dtype)
    return stored, entry.shape, functools.partial(make, entry, place, stored)

  return {name: lazy(entry) for name, entry in _entries(config).items()}


def _ending(directory):
  """Returns (eos_ids, pad_id) of generation_config.json or config.json."""
  path = os.path.join(directory, "config.json")
  sources = [(path, config := read_json(path))]
  if isinstance(config.get("text_config"), dict):
    sources.append((path, config["text_config"]))
  path = os.path.join(directory, "generation_config.json")
  if os.path.exists(path):
    sources.append((path, read_json(path)))
  eos, pad = (), None
  for where, source in sources:
    found = schema.fit(source, _Ending, where)
    eos = eos if found.eos_token_id is None else found.eos_token_id
    pad = pad if found.pad_token_id is None else found.pad_token_id
  eos = (eos,) if isinstance(eos, int) else tuple(eos)
  errors.check(eos, f"{path} lacks eos_token_id; add it")
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
