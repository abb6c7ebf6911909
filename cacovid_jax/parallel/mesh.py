"""Device mesh, placement of arrays, sharding rules, multi-host start-up.

One mesh with two axes: `data` holds different videos, `model` holds slices of
the frozen base model's weights. The policy and its optimiser state are
replicated over both.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cacovid_jax import errors

# (pattern searched in the parameter path, axis that is split), first match
# wins; the axis counts from the end so that layers stacked on a leading axis
# and single layers share a rule. Columns of the first product and rows of the
# second are split, so that one sum per block is all the talk there is.
BASE_MODEL_RULES: tuple[tuple[str, int | None], ...] = (
  (r"(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)/kernel$", -1),
  (r"(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)/bias$", -1),
  (r"(o_proj|out_proj|down_proj|fc2)/kernel$", -2),
  (r"(embed_tokens|lm_head)$", -2),
  (r".*", None),
)


def make_mesh(
  data: int = 0, model: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
  """Returns a mesh with axes `data` and `model`.

  Args:
    data: devices on the data axis; 0 takes all that `model` leaves.
    model: devices that share one copy of the base model.
    devices: devices to use; all of the run by default.
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
  return jax.make_mesh(
    (data, model),
    ("data", "model"),
    # The default, Explicit, asks for shardings in every op.
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices[: data * model],
  )


def path_name(path) -> str:
  """Returns a pytree key path as `a/b/c`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def partition_specs(params, mesh: Mesh, rules=BASE_MODEL_RULES):
  """Returns a PartitionSpec per weight, from the first rule that matches.

  A weight whose split axis does not divide by the `model` axis (2 kv heads on
  4 devices) is replicated.
  """
  size = mesh.shape["model"]

  def spec(path, leaf):
    name = path_name(path)
    matches = (axis for pattern, axis in rules if re.search(pattern, name))
    axis = next(matches, None)
    if size == 1 or axis is None or leaf.ndim < -axis:
      return P()
    if leaf.shape[axis] % size:
      return P()
    entries = [None] * leaf.ndim
    entries[axis] = "model"
    return P(*entries)

  return jax.tree_util.tree_map_with_path(spec, params)


def shard_base_params(params, mesh: Mesh, rules=BASE_MODEL_RULES):
  """Places frozen weights on the mesh, split over `model` by `rules`."""
  specs = partition_specs(params, mesh, rules)
  return jax.tree.map(lambda x, spec: put(x, mesh, spec), params, specs)


def put(tree, mesh: Mesh, spec: P):
  """Places a tree of host or device arrays on the mesh, all with one spec.

  With several processes every process holds the whole array and places the
  part that its own devices need. What lies there already stays where it is.
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
    return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index]
    )

  return jax.tree.map(place, tree)


def by_hand(mesh: Mesh) -> set[str]:
  """Returns the axes that `shard_map` maps; the compiler splits the others.

  It splits the base model over `model`, by the sharding of its weights.
  """
  return {"data"} if mesh.shape["model"] > 1 else set(mesh.axis_names)


def jit_rows(
  function: Callable, mesh: Mesh | None, *, weights: Sequence[int] = (0,)
):
  """Returns the jitted function; each device of `data` computes its own rows.

  Args:
    function: takes weights, and trees whose arrays lead with a batch axis, as
      do those that it returns.
    mesh: None is one device.
    weights: places of the arguments that are weights.
  """
  if mesh is None or mesh.size == 1:
    return jax.jit(function)

  def mapped(*args):
    specs = [P() if n in weights else P("data") for n in range(len(args))]
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=tuple(specs),
      out_specs=P("data"),
      axis_names=by_hand(mesh),
      check_vma=False,
    )(*args)

  return jax.jit(mapped)


def start_processes(
  coordinator: str | None, num_processes: int, process_id: int
) -> None:
  """Joins the processes of a multi-host run; one process needs nothing.

  All three are given, never guessed from the environment, so that a wrong
  launch fails here and not as a hang in the first collective.
  """
  if num_processes <= 1:
    return
  if not coordinator or not 0 <= process_id < num_processes:
    raise errors.UserError(
      f"num_processes={num_processes} needs coordinator=host:port and a"
      f" process_id from 0 to {num_processes - 1}, got {coordinator!r} and"
      f" {process_id}"
    )
  jax.distributed.initialize(
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
  )
