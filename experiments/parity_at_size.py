r"""Released sizes with random weights beside transformers, on one machine.

python -m experiments.parity_at_size --size=ov-7b --torch_device=cuda

Writes a checkpoint of the size twice to a scratch folder: cut to a few layers,
to be compared in float32 stage by stage, and whole, to be compared in bfloat16
by the most likely token. Both are deleted in the end; `--keep` keeps the whole
one. Needs the extra `[hf]`; JAX computes on its default device.
"""

import dataclasses
import functools
import os
import shutil
import time

import jax

from cacovid_jax import command, errors, terminal
from cacovid_jax.models import llava_onevision, qwen2_5_vl, qwen3_vl
from cacovid_jax.parity import __main__, half_precision
from cacovid_jax.parity import transformers as transformers_lib
from cacovid_jax.synthetic import tiny_checkpoints

CONFIGS = {
  "ov-0.5b": llava_onevision.LlavaOnevisionConfig.llava_onevision_0_5b,
  "ov-7b": llava_onevision.LlavaOnevisionConfig.llava_onevision_7b,
  "qvl-3b": qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_3b,
  "qvl-7b": qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_7b,
  "q3vl-2b": functools.partial(qwen3_vl.Qwen3VLConfig.released, "2b"),
  "q3vl-8b": functools.partial(qwen3_vl.Qwen3VLConfig.released, "8b"),
}

COMMAND = command.Command(
  __doc__,
  {
    "size": command.Flag(
      "Released model whose shapes are taken.", default="ov-7b",
      choices=list(CONFIGS), old=["full_size"],
    ),
    "layers": command.Flag(
      "Layers of tower and decoder that are compared in float32.", default=4,
      old=["cut_layers"], least=1,
    ),
    "torch_device": command.Flag(
      "Where PyTorch computes.", default="cpu", old=["on"]
    ),
    "scratch": command.Flag(
      "Where the checkpoints are written, up to 17 GB.",
      default="workdirs/full_size", old=["full_size_scratch"],
    ),
    "keep": command.Flag(
      "Do not delete the whole checkpoint.", default=False,
      old=["keep_full_size"],
    ),
  },
  config="none",
)  # fmt: skip


def cut(config, num_layers):
  """Returns `config` with this many layers in tower and decoder."""
  vision = dataclasses.replace(config.vision, num_layers=num_layers)
  if hasattr(vision, "full_layers"):
    # The last layer sees whole slices, as in the released depth.
    vision = dataclasses.replace(vision, full_layers=(num_layers - 1,))
  if hasattr(vision, "deep_layers"):
    deep = tuple(range(num_layers))[: len(vision.deep_layers)]
    vision = dataclasses.replace(vision, deep_layers=deep)
  text = dataclasses.replace(config.text, num_layers=num_layers)
  return dataclasses.replace(config, vision=vision, text=text)


def compare(config, folder, *, num_layers, device, keep=False):
  """Prints both comparisons; returns whether both are within their limits.

  `folder` is empty or missing; the whole checkpoint stays in it if `keep`.
  """
  if os.path.isdir(folder) and os.listdir(folder):
    raise errors.UserError(f"{folder} is not empty; name another --scratch")
  console = terminal.Console()
  started = time.perf_counter()

  def write(directory, config):
    tiny_checkpoints.write_random(directory, config)
    seconds = time.perf_counter() - started
    console.print(f"{directory} written ({seconds:.0f} s)")

  short, whole = (os.path.join(folder, name) for name in ("cut", "whole"))
  try:
    write(short, cut(config, num_layers))
    with jax.default_matmul_precision("highest"):
      found = transformers_lib.check(short, device=device)
    verdicts = [__main__.report(short, found)]
    shutil.rmtree(short)
    write(whole, config)
    both = half_precision.agree(whole, device=device)
    verdicts.append(half_precision.report(whole, *both))
  finally:
    for directory in [short] if keep else [short, whole]:
      shutil.rmtree(directory, ignore_errors=True)
    if os.path.isdir(folder) and not os.listdir(folder):
      os.rmdir(folder)
  console.print(f"{time.perf_counter() - started:.0f} s in all")
  return all(verdicts)


def main(args):
  """Compares the models that the command line names."""
  options = dict(device=args.torch_device, keep=args.keep)
  config = CONFIGS[args.size]()
  fine = compare(config, args.scratch, num_layers=args.layers, **options)
  return 0 if fine else 1


if __name__ == "__main__":
  COMMAND.run(main)
