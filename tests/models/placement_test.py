"""Filling parameters in slices, against NumPy on whole tensors."""

import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from cacovid_jax.models import placement, safetensors_io
from cacovid_jax.parallel import mesh as mesh_lib

# {leaf: (layout, source shape, layers, specification on the mesh)}.
LEAVES = {
  "norm": ("same", (6,), None, P()),
  "stacked_norm": ("same", (6,), 3, P(None, "model")),
  "embed": ("same", (40, 6), None, P("model", None)),
  "columns": ("transpose", (8, 6), 3, P(None, None, "model")),
  "rows": ("transpose", (8, 6), 3, P(None, "model", None)),
  "layers": ("transpose", (5, 7), 4, P("model")),
  "joined": ("transpose", (12, 6), None, P(None, "model")),
  "single": ("transpose", (9, 4), None, P("model", None)),
  "patches": ("patches", (6, 3, 2, 2), None, P(None, "model")),
  "cubes": ("conv3d", (6, 3, 2, 2, 2), None, P()),
  "scalar": ("same", (), None, P()),
}


def oracle(layout, tensor):
  """Our parameter of a source tensor, written out value by value."""
  if layout == "transpose":
    return np.array(
      [[row[i] for row in tensor] for i in range(tensor.shape[1])]
    )
  if layout == "patches":  # Row, column, channel of a patch.
    out, channels, height, width = tensor.shape
    return np.array(
      [
        [tensor[o, c, y, x] for o in range(out)]
        for y in range(height)
        for x in range(width)
        for c in range(channels)
      ]
    )
  if layout == "conv3d":
    return np.array([tensor[o].ravel() for o in range(len(tensor))]).T
  return tensor


@pytest.fixture(name="case")
def fixture_case(tmp_path):
  """Returns (shapes, sources, expected) of every kind of leaf."""
  rng = np.random.default_rng(0)
  tensors, places, expected = {}, {}, {}
  for leaf, (layout, shape, layers, _) in LEAVES.items():
    made = rng.normal(size=(layers or 1, *shape)).astype(np.float32)
    whole = np.stack([oracle(layout, tensor) for tensor in made])
    expected[leaf] = whole if layers else whole[0]
    for i, tensor in enumerate(made):
      parts = np.split(tensor, [5]) if leaf == "joined" else [tensor]
      for start, part in zip((0, 5), parts, strict=False):
        tensors[f"{leaf}.{i}.{start}"] = part
        place = leaf, i if layers else None, layout, start
        places[f"{leaf}.{i}.{start}"] = place
  path = str(tmp_path / "x.safetensors")
  safetensors_io.write_safetensors(path, tensors)
  sources = [
    placement.Source(tensor, *places[tensor.name])
    for tensor in safetensors_io.list_tensors(path)
  ]
  shapes = {
    leaf: jax.ShapeDtypeStruct(array.shape, np.float32)
    for leaf, array in expected.items()
  }
  return shapes, sources, expected


# Assembled on the host, sent slice by slice, and some of each.
@pytest.mark.parametrize("small_bytes", [None, 0, 200])
@pytest.mark.parametrize(
  "mesh_shape,slice_bytes", [(None, 50), ((1, 2), 50), ((4, 2), 2**20)]
)
def test_every_leaf_is_filled(
  case, small_bytes, mesh_shape, slice_bytes, monkeypatch
):
  monkeypatch.setattr(placement.row_slices, "__defaults__", (slice_bytes,))
  shapes, sources, expected = case
  shardings = None
  if mesh_shape:
    count = mesh_shape[0] * mesh_shape[1]
    mesh = mesh_lib.make_mesh(*mesh_shape, devices=jax.devices()[:count])
    shardings = {
      leaf: NamedSharding(mesh, spec) for leaf, (*_, spec) in LEAVES.items()
    }
  found = placement.fill(shapes, sources, shardings, small_bytes=small_bytes)
  assert found.keys() == expected.keys()
  for leaf, array in expected.items():
    np.testing.assert_array_equal(found[leaf], array, err_msg=leaf)
    if mesh_shape:
      assert found[leaf].sharding == shardings[leaf]
    else:
      # Free to be used beside arrays of any device, as `jnp.asarray` gives it.
      assert not found[leaf].committed
      assert isinstance(found[leaf].sharding, SingleDeviceSharding)


@pytest.mark.parametrize("small_bytes", [None, 0])
@pytest.mark.parametrize(
  "stored,wanted",
  [
    (np.float16, np.float32),
    (ml_dtypes.bfloat16, np.float32),
    (np.float32, ml_dtypes.bfloat16),
    (np.float16, ml_dtypes.bfloat16),
    (np.float64, np.float32),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
  ],
)
def test_types_are_cast_once(tmp_path, small_bytes, stored, wanted):
  tensor = np.random.default_rng(1).normal(size=(150, 20)).astype(stored)
  path = str(tmp_path / "x.safetensors")
  safetensors_io.write_safetensors(path, {"x": tensor})
  [listed] = safetensors_io.list_tensors(path)
  shapes = {"x": jax.ShapeDtypeStruct((20, 150), wanted)}
  sources = [placement.Source(listed, "x", None, "transpose")]
  found = placement.fill(shapes, sources, small_bytes=small_bytes)["x"]
  assert found.dtype == wanted
  np.testing.assert_array_equal(found, tensor.astype(wanted).T)


@pytest.mark.parametrize("small_bytes", [None, 0])
def test_no_more_than_a_few_slices_are_held(case, small_bytes, monkeypatch):
  """Counts the slices that were read and are still alive."""
  monkeypatch.setattr(placement.row_slices, "__defaults__", (24,))
  monkeypatch.setattr(placement.os, "cpu_count", lambda: 2)
  shapes, sources, _ = case
  alive, most, lock = set(), [0], threading.Lock()
  read = safetensors_io.Tensor.read_rows
  largest = max(source.tensor.row_bytes for source in sources)

  class Slice(np.ndarray):
    def __del__(self):
      with lock:
        alive.discard(id(self))

  def counted(tensor, start, stop, scratch=None):
    rows = read(tensor, start, stop)
    assert rows.nbytes <= max(24, largest)
    piece = rows.view(Slice)
    with lock:
      alive.add(id(piece))
      most[0] = max(most[0], len(alive))
    return piece

  monkeypatch.setattr(safetensors_io.Tensor, "read_rows", counted)
  placement.fill(shapes, sources, small_bytes=small_bytes)
  total = sum(len(placement.row_slices(s.tensor)) for s in sources)
  assert total > 60
  # One of each of two threads, and what is cut from or made of it.
  assert 1 <= most[0] <= 8


def test_a_mistake_while_reading_ends_the_import(case, monkeypatch):
  shapes, sources, _ = case

  def fail(tensor, start, stop, scratch=None):
    raise OSError("disk is gone")

  monkeypatch.setattr(safetensors_io.Tensor, "read_rows", fail)
  with pytest.raises(OSError, match="gone"):
    placement.fill(shapes, sources)


@pytest.mark.parametrize(
  "rows,row_bytes,slice_bytes,expected",
  [
    (8, 10, 1000, [(0, 8)]),
    (8, 10, 40, [(0, 4), (4, 8)]),
    (9, 10, 40, [(0, 3), (3, 6), (6, 9)]),
    (7, 10, 40, [(0, 4), (4, 7)]),  # A prime: no equal slices.
    (2, 100, 10, [(0, 1), (1, 2)]),
    (0, 10, 40, []),
  ],
)
def test_slices_cover_all_rows_in_equal_parts(
  rows, row_bytes, slice_bytes, expected
):
  tensor = safetensors_io.Tensor(
    "x", "x", "U8", (rows, row_bytes), 0, rows * row_bytes
  )
  assert placement.row_slices(tensor, slice_bytes) == expected


@pytest.mark.parametrize("shape", [(1, 1), (300, 5), (5, 300), (257, 4099)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tiles_copy_everything(shape, dtype):
  source = np.random.default_rng(0).normal(size=shape[::-1]).astype(dtype)
  target = np.zeros(shape, dtype)
  placement.copy(target, source.T)
  np.testing.assert_array_equal(target, source.T)


@pytest.mark.parametrize("layout,shape", [
  ("same", (3, 4)),
  ("transpose", (3, 4)),
  ("patches", (5, 3, 2, 4)),
  ("conv3d", (5, 3, 2, 4, 3)),
])  # fmt: skip
def test_layouts_are_undone(layout, shape):
  tensor = np.random.default_rng(0).normal(size=shape)
  ours = placement.to_ours(layout, tensor)
  np.testing.assert_array_equal(ours, oracle(layout, tensor))
  back = placement.to_source(layout, ours, shape[1:])
  np.testing.assert_array_equal(back, tensor)


def test_arrays_on_the_cpu_are_the_buffers():
  buffer = placement.aligned_empty((300, 7), ml_dtypes.bfloat16)
  assert buffer.ctypes.data % 64 == 0
  buffer[...] = 1
  array = jax.device_put(buffer)
  assert array.unsafe_buffer_pointer() == buffer.ctypes.data
