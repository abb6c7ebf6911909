r"""Compares the models and the policy with folders of golden files.

python -m cacovid_jax.parity GOLDEN/policy GOLDEN/llava_onevision_tiny \
    GOLDEN/qwen2_5_vl_tiny

A folder with config.json and golden.npz holds a model (LLaVA-OneVision or
Qwen2.5-VL, as config.json says), any other folder cases of the policy. Prints
one row per stage and exits with 1 if any misses its tolerance.
"""

import os
from collections.abc import Sequence

import jax

from cacovid_jax import errors


def check(folder):
  """Returns the list of `stages.Stage` of a folder of golden files."""
  if not os.path.isdir(folder):
    raise errors.UserError(f"{folder} is not a folder of golden files")
  names = os.listdir(folder)
  if "golden.npz" in names and "config.json" in names:
    from cacovid_jax.models import golden
  elif any(name.endswith(".npz") for name in names):
    from cacovid_jax.policy import golden
  else:
    raise errors.UserError(
      f"{folder} holds no golden file; expected config.json and golden.npz of"
      " a model, or .npz files of the policy"
    )
  return golden.check(folder)


def report(folder, found) -> bool:
  """Prints a table of stages; returns whether all are within tolerance."""
  width = max([len("stage"), *(len(stage.name) for stage in found)])
  print(f"\n{folder}")
  print(f"{'stage':{width}}  max abs error  tolerance  verdict")
  for stage in found:
    verdict = "ok" if stage.ok else "MISS"
    print(
      f"{stage.name:{width}}  {stage.max_abs_error:13.3e}"
      f"  {stage.tolerance:9.1e}  {verdict}"
    )
  missed = sum(not stage.ok for stage in found)
  print(f"{len(found) - missed} of {len(found)} stages within tolerance")
  return bool(found) and not missed


def main(argv: Sequence[str]):
  folders = argv[1:]
  if not folders:
    raise errors.UserError(
      "no folder given; use python -m cacovid_jax.parity DIR [DIR ...]"
    )
  jax.config.update("jax_default_matmul_precision", "highest")
  verdicts = [report(folder, check(folder)) for folder in folders]
  return 0 if all(verdicts) else 1


if __name__ == "__main__":
  errors.run(main)
