"""Records what a small fixed run computes, for later code to be compared with.

python -m tests.baseline.record --out FILE
python -m tests.baseline.record --out FILE --parts fixed,qwen

The file holds the commit, facts of the machine, and {section: {row: {name:
value}}}; a section is named PART/KIND, a row is as a rule a question. Bits are
promised on one machine with one set of packages only. See `compare`.

Parts:
  dense, sparse    every method on the embedded benchmark, with the shipped
                   model and policy: answers, kept tokens, likelihoods
  fixed, adaptive  training the policy at a fixed and at an adaptive ratio:
                   rewards, answers, kept tokens, the trained parameters
  host             a few steps whose rewards the host makes
  qwen             a tiny random Qwen2.5-VL on clips of three shapes
  qwen_training    training its policy in buckets, with graded rewards
  qwen_adaptive    the same at an adaptive ratio, with rewards of 0 and 1

Letters: B videos of a step, I iterations, G combinations, K kept tokens, N
video tokens.
"""

import argparse
import base64
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import av
import jax
import jax.numpy as jnp
import numpy as np
from av import library_versions

import cacovid_jax
from cacovid_jax import base_config, experiment
from cacovid_jax.data import answer_log
from cacovid_jax.evals import evaluation
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import clip_queue
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import checkpoints
from cacovid_jax.policy import loading, network
from cacovid_jax.synthetic import build, tiny_checkpoints
from cacovid_jax.training import programs, step
from cacovid_jax.training import run as run_lib
from tests.baseline import compare

# --- Adapters: all that touches inner interfaces of the library. Code that
# --- renames or rebuilds these edits the functions from here to the next line
# --- of this kind, and no value of the recorded file.

ASSETS = pathlib.Path(cacovid_jax.__file__).parent / "assets"


def write_benchmark(folder, variant: str) -> None:
  """Writes the embedded benchmark's clips and questions of one variant."""
  clips = (6, 0, 6, 0) if variant == "dense" else (0, 0, 3, 0)
  build.build(
    build.BuildConfig(variant=variant, seed=0, clips=clips),
    folder,
    num_workers=1,
  )


def write_qwen(folder: pathlib.Path) -> None:
  """Writes a random Qwen2.5-VL and a random policy of it."""
  tiny_checkpoints.write_tiny(folder / "model", "qwen2_5_vl")
  loaded = checkpoints.load(str(folder / "model"))
  policy = network.Policy.from_llm_config(
    loaded.model.config.text, num_halvings=2
  )
  params = policy.init_from_llm(jax.random.key(1), loaded.params)
  (folder / "policy").mkdir()
  loading.save(str(folder / "policy" / "policy.safetensors"), policy, params)


def _experiment(changes, workdir=None, **options) -> experiment.Experiment:
  """Returns what the default config with "a.b" keys changed describes."""
  config = base_config.get_config()
  config.update_from_flattened_dict(changes)
  return experiment.Experiment.from_config(config, workdir, **options)


class Evaluation:
  """The test questions of a folder, asked with several methods."""

  # Of the model last asked: two benchmarks compile nothing twice.
  _programs: ClassVar[dict[str, Any]] = {}

  def __init__(
    self,
    folder,
    model,
    policy,
    methods: Sequence[str],
    *,
    num_frames: int = 16,
    **fields,
  ):
    """Loads model, policy and questions.

    Args:
      folder: of the benchmark.
      model: checkpoint directory.
      policy: file or folder.
      methods: names, with options as an evaluation takes them.
      num_frames: of a clip.
      **fields: further settings of an evaluation.
    """
    made = _experiment(
      {
        "data.root": str(folder),
        "data.num_frames": num_frames,
        "model.path": str(model),
        "model.dtype": "float32",
        "evals.policies": (str(policy),),
        "evals.methods": methods,
      }
      | {f"evals.{name}": value for name, value in fields.items()}
    )
    found = evaluation.load_benchmark(made)
    parsed = [methods_lib.Method.parse(spec) for spec in methods]
    self._questions = found.questions
    engine = engine_lib.Engine.of(
      made,
      clip_queue.open_queue(made, methods_lib.wanted(parsed)),
      found.questions,
      evaluation.settings(made),
      policies=made.policies,
      decisive=found.decisive,
      programs=self._programs.get(str(model)),
    )
    self._programs.clear()
    self._programs[str(model)] = engine.programs
    self._evaluator = evaluator_lib.Evaluator(engine, found.task)
    self._cells = methods_lib.conditions(
      parsed, made.config.evals.ratios, made.config.evals.seeds
    )

  def answers(self):
    """Returns ({question: {cell: [text, letter, score]}}, {clip: sha256})."""
    book = answer_log.AnswerLog(None, {})
    failures = self._evaluator.run(self._questions, self._cells, book)
    if failures:
      raise RuntimeError(f"methods that do not run here: {failures}")
    answers, frames = {}, {}
    for question in self._questions:
      lines = {c: book[c.key(question.id)] for c in self._cells}
      answers[question.id] = {
        _label(cell): [line["text"], line["letter"], line["score"]]
        for cell, line in lines.items()
      }
      frames[question.video] = lines[self._cells[0]]["frame_hash"]
    return answers, frames

  def kept(self) -> dict[str, dict[str, np.ndarray]]:
    """Returns {question: {cell: i32[K]}}, without vanilla."""
    cells = self._cells[1:]
    found = self._evaluator.engine.kept(self._questions, cells)
    return {
      question.id: {
        _label(cell): kept.index
        for cell, kept in zip(cells, found[question.id], strict=True)
      }
      for question in self._questions
    }

  def likelihoods(self, labels) -> dict[str, dict[str, list[float]]]:
    """Returns {question: {cell: log-probability of each letter}}."""
    pairs = [(q, letter) for q in self._questions for letter in "ABCD"]
    out = {question.id: {} for question in self._questions}
    for cell in self._cells:
      if _label(cell) not in labels:
        continue
      questions, letters = zip(*pairs, strict=True)
      found = self._evaluator.engine.likelihoods(questions, letters, cell)
      for (question, _), one in zip(pairs, found, strict=True):
        out[question.id].setdefault(_label(cell), []).append(one.log_prob)
    return out


def _label(cell) -> str:
  return f"{cell.spec} {cell.ratio:g}"


class Step(NamedTuple):
  """One video's share of a training step.

  Attributes:
    question: id.
    kept: [I][G] of i32[K].
    answers: [I][G] texts.
    rewards: f32[I,G].
  """

  question: str
  kept: Sequence[Sequence[np.ndarray]]
  answers: Sequence[Sequence[str]]
  rewards: np.ndarray


def train(workdir, **changes):
  """Returns ([steps] of [B] of `Step`, {tensor: array} of the policy).

  Args:
    workdir: exists.
    **changes: "a.b" keys of the default config and their values.
  """
  made = _experiment(changes, workdir, split="videos_per_step")
  decode = made.checkpoint.tokenizer.decode
  run = run_lib.Run(made)
  state, draws, steps = run.init_state(), {}, []
  for batch, rows in run.batches(0):
    bucket = batch.grid.bucket
    if bucket not in draws:
      draw = functools.partial(_draw, run.programs.configs[bucket])
      draws[bucket] = jax.jit(draw)
    reward = functools.partial(run.reward, questions=rows)
    before = jax.device_get(state)  # The step gives up its buffers.
    placed = programs.place_batch(batch, run.mesh)
    state, *out = run.programs.run(state, run.constants, placed, reward)
    ids, rewards, metrics = jax.tree.map(programs.gather, out)
    index, count = draws[bucket](
      before, run.constants, batch, metrics.per_video["rung"]
    )
    index, count = np.asarray(index), np.asarray(count)
    steps.append(
      [
        Step(
          row.id,
          [[k[:n] for k in index[i, b]] for i, n in enumerate(count[:, b])],
          [[decode(g) for g in i] for i in ids[b]],
          rewards[b],
        )
        for b, row in enumerate(rows)
      ]
    )
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
  return steps, {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in leaves
  }


def _draw(config, state, constants, batch, rungs):
  """Draws a step's combinations again, from the state before it.

  Args:
    config: static.
    state: before the step.
    constants: as of the step.
    batch: as of the step.
    rungs: i32[B,I] where each video was on its ladder.

  Returns:
    (i32[I,B,G,K] padded, i32[I,B] how many of K are kept).
  """
  videos, memory = step.prepare_videos(config, state, constants, batch)

  def one(given):
    iteration, rung = given
    memory_then = memory.replace(
      iteration=jnp.full_like(memory.iteration, iteration), rung=rung
    )
    drawn, count = step.draw(
      config, videos, memory_then, max_rung=len(config.ladder) - 1
    )
    return drawn.index, count

  return jax.lax.map(one, (jnp.arange(rungs.shape[1]), rungs.T))


# --- End of the adapters.

# Those of the recorded commit; methods that came later have no values in the
# file.
METHODS = (
  "cacovid",
  "random",
  "uniform",
  "evs",
  "vidcom2",
  "fastv",
  "visionzip",
  "divprune",
  "prunevid",
  "framefusion",
  "holitom",
  "fastvid",
  "flashvid",
  "unicomp",
  "floc",
  "scissor",
  "dyto",
  "em",
  "vqtoken",
  "last_query",
  "density_peaks",
  "cacovid_untrained",
  "cacovid_other_question",
  "decisive_boxes",
)
RATIOS = (0.25, 0.1)
# Width and height of the frames of tiny Qwen2.5-VL's clips.
SHAPES = {"wide": (48, 32), "square": (32, 32), "tall": (32, 48)}
_PACKAGES = (
  "av",
  "flax",
  "jax",
  "jaxlib",
  "numpy",
  "optax",
  "pillow",
  "safetensors",
  "tokenizers",
)
_SHIPPED = {
  "seed": 42,
  "iterations": 3,
  "videos_per_step": 2,
  "sampling.num_combinations": 8,
  "optimizer.lr_heads": 3e-3,
  "optimizer.lr_layer": 3e-5,
  "objective.log_ratio_clamp": 1.1,
  "objective.kl_weight": 0.1,
  "policy.num_halvings": 0,
  "policy.dtype": "float32",
  "model.dtype": "float32",
  "model.path": str(ASSETS / "base_model"),
  "rollout.max_new_tokens": 1,
  "data.num_frames": 16,
  "data.prompt_rows": (80,),
  "data.num_threads": 0,
  "mesh.data": 1,
}
_QWEN = _SHIPPED | {
  "seed": 7,
  "videos_per_step": 1,
  "optimizer.lr_heads": 1e-3,
  "policy.num_halvings": 2,
  "total_steps": 6,
  "data.reader": "own",
  "data.num_frames": 4,
  "data.prompt_rows": (),
  "data.buckets": ((2, 16), (2, 24)),
}


def embedded(root: pathlib.Path, variant: str) -> dict[str, Any]:
  """Returns the sections of every method on a variant of the benchmark."""
  asked = Evaluation(
    _benchmark(root, variant),
    ASSETS / "base_model",
    ASSETS / "policy",
    METHODS,
    ratios=RATIOS,
    max_new_tokens=1,
  )
  return _asked(asked, ("vanilla 1", "cacovid 0.1", "fastv 0.25"))


def qwen(root: pathlib.Path) -> dict[str, Any]:
  """Returns the sections of a tiny Qwen2.5-VL's evaluation."""
  folder = _qwen_folder(root)
  asked = Evaluation(
    folder,
    folder / "model",
    folder / "policy",
    ("cacovid", "divprune", "uniform", "fastv", "prunevid"),
    benchmark="own",
    split="test",
    num_frames=4,
    batch_size=2,
    max_new_tokens=3,
    ratios=(0.4,),
  )
  return _asked(asked, ("vanilla 1", "cacovid 0.4"))


def shipped_training(root: pathlib.Path, name: str, **changes):
  """Returns the sections of training the shipped model's policy."""
  root_of_data = str(_benchmark(root, "dense"))
  return _trained(root / name, _SHIPPED | {"data.root": root_of_data} | changes)


def qwen_training(root: pathlib.Path, name: str, **changes):
  """Returns the sections of training in buckets of two sizes."""
  folder = _qwen_folder(root)
  paths = {"data.root": str(folder), "model.path": str(folder / "model")}
  return _trained(root / name, _QWEN | paths | changes)


_ADAPTIVE = {
  "ratio.adaptive": True,
  "ratio.rungs": (0.02, 0.05, 0.1),
  "ratio.start": 0.05,
}
PARTS = {
  "dense": functools.partial(embedded, variant="dense"),
  "sparse": functools.partial(embedded, variant="sparse"),
  "fixed": functools.partial(
    shipped_training,
    name="fixed",
    **{"total_steps": 8, "ratio.adaptive": False, "sampling.ratio": 0.05},
  ),
  "adaptive": functools.partial(
    shipped_training, name="adaptive", **_ADAPTIVE | {"total_steps": 8}
  ),
  "host": functools.partial(
    shipped_training,
    name="host",
    **{
      "total_steps": 2,
      "ratio.adaptive": False,
      "sampling.ratio": 0.05,
      "rollout.marking": "host",
    },
  ),
  "qwen": qwen,
  "qwen_training": functools.partial(
    qwen_training,
    name="qwen_training",
    **{
      "ratio.adaptive": False,
      "sampling.ratio": 0.125,
      # Graded: a random model's letters are never right.
      "rollout.reward": "margin",
    },
  ),
  "qwen_adaptive": functools.partial(
    qwen_training,
    name="qwen_adaptive",
    **{
      "ratio.adaptive": True,
      "ratio.rungs": (0.0625, 0.125, 0.25),
      "ratio.start": 0.125,
    },
  ),
}


def record(parts: Sequence[str] = tuple(PARTS)) -> dict[str, Any]:
  """Returns what the named parts compute, as the file holds it."""
  jax.config.update("jax_platforms", "cpu")
  sections = {}
  with tempfile.TemporaryDirectory() as folder:
    for part in parts:
      start, busy = time.monotonic(), time.process_time()
      found = PARTS[part](pathlib.Path(folder))
      sections |= {f"{part}/{kind}": rows for kind, rows in found.items()}
      seconds = time.monotonic() - start
      busy = time.process_time() - busy
      line = f"{part}: {seconds:.0f} s, {busy:.0f} s of processor time"
      print(line, file=sys.stderr, flush=True)
  # Through JSON and back, so that it compares equal to what is read.
  made = {"commit": _commit(), "machine": machine(), "sections": sections}
  return json.loads(json.dumps(made))


def write(path, recorded: Mapping[str, Any]) -> None:
  """Writes a recorded run, a row on each line."""
  lines = []
  for section, rows in recorded["sections"].items():
    entries = [
      f"{json.dumps(row)}: {json.dumps(values, separators=(',', ':'))}"
      for row, values in rows.items()
    ]
    lines.append(f"{json.dumps(section)}: {{\n" + ",\n".join(entries) + "\n}")
  facts = {name: recorded[name] for name in ("commit", "machine")}
  head = json.dumps(facts, indent=1)[:-2]
  body = ",\n".join(lines)
  text = f'{head},\n "sections": {{\n{body}\n}}\n}}\n'
  pathlib.Path(path).write_text(text, encoding="utf-8")


def machine() -> dict[str, str]:
  """Returns what bits may depend on: processor, Python, packages."""
  facts = {"processor": _processor(), "python": platform.python_version()}
  for name in _PACKAGES:
    facts[name] = importlib.metadata.version(name)
  versions = library_versions["libavcodec"]
  facts["libavcodec"] = ".".join(map(str, versions))
  return facts


def _processor() -> str:
  """Returns the processor's model, its vector instructions among it."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    return platform.processor() or platform.machine()
  found = dict(re.findall(r"^(.+?)\s*:\s*(.+)$", text, re.M))
  names = ("model name", "cpu family", "model", "stepping")
  parts = [f"{name} {found[name]}" for name in names if name in found]
  vectors = re.findall(r"\b(?:avx|amx|fma)\w*", found.get("flags", ""))
  return ", ".join([*parts, " ".join(sorted(vectors))])


def _commit() -> str:
  """Returns the commit of this code, "unknown" outside a repository."""
  done = subprocess.run(
    ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout.strip() or "unknown"


def _asked(asked: Evaluation, read_in_full) -> dict[str, Any]:
  answers, frames = asked.answers()
  kept = asked.kept()
  return {
    "clips": {clip: {"frames": hash_[:16]} for clip, hash_ in frames.items()},
    "answers": answers,
    "kept": {
      question: {cell: set_text(index) for cell, index in cells.items()}
      for question, cells in kept.items()
    },
    "likelihoods": asked.likelihoods(read_in_full),
  }


def _trained(workdir: pathlib.Path, changes) -> dict[str, Any]:
  workdir.mkdir()
  steps, params = train(workdir, **changes)
  out = {"kept": {}, "answers": {}, "rewards": {}, "policy": {}}
  for number, videos in enumerate(steps):
    for one in videos:
      row = f"step {number} {one.question}"
      out["kept"][row] = {
        f"iteration {i}": [
          set_text(index) if number == 0 else digest_text(index)
          for index in drawn
        ]
        for i, drawn in enumerate(one.kept)
      }
      out["answers"][row] = _by_iteration(one.answers)
      out["rewards"][row] = _by_iteration(one.rewards.tolist())
  for name, value in params.items():
    value = np.asarray(value, np.float32)
    out["policy"][name] = {
      "sha256": hashlib.sha256(value.tobytes()).hexdigest()[:16],
      "norm": float(np.linalg.norm(value.astype(np.float64))),
    }
  return out


def _by_iteration(values) -> dict[str, Any]:
  return {f"iteration {i}": value for i, value in enumerate(values)}


def set_text(index: np.ndarray) -> str:
  """Returns distinct indices as text, which `compare.indices` reads."""
  mask = np.zeros(int(index.max(initial=-1)) + 1, bool)
  mask[index] = True
  if mask.sum() != len(index):
    raise ValueError(f"indices occur twice: {index}")
  return compare.SET + base64.b64encode(np.packbits(mask)).decode()


def digest_text(index: np.ndarray) -> str:
  """Returns how many indices there are and a digest of them."""
  digest = hashlib.sha256(np.asarray(index, np.int32).tobytes()).hexdigest()
  return f"{len(index)}:{digest[:12]}"


def _benchmark(root: pathlib.Path, variant: str) -> pathlib.Path:
  """Returns the folder of a variant, written by the first part that asks."""
  folder = root / variant
  if not folder.exists():
    write_benchmark(folder, variant)
  return folder


def _qwen_folder(root: pathlib.Path) -> pathlib.Path:
  """Returns the folder of tiny Qwen2.5-VL, its clips and questions."""
  folder = root / "qwen"
  if folder.exists():
    return folder
  folder.mkdir()
  write_qwen(folder)
  rows = []
  for number in range(9):
    shape = tuple(SHAPES)[number % len(SHAPES)]
    clip = f"{shape}{number}.mp4"
    _write_clip(folder / clip, number, SHAPES[shape])
    rows += [
      {
        "id": f"{split}{number}",
        "video": clip,
        "question": f"What is {'this ' * (number % 3)}here?",
        "options": ["red", "green", "blue", "grey"],
        "answer": "ABCD"[number % 4],
        "split": split,
      }
      for split in ("train", "test")
    ]
  (folder / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
  return folder


def _write_clip(path, seed: int, size: tuple[int, int]) -> None:
  """Writes eight frames of coloured blocks, (w, h) pixels each."""
  rng = np.random.default_rng(seed)
  width, height = size
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=8)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    # Bytes that depend on the frames alone, as in `synthetic.build`.
    stream.options = {"threads": "1", "x264-params": "mbtree=0"}
    for _ in range(8):
      blocks = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
      image = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def parts_of(text: str) -> list[str]:
  """Returns the parts of a comma-separated list, all of them for ""."""
  parts = text.split(",") if text else list(PARTS)
  unknown = [part for part in parts if part not in PARTS]
  if unknown:
    raise argparse.ArgumentTypeError(
      f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}"
    )
  return parts


def main(argv=None) -> None:
  """Records the parts that the arguments name."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--out", required=True, help="File to write.")
  parser.add_argument(
    "--parts", type=parts_of, default="", help="Comma-separated; default all."
  )
  arguments = parser.parse_args(argv)
  write(arguments.out, record(arguments.parts))


if __name__ == "__main__":
  main()
