r"""How times and memory grow with frames, and with videos asked at once.

python -m experiments.scaling --size=ov-7b
python -m experiments.scaling --size=tiny --frames=2,4 --batches=1,2  # on a CPU

One video of `--frames` each, then `--batches` videos of the first number of
frames, by our programs: tower, select (scores, choice and gather of a quarter
of the tokens), prefill of that quarter and of all. Medians of `--repeats` runs;
memory is the most that the process has held by then, so a line that needs less
than one before it shows that one's. The gain is the time to the first token
(tower, selection and prefill) from all tokens over that from a quarter. What
does not fit is written as such. `experiments.throughput` has whole evaluations.

WORKDIR/table.md, frames.svg, batches.svg, results.json
WORKDIR/rows.jsonl   every time as it is measured; given again, it goes on
"""

import functools
import math
import pathlib

from cacovid_jax import command, errors, files
from cacovid_jax.evals import tables
from cacovid_jax.evals.report import charts
from experiments import efficiency_table, made_up, reporting, stages

_SIZES = [
  name
  for name, size in efficiency_table.SIZES.items()
  if hasattr(size.config(), "pooled_side")
]
_CELLS = (("tower", 1.0), ("select", 0.25), ("prefill", 0.25), ("prefill", 1.0))
FILES = ("table.md", "frames.svg", "batches.svg", "results.json")

_SHARED = efficiency_table.COMMAND.flags

COMMAND = command.Command(
  __doc__,
  {name: _SHARED[name] for name in ("workdir", "weights", "repeats")}
  | {
    "size": _SHARED["size"]._replace(choices=_SIZES),
    "frames": command.Flag(
      "Frames of one video.", default=(32, 64, 128, 256, 512)
    ),
    "batches": command.Flag("Videos at once.", default=(1, 2, 4, 8, 16)),
  },
)


def main(args):
  """Measures what the command line asks for and writes the table."""
  table = args.config.table
  for name in ("frames", "batches"):
    values = getattr(args, name)
    fine = values and all(type(x) is int and x > 0 for x in values)
    errors.check(fine, f"--{name}={values}: give whole numbers above 0")
  workdir = pathlib.Path(args.workdir or f"workdirs/scaling_{table.size}")
  size = efficiency_table.SIZES[table.size]
  weights = table.weights or workdir / "weights"
  float8 = args.config.model.float8_tower

  @functools.cache
  def checkpoint():
    return made_up.checkpoint(size.config(), size.dtype, weights, float8)

  def make(frames, batch):
    subject = made_up.subject(checkpoint(), (frames, *size.grid[1:]))
    return stages.Ours(subject, batch)

  sizes = [(frames, 1) for frames in args.frames]
  sizes += [(args.frames[0], batch) for batch in args.batches]
  sizes.sort(key=math.prod)  # The peak of memory is that of all so far.
  engines = {
    f"{f} x {b}": functools.partial(make, f, b) for f, b in dict.fromkeys(sizes)
  }
  run = efficiency_table.run_of(table.size, table.repeats, float8)
  run |= {"grid": None}
  with reporting.ledger(workdir / "rows.jsonl", run) as rows:
    found = stages.measure(engines, _CELLS, rows, table.repeats)
  write(workdir, found, run, args)


def write(workdir, rows, run, args):
  """Writes `FILES`, of rows of `stages.measure`."""
  by = {(row["engine"], row["stage"], row["ratio"]): row for row in rows}
  titles = [f"{stage} {ratio:.0%}" for stage, ratio in _CELLS]
  lines = []
  for name in dict.fromkeys(row["engine"] for row in rows):
    cells = [by[name, *cell] for cell in _CELLS]
    most = max((row.get("peak_gib", 0.0) for row in cells), default=0.0)
    line = [*name.split(" x "), *map(stages.told, cells), _gain(cells)]
    lines.append([*line, f"{most:.2f}" if most else ""])
  head = ["frames", "videos", *(f"{t}, ms" for t in titles), "gain", "GiB"]
  text = f"{tables.as_markdown(head, lines, range(len(head)))}\n"
  files.write(workdir / FILES[0], text)
  for path, values, pattern, label in (
    (FILES[1], args.frames, "{} x 1", "frames (logarithmic)"),
    (
      FILES[2],
      args.batches,
      f"{args.frames[0]} x {{}}",
      "videos (logarithmic)",
    ),
  ):
    points = {}
    for title, cell in zip(titles, _CELLS, strict=True):
      cells = {x: by[pattern.format(x), *cell] for x in values}
      line = [(x, one["ms"]) for x, one in cells.items() if "ms" in one]
      if line:
        points[title] = line
    chart = charts.lines(
      points, label, "milliseconds", log_x=True, x_ticks=values
    )
    files.write(workdir / path, chart.file(f"{run['size']}, {run['device']}"))
  files.write_json(workdir / FILES[3], run | {"rows": rows})
  print(text)
  reporting.files(workdir, FILES)


def _gain(cells) -> str:
  """Returns how much sooner a quarter of the tokens gives the first token."""
  if not all("ms" in cell for cell in cells):
    return ""
  tower, select, quarter, whole = (cell["ms"] for cell in cells)
  return f"{(tower + whole) / (tower + select + quarter):.2f}"


if __name__ == "__main__":
  COMMAND.run(main)
