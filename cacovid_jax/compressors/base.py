"""What a token compressor is: one video in, exactly K of its tokens out.

Axes: N video tokens, D width, K kept tokens, T frames, H W token grid.
A compressor is a pure function on ONE video with static shapes; callers
`jax.vmap` it over a batch and `jax.jit` it with `grid` and `num_keep` fixed.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import similarity
from cacovid_jax.policy import selection


class Aux(NamedTuple):
  """What a method may look at besides the features; absent parts are None.

  The scores are `policy.network.Scores` of the same video: with the trained
  policy, with a freshly initialised one, and with the trained policy but
  another question. `attention` is float32[layers, N]: how much the prompt's
  last token attends to each video token, mean over heads, per decoder layer.
  `decisive` is bool[N], True where a token decides the question (oracles).

  From the last layer that the vision tower runs, pooled to the token grid as
  the features are: `vision_attention` is float32[N], how much attention a
  token receives from its own frame, mean over heads and queries (a sum over
  queries for towers that merge patches; only ratios matter within a frame);
  `vision_keys` is float32[N, dk], the keys averaged over heads.
  """

  scores: Any = None
  untrained_scores: Any = None
  other_scores: Any = None
  attention: jax.Array | None = None
  decisive: jax.Array | None = None
  vision_attention: jax.Array | None = None
  vision_keys: jax.Array | None = None


# What each need says to a reader. The scores of a policy and the attention of
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
# Needs that are the same for every question about a video.
VISION_NEEDS = frozenset(["vision_attention", "vision_keys"])

# Parameters of the interface; whatever else a function takes is an option.
_INTERFACE = frozenset(
  [
    "features",
    "grid",
    "num_keep",
    "text",
    "aux",
    "rng",
    "ratio",
    "rounding",
  ]
)


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


# Compared by identity: options may hold anything, and programs are cached
# by compressor.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Compressor:
  """A named compression rule that acts before the language model.

  Attributes:
    name: what tables call it.
    function: `f(features, *, grid, num_keep, text, aux, rng)` -> `Selection`;
      it may also take `ratio` and `rounding`, see `compress`. Every further
      parameter is an option.
    needs: names of the `Aux` fields it reads; `"text"` for question features.
    stochastic: True if it draws from `rng` (then results are averaged over
      evaluation seeds).
    options: the options that were set, for the record.
    oracle: True if it knows the answer's place; a bound, not a method.
    exact_budget: True to keep exactly floor(ratio * N) tokens, False to round
      as the method's own publication does.
    reference_rows: `f(grid, ratio, **options)` -> int, the rows of a selection
      without exact budget: how many are kept, or a bound where that depends on
      the video. None if the method rounds down, as the exact budget does.
    configure: `f(compressor, **options)` -> the method to use with options
      set, for options that change more than what the function computes: what
      is needed, or whether a part runs inside the language model.
    note: one sentence for tables, where the method is not quite what its name
      says.
  """

  name: str
  function: Callable[..., Selection]
  needs: frozenset[str] = frozenset()
  stochastic: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  oracle: bool = False
  exact_budget: bool = True
  reference_rows: Callable[..., int] | None = None
  configure: Callable[..., Any] | None = None
  note: str = ""

  @property
  def sees_question(self) -> bool:
    """True if two questions about one clip may get different tokens."""
    return bool(self.needs - VISION_NEEDS) or self.stochastic

  @property
  def requirements(self) -> tuple[str, ...]:
    """What it cannot do without, in words, of `requirements_of`."""
    return requirements_of(self.needs)

  @property
  def known_options(self) -> tuple[str, ...]:
    """Names of the options that it takes, sorted."""
    return tuple(
      sorted(set(inspect.signature(self.function).parameters) - _INTERFACE)
    )

  def with_options(self, *, exact_budget: bool | None = None, **options):
    """Returns the method with options set; `known_options` says which.

    Args:
      exact_budget: as of the class; None leaves it.
      **options: values of the method's own options.
    """
    out = self
    if exact_budget is not None:
      out = dataclasses.replace(out, exact_budget=exact_budget)
    if options:
      out = dataclasses.replace(
        out,
        function=functools.partial(out.function, **options),
        options={**out.options, **options},
      )
      if out.configure is not None:
        out = out.configure(out, **out.options)
    return out

  def rows(self, grid: tuple[int, int, int], ratio: float) -> int:
    """Returns K, the static number of rows of a selection at `ratio`."""
    exact = budget(grid, ratio)
    if self.exact_budget or self.reference_rows is None:
      return exact
    options = {
      name: value
      for name, value in self.options.items()
      if _takes(self.reference_rows, name, loosely=True)
    }
    rows = int(self.reference_rows(grid, ratio, **options))
    if rows < 1:
      raise errors.UserError(
        f"{self.name}: its own rounding of ratio {ratio} keeps nothing of a"
        f" {'x'.join(map(str, grid))} grid; raise the retention ratio"
      )
    return min(rows, grid[0] * grid[1] * grid[2])

  def compress(
    self, features, *, grid, num_keep, text=None, aux=None, rng=None, ratio=None
  ) -> Selection:
    """Returns the selection of `num_keep` rows of one video.

    With an exact budget every row is valid. Otherwise the function is told
    `rounding="reference"`, and the mask says which rows are.

    Args:
      features: float[N, D] video tokens.
      grid: static (T, H, W) with T * H * W = N.
      num_keep: K of `rows`, static, at least 1; an exact budget of K >= N
        keeps everything.
      text: float[Lq, D] embedded question, for methods that need it; rows of
        zeros are padding.
      aux: `Aux` with the parts listed in `needs`.
      rng: key, for stochastic methods.
      ratio: the retention ratio behind `num_keep`, for methods whose inner
        budgets are defined by it (METHOD.md 7); None derives it from K / N,
        which a reference rounding cannot.
    """
    chex.assert_rank(features, 2)
    num_video = features.shape[0]
    if num_video != grid[0] * grid[1] * grid[2]:
      raise ValueError(f"{num_video} tokens do not fill the grid {grid}")
    if num_keep < 1:
      raise errors.UserError(
        f"{self.name}: a budget of {num_keep} tokens keeps nothing; raise the"
        " retention ratio"
      )
    for need in sorted(self.needs):
      part = text if need == "text" else getattr(aux, need, None)
      if part is None:
        raise ValueError(f"{self.name} needs {need}, which was not given")
    if self.stochastic and rng is None:
      raise ValueError(f"{self.name} is stochastic and needs rng")
    self._check_values(features, text, aux)
    extra = {}
    if _takes(self.function, "rounding"):
      extra["rounding"] = "exact" if self.exact_budget else "reference"
      if not self.exact_budget and ratio is None:
        raise ValueError(f"{self.name} without exact budget needs the ratio")
    # The rows of a reference rounding may be a bound that is never reached.
    bound_only = extra.get("rounding") == "reference" and ratio < 1
    if num_keep >= num_video and not bound_only:
      return take(features, jnp.arange(num_video, dtype=jnp.int32))
    if _takes(self.function, "ratio"):
      extra["ratio"] = ratio
    return self.function(
      features, grid=grid, num_keep=num_keep, text=text, aux=aux, rng=rng,
      **extra,
    )  # fmt: skip

  def _check_values(self, features, text, aux) -> None:
    """Refuses NaN and infinity in what is read, unless it is being traced."""
    parts = {"video features": features}
    for need in sorted(self.needs):
      part = text if need == "text" else getattr(aux, need)
      parts[need.replace("_", " ")] = part
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(parts)):
      return
    for name, part in parts.items():
      for leaf in jax.tree.leaves(part):
        check_finite(leaf, name)


def requirements_of(needs) -> tuple[str, ...]:
  """Returns what `needs` amount to, in words, each once.

  Words are "text" (the question), "vision attention", "vision keys", "LLM
  attention" and "training"; a need of one's own stands as it is.
  """
  words = {word for need in needs for word in _REQUIREMENTS.get(need, (need,))}
  order = list(
    dict.fromkeys(word for known in _REQUIREMENTS.values() for word in known)
  )
  known = [word for word in order if word in words]
  return (*known, *sorted(words - set(known)))


def _takes(function, parameter, loosely=False) -> bool:
  """True if `function` names `parameter`, or loosely takes any keyword."""
  parameters = inspect.signature(function).parameters
  return parameter in parameters or (
    loosely and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  )


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
  num_video, num_keep = features.shape[0], index.shape[0]
  index = jnp.sort(index.astype(jnp.int32))
  rows = jnp.arange(num_keep, dtype=jnp.int32)
  taken = features[index]
  mask = jnp.ones([num_keep], bool)
  if num_valid is not None:
    mask = rows < num_valid
    taken = jnp.where(mask[:, None], taken, 0)
  assign = jnp.full([num_video], -1, jnp.int32)
  return Selection(
    features=taken,
    index=index,
    mask=mask,
    mass=mask.astype(jnp.float32),
    assign=assign.at[index].set(rows, mode="drop"),
  )


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


def per_frame(
  rule: Callable[..., jax.Array],
  features: jax.Array,
  grid: tuple[int, int, int],
  num_keep: int,
) -> jax.Array:
  """Applies `rule` to each frame on its own; exactly `num_keep` in total.

  Every frame keeps floor(K / T) tokens and the first K mod T frames one more.

  Args:
    rule: `rule(features f[n, D], num_keep=k)` -> int32[k] rows of a frame.
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static, below N.

  Returns:
    int32[K] rows of the video.
  """
  T, H, W = grid
  frames = features.reshape(T, H * W, -1)
  start = jnp.arange(T, dtype=jnp.int32)[:, None] * (H * W)
  share, rest = divmod(num_keep, T)
  parts = []
  if rest:
    local = jax.vmap(lambda z: rule(z, num_keep=share + 1))(frames[:rest])
    parts.append((local + start[:rest]).reshape(-1))
  if share and rest < T:
    local = jax.vmap(lambda z: rule(z, num_keep=share))(frames[rest:])
    parts.append((local + start[rest:]).reshape(-1))
  return jnp.concatenate(parts).astype(jnp.int32)
