r"""How fast 32 frames are taken from H.264 and HEVC clips of several lengths.

python -m experiments.decode_speed --old=CHECKOUT

Clips of 640 x 360 at 25 frames a second, in groups of 50 with three B-frames,
are made in `--workdir`. Every reader is a process of its own, started once, and
they take turns on each clip, so that all meet the same machine: that of this
checkout, in itself and with a process that decodes, and that of another one, if
it is given. Times are medians of `--repeats`; `X / old` is the throughput of X
as a share of the other checkout's.
"""

import itertools
import os
import pathlib
import subprocess
import sys

import av

from cacovid_jax import command, errors
from cacovid_jax.evals import latency, timing
from experiments import clip_matrix, reporting

COMMAND = command.Command(
  __doc__,
  {
    "workdir": command.Flag("Folder of the clips.", default="workdirs/decode"),
    "old": command.Flag("Another checkout, to be compared.", default=""),
    "seconds": command.Flag("Lengths of the clips.", default="10,60,600"),
    "repeats": latency.REPEATS,
  },
  defaults={"table.repeats": 9},
)

_SIZE, _SECONDS = (640, 360), 10
_FAST = {"preset": "ultrafast"}
_GROUPS = "keyint=50:min-keyint=50:scenecut=0:bframes=3:open-gop=0"
_CODECS = {
  "h264": ("libx264", _FAST | {"x264-params": _GROUPS}),
  "hevc": ("libx265", _FAST | {"x265-params": f"{_GROUPS}:log-level=none"}),
}
# Reads paths, writes seconds.
_READER = """
import sys, time
import numpy as np
from cacovid_jax.data import video
rule = lambda n, s: np.linspace(0, n - 1, 32).astype(np.int64)
decode = video.decode
{changes}
for line in sys.stdin:
  start = time.perf_counter()
  decode(line[:-1], rule)
  print(time.perf_counter() - start, flush=True)
"""
_WORKERS = """
import functools
from cacovid_jax.data import decode_workers, frames
rule = frames.FrameRule(32)
decode = functools.partial(decode_workers.run, decode)
"""


def make(path: pathlib.Path, codec: str, seconds: int):
  """Writes a clip of whole tens of seconds; one that is there stays."""
  first = path.with_name(f"{codec}_{_SECONDS}.mp4")
  if not first.exists():
    pictures = (
      clip_matrix.moving(number, 80, 64) for number in range(25 * _SECONDS)
    )
    clip_matrix.encode(first, _CODECS[codec], pictures, _SIZE)
  if not path.exists():
    _repeat(path, first, seconds // _SECONDS)


def _repeat(path, source, count: int):
  """Writes a clip that shows another one so many times."""
  with (
    av.open(str(source)) as given,
    clip_matrix.written(path) as partial,
    av.open(str(partial), "w") as out,
  ):
    old = given.streams.video[0]
    new = out.add_stream_from_template(old)
    length = round(_SECONDS / old.time_base)
    for turn in range(count):
      given.seek(0)
      for packet in given.demux(old):
        if packet.size:
          packet.pts += turn * length
          packet.dts += turn * length
          packet.stream = new
          out.mux(packet)


def measure(clips, readers, repeats: int):
  """Yields per clip {reader: median milliseconds}; the readers take turns.

  `readers` is name -> (folder of the package, changes of how it reads).
  """
  running = {}
  try:
    for name, (folder, changes) in readers.items():
      running[name] = subprocess.Popen(
        [sys.executable, "-c", _READER.format(changes=changes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
      )  # fmt: skip
    for clip in clips:
      times = {name: [] for name in readers}
      for turn in range(repeats + 1):
        for name, process in running.items():
          process.stdin.write(f"{clip}\n")
          process.stdin.flush()
          if not (told := process.stdout.readline()):
            raise errors.UserError(f"{clip}: the reader {name} ended")
          if turn:  # The first one warms up.
            times[name].append(1e3 * float(told))
      yield {name: timing.Timing.of(found).ms for name, found in times.items()}
  finally:
    for process in running.values():
      process.stdin.close()
      process.wait()


def main(args):
  """Prints a row for each codec and length."""
  folder, here = pathlib.Path(args.workdir), pathlib.Path(__file__).parents[1]
  folder.mkdir(parents=True, exist_ok=True)
  readers = {"ours": (here, ""), "workers": (here, _WORKERS)}
  if args.old:
    if not pathlib.Path(args.old, "cacovid_jax").is_dir():
      raise errors.UserError(f"--old={args.old}: no checkout; give its folder")
    readers["old"] = args.old, ""
  lengths = args.seconds.split(",")
  tens = range(_SECONDS, 100_000, _SECONDS)
  if not all(text.isdecimal() and int(text) in tens for text in lengths):
    raise errors.UserError(f"--seconds={args.seconds}: give tens, as 10,60,600")
  cases = list(itertools.product(_CODECS, map(int, lengths)))
  paths = [folder / f"{codec}_{seconds}.mp4" for codec, seconds in cases]
  for path, (codec, seconds) in zip(paths, cases, strict=True):
    make(path, codec, seconds)
  rows = []
  found = measure(paths, readers, args.config.table.repeats)
  for (codec, seconds), times in zip(cases, found, strict=True):
    ratios = [times["old"] / times[name] for name in readers if "old" in times]
    rows.append((codec, seconds, *times.values(), *ratios))
  head = ("codec", "seconds", *(f"{name} ms" for name in readers))
  head += tuple(f"{name} / old" for name in readers if args.old)
  reporting.table(head, rows, "32 frames of a clip")


if __name__ == "__main__":
  COMMAND.run(main)
