"""Online combination space sampling: which combinations of tokens to try.

Everything here works on ONE video; callers `jax.vmap` it. All sizes come from a
`Plan`, which holds static numbers only and is computed on the host.

Axes: T frames, H W token grid, N = T*H*W video tokens, G combinations, K kept
tokens, k = K / T tokens per frame, n groups of a frame, E tokens of the longest
group, D width.
Paper: https://arxiv.org/abs/2602.01649 (online combination space sampling).
"""

import dataclasses
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.policy import diversity


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """Constants of the sampler, with the paper's values.

  Attributes:
    num_combinations: G, a multiple of 4: 3G/4 - 1 in token mode, G/4 in frame
      mode, 1 by content.
    group_size: how many times the tokens to draw a group holds.
    max_group_prob: a group's probability is capped at max_group_prob / n,
    min_group_cap: but the cap is not below this
    max_group_cap: nor above this.
    max_frame_prob: a frame's probability is capped at max_frame_prob / T.
    frame_ratio: share of the frames that a frame-mode combination draws.
    min_token_weight: a token's weight within its group is at least this many
      times the uniform weight,
    max_token_weight: and at most this many times.
    mass_epsilon: added to a group's mass before its tokens are divided by it.
    num_neighbours: see `diversity.peak_scores`.
    density_noise: see `diversity.peak_scores`.
  """

  num_combinations: int = 32
  group_size: float = 2
  max_group_prob: float = 2.0
  min_group_cap: float = 0.1
  max_group_cap: float = 0.9
  max_frame_prob: float = 3.0
  frame_ratio: float = 0.125
  min_token_weight: float = 0.5
  max_token_weight: float = 2.0
  mass_epsilon: float = 1e-8
  num_neighbours: int = 4
  density_noise: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static numbers of a grid and a ratio; hashable.

  Attributes:
    grid: (T, H, W).
    ratio: retention ratio r.
    tokens_per_frame: k, round(r*H*W), half to even.
    num_groups: n groups that a frame's ranked tokens are cut into.
    group_cap: largest probability of a group.
    frame_cap: largest probability of a frame.
    frames_drawn: frames of a frame-mode combination.
    config: SamplingConfig.
  """

  grid: tuple[int, int, int]
  ratio: float
  tokens_per_frame: int
  num_groups: int
  group_cap: float
  frame_cap: float
  frames_drawn: int
  config: SamplingConfig

  @property
  def num_tokens(self):
    """N."""
    return math.prod(self.grid)

  @property
  def num_keep(self):
    """K: tokens of every combination, exactly."""
    return self.tokens_per_frame * self.grid[0]

  @property
  def num_combinations(self):
    """G."""
    return self.config.num_combinations

  @property
  def num_frame_mode(self):
    """G/4."""
    return self.num_combinations // 4

  @property
  def num_token_mode(self):
    """3G/4 - 1; the first of them is greedy."""
    return self.num_combinations - self.num_frame_mode - 1


class Combinations(NamedTuple):
  """The G combinations of one video: token mode, frame mode, content.

  Attributes:
    index: int32[G, K] kept video tokens, ascending; N where there is none.
    frame_mask: bool[G/4, T], True for a frame that a frame-mode row drew.
  """

  index: jax.Array
  frame_mask: jax.Array


def smallest_ratio(grid):
  """Returns the least ratio, in four decimals, that keeps a token a frame."""
  _, height, width = grid
  ratio = math.floor(0.5 / (height * width) * 1e4 + 1) / 1e4
  return min(ratio, 1.0)


def plan(grid, ratio, config=None):
  """Returns the Plan of a grid (T, H, W) and a ratio in (0, 1].

  Small grids: the number of groups is lowered until a group holds k tokens, and
  more frames are drawn until they hold K.

  Raises:
    UserError: the ratio keeps nothing of the grid, or a constant cannot work.
  """
  config = config or SamplingConfig()
  num_frames, height, width = grid = tuple(int(size) for size in grid)
  if min(grid) < 1:
    raise errors.UserError(f"grid {grid}: every side must be at least 1")
  if not 0 < ratio <= 1:
    raise errors.UserError(f"sampling.ratio={ratio} is outside (0, 1]")
  _check_config(config)
  area = height * width
  tokens_per_frame = round(ratio * height * width)
  if tokens_per_frame < 1:
    raise errors.UserError(
      f"sampling.ratio={ratio} keeps no token of a {height} x {width} grid; "
      f"the smallest ratio that this grid allows is {smallest_ratio(grid)}"
    )
  num_groups = max(int(1 / ratio / config.group_size), 1)
  num_groups = min(num_groups, area // tokens_per_frame)
  return Plan(
    grid=grid,
    ratio=float(ratio),
    tokens_per_frame=tokens_per_frame,
    num_groups=num_groups,
    group_cap=_group_cap(num_groups, config),
    frame_cap=config.max_frame_prob / num_frames,
    # T * k tokens fill at least ceil(T * k / (H * W)) frames.
    frames_drawn=max(
      math.ceil(config.frame_ratio * num_frames),
      -(-num_frames * tokens_per_frame // area),
    ),
    config=config,
  )


def ladder(grid, ratios, config=None):
  """Returns the Plans of an adaptive ratio's rungs, ascending by ratio.

  A ratio that keeps nothing of the grid is raised to the smallest that keeps
  a token a frame; it is left out when another rung already keeps as few.
  """
  if not ratios:
    raise errors.UserError("sampling.ratios is empty: name at least one ratio")
  config = config or SamplingConfig()
  bound = smallest_ratio(grid)
  _, height, width = grid
  fits = [r for r in sorted(set(ratios)) if round(r * height * width) >= 1]
  plans = [plan(grid, ratio, config) for ratio in fits]
  if len(fits) < len(set(ratios)):
    raised = plan(grid, bound, config)
    if not plans or raised.num_keep < plans[0].num_keep:
      plans.insert(0, raised)
  return tuple(plans)


def _group_cap(num_groups, config):
  if num_groups == 1:
    return 1.0
  cap = min(config.max_group_prob / num_groups, config.max_group_cap)
  return max(cap, config.min_group_cap)


def _check_config(config):
  if config.num_combinations < 4 or config.num_combinations % 4:
    raise errors.UserError(
      f"sampling.num_combinations={config.num_combinations} must be a positive "
      "multiple of 4"
    )
  # Capped probabilities could not sum to one.
  for name in ("max_group_prob", "max_frame_prob", "group_size"):
    if getattr(config, name) < 1:
      raise errors.UserError(
        f"sampling.{name}={getattr(config, name)} must be at least 1"
      )
  if not 0 < config.frame_ratio <= 1:
    raise errors.UserError(
      f"sampling.frame_ratio={config.frame_ratio} is outside (0, 1]"
    )


def capped_distribution(probs, *, cap, limit=0.999):
  """Flattens a distribution from below (1/n^2) and above (cap).

  Entries above the cap are fixed at it one by one, the largest first, and the
  rest is scaled to what remains; written as a closed form over the number of
  fixed entries.

  Args:
    probs: float32[n], not negative.
    cap: static, at least 1/n.
    limit: static; the cap is lowered to this.

  Returns:
    float32[n], sums to one.
  """
  chex.assert_rank(probs, 1)
  n = probs.shape[0]
  if n == 1:
    return jnp.ones_like(probs)
  cap = min(cap, limit)
  if cap * n < 1 - 1e-9:
    raise ValueError(f"{n} probabilities capped at {cap} cannot sum to one")
  floor = 1.0 / n**2
  floored = jnp.maximum(probs, floor)
  floored = floored / floored.sum()
  # Normalising pushed the floored entries under the floor.
  raised = jnp.maximum(floored, floor)
  order = jnp.argsort(-raised)
  ranked = raised[order]
  fixed = np.arange(n)
  left = np.maximum(1.0 - cap * fixed, 0.0)  # mass beside `fixed` entries
  rest = jnp.cumsum(ranked[::-1])[::-1]  # rest[j] = sum of ranked[j:]
  scale = jnp.asarray(left, jnp.float32) / rest
  enough = (ranked * scale <= cap) & (fixed >= 1)
  num_fixed = jnp.where(enough.any(), jnp.argmax(enough), n)
  scale = scale[jnp.minimum(num_fixed, n - 1)]
  capped = jnp.where(fixed < num_fixed, cap, ranked * scale)
  capped = jnp.zeros_like(probs).at[order].set(capped)
  return jnp.where(floored.max() <= cap, floored, capped)


def draw_without_replacement(rng, log_weights, *, num_draws):
  """Draws distinct items by Gumbel top-k (https://arxiv.org/abs/1903.06059).

  The distribution is that of sequential draws from softmax(log_weights).

  Args:
    rng: key for this draw, or for these draws.
    log_weights: float[..., n], -inf where an item may not be drawn.
    num_draws: static; at most the number of finite weights.

  Returns:
    int32[..., num_draws] item indices, in the order in which they were drawn.
  """
  # Drawn flat: on CPU, XLA compiles the same bits in three axes in seconds.
  noise = jax.random.gumbel(rng, (log_weights.size,))
  noise = noise.reshape(log_weights.shape)
  _, drawn = jax.lax.top_k(log_weights + noise, num_draws)
  return drawn


class Groups(NamedTuple):
  """A frame's tokens, ranked by the policy and cut into groups.

  Attributes:
    probs: float32[n] probability of each group, capped.
    tokens: int32[n, E] tokens of each group, best first; short groups repeat
      their last token,
    weights: float32[n, E] with weight zero. Rows sum to one.
  """

  probs: jax.Array
  tokens: jax.Array
  weights: jax.Array


def rank_groups(token_scores, *, plan):
  """Returns the Groups of one frame, of token_scores float32[H*W, 2]."""
  config = plan.config
  gap = _gap(token_scores)
  size = gap.shape[0]
  n = plan.num_groups
  quotient, longer = divmod(size, n)
  sizes = np.full(n, quotient) + (np.arange(n) < longer)
  starts = np.cumsum(sizes) - sizes
  column = np.arange(sizes.max())
  position = starts[:, None] + np.minimum(column, sizes[:, None] - 1)  # [n, E]
  valid = column < sizes[:, None]

  # Ranked by score, not by probability: a softmax underflows to ties.
  tokens = jnp.argsort(-gap)[position]
  mass = jnp.where(valid, jax.nn.softmax(gap)[tokens], 0.0)
  total = mass.sum(axis=-1)
  probs = capped_distribution(total, cap=plan.group_cap)
  weights = mass / (total[:, None] + config.mass_epsilon)
  # The bounds use the short groups' size for the longer groups too.
  weights = jnp.clip(
    weights,
    config.min_token_weight / quotient,
    config.max_token_weight / quotient,
  )
  weights = jnp.where(valid, weights, 0.0)
  weights = weights / weights.sum(axis=-1, keepdims=True)
  return Groups(probs, tokens.astype(jnp.int32), weights)


def sample(rng, scores, features, *, plan):
  """Samples the combinations of one video.

  Args:
    rng: key for this video and iteration.
    scores: Scores(frame f32[T, 2], token f32[N, 2]) of the old policy.
    features: float[N, D] video features, as they enter the LLM.
    plan: Plan, static.

  Returns:
    Combinations.
  """
  chex.assert_shape(scores.token, (plan.num_tokens, 2))
  chex.assert_shape(scores.frame, (plan.grid[0], 2))
  chex.assert_shape(features, (plan.num_tokens, None))
  rng_token, rng_frame, rng_content = jax.random.split(rng, 3)
  by_token = _token_mode(rng_token, scores.token, plan)
  by_frame, frame_mask = _frame_mode(rng_frame, scores.frame, features, plan)
  by_content = _content_mode(rng_content, features, plan)
  index = jnp.concatenate([by_token, by_frame, by_content[None]])
  return Combinations(index.astype(jnp.int32), frame_mask)


def sample_rung(rng, scores, features, *, plans, rung):
  """Samples with the plan of a rung that is only known on the device.

  Under `jax.vmap` over videos of different rungs every branch is computed.

  Args:
    rng: as for `sample`, also the next two.
    scores: see above.
    features: see above.
    plans: static tuple of Plans of one grid, up to the program's largest.
    rung: int32[], which of the plans to use.

  Returns:
    Combinations with K that of the largest plan, index N behind the tokens of
    a smaller one; and int32[] the number of valid entries in each row.
  """
  largest = max(p.num_keep for p in plans)

  def branch(p):
    def run(rng, scores, features):
      drawn = sample(rng, scores, features, plan=p)
      behind = ((0, 0), (0, largest - p.num_keep))
      index = jnp.pad(drawn.index, behind, constant_values=p.num_tokens)
      return drawn._replace(index=index), jnp.int32(p.num_keep)

    return run

  branches = [branch(p) for p in plans]
  return jax.lax.switch(rung, branches, rng, scores, features)


def token_masks(index, num_tokens):
  """Returns bool[..., N], True for kept tokens, of index int32[..., K]."""
  index = jnp.asarray(index)
  if index.ndim > 1:
    return jax.vmap(lambda row: token_masks(row, num_tokens))(index)
  mask = jnp.zeros(num_tokens, bool)
  return mask.at[index].set(True, mode="drop")


def _gap(scores):
  """Returns float32[...], keep - drop, of scores float[..., 2]."""
  scores = scores.astype(jnp.float32)
  return scores[..., 1] - scores[..., 0]


def _token_mode(rng, token_scores, plan):
  """Returns [3G/4 - 1, K]: the greedy combination, then sampled ones."""
  num_frames, height, width = plan.grid
  k = plan.tokens_per_frame
  token_scores = token_scores.reshape(num_frames, height * width, 2)
  groups = jax.vmap(lambda s: rank_groups(s, plan=plan))(token_scores)

  # One key for all draws: a key for each compiles far longer.
  rng_group, rng_tokens = jax.random.split(rng)
  log_probs = jnp.log(groups.probs)  # [T, n]
  shape = (plan.num_token_mode - 1, *log_probs.shape)  # [C, T, n]
  group = draw_without_replacement(
    rng_group, jnp.broadcast_to(log_probs, shape), num_draws=1
  )
  frame = np.arange(num_frames)[:, None]
  log_weights = jnp.log(groups.weights)[frame, group][:, :, 0]  # [C, T, E]
  place = draw_without_replacement(rng_tokens, log_weights, num_draws=k)
  drawn = groups.tokens[frame, group, place]  # [C, T, k]
  _, greedy = jax.lax.top_k(_gap(token_scores), k)
  return _flatten(jnp.concatenate([greedy[None], drawn]), plan)


def _frame_mode(rng, frame_scores, features, plan):
  """Returns [G/4, K] and the drawn frames bool[G/4, T]; row 0 takes the top."""
  num_frames, height, width = plan.grid
  area = height * width
  rng_frames, rng_noise = jax.random.split(rng)
  gap = _gap(frame_scores)
  probs = capped_distribution(jax.nn.softmax(gap), cap=plan.frame_cap)
  shape = (plan.num_frame_mode, num_frames)
  drawn = draw_without_replacement(
    rng_frames,
    jnp.broadcast_to(jnp.log(probs), shape),
    num_draws=plan.frames_drawn,
  )
  _, top = jax.lax.top_k(gap, plan.frames_drawn)
  frames = jnp.sort(drawn.at[0].set(top), axis=-1)  # [G/4, F]

  def keep(rng, frames):
    rows = (frames[:, None] * area + np.arange(area)).reshape(-1)  # [F*H*W]
    peaks = _peaks(rng, features[rows], plan.num_keep, plan.config)
    return rows[peaks]

  rngs = jax.random.split(rng_noise, plan.num_frame_mode)
  return jax.vmap(keep)(rngs, frames), token_masks(frames, num_frames)


def _content_mode(rng, features, plan):
  """Returns [K]: k diverse tokens of every frame, without the policy."""
  num_frames, height, width = plan.grid
  frames = features.reshape(num_frames, height * width, -1)
  peaks = jax.vmap(
    lambda r, z: _peaks(r, z, plan.tokens_per_frame, plan.config)
  )(jax.random.split(rng, num_frames), frames)
  return _flatten(peaks, plan)


def _peaks(rng, features, num_keep, config):
  return diversity.density_peaks(
    features,
    num_keep,
    rng,
    num_neighbours=config.num_neighbours,
    noise=config.density_noise,
  )


def _flatten(tokens, plan):
  """Returns [..., K] ascending video tokens of per-frame ones [..., T, k]."""
  num_frames, height, width = plan.grid
  offset = np.arange(num_frames)[:, None] * height * width
  tokens = jnp.sort(tokens, axis=-1) + offset
  return tokens.reshape(*tokens.shape[:-2], plan.num_keep)
