"""Flags that several tables share.

Named apart from those of the entry points of the package, so that tests may
import both.
"""

import types
from collections.abc import Mapping

from absl import flags

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base
from cacovid_jax.evals import cost, estimate, results

# Configs of the released models, by the short names that tables have for them.
BASES = types.MappingProxyType(
  {
    "ov7b": "configs/llava_onevision.py:size=7b",
    "ov0.5b": "configs/llava_onevision.py:size=0_5b",
    "qwen3b": "configs/qwen2_5_vl.py:size=3b",
    "qwen7b": "configs/qwen2_5_vl.py:size=7b",
  }
)

WORKDIR = flags.DEFINE_string(
  "table_workdir", None, "Folder of the table; below workdirs/ by default."
)
DATA = flags.DEFINE_string(
  "table_data", None, "Data of the table, instead of the default."
)
MODEL = flags.DEFINE_string(
  "table_model", None, "Base model's directory, instead of the default."
)
POLICY = flags.DEFINE_string(
  "table_policy", None, "Policy, instead of the default."
)
METHODS = flags.DEFINE_list(
  "table_methods", None, "Rows, as in an evaluation; all by default."
)
RATIOS = flags.DEFINE_list(
  "table_ratios", None, "Retention ratios, instead of the table's own."
)
SEEDS = flags.DEFINE_list("table_seeds", ["0", "1", "2"], "Evaluation seeds.")
BATCH = flags.DEFINE_integer(
  "table_batch", None, "Questions asked at once.", lower_bound=1
)
DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Say what the table would take, and end."
)
TFLOPS = flags.DEFINE_float(
  "table_tflops", None, "Speed for --dry_run; measured on this device else."
)
GBPS = flags.DEFINE_float(
  "table_gbps", None, "Memory speed for --dry_run; measured likewise."
)
REPEATS = flags.DEFINE_integer(
  "timing_repeats", 9, "Runs that a time is the median of.", lower_bound=1
)


def all_rows(variants: Mapping[str, tuple[str, str]]) -> list[str]:
  """Returns the specs of all methods, variants behind their own.

  Args:
    variants: label -> (the method it follows, its spec).
  """
  rows = []
  for name in compressors.names():
    rows.append(name)
    for label, (follows, spec) in variants.items():
      if follows == name:
        rows.append(f"{label}={spec}")
  return rows


def seeds() -> tuple[int, ...]:
  """Returns the evaluation seeds, checked."""
  try:
    return tuple(int(seed) for seed in SEEDS.value)
  except ValueError as error:
    raise errors.UserError(f"--table_seeds: {error}; give numbers") from error


def ratios(default) -> tuple[float, ...]:
  """Returns the retention ratios, checked, or the table's own."""
  return results.check_ratios(map(base.check_ratio, RATIOS.value or default))


def speed(dtype) -> cost.Speed:
  """Returns what the device does in a second, as stated or measured."""
  return estimate.speed_of(TFLOPS.value, GBPS.value, dtype)
