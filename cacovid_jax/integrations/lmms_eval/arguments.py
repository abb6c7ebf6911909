"""The `--model_args` of lmms-eval."""

import dataclasses
import logging
import os
from typing import Any

import jax

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.evals import answering, runner
from cacovid_jax.models import processors

_LOGGER = logging.getLogger(__name__)

# Other names of the same: of the paper's evaluator and of models of lmms-eval.
_ALIASES = {"topk": "ratio", "num_frames": "max_frames_num"}
# What lmms-eval may give to every model, and what it says here.
_GENERAL = ("device", "max_batch_size")
_TEMPLATES = ("processor", "tokenizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
  """How the model answers.

  Attributes:
    pretrained: Hugging Face checkpoint directory; "" is the small model that
      comes with the package.
    policy: training workdir or .safetensors file, for the learned methods; ""
      is the shipped model's own, or one among the weights of `pretrained`.
    method: as in an evaluation, `name?option=value`.
    ratio: share of the video tokens that is kept; 1.0 is the whole prompt,
      whatever the method.
    max_frames_num: T; 0 takes the number of the checkpoint's files, or 32.
    min_pixels: least pixels of a frame of models whose grid follows the clip
      (Qwen2.5-VL); 0 is the paper's bound.
    max_pixels: most of them, likewise.
    dtype: of weights and computation, float32 or bfloat16.
    batch_size: questions asked at once.
    max_new_tokens: longest answer of tasks that set no length.
    seed: of methods that draw.
    template: chat template, that of the "processor" or of the "tokenizer" (the
      paper's evaluator takes the latter).
    feature_cache: folder of cached video features, "" for none.
  """

  pretrained: str = ""
  policy: str = ""
  method: str = "cacovid"
  ratio: float = 0.1
  max_frames_num: int = 0
  min_pixels: int = 0
  max_pixels: int = 0
  dtype: str = "float32"
  batch_size: int = 1
  max_new_tokens: int = 1024
  seed: int = 0
  template: str = "processor"
  feature_cache: str = ""

  def __post_init__(self):
    for field in ("batch_size", "max_new_tokens"):
      if getattr(self, field) < 1:
        raise errors.UserError(f"{field}={getattr(self, field)}: at least 1")
    for field in ("max_frames_num", "min_pixels", "max_pixels"):
      if getattr(self, field) < 0:
        raise errors.UserError(
          f"{field}={getattr(self, field)}: at least 1, or 0 for the usual"
          " number"
        )
    _check("dtype", self.dtype, answering.DTYPES)
    _check("template", self.template, _TEMPLATES)
    base.check_ratio(self.ratio)

  @property
  def directory(self) -> str:
    """The checkpoint's folder."""
    return self.pretrained or os.fspath(answering.SHIPPED_MODEL)

  @property
  def num_frames(self) -> int:
    """T."""
    return self.max_frames_num or processors.default_num_frames(self.directory)

  def cell(self) -> runner.Cell:
    """Returns what is asked: the method at its ratio, or vanilla at 1.0."""
    ratio = base.check_ratio(self.ratio)
    if ratio == 1:
      return runner.Cell(None, 1.0, 0)
    method = runner.Method.parse(self.method)
    if method.compressor.oracle:
      raise errors.UserError(
        f"method={self.method} knows where the answer lies, which a benchmark"
        " does not tell; use another method"
      )
    return runner.Cell(method, ratio, self.seed if method.per_seed else 0)


def parse(**given: Any) -> Arguments:
  """Returns the arguments of a command line; a mistake is a `UserError`.

  Args:
    **given: values as lmms-eval reads them: numbers and truth values already
      converted, `batch_size` a text, and its own `device` and
      `max_batch_size`, of which nothing is taken.
  """
  fields = {field.name: field for field in dataclasses.fields(Arguments)}
  values = {}
  for name, value in given.items():
    if name in _GENERAL:
      _check_general(name, value)
      continue
    field = fields.get(_ALIASES.get(name, name))
    if field is None:
      known = ", ".join(sorted({*fields, *_ALIASES}))
      raise errors.UserError(f"unknown model argument {name!r}; known: {known}")
    if field.name in values:
      raise errors.UserError(
        f"{name} is another name of {field.name}; give one of them"
      )
    values[field.name] = _converted(name, value, type(field.default))
  return Arguments(**values)


def _converted(name, value, kind):
  if kind is str:
    # An empty value arrives as it is, a word such as "none" as one of these.
    return "" if value is None else str(value)
  try:
    if isinstance(value, bool) or (kind is int and float(value) % 1):
      raise ValueError
    return kind(float(value)) if kind is int else kind(value)
  except (TypeError, ValueError, OverflowError):
    what = "a whole number" if kind is int else "a number"
    raise errors.UserError(f"{name}={value!r} is not {what}") from None


def _check(name, value, known):
  if value not in known:
    raise errors.UserError(f"{name}={value!r}: use {' or '.join(known)}")


def _check_general(name, value):
  """Says what cannot be followed: JAX has chosen the device by now."""
  if name != "device" or not value:
    return
  wanted = str(value).partition(":")[0]
  wanted = {"cuda": "gpu", "rocm": "gpu"}.get(wanted, wanted)
  if wanted != jax.default_backend():
    _LOGGER.warning(
      "device=%s is not followed: JAX computes on %s; set JAX_PLATFORMS to"
      " choose",
      value,
      jax.default_backend(),
    )
