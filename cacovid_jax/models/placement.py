"""Fills parameters from a checkpoint's files, slice by slice, where they live.

Slices of rows are read by a few threads in the order of the files and put
straight into place: one layer of a stack, the part of a weight that a device
holds. At once, the host holds a few slices and the small parameters.

On CPU, parameters are filled in the device's memory and transposed on the way,
which costs about as much as reading them. On an accelerator, slices are copied
over as they lie in the file and transposed there.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Large enough for a disk's full speed, small enough that a handful is nothing.
_SLICE_BYTES = 16 * 2**20
# Below this many bytes a parameter is assembled on the host and sent whole:
# one transfer instead of one program per shape.
_SMALL_BYTES = 16 * 2**20
# A tile of rows and columns that stays in a core's cache while it is turned.
_TILE_ROWS, _TILE_COLUMNS = 128, 4096


# Leaves of a module: {its tensor at the source: (our leaf, layout)}.
_LEAVES = {
  "linear": {"weight": ("kernel", "transpose")},
  "dense": {"weight": ("kernel", "transpose"), "bias": ("bias", "same")},
  "patches": {"weight": ("kernel", "patches"), "bias": ("bias", "same")},
  "conv3d": {"weight": ("kernel", "conv3d")},
  "conv3d_dense": {"weight": ("kernel", "conv3d"), "bias": ("bias", "same")},
  "scale": {"weight": ("scale", "same")},
  "norm": {"weight": ("scale", "same"), "bias": ("bias", "same")},
  "table": {"weight": ("", "same")},
}


def rows(source, path, layers=None, **kinds):
  """Returns the rows of some modules in a table of weights.

  A row is name at the source, "{}" for the layer number -> (path of our leaf,
  layout of `to_ours`, depth of the stack that the tensors of all layers fill,
  None for a single tensor). Names at the source begin with `source`, ours lie
  in `path`. `kinds` are {name: one of `_LEAVES`}, and behind a space the name
  of ours where that is not the last part of the name.
  """
  found = {}
  for name, kind in kinds.items():
    kind, _, ours = kind.partition(" ")
    ours = ours or name.rpartition(".")[2]
    for tensor, (leaf, layout) in _LEAVES[kind].items():
      whole = "/".join(filter(None, (path, ours, leaf)))
      found[f"{source}.{name}.{tensor}"] = (whole, layout, layers)
  return found


@dataclasses.dataclass(frozen=True)
class Source:
  """One tensor of a file (`safetensors_io.Tensor`) and the place it fills."""

  tensor: Any
  leaf: str  # Name of the parameter.
  layer: int | None  # Index on the parameter's first axis; None for all of it.
  layout: str  # How a source tensor turns into ours, see `to_ours`.
  start: int = 0  # First column of the parameter that is its.


def to_ours(layout, tensor):
  """Returns the parameter of a source tensor, or its columns of some rows.

  Layouts: "same"; "transpose", (out, in) -> (in, out); "patches", (out, in, kh,
  kw) -> (kh * kw * in, out); "conv3d", (out, in, t, kh, kw) -> (in * t * kh *
  kw, out). Fewer of the outputs give fewer of the columns.
  """
  if layout == "transpose":
    return tensor.T
  if layout == "patches":
    return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
  if layout == "conv3d":
    return tensor.reshape(tensor.shape[0], -1).T
  return tensor


def to_source(layout, param, kernel_shape):
  """Returns the source tensor of a parameter; undoes `to_ours`.

  `kernel_shape` are a source convolution's sizes behind its outputs.
  """
  if layout == "transpose":
    return param.T
  if layout == "patches":
    channels, height, width = kernel_shape
    param = param.reshape(height, width, channels, param.shape[-1])
    return param.transpose(3, 2, 0, 1)
  if layout == "conv3d":
    return param.T.reshape(param.shape[-1], *kernel_shape)
  return param


def fill(shapes, sources, shardings=None, *, small_bytes=None):
  """Returns {leaf: jax.Array} of what the sources hold.

  Of {leaf: jax.ShapeDtypeStruct}, to whose dtypes sources are cast, `Source`s
  that cover every leaf, in the order of their bytes, and {leaf: Sharding}, the
  default device without. Leaves up to `small_bytes` are assembled on the host;
  by default all are on CPU, and the small ones elsewhere.
  """
  if small_bytes is None:
    on_cpu = platform(shardings) == "cpu"
    small_bytes = math.inf if on_cpu else _SMALL_BYTES
  leaves = {}
  for name, shape in shapes.items():
    leaves[name] = _Leaf(shape, shardings and shardings[name], small_bytes)
  _read(sources, leaves)
  # Popped, so that a buffer is gone once its array is made.
  return {name: leaves.pop(name).finish() for name in list(leaves)}


def platform(shardings=None) -> str:
  """Returns the kind of device that `fill` puts parameters on."""
  device = jax.config.jax_default_device
  if shardings:
    device, *_ = next(iter(shardings.values())).addressable_devices
  elif not hasattr(device, "platform"):
    device = jax.devices()[0]
  return device.platform


def _read(sources, leaves):
  """Reads all slices and hands each one to its leaf, a few at a time."""
  num_threads = max(2, min(8, os.cpu_count() or 2))
  own = threading.local()

  def work(source, start, stop):
    leaf = leaves[source.leaf]
    if not leaf.on_host:
      leaf.send(source, start, source.tensor.read_rows(start, stop))
      return
    # One buffer per thread: fresh memory costs a good part of the copy.
    num_bytes = (stop - start) * source.tensor.row_bytes
    if getattr(own, "scratch", np.empty(0)).nbytes < num_bytes:
      own.scratch = np.empty(max(num_bytes, _SLICE_BYTES), np.uint8)
    rows = source.tensor.read_rows(start, stop, own.scratch)
    leaf.place(source, start, rows)

  # In the order of the files; the queue is short so that a mistake ends it.
  jobs = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    try:
      for source in sources:
        for start, stop in row_slices(source.tensor):
          jobs.append(pool.submit(work, source, start, stop))
          if len(jobs) > 2 * num_threads:
            jobs.popleft().result()
      while jobs:
        jobs.popleft().result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def row_slices(tensor, slice_bytes=_SLICE_BYTES):
  """Returns [(start, stop)] of rows that cover a tensor, equal if they can be.

  Every other length is a program of its own on an accelerator.
  """
  rows = tensor.shape[0] if tensor.shape else 1
  if not rows:
    return []
  fewest = max(1, -(-tensor.num_bytes // slice_bytes))
  counts = range(fewest, min(rows, 2 * fewest) + 1)
  count = next((n for n in counts if rows % n == 0), min(fewest, rows))
  step = -(-rows // count)
  return [(start, min(start + step, rows)) for start in range(0, rows, step)]


class _Leaf:
  """One parameter while it fills: a buffer for each distinct part of it."""

  def __init__(self, shape, sharding, small_bytes):
    self._shape, self._sharding = shape, sharding
    self.on_host = math.prod(shape.shape) * shape.dtype.itemsize <= small_bytes
    # {((start, stop) of each axis): devices that hold this part}.
    self._parts = collections.defaultdict(list)
    indices = {None: (slice(None),) * len(shape.shape)}
    if sharding is not None:
      indices = sharding.addressable_devices_indices_map(shape.shape)
    for device, index in indices.items():
      sides = zip(index, shape.shape, strict=True)
      spans = tuple(s.indices(size)[:2] for s, size in sides)
      self._parts[spans].append(device)
    self._lock = threading.Lock()
    self._buffers = {}
    for spans, devices in self._parts.items():
      sizes = tuple(stop - start for start, stop in spans)
      if self.on_host:
        self._buffers[spans] = aligned_empty(sizes, shape.dtype)
      else:
        zeros = functools.partial(jnp.zeros, sizes, shape.dtype)
        self._buffers[spans] = [zeros(device=device) for device in devices]

  def place(self, source, start, rows):
    """Writes a slice into the host's buffers."""
    for spans, inside, piece in self._overlaps(source, start, rows):
      # The ellipsis keeps a scalar an array that can be written to.
      where = (..., *(slice(a, a + n) for a, n in inside))
      target = self._buffers[spans][where]
      copy(target.reshape(piece.shape), piece)

  def send(self, source, start, rows):
    """Writes a slice into the devices' buffers."""
    for spans, inside, piece in self._overlaps(source, start, rows):
      if piece.dtype.itemsize > self._shape.dtype.itemsize:
        piece = piece.astype(self._shape.dtype)
      # As the file has it: the host would be slow to turn it.
      turned = piece.ndim == 2 and piece.strides[0] < piece.strides[1]
      piece = np.require(piece.T if turned else piece, requirements="CA")
      at = np.array([first for first, _ in inside], np.int32)
      for i, device in enumerate(self._parts[spans]):
        moved = jax.device_put(piece, device)
        with self._lock:  # Each write takes the buffer of the one before.
          buffers = self._buffers[spans]
          buffers[i] = _write(buffers[i], moved, at, turned=turned)
        # Bounds what is in flight, and with it the host's staging memory.
        moved.block_until_ready()

  def finish(self):
    arrays = []
    while self._buffers:
      spans, buffer = self._buffers.popitem()
      devices = self._parts[spans]
      if self.on_host:
        # No copy on CPU: the array is the buffer.
        arrays += [jax.device_put(buffer, device) for device in devices]
      else:
        arrays += buffer
    if self._sharding is None:
      return arrays[0]
    return jax.make_array_from_single_device_arrays(
      self._shape.shape, self._sharding, arrays
    )

  def _overlaps(self, source, start, rows):
    """Yields (part, [(start, size)] within it, piece) of a slice of rows."""
    piece = to_ours(source.layout, rows)
    first = [0] * piece.ndim
    if piece.ndim:
      first[0 if source.layout == "same" else -1] = start
      first[-1] += source.start
    lead = [] if source.layer is None else [(source.layer, 1)]
    region = lead + list(zip(first, piece.shape, strict=True))
    for spans in self._parts:
      inside, cut = [], []
      for (low, high), (at, size) in zip(spans, region, strict=True):
        begin, end = max(low, at), min(high, at + size)
        if begin >= end:
          break
        inside.append((begin - low, end - begin))
        cut.append(slice(begin - at, end - at))
      else:
        yield spans, inside, piece[(..., *cut[len(lead) :])]


@functools.partial(jax.jit, donate_argnums=0, static_argnames="turned")
def _write(target, piece, at, *, turned):
  """Returns the target with a piece at `at`, turned first if asked."""
  piece = (piece.T if turned else piece).astype(target.dtype)
  lead = (1,) * (target.ndim - piece.ndim)
  piece = piece.reshape(lead + piece.shape)
  return jax.lax.dynamic_update_slice(target, piece, tuple(at))


def copy(target, source):
  """Copies an array into another of the same shape, cast to its dtype.

  A matrix that lies the other way round goes tile by tile: row by row, each
  value would cost a line of the cache.
  """
  if source.ndim != 2 or source.strides[0] >= source.strides[1]:
    target[...] = source.astype(target.dtype, copy=False)
    return
  same = source.dtype == target.dtype
  if same and target.dtype.itemsize == 2:
    # Whole numbers of the same size: NumPy moves bfloat16 value by value.
    source, target = source.view(np.uint16), target.view(np.uint16)
  width = source.shape[1]
  for j in range(0, width, _TILE_ROWS):
    lines = source[:, j : j + _TILE_ROWS]
    if not same:  # Cast along the lines, which are contiguous.
      lines = np.ascontiguousarray(lines.T).astype(target.dtype).T
    for i in range(0, source.shape[0], _TILE_COLUMNS):
      rows = slice(i, i + _TILE_COLUMNS)
      target[rows, j : j + _TILE_ROWS] = lines[rows]


def aligned_empty(shape, dtype, alignment=64):
  """Returns an uninitialised array that JAX on CPU can take over as it is."""
  dtype = np.dtype(dtype)
  num_bytes = math.prod(shape) * dtype.itemsize
  buffer = np.empty(num_bytes + alignment, np.uint8)
  offset = -buffer.ctypes.data % alignment
  return buffer[offset : offset + num_bytes].view(dtype).reshape(shape)
