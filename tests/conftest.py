"""Shared set-up of the test suite: CPU with eight devices, flags parsed.

Tests that compare with PyTorch are collected only where it is installed, which
`make test` sees to; the run on the newest Python goes without.
"""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
import tempfile

# Before JAX starts. Set JAX_PLATFORMS to run the tests on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The programs of tests are small and many: compiling them costs more than they
# do. Without most optimisations and with the plain code generator it takes a
# fourth of the time. jaxlib after 0.10 has no such generator and gains little:
# programs there are compiled as a user's, as where XLA_FLAGS is set, perhaps
# to nothing.
_PLAIN = (
  "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
)
_HAS_PLAIN = importlib.metadata.version("jaxlib").startswith("0.10.")
if _HAS_PLAIN and "XLA_FLAGS" not in os.environ:
  os.environ["XLA_FLAGS"] = _PLAIN
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# What one test compiles, another loads: in any worker, and in processes that
# tests start. A folder of this run's own, unless there is one.
_CACHE = tempfile.TemporaryDirectory(prefix="jax_cache_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

# Traces are many small objects that live on; to walk through them every 700 of
# them, as is usual, takes a thirtieth of the time.
gc.set_threshold(20_000, 10, 10)

# absl test cases read flags before pytest has parsed any.
flags.FLAGS(sys.argv[:1])

_MAPS = pathlib.Path("/proc/self/maps")
# Each compiled program takes a few mappings of memory, of which Linux allows a
# process 65 530 (vm.max_map_count); the compiler crashes where there is none.
_MOST_MAPS = 20_000
# Files of a minute and more, by their place in `tests`. They are handed out
# first: one that comes last keeps a worker busy when the others have ended.
_LONG = (
  "experiments/launch_test.py",
  "training/released_test.py",
  "experiments/quickstart_test.py",
  "synthetic/pretrain_command_test.py",
  "training/loop_test.py",
  "experiments/own_videos_test.py",
  "experiments/directory_run_test.py",
  "training/grids_test.py",
  "training/repeats_test.py",
  "related/clips_test.py",
  "experiments/stages_test.py",
  "evals/evaluator_test.py",
  "experiments/notebook_test.py",
  "experiments/sweep_test.py",
)
_HAS_TORCH = all(map(importlib.util.find_spec, ("torch", "transformers")))
_NEEDS_TORCH = re.compile(r"^\s*(import|from) (torch|transformers)\b", re.M)


def pytest_ignore_collect(collection_path):
  """Returns True for a file that needs PyTorch where there is none."""
  if _HAS_TORCH or collection_path.suffix != ".py":
    return None
  needed = _NEEDS_TORCH.search(collection_path.read_text(encoding="utf-8"))
  return True if needed else None


def pytest_collection_modifyitems(items):
  """Puts long files first, for `--dist loadfile --no-loadscope-reorder`."""
  tests = pathlib.Path(__file__).parent
  place = {tests / name: i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
  """Gives up the compiled programs of a file that is done, if they are many."""
  found = yield
  done = nextitem is None or nextitem.path != item.path
  if done and _MAPS.exists():
    with _MAPS.open(encoding="utf-8") as lines:
      count = sum(1 for _ in lines)
    if count > _MOST_MAPS:
      jax.clear_caches()
      gc.collect()
  return found
