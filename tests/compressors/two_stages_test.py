"""PruneVID and FlashVID with their second part inside the language model."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import prunevid
from tests.compressors import decoder_loop, given, layerwise_test, quick, shares

GRID, NUM_VIDEO = layerwise_test.GRID, layerwise_test.NUM_VIDEO
LAYERS, NEW = layerwise_test.LAYERS, layerwise_test.NEW
OPTIONS = {
  "prunevid": {"llm_stage": True, "frame_share": 0.5},
  "flashvid": {"num_segments": 1, "cut_below": -1.0},
}


@functools.cache
def method(name, **options):
  return compressors.get(name, **OPTIONS[name], **options)


def video_of(seed):
  """Two videos of two shots each; half of each frame stands still."""
  gen = np.random.default_rng(seed)
  shots = 2 * gen.standard_normal((2, 2, 1, 6, 32)).repeat(2, axis=2)
  noise = gen.standard_normal((2, 2, 2, 6, 32))
  noise *= np.array([0.1, 0.2, 0.1, 2.0, 2.0, 2.0])[:, None]
  return (shots + noise).reshape(2, NUM_VIDEO, 32).astype(np.float32)


def attention_of(seed):
  gen = np.random.default_rng(seed)
  return jnp.asarray(gen.random((2, NUM_VIDEO)), jnp.float32)


def first_part(rule, features, num_keep, attention=None, ratio=None):
  def compress(features, attention):
    return given.compress(
      rule.pre_llm,
      features,
      grid=GRID,
      num_keep=num_keep,
      aux=given.Aux(vision_attention=attention),
      ratio=ratio,
    )

  return quick.jit(compress)(jnp.asarray(features), attention)


def keep_last(decoder_probs, start, size, sets, keep, exact):
  del sets, exact
  paid = decoder_probs[:, -1].mean(axis=0)[start : start + size]
  return sorted(sorted(range(size), key=lambda i: (-paid[i], i))[:keep])


def keep_by_sets(probs, start, size, sets, keep, exact):
  paid = probs[:, start + size :].max(axis=(0, 1))[start : start + size]
  names = sorted(set(sets))
  members = {s: [i for i in range(size) if sets[i] == s] for s in names}
  sizes = [len(members[s]) for s in names]
  quotas = [int(0.4 * n) for n in sizes]
  if exact:
    quotas = shares.largest_remainder(sizes, keep)
  kept = []
  for name, quota in zip(names, quotas, strict=True):
    kept += sorted(members[name], key=lambda i: (-paid[i], i))[:quota]
  return sorted(kept)


def by_hand(inputs, row, selection, layer, rule, keep, *, forget, exact=True):
  """Returns (ids, tokens left, video rows per layer)."""
  x, positions, lengths, starts, following = inputs
  decoder = decoder_loop.Decoder(
    layerwise_test.model_of("qwen"), layerwise_test.params_of("qwen")
  )
  length, start = lengths[row], starts[row]
  size = int(np.asarray(selection.mask).sum())
  index = np.asarray(selection.index)[:size]
  assign = np.asarray(selection.assign)
  sets = []
  for number in range(size):
    frames = sorted({i // 6 for i in np.flatnonzero(assign == number)})
    sets.append((len(frames) > 1, frames[0]))
  rows = [*range(start), *(start + index), *range(start + NUM_VIDEO, length)]
  h = np.asarray(x[row][rows], np.float64)
  h[start : start + size] = np.asarray(selection.features)[:size]
  where, caches, counts = positions[row][:, rows], [], []
  for number in range(LAYERS):
    if number == layer:
      kept = rule(probs, start, size, sets, keep, exact)  # noqa: F821
      stays = [*range(start), *(start + i for i in kept)]
      stays += range(start + size, len(h))
      h, where, index = h[stays], where[:, stays], index[kept]
      if forget:
        caches = [(k[stays], v[stays]) for k, v in caches]
    counts.append(len(index))
    h, probs, k, v = decoder.attend(number, h, where)
    caches.append((k, v))
    h = decoder.feed_forward(number, h)
  ids, _ = decoder.decode(
    decoder.logits(h[-1]), caches, following[row], NEW, len(where)
  )
  return ids, index, counts


@pytest.mark.parametrize("name", ["prunevid", "flashvid"])
def test_both_parts_equal_a_loop_after_the_first_one(name):
  video = video_of(1)
  inputs = layerwise_test.prompts("qwen", 1, video)
  aux = given.Aux(vision_attention=attention_of(1))
  rule = method(name)
  (zero, entering), (layer, keep) = rule.plan(LAYERS, NUM_VIDEO, 0.5)
  # Layers 10 and 20 of 28 in a decoder of 5.
  assert zero == 0 and layer == {"prunevid": 2, "flashvid": 4}[name]
  ids, trace = layerwise_test.run("qwen", rule, (*inputs, aux), 0.5)
  several = 0
  for row in range(2):
    selection = first_part(
      rule, video[row], entering, aux.vision_attention[row]
    )
    sets = prunevid.sets_of_static_and_frames(selection, GRID)
    several += (np.asarray(sets) >= GRID[0]).any()
    expected, index, counts = by_hand(
      inputs, row, selection, layer,
      keep_by_sets if name == "prunevid" else keep_last, keep,
      forget=name == "prunevid",
    )  # fmt: skip
    np.testing.assert_array_equal(trace.index[row], index)
    np.testing.assert_array_equal(trace.tokens[row], counts)
    np.testing.assert_array_equal(ids[row], expected)
  assert several  # Some rows stand for several frames.
  share = np.asarray(trace.equivalent_ratio(NUM_VIDEO))
  assert (share <= 0.5).all() and (share > 0.5 - 1 / NUM_VIDEO).all()


def test_prunevid_rounds_each_set_as_published():
  video = video_of(2)
  inputs = layerwise_test.prompts("qwen", 2, video)
  rule = method("prunevid", exact_budget=False)
  assert not rule.exact_budget and not rule.pre_llm.exact_budget
  (_, entering), (layer, _) = rule.plan(LAYERS, NUM_VIDEO, 0.5)
  ids, trace = layerwise_test.run("qwen", rule, inputs, 0.5)
  share = entering / NUM_VIDEO
  for row in range(2):
    num_rows = rule.pre_llm.rows(GRID, share)
    selection = first_part(rule, video[row], num_rows, ratio=share)
    expected, index, counts = by_hand(
      inputs, row, selection, layer, keep_by_sets, None,
      forget=True, exact=False,
    )  # fmt: skip
    mask = np.asarray(trace.mask[row])
    np.testing.assert_array_equal(np.asarray(trace.index[row])[mask], index)
    np.testing.assert_array_equal(trace.tokens[row], counts)
    np.testing.assert_array_equal(ids[row], expected)


@pytest.mark.parametrize("name", ["prunevid", "flashvid"])
def test_everything_enters_and_stays_at_ratio_1(name):
  plan = method(name).plan(28, 6272, 1.0)
  assert [keep for _, keep in plan] == [6272, 6272]


@pytest.mark.parametrize("num_layers", [3, 24, 28, 36])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.8])
@pytest.mark.parametrize("name", ["prunevid", "flashvid"])
def test_the_mean_over_layers_is_the_ratio_from_below(name, ratio, num_layers):
  tokens = method(name).rows_per_layer(num_layers, (32, 14, 14), ratio)
  found = np.mean(tokens) / 6272
  assert ratio - 1 / 6272 < found <= ratio + 1e-12
  assert tokens[0] >= tokens[-1] >= 1


def test_plans_of_the_published_sizes():
  # 40.7 % enters and 40 % of it goes on; 31.25 % and 30 %.
  assert method("prunevid").plan(28, 6272, 0.25) == [(0, 2552), (10, 1021)]
  assert method("flashvid").plan(28, 6272, 0.25) == [(0, 1960), (20, 588)]


def test_the_first_part_alone_is_an_ordinary_compressor():
  plain = compressors.get("prunevid")
  assert plain.selects_first
  assert compressors.get("prunevid?llm_stage=False").selects_first
  alone = compressors.get("flashvid?llm_stage=False&link_above=0.9")
  assert alone.selects_first and alone.rows_per_layer(3, GRID, 0.5) == [12] * 3
  assert alone.options == {"llm_stage": False, "link_above": 0.9}
  assert alone.requires == {"vision_attention"}


def test_what_both_parts_say_of_themselves():
  flash = compressors.get("flashvid?llm_keep=0.5&diverse_share=0.6")
  assert flash.llm_keep == 0.5
  assert flash.pre_llm.options == {"diverse_share": 0.6}
  assert flash.options == {"llm_keep": 0.5, "diverse_share": 0.6}
  assert flash.requires == {"vision_attention"}
  assert flash.requirements == ("text", "LLM attention", "vision attention")
  prune = method("prunevid")
  assert prune.options == OPTIONS["prunevid"] and not prune.requires
  assert prune.sees_question
  assert "cluster_share" in prune.known_options


@pytest.mark.parametrize(
  "spec,match",
  [
    ("prunevid?llm_layer=5", "llm_layer is an option of the stage"),
    ("flashvid?llm_stage=False&llm_keep=0.5", "llm_keep is an option of"),
    ("prunevid?llm_stage=yes", "llm_stage='yes'; give True or False"),
    ("flashvid?llm_stage=3", "llm_stage=3; give True or False"),
    ("flashvid?llm_keep=0", "llm_keep is 0; give a number above 0"),
    ("prunevid?llm_stage=True&speed=1", "has no option 'speed'"),
    ("flashvid?speed=1", "no option 'speed'; known options: cut_below, "),
  ],
)
def test_bad_options_are_one_line(spec, match):
  with pytest.raises(errors.UserError, match=match) as caught:
    compressors.get(spec)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["prunevid", "flashvid"])
def test_a_ratio_of_less_than_a_token_names_the_lowest(name):
  rule = method(name)
  lowest = rule.minimum_ratio(28, 6272)
  with pytest.raises(errors.UserError, match=f"^{name}: .*{lowest:.4f}"):
    rule.plan(28, 6272, 1e-5)
  assert rule.plan(28, 6272, lowest)[-1][1] >= 1
