"""What the values of a config must be: the type and the range of every key.

Held against whatever a file or a command line says, before anything is read or
compiled. A key without a range has the type of its default.
"""

import functools
from typing import Any

import ml_collections

from cacovid_jax import base_config, schema
from cacovid_jax.remote import store as remote

BACKENDS = ("auto", "xla", "cudnn", "splash")
LAYERS = ("auto", "stacked", "separate")
ROUGE = ("unicode", "public")  # What it counts as words.
DTYPES = ("float32", "bfloat16")
RULES = ("paper", "lmms-0.7.3", "own")  # Of `data.letters`, in its order.
# Of `data.frames`: those of evaluations, and all.
EVAL_RULES = ("eval_linspace", "train_linspace_1fps", "eval_linspace_2fps")
FRAME_RULES = (*EVAL_RULES, "public_linspace_1fps")

# Seeds of JAX have 32 bits: beyond them, two seeds would draw alike.
SEED = schema.within(int, 0, 2**32 - 1)
_NEW_TOKENS = 2**17  # Longer than any model's context.
_WORKERS = schema.within(int, 0, 4096)
TEXTS = tuple[schema.Text, ...]
_SHARES = tuple[schema.Share, ...]
_SIZES = tuple[schema.Size, ...]

# (type, names of keys).
_LIMITS = (
  (SEED, "seed prepare.seed pretrain.seed"),
  (tuple[SEED, ...], "evals.seeds"),
  (
    schema.Count,
    "videos_per_step iterations log_every max_bad_steps mesh.model"
    " ckpt.every_steps ckpt.keep validation.batch_size blind.batch_size"
    " prepare.questions_per_clip table.repeats evals.batch_size"
    # Of a base model and its training.
    " vocab_size vision.hidden_size vision.intermediate_size vision.num_layers"
    " vision.num_heads vision.image_size vision.patch_size text.hidden_size"
    " text.intermediate_size text.num_layers text.num_heads text.num_kv_heads"
    " text.head_dim text.max_positions pretrain.num_steps pretrain.min_keep"
    " pretrain.num_keep pretrain.asked_questions pretrain.log_every"
    " pretrain.probe_every pretrain.probe_clips pretrain.packing.batch_size"
    " pretrain.packing.questions_per_clip pretrain.packing.question_length"
    " pretrain.packing.text_only_length pretrain.packing.max_decisive",
  ),
  (
    schema.Size,
    "total_steps mesh.data validation.every_steps validation.num_questions"
    " blind.num_questions optimizer.warmup data.min_side data.min_pixels"
    " data.max_pixels data.memory_items evals.num_questions"
    " evals.select_questions evals.num_examples pretrain.warmup_steps"
    " pretrain.packing.text_only pretrain.packing.ramp_steps",
  ),
  (schema.within(int, 0, 2**16), "data.num_frames"),
  (
    _WORKERS,
    "data.num_threads data.num_workers prepare.num_workers"
    " pretrain.num_workers",
  ),
  (schema.within(int, 0, 255), "ckpt.exit_code"),
  (
    schema.within(int, 1, _NEW_TOKENS),
    "validation.max_new_tokens blind.max_new_tokens rollout.max_new_tokens",
  ),
  (schema.within(int, 0, _NEW_TOKENS), "evals.max_new_tokens"),
  (schema.within(int, 1, 2**16), "sampling.num_combinations"),
  (schema.within(int, 0, 16), "policy.num_halvings policy.budget_embedding"),
  # Below 1, they could not be the cap of a distribution.
  (
    schema.within(float, 1, 1e9),
    "sampling.max_group_prob sampling.max_frame_prob sampling.group_size",
  ),
  (
    schema.Share,
    "validation.ratio sampling.ratio sampling.frame_ratio ratio.start"
    " evals.select_ratio blind.threshold",
  ),
  (
    schema.Fraction,
    "data.max_replaced ratio.low ratio.high objective.clip_low"
    " pretrain.lossy_share pretrain.crowded_share pretrain.merged_share"
    " pretrain.packing.sparse_share",
  ),
  (
    schema.Weight,
    "objective.clip_high objective.kl_weight optimizer.lr_heads"
    " optimizer.lr_layer optimizer.weight_decay table.tolerance pretrain.lr"
    " pretrain.weight_decay pretrain.norm_rate pretrain.weights.full"
    " pretrain.weights.pruned pretrain.weights.told pretrain.weights.labels"
    " pretrain.weights.size pretrain.weights.asked",
  ),
  (schema.Positive, "optimizer.clip text.rope_theta pretrain.norm_scale"),
  # Above it, float32 would not tell a step of the average from none.
  (schema.within(float, 0, 0.9999), "optimizer.average"),
  (schema.Positive | None, "objective.log_ratio_clamp table.tflops table.gbps"),
  (schema.one_of(*DTYPES), "policy.dtype model.dtype dtype"),
  (schema.one_of(*BACKENDS), "policy.backend model.backend attention"),
  (schema.one_of(*LAYERS), "model.layers"),
  (schema.one_of("shard_map", "pmap"), "mesh.map"),
  (schema.one_of("workers", "in_process"), "data.decode"),
  (schema.one_of(*ROUGE), "rouge"),
  (schema.one_of("", *RULES), "evals.rule"),
  (schema.one_of(*FRAME_RULES), "data.frame_rule"),
  (schema.one_of(*EVAL_RULES), "evals.frame_rule"),
  (schema.one_of("", "processor", "tokenizer"), "evals.template"),
  (schema.one_of("keep", "drop"), "evals.empty_frames"),
  (schema.one_of("validation", "none"), "evals.select_on"),
  (schema.one_of("raise", "count"), "evals.on_missing"),
  (
    schema.one_of("raise", "skip"),
    "evals.on_bad_row data.on_bad_row data.on_missing",
  ),
  (schema.one_of("video-r1", "own"), "data.reader"),
  (schema.one_of("auto", "device", "host"), "rollout.marking"),
  (schema.one_of("per_frame", "public"), "sampling.frame_cap"),
  (schema.one_of("row", "frame"), "objective.frame_credit"),
  (schema.one_of("cosine", "cosine_repeated"), "optimizer.schedule"),
  (schema.one_of("video_r1", "video_r1_filtered"), "tfds.name"),
  (bool, "remat"),
  (schema.Text, "pretrain.init"),
  (
    TEXTS,
    "prepare.variants prepare.tiny_models table.benchmarks table.folders"
    " evals.policies evals.methods evals.oracles",
  ),
  (dict[str, TEXTS], "evals.candidates"),
  (_SHARES, "ratio.rungs ratio.range evals.ratios"),
  (_SIZES, "prepare.clips data.prompt_rows pretrain.packing.dense_objects"),
  (tuple[_SIZES, ...], "data.buckets"),
  (tuple[schema.Text, schema.Text], "pretrain.packing.variants"),
  (
    tuple[schema.Fraction, ...],
    "pretrain.packing.text_answer_share pretrain.packing.kind_shares",
  ),
)


@functools.cache
def kinds() -> dict[str, Any]:
  """Returns the type of every key, "key.subkey"."""
  return _defaults(base_config.get_config()) | listed(_LIMITS)


def listed(limits) -> dict[str, Any]:
  """Returns {key: type} of (type, "names of keys") pairs."""
  return {key: kind for kind, names in limits for key in names.split()}


def _defaults(group, prefix=""):
  """Returns the types of the defaults below a group."""
  found = {}
  for key in group:
    if isinstance(group[key], ml_collections.ConfigDict):
      found |= _defaults(group[key], f"{prefix}{key}.")
    else:
      kind = group.get_type(key)
      found[prefix + key] = schema.Text if kind is str else kind
  return found


def check(config, where="", limits=None) -> None:
  """Stops at a value that is not what it must be, in whatever keys there are.

  `config` are nested mappings; `where` says in errors where they come from;
  `limits` are the types of a config of other keys, as `kinds` gives.
  """
  for key, kind in (kinds() if limits is None else limits).items():
    *groups, leaf = key.split(".")
    group, name = config, ""
    for part in groups:
      group, name = group.get(part, {}), f"{name}.{part}".lstrip(".")
      if not isinstance(group, (dict, ml_collections.ConfigDict)):
        schema.fit(group, dict, where, key=name if where else f"config.{name}")
    if leaf in group:
      value = group[leaf]
      if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
      name = key if where else f"config.{key}"
      schema.fit(value, kind, where, key=name)
      for text in value if isinstance(value, (tuple, list)) else (value,):
        remote.refuse(text, name)
