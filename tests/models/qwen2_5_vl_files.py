"""Qwen2.5-VL weights read and written through the table of names alone."""

import json
import os

import numpy as np
import safetensors.numpy

from cacovid_jax.models import qwen2_5_vl, qwen2_5_vl_weights

GOLDEN = os.path.join(
  os.path.dirname(__file__), os.pardir, "golden", "qwen2_5_vl_tiny"
)


def load(folder):
  """Returns (model, params) of a folder with one file of weights."""
  with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
    config = qwen2_5_vl.Qwen2_5VLConfig.from_hf(json.load(file))
  tensors = safetensors.numpy.load_file(
    os.path.join(folder, "model.safetensors")
  )
  tensors = {qwen2_5_vl_weights.hub_name(k): v for k, v in tensors.items()}
  params = {}
  for name, (path, layout, layers) in qwen2_5_vl_weights.table(config).items():

    def read(name, layout=layout):
      tensor = tensors.pop(name)
      if layout == "conv3d":
        return qwen2_5_vl_weights.kernel_of_conv3d(tensor)
      return tensor.T if layout == "transpose" else tensor

    if layers is None:
      leaf = read(name)
    else:
      leaf = np.stack([read(name.format(layer)) for layer in range(layers)])
    node = params
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  assert not tensors, sorted(tensors)
  return qwen2_5_vl.Qwen2_5VLModel(config), params


def save(folder, config, params, extra=None):
  """Writes config.json and the weights under the hub's names."""
  tensors = {}
  for name, (path, layout, layers) in qwen2_5_vl_weights.table(config).items():
    leaf = params
    for key in path:
      leaf = leaf[key]

    def write(value, layout=layout):
      if layout == "conv3d":
        value = qwen2_5_vl_weights.conv3d_of_kernel(value, config.vision)
      elif layout == "transpose":
        value = value.T
      return np.ascontiguousarray(value)

    if layers is None:
      tensors[name] = write(leaf)
    else:
      for layer in range(layers):
        tensors[name.format(layer)] = write(leaf[layer])
  safetensors.numpy.save_file(
    tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"}
  )
  with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
    json.dump(config.to_hf() | (extra or {}), file)
