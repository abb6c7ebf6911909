"""A training on one made-up video, to be timed."""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.evals import estimate
from cacovid_jax.inference import answerer
from cacovid_jax.models import video_llm
from cacovid_jax.policy import sampling
from cacovid_jax.training import programs as training_programs
from cacovid_jax.training import run as run_lib
from experiments import made_up


def trainer(subject, config, workdir, adaptive=False) -> Callable[[], Any]:
  """Returns f() that trains on one video, all I iterations, and goes on.

  With the numbers of a config, with as much text as the prompt has, answers of
  two tokens and lettered rewards; at a fixed ratio or, from the same on, at one
  that grows in every iteration, because random weights earn nothing.
  """
  grid, model = subject.grid, subject.checkpoint.model
  dtype = str(np.dtype(model.dtype))
  changes = {
    "data.num_frames": grid[0],
    "data.num_threads": 0,
    "data.prompt_rows": (subject.batch.x.shape[1] - math.prod(grid),),
    "mesh.data": 1,
    "model.dtype": dtype,
    "policy.dtype": dtype,
    "policy.num_halvings": estimate.num_halvings(model.config.text),
    "ratio.adaptive": adaptive,
    "rollout.max_new_tokens": 2,
    "sampling.ratio": ratio_of(grid),
    "total_steps": 1000,
  }
  asked = dataclasses.replace(subject.checkpoint, tokenizer=made_up.tokenizer())
  experiment = experiment_lib.Experiment.from_config(
    config_lib.replace(config, changes),
    workdir,
    checkpoint=asked,
    split="videos_per_step",
  )
  question = answerer.as_question("clip", "What is first?", ("red", "blue"))
  question = dataclasses.replace(question, answer="A")
  features = np.asarray(subject.batch.features[0], np.float32)  # As stored.
  clip = video_llm.VideoFeatures(features, grid)
  # One clip under every name, as `inference.features` gives clips.
  store = types.SimpleNamespace(load=lambda path: clip, finish=list)
  run = run_lib.Run(experiment, questions=[question], store=store)
  batch, _ = next(run.batches(0))
  batch, state = training_programs.place_batch(batch, run.mesh), None

  def step():
    nonlocal state
    state = run.init_state() if state is None else state
    state, *out = run.programs.run(state, run.constants, batch)
    return out

  return step


def ratio_of(grid) -> float:
  """Returns METHOD.md's 2 %, or the least that keeps a token of each frame."""
  return max(0.02, 1 / math.prod(grid[1:]))


def num_kept(grid, ratio: float) -> int:
  """Returns K, the tokens of a video that a training keeps at a ratio."""
  return sampling.tokens_per_frame(grid, ratio) * grid[0]


def rollout_tokens(grid) -> np.ndarray:
  """Returns int32[K], evenly spread, as many as a combination has."""
  count = num_kept(grid, ratio_of(grid))
  return np.arange(count, dtype=np.int32) * math.prod(grid) // count
