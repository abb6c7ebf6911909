"""The paper's settings of a training run, one documented section each.

A config file starts from `get_config()` and overrides what its run changes, so
that a run is described by its file and these defaults together. Numbers are
those of the paper and its public code (METHOD.md 2 to 6); extras that the
paper does not have are off.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """Returns the unlocked default config of `cacovid_jax.train`."""
  config = ml_collections.ConfigDict()
  config.seed = 42
  # One step is `videos_per_step` videos, each with `iterations` iterations,
  # hence `iterations` optimiser steps. `total_steps = 0` is one epoch.
  config.total_steps = 10_000
  config.videos_per_step = 1
  config.iterations = 5
  config.log_every = 10
  # Steps refused in a row (non-finite loss, gradient or reward) before a run
  # stops.
  config.max_bad_steps = 10
  # How many tokens are kept while training. `ratio` is the fixed ratio of
  # runs with `config.ratio.adaptive = False`.
  config.sampling = dict(
    ratio=0.02,
    num_combinations=32,
    group_size=2,
    max_group_prob=2.0,
    max_frame_prob=3.0,
    frame_ratio=0.125,
  )
  # The adaptive ratio: rungs of the ladder, the rung a video starts at, and
  # the mean token-mode rewards at which it moves down and up.
  config.ratio = dict(
    adaptive=True,
    rungs=(0.01, 0.02, 0.04, 0.08, 0.12),
    start=0.02,
    low=0.125,
    high=0.875,
  )
  config.objective = dict(
    clip_low=0.2,
    clip_high=0.28,
    kl_weight=0.0,
    # Bound of |log pi - log pi_old|; None is the paper's unbounded ratio.
    log_ratio_clamp=config_dict.placeholder(float),
  )
  config.optimizer = dict(
    lr_heads=1e-6,
    lr_layer=1e-7,
    weight_decay=0.01,
    clip=5.0,
    warmup=0,
  )
  config.rollout = dict(
    max_new_tokens=768,
    # "accuracy" is the paper's reward. "log_likelihood" (log-probability
    # of the right letter) and "margin" (that, less the best wrong letter's)
    # read the first answer token's logits and need lettered questions and a
    # fixed ratio.
    reward="accuracy",
    # Where answers are marked: "device" (lettered questions only), "host"
    # (all problem types), or "auto": on the device if all are lettered.
    marking="auto",
  )
  # `module` names a user's own policy as "path/to/file.py:ClassName"; empty
  # is the paper's network. `init` is a safetensors file to start from.
  config.policy = dict(
    module="", dtype="bfloat16", num_halvings=4, backend="auto", init=""
  )
  # `backend` is that of attention: auto, xla, cudnn or splash.
  config.model = dict(path="", dtype="bfloat16", backend="auto")
  config.data = dict(
    # Folder of the question files, and of the clips: `media` below it.
    root="",
    media="",
    train_file="train.json",
    # Folder below `root` of rows that `prepare` wrote as array_record files,
    # read instead of `train_file` if given.
    tfds="",
    train_split="train",
    # How questions are stored: "video-r1" in `train_file`, or "own": a folder
    # with questions.csv or questions.json, see `data.readers.own`.
    reader="video-r1",
    on_bad_row="raise",
    # Clips that are not there: "raise" stops before the first step, "skip"
    # leaves their questions out and lists them in WORKDIR/left_out.json.
    on_missing="raise",
    # Clips whose frames have a side of so many pixels or fewer are refused, as
    # by the public trainer; 0 refuses none.
    min_side=28,
    num_frames=32,
    frame_rule="eval_linspace",
    # For models whose token grid follows the frames' shape (Qwen2.5-VL): the
    # pixels of a frame, 0 for the checkpoint's own limits; and the sizes that
    # programs are compiled for, (slices, tokens of a slice) or (slices, tokens
    # of a slice, tokens) each, empty for two that follow from the pixels.
    min_pixels=0,
    max_pixels=0,
    buckets=(),
    # Text tokens of the longest prompt; 0 looks for it at the start.
    max_text_tokens=128,
    # Folder that keeps video features; empty encodes a clip at each use.
    feature_cache="",
    memory_items=256,
    # Threads, or else processes, that load clips ahead.
    num_threads=2,
    num_workers=0,
    # {"question_id", "tokens"} per line, below `root`; for metrics only.
    decisive_file="",
  )
  # `exit_code` is that of a run that a SIGTERM stopped (and saved).
  config.ckpt = dict(every_steps=500, keep=3, exit_code=143)
  # Accuracy on the validation questions below config.data.root, every so many
  # steps (0 never); the best policy is then kept beside the last one.
  config.validation = dict(
    every_steps=0,
    method="cacovid",
    ratio=0.1,
    num_questions=200,
    batch_size=16,
    max_new_tokens=2,
  )
  # Devices on each mesh axis; data = 0 takes all that `model` leaves. `map`
  # spreads the update over `data`: shard_map, or pmap (model = 1 only).
  config.mesh = dict(data=0, model=1, map="shard_map")
  return config
