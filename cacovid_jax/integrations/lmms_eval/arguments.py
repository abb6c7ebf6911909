"""The `--model_args` of lmms-eval: other names of config keys."""

import logging
from typing import Any

import jax

from cacovid_jax import base_config, errors
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.inference import methods as methods_lib

_LOGGER = logging.getLogger(__name__)

# What `--model_args` takes besides `config` and any key with a dot in it, such
# as mesh.data.
ARGUMENTS = {
  "pretrained": "model.path",  # Checkpoint directory; else the shipped model.
  # Training workdir or .safetensors file, for the learned methods; empty is the
  # shipped model's own, or one among the weights of `pretrained`.
  "policy": "evals.policies",
  "method": "evals.methods",  # As in an evaluation, `name?option=value`.
  # Share of the video tokens that is kept; 1.0 is the whole prompt, whatever
  # the method.
  "ratio": "evals.ratios",
  "max_frames_num": "data.num_frames",  # 0 is that of the files, or 32.
  # Least and most pixels of a frame, of Qwen2.5-VL; 0 is the paper's bound.
  "min_pixels": "data.min_pixels",
  "max_pixels": "data.max_pixels",
  "dtype": "model.dtype",
  "batch_size": "evals.batch_size",  # Questions asked at once.
  "max_new_tokens": "evals.max_new_tokens",  # Of tasks that set no length.
  "seed": "evals.seeds",  # Of methods that draw.
  # Chat template, that of the processor or of the tokenizer (the paper's
  # evaluator takes the latter).
  "template": "evals.template",
  "feature_cache": "data.feature_cache",  # Folder of cached video features.
}
# Other names, of the paper's evaluator and of models of lmms-eval.
_ALIASES = {"topk": "ratio", "num_frames": "max_frames_num"}
_DEFAULTS = {
  "model.dtype": "float32", "data.num_frames": 0, "evals.batch_size": 1,
  "evals.methods": ("cacovid",), "evals.ratios": (0.1,),
  "evals.max_new_tokens": 1024,
}  # fmt: skip


def parse(**given: Any):
  """Returns the config of a command line; a mistake is a `UserError`.

  Values are as lmms-eval reads them: numbers and truth values already
  converted, `batch_size` a text, and its own `device` and `max_batch_size`, of
  which nothing is taken.
  """
  if spec := given.pop("config", ""):
    config = config_lib.load(spec, fill=True)
  else:
    config = config_lib.replace(base_config.get_config(), _DEFAULTS)
  given.pop("max_batch_size", None)
  _check_device(given.pop("device", None))
  values = {}
  for name, value in given.items():
    own = _ALIASES.get(name, name)
    if own not in ARGUMENTS and "." not in name:
      known = ", ".join(sorted({*ARGUMENTS, *_ALIASES, "config"}))
      raise errors.UserError(f"unknown model argument {name!r}; known: {known}")
    key = ARGUMENTS.get(own, name)
    told = f"{name} is another name of {own}; give one of them"
    errors.check(key not in values, told)
    old = config_lib.value_of(config, key)
    like = old[0] if isinstance(old, tuple) and old else old
    values[key] = _converted(name, value, like)
    if isinstance(old, tuple):
      values[key] = (values[key],) if values[key] != "" else ()
  for name in ("batch_size", "max_new_tokens"):
    value = values.get(f"evals.{name}", config.evals[name])
    errors.check(value >= 1, f"{name}={value}: at least 1")
  frames = values.get("data.num_frames", config.data.num_frames)
  told = f"max_frames_num={frames}: at least 1, or 0 for the usual number"
  errors.check(frames >= 0, told)
  base.check_ratio(values.get("evals.ratios", config.evals.ratios)[0])
  config = config_lib.replace(config, values)
  # Looks at the other values.
  experiment_lib.Experiment.from_config(config)
  return experiment_lib.with_shipped(config)


def condition(config) -> methods_lib.Condition:
  """Returns what is asked: the first method at its ratio, or vanilla at 1.0."""
  evals = config.evals
  ratio = base.check_ratio(evals.ratios[0])
  if ratio == 1:
    return methods_lib.Condition()
  method = methods_lib.Method.parse(evals.methods[0])
  if method.compressor.oracle:
    raise errors.UserError(
      f"method={evals.methods[0]} knows where the answer lies, which a"
      " benchmark does not tell; use another method"
    )
  seed = evals.seeds[0] if method.per_seed else 0
  return methods_lib.Condition(method, ratio, seed)


def _converted(name, value, like):
  """Returns a value of the type of `like`; a text for an empty list."""
  if isinstance(like, (str, tuple)):
    # An empty value arrives as it is, a word such as "none" as one of these.
    return "" if value is None else str(value)
  kind = type(like)
  try:
    if isinstance(value, bool) != (kind is bool):
      raise ValueError
    if kind is int and float(value) % 1:
      raise ValueError
    return kind(float(value)) if kind is int else kind(value)
  except (TypeError, ValueError, OverflowError):
    what = "a whole number" if kind is int else "a number"
    raise errors.UserError(f"{name}={value!r} is not {what}") from None


def _check_device(value):
  """Says what cannot be followed: JAX has chosen the device by now."""
  wanted = str(value or "").partition(":")[0]
  wanted = {"cuda": "gpu", "rocm": "gpu"}.get(wanted, wanted)
  if wanted and wanted != jax.default_backend():
    _LOGGER.warning(
      "device=%s is not followed: JAX computes on %s; set JAX_PLATFORMS to"
      " choose",
      value,
      jax.default_backend(),
    )
