"""Every option of every command with its default, one documented section each.

A config file starts from `get_config()` and overrides what its run changes.
Numbers are those of the paper and its public code (METHOD.md 2 to 6); extras
that the paper does not have are off.
"""

import ml_collections
from ml_collections import config_dict

_RUN = dict(
  seed=42,
  # One step is `videos_per_step` videos, each with `iterations` iterations,
  # hence `iterations` optimiser steps. `total_steps = 0` is one epoch.
  total_steps=10_000,
  videos_per_step=1,
  iterations=5,
  log_every=10,
  wandb=dict(project=""),  # Of Weights & Biases, for metrics; empty is none.
  # Words that ROUGE counts in free-form answers, in rewards and in scores:
  # "unicode" letters and digits of all scripts, "public" a-z and 0-9 only.
  rouge="unicode",
  max_bad_steps=10,  # Refused (non-finite) steps in a row that stop a run.
  # Devices on each mesh axis: `data` shares the videos of a training step, or
  # the questions of a batch, `model` the weights of the base model. data = 0
  # takes all that `model` leaves; asking, as many as divide the batch.
  # `map` spreads an update over `data`: shard_map, or pmap (model = 1 only).
  mesh=dict(data=0, model=1, map="shard_map"),
  # `exit_code` is that of a run that a SIGTERM stopped (and saved).
  # `accept_changed_code` goes on although a file of one's own is no longer the
  # one that the run started with.
  ckpt=dict(every_steps=500, keep=3, exit_code=143, accept_changed_code=False),
  # Accuracy on the validation questions below config.data.root, every so many
  # steps (0 never); the best policy is then kept beside the last one.
  validation=dict(
    every_steps=0,
    method="cacovid",
    ratio=0.1,
    num_questions=200,
    batch_size=16,
    max_new_tokens=2,
  ),
  # Training questions that the base model answers without the video.
  blind=dict(
    out="",
    batch_size=16,
    max_new_tokens=768,  # As in training.
    threshold=1.0,  # Of OCR, free-form, regression: a reward that is right.
    num_questions=0,  # First so many questions; 0 takes all of them.
  ),
  # Folder that `tfds_build` writes below, name of the data set (video_r1 or
  # video_r1_filtered), and whether records hold the clips themselves.
  tfds=dict(out="", name="video_r1", embed=False),
)

# What is optimised, and how: the policy, how it samples, its objective.
_METHOD = dict(
  # How many tokens are kept while training. `ratio` is the fixed ratio of
  # runs with `config.ratio.adaptive = False`.
  # `module` here, in `objective` and in `policy`, and `reward` in `rollout`,
  # name code of one's own as "path/to/file.py:name" or "package.module:name";
  # empty is the paper's. Options of that code are further keys of the section.
  sampling=dict(
    module="",
    ratio=0.02,
    num_combinations=32,
    group_size=2,
    max_group_prob=2.0,
    max_frame_prob=3.0,
    # How frames are capped: "per_frame", or "public" as the public code does.
    frame_cap="per_frame",
    frame_ratio=0.125,
  ),
  # The adaptive ratio: rungs of the ladder, the rung a video starts at, and
  # the mean token-mode rewards at which it moves down and up.
  ratio=dict(
    adaptive=True,
    rungs=(0.01, 0.02, 0.04, 0.08, 0.12),
    start=0.02,
    low=0.125,
    high=0.875,
    # (low, high), with adaptive=False: each video is trained at one of the
    # rungs in it, drawn evenly. For policies of all budgets, see
    # `policy.budget_embedding`.
    range=(),
  ),
  # `frame_credit`: a combination's reward is that of all its frames ("row"), or
  # each frame has its own, from the rows with and without it ("frame").
  objective=dict(
    module="",
    clip_low=0.2,
    clip_high=0.28,
    kl_weight=0.0,
    frame_credit="row",
  ),
  # `init` is a safetensors file to start from. With `budget_embedding`, such as
  # 4, scores depend on the retention ratio, through so many waves of it. With
  # `frame_residual`, those of frames depend on what changed since the last one.
  policy=dict(
    module="",
    dtype="bfloat16",
    num_halvings=4,
    backend="auto",
    budget_embedding=0,
    frame_residual=False,
    init="",
  ),
  optimizer=dict(
    lr_heads=1e-6,
    lr_layer=1e-7,
    weight_decay=0.01,
    clip=5.0,
    warmup=0,
    # "cosine" is one decay, "cosine_repeated" the public code's several.
    schedule="cosine",
    # Decay, per update, of a running average of the parameters, which is then
    # what is validated and exported, for example 0.99 or 0.999; 0 for none.
    average=0.0,
  ),
  rollout=dict(
    max_new_tokens=768,
    # "accuracy" is the paper's reward. "log_likelihood" (log-probability
    # of the right letter) and "margin" (that, less the best wrong letter's)
    # read the first answer token's logits and need lettered questions and a
    # fixed ratio. So does one's own, unless its `graded` is False.
    reward="accuracy",
    # Where answers are marked: "device" (lettered questions only), "host"
    # (all problem types), or "auto": on the device if all are lettered.
    marking="auto",
  ),
  # `path` is a checkpoint directory, or org/name of one in the Hugging Face
  # cache; `backend` is that of attention: auto, xla, cudnn or splash. `layers`
  # are arrays of their own ("separate", which GPUs copy less of), or "stacked";
  # "auto" stacks them on CPU and where the weights are below 1 GB.
  # `outer_vision_tags`, of Qwen3-VL, keeps the marks around a whole clip in its
  # prompts, as transformers does since 5.10; 4.57 did not. `float8_tower`, of
  # LLaVA-OneVision, multiplies in 8 bits: faster, and features change (docs).
  model=dict(
    path="",
    dtype="bfloat16",
    backend="auto",
    layers="auto",
    outer_vision_tags=False,
    float8_tower=False,
  ),  # fmt: skip
)

# Where questions and clips are, and how they are read.
_DATA = dict(
  # Folder of the question files, and of the clips: `media` below it.
  root="",
  media="",
  # Question file below `root`; `blind_filter` and `tfds_build` take several,
  # comma-separated.
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
  # Clips with a side of so many pixels or fewer are refused, as publicly.
  min_side=28,
  # Clips are refused of whose frames shown a larger share cannot be decoded.
  max_replaced=0.8,
  num_frames=32,
  # A rule of `data.frames`; "public_linspace_1fps" shows fewer of short clips.
  frame_rule="eval_linspace",
  # For models whose token grid follows the frames' shape: pixels of a frame
  # (Qwen2.5-VL) or of a whole clip (Qwen3-VL), 0 for the checkpoint's own
  # limits; and, of these and of rules that show fewer frames of short clips,
  # sizes that programs are compiled for, (temporal patches, tokens of one) or
  # with a third number, all tokens; empty for what follows from the pixels and
  # `num_frames`.
  min_pixels=0,
  max_pixels=0,
  buckets=(),
  # Rows that prompts have beside their video, padded to the smallest of at
  # most three lengths; empty for those that suit the questions best.
  prompt_rows=(),
  # Folder that keeps video features; empty keeps them in memory only, those
  # of the last `memory_items` clips.
  feature_cache="",
  memory_items=256,
  # Threads, or else processes, that load clips ahead; of evaluations threads.
  num_threads=2,
  num_workers=0,
  # Clips are decoded by "workers", processes of their own that a bad one may
  # crash or hang, or "in_process".
  decode="workers",
  # {"question_id", "tokens"} per line, below `root`; for metrics only.
  decisive_file="",
)

# The embedded benchmark: `prepare` draws it into the folder of `data.root`.
_PREPARE = dict(
  variants=("dense",),
  seed=0,
  clips=(240, 40, 160, 0),  # Of the splits train, validation, test, test_fresh.
  questions_per_clip=4,  # At most.
  # Whether decisive.jsonl is kept, the tokens that answers rest on: of the
  # embedded base model's grid, so that other models refuse it.
  decisive=True,
  # Random checkpoints too: llava_onevision, qwen2_5_vl, qwen3_vl.
  tiny_models=(),
  num_workers=0,  # Processes that draw and encode; 0 takes one per core.
)

# Of tables in `experiments`, what nothing else has.
_TABLE = dict(
  # Columns of the main table, each a folder below `data.root`, unless one of
  # `folders` names it as "videomme=DIR".
  benchmarks=("longvideobench", "mlvu_dev", "mlvu_test", "videomme"),
  folders=(),
  tolerance=1.0,  # Points between two runs of the same thing.
  repeats=9,  # Runs that a time is the median of.
  # Model and video of the efficiency table, and the folder of its random
  # weights; below the workdir if empty.
  size="ov-7b",
  weights="",
)

_EVALS = dict(
  # Trained policies as "NAME=PATH": training workdirs or .safetensors files,
  # with "?module=file.py:Class" behind them where that is not the paper's.
  # Without names they are policy, policy1, ...; the first is the main one.
  # Empty takes one that was trained in the workdir.
  policies=(),
  # Training has `data.frame_rule`. "eval_linspace_2fps" shows two frames a
  # second, at least 4 and at most `data.num_frames`.
  frame_rule="eval_linspace",
  # Rows: names of `compressors.names()`, with options as in
  # "density_peaks?scope=video", or one's own "path/file.py:function";
  # "label=name?option=value" gives a row another name.
  methods=(
    "cacovid",
    "cacovid_untrained",
    "cacovid_other_question",
    "random",
    "uniform",
    "last_query",
    "divprune",
    "density_peaks",
  ),
  oracles=("decisive_boxes",),  # Bounds, where decisive tokens are known.
  ratios=(0.25, 0.1, 0.05),
  benchmark="prepared",  # Of `benchmarks.names()`, in the folder `data.root`.
  split="",  # Empty takes the benchmark's first split.
  # Seeds of random draws, of the untrained policy and of other questions;
  # accuracies are means over them.
  seeds=(0,),
  # Questions asked at once, about one clip or several of one token grid;
  # answers do not depend on it, but for rounding.
  batch_size=8,
  max_new_tokens=0,  # Longest answer in tokens; 0 takes the benchmark's own.
  # How letters are taken from answers: "paper", "lmms-0.7.3" or "own"; empty is
  # "own" for one's own videos and "paper" for all else.
  rule="",
  # The user's text: empty is the benchmark's own, "video-r1" that of
  # training, which prepared data has as its own.
  prompt_style="",
  # Chat template: "processor" or "tokenizer"; empty is the checkpoint's
  # default, the processor's where there is one.
  template="",
  # Of Qwen3-VL: whether the time and marks of a temporal patch stay in the
  # prompt where no token of it is kept: "keep", or "drop" them.
  empty_frames="keep",
  on_bad_row="raise",  # Or "skip", to leave unfit rows out and list them.
  # Clips that are not there: "raise" before anything is asked, or "count"
  # to count their questions as wrong and list them.
  on_missing="raise",
  num_questions=0,  # First so many questions; 0 asks all of them.
  frame_manifest="",  # Of another run, whose frames are shown here as well.
  # Where options are chosen: "validation" or "none". Candidates are
  # "name?option=value" texts by method; last_query tries all layers even
  # if it is not listed. The best one at `select_ratio` goes to the test.
  # Thresholds of `cacovid?size=question` are chosen there as well.
  select_on="validation",
  select_ratio=0.1,
  select_questions=200,
  candidates=dict(),
  num_examples=8,  # Clips that the report shows frame by frame.
  # Training workdir whose reward curves the report shows; empty takes that
  # of the main policy, if it is a training workdir.
  metrics="",
)


def get_config() -> ml_collections.ConfigDict:
  """Returns the unlocked default config."""
  groups = dict(data=_DATA, prepare=_PREPARE, table=_TABLE, evals=_EVALS)
  config = ml_collections.ConfigDict(_RUN | _METHOD | groups)
  # Bound of |log pi - log pi_old|; None is the paper's unbounded ratio.
  config.objective.log_ratio_clamp = config_dict.placeholder(float)
  # TFLOP/s and GB/s that --dry_run counts with; None measures them.
  config.table.tflops = config_dict.placeholder(float)
  config.table.gbps = config_dict.placeholder(float)
  return config
