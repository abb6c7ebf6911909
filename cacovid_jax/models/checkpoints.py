"""Hugging Face checkpoint directories of LLaVA-OneVision, in and out.

A directory holds config.json, generation_config.json, the weights (one
safetensors file, or several with an index) and the tokenizer's files. Weights
pass through one readable table, source name -> (our path, layout); stacked
layers are one row of it.
"""

import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from cacovid_jax import errors
from cacovid_jax.models import llava_onevision

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The norm behind SigLIP's last block is in every checkpoint and in no
# computation: it is accepted, not kept, and written as the identity.
_POST_NORM = "vision_tower.vision_model.post_layernorm."
# A policy trained by the public code travels with its base model's weights;
# `cacovid_jax.policy` reads it.
_IGNORED = (_POST_NORM, "compression_policy.")

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
    tokenizer: `data.prompts.Tokenizer`, None without a tokenizer.json.
    identity: {"path", "sha256"} of the weights.
    eos_ids: token ids that end an answer.
    pad_id: token id behind the end.
  """

  model: llava_onevision.LlavaOnevisionModel
  params: Any
  tokenizer: Any
  identity: dict[str, str]
  eos_ids: tuple[int, ...]
  pad_id: int


@dataclasses.dataclass(frozen=True)
class _Row:
  """Where one source tensor goes; `layers` says it is one of a stack."""

  path: tuple[str, ...]
  layout: str = "same"
  layers: int | None = None


def _table(config):
  """Returns {source name, "{}" for the layer number: `_Row`}."""
  rows = {"image_newline": _Row(("image_newline",))}

  def dense(source, path, use_bias=True, layers=None, layout="transpose"):
    rows[f"{source}.weight"] = _Row((*path, "kernel"), layout, layers)
    if use_bias:
      rows[f"{source}.bias"] = _Row((*path, "bias"), "same", layers)

  for name in ("linear_1", "linear_2"):
    dense(
      f"multi_modal_projector.{name}",
      ("projector", name),
      use_bias=config.projector_bias,
    )

  tower, ours = "vision_tower.vision_model", ("vision_tower",)
  dense(
    f"{tower}.embeddings.patch_embedding",
    (*ours, "patch_embedding"),
    layout="patches",
  )
  rows[f"{tower}.embeddings.position_embedding.weight"] = _Row(
    (*ours, "position_embedding")
  )
  layers, layer = config.vision.num_layers, f"{tower}.encoder.layers.{{}}"
  for name in ("layer_norm1", "layer_norm2"):
    path = (*ours, "layers", name)
    rows[f"{layer}.{name}.weight"] = _Row((*path, "scale"), "same", layers)
    rows[f"{layer}.{name}.bias"] = _Row((*path, "bias"), "same", layers)
  for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
    dense(f"{layer}.self_attn.{name}", (*ours, "layers", name), layers=layers)
  for name in ("fc1", "fc2"):
    dense(f"{layer}.mlp.{name}", (*ours, "layers", name), layers=layers)

  decoder, ours = "language_model.model", ("language_model",)
  rows[f"{decoder}.embed_tokens.weight"] = _Row((*ours, "embed_tokens"))
  rows[f"{decoder}.norm.weight"] = _Row((*ours, "norm", "scale"))
  if not config.text.tie_embeddings:
    rows["language_model.lm_head.weight"] = _Row((*ours, "lm_head"))
  layers, layer = config.text.num_layers, f"{decoder}.layers.{{}}"
  for name in ("input_layernorm", "post_attention_layernorm"):
    path = (*ours, "layers", name, "scale")
    rows[f"{layer}.{name}.weight"] = _Row(path, "same", layers)
  for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
    dense(
      f"{layer}.self_attn.{name}",
      (*ours, "layers", name),
      use_bias=name != "o_proj",
      layers=layers,
    )
  for name in ("gate_proj", "up_proj", "down_proj"):
    dense(
      f"{layer}.mlp.{name}",
      (*ours, "layers", name),
      use_bias=False,
      layers=layers,
    )
  return rows


def _to_ours(layout, tensor):
  if layout == "transpose":  # (out, in) -> (in, out)
    return tensor.T
  if layout == "patches":  # (out, in, kh, kw) -> (kh * kw * in, out)
    return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
  return tensor


def _to_source(layout, tensor, patch_size):
  if layout == "transpose":
    return tensor.T
  if layout == "patches":
    width = tensor.shape[-1]
    tensor = tensor.reshape(patch_size, patch_size, -1, width)
    return tensor.transpose(3, 2, 0, 1)
  return tensor


def hub_name(name):
  """Returns the hub's (4.x) name of a tensor in any of the known spellings."""
  stems = (
    "language_model.",
    "vision_tower.",
    "multi_modal_projector.",
    "image_newline",
  )
  if name.startswith("model.") and name[len("model.") :].startswith(stems):
    name = name[len("model.") :]
  head, _, rest = name.partition(".")
  if head == "lm_head":
    return f"language_model.{name}"
  if head == "vision_tower" and not rest.startswith("vision_model."):
    return f"vision_tower.vision_model.{rest}"
  if head == "language_model" and not rest.startswith(("model.", "lm_head.")):
    return f"language_model.model.{rest}"
  return name


def weight_files(directory):
  """Returns the sorted paths of a directory's safetensors files."""
  index = os.path.join(directory, INDEX)
  if not os.path.exists(index):
    names = [WEIGHTS]
  else:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
      raise errors.UserError(f"{index} has no weight_map; download it again")
    names = sorted(set(names.values()))
  paths = []
  for name in names:
    path = os.path.join(directory, str(name))
    # An index names files of its own directory, nothing else.
    if os.path.basename(path) != name:
      raise errors.UserError(f"{index} names {name!r}, not a plain file name")
    if not os.path.isfile(path):
      raise errors.UserError(f"{path} is missing; copy the weights there")
    paths.append(path)
  return paths


def read_safetensors(directory):
  """Yields (name, array) of every tensor of a directory, one at a time."""
  for path in weight_files(directory):
    try:
      with safetensors.safe_open(path, framework="np") as file:
        for name in sorted(file.keys()):
          yield name, file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
      reason = " ".join(str(error).split())
      raise errors.UserError(
        f"{path} is not a readable safetensors file ({reason}); download it"
        " again"
      ) from error


def write_safetensors(path, tensors):
  """Writes {name: array} so that a reader sees the old file or the new one."""
  contiguous = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  data = safetensors.numpy.save(contiguous, metadata={"format": "pt"})
  _write(path, data)


def read_json(path):
  """Returns the dict in a JSON file."""
  try:
    with open(path, encoding="utf-8") as file:
      value = json.load(file)
  except FileNotFoundError as error:
    raise errors.UserError(
      f"{path} is missing; give a Hugging Face checkpoint directory"
    ) from error
  except (OSError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise errors.UserError(f"{path} is not readable JSON ({reason})") from error
  if not isinstance(value, dict):
    raise errors.UserError(f"{path} does not hold a JSON object")
  return value


def load_config(directory):
  """Returns the `LlavaOnevisionConfig` of a checkpoint directory."""
  path = os.path.join(directory, "config.json")
  return llava_onevision.LlavaOnevisionConfig.from_hf(read_json(path))


def load_params(directory, config, dtype=jnp.float32):
  """Returns the weights as numpy arrays on the host, layers stacked.

  Args:
    directory: checkpoint directory.
    config: its `LlavaOnevisionConfig`.
    dtype: floating-point type of the returned arrays.

  Raises:
    UserError: tensors are missing, unknown, misshaped or not floating point;
      the message lists their names.
  """
  table = _table(config)
  params = jax.tree.map(
    lambda leaf: np.empty(leaf.shape, dtype), _shapes(config)
  )

  # Every single tensor that should come: {name: (row of the table, layer)}.
  pending = {}
  for name, row in table.items():
    if row.layers is None:
      pending[name] = (row, None)
    else:
      for layer in range(row.layers):
        pending[name.format(layer)] = (row, layer)

  tied = config.text.tie_embeddings
  extra, misshaped, not_float = [], [], []
  for source, tensor in read_safetensors(directory):
    name = hub_name(source)
    if name.startswith(_IGNORED):
      continue
    if tied and name == "language_model.lm_head.weight":
      continue  # A second copy of the embedding table.
    if name not in pending:
      extra.append(source)  # Or the same tensor under a second spelling.
      continue
    row, layer = pending.pop(name)
    target = _leaf(params, row.path)
    target = target if layer is None else target[layer]
    expected = _source_shape(row, target.shape, config)
    if tensor.shape != expected:
      misshaped.append(f"{source} {tensor.shape} instead of {expected}")
    elif tensor.dtype not in _READABLE:
      not_float.append(f"{source} {tensor.dtype}")
    else:
      target[...] = _to_ours(row.layout, tensor).astype(dtype)

  problems = [
    f"{kind} {_listed(names)}"
    for kind, names in (
      ("missing", sorted(pending)),
      ("unknown", extra),
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
  return params


def load(directory, dtype=jnp.float32, *, backend="auto"):
  """Returns the `Checkpoint` of a directory.

  Args:
    directory: Hugging Face checkpoint directory.
    dtype: of the weights and of the computation.
    backend: attention backend, see `models.attention`.
  """
  directory = os.fspath(directory)
  config = load_config(directory)
  params = jax.tree.map(jnp.asarray, load_params(directory, config, dtype))
  eos_ids, pad_id = _ending(directory)
  return Checkpoint(
    model=llava_onevision.LlavaOnevisionModel(
      config, jnp.dtype(dtype), backend
    ),
    params=params,
    tokenizer=_tokenizer(directory),
    identity=identity(directory),
    eos_ids=eos_ids,
    pad_id=pad_id,
  )


def save(
  directory,
  config,
  params,
  *,
  eos_ids,
  pad_id,
  bos_id=None,
  dtype=jnp.float32,
):
  """Writes config, generation config and weights under the hub's names.

  The caller adds the tokenizer's and the processor's files. SigLIP's unused
  `post_layernorm` is written as the identity, for readers that ask for it.

  Args:
    directory: made if it does not exist.
    config: `LlavaOnevisionConfig`.
    params: the weights.
    eos_ids: token ids that end an answer.
    pad_id: token id behind the end.
    bos_id: token id of a beginning, where the tokenizer has one.
    dtype: floating-point type of the written weights.
  """
  os.makedirs(directory, exist_ok=True)
  tensors = {
    name: np.asarray(value).astype(dtype)
    for name, value in _source_tensors(config, params)
  }
  width = config.vision.hidden_size
  tensors[f"{_POST_NORM}weight"] = np.ones(width, dtype)
  tensors[f"{_POST_NORM}bias"] = np.zeros(width, dtype)

  ids = {"eos_token_id": list(eos_ids), "pad_token_id": pad_id}
  if bos_id is not None:
    ids["bos_token_id"] = bos_id
  described = config.to_hf() | {"torch_dtype": jnp.dtype(dtype).name}
  described["text_config"] |= ids
  _write_json(os.path.join(directory, "config.json"), described)
  _write_json(
    os.path.join(directory, "generation_config.json"),
    ids | {"do_sample": False},
  )
  # Last: a directory with weights is complete.
  write_safetensors(os.path.join(directory, WEIGHTS), tensors)


def identity(directory):
  """Returns {"path", "sha256"} of a directory's weights.

  The hash is the file's own; with several files, that of their hashes in the
  order of their names.
  """
  digests = []
  for path in weight_files(directory):
    with open(path, "rb") as file:
      digests.append(hashlib.file_digest(file, "sha256").hexdigest())
  digest = digests[0]
  if len(digests) > 1:
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
  return {"path": os.path.abspath(directory), "sha256": digest}


def _source_tensors(config, params):
  for name, row in _table(config).items():
    value = np.asarray(_leaf(params, row.path))
    patch_size = config.vision.patch_size
    if row.layers is None:
      yield name, _to_source(row.layout, value, patch_size)
    else:
      for layer in range(row.layers):
        yield (
          name.format(layer),
          _to_source(row.layout, value[layer], patch_size),
        )


def _source_shape(row, shape, config):
  ours = np.broadcast_to(np.float32(0), shape)
  return _to_source(row.layout, ours, config.vision.patch_size).shape


@functools.cache
def _shapes(config):
  model = llava_onevision.LlavaOnevisionModel(config)
  return jax.eval_shape(model.init, jax.random.key(0))


def _leaf(tree, path):
  for key in path:
    tree = tree[key]
  return tree


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
  from cacovid_jax.data import prompts

  return prompts.Tokenizer.from_directory(directory)


def _listed(names, most=8):
  text = ", ".join(names[:most])
  return text if len(names) <= most else f"{text} and {len(names) - most} more"


def _write_json(path, value):
  _write(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def _write(path, data):
  partial = f"{path}.partial"
  with open(partial, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
