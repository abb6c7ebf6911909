"""The small Qwen3-VL: packed prompts beside its own, and its frames."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import processors, qwen2
from cacovid_jax.synthetic import (
  base_models,
  losses,
  packed,
  packing,
  pretraining,
  world,
)

CONFIG = "configs/synthetic_base.py:family=qwen3_vl,debug"
QUESTIONS, LENGTH, KEPT = 2, 7, 9
WHICH = np.array([0, 2])  # Clips of 4 and of 16 seconds.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Returns (config, tokenizer, model, params, pack, prompts)."""
  folder, config = tmp_path_factory.mktemp("base"), config_lib.load(CONFIG)
  family = base_models.of(config)
  pack = pretraining.packing_of(config, folder)
  with pytest.MonkeyPatch.context() as patch:
    few = functools.partial(packing.corpus, 40)
    patch.setattr(packing, "corpus", few)
    family.write_files(config, pack, folder)
  tokenizer = tokenizer_lib.Tokenizer.from_directory(folder)
  model = base_models.model_of(config, tokenizer)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  prompts = base_models.prompts_of(family, model, tokenizer, pack)
  return config, tokenizer, model, params, pack, prompts


@pytest.fixture(scope="module")
def given(made):
  """Returns (`TowerOutput` of two clips, question ids int32[2, Q, A])."""
  _, _, model, _, pack, _ = made
  rng, count = np.random.default_rng(1), pack.stage.num_tokens
  width, deep = model.config.text.hidden_size, model.num_deep
  video = packed.TowerOutput(
    rng.standard_normal((2, count, width), np.float32),
    rng.standard_normal((2, deep, count, width), np.float32),
  )
  ids = rng.integers(2, 200, (2, QUESTIONS, LENGTH)).astype(np.int32)
  return video, ids


def alone(made, given, b, question):
  """Returns (x, positions, video rows) of one prompt, as evaluations build."""
  _, tokenizer, model, params, pack, _ = made
  video, ids = given
  _, seconds = base_models.FAMILIES["qwen3_vl"].lengths(pack.stage)[WHICH[b]]
  grid = pack.stage.grid
  prompt = model.encode_prompt(tokenizer, "x", grid, seconds)
  rows = prompt.video_rows
  whole = np.int32([*prompt.ids[: rows[-1] + 2], *ids[b, question]])
  told = processors.TowerInputs(None, grid, seconds)
  positions, _ = model.positions(whole, told)
  x = model.embed_prompt(params, whole, video.features[b], rows)
  return x, positions, rows


def answered(made, x, positions, deep, rows):
  _, _, model, params, _, _ = made

  @jax.jit
  def logits(x, positions, deep, rows):
    more = {"deep": deep[None], "video_rows": rows[None]}
    hidden, _ = model.forward(params, x[None], positions[None], **more)
    return model.logits(params, hidden[0, -LENGTH:])

  return logits(x, positions, deep, rows)


def test_packed_questions_are_answered_as_its_own_prompts(made, given):
  _, _, _, params, _, prompts = made
  video, ids = given
  assert (np.diff(prompts.heads.length[WHICH]) > 0).all()
  found = jax.jit(prompts.full_logits)(params, video, ids, WHICH)
  for b, q in np.ndindex(2, QUESTIONS):
    x, positions, rows = alone(made, given, b, q)
    expected = answered(made, x, positions, video.deep[b], rows)
    np.testing.assert_allclose(found[b, q], expected, atol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
def test_kept_tokens_keep_their_rows_maps_and_positions(made, given, merged):
  _, _, _, params, pack, prompts = made
  video, ids = given
  rng, count = np.random.default_rng(2), pack.stage.num_tokens
  index = np.zeros((2, QUESTIONS, KEPT), np.int32)
  valid = np.zeros(index.shape, bool)
  for place in np.ndindex(2, QUESTIONS):
    kept = rng.integers(2, KEPT + 1)
    index[place][:kept] = np.sort(rng.permutation(count)[:kept])
    valid[place][:kept] = True
  share = np.full(index.shape[:2], 0.5, np.float32) if merged else None
  found = jax.jit(prompts.pruned_logits)(
    params, video, ids, index, valid, share, WHICH
  )
  for b, q in np.ndindex(2, QUESTIONS):
    x, positions, rows = alone(made, given, b, q)
    kept, x = index[b, q][valid[b, q]], np.array(x)
    maps = np.concatenate([video.features[b][None], video.deep[b]])
    if merged:
      maps = _half_merged(maps, kept)
    x[rows] = maps[0]
    chosen = np.setdiff1d(np.arange(len(x)), np.delete(rows, kept))
    places = np.searchsorted(chosen, rows[kept])
    deep = maps[1:, kept]
    expected = answered(made, x[chosen], positions[:, chosen], deep, places)
    np.testing.assert_allclose(found[b, q], expected, atol=1e-4)


def _half_merged(maps, kept):
  """Returns float[1 + S, N, D], kept ones half way to their cluster's mean."""
  unit = maps[0] / np.linalg.norm(maps[0], axis=-1, keepdims=True)
  nearest = kept[(unit @ unit[kept].T).argmax(axis=1)]
  maps = maps.copy()
  means = {t: maps[:, nearest == t].mean(axis=1) for t in kept}
  for token, mean in means.items():
    maps[:, token] = 0.5 * maps[:, token] + 0.5 * mean
  return maps


def test_the_first_layer_sees_all_but_padding(made, given):
  _, _, model, params, _, prompts = made
  video, ids = given
  lengths = np.array([3, 5], np.int32)
  found = jax.jit(prompts.first_layer)(params, video, ids[:, 0], lengths, WHICH)
  text = model.config.text
  layer = qwen2.DecoderLayer(text, model.dtype, model.backend)
  first = jax.tree.map(lambda p: p[0], params["language_model"]["layers"])
  for b in range(2):
    x, positions, rows = alone(made, given, b, 0)
    x, positions = x[: lengths[b] - LENGTH], positions[:, : lengths[b] - LENGTH]
    cos, sin = qwen2.angles(text, positions[None])
    h, _ = layer.apply({"params": first}, x[None], cos, sin, causal=False)
    np.testing.assert_allclose(found[b], h[0, rows], atol=1e-4)


def test_frames_become_the_patches_of_its_processor(made):
  _, _, model, _, pack, prompts = made
  T, size = pack.stage.num_frames, pack.stage.image_size
  y, x = np.mgrid[:size, :size] / size
  k = np.arange(2 * T)[:, None, None]
  waves = np.sin(6 * x + k), np.cos(5 * y - k), np.sin(4 * x * y + k)
  frames = np.uint8(127.5 + 100 * np.stack(waves, -1))
  processor = model.read_processor(made[1].name)
  expected = processor(frames, fps=4.0)
  found = jax.jit(lambda x: prompts.arrange(x)._replace(grid=0))(
    jnp.float32(frames) / 127.5 - 1
  )
  assert expected.grid == pack.stage.grid
  assert found.values.shape == expected.values.shape
  # The processor rounds to whole levels.
  np.testing.assert_allclose(found.values, expected.values, atol=1.1 / 127.5)


def test_clips_of_a_batch_differ_in_their_lengths(made):
  *_, pack, _ = made
  rng = np.random.default_rng(0)
  packer = packing.Packer(pack)
  numbers = set()
  for _ in range(8):
    scene = world.sample_scene(rng, world.VARIANTS["sparse"])
    clip = packer.clip(rng, scene, 0.0)
    numbers.add(int(clip["head"]))
    times = np.float32(pack.times[clip["head"]])
    np.testing.assert_array_equal(clip["times"], times)
    assert clip["sprite"].shape[0] == len(times) == 32
    # Frames of a temporal patch are next to the sampled one.
    sampled = np.repeat(np.arange(16), 2)
    assert (abs(times - sampled) <= 0.75).all()
  assert len(numbers) > 1
  batch = {
    name: np.asarray(clip[name])[None]
    for name in ("sprite", "corner", "color", "background", "times")
  }
  drawn = jax.eval_shape(losses.draw_frames, jax.random.key(0), batch)
  assert drawn.shape == (1, 32, 112, 112, 3)


def test_an_unknown_family_is_named():
  with pytest.raises(errors.UserError, match="'qwen3_vl': use llava_onevision"):
    config_lib.load(f"{CONFIG},geometry=full")
  config = config_lib.load(CONFIG)
  config.family = "phi"
  with pytest.raises(errors.UserError, match="family=phi: use llava"):
    base_models.of(config)


def test_norms_of_queries_and_keys_have_a_start_and_a_rate(made):
  config, _, model, _, pack, _ = made
  config = config_lib.replace(config, {"pretrain.lr": 0.01}).pretrain

  def scales(factor, rate):
    given = {"norm_scale": factor, "norm_rate": rate}
    own = config_lib.replace(config, given)
    state = pretraining.init_state(model, own, pack.stage)
    start, tx = state["params"], pretraining.make_tx(own)[0]
    grads, opt_state = jax.tree.map(jnp.ones_like, start), state["opt_state"]
    for _ in range(2):  # The rate of the first is 0.
      moves, opt_state = tx.update(grads, opt_state, start)
    layer, move = (
      tree["model"]["language_model"]["layers"] for tree in (start, moves)
    )
    return layer["q_norm"]["scale"], move["k_norm"], move["input_layernorm"]

  one, plain, other = scales(1.0, 1.0)
  more, fast, same = scales(1.5, 10.0)
  np.testing.assert_array_equal(one, 1.0)
  np.testing.assert_array_equal(more, 1.5)
  assert abs(plain["scale"]).min() > 0
  np.testing.assert_allclose(fast["scale"], 10 * plain["scale"], rtol=1e-6)
  np.testing.assert_array_equal(same["scale"], other["scale"])
