r"""Reads a checkpoint into JAX, beside a plain read of the same files.

python -m experiments.import_benchmark --size_gb=2
python -m experiments.import_benchmark --directory=CHECKPOINT

Without a directory, random weights of LLaVA-OneVision-7B's shapes, cut in depth
and vocabulary to the size, are written to the scratch folder and deleted in the
end.
Before every measurement the files leave the page cache; plain reads and imports
take turns, so that a change in the machine's load meets both. Memory is the
process's anonymous memory at its peak (Linux), less what it had before and,
where the arrays live in the host's memory, less the arrays.
"""

import contextlib
import dataclasses
import gc
import math
import os
import statistics
import threading
import time

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table
from absl import flags

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, llava_onevision, safetensors_io
from cacovid_jax.synthetic import tiny_checkpoints

_SIZE = flags.DEFINE_float(
  "size_gb", 2.0, "Size in 1e9 bytes of the checkpoint that is made."
)
_DIRECTORY = flags.DEFINE_string(
  "directory", None, "An existing checkpoint to read instead."
)
_WORKDIR = flags.DEFINE_string(
  "scratch", "workdirs/import_benchmark", "Where the checkpoint is made."
)
_DTYPE = flags.DEFINE_enum(
  "load_dtype",
  "stored",
  ["stored", "float32", "bfloat16", "float16"],
  "Type of the parameters; `stored` is the files' own.",
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 3, "Times that each is measured.", lower_bound=1
)

_READ_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Measured:
  """Seconds of one turn, and bytes of memory beside the arrays.

  Attributes:
    read: seconds of the plain read.
    load: seconds of the import, the arrays ready.
    memory: bytes; None where the system does not tell.
  """

  read: float
  load: float
  memory: int | None


def config_of_size(num_bytes):
  """Returns a config of about this many bytes in half precision.

  The vocabulary and the tower are cut in proportion, the decoder's layers make
  up the rest; widths stay those of the 7B model.
  """
  full = llava_onevision.LlavaOnevisionConfig.llava_onevision_7b()
  share = min(num_bytes / _num_bytes(full), 1.0)
  smallest = dataclasses.replace(
    full,
    vision=dataclasses.replace(
      full.vision, num_layers=max(1, round(share * full.vision.num_layers))
    ),
    text=dataclasses.replace(
      full.text,
      num_layers=1,
      vocab_size=max(64, 64 * round(share * full.text.vocab_size / 64)),
    ),
  )
  two = dataclasses.replace(smallest.text, num_layers=2)
  layer = _num_bytes(dataclasses.replace(smallest, text=two)) - _num_bytes(
    smallest
  )
  extra = max(0, round((num_bytes - _num_bytes(smallest)) / layer))
  layers = min(1 + extra, full.text.num_layers)
  return dataclasses.replace(
    smallest, text=dataclasses.replace(smallest.text, num_layers=layers)
  )


def _num_bytes(config):
  model = llava_onevision.LlavaOnevisionModel(config)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def measure(directory, dtype=None):
  """Returns `Measured` of one plain read and one import, both uncached."""
  config = checkpoints.load_config(directory)
  drop_cache(directory)
  start = time.perf_counter()
  plain_read(directory)
  read = time.perf_counter() - start
  drop_cache(directory)
  gc.collect()  # What an earlier turn left is not this one's.
  before = _anonymous_bytes()
  with _peak() as peak:
    start = time.perf_counter()
    params = checkpoints.load_params(directory, config, dtype)
    jax.block_until_ready(params)
    load = time.perf_counter() - start
  if before is None:
    return Measured(read, load, None)
  leaves = jax.tree.leaves(params)
  on_host = next(iter(leaves[0].devices())).platform == "cpu"
  arrays = sum(leaf.nbytes for leaf in leaves) if on_host else 0
  return Measured(read, load, peak() - before - arrays)


def plain_read(directory):
  """Reads a directory's weights from beginning to end."""
  buffer = bytearray(_READ_BYTES)
  for path in safetensors_io.weight_files(directory):
    with open(path, "rb", buffering=0) as file:
      while file.readinto(buffer):
        pass


def drop_cache(directory):
  """Takes the files out of the page cache; they must have been synced."""
  for path in safetensors_io.weight_files(directory):
    with open(path, "rb") as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _anonymous_bytes():
  """Returns this process's anonymous memory; None where nothing tells."""
  try:
    with open("/proc/self/status") as file:
      line = next((row for row in file if row.startswith("RssAnon:")), None)
  except OSError:
    return None
  return line and 1024 * int(line.split()[1])


@contextlib.contextmanager
def _peak(every=0.002):
  """Yields a function that returns the peak of `_anonymous_bytes`."""
  seen, done = [_anonymous_bytes() or 0], threading.Event()

  def watch():
    while not done.wait(every):
      seen[0] = max(seen[0], _anonymous_bytes() or 0)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield lambda: seen[0]
  finally:
    done.set()
    thread.join()


def report(num_bytes, turns):
  """Returns a table of the turns; the last row has the medians."""
  table = rich.table.Table(box=rich.box.SIMPLE)
  for column in ("turn", "read GB/s", "import GB/s", "share", "memory GB"):
    table.add_column(column, justify="right")

  def row(name, read, load, share, memory):
    table.add_row(
      name,
      f"{num_bytes / read / 1e9:.2f}",
      f"{num_bytes / load / 1e9:.2f}",
      f"{share:.0%}",
      "unknown" if memory is None else f"{memory / 1e9:.2f}",
    )

  for i, turn in enumerate(turns):
    row(str(i + 1), turn.read, turn.load, turn.read / turn.load, turn.memory)
  memory = [turn.memory for turn in turns if turn.memory is not None]
  row(
    "median",
    statistics.median(turn.read for turn in turns),
    statistics.median(turn.load for turn in turns),
    statistics.median(turn.read / turn.load for turn in turns),
    max(memory) if memory else None,
  )
  table.caption = "memory: anonymous, beside the arrays; the last row's, worst"
  return table


def main(argv):
  """Makes a checkpoint if none is given, measures, prints the table."""
  if len(argv) > 1:
    raise errors.UserError(f"unknown argument {argv[1]!r}; flags begin with --")
  if not hasattr(os, "posix_fadvise"):
    raise errors.UserError(
      "this system cannot drop files from its cache (no posix_fadvise); run on"
      " Linux"
    )
  console = rich.console.Console()
  directory = _DIRECTORY.value
  if directory is None:
    directory = _WORKDIR.value
    if os.path.isdir(directory) and os.listdir(directory):
      raise errors.UserError(
        f"{directory} is not empty; name another --scratch"
      )
    config = config_of_size(_SIZE.value * 1e9)
    console.print(f"writing {_num_bytes(config) / 1e9:.2f} GB to {directory}")
    os.makedirs(directory, exist_ok=True)
  try:
    if _DIRECTORY.value is None:
      tiny_checkpoints.write_random(directory, config)
    num_bytes = sum(map(os.path.getsize, checkpoints.weight_files(directory)))
    dtype = None if _DTYPE.value == "stored" else jnp.dtype(_DTYPE.value)
    device = jax.devices()[0]
    console.print(
      f"{num_bytes / 1e9:.2f} GB to {device.device_kind}, dtype"
      f" {_DTYPE.value}, {os.cpu_count()} CPU cores, jax {jax.__version__}"
    )
    turns = [measure(directory, dtype) for _ in range(_REPEATS.value)]
    console.print(report(num_bytes, turns))
  finally:
    if _DIRECTORY.value is None:
      for name in os.listdir(directory):
        os.remove(os.path.join(directory, name))
      os.rmdir(directory)


if __name__ == "__main__":
  errors.run(main)
