"""A tiny checkpoint, mp4 clips and questions on disk, for evaluation tests."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from unittest import mock

import av
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from cacovid_jax import base_config
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import frames
from cacovid_jax.inference import clip_queue, clips
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.models import checkpoints, llava_onevision, qwen2_5_vl, siglip
from cacovid_jax.policy import loading, network
from cacovid_jax.synthetic import tokenizer as tokenizer_training
from tests.data import tokenizers_for_tests as toks

FRAMES = 4
GRID = (4, 4, 4)
NUM_VIDEO = 64
QWEN_STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.3, 0.2]}
COLOURS = ("red", "green", "blue", "grey")


# Names of an evaluation's options that are no key of `evals`.
_KEYS = {
  "data": "data.root",
  "media": "data.media",
  "num_frames": "data.num_frames",
  "min_pixels": "data.min_pixels",
  "max_pixels": "data.max_pixels",
  "cache": "data.feature_cache",
  "checkpoint": "model.path",
  "dtype": "model.dtype",
}


def experiment(workdir, *, shard=(0, 1), **options):
  """Returns an experiment on one device.

  Args:
    workdir: of the results.
    shard: (i, n).
    **options: names in `_KEYS`, keys of `evals`, whole keys such as
      "mesh.data", or `policies` as a dict.
  """
  changes = {
    "model.dtype": "float32",
    "data.num_frames": FRAMES,
    "evals.methods": ("random", "uniform", "divprune", "density_peaks"),
    "evals.num_examples": 0,
    "evals.oracles": (),
    "evals.select_on": "none",
    "mesh.data": 1,
  }
  for name, value in options.items():
    if name == "policies":
      value = tuple(f"{label}={path}" for label, path in value.items())
    key = name if "." in name else f"evals.{name}"
    changes[_KEYS.get(name, key)] = value
  config = config_lib.replace(base_config.get_config(), changes)
  return experiment_lib.Experiment.from_config(config, workdir, shard=shard)


@functools.cache
def random_params(model):
  """Returns parameters of a `VideoLLM`, the same for equal models."""
  return jax.jit(model.init)(jax.random.key(0))


def write_checkpoint(directory: pathlib.Path) -> str:
  """Writes a random LLaVA-OneVision of 3 layers; returns its directory."""
  config, tokenizer = write_tokenizer(directory)
  params = random_params(llava_onevision.LlavaOnevisionModel(config))
  checkpoints.save(
    directory,
    config,
    params,
    eos_ids=tokenizer.eos_ids,
    pad_id=tokenizer.pad_id,
  )
  return str(directory)


def write_tokenizer(directory: pathlib.Path):
  """Writes all but the weights; returns (config, tokenizer)."""
  texts = ["What colour is it? A. red B. green C. blue D. grey"] * 3
  tokenizer_training.train(texts, 300, directory, image_size=28)
  tokenizer = checkpoints._tokenizer(directory)
  base = llava_onevision.LlavaOnevisionConfig.tiny()
  config = dataclasses.replace(
    base,
    vision=dataclasses.replace(siglip.SiglipConfig.tiny(), image_size=28),
    text=dataclasses.replace(base.text, vocab_size=tokenizer.vocab_size),
    image_token_id=tokenizer.token_id("<image>"),
    video_token_id=tokenizer.video_id,
  )
  return config, tokenizer


def policy_of(checkpoint, seed=1) -> loading.LoadedPolicy:
  """Returns a policy of random heads."""
  llm = checkpoint.model.config.text
  module = network.Policy.from_llm_config(llm, num_halvings=2)
  make = jax.jit(module.init_from_llm)
  params = make(jax.random.key(seed), checkpoint.params)
  return loading.LoadedPolicy(module, params, f"seed {seed}")


def write_policy(directory: pathlib.Path, checkpoint, seed=1) -> str:
  """Writes a policy as training exports it; returns the file's path."""
  policy = policy_of(checkpoint, seed)
  directory.mkdir(exist_ok=True)
  path = directory / "policy.safetensors"
  loading.save(path, policy.module, policy.params)
  return str(path)


def write_qwen_checkpoint(directory: pathlib.Path) -> str:
  """Writes a random Qwen2.5-VL with tokens of 8 pixels; returns its folder."""
  toks.write_qwen(directory)
  base = qwen2_5_vl.Qwen2_5VLConfig.tiny()
  token_id = checkpoints._tokenizer(directory).token_id
  config = dataclasses.replace(
    base,
    text=dataclasses.replace(base.text, vocab_size=320),
    image_token_id=token_id("<|image_pad|>"),
    video_token_id=token_id("<|video_pad|>"),
    vision_start_token_id=token_id("<|vision_start|>"),
    vision_end_token_id=token_id("<|vision_end|>"),
  )
  params = random_params(qwen2_5_vl.Qwen2_5VLModel(config))
  checkpoints.save(
    directory,
    config,
    params,
    eos_ids=[token_id("<|im_end|>")],
    pad_id=token_id("<|endoftext|>"),
  )
  processor = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
  path = pathlib.Path(directory) / "preprocessor_config.json"
  path.write_text(json.dumps(processor | QWEN_STATISTICS))
  return str(directory)


def write_clip(
  path: pathlib.Path,
  seed: int,
  num_frames: int = 8,
  size: tuple[int, int] = (32, 32),
) -> None:
  """Writes an H.264 clip of coloured noise blocks, (h, w) pixels each."""
  rng = np.random.default_rng(seed)
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=8)
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    for _ in range(num_frames):
      shape = (size[0] // 8, size[1] // 8, 3)
      blocks = rng.integers(0, 256, shape, dtype=np.uint8)
      image = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_data(
  directory: pathlib.Path, *, num_clips=3, per_clip=2, sizes=((32, 32),)
) -> str:
  """Writes clips, test and validation questions; returns the directory.

  Args:
    directory: exists.
    num_clips: of each split.
    per_clip: questions.
    sizes: (h, w) of the clips, in turn.
  """
  decisive = []
  for split in ("validation", "test"):
    rows = []
    for clip in range(num_clips):
      name = f"{split}{clip}"
      write_clip(
        directory / "videos" / f"{name}.mp4",
        seed=hash_of(name),
        size=sizes[clip % len(sizes)],
      )
      for number in range(per_clip):
        identity = f"{name}-{number}"
        rng = np.random.default_rng(hash_of(identity))
        options = list(rng.permutation(COLOURS))
        rows.append(
          {
            "video_id": name,
            "videoID": name,
            "duration": ("short", "medium", "long")[clip % 3],
            "domain": "Synthetic",
            "sub_category": "Blocks",
            "url": "",
            "question_id": identity,
            "task_type": ("Colour", "Order")[number % 2],
            "question": f"What colour is <b>block</b> {number}?",
            "options": [
              f"{letter}. {option}"
              for letter, option in zip("ABCD", options, strict=True)
            ],
            "answer": "ABCD"[int(rng.integers(4))],
          }
        )
        tokens = rng.permutation(NUM_VIDEO)[:3]
        decisive.append(
          {"question_id": identity, "tokens": sorted(int(i) for i in tokens)}
        )
    table = pa.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, directory / f"{split}.parquet")
  lines = "".join(json.dumps(row) + "\n" for row in decisive)
  (directory / "decisive.jsonl").write_text(lines)
  (directory / "manifest.json").write_text(
    json.dumps({"name": "blocks", "generator_hash": "0123abcd"})
  )
  return str(directory)


def hash_of(text: str) -> int:
  return int.from_bytes(text.encode()[-6:], "little")


@functools.lru_cache(maxsize=1)
def load_checkpoint(directory: str):
  return checkpoints.load(directory)


@contextlib.contextmanager
def shared_programs():
  """Within it, engines of equal models and settings compile once.

  For tests of what evaluations write, not of what they compile.
  """
  made, real = {}, programs_lib.Programs

  def of(checkpoint, max_new_tokens, mesh=None):
    ending = tuple(checkpoint.eos_ids), checkpoint.pad_id, max_new_tokens
    key = checkpoint.model, ending, mesh
    if key not in made:
      made[key] = real(checkpoint, max_new_tokens, mesh)
    return made[key]

  with mock.patch.object(programs_lib, "Programs", of):
    yield


def open_store(root, model, params, processor, *, num_frames, **options):
  """Returns a `ClipQueue`; takes the options of its reader as well."""
  names = ("limits", "min_side", "refused", "manifest", "hashed")
  reading = {name: options.pop(name) for name in names if name in options}
  rule = options.pop("rule", frames.FrameRule(num_frames))
  reader = clips.ClipReader(str(root), processor, rule, **reading)
  return clip_queue.ClipQueue(reader, model, params, **options)


def engine_of(checkpoint, data, questions, sizes, *, store=None, **options):
  """Returns an engine of clips below a folder, options of both apart.

  `sizes` are those of a batch and of an answer.
  """
  model, settings = checkpoint.model, engine_lib.Settings(FRAMES, *sizes)
  processor = model.read_processor(checkpoint.identity["path"])
  given = data, model, checkpoint.params, processor
  source = open_store(*given, num_frames=FRAMES, **(store or {}))
  return engine_lib.Engine(checkpoint, source, questions, settings, **options)
