"""Compressors between decoder layers against loops over whole maps."""

import dataclasses
import functools
import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base, layerwise, prunevid, registry
from cacovid_jax.models import (
  attention,
  llava_onevision,
  prompt_batch,
  qwen2,
  qwen2_5_vl,
  video_llm,
)
from tests.compressors import decoder_loop, given, quick, shares

GRID = (4, 2, 3)
NUM_VIDEO = 24
LAYERS = 5
NEW = 4
PAD = 63
STATIC = (
  "model", "compressor", "grid", "ratio", "max_new_tokens", "eos_ids", "pad_id",
)  # fmt: skip


def whole(x, positions, lengths, starts, num_video):
  """Returns whole prompts of videos whose rows follow each other."""
  return prompt_batch.whole(
    prompt_batch.PromptBatch(
      x,
      positions,
      jnp.asarray(lengths),
      jnp.asarray(starts)[:, None] + jnp.arange(num_video),
      next_position=jnp.asarray(lengths),
    )
  )


def generate_now(
  params, x, positions, lengths, starts, following, aux=None, *, model,
  compressor, grid, **kwargs,
):  # fmt: skip
  """`layerwise.generate` of whole prompts."""
  num_video = math.prod(grid)
  prompt = whole(x, positions, lengths, starts, num_video)
  video = prompt_batch.read_video(x, prompt.video_rows)
  return layerwise.generate(
    model, params, compressor, prompt, given.inputs(video, grid, aux),
    following, **kwargs,
  )  # fmt: skip


generate = quick.jit(generate_now, static_argnames=STATIC)


def model_of(kind):
  text = dataclasses.replace(qwen2.Qwen2Config.tiny(), num_layers=LAYERS)
  if kind == "llava":
    config = llava_onevision.LlavaOnevisionConfig.tiny()
    config = dataclasses.replace(config, text=text)
    return llava_onevision.LlavaOnevisionModel(config)
  config = qwen2_5_vl.Qwen2_5VLConfig.tiny()
  text = dataclasses.replace(text, rope_sections=(1, 2, 1), tie_embeddings=True)
  return qwen2_5_vl.Qwen2_5VLModel(dataclasses.replace(config, text=text))


@functools.cache
def params_of(kind):
  """Random weights, large enough that what is dropped changes the answer."""
  shapes = jax.eval_shape(model_of(kind).init, jax.random.key(0))
  gen = np.random.default_rng(0)

  def weights(path, leaf):
    noise = 0.3 * gen.standard_normal(leaf.shape).astype(np.float32)
    return 1 + noise if path[-1].key == "scale" else noise

  decoder = jax.tree_util.tree_map_with_path(weights, shapes["language_model"])
  return {"language_model": jax.tree.map(jnp.asarray, decoder)}


def prompts(kind, seed=0, video=None):
  """Two prompts of 31 and 33 rows, padded to 35, the video at rows 3 and 4.

  Returns (x, positions, lengths, video_start, next_positions).
  """
  gen = np.random.default_rng(seed)
  x = gen.standard_normal((2, 35, 32)).astype(np.float32)
  lengths, starts = np.array([31, 33]), np.array([3, 4])
  if video is not None:
    for row, start in enumerate(starts):
      x[row, start : start + NUM_VIDEO] = video[row]
  positions = np.broadcast_to(np.arange(35), (2, 1, 35))
  following = lengths
  if kind == "qwen":
    rows, following = [], []
    model = model_of(kind)
    for length, start in zip(lengths, starts, strict=True):
      ids = np.zeros(length, int)
      ids[start : start + NUM_VIDEO] = model.config.video_token_id
      found, after = model.positions(ids, video_llm.VideoFeatures(None, GRID))
      rows.append(np.pad(found, [(0, 0), (0, 35 - length)]))
      following.append(after)
    positions = np.stack(rows)
  return (
    x,
    np.asarray(positions, np.int32),
    lengths.astype(np.int32),
    starts.astype(np.int32),
    np.asarray(following, np.int32),
  )


def run(kind, compressor, inputs, ratio, eos_ids=(), **kwargs):
  function = generate
  if compressor.on_host:
    function = generate_now
  return function(
    params_of(kind),
    *jax.tree.map(jnp.asarray, inputs),
    model=model_of(kind),
    compressor=compressor,
    grid=GRID,
    ratio=ratio,
    max_new_tokens=NEW,
    eos_ids=eos_ids,
    pad_id=PAD,
    **kwargs,
  )


@functools.partial(quick.jit, static_argnames=("model", "compressor", "ratio"))
def all_logits(
  params, x, positions, lengths, starts, following, ids, *, model, compressor,
  ratio,
):  # fmt: skip
  """Returns (float32[B, NEW + 1, V] of the prefill and behind `ids`, trace).

  Without a compressor, of the whole prompt by the model's own prefill.
  """
  if compressor is None:
    logits, caches, trace = model.prefill(
      params, x, positions, lengths, cache_length=x.shape[1] + NEW
    )
  else:
    prompt = whole(x, positions, lengths, starts, NUM_VIDEO)
    video = prompt_batch.read_video(x, prompt.video_rows)
    logits, caches, trace = compressor.prefill(
      model, params, prompt, given.inputs(video, GRID), ratio=ratio,
      new_rows=NEW,
    )  # fmt: skip

  def one_more(caches, step):
    ids, number = step
    where = (following + number)[:, None]
    where = jnp.broadcast_to(where, (len(where), positions.shape[1]))
    logits, caches = model.decode_step(params, ids, where, caches)
    return caches, logits

  _, more = jax.lax.scan(one_more, caches, (ids.T, jnp.arange(NEW)))
  return jnp.concatenate([logits[:, None], more.swapaxes(0, 1)], 1), trace


@functools.cache
def fastv(layer=2):
  return compressors.get("fastv", layer=layer, scale_layers=False)


def fastv_by_hand(kind, inputs, row, layer, keep):
  """FastV row by row; returns (ids, logits, kept)."""
  x, positions, lengths, starts, following = inputs
  decoder = decoder_loop.Decoder(model_of(kind), params_of(kind))
  length, start = lengths[row], starts[row]
  x, where = x[row, :length], positions[row, :, :length]
  caches, kept = [], None
  for number in range(LAYERS):
    if number == layer:
      paid = probs[:, -1].mean(axis=0)[start : start + NUM_VIDEO]  # noqa: F821
      best = sorted(range(NUM_VIDEO), key=lambda i: (-paid[i], i))[:keep]
      kept = sorted(best)
      gone = set(range(NUM_VIDEO)) - set(kept)
      stays = [i for i in range(length) if i - start not in gone]
      x, where = x[stays], where[:, stays]
    x, probs, k, v = decoder.attend(number, x, where)
    caches.append((k, v))
    x = decoder.feed_forward(number, x)
  ids, logits = decoder.decode(
    decoder.logits(x[-1]), caches, following[row], NEW, len(where)
  )
  return ids, logits, kept


def logits_of(kind, compressor, inputs, ratio, ids):
  return all_logits(
    params_of(kind), *inputs, jnp.asarray(ids, jnp.int32),
    model=model_of(kind), compressor=compressor, ratio=ratio,
  )  # fmt: skip


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_fastv_equals_a_loop_that_removes_rows(kind):
  inputs = prompts(kind)
  # (0.5 * 5 - 2) / 3 of 24 tokens.
  assert fastv().plan(LAYERS, NUM_VIDEO, 0.5) == [(2, 4)]
  ids, logits, kept = map(
    np.stack,
    zip(*[fastv_by_hand(kind, inputs, row, 2, 4) for row in (0, 1)],
        strict=True),
  )  # fmt: skip
  found, trace = logits_of(kind, fastv(), inputs, 0.5, ids)
  np.testing.assert_array_equal(trace.index, kept)
  np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-3)
  assert np.asarray(trace.mask).all()
  np.testing.assert_array_equal(trace.tokens, [[24, 24, 4, 4, 4]] * 2)
  # Dropping the others makes a difference that the comparison would show.
  whole, _ = logits_of(kind, None, inputs, 1.0, ids)
  assert np.abs(whole - logits).max(axis=(0, 2)).min() > 0.1
  # Everything kept: the uncompressed logits.
  found, trace = logits_of(kind, fastv(), inputs, 1.0, ids)
  np.testing.assert_allclose(found, whole, atol=1e-3)
  np.testing.assert_array_equal(trace.index[0], np.arange(NUM_VIDEO))
  np.testing.assert_array_equal(trace.tokens, np.full((2, LAYERS), NUM_VIDEO))


def test_generation_ends_as_greedy_does():
  inputs = prompts("llava")
  expected = [fastv_by_hand("llava", inputs, row, 2, 4)[0] for row in (0, 1)]
  ids, trace = run("llava", fastv(), inputs, 0.5)
  np.testing.assert_array_equal(ids, expected)
  end = int(expected[0][1])
  for row in expected:
    if end in row:
      row[row.index(end) + 1 :] = [PAD] * (NEW - 1 - row.index(end))
  ids, _ = run("llava", fastv(), inputs, 0.5, eos_ids=(end,))
  np.testing.assert_array_equal(ids, expected)
  assert ids[0, 2] == PAD


def full_maps(q, k, lengths):
  """float64[B, N, T, S] causal softmax of the valid rows, by loops."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  batch, size, heads, dim = q.shape
  out = np.zeros((batch, heads, size, size))
  for b in range(batch):
    for h in range(heads):
      for t in range(lengths[b]):
        kv = h // (heads // k.shape[2])
        e = np.exp(k[b, : t + 1, kv] @ q[b, t, h] / math.sqrt(dim))
        out[b, h, t, : t + 1] = e / e.sum()
  return out


def test_recomputed_rows_are_those_of_the_whole_map():
  gen = np.random.default_rng(3)
  q = gen.standard_normal([3, 9, 4, 8]).astype(np.float32)
  k = gen.standard_normal([3, 9, 2, 8]).astype(np.float32)
  lengths, start = np.array([9, 6, 1]), np.array([5, 5, 0])
  maps = full_maps(q, k, lengths)
  last = quick.jit(attention.last_query_attention)(q, k, lengths)
  strongest = quick.jit(
    functools.partial(attention.strongest_attention, num_queries=7)
  )(q, k, start, lengths)
  for b, length in enumerate(lengths):
    np.testing.assert_allclose(
      last[b], maps[b, :, length - 1].mean(axis=0), atol=1e-6
    )
    np.testing.assert_allclose(
      strongest[b], maps[b, :, start[b] : length].max(axis=(0, 1)), atol=1e-6
    )


def test_a_padded_batch_equals_a_prompt_alone():
  inputs = prompts("llava", seed=2)
  ids, trace = run("llava", fastv(), inputs, 0.5)
  x, positions, *rest = (part[:1] for part in inputs)
  alone, found = run(
    "llava", fastv(), (x[:, :31], positions[..., :31], *rest), 0.5
  )
  np.testing.assert_array_equal(alone[0], ids[0])
  np.testing.assert_array_equal(found.index[0], trace.index[0])
  np.testing.assert_array_equal(found.tokens[0], trace.tokens[0])


def test_what_lies_in_the_padding_does_not_matter():
  inputs = prompts("llava", seed=4)
  ids, trace = run("llava", fastv(), inputs, 0.5)
  x = inputs[0].copy()
  x[0, 31:] = 1e3
  again, found = run("llava", fastv(), (x, *inputs[1:]), 0.5)
  np.testing.assert_array_equal(again, ids)
  np.testing.assert_array_equal(found.index, trace.index)


@pytest.mark.parametrize("num_layers", [3, 24, 28, 36])
@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.25, 0.37, 1.0])
def test_the_mean_over_layers_is_the_ratio_from_below(num_layers, ratio):
  compressor = compressors.get("fastv")
  if ratio < compressor.minimum_ratio(num_layers, 6272):
    with pytest.raises(errors.UserError, match="fastv: .* infeasible"):
      compressor.plan(num_layers, 6272, ratio)
    return
  tokens = compressor.rows_per_layer(num_layers, (32, 14, 14), ratio)
  found = np.mean(tokens) / 6272
  assert ratio - 1 / 6272 < found <= ratio + 1e-12


def test_plans_of_released_sizes():
  # Table of equivalent ratios: 19.2 %, 3.08 % at K=2, 16.0 % at K=3.
  assert compressors.get("fastv").plan(28, 6272, 0.25) == [(2, 1206)]
  assert compressors.get("fastv").plan(28, 6272, 0.1) == [(2, 192)]
  assert compressors.get("fastv?layer=3").plan(28, 6272, 0.25) == [(3, 1003)]
  # Layer 2 of 28 is layer 3 of 36, unless it is to stay.
  assert compressors.get("fastv").plan(36, 6272, 0.25)[0][0] == 3
  kept = compressors.get("fastv?scale_layers=False").plan(36, 6272, 0.25)
  assert kept == [(2, 1291)]
  # Half to even instead of down: 0.5 * 3 - 1 = 0.5, over 2 layers, of 10.
  exact, rounded = (
    compressors.get("fastv", exact_budget=exact) for exact in (True, False)
  )
  assert exact.plan(3, 10, 0.5) == [(1, 2)]
  assert rounded.plan(3, 10, 0.5) == [(1, 2)]
  assert rounded.plan(3, 30, 0.5) == [(1, 8)]  # Of 7.5.


def test_budgets_that_cannot_be_met_name_the_lowest_that_can():
  compressor = compressors.get("fastv")
  with pytest.raises(errors.UserError) as caught:
    compressor.plan(28, 6272, 0.05)
  message = str(caught.value)
  assert message.startswith("fastv: ") and "\n" not in message
  lowest = compressor.minimum_ratio(28, 6272)
  assert f"at least {lowest:.4f}" in message
  assert compressor.plan(28, 6272, lowest)[0][1] >= 1
  with pytest.raises(errors.UserError):
    compressor.plan(28, 6272, lowest - 2e-4)


@pytest.mark.parametrize(
  "options,match",
  [
    ({"layer": 0}, "before layer 1 or later"),
    ({"layer": 2.5}, "before layer 1 or later"),
    ({"layer": 5, "scale_layers": False}, "leaves none of the model's 5"),
    ({"layer": 28}, "leaves none of the model's 5"),
  ],
)
def test_layers_that_do_not_exist(options, match):
  method = compressors.get("fastv", **options)
  with pytest.raises(errors.UserError, match=match) as caught:
    method.plan(LAYERS, NUM_VIDEO, 0.9)
  assert "\n" not in str(caught.value)
  # No ratio would help.
  assert method.minimum_ratio(LAYERS, NUM_VIDEO) is None


def test_unknown_options_list_the_known_ones():
  with pytest.raises(errors.UserError, match="layer, scale_layers"):
    compressors.get("fastv?speed=2")
  with pytest.raises(errors.UserError, match="max_merges, min_merge, mode"):
    compressors.get("framefusion?speed=2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerFrame(layerwise.LayerwiseCompressor):
  """For tests: two cuts by text attention with a quota for each frame."""

  keeps: tuple[int, int] = (8, 3)
  share: float | None = None

  def plan(self, num_layers, num_video, ratio):
    return [(1, self.keeps[0]), (3, self.keeps[1])]

  def minimum_ratio(self, num_layers, num_video):
    return 0.0

  def step(self, state, *, layer, keep):
    frames = state.index // (state.grid[1] * state.grid[2])
    return layerwise.keep_by_text_attention(
      state, keep, frames, num_sets=state.grid[0], share=self.share
    )


def per_frame_by_hand(kind, inputs, row, quotas):
  """Two cuts; `quotas(sizes, cut)` of each frame. Dropped from caches, too."""
  x, positions, lengths, starts, following = inputs
  decoder = decoder_loop.Decoder(model_of(kind), params_of(kind))
  length, start = lengths[row], starts[row]
  x, where = x[row, :length], positions[row, :, :length]
  tokens, caches, counts = list(range(NUM_VIDEO)), [], []
  for number in range(LAYERS):
    if number in (1, 3):
      late = probs[:, start + len(tokens) :]  # noqa: F821
      paid = late.max(axis=(0, 1))[start : start + len(tokens)]
      frames = [token // 6 for token in tokens]
      wanted = quotas([frames.count(f) for f in range(4)], number)
      kept = []
      for f in range(4):
        own = [i for i, g in enumerate(frames) if g == f]
        kept += sorted(own, key=lambda i: (-paid[i], i))[: wanted[f]]
      kept = sorted(kept)
      stays = [*range(start), *(start + i for i in kept)]
      stays += range(start + len(tokens), len(x))
      tokens = [tokens[i] for i in kept]
      x, where = x[stays], where[:, stays]
      caches = [(k[stays], v[stays]) for k, v in caches]
    counts.append(len(tokens))
    x, probs, k, v = decoder.attend(number, x, where)
    caches.append((k, v))
    x = decoder.feed_forward(number, x)
  ids, logits = decoder.decode(
    decoder.logits(x[-1]), caches, following[row], NEW, len(where)
  )
  return ids, tokens, counts


def test_text_attention_with_quotas_equals_a_loop():
  kind = "qwen"
  inputs = prompts(kind, seed=5)
  rule = PerFrame(
    name="per_frame", attention_fn="after_video", drop_from_caches=True
  )
  ids, trace = run(kind, rule, inputs, 0.5)

  def quotas(sizes, number):
    return shares.largest_remainder(sizes, rule.keeps[number == 3])

  for row in range(2):
    expected, tokens, counts = per_frame_by_hand(kind, inputs, row, quotas)
    np.testing.assert_array_equal(trace.index[row], tokens)
    np.testing.assert_array_equal(ids[row], expected)
    np.testing.assert_array_equal(trace.tokens[row], counts)


def test_a_share_of_each_set_leaves_masked_rows():
  inputs = prompts("llava", seed=6)
  rule = PerFrame(
    name="per_frame", attention_fn="after_video", drop_from_caches=True,
    keeps=(12, 6), share=0.45,
  )  # fmt: skip
  ids, trace = run("llava", rule, inputs, 0.5)

  def quotas(sizes, number):
    return [int(0.45 * size) for size in sizes]  # 2 of 6, then 0 of 2.

  for row in range(2):
    expected, tokens, counts = per_frame_by_hand("llava", inputs, row, quotas)
    assert tokens == []
    np.testing.assert_array_equal(trace.index[row], [NUM_VIDEO] * 6)
    assert not np.asarray(trace.mask[row]).any()
    np.testing.assert_array_equal(ids[row], expected)
    np.testing.assert_array_equal(trace.tokens[row], counts)


def test_what_enters_may_be_chosen_and_merged_before():
  def halves(features, *, grid, num_keep, text, aux, rng):
    """Means of pairs of tokens, at the place of the first."""
    del grid, text, aux, rng
    pairs = jnp.arange(NUM_VIDEO) // 2
    assign = jnp.where(pairs < num_keep, pairs, -1)
    return base.merge(features, jnp.arange(num_keep) * 2, assign)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class TwoStages(layerwise.LayerwiseCompressor):
    def plan(self, num_layers, num_video, ratio):
      return [(0, 10), (2, 4)]

    def minimum_ratio(self, num_layers, num_video):
      return 0.0

    def step(self, state, *, layer, keep):
      # What entered is at hand, and which of its rows this one was.
      mass = jnp.take(state.entered.mass, state.row)
      state = state._replace(attention=state.attention + 0 * mass)
      return layerwise.keep_by_last_query(state, keep)

  compressor = TwoStages(
    name="two",
    pre_llm=registry.FunctionCompressor(name="halves", function=halves),
  )
  inputs = prompts("qwen", seed=7)
  ids, trace = run("qwen", compressor, inputs, 0.5)
  np.testing.assert_array_equal(trace.tokens, [[10, 10, 4, 4, 4]] * 2)
  assert (np.asarray(trace.index) % 2 == 0).all()
  # The same by hand: a prompt that is shorter from the start, then FastV.
  x, positions, lengths, starts, following = inputs
  decoder = decoder_loop.Decoder(model_of("qwen"), params_of("qwen"))
  for row in range(2):
    start, length = starts[row], lengths[row]
    video = x[row, start : start + 20].reshape(10, 2, -1).mean(axis=1)
    h = np.concatenate(
      [x[row, :start], video, x[row, start + NUM_VIDEO : length]]
    )
    rows = [*range(start), *range(start, start + 20, 2)]
    rows += range(start + NUM_VIDEO, length)
    where = positions[row][:, rows]
    caches = []
    for number in range(LAYERS):
      if number == 2:
        paid = probs[:, -1].mean(axis=0)[start : start + 10]  # noqa: F821
        kept = sorted(np.argsort(-paid, kind="stable")[:4])
        stays = [*range(start), *(start + i for i in kept)]
        stays += range(start + 10, len(h))
        h, where = h[stays], where[:, stays]
      h, probs, k, v = decoder.attend(number, h, where)
      caches.append((k, v))
      h = decoder.feed_forward(number, h)
    expected, _ = decoder.decode(
      decoder.logits(h[-1]), caches, following[row], NEW, 3
    )
    np.testing.assert_array_equal(trace.index[row], 2 * np.array(kept))
    np.testing.assert_array_equal(ids[row], expected)


def test_sets_of_merged_rows():
  # 3 frames of 2 tokens. Row 0: token 0 of frames 0 and 1; row 1: token 1
  # alone; row 2: token 4 with 5; token 3 is dropped; one row of padding.
  selection = base.arrange(
    jnp.ones([4, 2]), jnp.array([0, 1, 4, 6]),
    jnp.array([0, 1, 0, -1, 2, 2]), num_valid=3,
  )  # fmt: skip
  sets = prunevid.sets_of_static_and_frames(selection, (3, 1, 2))
  np.testing.assert_array_equal(sets, [3 + 0, 0, 2, 6])


def test_one_program_per_rule_and_ratio():
  inputs = prompts("llava", seed=8)
  run("llava", fastv(), inputs, 0.5)
  before = generate._cache_size()
  run("llava", fastv(), prompts("llava", seed=9), 0.5)
  assert generate._cache_size() == before


def test_programs_lower_for_a_tpu():
  traced = generate.trace(
    params_of("qwen"), *map(jnp.asarray, prompts("qwen")),
    model=model_of("qwen"), compressor=fastv(), grid=GRID,
    ratio=0.5, max_new_tokens=2, eos_ids=(5,), pad_id=PAD,
  )  # fmt: skip
  assert traced.lower(lowering_platforms=("tpu",)).as_text()


def test_what_a_method_says_of_itself():
  method = compressors.get("fastv")
  assert method.sees_question and not method.stochastic and not method.requires
  assert method.requirements == ("text", "LLM attention")
  assert compressors.get("fastv?layer=4").options == {"layer": 4}
  assert method.rows((32, 14, 14), 0.25, 28) == 1206


def test_prompts_without_room_for_the_video():
  x = jnp.zeros((1, 20, 32))
  with pytest.raises(ValueError, match="do not hold 24 video tokens"):
    whole(x, jnp.zeros((1, 1, 20), jnp.int32), [20], [0], NUM_VIDEO)


def test_a_rule_of_ones_own_is_selected_by_its_file(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    textwrap.dedent("""
    import dataclasses
    import jax.numpy as jnp
    from cacovid_jax.compressors import layerwise

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FirstOnes(layerwise.LayerwiseCompressor):
      layer: int = 1

      def plan(self, num_layers, num_video, ratio):
        return [(self.layer, 4)]

      def minimum_ratio(self, num_layers, num_video):
        return 0.0

      def step(self, state, *, layer, keep):
        return jnp.arange(keep), jnp.int32(keep)

    FIRST = FirstOnes(name="first_ones")
    """)
  )
  method = compressors.get(f"{path}:FIRST?layer=3")
  _, trace = run("llava", method, prompts("llava"), 0.5)
  np.testing.assert_array_equal(trace.index, [[0, 1, 2, 3]] * 2)
  np.testing.assert_array_equal(trace.tokens, [[24, 24, 24, 4, 4]] * 2)
  with pytest.raises(errors.UserError, match="no option 'speed'; .*: layer"):
    compressors.get(f"{path}:FIRST?speed=3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(layerwise.LayerwiseCompressor):
  """For tests: one cut that keeps the tokens of largest learned values."""

  trained = True
  name: str = "learned"

  def plan(self, num_layers, num_video, ratio):
    return [(2, 4)]

  def step(self, state, *, layer, keep, params):
    values = params["values"][state.index]
    state = state._replace(attention=values)
    return layerwise.keep_by_last_query(state, keep)


def test_a_trained_rule_is_given_its_parameters():
  values = np.random.default_rng(0).random(NUM_VIDEO).astype(np.float32)
  inputs = prompts("llava", seed=3)
  for sign in (1, -1):
    own = {"values": jnp.asarray(1 + sign * values)}
    _, trace = run("llava", Learned(), inputs, 0.5, own_params=own)
    expected = np.sort(np.argsort(-sign * values)[:4])
    np.testing.assert_array_equal(trace.index, [expected] * 2)


@pytest.mark.parametrize(
  "spec", ["fastv", "framefusion", "prunevid?llm_stage=True", "flashvid"]
)
def test_released_sizes_have_the_planned_shapes(spec):
  # LLaVA-OneVision-7B at 32 frames, by shapes alone.
  config = llava_onevision.LlavaOnevisionConfig.llava_onevision_7b()
  model = llava_onevision.LlavaOnevisionModel(config, jnp.bfloat16)
  params = jax.eval_shape(model.init, jax.random.key(0))
  shape = jax.ShapeDtypeStruct
  rows, number = 6272 + 64, shape((2,), jnp.int32)
  aux = given.Aux(vision_attention=shape((2, 6272), jnp.float32))
  method = compressors.get(spec)
  ids, trace = jax.eval_shape(
    functools.partial(
      generate_now, model=model, compressor=method, grid=(32, 14, 14),
      ratio=0.25,
      max_new_tokens=16, eos_ids=(1,), pad_id=0,
    ),
    params,
    shape((2, rows, 3584), jnp.bfloat16),
    shape((2, 1, rows), jnp.int32),
    number, number, number, aux,
  )  # fmt: skip
  assert ids.shape == (2, 16)
  assert trace.index.shape == (2, method.rows((32, 14, 14), 0.25, 28))
  assert trace.tokens.shape == (2, 28)
