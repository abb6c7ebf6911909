"""A stack of equal layers: the form of its parameters, and how it is run.

A form is told from the parameters alone:
  "stacked": each array has the layers on its first axis, and a scan runs one
    layer after the other. One layer is compiled, but on a GPU XLA copies every
    layer's weights out of the stack before it multiplies by them.
  "separate": {"0": a layer's parameters, "1": ...}, run by a Python loop, which
    copies nothing. Keys and values of a cache are tuples of arrays, likewise.
  "fused": separate, with one product in place of each of `GROUPS`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cacovid_jax import config_limits

STACKED, SEPARATE, FUSED = "stacked", "separate", "fused"
STACKS = ("layers", "blocks")  # What models call their stacks.
# Products of the same input, whose outputs lie side by side where fused. Not a
# SigLIP tower's queries, keys and values, which its `out_proj` tells: to split
# them is a pass of its own where no rotation reads them anyway.
GROUPS = {
  "qkv_proj": ("q_proj", "k_proj", "v_proj"),
  "gate_up_proj": ("gate_proj", "up_proj"),
}
_LARGE_BYTES = 1e9  # Of weights, above which "auto" takes them apart.


def choose(choice: str, num_bytes: int, platform: str, shards: int = 1) -> str:
  """Returns the form that a value of config.model.layers stands for.

  Of weights of so many bytes that `shards` devices share. Columns of a fused
  product would not be split between heads, so that shared ones stay apart.
  """
  if choice not in (known := config_limits.LAYERS):
    raise ValueError(f"layers {choice!r} is not one of {', '.join(known)}")
  if choice == "auto":
    large = platform != "cpu" and num_bytes > _LARGE_BYTES
    choice = SEPARATE if large else STACKED
  if choice == SEPARATE and shards == 1:
    return FUSED
  return choice


def form_of(stack: Mapping[str, Any]) -> str:
  """Returns the form of a stack's parameters."""
  if "0" not in stack:
    return STACKED
  return FUSED if GROUPS.keys() & stack["0"].keys() else SEPARATE


def layer(stack, number):
  """Returns the parameters of one layer; its number is an int if not stacked.

  Those of a fused stack are fused.
  """
  if form_of(stack) != STACKED:
    return stack[str(number)]
  # Indexed where it is used: a slice of all the layers would copy them.
  index = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
  return jax.tree.map(lambda leaf: index(leaf, number), stack)


def fused(own):
  """Returns one layer's parameters with each whole one of `GROUPS` as one."""
  own = dict(own)
  for name, parts in GROUPS.items():
    if own.keys() >= set(parts) and "out_proj" not in own:
      leaves = [own.pop(part) for part in parts]
      own[name] = jax.tree.map(lambda *x: jnp.concatenate(x, -1), *leaves)
  return own


def unfused(own):
  """Returns one layer's parameters as they were before `fused`."""
  own = dict(own)
  for name, parts in GROUPS.items():
    if name in own:
      ends = _ends(own, name)
      split = {k: jnp.split(x, ends, -1) for k, x in own.pop(name).items()}
      for i, part in enumerate(parts):
        own[part] = {k: pieces[i] for k, pieces in split.items()}
  return own


def _ends(own, name):
  """Returns the columns of a fused product where its later parts begin."""
  columns = own[name]["kernel"].shape[-1]
  if name == "gate_up_proj":
    return [columns // 2]
  # What the queries give is what the attention's output product takes.
  queries = own["o_proj"]["kernel"].shape[-2]
  return [queries, (queries + columns) // 2]


def convert(params, form: str):
  """Returns a model's parameters with its stacks in another form."""

  def change(name, value):
    if not isinstance(value, Mapping):
      return value
    if name not in STACKS:
      return {key: change(key, inner) for key, inner in value.items()}
    depth = len(value)
    if form_of(value) == STACKED:
      depth = len(jax.tree.leaves(value)[0])
    layers = [unfused(layer(value, number)) for number in range(depth)]
    if form == STACKED:
      return jax.tree.map(lambda *x: jnp.stack(x), *layers)
    if form == FUSED:
      layers = map(fused, layers)
    return {str(number): own for number, own in enumerate(layers)}

  return change("", params)


class Place(NamedTuple):
  """Where a form has the values of one tensor of a checkpoint."""

  path: str
  layer: int | None  # On the array's first axis; None for no such axis.
  start: int = 0  # First of its columns.


def place(path: str, number: int | None, form: str, shapes) -> Place:
  """Returns the place of a parameter, or of its layer of a stack.

  Of its path, STACK/MODULE/LEAF, and {path: shape} when stacked; number None is
  none of a stack.
  """
  if number is None or form == STACKED:
    return Place(path, number)
  stack, module, leaf = path.rsplit("/", 2)
  start = 0
  for name, parts in GROUPS.items() if form == FUSED else ():
    whole = [f"{stack}/{part}/{leaf}" for part in parts]
    split = f"{stack}/out_proj/kernel" in shapes
    if module in parts and shapes.keys() >= set(whole) and not split:
      before = whole[: parts.index(module)]
      module, start = name, sum(shapes[one][-1] for one in before)
  return Place(f"{stack}/{number}/{module}/{leaf}", None, start)


def arranged(sources, shapes, form: str):
  """Returns ([placement.Source], {path: ShapeDtypeStruct}) in a form.

  Of those of stacked layers.
  """
  sizes, moved = {path: x.shape for path, x in shapes.items()}, []
  for source in sources:
    there = place(source.leaf, source.layer, form, sizes)
    changes = dict(leaf=there.path, layer=there.layer, start=there.start)
    moved.append(dataclasses.replace(source, **changes))
  tree = traverse_util.unflatten_dict(shapes, sep="/")
  tree = jax.eval_shape(functools.partial(convert, form=form), tree)
  return moved, traverse_util.flatten_dict(tree, sep="/")


def products(part, name: str, widths, x, use_bias):
  """Returns what each one of a group's products makes of x [..., D].

  Within `part`, a `qwen2.Part`, which has them fused or not.
  """
  if not part.has_variable("params", name):
    sizes = zip(GROUPS[name], widths, strict=True)
    return [part.dense(width, one, use_bias)(x) for one, width in sizes]
  whole = part.dense(sum(widths), name, use_bias)(x)
  return jnp.split(whole, np.cumsum(widths)[:-1], axis=-1)


def apply(block, module, x, per_layer, remat=False):
  """Returns (x, outputs) of `block(layer, x, own)`, layer after layer.

  `module` is a Linen one that holds the stack's parameters; `per_layer` and the
  outputs are as of `loop`.
  """
  params = {} if module.is_initializing() else module.variables["params"]
  if form_of(params) == STACKED:
    if remat:
      block = nn.remat(block, prevent_cse=False)
    stacked = dict(variable_axes={"params": 0}, split_rngs={"params": True})
    scan = nn.scan(block, length=len(per_layer[0]), **stacked)
    return scan(module, x, jax.tree.map(jnp.asarray, per_layer))
  single = module.clone(parent=None, name=None)

  def body(x, own):
    params, *own = own
    return block(functools.partial(single.apply, {"params": params}), x, own)

  layers = [params[str(number)] for number in range(len(params))]
  body = jax.checkpoint(body) if remat else body
  return loop(body, x, (layers, *per_layer), SEPARATE)


def loop(body, x, per_layer, form: str):
  """Returns (x, outputs) of `body(x, own)` for each entry of `per_layer`.

  `per_layer` is a tuple of what has an entry for each layer: arrays, or tuples
  where the form is not stacked; `own` are one layer's. So are the outputs'
  leaves: see `joined`.
  """
  if form == STACKED:
    return jax.lax.scan(body, x, jax.tree.map(jnp.asarray, per_layer))
  found = []
  for number in range(len(per_layer[0])):
    x, out = body(x, tuple(entries[number] for entries in per_layer))
    found.append(out)
  return x, jax.tree.map(lambda *leaves: leaves, *found)


def joined(output):
  """Returns an output of all layers as one array [layers, ...]."""
  return jnp.stack(output) if isinstance(output, tuple) else output
