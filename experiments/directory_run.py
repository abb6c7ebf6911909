r"""A checkpoint directory from training to evaluation, with a stop in between.

python -m experiments.directory_run --size=tiny-ov --workdir=workdirs/tiny_run
python -m experiments.directory_run --size=ov-7b --workdir=/scratch/ov7b

  write     a directory of the size with random weights, in shards (a tiny size
            is complete, too), unless --model names one of the real weights
  clips     mp4 files of 4 to 100 seconds, and questions about them, also in
            folders as Video-MME and MVBench are released
  doctor    looks at all of it
  train     is sent --signal once --stop_after steps are saved
  resume    the same command again, to the end, with validation
  evaluate  the trained policy beside a rule, on each of --benchmarks

Each stage but the first two is a command of its own, as a user gives it.
Everything stays in the workdir: WORKDIR/transcript.md has commands, exit codes
and seconds, and what the run left behind. Random weights earn equal rewards of
0 by `--reward=accuracy`, so that only `log_likelihood` moves the policy by
gradients. Exit code 1 tells that a stage ended otherwise than it should.
"""

import importlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

import configs
from cacovid_jax import command, errors, files, metrics, terminal
from cacovid_jax import config as config_lib
from cacovid_jax.evals import tables
from cacovid_jax.models import safetensors_io
from cacovid_jax.synthetic import tiny_checkpoints
from cacovid_jax.training import checkpointing
from experiments import made_up_questions, parity_at_size

# Size -> config file and its argument.
_FILES = {
  "ov-0.5b": "llava_onevision.py:size=0_5b",
  "ov-7b": "llava_onevision.py:size=7b",
  "qvl-3b": "qwen2_5_vl.py:size=3b",
  "qvl-7b": "qwen2_5_vl.py:size=7b",
  "q3vl-2b": "qwen3_vl.py:size=2b",
  "q3vl-8b": "qwen3_vl.py:size=8b",
  "tiny-ov": "llava_onevision.py:debug",
  "tiny-qvl": "qwen2_5_vl.py:debug",
  "tiny-q3vl": "qwen3_vl.py:debug",
}
_TINY = {
  "tiny-ov": "llava_onevision",
  "tiny-qvl": "qwen2_5_vl",
  "tiny-q3vl": "qwen3_vl",
}
_OWN = "own"  # Benchmark of all clips; the others have those of the test.
_EVALUATE = "evaluate"
_HEAD = ("stage", "command", "exit code", "seconds")

COMMAND = command.Command(
  __doc__,
  {
    "size": command.Flag(
      "Whose sizes and config.", default="tiny-ov", choices=list(_FILES)
    ),
    "workdir": command.Flag("Folder of everything."),
    "model": command.Flag(
      "Directory of weights; empty writes random ones into the workdir."
    ),
    "seed": command.Flag("Of random weights.", default=0, least=0),
    "reward": command.Flag(
      "Of the rollouts.", default="log_likelihood",
      choices=("log_likelihood", "accuracy"),
    ),
    "steps": command.Flag("Of the training.", default=4, least=3),
    "benchmarks": command.Flag(
      f"What is asked in the end: {_OWN}, videomme, mvbench.", default=(_OWN,)
    ),
    "stop_after": command.Flag(
      "Steps saved before the signal, and every so many.", default=2, least=1
    ),
    "signal": command.Flag(
      "TERM, after which a run saves, or KILL.", default="TERM",
      choices=("TERM", "KILL"),
    ),
    "write_only": command.Flag("End after the stage clips.", default=False),
    "set": command.Flag(
      "KEY=VALUE of the config, in all stages; may be repeated.", default=(),
      many=True,
    ),
  },
  config="none",
)  # fmt: skip


class Ended(NamedTuple):
  """A stage of the transcript."""

  stage: str
  command: str
  code: int
  seconds: float

  def right(self, sent: str) -> bool:
    """Whether it ended as it should, the training by the signal sent."""
    stopped = 143 if sent == "TERM" else -signal.SIGKILL
    return self.code == (stopped if self.stage == "train" else 0)


def main(args) -> int:
  """Runs all stages; returns the exit code."""
  # This process draws weights, its commands need the device's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  COMMAND.require(args, "workdir")
  errors.check(
    args.stop_after + 1 < args.steps,
    f"--stop_after={args.stop_after}: the step under way is finished, and one"
    f" must be left: give at most {args.steps - 2}, or more --steps",
  )
  known = _OWN, *made_up_questions.RELEASED
  errors.check(
    {*args.benchmarks} <= {*known},
    f"--benchmarks={','.join(args.benchmarks)}: choose of {', '.join(known)}",
  )
  workdir = pathlib.Path(args.workdir).absolute()
  model = pathlib.Path(args.model or workdir / "model").absolute()
  errors.check(
    args.write_only or not (workdir / "run").exists(),
    f"{workdir / 'run'} is of an earlier run; give another --workdir (and"
    f" --model={model} for its weights)",
  )
  done = []
  if not args.model:
    done.append(_timed("write", write_model, args.size, model, args.seed))
  done.append(_timed("clips", made_up_questions.write, workdir / "data"))
  if not args.write_only:
    done += _commands(args, workdir, model)
  text = tables.as_markdown(
    _HEAD,
    [[x.stage, x.command, str(x.code), f"{x.seconds:.1f}"] for x in done],
    range(2, 4),
  )
  facts = [] if args.write_only else left_behind(workdir, model)
  text = "\n\n".join([text, *facts]) + "\n"
  files.write(workdir / "transcript.md", text)
  terminal.tell(text.rstrip())
  if done[-1].right(args.signal):
    return 0
  stage = done[-1].stage
  terminal.tell(f"{stage} went wrong; see {workdir / (stage + '.log')}")
  return 1


def _timed(stage, function, *given) -> Ended:
  start = time.monotonic()
  function(*given)
  return Ended(stage, "", 0, time.monotonic() - start)


def write_model(size: str, directory, seed: int) -> None:
  """Writes the directory of a size, unless one is there."""
  directory = pathlib.Path(directory)
  if directory.exists():  # Complete, since it was renamed in the end.
    return
  partial = directory.with_name(f"{directory.name}.partial")
  with files.claim(directory, hint="or give another --workdir"):
    shutil.rmtree(partial, ignore_errors=True)  # Cut off.
    if size in _TINY:
      tiny_checkpoints.write_tiny(partial, _TINY[size])
    else:
      config = parity_at_size.CONFIGS[size]()
      tiny_checkpoints.write_complete(partial, config, seed)
    os.replace(partial, directory)


def configured(size: str, model, data, texts=(), reward="log_likelihood"):
  """Returns the config of all commands, with "key=value" texts on top."""
  source = pathlib.Path(configs.__file__).with_name(_FILES[size])
  keys = {
    "model.path": model,
    "data.root": data,
    "data.train_file": "train.json",
    "log_every": 1,
    "validation.num_questions": 2,
    "validation.batch_size": 1,
    "rollout.max_new_tokens": 2,
    "evals.benchmark": "own",
    "evals.methods": "cacovid,divprune",
    "evals.ratios": "(0.25,)",
    "evals.batch_size": 1,
    "evals.num_examples": 1,
  }
  if reward != "accuracy":
    # Graded rewards need a fixed ratio.
    keys |= {"rollout.reward": reward, "ratio.adaptive": False}
  if size in _TINY:
    # Of 4 x 4 tokens, the released models' ratio keeps none.
    keys |= {"data.num_frames": 8, "sampling.ratio": 0.125}
  changes = [f"{key}={value}" for key, value in keys.items()]
  return config_lib.load(source, [*changes, *texts])


def _commands(args, workdir, model) -> list[Ended]:
  """Runs the stages that are commands, up to one that goes wrong."""
  texts = [
    f"total_steps={args.steps}",
    f"validation.every_steps={args.steps}",
    f"ckpt.every_steps={args.stop_after}",
    *args.set,
  ]
  data, config = workdir / "data", workdir / "config.json"
  made = configured(args.size, model, data, texts, args.reward)
  config_lib.save(made, config)
  run, policy = Runner(workdir), workdir / "run"
  given = [f"--config={config}", f"--workdir={policy}"]
  train = "cacovid_jax.train", given
  stages = [
    ("doctor", "cacovid_jax.doctor", given),
    ("train", *train, (args.stop_after, args.signal)),
    ("resume", *train),
  ]
  for name in dict.fromkeys(args.benchmarks):
    stage, asked = _EVALUATE, []
    if name != _OWN:
      stage = f"{_EVALUATE}_{name}"
      asked = [f"--benchmark={name}", f"--data={data / name}"]
    asked += [f"--policy={policy}", f"--workdir={workdir / stage}"]
    stages.append((stage, "cacovid_jax.evaluate", [given[0], *asked]))
  done = []
  for stage in stages:
    done.append(run(*stage))
    if not done[-1].right(args.signal):
      break
  return done


class Runner:
  """Runs commands, the output of each in WORKDIR/STAGE.log."""

  def __init__(self, workdir):
    self._workdir = workdir
    root = os.fspath(pathlib.Path(configs.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

  def __call__(self, stage, module, arguments, stop=None) -> Ended:
    """Runs a command to its end; `stop` is (saved steps, signal)."""
    told = shlex.join(["python", "-m", module, *arguments])
    terminal.tell(f"{stage}: {told}")
    words = ["-m", module, *arguments]
    if stop is not None:
      code = "from experiments import directory_run; directory_run.child()"
      words = ["-c", code, *map(str, stop), module, *arguments]
    start = time.monotonic()
    with open(self._workdir / f"{stage}.log", "wb") as log:
      code = subprocess.call(
        [sys.executable, *words], env=self._environment, stdout=log,
        stderr=subprocess.STDOUT,
      )  # fmt: skip
    return Ended(stage, f"`{told}`", code, time.monotonic() - start)


def child() -> None:
  """Runs the command of sys.argv, SAVED SIGNAL MODULE ARGUMENTS...

  The process is sent the signal once step SAVED is saved: from within, since
  from without it might come too late.
  """
  saved, name, module, *arguments = sys.argv[1:]
  save = checkpointing.save

  def saving(directory, step, *args, **options):
    save(directory, step, *args, **options)
    if step == int(saved):
      os.kill(os.getpid(), signal.Signals[f"SIG{name}"])

  checkpointing.save = saving
  sys.argv = [module, *arguments]
  found = importlib.import_module(module)
  found.COMMAND.run(found.main)


def left_behind(workdir, model) -> list[str]:
  """Returns lines about what a run and its evaluation wrote."""
  run, lines = workdir / "run", []
  rows = metrics.read(run)
  wanted = ("reward_token", "gradient_norm", "seconds_per_step")
  cells = [
    [str(row["step"]), *(f"{row[name]:.4g}" for name in wanted)]
    for row in rows
    if wanted[0] in row
  ]
  lines.append(tables.as_markdown(("step", *wanted), cells, range(4)))
  kept = ", ".join(map(str, checkpointing.steps(run / "checkpoints")))
  lines.append(f"Saved steps: {kept or 'none'}.")
  policy = run / "policy" / "policy.safetensors"
  if policy.exists():
    share, most = moved(policy, model)
    lines.append(
      f"The policy's layer began as the base model's first: {share:.1%} of its"
      f" parameters moved, by at most {most:.3g}."
    )
  for results in sorted(workdir.glob(f"{_EVALUATE}*/results.json")):
    found = json.loads(results.read_text(encoding="utf-8"))
    for name, ratios in found["methods"].items():
      for ratio, cell in ratios.items():
        told = f"{cell['accuracy']:.1%} right" if "accuracy" in cell else ""
        told = f"{name} at {ratio}: {cell['status']}, {told}."
        lines.append(f"{found['benchmark']}, {told}")
  return lines


def moved(policy, model) -> tuple[float, float]:
  """Returns (share of values that differ, largest difference).

  Of a policy's layer in a safetensors file and the first layer of its base
  model's directory, which it was before its training.
  """
  mark, changed, count, most = "layers.0.", 0, 0, 0.0
  own = {
    tensor.name.rpartition(mark)[2]: tensor
    for tensor in safetensors_io.list_tensors(policy)
    if mark in tensor.name
  }
  for tensor in safetensors_io.list_directory(model):
    head, _, name = tensor.name.rpartition(mark)
    if name not in own or "vis" in head:  # Of the tower.
      continue
    before, after = (
      np.asarray(x.view(), np.float32) for x in (tensor, own[name])
    )
    changed += int((before != after).sum())
    most = max(most, float(np.abs(after - before).max()))
    count += before.size
  return changed / max(count, 1), most


if __name__ == "__main__":
  COMMAND.run(main)
