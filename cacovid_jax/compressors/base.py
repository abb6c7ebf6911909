"""What a token compressor is: one video in, exactly K of its tokens out.

A frozen dataclass whose own fields are its options. It chooses among the tokens
of ONE video with static shapes; callers `jax.vmap` it over a batch and
`jax.jit` it with the grid and K fixed. Equal values share compiled programs.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp

from cacovid_jax import errors, files
from cacovid_jax.compressors import budgets, selection_ops
from cacovid_jax.models import prompt_batch, safetensors_io

# What a rule of one's own needs besides, see there.
Selection, arrange = selection_ops.Selection, selection_ops.arrange
take, take_top = selection_ops.take, selection_ops.take_top
take_mask, merge = selection_ops.take_mask, selection_ops.merge
budget, check_ratio = budgets.budget, budgets.check_ratio


def number(default, low, high=None, *, whole=False, open_low=False):
  """Returns the field of an option between `low` and `high`, None for no bound.

  The default is always allowed, None as well. `whole` numbers are integers;
  with `open_low` they must exceed `low`. See `Compressor.__post_init__`.
  """
  kind = numbers.Integral if whole else numbers.Real

  def check(method, name, value):
    right = isinstance(value, kind) and not isinstance(value, bool)
    right = right and (value > low if open_low else value >= low)
    if right and value < math.inf and (high is None or value <= high):
      return
    allowed = f"{'above' if open_low else 'at least'} {low}"
    if high is not None:
      allowed += f" and at most {high}"
    kind_of = "an integer" if whole else "a number"
    told = f"{method}: {name} is {value!r}; give {kind_of} {allowed}"
    raise errors.UserError(told)

  return dataclasses.field(default=default, metadata={"check": check})


def choice(default, *others):
  """Returns the field of an option that is one of the values given."""
  allowed = (default, *others)

  def check(method, name, value):
    if value not in allowed:
      *first, last = map(repr, allowed)
      raise errors.UserError(
        f"{method}: {name} is {value!r}; use {', '.join(first)} or {last}"
      )

  return dataclasses.field(default=default, metadata={"check": check})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressorInputs:
  """What a compressor may look at; parts that it does not require are None."""

  features: jax.Array  # float[N, D] video tokens.
  grid: tuple[int, int, int] = dataclasses.field(metadata=dict(static=True))
  text: jax.Array | None = None  # float[Q, D] question; rows of zeros pad.
  # `policy.network.Scores` of the trained policy, of a freshly initialised one,
  # and of the trained policy and another question.
  scores: Any = None
  untrained_scores: Any = None
  other_scores: Any = None
  # float32[layers, N] that the prompt's last token pays, mean over heads.
  attention: jax.Array | None = None
  decisive: jax.Array | None = None  # bool[N] evidence tokens (oracles).
  # float32[N] received from the own frame in the tower's last layer, mean over
  # heads and queries (a sum over queries for towers that merge patches; only
  # ratios matter), and float32[N, dk], that layer's keys averaged over heads.
  vision_attention: jax.Array | None = None
  vision_keys: jax.Array | None = None
  deep: jax.Array | None = None  # float[S, N, D], of `video_llm.VideoFeatures`.
  rng: jax.Array | None = None  # Key of stochastic methods.

  @property
  def frames(self) -> jax.Array:
    """The tokens frame by frame, float[T, H * W, D]."""
    return self.features.reshape(self.grid[0], -1, self.features.shape[-1])

  @property
  def frame_attention(self) -> jax.Array:
    """`vision_attention` frame by frame, float32[T, H * W]."""
    return self.vision_attention.astype(jnp.float32).reshape(self.grid[0], -1)


# What may be required, in words. The scores of a policy and the attention of
# the language model both come from the question.
_REQUIREMENTS = {
  "text": ("text",),
  "scores": ("text", "training"),
  "other_scores": ("text", "training"),
  "untrained_scores": ("text",),
  "attention": ("text", "LLM attention"),
  "vision_attention": ("vision attention",),
  "vision_keys": ("vision keys",),
  "decisive": ("answer",),
}
# Parts that an evaluation can hand to a method.
OFFERED = tuple(
  name for name in CompressorInputs.__annotations__ if name in _REQUIREMENTS
)
# Parts that are the same for every question about a video.
VISION_SIGNALS = frozenset(["vision_attention", "vision_keys"])


class SelectionTrace(NamedTuple):
  """What became of the video tokens inside the language model."""

  index: jax.Array  # int32[B, K] left at the last layer, ascending; N behind.
  mask: jax.Array  # bool[B, K] which of them there are.
  tokens: jax.Array  # float32[B, layers] tokens that each attention saw.
  # bool[B], True where a rule had to end early to meet the budget; None for
  # rules that never have to.
  forced: jax.Array | None = None

  def equivalent_ratio(self, num_video: int) -> jax.Array:
    """Returns float32[B]: mean over layers of the share of N tokens seen."""
    return self.tokens.mean(axis=1) / num_video

  @classmethod
  def of(cls, rows, tokens, **more):
    """Returns that of `prompt_batch.PrunedPrompts` behind the last layer."""
    mask = jnp.arange(rows.index.shape[1])[None] < rows.count[:, None]
    return cls(rows.index, mask, tokens.astype(jnp.float32), **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressor:
  """A token compression rule; what a subclass adds as fields are its options.

  A subclass gives `choose`, and `reference_rows` if its publication rounds
  otherwise than down. One with parameters of its own sets `trained = True`,
  takes `weights` as an option and `params` as the last argument of `choose`.
  """

  name: str = ""  # Of a class: `class Mine(Compressor, name="mine")`.
  requires: frozenset[str] = frozenset()  # Fields of `CompressorInputs`.
  stochastic: bool = False  # If it draws from `rng`: tables give means then.
  oracle: bool = False  # If it knows the answer's place: a bound, no method.
  # True to keep exactly floor(ratio * N) tokens, False to round as the method's
  # own publication does.
  exact_budget: bool = True
  note: str = ""  # A sentence for tables if the name is not quite what it does.
  weights: str = ""  # File of a trained method's parameters.
  weights_sha256: str = dataclasses.field(default="", init=False)
  source: str = ""  # sha256 of the user's own file that the method comes from.
  # Names of the options that were set, for the record.
  given: tuple[str, ...] = dataclasses.field(default=(), compare=False)

  trained: ClassVar[bool] = False
  # Whether the choice is made before the language model runs, so that it can
  # be a program of its own and methods of equal K share the one that answers.
  selects_first: ClassVar[bool] = True
  # Whether it reads counts on the host between programs.
  on_host: ClassVar[bool] = False

  def __init_subclass__(cls, name=None, **options):
    super().__init_subclass__(**options)
    if name is not None:  # A field of the dataclass, hence annotated.
      cls.name = name
      cls.__annotations__ = inspect.get_annotations(cls) | {"name": str}

  def __post_init__(self):
    told = f"{self.name}: weights={self.weights!r}: there is no such file"
    errors.check(not self.weights or os.path.isfile(self.weights), told)
    digest = files.sha256(self.weights) if self.weights else ""
    object.__setattr__(self, "weights_sha256", digest)
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if "check" in field.metadata and value is not field.default:
        field.metadata["check"](self.name, field.name, value)

  # Written out, so that a subclass made with eq=False counts by its options.
  def __eq__(self, other):
    return type(self) is type(other) and self._values() == other._values()

  def __hash__(self):
    return hash(self._values())

  def _values(self):
    fields = dataclasses.fields(self)
    return tuple(getattr(self, field.name) for field in fields if field.compare)

  def choose(self, inputs: CompressorInputs, num_keep: int, ratio) -> Selection:
    """Returns the selection of one video; `select` has checked the inputs.

    `num_keep` is K, static, below N unless `reference_rows` gives as many;
    `ratio` the one behind K, or None where `exact_budget` is set.
    """
    raise NotImplementedError(f"{type(self).__name__} chooses no tokens")

  def reference_rows(self, grid, ratio: float) -> int:
    """Returns how many tokens the publication keeps, or a bound of them."""
    return budget(grid, ratio)

  @property
  def rounds_itself(self) -> bool:
    """True if `choose` says by the mask how many of `rows` there are."""
    own = type(self).reference_rows is not Compressor.reference_rows
    return own and not self.exact_budget

  @property
  def sees_question(self) -> bool:
    """True if two questions about one clip may get different tokens."""
    read = self.requires - VISION_SIGNALS
    return bool(read) or self.stochastic or not self.selects_first

  @property
  def requirements(self) -> tuple[str, ...]:
    """What it cannot do without, in words; unknown parts as they are."""
    parts = self.requires | (set() if self.selects_first else {"attention"})
    words = []
    for part, known in _REQUIREMENTS.items():
      words += known if part in parts else ()
    words += sorted(parts.difference(_REQUIREMENTS))
    return tuple(dict.fromkeys(words))

  @classmethod
  def _general_fields(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(Compressor)}

  @property
  def known_options(self) -> tuple[str, ...]:
    """Names of the options that it takes, sorted."""
    own = {f.name for f in dataclasses.fields(self)} - self._general_fields()
    return tuple(sorted(own | ({"weights"} if self.trained else set())))

  @property
  def options(self) -> Mapping[str, Any]:
    """The options that were set, for the record."""
    return {name: getattr(self, name) for name in self.given}

  @property
  def fingerprint(self) -> str:
    """What tells apart methods of one name: digests of the files behind it."""
    digests = [self.source[:12], self.weights_sha256[:12]]
    return "#".join(digest for digest in digests if digest)

  def with_options(self, *, exact_budget: bool | None = None, **options):
    """Returns the method with some of `known_options` set; None leaves it."""
    given = tuple(dict.fromkeys([*self.given, *options]))
    # Programs are cached by compressor: values have to be hashable.
    options |= {k: tuple(v) for k, v in options.items() if isinstance(v, list)}
    if exact_budget is not None:
      options["exact_budget"] = exact_budget
    return dataclasses.replace(self, **options, given=given)

  def load(self) -> Any:
    """Returns the parameters in `weights`, read once; None without a file."""
    return _loaded(self) if self.weights else None

  def read(self, path: str) -> Any:
    """Returns the parameters in a file: {name: array} of safetensors."""
    tensors = safetensors_io.list_tensors(path)
    return {tensor.name: jnp.asarray(tensor.view()) for tensor in tensors}

  def rows(self, grid: tuple[int, int, int], ratio: float) -> int:
    """Returns K, the static number of rows of a selection at `ratio`."""
    exact = budget(grid, ratio)
    if self.exact_budget:
      return exact
    rows = int(self.reference_rows(grid, ratio))
    if rows < 1:
      raise errors.UserError(
        f"{self.name}: its own rounding of ratio {ratio} keeps nothing of a"
        f" {'x'.join(map(str, grid))} grid; raise the retention ratio"
      )
    return min(rows, math.prod(grid))

  def row_sizes(self, grid: tuple[int, int, int], ratio: float) -> list[int]:
    """Returns the sizes, rising, that selections of a batch are cut to."""
    return [self.rows(grid, ratio)]

  def rows_per_layer(self, num_layers: int, grid, ratio: float) -> list[int]:
    """Returns how many video tokens each layer sees; UserError if it cannot."""
    return [self.rows(grid, ratio)] * num_layers

  def computed_rows(self, num_layers: int, grid, ratio: float) -> list[int]:
    """Returns `rows_per_layer` with what is computed though masked."""
    return self.rows_per_layer(num_layers, grid, ratio)

  def minimum_ratio(self, num_layers: int, num_video: int) -> float | None:
    """Returns the lowest ratio that can be met; None where it is not told."""

  def select(
    self, inputs: CompressorInputs, *, num_keep: int, ratio=None, params=None
  ) -> Selection:
    """Returns the selection of one video, `num_keep` the static K of `rows`.

    With an exact budget every row is valid and K >= N keeps everything;
    otherwise the mask says which are, and the ratio behind K, of which some
    methods make inner budgets (METHOD.md 7), is given. `params` are `load`'s.
    """
    chex.assert_rank(inputs.features, 2)
    num_video = inputs.features.shape[0]
    if num_video != math.prod(inputs.grid):
      raise ValueError(f"{num_video} tokens do not fill the grid {inputs.grid}")
    if num_keep < 1:
      raise errors.UserError(
        f"{self.name}: a budget of {num_keep} tokens keeps nothing; raise the"
        " retention ratio"
      )
    for part in sorted(self.requires):
      if getattr(inputs, part, None) is None:
        raise ValueError(f"{self.name} needs {part}, which was not given")
    if self.stochastic and inputs.rng is None:
      raise ValueError(f"{self.name} is stochastic and needs rng")
    self._check_values(inputs)
    if self.rounds_itself and ratio is None:
      raise ValueError(f"{self.name} without exact budget needs the ratio")
    # The rows of a reference rounding may be a bound that is never reached.
    bound_only = self.rounds_itself and ratio < 1
    if num_keep >= num_video and not bound_only:
      return take(inputs.features, jnp.arange(num_video, dtype=jnp.int32))
    own = (params,) if self.trained else ()
    return selection_ops.with_deep(
      lambda given: self.choose(given, num_keep, ratio, *own), inputs
    )

  def select_batch(self, inputs, *, num_keep, ratio=None, params=None):
    """Returns `select` of B videos: inputs and selection have a leading B."""
    own = dict(num_keep=num_keep, ratio=ratio, params=params)
    return jax.vmap(functools.partial(self.select, **own))(inputs)

  def prefill(
    self, model, params, prompt, inputs, *, ratio, new_rows, own_params=None,
    selection=None,
  ):  # fmt: skip
    """Returns (logits float32[B, V], cache, trace) after reading the prompts.

    The cache is a tuple, one for each slice of layers, where tokens are dropped
    between layers; the trace a `SelectionTrace`. All have a leading axis B.

    Args:
      model: `models.video_llm.VideoLLM`, of parameters `params`.
      prompt: whole `prompt_batch.PrunedPrompts`.
      ratio: static.
      new_rows: static, room in the cache for what follows.
      own_params: of a trained compressor, from `load`.
      selection: where `select` has been called already.
    """
    if selection is None:
      num_keep = self.rows(inputs.grid, ratio)
      selection = self.select_batch(
        inputs, num_keep=num_keep, ratio=ratio, params=own_params
      )
    num_video = selection.assign.shape[1]
    rows = prompt_batch.keep(prompt, selection, num_video=num_video)
    logits, cache, _ = model.prefill(
      params, rows.x, rows.positions, rows.lengths, deep=rows.deep,
      video_rows=rows.video_rows, cache_length=rows.x.shape[1] + new_rows,
    )  # fmt: skip
    tokens = jnp.tile(rows.count[:, None], model.config.text.num_layers)
    return logits, cache, SelectionTrace.of(rows, tokens)

  def _check_values(self, inputs) -> None:
    """Refuses NaN and infinity in what is read, unless it is being traced."""
    parts = {"video features": inputs.features}
    for part in sorted(self.requires):
      parts[part.replace("_", " ")] = getattr(inputs, part)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(parts)):
      return
    for name, part in parts.items():
      jax.tree.map(functools.partial(check_finite, name=name), part)


@functools.lru_cache(maxsize=8)
def _loaded(compressor: Compressor):
  return compressor.read(compressor.weights)


def check_finite(features, name: str = "video features") -> None:
  """Refuses NaN and infinity, on the host: a compiled program cannot raise."""
  # Also of a constant that a program is being traced around.
  with jax.ensure_compile_time_eval():
    finite = bool(jnp.isfinite(features).all())
  told = f"{name} hold NaN or infinity; check the checkpoint and its dtype"
  errors.check(finite, told)
