"""Online combination space sampling: which combinations of tokens to try.

Works on ONE video; callers `jax.vmap` it. All numbers come from a plan that the
host computes. Of a full grid they are constants of the program; in a bucket
they are data, so that videos of different grids and ratios share a program.

Axes: T frames, H W token grid, A = H*W, N = T*A video tokens, G combinations, K
kept tokens, k = K / T tokens per frame, n groups of a frame, E tokens of the
longest group, F frames of a frame-mode combination, R = F*A rows of these, D
width; with `_max` their largest values in a bucket.
Paper: https://arxiv.org/abs/2602.01649 (online combination space sampling).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import config_limits, errors
from cacovid_jax.models import token_grid
from cacovid_jax.policy import diversity, network


class Modes(NamedTuple):
  """How many of an iteration's draws are of each mode, in this order."""

  token: int  # Learn from the tokens they keep; the first is greedy.
  frame: int = 0  # Learn from the frames that they draw, likewise.
  control: int = 0  # Enter no loss.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """The paper's sampler and constants; for one's own see `training.seams`."""

  num_combinations: int = 32  # G, a multiple of 4, see `modes`.
  group_size: float = 2  # How many times the tokens to draw a group holds.
  max_group_prob: float = 2.0  # A group's cap is this / n.
  min_group_cap: float = 0.1  # But the cap is not below this.
  max_group_cap: float = 0.9  # Nor above this.
  max_frame_prob: float = 3.0  # A frame's cap is this / T.
  # "per_frame" caps the frames as the groups are, with the floor 1 / T**2.
  # "public" is what the public code comes to, which takes the G/4 copies for
  # the entries: cap max_frame_prob (G/4) / T, floor 1 / (G/4)**2.
  frame_cap: str = "per_frame"
  frame_ratio: float = 0.125  # Of the frames that a combination draws.
  min_token_weight: float = 0.5  # Times the uniform weight within a group.
  max_token_weight: float = 2.0  # And at most so many times.
  mass_epsilon: float = 1e-8  # Added to a group's mass that divides.
  num_neighbours: int = 4  # See `diversity.peak_scores`.
  density_noise: float = 1e-6  # Likewise.

  @property
  def modes(self) -> Modes:
    """3G/4 - 1 combinations of tokens, G/4 of frames, one of content."""
    num_frame = self.num_combinations // 4
    return Modes(self.num_combinations - num_frame - 1, num_frame, 1)

  def sample(self, rng, scores, features, plan):
    return sample(rng, scores, features, plan)


class ProbabilityCap(NamedTuple):
  """The numbers of a capped distribution."""

  size: Any  # How many entries there are, int32[]; those behind have none.
  floor: Any  # Least probability before others are scaled, float32[].
  cap: Any  # Largest probability, float32[].
  left: Any  # float32[n], mass beside as many entries at the cap.

  @classmethod
  def of(cls, size, cap, room=None, floor=None):
    """Returns the numbers of the host, with room for n >= size entries."""
    # A single entry has all the mass, whatever the cap.
    cap = 1.0 if size == 1 else min(cap, 0.999)
    if cap * size < 1 - 1e-9:
      raise ValueError(
        f"{size} probabilities capped at {cap} cannot sum to one"
      )
    left = np.maximum(1.0 - cap * np.arange(room or size), 0.0)
    floor = 1.0 / size**2 if floor is None else floor
    return cls(size, floor, cap, left.astype(np.float32))


class PlanShape(NamedTuple):
  """The static sizes of a sampler, on which random numbers depend."""

  tokens_per_frame: int  # k_max.
  num_groups: int  # n_max.
  group_tokens: int  # E_max.
  frames_drawn: int  # F_max.
  frame_rows: int  # R_max.
  num_keep: int  # K_max.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SamplingPlan:
  """The numbers of a grid and a ratio; those of one shape stack, as pytrees."""

  grid: token_grid.TokenGrid
  tokens_per_frame: Any  # k, round(r*H*W) half to even, int32[].
  frames_drawn: Any  # F, int32[].
  # int32[n_max, E_max], place in a frame's ranking of each group's tokens;
  # short groups repeat their last.
  group_position: Any
  # bool[n_max, E_max], False there and in the rows behind the n groups.
  group_member: Any
  min_weight: Any  # Of a token within its group, float32[].
  max_weight: Any  # Likewise.
  group_cap: ProbabilityCap  # Of the n groups.
  frame_cap: ProbabilityCap  # Of the T frames.
  shape: PlanShape = dataclasses.field(metadata=dict(static=True))
  config: SamplingConfig = dataclasses.field(metadata=dict(static=True))

  @property
  def num_keep(self):
    """K, int32[]: tokens of every combination, exactly."""
    return self.tokens_per_frame * self.grid.num_frames


class Combinations(NamedTuple):
  """The G combinations of one video, in the order of `Modes`."""

  index: jax.Array  # int32[G, K] kept tokens, ascending; N_max behind K.
  frame_mask: jax.Array  # bool[F, T], frame mode, True for a drawn frame.


def smallest_ratio(grid):
  """Returns the least ratio, in four decimals, that keeps a token a frame."""
  _, height, width = grid
  ratio = math.floor(0.5 / (height * width) * 1e4 + 1) / 1e4
  return min(ratio, 1.0)


def plan(grid, ratio, config=None, shape=None):
  """Returns the SamplingPlan of a grid and a retention ratio in (0, 1].

  In a bucket its numbers are NumPy's, for a device. Small grids: the number of
  groups is lowered until a group holds k tokens, and more frames are drawn
  until they hold K.

  Args:
    grid: (T, H, W), which fills its bucket; or TokenGrid, of the host.
    ratio: r; one that keeps nothing of the grid is a UserError.
    config: SamplingConfig; a sampler of one's own gets the paper's numbers.
    shape: PlanShape of a program of several ratios; None for this ratio's.
  """
  config = _numbers(config)
  grid = token_grid.TokenGrid.of(grid)
  num_frames, height, width = map(int, grid.shape)
  exact = _exact_shape((num_frames, height, width), ratio, config)
  if shape is None:
    bucket = grid.bucket
    shape = exact if grid.full else largest_shape(bucket, (ratio,), config)
  for name, needed, room in zip(PlanShape._fields, exact, shape, strict=True):
    if needed > room:
      raise errors.UserError(
        f"sampling.ratio={ratio} of a {num_frames}x{height}x{width} grid needs "
        f"{name}={needed}, the program has room for {room}; name this ratio in "
        "largest_shape"
      )
  n = exact.num_groups
  quotient, longer = divmod(height * width, n)
  lengths = np.full(n, quotient) + (np.arange(n) < longer)
  starts = np.cumsum(lengths) - lengths
  column = np.arange(shape.group_tokens)
  position = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
  unused = ((0, shape.num_groups - n), (0, 0))
  made = SamplingPlan(
    grid=grid,
    tokens_per_frame=exact.tokens_per_frame,
    frames_drawn=exact.frames_drawn,
    group_position=np.pad(position, unused),
    group_member=np.pad(column < lengths[:, None], unused),
    # The bounds use the short groups' size for the longer groups too.
    min_weight=config.min_token_weight / quotient,
    max_weight=config.max_token_weight / quotient,
    group_cap=ProbabilityCap.of(n, _group_cap(n, config), shape.num_groups),
    frame_cap=_frame_cap(num_frames, config, grid.bucket.frames),
    shape=shape,
    config=config,
  )
  if grid.full:
    return made
  # Half as wide as NumPy's own: what a device takes.
  kinds = {"b": np.bool_, "i": np.int32, "f": np.float32}
  return jax.tree.map(
    lambda x: np.asarray(x, kinds[np.asarray(x).dtype.kind]), made
  )


def tokens_per_frame(grid, ratio) -> int:
  """Returns how many tokens of a frame of a (T, H, W) are kept, perhaps 0."""
  return round(ratio * grid[1] * grid[2])


def _exact_shape(grid, ratio, config):
  """Returns the PlanShape that a (T, H, W) needs at a ratio."""
  num_frames, height, width = grid
  if not 0 < ratio <= 1:
    raise errors.UserError(f"sampling.ratio={ratio} is outside (0, 1]")
  _check_config(config)
  area = height * width
  kept = tokens_per_frame(grid, ratio)
  if kept < 1:
    raise errors.UserError(
      f"sampling.ratio={ratio} keeps no token of a {height} x {width} grid; "
      f"the smallest ratio that this grid allows is {smallest_ratio(grid)}"
    )
  num_groups = max(int(1 / ratio / config.group_size), 1)
  num_groups = min(num_groups, area // kept)
  # T * k tokens fill at least ceil(T * k / (H * W)) frames.
  least = -(-num_frames * kept // area)
  frames_drawn = max(math.ceil(config.frame_ratio * num_frames), least)
  return PlanShape(
    tokens_per_frame=kept,
    num_groups=num_groups,
    group_tokens=-(-area // num_groups),
    frames_drawn=frames_drawn,
    frame_rows=frames_drawn * area,
    num_keep=kept * num_frames,
  )


def allowed_ratios(grid, ratios):
  """Returns the ratios of an adaptive ratio's rungs on a (T, H, W), rising.

  A ratio that keeps nothing of the grid is raised to the smallest that keeps
  a token a frame; it is left out when another rung already keeps as few.
  """
  if not ratios:
    raise errors.UserError("sampling.ratios is empty: name at least one ratio")
  kept = {ratio: tokens_per_frame(grid, ratio) for ratio in sorted(ratios)}
  fits = [ratio for ratio in kept if kept[ratio] >= 1]
  raised = smallest_ratio(grid)
  if len(fits) < len(kept) and (
    not fits or tokens_per_frame(grid, raised) < kept[fits[0]]
  ):
    fits.insert(0, raised)
  return tuple(fits)


@functools.lru_cache(maxsize=256)
def largest_shape(bucket, ratios, config=None):
  """Returns the PlanShape that holds every rung of every grid in a bucket."""
  config = _numbers(config)
  largest = PlanShape(0, 0, 0, 0, 0, 0)
  for height in range(1, bucket.frame_tokens + 1):
    for width in range(1, bucket.frame_tokens // height + 1):
      # Shorter videos of the same frames need no more of anything.
      num_frames = min(bucket.frames, bucket.tokens // (height * width))
      grid = num_frames, height, width
      for ratio in allowed_ratios(grid, ratios):
        needed = _exact_shape(grid, ratio, config)
        largest = PlanShape(*map(max, largest, needed))
  return largest


def _group_cap(num_groups, config):
  if num_groups == 1:
    return 1.0
  cap = min(config.max_group_prob / num_groups, config.max_group_cap)
  return max(cap, config.min_group_cap)


def _frame_cap(num_frames, config, room):
  cap, floor = config.max_frame_prob / num_frames, None
  if config.frame_cap == "public":
    copies = config.modes.frame
    cap, floor = cap * copies, 1.0 / copies**2
  return ProbabilityCap.of(num_frames, cap, room, floor)


def _numbers(sampler) -> SamplingConfig:
  """Returns the constants that plans of a sampler are made with."""
  return sampler if isinstance(sampler, SamplingConfig) else SamplingConfig()


@functools.cache
def _check_config(config):
  config_limits.check({"sampling": dataclasses.asdict(config)})
  if config.num_combinations % 4:
    told = f"sampling.num_combinations={config.num_combinations}"
    raise errors.UserError(f"{told} must be a multiple of 4")


def capped_distribution(probs, cap):
  """Returns float32[n], flattened until no entry exceeds the ProbabilityCap.

  Of probs float32[n], not negative, zero behind the first `cap.size`. Entries
  are first raised to the floor. Then, where the cap is exceeded, entries above
  it are fixed at it one by one, the largest first, and the rest is scaled to
  what remains; written as a closed form over the number of fixed entries.
  """
  chex.assert_rank(probs, 1)
  n = probs.shape[0]
  if n == 1:
    return jnp.ones_like(probs)
  size, floor, cap, left = cap
  fixed = np.arange(n)
  valid = fixed < size

  def raise_to_floor(probs):
    return token_grid.fill(jnp.maximum(probs, floor), valid, 0.0)

  floored = raise_to_floor(probs)
  floored = floored / floored.sum()
  # Normalising pushed the floored entries under the floor.
  raised = raise_to_floor(floored)
  order = jnp.argsort(-raised)
  ranked = raised[order]
  rest = jnp.cumsum(ranked[::-1])[::-1]  # rest[j] = sum of ranked[j:]
  scale = jnp.asarray(left, jnp.float32) / rest
  enough = (ranked * scale <= cap) & (fixed >= 1)
  enough = token_grid.fill(enough, valid, False)
  num_fixed = jnp.where(enough.any(), jnp.argmax(enough), size)
  scale = scale[jnp.minimum(num_fixed, size - 1)]
  capped = jnp.where(fixed < num_fixed, cap, ranked * scale)
  capped = jnp.zeros_like(probs).at[order].set(capped)
  return jnp.where(floored.max() <= cap, floored, capped)


def draw_without_replacement(rng, log_weights, *, num_draws):
  """Returns int32[..., num_draws] distinct items, in the order of their draw.

  Gumbel top-k (https://arxiv.org/abs/1903.06059): the distribution is that of
  sequential draws from softmax(log_weights), float[..., n], -inf where an item
  may not be drawn. num_draws is static, at most the number of finite weights.
  """
  # Drawn flat: on CPU, XLA compiles the same bits in three axes in seconds.
  noise = jax.random.gumbel(rng, (log_weights.size,))
  noise = noise.reshape(log_weights.shape)
  _, drawn = jax.lax.top_k(log_weights + noise, num_draws)
  return drawn


def _gap(scores, valid):
  return token_grid.fill(network.keep_gap(scores), valid, -jnp.inf)


class Groups(NamedTuple):
  """A frame's tokens, ranked by the policy and cut into groups."""

  probs: jax.Array  # float32[n], capped; zero for a group only in the bucket.
  tokens: jax.Array  # int32[n, E], best first; short groups repeat their last.
  weights: jax.Array  # float32[n, E], zero for repeats; rows sum to one.


def rank_groups(token_scores, plan):
  """Returns the Groups of one frame, of token_scores float32[A, 2]."""
  chex.assert_shape(token_scores, (plan.grid.bucket.frame_tokens, 2))
  member = plan.group_member
  gap = _gap(token_scores, plan.grid.valid_frame_tokens)
  # Ranked by score, not by probability: a softmax underflows to ties.
  tokens = jnp.argsort(-gap)[plan.group_position]
  mass = jnp.where(member, jax.nn.softmax(gap)[tokens], 0.0)
  total = mass.sum(axis=-1)
  probs = capped_distribution(total, plan.group_cap)
  weights = mass / (total[:, None] + plan.config.mass_epsilon)
  weights = jnp.clip(weights, plan.min_weight, plan.max_weight)
  weights = jnp.where(member, weights, 0.0)
  sums = weights.sum(axis=-1, keepdims=True)
  sums = token_grid.fill(sums, member.any(axis=-1, keepdims=True), 1.0)
  return Groups(probs, tokens.astype(jnp.int32), weights / sums)


def sample(rng, scores, features, plan):
  """Returns the Combinations of one video, from the old policy's scores.

  The random numbers depend on the plan's shape. In a bucket, T and N of scores
  and features float[N, D] are its largest, the video's own first; what stands
  behind them has no influence.
  """
  bucket = plan.grid.bucket
  chex.assert_shape(scores.token, (bucket.tokens, 2))
  chex.assert_shape(scores.frame, (bucket.frames, 2))
  chex.assert_shape(features, (bucket.tokens, None))
  rng_token, rng_frame, rng_content = jax.random.split(rng, 3)
  by_token = _token_mode(rng_token, scores.token, plan)
  by_frame, frame_mask = _frame_mode(rng_frame, scores.frame, features, plan)
  by_content = _content_mode(rng_content, features, plan)
  index = jnp.concatenate([by_token, by_frame, by_content[None]])
  return Combinations(index.astype(jnp.int32), frame_mask)


def sample_rung(rng, scores, features, plans, rung, *, num_keep, sampler=None):
  """Returns (Combinations, int32[] K) of a rung only known on the device.

  Plans are a tuple of a full grid's, up to the program's largest (each draws
  what it draws alone; `jax.vmap` would compute all of them), or one with a
  leading axis of rungs. The index has `num_keep` entries, N_max behind K.
  """
  draw = sample if sampler is None else sampler.sample
  if isinstance(plans, SamplingPlan):
    # With room for every rung: random numbers depend on the sizes drawn.
    plan = jax.tree.map(lambda leaf: leaf[rung], plans)
    drawn = draw(rng, scores, features, plan)
    return drawn._replace(index=drawn.index[:, :num_keep]), plan.num_keep

  def padded(plan, *given):
    drawn = draw(*given, plan)
    behind = ((0, 0), (0, num_keep - plan.num_keep))
    padding = plan.grid.bucket.tokens
    index = jnp.pad(drawn.index, behind, constant_values=padding)
    return drawn._replace(index=index), jnp.int32(plan.num_keep)

  branches = [functools.partial(padded, plan) for plan in plans]
  return jax.lax.switch(rung, branches, rng, scores, features)


def token_masks(index, num_tokens):
  """Returns bool[..., N], True for kept tokens, of index int32[..., K]."""
  index = jnp.asarray(index)
  if index.ndim > 1:
    return jax.vmap(lambda row: token_masks(row, num_tokens))(index)
  mask = jnp.zeros(num_tokens, bool)
  return mask.at[index].set(True, mode="drop")


def _token_mode(rng, token_scores, plan):
  """Returns [3G/4 - 1, K]: the greedy combination, then sampled ones."""
  grid = plan.grid
  num_frames = grid.bucket.frames
  k = plan.shape.tokens_per_frame
  token_scores = grid.by_frame(token_scores)  # [T, H*W, 2]
  groups = jax.vmap(lambda s: rank_groups(s, plan))(token_scores)

  # One key for all draws: a key for each compiles far longer.
  rng_group, rng_tokens = jax.random.split(rng)
  log_probs = jnp.log(groups.probs)  # [T, n]
  shape = (plan.config.modes.token - 1, *log_probs.shape)  # [C, T, n]
  group = draw_without_replacement(
    rng_group, jnp.broadcast_to(log_probs, shape), num_draws=1
  )
  frame = np.arange(num_frames)[:, None]
  log_weights = jnp.log(groups.weights)[frame, group][:, :, 0]  # [C, T, E]
  # Of more draws than a frame has, the first are as if no more were drawn.
  place = draw_without_replacement(rng_tokens, log_weights, num_draws=k)
  drawn = groups.tokens[frame, group, place]  # [C, T, k]
  _, greedy = jax.lax.top_k(_gap(token_scores, grid.valid_frame_tokens), k)
  return _flatten(jnp.concatenate([greedy[None], drawn]), plan)


def _frame_mode(rng, frame_scores, features, plan):
  """Returns [G/4, K] and the drawn frames bool[G/4, T]; row 0 takes the top."""
  grid, shape = plan.grid, plan.shape
  num_frames = grid.bucket.frames
  rng_frames, rng_noise = jax.random.split(rng)
  gap = _gap(frame_scores, grid.valid_frames)
  probs = capped_distribution(jax.nn.softmax(gap), plan.frame_cap)
  count = plan.config.modes.frame
  log_probs = jnp.broadcast_to(jnp.log(probs), (count, num_frames))
  drawn = draw_without_replacement(
    rng_frames, log_probs, num_draws=shape.frames_drawn
  )
  _, top = jax.lax.top_k(gap, shape.frames_drawn)
  frames = drawn.at[0].set(top)
  own = np.arange(shape.frames_drawn) < plan.frames_drawn
  frames = token_grid.fill(frames, own, num_frames)
  frames = jnp.sort(frames, axis=-1)  # [G/4, F]
  row = np.arange(shape.frame_rows)
  valid = row < plan.frames_drawn * grid.frame_tokens
  kept = np.arange(shape.num_keep) < plan.num_keep

  def keep(rng, frames):
    rows = frames[row // grid.frame_tokens] * grid.frame_tokens
    rows = rows + row % grid.frame_tokens  # [F*H*W]
    peaks = _peaks(plan, shape.num_keep, valid, plan.num_keep)
    chosen = rows[peaks(features[rows], rng=rng)]
    return token_grid.fill(chosen, kept, grid.bucket.tokens)

  rngs = jax.random.split(rng_noise, count)
  return jax.vmap(keep)(rngs, frames), token_masks(frames, num_frames)


def _content_mode(rng, features, plan):
  """Returns [K]: k diverse tokens of every frame, without the policy."""
  grid, most = plan.grid, plan.shape.tokens_per_frame
  peaks = _peaks(plan, most, grid.valid_frame_tokens, plan.tokens_per_frame)
  rngs = jax.random.split(rng, grid.bucket.frames)
  index = jax.vmap(lambda z, rng: peaks(z, rng=rng))(
    grid.by_frame(features), rngs
  )
  return _flatten(index, plan)


def _peaks(plan, most, valid, num_valid):
  """Returns `diversity.density_peaks` with a plan's constants."""
  return functools.partial(
    diversity.density_peaks,
    num_keep=most,
    num_neighbours=plan.config.num_neighbours,
    noise=plan.config.density_noise,
    valid=valid,
    num_valid=num_valid,
  )


def _flatten(tokens, plan):
  """Returns [..., K] ascending video tokens of each frame's first k."""
  grid, shape = plan.grid, plan.shape
  own = np.arange(shape.tokens_per_frame) < plan.tokens_per_frame
  tokens = token_grid.fill(tokens, own, grid.bucket.frame_tokens)
  offset = np.arange(grid.bucket.frames)[:, None] * grid.frame_tokens
  tokens = jnp.sort(tokens, axis=-1) + offset
  if grid.full:
    return tokens.reshape(*tokens.shape[:-2], shape.num_keep)
  valid = grid.valid_frames[:, None] & own
  tokens = token_grid.fill(tokens, valid, grid.bucket.tokens)
  tokens = tokens.reshape(*tokens.shape[:-2], -1)
  return jnp.sort(tokens, axis=-1)[..., : shape.num_keep]
