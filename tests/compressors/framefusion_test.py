"""FrameFusion against its definition, token by token, and at the edges."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import framefusion
from tests.compressors import decoder_loop, layerwise_test, quick

GRID, NUM_VIDEO = layerwise_test.GRID, layerwise_test.NUM_VIDEO
LAYERS, NEW = layerwise_test.LAYERS, layerwise_test.NEW
T, PATCHES = 4, 6


@functools.cache
def rule_of(**options):
  return compressors.get("framefusion", **options)


def cosine(a, b):
  scale = max(np.linalg.norm(a), 1e-6) * max(np.linalg.norm(b), 1e-6)
  return float(a @ b) / scale


class Fusion:
  """The rule on a list of tokens {token of the whole video: vector}."""

  def __init__(self, rule, ratio):
    self.rule, self.total = rule, int(ratio * LAYERS * NUM_VIDEO + 1e-9)
    self.counts, self.merged, self.done, self.forced = [], False, False, False

  def stage(self, tokens, paid, last_merge=LAYERS - 1):
    """Returns the tokens that are left at stage len(self.counts)."""
    if self.done:
      return tokens
    stage = len(self.counts)
    left = self.total - sum(self.counts)
    keep = left // (LAYERS - stage)
    if self.merged:
      self.done = True
      best = sorted(tokens, key=lambda i: (-paid[i], i))[:keep]
      return {i: tokens[i] for i in sorted(best)}
    # Patch-major order, and how alike each token is to the one before.
    order = sorted(tokens, key=lambda i: (i % PATCHES, i // PATCHES))
    alike = {}
    for before, i in zip(order, order[1:], strict=False):
      close = cosine(tokens[before], tokens[i])
      close = round(close * 2**20) / 2**20  # Equal tokens are equally alike.
      alike[i] = close - (0 if before % PATCHES == i % PATCHES else 4)
    flagged = {i for i in alike if alike[i] >= self.rule.threshold}
    remove = max(len(tokens) - keep, 0)
    if len(flagged) < remove:
      ends = len(flagged) < self.rule.min_merge * len(tokens)
      ends |= stage >= last_merge
      reachable = self.total >= LAYERS * PATCHES
      least = PATCHES if reachable and not ends else 1
      rest = left - (len(tokens) - len(flagged))
      if rest < (LAYERS - 1 - stage) * least:
        self.forced = True
      else:
        self.merged = ends
    if len(flagged) >= remove or self.forced:
      place = {i: n for n, i in enumerate(order)}
      best = sorted(alike, key=lambda i: (-alike[i], place[i]))
      flagged = set(best[:remove])
      self.merged = self.done = True
    # One after the other, each into the token that stands before it.
    groups = []
    for i in order:
      if i in flagged:
        groups[-1].append(i)
      else:
        groups.append([i])
    means = {
      group[0]: np.mean([tokens[j] for j in group], axis=0) for group in groups
    }
    return {i: means[i] for i in sorted(means)}


def by_hand(kind, inputs, row, rule, ratio, last_merge=LAYERS - 1):
  """Returns (ids, logits, tokens left, tokens per layer, forced)."""
  x, positions, lengths, starts, following = inputs
  decoder = decoder_loop.Decoder(
    layerwise_test.model_of(kind), layerwise_test.params_of(kind)
  )
  length, start = lengths[row], starts[row]
  prefix = list(range(start))
  suffix = list(range(start + NUM_VIDEO, length))
  place = positions[row]
  fusion = Fusion(rule, ratio)
  rows = [*prefix, *range(start, start + NUM_VIDEO), *suffix]
  x = np.asarray(x[row, :length], np.float64)

  def fuse(x, rows, probs):
    video = [r for r in rows if start <= r < start + NUM_VIDEO]
    at = {r: n for n, r in enumerate(rows)}
    tokens = {r - start: x[at[r]] for r in video}
    paid = {}
    if probs is not None:
      mean = probs[:, -1].mean(axis=0)
      paid = {r - start: mean[at[r]] for r in video}
    tokens = fusion.stage(tokens, paid, last_merge)
    new_rows = [*prefix, *(start + i for i in tokens), *suffix]
    new_x = [
      tokens[r - start] if r - start in tokens and r in video else x[at[r]]
      for r in new_rows
    ]
    return np.stack(new_x), new_rows

  x, rows = fuse(x, rows, None)
  caches = []
  for number in range(LAYERS):
    fusion.counts.append(len(rows) - len(prefix) - len(suffix))
    x, probs, k, v = decoder.attend(number, x, place[:, rows])
    caches.append((k, v))
    if number + 1 < LAYERS:
      x, rows = fuse(x, rows, probs)
    x = decoder.feed_forward(number, x)
  ids, logits = decoder.decode(
    decoder.logits(x[-1]), caches, following[row], NEW, len(place)
  )
  left = [r - start for r in rows if start <= r < start + NUM_VIDEO]
  return ids, logits, left, fusion.counts, fusion.forced


def video_of(seed, noise):
  """Two videos float[2, N, 32], frame by frame a base and `noise` of it.

  A number for each place of the frame, or one for all.
  """
  gen = np.random.default_rng(seed)
  still = gen.standard_normal((2, 1, PATCHES, 32))
  moving = gen.standard_normal((2, T, PATCHES, 32))
  noise = np.broadcast_to(noise, PATCHES)[:, None]
  return (still + noise * moving).reshape(2, NUM_VIDEO, 32)


def compare(kind, inputs, rule, ratio, **kwargs):
  """Asserts that program and definition agree; returns the trace."""
  expected = [
    by_hand(kind, inputs, row, rule, ratio, **kwargs) for row in (0, 1)
  ]
  ids = np.array([e[0] for e in expected])
  if rule.on_host:
    found, trace = layerwise_test.run(kind, rule, inputs, ratio)
    np.testing.assert_array_equal(found, ids)
  else:
    logits, trace = layerwise_test.logits_of(kind, rule, inputs, ratio, ids)
    np.testing.assert_allclose(
      logits, np.stack([e[1] for e in expected]), rtol=2e-3, atol=2e-3
    )
  for row, (_, _, left, counts, forced) in enumerate(expected):
    np.testing.assert_array_equal(trace.tokens[row], counts)
    mask = np.asarray(trace.mask[row])
    np.testing.assert_array_equal(np.asarray(trace.index[row])[mask], left)
    assert (np.asarray(trace.index[row])[~mask] == NUM_VIDEO).all()
    assert bool(trace.forced[row]) == forced
  share = np.asarray(trace.tokens).mean(axis=1) / NUM_VIDEO
  assert (share <= ratio + 1e-6).all()
  assert (share > ratio - 1 / NUM_VIDEO).all()
  return trace


# Some places of the frame stand still, others move.
MIXED = [0.1, 0.5, 0.7, 0.9, 2.0, 3.0]


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_merging_then_pruning_equals_the_definition(kind):
  inputs = layerwise_test.prompts(kind, seed=1, video=video_of(1, MIXED))
  trace = compare(kind, inputs, rule_of(min_merge=0.2), 0.5)
  tokens = np.asarray(trace.tokens)
  # Merged at stage 0, then pruned to what the budget leaves.
  assert (tokens[:, 0] < NUM_VIDEO).all()
  assert (tokens[:, 2] < tokens[:, 0]).all()


def test_more_videos_equal_the_definition():
  seen = set()
  for seed in range(2, 8):
    noise = np.random.default_rng(seed).uniform(0.2, 2.5, PATCHES)
    inputs = layerwise_test.prompts("llava", seed, video_of(seed, noise))
    trace = compare("llava", inputs, rule_of(min_merge=0.2), 0.5)
    seen |= {tuple(np.diff(row) < 0) for row in np.asarray(trace.tokens)}
  assert len(seen) > 1  # They do not all end at the same stage.


def test_identical_frames_merge_to_the_budget_before_layer_0():
  video = np.tile(video_of(3, 0.0)[:, :PATCHES], (1, T, 1))
  inputs = layerwise_test.prompts("llava", 3, video)
  trace = compare("llava", inputs, rule_of(min_merge=0.2), 0.5)
  np.testing.assert_array_equal(trace.tokens, np.full((2, LAYERS), 12))
  # Merged into the first frame; what was not had to stay.
  assert set(range(PATCHES)) <= set(np.asarray(trace.index[0]).tolist())
  bucketed = rule_of(min_merge=0.2, mode="bucketed", max_merges=2)
  compare("llava", inputs, bucketed, 0.5, last_merge=1)


def test_orthogonal_frames_are_pruned_by_importance_after_layer_0():
  # Tokens of one place are along different axes in every frame.
  video = np.zeros((2, T, PATCHES, 32))
  for frame in range(T):
    for patch in range(PATCHES):
      video[:, frame, patch, frame * PATCHES + patch] = 3.0
  inputs = layerwise_test.prompts("llava", 4, video.reshape(2, NUM_VIDEO, 32))
  trace = compare("llava", inputs, rule_of(min_merge=0.2), 0.5)
  # (0.5 * 5 - 1) / 4 of 24.
  np.testing.assert_array_equal(trace.tokens, [[24, 9, 9, 9, 9]] * 2)
  assert not np.asarray(trace.forced).any()


def test_merging_that_would_spend_everything_is_ended_early():
  # A few merge at every stage, more than min_merge: unbounded, the budget
  # would be gone before pruning could begin.
  inputs = layerwise_test.prompts("llava", 5, video_of(5, MIXED))
  rule = rule_of(min_merge=0.0)
  trace = compare("llava", inputs, rule, 0.3)
  assert np.asarray(trace.forced).all()


def test_a_ratio_below_one_token_per_place_still_meets_the_budget():
  inputs = layerwise_test.prompts("llava", 6, video_of(6, 2.0))
  trace = compare("llava", inputs, rule_of(min_merge=0.2), 0.2)
  assert np.asarray(trace.mask).sum(axis=1).max() <= 4


def test_everything_kept_is_the_uncompressed_answer():
  inputs = layerwise_test.prompts("qwen", 7, video_of(7, MIXED))
  ids = np.zeros((2, NEW), np.int32)
  whole, _ = layerwise_test.logits_of("qwen", None, inputs, 1.0, ids)
  found, trace = layerwise_test.logits_of("qwen", rule_of(), inputs, 1.0, ids)
  np.testing.assert_allclose(found, whole, atol=1e-3)
  np.testing.assert_array_equal(trace.tokens, np.full((2, LAYERS), NUM_VIDEO))
  np.testing.assert_array_equal(trace.index[0], np.arange(NUM_VIDEO))


def test_bucketed_mode_equals_the_definition():
  inputs = layerwise_test.prompts("llava", 1, video_of(1, MIXED))
  rule = rule_of(min_merge=0.2, mode="bucketed", max_merges=2)
  compare("llava", inputs, rule, 0.5, last_merge=1)


def test_bucketed_mode_ends_merging_after_so_many_stages():
  inputs = layerwise_test.prompts("llava", 1, video_of(1, MIXED))
  rule = rule_of(min_merge=0.0, mode="bucketed", max_merges=1)
  trace = compare("llava", inputs, rule, 0.5, last_merge=0)
  tokens = np.asarray(trace.tokens)
  assert (tokens[:, 1:] == tokens[:, 1:2]).all()


def test_bucketed_mode_runs_outside_of_jit_only():
  inputs = map(jnp.asarray, layerwise_test.prompts("llava"))
  with pytest.raises(ValueError, match="outside jit"):
    layerwise_test.generate.trace(
      layerwise_test.params_of("llava"), *inputs,
      model=layerwise_test.model_of("llava"),
      compressor=rule_of(mode="bucketed"),
      grid=GRID, ratio=0.5, max_new_tokens=NEW, eos_ids=(), pad_id=63,
    )  # fmt: skip


def test_buckets_hold_their_counts_and_are_few():
  sizes = {framefusion.bucket(count, 6272) for count in range(1, 6273)}
  assert len(sizes) == 20 and max(sizes) == 6272
  for count in (1, 313, 314, 315, 6271, 6272):
    assert framefusion.bucket(count, 6272) >= count
  assert {framefusion.bucket(n, 3) for n in (1, 2, 3)} == {1, 2, 3}


@pytest.mark.parametrize("kind", ["one frame", "one token", "zeros"])
def test_degenerate_videos_stay_within_the_budget(kind):
  grid = {"one frame": (1, 2, 3), "one token": (1, 1, 1), "zeros": GRID}[kind]
  size = int(np.prod(grid))
  stages = framefusion._Stages(
    rule_of(), grid, LAYERS, int(0.5 * LAYERS * size), LAYERS - 1
  )
  if kind == "one token":  # 2 of 5 token-layers: less than a token.
    with pytest.raises(errors.UserError, match="framefusion: .* no token"):
      rule_of().plan(LAYERS, size, 0.5)
    return
  x = jnp.zeros((1, size + 4, 8))
  if kind == "one frame":
    x = jax.random.normal(jax.random.key(0), x.shape)
  rows = layerwise_test.whole(
    x, jnp.zeros((1, 1, size + 4), jnp.int32), [size + 4], [2], size
  )
  step = quick.jit(functools.partial(framefusion._stage, stages))
  rows, state = step(rows, framefusion._start(rows), None, 0)
  total, paid = 0, jnp.ones((1, size + 4)) / size
  for number in range(LAYERS):
    total += int(rows.count[0])
    state = state._replace(spent=jnp.array([total], jnp.int32))
    if number + 1 < LAYERS:
      rows, state = step(rows, state, paid, number + 1)
    assert np.isfinite(rows.x).all()
  assert bool(state.done[0])
  assert 0.5 - 1 / size < total / (LAYERS * size) <= 0.5
  index = np.asarray(rows.index[0, : int(rows.count[0])])
  assert (np.diff(index) > 0).all() and len(index) >= 1


def test_reference_rounding_rounds_the_share_that_is_left():
  # 0.5 of 5 layers of 24 is 60; behind one whole layer 36 / 4 = 9. With
  # 0.52: 62.4 -> 62 token-layers, 38 / 4 = 9.5 tokens, half to even.
  gen = np.random.default_rng(0)
  x = gen.standard_normal((1, NUM_VIDEO + 2, 64)).astype(np.float32)
  counts = {}
  for exact in (True, False):
    rule = compressors.get("framefusion", exact_budget=exact)
    stages = framefusion._Stages(rule, GRID, LAYERS, 62, LAYERS - 1)
    rows = layerwise_test.whole(
      jnp.asarray(x), jnp.zeros((1, 1, NUM_VIDEO + 2), jnp.int32),
      [NUM_VIDEO + 2], [1], NUM_VIDEO,
    )  # fmt: skip
    state = framefusion._start(rows)._replace(
      merged=jnp.array([True]), spent=jnp.array([24], jnp.int32)
    )
    paid = jnp.asarray(gen.random((1, NUM_VIDEO + 2)), jnp.float32)
    rows, _ = quick.jit(functools.partial(framefusion._stage, stages))(
      rows, state, paid, 1
    )
    counts[exact] = int(rows.count[0])
  assert counts == {True: 9, False: 10}


def test_bfloat16_is_finite_and_keeps_the_budget():
  model = dataclasses.replace(
    layerwise_test.model_of("llava"), dtype=jnp.bfloat16
  )
  inputs = layerwise_test.prompts("llava", 1, video_of(1, MIXED))
  logits, trace = layerwise_test.all_logits(
    layerwise_test.params_of("llava"), *inputs, np.zeros((2, NEW), np.int32),
    model=model, compressor=rule_of(), ratio=0.5,
  )  # fmt: skip
  assert np.isfinite(logits).all()
  ratio = np.asarray(trace.equivalent_ratio(NUM_VIDEO))
  assert (ratio <= 0.5).all() and (ratio > 0.5 - 1 / NUM_VIDEO).all()


def test_programs_lower_for_a_tpu():
  traced = layerwise_test.generate.trace(
    layerwise_test.params_of("qwen"),
    *map(jnp.asarray, layerwise_test.prompts("qwen")),
    model=layerwise_test.model_of("qwen"), compressor=rule_of(), grid=GRID,
    ratio=0.5, max_new_tokens=2, eos_ids=(5,), pad_id=63,
  )  # fmt: skip
  assert traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
  "options,match",
  [
    ({"mode": "fast"}, "mode is 'fast'; use 'exact-mask' or 'bucketed'"),
    ({"threshold": 1.5}, "threshold is 1.5; give .* at least -1 and at most 1"),
    ({"threshold": "high"}, "threshold is 'high'; give a number"),
    ({"min_merge": -0.1}, "min_merge is -0.1; give a number at least 0"),
    ({"max_merges": 0}, "max_merges is 0; give an integer at least 1"),
  ],
)
def test_bad_options_are_one_line(options, match):
  with pytest.raises(errors.UserError, match=match) as caught:
    compressors.get("framefusion", **options)
  assert "\n" not in str(caught.value)


def test_a_ratio_of_less_than_a_token_names_the_lowest():
  lowest = rule_of().minimum_ratio(28, 6272)
  with pytest.raises(errors.UserError, match=f"at least {lowest:.4f}"):
    rule_of().plan(28, 6272, 1e-5)
  assert rule_of().plan(28, 6272, lowest) == [(27, 1)]
