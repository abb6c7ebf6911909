"""Device mesh, placement of arrays, sharding rules.

Of the mesh's axes, `data` holds different videos, `model` slices of the frozen
base model's weights. The policy and its optimiser state are replicated.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cacovid_jax import errors
from cacovid_jax.parallel import arguments

# (pattern searched in the parameter path, axis that is split), first match
# wins; the axis counts from the end so that layers stacked on a leading axis
# and single layers share a rule. Columns of the first product and rows of the
# second are split, so that one sum per block is all the talk there is.
BASE_MODEL_RULES: tuple[tuple[str, int | None], ...] = (
  (r"(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)/(kernel|bias)$", -1),
  (r"(o_proj|out_proj|down_proj|fc2)/kernel$", -2),
  (r"(embed_tokens|lm_head)$", -2),
  (r".*", None),
)


def make_mesh(data=0, model=1, *, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh with axes `data` and `model`, of all devices by default.

  `model` devices share one copy of the base model; `data` 0 takes the others.
  """
  devices = list(jax.devices() if devices is None else devices)
  if model < 1 or data < 0:
    raise errors.UserError(
      f"mesh data={data}, model={model}: sizes must be positive (data=0"
      " takes all devices)"
    )
  data = data or max(len(devices) // model, 1)
  if data * model > len(devices):
    raise errors.UserError(
      f"mesh of data={data} x model={model} needs {data * model} devices and"
      f" there are {len(devices)}; lower config.mesh.data or config.mesh.model"
    )
  used = {device.process_index for device in devices[: data * model]}
  if idle := {device.process_index for device in devices} - used:
    raise errors.UserError(
      f"mesh of data={data} x model={model} has no device of process"
      f" {', '.join(map(str, sorted(idle)))}; raise config.mesh.data, or start"
      " fewer processes"
    )
  # The default, Explicit, asks for shardings in every op.
  options = dict(axis_types=(AxisType.Auto, AxisType.Auto))
  options |= dict(devices=devices[: data * model])
  return jax.make_mesh((data, model), ("data", "model"), **options)


def check_map(how: str, mesh: Mesh) -> None:
  """Refuses a config.mesh.map that the mesh does not fit."""
  if how == "pmap" and (mesh.shape["model"] > 1 or jax.process_count() > 1):
    raise errors.UserError(
      f"config.mesh.map=pmap cannot split the base model (mesh.model="
      f"{mesh.shape['model']}) or span processes ({jax.process_count()}); set"
      " config.mesh.map=shard_map"
    )


def map_over_data(
  function, mesh: Mesh, in_specs, out_specs, *, how="shard_map"
):
  """Returns a function mapped over the axis `data`, to be jitted.

  It computes one device's share, and may average over the axis by name. Specs
  are prefix trees: P() for what all devices have, P("data") for what is split
  by its leading axis. Both values of `how`, see `check_map`, compute the same.
  """
  if how == "shard_map":
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      # The compiler splits the base model over `model` by its weights'
      # sharding; only `data` is mapped by hand.
      axis_names={"data"} if mesh.shape["model"] > 1 else set(mesh.axis_names),
      # With the check, gradients of replicated parameters arrive summed
      # over devices, and the explicit mean would count them again.
      check_vma=False,
    )

  devices = list(mesh.devices[:, 0])

  def axes(specs):
    return jax.tree.map(lambda spec: None if spec == P() else 0, specs)

  def reshape(specs, tree, shape, start):
    def change(spec, part):
      if spec == P():
        return part
      return jax.tree.map(lambda x: x.reshape(shape + x.shape[start:]), part)

    return jax.tree.map(change, specs, tree)

  mapped = jax.pmap(
    function, "data", in_axes=axes(in_specs), out_axes=axes(out_specs),
    devices=devices,
  )  # fmt: skip

  def call(*args):
    out = mapped(*reshape(in_specs, args, (len(devices), -1), 1))
    return reshape(out_specs, out, (-1,), 2)

  return call


def path_name(path) -> str:
  """Returns a pytree key path as `a/b/c`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def partition_specs(params, mesh: Mesh):
  """Returns a PartitionSpec per weight, of the first rule that matches.

  A weight whose split axis does not divide by the `model` axis (2 kv heads on
  4 devices) is replicated.
  """
  size = mesh.shape["model"]

  def spec(path, leaf):
    name = path_name(path)
    axis = next(at for rule, at in BASE_MODEL_RULES if re.search(rule, name))
    fits = axis and leaf.ndim >= -axis and leaf.shape[axis] % size == 0
    if size == 1 or not fits:
      return P()
    entries = [None] * leaf.ndim
    entries[axis] = "model"
    return P(*entries)

  return jax.tree_util.tree_map_with_path(spec, params)


def shard_base_params(params, mesh: Mesh):
  """Places frozen weights on the mesh, split over `model` by the rules."""
  specs = partition_specs(params, mesh)
  return jax.tree.map(lambda x, spec: put(x, mesh, spec), params, specs)


def put(tree, mesh: Mesh, spec: P):
  """Places a tree of host or device arrays on the mesh, all with one spec.

  Of several processes every one holds the whole array and places the part of
  its own devices. What lies there already stays where it is.
  """
  sharding = NamedSharding(mesh, spec)

  def place(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
      return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jax.process_count() == 1:
      return jax.device_put(x, sharding)
    host = np.asarray(x)
    with jax.transfer_guard("allow"):  # It is stated here.
      return jax.make_array_from_callback(
        host.shape, sharding, host.__getitem__
      )

  return jax.tree.map(place, tree)


def own_places(mesh: Mesh) -> list[int]:
  """Returns the places of the axis `data` that this process's devices have."""
  own = jax.process_index()
  return [
    place
    for place, devices in enumerate(mesh.devices)
    if any(device.process_index == own for device in devices)
  ]


def own_rows(mesh: Mesh, count: int) -> list[int]:
  """Returns which of `count` rows, split over `data`, this process holds."""
  each = count // mesh.shape["data"]
  return [
    row
    for place in own_places(mesh)
    for row in range(place * each, (place + 1) * each)
  ]


def put_own(tree, mesh: Mesh):
  """Places trees of rows, of which each process has its `own_rows`."""
  sharding, own = NamedSharding(mesh, P("data")), len(own_places(mesh))

  def place(x):
    shape = (len(x) * mesh.shape["data"] // own, *x.shape[1:])
    return jax.make_array_from_process_local_data(sharding, x, shape)

  if jax.process_count() == 1:
    return put(tree, mesh, P("data"))
  return jax.tree.map(place, tree)


def compiler_options(kind: str, platform: str) -> dict[str, Any]:
  """Returns what the compiler is told of a kind of program.

  Kinds are "tower", "prefill" (and what decodes in the same program),
  "training" and, without options, "". On a GPU, XLA's own Triton products lose
  to cuBLAS where there are many rows; decoding and the policy are faster with
  them. Products of a tower that read the same rows stay apart: merged, their
  outputs are split by a pass more.
  """
  if kind not in ("", "tower", "prefill", "training"):
    raise ValueError(f"there are no programs of kind {kind!r}")
  if not kind or platform != "gpu":
    return {}
  apart = {"xla_gpu_dot_merger_threshold_mb": 0} if kind == "tower" else {}
  return {"xla_gpu_enable_triton_gemm": False} | apart


def jit(function: Callable, kind: str = "", *, weights=(), **options):
  """Returns `jax.jit` of a function, with the options of its kind.

  `weights` are places of arguments that are weights: accelerators are handed
  fewer arrays of them, see `parallel.arguments`.
  """
  platform = jax.default_backend()
  found = compiler_options(kind, platform) or None
  make = functools.partial(jax.jit, compiler_options=found, **options)
  if not weights or platform == "cpu":
    return make(function)
  return arguments.Joining(make, function, weights)


def jit_rows(
  function: Callable, mesh: Mesh | None, kind: str = "", *, weights=(0,)
):
  """Returns the jitted function; each device of `data` computes its own rows.

  It takes weights, as arguments of the places `weights`, and trees whose arrays
  lead with a batch axis, as do those that it returns. Mesh None is one device.
  `kind` is as of `compiler_options`.
  """
  if mesh is None or mesh.size == 1:
    return jit(function, kind, weights=weights)

  def mapped(*args):
    specs = [P() if n in weights else P("data") for n in range(len(args))]
    return map_over_data(function, mesh, tuple(specs), P("data"))(*args)

  return jit(mapped, kind)


def whole(function: Callable, mesh: Mesh | None):
  """Returns a function, to be jitted, that each device of `data` computes.

  All of it, where the base model is split over `model`: code inside a map sees
  the mesh, as `models.attention` must. Elsewhere it is the function itself.
  """
  if mesh is None or mesh.shape["model"] == 1:
    return function
  return map_over_data(function, mesh, P(), P())


def mesh_of(params) -> Mesh | None:
  """Returns the mesh that weights lie on, None for one device."""
  for leaf in jax.tree.leaves(params):
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
      return sharding.mesh
  return None


def check_heads(num_heads: int, mesh: Mesh | None) -> None:
  """Refuses a `model` axis that does not divide the base model's heads."""
  size = mesh.shape["model"] if mesh is not None else 1
  if num_heads % size:
    fits = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    raise errors.UserError(
      f"config.mesh.model={size} does not divide the base model's {num_heads}"
      f" attention heads; use one of {', '.join(map(str, fits))}"
    )
