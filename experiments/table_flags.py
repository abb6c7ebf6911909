"""Flags that several tables share.

Named apart from those of the entry points of the package, so that tests may
import both.
"""

import types

from absl import flags

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.evals import results

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
REPEATS = flags.DEFINE_integer(
  "timing_repeats", 9, "Runs that a time is the median of.", lower_bound=1
)


def seeds() -> tuple[int, ...]:
  """Returns the evaluation seeds, checked."""
  try:
    return tuple(int(seed) for seed in SEEDS.value)
  except ValueError as error:
    raise errors.UserError(f"--table_seeds: {error}; give numbers") from error


def ratios(default) -> tuple[float, ...]:
  """Returns the retention ratios, checked, or the table's own."""
  return results.check_ratios(map(base.check_ratio, RATIOS.value or default))


def batch_size() -> dict[str, int]:
  """Returns the field of a request that the flag sets, if it was given."""
  return {} if BATCH.value is None else {"batch_size": BATCH.value}
