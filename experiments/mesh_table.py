r"""What meshes of four devices take, and whether they compute the same.

python -m experiments.mesh_table --size=ov-7b --workdir=/scratch/meshes_ov7b
JAX_NUM_CPU_DEVICES=4 JAX_PLATFORMS=cpu python -m experiments.mesh_table \
    --size=tiny-ov --workdir=workdirs/meshes --set=data.num_frames=4

Each mesh, data x model, has a process (WORKDIR/DATAxMODEL.log), all of them the
same random weights and clips. An evaluation asks `--questions`, `--videos` at
once, from a quarter of the tokens of encoded clips, which the policy before its
training chooses; a training updates on one batch of `--videos`. Times are
medians of `--repeats` runs behind one that compiles, memory is the most that a
device has held by then; all is compared with the first mesh.

WORKDIR/table.md, results.json   written anew after each mesh
WORKDIR/rows.jsonl               a line each; given again, it goes on
"""

import dataclasses
import os
import pathlib
import re

import numpy as np

from cacovid_jax import command, errors, files, terminal
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import answer_log
from cacovid_jax.evals import evaluation, evaluator, provenance, tables, timing
from cacovid_jax.inference import answerer, clip_queue
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.policy import loading
from cacovid_jax.training import programs
from cacovid_jax.training import run as run_lib
from experiments import directory_run, made_up_questions, reporting

FILES = ("table.md", "results.json")
_CELL = methods_lib.Condition(methods_lib.Method.parse("cacovid"), 0.25)
_MEMORY = "evaluation_gib", "training_gib"
_TOLD = "size", "videos", "questions", "repeats"

COMMAND = command.Command(
  __doc__,
  {n: directory_run.COMMAND.flags[n] for n in ("size", "workdir", "set")}
  | {
    "meshes": command.Flag("DATAxMODEL.", default=("1x1", "4x1", "1x4", "2x2")),
    "videos": command.Flag("Of an update and a batch.", default=4, least=1),
    "questions": command.Flag("Asked in all.", default=64, least=1),
    "repeats": command.Flag("Timed runs.", default=5, least=1),
    "only": command.Flag("The one that this process measures."),
  },
  config="none",
)


def main(args) -> int:
  """Measures each mesh in a process, or the one of `--only` in this one."""
  COMMAND.require(args, "workdir", "meshes")
  for mesh in args.meshes:
    fine = re.fullmatch("[1-9][0-9]?x[1-9][0-9]?", mesh)
    errors.check(fine, f"--meshes={mesh}: write DATAxMODEL, such as 2x2")
  known = not args.only or args.only in args.meshes
  errors.check(known, f"--only={args.only}: give one of --meshes")
  workdir = pathlib.Path(args.workdir).absolute()
  if args.only:
    return row(args, workdir)
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  directory_run.write_model(args.size, workdir / "model", 0)
  made_up_questions.write(workdir / "data")
  words = [f"--{name}={getattr(args, name)}" for name in ("workdir", *_TOLD)]
  words += [f"--set={text}" for text in args.set]
  words.append(f"--meshes={','.join(args.meshes)}")
  run, code = directory_run.Runner(workdir), 0
  for mesh in args.meshes:
    if run(mesh, "experiments.mesh_table", [*words, f"--only={mesh}"]).code:
      log = workdir / f"{mesh}.log"
      *_, last = ["", *log.read_text().strip().splitlines()]
      terminal.tell(f"{mesh} went wrong: {last} (all of it: {log})")
      code = 1
  reporting.files(workdir, [x for x in FILES if (workdir / x).exists()])
  return code


def row(args, workdir) -> int:
  """Measures the mesh of `--only`, unless it is known; writes `FILES`."""
  run = {name: getattr(args, name) for name in _TOLD}
  run |= {"set": list(args.set), "device": provenance.device_kind()}
  with reporting.ledger(workdir / "rows.jsonl", run) as rows:
    key = answer_log.Key(args.only, 1.0, 0, "")
    reporting.once(rows, key, lambda: measure(args, workdir))
    found = {key.method: value for key, value in rows.items()}
  found = {mesh: found[mesh] for mesh in args.meshes if mesh in found}
  files.write(workdir / FILES[0], f"{markdown(found)}\n")
  files.write_json(workdir / FILES[1], run | {"meshes": found})
  return 0


def measure(args, workdir) -> dict:
  """Returns times, memory, and what was kept, said and earned on a mesh."""
  data, model = args.only.split("x")
  changes = [f"mesh.data={data}", f"mesh.model={model}", *args.set]
  changes += [f"total_steps={args.repeats + 1}"]
  for key in ("videos_per_step", "evals.batch_size"):
    changes.append(f"{key}={args.videos}")
  given = args.size, workdir / "model", workdir / "data", changes
  config, make = directory_run.configured(*given), experiment_lib.Experiment
  trained = make.from_config(config, workdir, split="videos_per_step")
  asked, run = make.from_config(config), run_lib.Run(trained)
  asked.adopt(trained)
  policy = loading.LoadedPolicy.of(run.config.policy, run.init_params())
  found = evaluate(asked, policy, workdir / "data", args)
  devices, state = [*asked.mesh.devices.flat], run.init_state()
  found["evaluation_gib"] = timing.peak_gib(devices)
  batch = programs.place_batch(next(run.batches(0))[0], run.mesh)

  def update():
    nonlocal state
    state, _, earned, _ = run.programs.run(state, run.constants, batch)
    if "rewards" not in found:  # Of the first, which is not timed.
      found["rewards"] = np.ravel(earned).tolist()
    return state

  found["training_ms"] = timing.measure(update, args.repeats).ms / args.videos
  return found | {"training_gib": timing.peak_gib(devices)}


def evaluate(experiment, policy, folder, args) -> dict:
  """Returns milliseconds a question, and what was kept and said of each."""
  names = sorted(path.name for path in folder.glob("*.mp4"))
  questions, logs = [], []
  for number in range(args.questions):
    name, text = names[number % len(names)], f"Which of {number} is first?"
    one = answerer.as_question(name, text, ("red", "blue", "green", "black"))
    told = {"id": f"{number:04d}", "video": name, "answer": "A"}
    questions.append(dataclasses.replace(one, **told))
  with clip_queue.open_queue(experiment, keep=len(names)) as source:
    given = experiment, source, questions, evaluation.settings(experiment)
    engine = engine_lib.Engine.of(*given, policies={"policy": policy})

    def ask():
      logs.append(answer_log.AnswerLog(None, {}))
      evaluator.Evaluator(engine).run(questions, [_CELL], logs[-1])

    ms = timing.measure(ask, args.repeats).ms / len(questions)
    kept = engine.kept(questions, [_CELL])
  found = {"kept": [kept[one.id][0].index.tolist() for one in questions]}
  for name in ("text", "letter"):
    found[name] = [logs[0][_CELL.key(one.id)][name] for one in questions]
  return found | {"evaluation_ms": ms}


def markdown(rows) -> str:
  """Returns a table of the rows by mesh, compared with the first one."""
  first, lines = next(iter(rows.values())), []
  for mesh, one in rows.items():
    alike = [np.concatenate([*map(np.isin, one["kept"], first["kept"])])]
    for name in ("text", "letter"):
      alike.append(np.array(one[name]) == np.array(first[name]))
    apart = np.abs(np.subtract(one["rewards"], first["rewards"])).max()
    line = [mesh]
    for name in ("training_ms", "evaluation_ms", *_MEMORY):
      line.append(f"{one[name]:.4g}" if one[name] else "")
    lines.append([*line, *(f"{x.mean():.2%}" for x in alike), f"{apart:.2g}"])
  head = (
    "data x model", "training, ms a video", "evaluation, ms a question",
    "evaluation, GiB", "training, GiB", "kept alike", "texts alike",
    "letters alike", "rewards, largest difference",
  )  # fmt: skip
  return tables.as_markdown(head, lines, range(1, len(head)))


if __name__ == "__main__":
  COMMAND.run(main)
