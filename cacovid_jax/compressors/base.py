"""What a token compressor is: one video in, exactly K of its tokens out.

Axes: N video tokens, D width, K kept tokens, T frames, H W token grid.
A compressor is a pure function on ONE video with static shapes; callers
`jax.vmap` it over a batch and `jax.jit` it with `grid` and `num_keep` fixed.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.policy import selection


class Aux(NamedTuple):
  """What a method may look at besides the features; absent parts are None.

  The scores are `policy.network.Scores` of the same video: with the trained
  policy, with a freshly initialised one, and with the trained policy but
  another question. `attention` is float32[layers, N]: how much the prompt's
  last token attends to each video token, mean over heads, per decoder layer.
  `decisive` is bool[N], True where a token decides the question (oracles).
  """

  scores: Any = None
  untrained_scores: Any = None
  other_scores: Any = None
  attention: jax.Array | None = None
  decisive: jax.Array | None = None


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
  """A named compression rule.

  Attributes:
    name: what tables call it.
    function: `f(features, *, grid, num_keep, text, aux, rng)` -> `Selection`.
    needs: names of the `Aux` fields it reads; `"text"` for question features.
      Empty means that the question is not looked at.
    stochastic: True if it draws from `rng` (then results are averaged over
      evaluation seeds).
    options: the options that were set, for the record.
    oracle: True if it knows the answer's place; a bound, not a method.
  """

  name: str
  function: Callable[..., Selection]
  needs: frozenset[str] = frozenset()
  stochastic: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  oracle: bool = False

  @property
  def sees_question(self) -> bool:
    """True if two questions about one clip may get different tokens."""
    return bool(self.needs) or self.stochastic

  def compress(
    self, features, *, grid, num_keep, text=None, aux=None, rng=None, ratio=None
  ) -> Selection:
    """Returns the selection of exactly `num_keep` tokens of one video.

    Args:
      features: float[N, D] video tokens.
      grid: static (T, H, W) with T * H * W = N.
      num_keep: K, static, at least 1; at K >= N everything is kept.
      text: float[Lq, D] embedded question, for methods that need it.
      aux: `Aux` with the parts listed in `needs`.
      rng: key, for stochastic methods.
      ratio: the retention ratio behind `num_keep`, for methods whose inner
        budgets are defined by it (METHOD.md 7); None derives it from K / N.
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
    if num_keep >= num_video:
      return take(features, jnp.arange(num_video, dtype=jnp.int32))
    extra = {"ratio": ratio} if _takes(self.function, "ratio") else {}
    return self.function(
      features, grid=grid, num_keep=num_keep, text=text, aux=aux, rng=rng,
      **extra,
    )  # fmt: skip


def _takes(function, parameter) -> bool:
  return parameter in inspect.signature(function).parameters


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
  if not bool(jnp.isfinite(features).all()):
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
