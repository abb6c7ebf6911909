r"""Compares the models and the policy with folders of golden files.

python -m cacovid_jax.parity GOLDEN/policy GOLDEN/llava_onevision_tiny \
    GOLDEN/qwen2_5_vl_tiny
python -m cacovid_jax.parity --against_transformers CHECKPOINT

A folder with config.json and golden.npz holds a model (LLaVA-OneVision or
Qwen2.5-VL, as config.json says), any other folder cases of the policy. A
checkpoint directory is compared with the installed transformers (the extra
`[hf]`) on random pixels and chat prompts; `--half` asks besides how often both
hold the same token most likely when both compute in bfloat16. Prints one row
per stage and exits with 1 if any misses its tolerance.
"""

import os
import sys

import jax

from cacovid_jax import command, errors, terminal

COMMAND = command.Command(
  __doc__,
  {
    "against_transformers": command.Flag(
      "Checkpoint directory, or org/name of one in the local cache, to run in"
      " the installed transformers beside ours."
    ),
    "torch_device": command.Flag(
      "Where PyTorch computes, for example cuda.", default="cpu"
    ),
    "half": command.Flag(
      "Compare with transformers in bfloat16 as well.", default=False
    ),
  },
  config="none",
  num_arguments=sys.maxsize,
)


def check(folder):
  """Returns the list of `stage.Stage` of a folder of golden files."""
  if not os.path.isdir(folder):
    raise errors.UserError(f"{folder} is not a folder of golden files")
  names = os.listdir(folder)
  if "golden.npz" in names and "config.json" in names:
    from cacovid_jax.parity import models as golden
  elif any(name.endswith(".npz") for name in names):
    from cacovid_jax.parity import policy as golden
  else:
    raise errors.UserError(
      f"{folder} holds no golden file; expected config.json and golden.npz of"
      " a model, or .npz files of the policy"
    )
  return golden.check(folder)


def report(folder, found) -> bool:
  """Prints a table of stages; returns whether all are within tolerance."""
  width = max([len("stage"), *(len(stage.name) for stage in found)])
  terminal.tell(f"\n{folder}")
  print(f"{'stage':{width}}  max abs error  tolerance  verdict")
  for name, error, tolerance, ok in found:
    verdict = "ok" if ok else "MISS"
    terminal.tell(f"{name:{width}}  {error:13.3e}  {tolerance:9.1e}  {verdict}")
  missed = sum(not stage.ok for stage in found)
  print(f"{len(found) - missed} of {len(found)} stages within tolerance")
  return bool(found) and not missed


def main(args):
  """Makes the comparisons that the command line names."""
  folders, directory = args.arguments, args.against_transformers
  if not folders and not directory:
    raise errors.UserError(
      "no folder given; use python -m cacovid_jax.parity DIR [DIR ...], or"
      " --against_transformers CHECKPOINT"
    )
  jax.config.update("jax_default_matmul_precision", "highest")
  verdicts = [report(folder, check(folder)) for folder in folders]
  if directory:
    from cacovid_jax.parity import half_precision, transformers

    found = transformers.check(directory, device=args.torch_device)
    verdicts.append(report(directory, found))
    if args.half:
      both = half_precision.agree(directory, device=args.torch_device)
      verdicts.append(half_precision.report(directory, *both))
  return 0 if all(verdicts) else 1


if __name__ == "__main__":
  COMMAND.run(main)
