"""What a token compressor is: one video in, exactly K of its tokens out.

A compressor is a frozen dataclass whose own fields are its options. It says
what it reads (`requires`) and chooses among the tokens of ONE video with
static shapes; callers `jax.vmap` it over a batch and `jax.jit` it with the
grid and K fixed. Compressors of equal values share their compiled programs.

Axes: N video tokens, D width, K kept tokens, T frames, H W token grid, B batch.
"""

import dataclasses
import functools
import numbers
import os
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp

from cacovid_jax import errors, files
from cacovid_jax.compressors.math import similarity
from cacovid_jax.models import prompt_batch, safetensors_io
from cacovid_jax.policy import selection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressorInputs:
  """What a compressor may look at; parts that it does not require are None.

  Attributes:
    features: float[N, D] video tokens.
    grid: static (T, H, W) with T * H * W = N.
    text: float[Q, D] embedded question; rows of zeros are padding.
    scores: `policy.network.Scores` of the trained policy.
    untrained_scores: those of a freshly initialised policy.
    other_scores: those of the trained policy and another question.
    attention: float32[layers, N], how much the prompt's last token attends to
      each video token, mean over heads, per decoder layer.
    decisive: bool[N], True at the evidence tokens of the question (oracles).
    vision_attention: float32[N], how much attention a token receives from its
      own frame in the last layer that the vision tower runs, mean over heads
      and queries (a sum over queries for towers that merge patches; only
      ratios matter within a frame).
    vision_keys: float32[N, dk], that layer's keys averaged over heads.
    deep: float[S, N, D] per-layer visual features, of models that have them.
    rng: key of stochastic methods.
  """

  features: jax.Array
  grid: tuple[int, int, int] = dataclasses.field(metadata=dict(static=True))
  text: jax.Array | None = None
  scores: Any = None
  untrained_scores: Any = None
  other_scores: Any = None
  attention: jax.Array | None = None
  decisive: jax.Array | None = None
  vision_attention: jax.Array | None = None
  vision_keys: jax.Array | None = None
  deep: jax.Array | None = None
  rng: jax.Array | None = None


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
  field.name
  for field in dataclasses.fields(CompressorInputs)
  if field.name in _REQUIREMENTS
)
# Parts that are the same for every question about a video.
VISION_SIGNALS = frozenset(["vision_attention", "vision_keys"])


class Selection(NamedTuple):
  """The compressed video.

  Valid entries of `index` are a strictly increasing prefix; padding has index
  N, mask False, zero features and zero mass.

  Attributes:
    features: float[K, D] rows that enter the language model.
    index: int32[K] position of each row in the uncompressed video.
    mask: bool[K], True where a row is valid.
    mass: float32[K], number of tokens that a row stands for.
    assign: int32[N], row that each token went into, -1 = dropped.
  """

  features: jax.Array
  index: jax.Array
  mask: jax.Array
  mass: jax.Array
  assign: jax.Array


class SelectionTrace(NamedTuple):
  """What became of the video tokens inside the language model.

  Attributes:
    index: int32[B, K] tokens left at the last layer, ascending; N at padding.
    mask: bool[B, K] which of them there are.
    tokens: float32[B, layers] video tokens that each layer's attention saw.
    forced: bool[B], True where a rule had to end early to stay within the
      budget; None for rules that never have to.
  """

  index: jax.Array
  mask: jax.Array
  tokens: jax.Array
  forced: jax.Array | None = None

  def equivalent_ratio(self, num_video: int) -> jax.Array:
    """Returns float32[B]: mean over layers of the share of N tokens seen."""
    return self.tokens.mean(axis=1) / num_video


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressor:
  """A token compression rule; what a subclass adds as fields are its options.

  A subclass gives `choose`, and `reference_rows` if its publication rounds
  otherwise than down. One with parameters of its own sets `trained = True`,
  takes `weights` as an option and `params` as the last argument of `choose`.

  Attributes:
    name: what tables call it.
    requires: names of the fields of `CompressorInputs` that it reads.
    stochastic: True if it draws from `rng` (then results are averaged over
      evaluation seeds).
    oracle: True if it knows the answer's place; a bound, not a method.
    exact_budget: True to keep exactly floor(ratio * N) tokens, False to round
      as the method's own publication does.
    note: one sentence for tables, where the method is not quite what its name
      says.
    weights: file of a trained method's parameters.
    weights_sha256: of that file.
    source: sha256 of the user's own file that the method comes from.
    given: names of the options that were set, for the record.
  """

  name: str = ""
  requires: frozenset[str] = frozenset()
  stochastic: bool = False
  oracle: bool = False
  exact_budget: bool = True
  note: str = ""
  weights: str = ""
  weights_sha256: str = dataclasses.field(default="", init=False)
  source: str = ""
  given: tuple[str, ...] = dataclasses.field(default=(), compare=False)

  trained: ClassVar[bool] = False
  # Whether the choice is made before the language model runs, so that it can
  # be a program of its own and methods of equal K share the one that answers.
  selects_first: ClassVar[bool] = True
  # Whether it reads counts on the host between programs.
  on_host: ClassVar[bool] = False

  def __post_init__(self):
    if self.weights:
      object.__setattr__(self, "weights_sha256", self._hash_weights())
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

    Args:
      inputs: of one video.
      num_keep: K, static, below N unless `reference_rows` gives as many.
      ratio: retention ratio behind K, or None where `exact_budget` is set.
    """
    raise NotImplementedError(f"{type(self).__name__} chooses no tokens")

  def reference_rows(self, grid, ratio: float) -> int:
    """Returns the rows of a selection without exact budget.

    That is how many tokens the publication keeps, or a bound where that
    depends on the video.
    """
    return budget(grid, ratio)

  @property
  def rounds_itself(self) -> bool:
    """True if `choose` is to round as the method's own publication does."""
    own = type(self).reference_rows is not Compressor.reference_rows
    return own and not self.exact_budget

  @property
  def sees_question(self) -> bool:
    """True if two questions about one clip may get different tokens."""
    read = self.requires - VISION_SIGNALS
    return bool(read) or self.stochastic or not self.selects_first

  @property
  def requirements(self) -> tuple[str, ...]:
    """What it cannot do without, in words, each once.

    Words are "text" (the question), "training", "LLM attention", "vision
    attention", "vision keys" and "answer"; a part that is not known stands as
    it is.
    """
    parts = self.requires | (set() if self.selects_first else {"attention"})
    words = [
      word
      for part, words in _REQUIREMENTS.items()
      if part in parts
      for word in words
    ]
    return tuple(dict.fromkeys([*words, *sorted(parts - set(_REQUIREMENTS))]))

  @classmethod
  def _general_fields(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(Compressor)}

  @property
  def known_options(self) -> tuple[str, ...]:
    """Names of the options that it takes, sorted."""
    own = {field.name for field in dataclasses.fields(self)}
    own -= self._general_fields()
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
    """Returns the method with options set; `known_options` says which.

    Args:
      exact_budget: as of the class; None leaves it.
      **options: values of the method's own options.
    """
    # Programs are cached by compressor: values have to be hashable.
    changes = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in options.items()
    }
    if exact_budget is not None:
      changes["exact_budget"] = exact_budget
    given = tuple(dict.fromkeys([*self.given, *options]))
    return dataclasses.replace(self, **changes, given=given)

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
    return min(rows, grid[0] * grid[1] * grid[2])

  def rows_per_layer(self, num_layers: int, grid, ratio: float) -> list[int]:
    """Returns how many video tokens each layer of the language model sees.

    Raises:
      UserError: the ratio cannot be met.
    """
    return [self.rows(grid, ratio)] * num_layers

  def computed_rows(self, num_layers: int, grid, ratio: float) -> list[int]:
    """Returns `rows_per_layer` with what is computed though masked."""
    return self.rows_per_layer(num_layers, grid, ratio)

  def minimum_ratio(self, num_layers: int, num_video: int) -> float | None:
    """Returns the lowest ratio that can be met; None where it is not told."""
    del num_layers, num_video
    return None

  def select(
    self, inputs: CompressorInputs, *, num_keep: int, ratio=None, params=None
  ) -> Selection:
    """Returns the selection of `num_keep` rows of one video.

    With an exact budget every row is valid; otherwise the mask says which are.

    Args:
      inputs: with the parts that the method requires.
      num_keep: K of `rows`, static, at least 1; an exact budget of K >= N
        keeps everything.
      ratio: the retention ratio behind `num_keep`, for methods whose inner
        budgets are defined by it (METHOD.md 7); None derives it from K / N,
        which a reference rounding cannot.
      params: of a trained method, from `load`.
    """
    features, grid = inputs.features, inputs.grid
    chex.assert_rank(features, 2)
    num_video = features.shape[0]
    if num_video != grid[0] * grid[1] * grid[2]:
      raise ValueError(f"{num_video} tokens do not fill the grid {grid}")
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
      return take(features, jnp.arange(num_video, dtype=jnp.int32))
    if self.trained:
      return self.choose(inputs, num_keep, ratio, params)
    return self.choose(inputs, num_keep, ratio)

  def select_batch(self, inputs, *, num_keep, ratio=None, params=None):
    """Returns `select` of B videos: inputs and selection have a leading B."""
    return jax.vmap(
      functools.partial(
        self.select, num_keep=num_keep, ratio=ratio, params=params
      )
    )(inputs)

  def prefill(
    self,
    model,
    params,
    prompt: prompt_batch.PrunedPrompts,
    inputs: CompressorInputs,
    *,
    ratio: float,
    new_rows: int,
    own_params=None,
    selection: Selection | None = None,
  ):
    """Returns (logits, cache, trace) after reading the prompts.

    Args:
      model: `models.video_llm.VideoLLM`.
      params: its parameters.
      prompt: whole prompts with all video tokens, leading axis B.
      inputs: leading axis B.
      ratio: static.
      new_rows: static, room in the cache for what follows.
      own_params: of a trained compressor, from `load`.
      selection: leading axis B, where `select` has been called already.

    Returns:
      logits float32[B, V] behind each prompt, the cache (or a tuple, one for
      each slice of layers), and the `SelectionTrace`.
    """
    if selection is None:
      selection = self.select_batch(
        inputs,
        num_keep=self.rows(inputs.grid, ratio),
        ratio=ratio,
        params=own_params,
      )
    num_video = selection.assign.shape[1]
    rows = prompt_batch.keep(prompt, selection, num_video=num_video)
    logits, cache, _ = model.prefill(
      params,
      rows.x,
      rows.positions,
      rows.lengths,
      cache_length=rows.x.shape[1] + new_rows,
      deep=rows.deep,
      video_rows=rows.video_rows,
    )
    layers = (rows.count.shape[0], model.config.text.num_layers)
    tokens = jnp.broadcast_to(rows.count[:, None], layers)
    trace = SelectionTrace(
      selection.index, selection.mask, tokens.astype(jnp.float32)
    )
    return logits, cache, trace

  def _check_values(self, inputs) -> None:
    """Refuses NaN and infinity in what is read, unless it is being traced."""
    parts = {"video features": inputs.features}
    for part in sorted(self.requires):
      parts[part.replace("_", " ")] = getattr(inputs, part)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(parts)):
      return
    for name, part in parts.items():
      for leaf in jax.tree.leaves(part):
        check_finite(leaf, name)

  def _hash_weights(self) -> str:
    if not os.path.isfile(self.weights):
      raise errors.UserError(
        f"{self.name}: weights={self.weights!r}: there is no such file"
      )
    return files.sha256(self.weights)


@functools.lru_cache(maxsize=8)
def _loaded(compressor: Compressor):
  return compressor.read(compressor.weights)


def number(default, low, high=None, *, whole=False, open_low=False):
  """Returns the field of an option that is a number between `low` and `high`.

  Args:
    default: always allowed, None as well.
    low: least value, or with `open_low` the bound that it must exceed.
    high: largest value; None for no bound.
    whole: True if it must be an integer.
    open_low: see `low`.
  """
  kind = numbers.Integral if whole else numbers.Real

  def check(method, name, value):
    right = isinstance(value, kind) and not isinstance(value, bool)
    right = right and (value > low if open_low else value >= low)
    if right and (high is None or value <= high):
      return
    allowed = f"{'above' if open_low else 'at least'} {low}"
    if high is not None:
      allowed += f" and at most {high}"
    noun = "an integer" if whole else "a number"
    raise errors.UserError(
      f"{method}: {name} is {value!r}; give {noun} {allowed}"
    )

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


def take(
  features: jax.Array, index: jax.Array, num_valid: jax.Array | None = None
) -> Selection:
  """Returns the selection that keeps the rows `index` int32[K] unchanged.

  Args:
    features: float[N, D] video tokens.
    index: int32[K] distinct rows in any order.
    num_valid: int32[] how many of them are rows, the first ones, with N behind
      them; None for all.
  """
  rows = jnp.arange(index.shape[0], dtype=jnp.int32)
  assign = jnp.full(features.shape[:1], -1, jnp.int32)
  assign = assign.at[index].set(rows, mode="drop")
  return arrange(features[index], index, assign, num_valid)


def take_top(features: jax.Array, values: jax.Array, num_keep: int):
  """Returns the selection of the `num_keep` largest `values` float[N].

  Among equal values the earlier token wins.
  """
  _, index = jax.lax.top_k(values.astype(jnp.float32), num_keep)
  return take(features, index)


def take_mask(features: jax.Array, mask: jax.Array, num_rows: int) -> Selection:
  """Returns the selection of the tokens where `mask` is True, unchanged.

  Args:
    features: float[N, D] video tokens.
    mask: bool[N] with at most `num_rows` True; of more, the first are taken.
    num_rows: K, static; rows behind the last token are padding.
  """
  chex.assert_shape(mask, features.shape[:1])
  (index,) = jnp.nonzero(mask, size=num_rows, fill_value=features.shape[0])
  return take(features, index, jnp.minimum(mask.sum(), num_rows))


def arrange(
  rows: jax.Array,
  index: jax.Array,
  assign: jax.Array,
  num_valid: jax.Array | None = None,
) -> Selection:
  """Returns a valid `Selection` of rows made in any order.

  Args:
    rows: float[K, D] what each row holds.
    index: int32[K] position of each row in the uncompressed video, distinct
      among the valid ones.
    assign: int32[N] row that each token went into, -1 = dropped. Tokens of
      rows that are not valid count as dropped.
    num_valid: int32[] how many rows there are, the first ones; None for all.
  """
  num_video, num_rows = assign.shape[0], index.shape[0]
  place = jnp.arange(num_rows, dtype=jnp.int32)
  valid = num_rows if num_valid is None else num_valid
  index = jnp.where(place < valid, index.astype(jnp.int32), num_video)
  order = jnp.argsort(index)
  mask = place < valid
  # Row -1 of tokens that were dropped: one place more, at the end.
  place_of = jnp.full([num_rows + 1], -1, jnp.int32)
  place_of = place_of.at[order].set(jnp.where(mask, place, -1))
  assign = place_of[jnp.where(assign < 0, num_rows, assign)]
  return Selection(
    features=jnp.where(mask[:, None], rows[order], 0),
    index=index[order],
    mask=mask,
    mass=segment_count(assign, num_rows),
    assign=assign,
  )


def merge(
  features: jax.Array,
  representative: jax.Array,
  assign: jax.Array,
  num_valid: jax.Array | None = None,
  reduce: str = "mean",
) -> Selection:
  """Returns the selection whose rows stand for groups of tokens.

  Args:
    features: float[N, D] video tokens.
    representative: int32[K] token whose place each group takes, distinct among
      the valid groups, in any order.
    assign: int32[N] group of each token, -1 = dropped.
    num_valid: int32[] how many groups there are, the first ones; None for all.
    reduce: "mean" or "max" over a group's tokens, or "representative" for
      that token unchanged. A group without tokens keeps its representative's
      features and has no mass.
  """
  num_rows = representative.shape[0]
  own = features[jnp.minimum(representative, features.shape[0] - 1)]
  count = segment_count(assign, num_rows)[:, None]
  if reduce == "mean":
    rows = segment_mean(features, assign, num_rows)
  elif reduce == "max":
    group = jnp.where(assign < 0, num_rows, assign)
    rows = jax.ops.segment_max(features, group, num_rows + 1)[:num_rows]
  elif reduce == "representative":
    rows = own
  else:
    raise ValueError(f"reduce {reduce!r} is not mean, max or representative")
  rows = jnp.where(count > 0, rows.astype(features.dtype), own)
  return arrange(rows, representative, assign, num_valid)


def segment_sum(
  features: jax.Array, assign: jax.Array, num_rows: int
) -> jax.Array:
  """Returns float32[K, D], the sum of the tokens of each row.

  Args:
    features: float[N, D].
    assign: int32[N] row of each token; tokens outside [0, K) count nowhere.
    num_rows: K, static.
  """
  member = assign[None] == jnp.arange(num_rows, dtype=assign.dtype)[:, None]
  return similarity.pooled(features, member)


def segment_mean(
  features: jax.Array, assign: jax.Array, num_rows: int
) -> jax.Array:
  """Returns float32[K, D], the mean of the tokens of each row.

  A row without tokens gets zeros; arguments as of `segment_sum`.
  """
  count = segment_count(assign, num_rows)[:, None]
  return segment_sum(features, assign, num_rows) / jnp.maximum(count, 1.0)


def segment_count(assign: jax.Array, num_rows: int) -> jax.Array:
  """Returns float32[K], the number of tokens of each row, of int32[N]."""
  # Row -1 would count from the end: behind the last row it is left out.
  row = jnp.where(assign < 0, num_rows, assign)
  return jnp.zeros([num_rows], jnp.float32).at[row].add(1.0, mode="drop")


def budget(grid: tuple[int, int, int], ratio: float) -> int:
  """Returns K, the number of tokens that `ratio` keeps of `grid`.

  Raises:
    UserError: the ratio lies outside (0, 1] or keeps no token.
  """
  ratio = check_ratio(ratio)
  num_keep = selection.num_keep(grid, ratio)
  if num_keep < 1:
    raise errors.UserError(
      f"ratio {ratio} keeps no token of a {'x'.join(map(str, grid))} grid;"
      f" use at least {1 / (grid[0] * grid[1] * grid[2]):.4f}"
    )
  return num_keep


def check_ratio(ratio: Any) -> float:
  """Returns `ratio` as a float if it is a retention ratio in (0, 1]."""
  try:
    value = float(ratio)
  except (TypeError, ValueError):
    value = float("nan")
  if not 0.0 < value <= 1.0:
    raise errors.UserError(
      f"retention ratio {ratio!r} is outside (0, 1]; 0.1 keeps 10 % of the"
      " video tokens"
    )
  return value


def check_finite(features, name: str = "video features") -> None:
  """Refuses NaN and infinity; every ordering below would be meaningless.

  On the host, because a compiled program cannot raise.
  """
  # Also of a constant that a program is being traced around.
  with jax.ensure_compile_time_eval():
    finite = bool(jnp.isfinite(features).all())
  if not finite:
    raise errors.UserError(
      f"{name} hold NaN or infinity; check the checkpoint and its dtype"
    )
