r"""What training videos cost past one host: the table of docs/planning.md.

python -m experiments.planning
python -m experiments.planning --seconds_per_video=0.70 --accelerators=h200:256

Multiplies a measured time; nothing is run. An accelerator without a measured
time gets that of the measured one times the ratio of their peaks, which is an
estimate. Hours are of an epoch at the efficiency of one host's accelerators;
talk between hosts is not in them.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from cacovid_jax import command, errors
from cacovid_jax.evals import cost, tables
from cacovid_jax.models import llava_onevision
from cacovid_jax.policy import network
from experiments import reporting

VIDEOS = (10**4, 10**6, 10**8)
GRID = (32, 14, 14)  # Of LLaVA-OneVision at 32 frames.
# Peak of dense bfloat16 products in FLOP/s, by the makers' data sheets.
PEAKS = {"h200": 989e12, "v5p": 459e12}
MEASURED = "h200"  # What `seconds_per_video` is of.
HEAD = (
  "videos", "accelerators", "hours", "accelerator hours", "steps",
  "feature cache TB", "its reads GB/s", "saved by it, hours",
)  # fmt: skip

COMMAND = command.Command(
  __doc__,
  {
    "seconds_per_video": command.Flag(
      f"Measured on one {MEASURED}, with the tower and without decoding clips.",
      default=0.814, least=0,
    ),
    "tower_seconds": command.Flag(
      "Of them, what encoding a clip takes.", default=0.0447, least=0
    ),
    "efficiency": command.Flag(
      "Of several accelerators beside one.", default=0.975, least=0
    ),
    "accelerators": command.Flag(
      "NAME:NUMBER, comma-separated.",
      default=("h200:1", "h200:8", "h200:256", "v5p:8", "v5p:256"),
    ),
  },
  config="none",
)  # fmt: skip


class Measured(NamedTuple):
  """What the plan is computed from."""

  seconds_per_video: float  # On one accelerator, decoding of clips apart.
  tower_seconds: float  # Of them, for the vision tower.
  efficiency: float  # Of several accelerators beside one.
  feature_bytes: int  # Of one video in the feature cache.


class Plan(NamedTuple):
  """One epoch of so many videos, each seen once."""

  hours: float
  accelerator_hours: float
  steps: int  # Of as many videos as there are accelerators.
  cache_bytes: float  # Of all videos.
  read_rate: float  # Bytes a second that the cache has to give.
  hours_saved: float  # By features that are there, of `hours`.


def plan(num_videos: int, name: str, count: int, measured: Measured) -> Plan:
  """Returns the cost of an epoch on `count` accelerators of a name."""
  slower = PEAKS[MEASURED] / PEAKS[name]
  efficiency = measured.efficiency if count > 1 else 1.0

  def hours(seconds):
    return num_videos * seconds * slower / (count * efficiency) / 3600

  whole, tower = map(hours, measured[:2])
  cache = num_videos * measured.feature_bytes
  return Plan(
    hours=whole,
    accelerator_hours=whole * count,
    steps=-(-num_videos // count),
    cache_bytes=cache,
    # With the cache a step is as much shorter.
    read_rate=cache / (3600 * (whole - tower)),
    hours_saved=tower,
  )


def parse(text: str) -> tuple[str, int]:
  """Returns (name, number) of "h200:8"."""
  found = re.fullmatch(rf"({'|'.join(PEAKS)}):([1-9]\d*)", text.strip())
  errors.check(
    found is not None,
    f"--accelerators={text}: give NAME:NUMBER, a name of {', '.join(PEAKS)}",
  )
  return found[1], int(found[2])


def rows(accelerators: Sequence[str], measured: Measured) -> list[list[str]]:
  """Returns the cells of the table, videos first."""
  out = []
  for count in VIDEOS:
    for name, number in map(parse, accelerators):
      one = plan(count, name, number, measured)
      numbers = (
        one.hours, one.accelerator_hours, one.steps, one.cache_bytes / 1e12,
        one.read_rate / 1e9, one.hours_saved,
      )  # fmt: skip
      label = f"{number} x {name}" + " (estimate)" * (name != MEASURED)
      out.append([f"{count:.0e}", label, *map(_short, numbers)])
  return out


def _short(number: float) -> str:
  """Returns three digits, without an exponent."""
  return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def measured_of(args) -> Measured:
  """Returns what a command line says, with sizes of LLaVA-OneVision-7B."""
  errors.check(
    args.tower_seconds < args.seconds_per_video and args.efficiency > 0,
    f"--tower_seconds={args.tower_seconds} is no part of"
    f" --seconds_per_video={args.seconds_per_video}, or --efficiency is 0",
  )
  config = llava_onevision.LlavaOnevisionConfig.llava_onevision_7b()
  size = cost.feature_bytes(config, GRID)
  given = args.seconds_per_video, args.tower_seconds, args.efficiency
  return Measured(*given, size)


def state_bytes() -> int:
  """Returns the size of a checkpoint: parameters and both moments."""
  text = llava_onevision.LlavaOnevisionConfig.llava_onevision_7b().text
  policy = network.Policy.from_llm_config(text)
  return 3 * cost.policy_bytes(policy.config)


def main(args):
  """Prints the table in Markdown."""
  found = rows(args.accelerators, measured_of(args))
  print(tables.as_markdown(HEAD, found, range(2, len(HEAD))))
  reporting.table(
    ("what", "GB"), [["a saved step of the policy", state_bytes() / 1e9]]
  )


if __name__ == "__main__":
  COMMAND.run(main)
