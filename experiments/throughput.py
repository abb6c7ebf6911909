r"""Clips that an evaluation answers in a second, by questions asked at once.

python -m experiments.throughput --size=ov-7b
python -m experiments.throughput --size=tiny --clips=4 --seconds=1 \
    --batches=1,2 --threads=2    # on a CPU

Asks one question about each of `--clips` H.264 files of 640 x 360, decoded in
processes of their own, from all tokens and from a quarter that the policy
chooses, as an evaluation does: `--threads` decode ahead, and a batch is asked
before the one in front is read. Weights are random, and answers have
`--max_new_tokens` tokens whatever they are. A first batch, which compiles, is
not counted. Beside the rates stands the share of the time that the device was
busy, and what compression gains: time per clip from all tokens over that from a
quarter.

WORKDIR/table.md, results.json
WORKDIR/rows.jsonl   every row as it is measured; given again, it goes on
"""

import dataclasses
import functools
import os
import pathlib

from cacovid_jax import command, errors, evaluate, files
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import answer_log, frames
from cacovid_jax.evals import evaluation, tables
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import answerer, clip_queue, device_watch, features
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from experiments import efficiency_table, made_up, reporting, scaling

FILES = ("table.md", "results.json")
_CONDITIONS = (
  methods_lib.Condition(),
  methods_lib.Condition(methods_lib.Method.parse("cacovid"), 0.25),
)
_SHARED = scaling.COMMAND.flags

COMMAND = command.Command(
  __doc__,
  {name: _SHARED[name] for name in ("workdir", "weights", "size")}
  | {
    "batches": _SHARED["batches"]._replace(
      help="Questions at once.", default=(1, 8, 16)
    ),
    "clips": command.Flag("Clips asked about.", default=64, least=1),
    "seconds": command.Flag("Length of a clip.", default=60, least=1),
    "threads": command.Flag("That decode clips ahead.", "data.num_threads"),
    "max_new_tokens": evaluate.COMMAND.flags["max_new_tokens"],
  },
  defaults={"data.num_threads": 16, "evals.max_new_tokens": 2},
)


def main(args):
  """Measures what the command line asks for and writes the table."""
  fine = args.batches and all(type(x) is int and x > 0 for x in args.batches)
  errors.check(fine, f"--batches={args.batches}: give whole numbers above 0")
  table, data = args.config.table, args.config.data
  workdir = pathlib.Path(args.workdir or f"workdirs/throughput_{table.size}")
  weights = pathlib.Path(table.weights or workdir / "weights")
  float8 = args.config.model.float8_tower
  run = efficiency_table.run_of(table.size, 1, float8) | {
    "clips": args.clips,
    "cores": os.cpu_count(),
    "max_new_tokens": args.config.evals.max_new_tokens,
    "seconds": args.seconds,
    "threads": data.num_threads,
  }
  made = functools.cache(lambda: _made(args, weights, workdir / "clips"))
  with reporting.ledger(workdir / "rows.jsonl", run) as rows:
    found = []
    for batch in dict.fromkeys(args.batches):
      for condition in _CONDITIONS:
        row = {"batch": batch, "ratio": condition.ratio, "status": "ok"}
        measure = functools.partial(ask, made, batch, condition)
        try:
          row |= reporting.once(rows, condition.key(f"batch {batch}"), measure)
        except errors.UserError as error:
          row["status"] = errors.one_line(error)
        found.append(row)
  text = f"{markdown(found)}\n"
  files.write(workdir / FILES[0], text)
  files.write_json(workdir / FILES[1], run | {"rows": found})
  print(text)
  reporting.files(workdir, FILES)


def markdown(rows) -> str:
  """Returns a table, a line per batch size and share of tokens.

  The last column is the gain as a share of that of the first batch size.
  """
  times = {
    (row["batch"], row["ratio"]): row["seconds"] / row["clips"]
    for row in rows
    if row["status"] == "ok"
  }
  gains, lines = {}, []
  for row in rows:
    batch, ratio = row["batch"], row["ratio"]
    line = [str(batch), f"{ratio:.0%}"]
    if row["status"] != "ok":
      lines.append([*line, row["status"].partition(" (")[0], *[""] * 4])
      continue
    line += [f"{1e3 * times[batch, ratio]:.4g}"]
    line += [f"{row['clips_per_second']:.3g}", f"{row['busy_share']:.0%}"]
    if ratio < 1 and (batch, 1.0) in times:
      gains[batch] = times[batch, 1.0] / times[batch, ratio]
      line.append(f"{gains[batch]:.2f}")
      line.append(f"{gains[batch] / next(iter(gains.values())):.2f}")
    lines.append([*line, *[""] * (7 - len(line))])
  head = ["at once", "kept", "ms a clip", "clips/s", "busy", "gain", "of first"]
  return tables.as_markdown(head, lines, range(len(head)))


def write_clips(folder: pathlib.Path, count: int, seconds: int) -> list[str]:
  """Writes clips, one of which is encoded; returns their names."""
  made_up.write_clip(first := folder / f"{seconds}s.mp4", seconds)
  names = [f"{seconds}s_{number}.mp4" for number in range(count)]
  for name in names:
    if not (folder / name).exists():
      os.link(first, folder / name)
  return names


def _made(args, weights, folder):
  """Returns (experiment, policy, questions) to ask."""
  size, config = efficiency_table.SIZES[args.config.table.size], args.config
  tokenizer, model = made_up.tokenizer(), size.config()
  # A tiny model knows too few words.
  words = max(model.text.vocab_size, tokenizer.vocab_size)
  text = dataclasses.replace(model.text, vocab_size=words)
  model = dataclasses.replace(model, text=text)
  float8 = config.model.float8_tower
  found = made_up.checkpoint(model, size.dtype, weights, float8)
  found = dataclasses.replace(found, tokenizer=tokenizer, eos_ids=())
  changes = {
    "data.root": str(folder),
    "data.num_frames": size.grid[0],
    "data.feature_cache": "",
    "mesh.data": 1,
    "model.path": str(weights),
    "model.dtype": size.dtype,
  }
  experiment = experiment_lib.Experiment.from_config(
    config_lib.replace(config, changes), checkpoint=found
  )
  asked = answerer.as_question("clip", "What is first?", ("red", "blue"))
  questions = [
    dataclasses.replace(asked, id=name, video=name, answer="A")
    for name in write_clips(folder, args.clips, args.seconds)
  ]
  return experiment, made_up.policy(found), questions


def ask(made, batch: int, condition):
  """Returns what `Throughput.report` says of batches of a size.

  `made` gives an experiment, a policy and the questions.
  """
  experiment, policy, questions = made()
  experiment = experiment.replace({"evals.batch_size": batch})
  data = experiment.config.data
  with features.open_store(
    experiment,
    # Random weights have no files that name a processor.
    experiment.checkpoint.model.processor,
    frames.FrameRule(data.num_frames),
    make=clip_queue.ClipQueue,
    keep=batch,
    num_threads=max(data.num_threads, 1),
    watch=device_watch.DeviceWatch(),
  ) as source:
    engine = engine_lib.Engine.of(
      experiment,
      source,
      questions,
      evaluation.settings(experiment),
      policies={"policy": policy},
    )
    # Programs are compiled, then decoders started, and none of it is measured.
    several = max(batch, data.num_threads)
    for part in (questions[:batch], questions[:several], questions):
      evaluator = evaluator_lib.Evaluator(engine)
      source.clear()
      evaluator.run(part, [condition], answer_log.AnswerLog(None, {}))
    return evaluator.throughput.report()


if __name__ == "__main__":
  COMMAND.run(main)
