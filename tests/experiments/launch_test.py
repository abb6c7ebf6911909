"""Launch scripts: the commands that they compose, and two real processes."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import tests
from cacovid_jax import evaluate, metrics
from cacovid_jax.policy import loading
from cacovid_jax.synthetic import tiny_checkpoints
from cacovid_jax.training import checkpointing
from tests.evals import tiny
from tests.training import tiny_qwen

ROOT = pathlib.Path(__file__).parent.parent.parent
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = ("gpu_box.sh", "slurm.sbatch", "slurm_evaluate.sbatch", "tpu_pod.sh")
GIVEN = ("--config=c.py:devices=8", "--workdir=a folder")

# Notes how it was called, one argument a line; exits as CODES says, call by
# call, 0 when they have run out.
_STUB = """#!/usr/bin/env bash
exec 9> "$CALLS.lock"; flock 9
{ printf '%s' "${0##*/}"; printf '|%s' "$@"; echo; } >> "$CALLS"
number=$(cat "$CALLS.number" 2>/dev/null || echo 0)
echo $((number + 1)) > "$CALLS.number"
flock -u 9
codes=(${CODES:-})
exit "${codes[number]:-0}"
"""
# What srun does for us: runs its command once per task, with its number.
_SRUN = """#!/usr/bin/env bash
flags=()
while [[ $1 == -* ]]; do flags+=("$1"); shift; done
{ printf 'srun'; printf '|%s' "${flags[@]}"; echo; } >> "$CALLS"
worst=0
for ((i = 0; i < ${SLURM_JOB_NUM_NODES:-1}; i++)); do
  SLURM_PROCID=$i SLURM_NTASKS=${SLURM_JOB_NUM_NODES:-1} "$@" || worst=$?
done
exit $worst
"""
_SCONTROL = """#!/usr/bin/env bash
{ printf 'scontrol'; printf '|%s' "$@"; echo; } >> "$CALLS"
[[ $1 != show ]] || printf '%s\\n' node7 node8 node9
"""


class Machine:
  """A PATH on which the programs that scripts call are stubs."""

  def __init__(self, folder):
    self.calls = folder / "calls"
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    stubs = {name: _STUB for name in ("python", "python3", "gcloud", "curl")}
    for name, text in (stubs | {"srun": _SRUN, "scontrol": _SCONTROL}).items():
      path = bin_folder / name
      path.write_text(text)
      path.chmod(0o755)
    self.env = {"PATH": f"{bin_folder}:/usr/bin:/bin", "CALLS": str(self.calls)}

  def run(self, script, *arguments, **env):
    """Returns (exit code, what was called, stderr)."""
    done = subprocess.run(
      ["bash", str(LAUNCH / script), *arguments],
      env=self.env | env,
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
    )
    lines = self.calls.read_text().splitlines() if self.calls.exists() else []
    return done.returncode, [tuple(x.split("|")) for x in lines], done.stderr


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


TRAIN = ("-m", "cacovid_jax.train", *GIVEN)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_valid_and_may_be_run(script):
  subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
  assert os.access(LAUNCH / script, os.X_OK)
  assert f"`{script}`" in (ROOT / "docs" / "launching.md").read_text()


def test_gpu_box_starts_again_after_143_and_only_then(machine):
  code, calls, told = machine.run("gpu_box.sh", *GIVEN, CODES="143 143 0")
  assert code == 0
  assert calls == [("python", *TRAIN)] * 3
  assert told.count("starting again") == 2


@pytest.mark.parametrize(
  "codes, restarts, expected, number",
  [("2", "", 2, 1), ("143 1", "", 1, 2), ("143 143 143", "1", 143, 2)],
)
def test_gpu_box_ends_with_the_code_of_the_run(
  machine, codes, restarts, expected, number
):
  code, calls, _ = machine.run(
    "gpu_box.sh", *GIVEN, CODES=codes, MAX_RESTARTS=restarts
  )
  assert (code, len(calls)) == (expected, number)


def test_gpu_box_numbers_its_processes(machine):
  code, calls, _ = machine.run(
    "gpu_box.sh", *GIVEN, PROCESSES="3", PORT="999", PYTHON="python3"
  )
  assert code == 0
  assert sorted(calls) == [
    (
      "python3",
      *TRAIN,
      "--coordinator=localhost:999",
      "--num_processes=3",
      f"--process_id={i}",
    )
    for i in range(3)
  ]


@pytest.mark.parametrize(
  "given, expected",
  [
    (None, ["0", "1", "2"]),
    ("4,6,7", ["4", "6", "7"]),
    ("GPU-a, GPU-b,GPU-c,GPU-d", ["GPU-a", "GPU-b", "GPU-c"]),
    ("", ["", "", ""]),
  ],
)
def test_gpu_box_gives_processes_the_gpus_that_are_visible(
  machine, given, expected
):
  _python(machine, 'echo "${@: -1}|$CUDA_VISIBLE_DEVICES" >> "$CALLS"\n')
  env = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
  code, calls, _ = machine.run("gpu_box.sh", *GIVEN, PROCESSES="3", **env)
  assert code == 0
  assert sorted(calls) == [
    (f"--process_id={i}", gpu) for i, gpu in enumerate(expected)
  ]


def test_gpu_box_leaves_one_process_what_is_visible(machine):
  _python(machine, 'echo "$CUDA_VISIBLE_DEVICES" >> "$CALLS"\n')
  machine.run("gpu_box.sh", *GIVEN, CUDA_VISIBLE_DEVICES="2,3")
  assert machine.calls.read_text() == "2,3\n"


def test_gpu_box_refuses_more_processes_than_gpus(machine):
  code, calls, told = machine.run(
    "gpu_box.sh", *GIVEN, PROCESSES="3", CUDA_VISIBLE_DEVICES="4,6"
  )
  assert (code, calls) == (2, [])
  assert told == (
    "error: PROCESSES=3, but CUDA_VISIBLE_DEVICES names 2 GPU(s): 4,6; name"
    " more, or start fewer\n"
  )


def _python(machine, text):
  path = pathlib.Path(machine.env["PATH"].split(":")[0]) / "python"
  path.write_text(f"#!/usr/bin/env bash\n{text}")


def test_gpu_box_ends_the_others_when_one_fails(machine):
  # The others take no notice of a SIGTERM, as in a collective.
  _python(
    machine,
    'case "$*" in *process_id=1*) exit 3;; esac\n'
    "trap : TERM; for i in {1..9000}; do sleep 0.1; done\n"
    'echo ended by itself >> "$CALLS"',
  )
  code, calls, _ = machine.run("gpu_box.sh", *GIVEN, PROCESSES="3", GRACE="1")
  assert (code, calls) == (3, [])


def test_gpu_box_passes_a_signal_on_and_does_not_start_again(machine):
  _python(
    machine,
    'trap "echo saved >> $CALLS; exit 143" TERM\n'
    "echo ready >> $CALLS; for i in {1..9000}; do sleep 0.1; done",
  )
  with subprocess.Popen(
    ["bash", str(LAUNCH / "gpu_box.sh"), *GIVEN], env=machine.env
  ) as run:
    while not machine.calls.exists():
      assert run.poll() is None
      time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=600) == 143
  assert machine.calls.read_text().split() == ["ready", "saved"]


def test_slurm_gives_each_node_a_process(machine):
  code, calls, _ = machine.run(
    "slurm.sbatch",
    *GIVEN,
    SLURM_JOB_NUM_NODES="3",
    SLURM_JOB_NODELIST="node[7-9]",
    SLURM_JOB_ID="70123",
    SLURM_CPUS_PER_TASK="24",
  )
  assert code == 0
  assert calls == [
    ("scontrol", "show", "hostnames", "node[7-9]"),
    ("srun", "--ntasks-per-node=1", "--cpus-per-task=24", "--wait=300"),
    *[
      (
        "python",
        *TRAIN,
        # 20000 + 70123 mod 20000.
        "--coordinator=node7:30123",
        "--num_processes=3",
        f"--process_id={i}",
      )
      for i in range(3)
    ],
  ]


@pytest.mark.parametrize(
  "code, requeued", [(143, True), (0, False), (2, False)]
)
def test_slurm_queues_a_job_again_that_was_stopped(machine, code, requeued):
  found, calls, _ = machine.run(
    "slurm.sbatch", *GIVEN, SLURM_JOB_ID="5", CODES=str(code)
  )
  assert found == code
  assert ("python", *TRAIN) in calls
  assert (("scontrol", "requeue", "5") in calls) == requeued


def _array(machine, ids, task, **env):
  """Runs a task of an array of these ids; returns what `machine.run` does."""
  return machine.run(
    "slurm_evaluate.sbatch",
    *GIVEN,
    SLURM_ARRAY_TASK_ID=str(task),
    SLURM_ARRAY_TASK_MIN=str(min(ids)),
    SLURM_ARRAY_TASK_MAX=str(max(ids)),
    SLURM_ARRAY_TASK_COUNT=str(len(ids)),
    **env,
  )


EVALUATE = ("-m", "cacovid_jax.evaluate", *GIVEN)


@pytest.mark.parametrize(
  "ids, task, env, shard",
  [
    (range(8), 6, {}, "6/8"),
    (range(1, 4), 3, {}, "2/3"),
    (range(4, 7), 6, {"FIRST": "4"}, "2/3"),
    # Parts of an array, submitted again.
    ([3], 3, {"SHARDS": "4"}, "3/4"),
    ([0, 2], 2, {"SHARDS": "8"}, "2/8"),
    ([5, 8], 8, {"SHARDS": "8", "FIRST": "1"}, "7/8"),
    ([1, 5, 9], 5, {"SHARDS": "10"}, "5/10"),
    ([0], 0, {"SHARDS": "1"}, "0/1"),
  ],
)
def test_slurm_arrays_share_an_evaluation(machine, ids, task, env, shard):
  code, calls, _ = _array(machine, ids, task, SLURM_CPUS_PER_TASK="6", **env)
  assert code == 0
  assert calls == [
    ("srun", "--ntasks=1", "--cpus-per-task=6"),
    ("python", *EVALUATE, f"--shard={shard}"),
  ]


@pytest.mark.parametrize(
  "ids, task, env, match",
  [
    ([1, 5, 9], 5, {}, "an array of 3 task(s) from 1 to 9 does not tell how"),
    ([3], 3, {}, "an array of 1 task(s) from 3 to 3 does not tell how many"),
    ([0], 0, {}, "an array of 1 task(s) from 0 to 0 does not tell how many"),
    (range(4, 7), 6, {}, "an array of 3 task(s) from 4 to 6 does not tell"),
    (range(4, 7), 6, {"FIRST": "5"}, "an array of 3 task(s) from 4 to 6 does"),
    ([9], 9, {"SHARDS": "4"}, "task 9 has none of the 4 shard(s), which are"
     " those of tasks 0 to 3; set SHARDS or FIRST"),
    ([0], 0, {"SHARDS": "4", "FIRST": "1"}, "task 0 has none of the 4"),
    ([0], 0, {"SHARDS": "0"}, "task 0 has none of the 0 shard(s)"),
    ([3], 3, {"SHARDS": "four"}, "SHARDS=four is not a whole number"),
    ([3], 3, {"SHARDS": "4", "FIRST": "-1"}, "FIRST=-1 is not a whole number"),
  ],
)  # fmt: skip
def test_slurm_arrays_of_unknown_shards_are_refused(
  machine, ids, task, env, match
):
  code, calls, told = _array(machine, ids, task, **env)
  assert (code, calls) == (2, [])
  assert told.startswith(f"error: {match}")
  assert told.count("\n") == 1


def test_slurm_arrays_share_other_commands(machine):
  code, calls, _ = _array(machine, range(3), 0, MODULE="experiments.main_table")
  assert code == 0
  assert calls[-1] == (
    "python",
    "-m",
    "experiments.main_table",
    *GIVEN,
    "--shard=0/3",
  )


def test_slurm_evaluate_without_an_array_is_refused(machine):
  code, calls, told = machine.run("slurm_evaluate.sbatch", *GIVEN)
  assert (code, calls) == (2, [])
  assert told == (
    "error: not a task of an array; submit it with sbatch --array=0-7\n"
  )


def test_tpu_pod_runs_itself_on_all_hosts(machine):
  code, calls, _ = machine.run("tpu_pod.sh", "slice", "zone-b", *GIVEN)
  assert code == 0
  *head, command = calls[0]
  assert head == [
    *("gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"),
    "--zone=zone-b",
    "--worker=all",
  ]
  assert command == (
    "--command=cd cacovid_jax && PYTHON=python3 PORT=8476"
    " experiments/launch/tpu_pod.sh worker --config=c.py:devices=8"
    " --workdir=a\\ folder"
  )
  for wrong in ((), ("slice", "--config=x", "y"), ("slice", "zone")):
    code, _, told = machine.run("tpu_pod.sh", *wrong)
    assert code == 2 and told.startswith("error: usage: tpu_pod.sh NAME ZONE")


@pytest.mark.parametrize("known", ["environment", "metadata"])
def test_a_tpu_worker_finds_its_number_and_the_others(machine, known):
  env = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "10.0.0.4,10.0.0.5"}
  if known == "metadata":
    env = {}
    folder = pathlib.Path(machine.env["PATH"].split(":")[0])
    (folder / "curl").write_text(
      "#!/usr/bin/env bash\n"
      'case "${@: -1}" in\n'
      "  */agent-worker-number) echo 1;;\n"
      "  */worker-network-endpoints) echo a:b:10.0.0.4,c:d:10.0.0.5;;\n"
      "esac\n"
    )
  code, calls, _ = machine.run("tpu_pod.sh", "worker", *GIVEN, **env)
  assert code == 0
  assert calls == [
    (
      "python3",
      *TRAIN,
      "--coordinator=10.0.0.4:8476",
      "--num_processes=2",
      "--process_id=1",
    )
  ]
  machine.calls.unlink()
  env = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "10.0.0.4"}
  _, calls, _ = machine.run("tpu_pod.sh", "worker", *GIVEN, **env)
  assert calls == [("python3", *TRAIN)]


# Starts a task of each node at once, and ends as the worst of them.
_SRUN_ALL = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
tasks=() worst=0
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do
  SLURM_PROCID=$i SLURM_NTASKS=$SLURM_JOB_NUM_NODES "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do
  wait "$task"; code=$?; ((code > worst)) && worst=$code
done
exit $worst
"""
# A reward that harms process 1: a SIGTERM behind step 1, which lasts until it
# has come through, or a SIGKILL within the next step.
_REWARD = """
import itertools, os, signal
import jax
from jax.experimental import multihost_utils

HARM = os.environ.get("HARM")
ask = multihost_utils.reached_preemption_sync_point

def ask_until_told(step):
  if jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGTERM)
  return next(filter(None, map(ask, itertools.count(step))))

if HARM == "SIGTERM":
  multihost_utils.reached_preemption_sync_point = ask_until_told

def total(question, texts):
  if HARM == "SIGKILL" and jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  return [sum(map(ord, text)) % 13 / len(question.question) for text in texts]

total.on_host = True
"""


# An evaluation that is killed behind its first answers.
_KILLED = """
import os, signal
from cacovid_jax import evaluate
from cacovid_jax.data import answer_log

add = answer_log.AnswerLog.add

def add_and_die(*args):
  add(*args)
  os.kill(os.getpid(), signal.SIGKILL)

answer_log.AnswerLog.add = add_and_die
evaluate.COMMAND.run(evaluate.main)
"""


def test_tasks_of_an_array_make_the_table_of_one_process(machine, tmp_path):
  """Real processes; one of two is killed and given again."""
  (tmp_path / "killed.py").write_text(_KILLED)
  checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
  (tmp_path / "blocks").mkdir()
  flags = [
    f"--model={checkpoint}",
    f"--data={tiny.write_data(tmp_path / 'blocks', num_clips=4, per_clip=1)}",
    "--methods=uniform",
    "--ratios=0.25",
    "--config.data.num_frames=4",
    "--config.evals.oracles=()",
    "--config.evals.select_on=none",
    "--config.evals.batch_size=1",
    "--config.evals.max_new_tokens=2",
    "--config.model.dtype=float32",
    "--config.mesh.data=1",
  ]
  args = evaluate.COMMAND.parse(
    ["evaluate", *flags, f"--workdir={tmp_path / 'one'}"]
  )
  evaluate.main(args)
  expected = (tmp_path / "one" / "results.json").read_bytes()
  env = os.environ | {
    "PYTHON": sys.executable,
    "PYTHONPATH": f"{ROOT}:{tmp_path}",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": tests.xla_flags(),
    "PATH": f"{machine.env['PATH'].split(':')[0]}:{os.environ['PATH']}",
    "CALLS": str(machine.calls),
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "1",
    "SLURM_ARRAY_TASK_COUNT": "2",
  }
  flags.append(f"--workdir={(workdir := tmp_path / 'array')}")

  def task(number, **more):
    more["SLURM_ARRAY_TASK_ID"] = str(number)
    return _script("slurm_evaluate.sbatch", *flags, env=env | more)

  code, told = task(0, MODULE="killed")
  assert code == 128 + signal.SIGKILL, told
  answers = workdir / "answers-0-of-2.jsonl"
  begun = answers.read_bytes()
  assert begun.count(b"\n") > 1
  code, told = task(1)
  assert code == 0 and "left to 0/2" in told
  assert not (workdir / "results.json").exists()
  code, told = task(0)
  assert code == 0, told
  assert answers.read_bytes().startswith(begun)
  assert (workdir / "results.json").read_bytes() == expected


def _free_port():
  """Returns a port that `slurm.sbatch` can give, and nobody has."""
  for port in range(20_000 + os.getpid() % 9_000, 40_000):
    with socket.socket() as free, contextlib.suppress(OSError):
      free.bind(("localhost", port))
      return port
  raise AssertionError("no port is free")


def _script(script, *arguments, env):
  """Runs a launch script with real processes; returns (code, its stderr)."""
  done = subprocess.run(
    ["bash", str(LAUNCH / script), *arguments],
    env=env, stderr=subprocess.PIPE, text=True, timeout=1500, check=False,
  )  # fmt: skip
  return done.returncode, done.stderr


def _state(workdir):
  """Returns {path: bytes} of the exported policy and the last checkpoint."""
  manifest = checkpointing.read_manifest(workdir / "checkpoints", 2)
  like = {
    name: np.zeros(leaf["shape"], leaf["dtype"])
    for name, leaf in manifest["leaves"].items()
  }
  like = jax.tree.map(jax.device_put, like)
  step, state = checkpointing.restore_latest(workdir / "checkpoints", like)
  assert step == 2
  policy = (workdir / "policy" / "policy.safetensors").read_bytes()
  return jax.tree.map(np.asarray, state) | {
    "policy": np.frombuffer(policy, "u1")
  }


def test_processes_train_what_one_trains_whatever_harms_them(machine, tmp_path):
  """On a CPU: two processes of two devices each, and one of four devices.

  By each script; stand-ins are the scheduler's commands alone.
  """
  tiny_qwen.write_clips(tmp_path)
  tiny_checkpoints.write_tiny(tmp_path / "model", "llava_onevision")
  (tmp_path / "reward.py").write_text(_REWARD)
  bin_folder = pathlib.Path(machine.env["PATH"].split(":")[0])
  (bin_folder / "srun").write_text(_SRUN_ALL)
  scontrol = (bin_folder / "scontrol").read_text()
  names = "node7 node8 node9", "localhost localhost"
  (bin_folder / "scontrol").write_text(scontrol.replace(*names))
  flags = [
    f"--config={ROOT / 'configs' / 'llava_onevision.py'}:debug",
    f"--config.model.path={tmp_path / 'model'}",
    f"--config.data.root={tmp_path}",
    "--config.videos_per_step=4",
    "--config.iterations=1",
    "--config.ckpt.every_steps=1",
    "--config.ratio.adaptive=false",
    "--config.sampling.ratio=0.125",
    f"--config.rollout.reward={tmp_path / 'reward.py'}:total",
    "--config.optimizer.lr_heads=1e-3",
    # Compiles sooner.
    "--config.policy.module=tests.policy.bilinear_policy:Bilinear",
  ]
  port = _free_port()
  base = os.environ | {
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "PORT": str(port),
    "GRACE": "5",
    "PATH": f"{bin_folder}:{os.environ['PATH']}",
    "CALLS": str(machine.calls),
    "SLURM_JOB_ID": str(port - 20_000),
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "all",
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
  }
  for number in (2, 1):
    env = base | {
      "XLA_FLAGS": tests.xla_flags(4 // number), "PROCESSES": str(number)
    }  # fmt: skip
    workdir = f"--workdir={tmp_path / f'processes{number}'}"
    code, told = _script("gpu_box.sh", *flags, workdir, env=env)
    assert code == 0, told
  curves = {n: metrics.read(tmp_path / f"processes{n}") for n in (1, 2)}
  policies = {
    n: loading.read(tmp_path / f"processes{n}" / "policy/policy.safetensors")
    for n in (1, 2)
  }
  assert policies[1].keys() == policies[2].keys()
  for name, one in policies[1].items():
    np.testing.assert_allclose(policies[2][name], one, rtol=1e-5, atol=1e-7)
  assert [line["step"] for line in curves[2]] == [1, 2]
  for name in ("loss", "gradient_norm", "reward_token", "reward_frame"):
    found = [line[name] for line in curves[2]]
    expected = [line[name] for line in curves[1]]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  assert min(line["gradient_norm"] for line in curves[1]) > 0

  env, harmed = base | {"XLA_FLAGS": tests.xla_flags(2)}, tmp_path / "harmed"
  flags.append(f"--workdir={harmed}")
  code, told = _script("slurm.sbatch", *flags, env=env | {"HARM": "SIGTERM"})
  assert code == 143, told
  requeued = f"scontrol|requeue|{port - 20_000}"
  assert requeued in machine.calls.read_text().splitlines()
  assert checkpointing.steps(harmed / "checkpoints") == [1]
  code, told = _script("slurm.sbatch", *flags, env=env | {"HARM": "SIGKILL"})
  assert code == 128 + signal.SIGKILL
  errors = [line for line in told.splitlines() if line.startswith("error:")]
  assert len(errors) == 1 and "process 1 of 2 is lost" in errors[0], told
  assert checkpointing.steps(harmed / "checkpoints") == [1]
  two = [
    subprocess.Popen(
      ["bash", str(LAUNCH / "tpu_pod.sh"), "worker", *flags],
      env=env | {"TPU_WORKER_ID": str(number)},
    )
    for number in range(2)
  ]
  assert [process.wait(1500) for process in two] == [0, 0]
  found, expected = _state(harmed), _state(tmp_path / "processes2")
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert [line["step"] for line in metrics.read(harmed)] == [1, 2]
