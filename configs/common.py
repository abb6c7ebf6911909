"""What config files share: the argument after the colon, the paper's recipe."""

import difflib
import types

from cacovid_jax import base_config, config_values, errors
from cacovid_jax.data import frames
from cacovid_jax.models import processors, qwen3_vl_processor


def parse_arg(arg, **defaults):
  """Returns the fields of "debug,ratio=0.02" with the types of their defaults.

  The text stands behind the colon of --config; a name alone is a truth value.
  """
  fields = dict(defaults)
  for part in filter(None, (part.strip() for part in (arg or "").split(","))):
    name, equals, text = part.partition("=")
    if name not in defaults:
      near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.4)
      names = ", ".join(near or sorted(defaults)) or "none"
      raise errors.UserError(
        f"unknown config argument {name!r} in {arg!r}; nearest: {names}"
      )
    told = f"config argument {name!r} in {arg!r} needs a value: {name}=VALUE"
    errors.check(equals or isinstance(defaults[name], bool), told)
    fields[name] = config_values.parse(
      text if equals else "true", defaults[name], name=name
    )
  return types.SimpleNamespace(**fields)


# What a recipe of released models sets, by its name; all else is the paper's.
RECIPES = {
  # As the public code trains, which is what the paper's tables come from.
  "public": {
    "optimizer.schedule": "cosine_repeated",
    "sampling.frame_cap": "public",
    "data.frame_rule": frames.PUBLIC_RULE,
  },
  # As the paper reads: one decay, frames capped one by one; and 32 frames of
  # every clip, as in its evaluation, so that nothing is padded.
  "ours": {
    "optimizer.schedule": "cosine",
    "sampling.frame_cap": "per_frame",
    "data.frame_rule": frames.TRAIN_RULE,
  },
}
# Tokens of a frame of LLaVA-OneVision.
_FRAME_TOKENS = 14 * 14


def check_recipe(name):
  """Refuses the name of a recipe that there is not."""
  known = " or ".join(RECIPES)
  errors.check(name in RECIPES, f"unknown recipe {name!r}: use {known}")


def check_size(size, sizes):
  """Returns one of the sizes that there are, a point in it turned into "_"."""
  if (name := size.replace(".", "_")) not in sizes:
    raise errors.UserError(f"unknown size {size!r}: use {' or '.join(sizes)}")
  return name


def released(arg, *, family, sizes):
  """Returns the paper's run on a model with weights in checkpoints/FAMILY_SIZE.

  In the text after the colon, `size` is one of `sizes`, the first by default;
  `recipe=ours` departs from what the public code does (see docs/recipes.md);
  `debug` is two steps and a few questions on a tiny random model of the family
  (of `synthetic.tiny_checkpoints`) and on the embedded benchmark; `devices=8`
  trains that many videos a step, one on each.
  """
  # The public code does not know Qwen3-VL.
  recipe = "ours" if family == "qwen3_vl" else "public"
  arg = parse_arg(
    arg, size=sizes[0], recipe=recipe, debug=False, devices=1, seed=42
  )
  size = check_size(arg.size, sizes)
  check_recipe(arg.recipe)
  config = base_config.get_config()  # The paper's numbers.
  config.seed = arg.seed
  config.total_steps = 0  # One epoch.
  config.videos_per_step = arg.devices
  config.update_from_flattened_dict(RECIPES[arg.recipe])
  config.model.path = f"checkpoints/{family}_{size}"
  config.data.root = "datasets/video_r1"
  config.data.train_file = "filtered.json"
  config.data.num_threads = 8
  config.data.memory_items = 32  # Features of a clip take 90 MB at 7B.
  if family == "qwen2_5_vl":
    config.data.min_pixels = processors.PAPER_MIN_PIXELS
    config.data.max_pixels = processors.PAPER_MAX_PIXELS
  if family == "qwen3_vl":
    # Of a whole clip: as many tokens as the paper's of two frames together.
    tokens = config.data.num_frames * processors.PAPER_TOKENS[1]
    config.data.max_pixels = tokens * qwen3_vl_processor.SIDE**2
  if family == "llava_onevision" and arg.recipe == "public":
    # Clips below 16 seconds, of which there are many, take half of the rows.
    config.data.buckets = ((16, _FRAME_TOKENS), (32, _FRAME_TOKENS))
  config.evals.methods = (
    # The paper's half of the budget, spread evenly, and its cap of 1.5 r.
    "cacovid=cacovid?importance_ratio=0.5&max_frame_share=1.5",
    "fastv", "visionzip", "divprune", "prunevid", "framefusion",
  )  # fmt: skip
  config.evals.oracles = ()
  config.evals.ratios = (0.25, 0.2, 0.15, 0.1)
  config.evals.seeds = (0, 1, 2)  # Of methods that draw, if some are asked for.
  config.evals.select_on = "none"
  if family == "llava_onevision":
    # The paper's evaluator: plain texts and the tokenizer's system turn.
    # Qwen2.5-VL's two templates write the same prompt.
    config.evals.template = "tokenizer"
  config.evals.batch_size = 1
  if arg.debug:
    _shorten(config, family)
  return config


def _shorten(config, family):
  """Makes a run one of seconds, on what `prepare --tiny_models` writes."""
  config.model.path = f"workdirs/tiny/{family}"
  config.model.dtype = config.policy.dtype = "float32"
  config.total_steps, config.iterations, config.log_every = 2, 2, 1
  config.ckpt.every_steps = 1
  config.sampling.num_combinations = 8
  config.rollout.max_new_tokens = 2
  config.data.root = "workdirs/tiny/dense"
  config.data.train_file = "train.json"
  config.data.num_frames = 4
  config.data.buckets = ()
  config.data.num_threads = 2
  config.data.min_pixels = config.data.max_pixels = 0
  config.evals.methods = (config.evals.methods[0], "divprune")
  config.evals.ratios = (0.25,)
  config.evals.batch_size = config.evals.max_new_tokens = 2
  config.evals.num_questions, config.evals.num_examples = 4, 1
