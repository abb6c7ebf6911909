"""Variants of 32 x 14 x 14 tokens: scenes, pictures, questions, files."""

import collections
import dataclasses
import functools
import json
import pathlib
import re

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import config as config_lib
from cacovid_jax import errors, metrics
from cacovid_jax.data import frames, readers, video
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints, llava_onevision
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.synthetic import (
  base_models,
  build,
  losses,
  packing,
  pretraining,
  questions,
  render,
  world,
)
from cacovid_jax.synthetic import tokenizer as tokenizer_training

VARIANTS = ("full", "plain")
CONFIG = "configs/synthetic_base.py:geometry=full,stage=3"
KINDS = ("symbol", "count_over_time", "order_of_three", "changed", "last_place")
NAMES = (world.COLOR_NAMES, world.PATTERNS, world.SHAPES)


@functools.cache
def asked(variant, scenes=24, count=12):
  """Returns [(scene, questions)] of the test split."""
  config = build.BuildConfig(variant=variant, questions_per_clip=count)
  return [build.draw(config, "test", number) for number in range(scenes)]


def every(variant, kind=None):
  for scene, found in asked(variant):
    for question in found:
      if kind in (None, question.kind):
        yield scene, question


def named(scene, words):
  """Returns the objects of a full name, told in three words."""
  key = [names.index(w) for names, w in zip(NAMES, words.split(), strict=True)]
  return [
    obj for obj, own in enumerate(scene.attributes.tolist()) if own[:3] == key
  ]


def corners(scene, obj, time):
  """Returns (x, y) of an object's centre in pixels, by hand."""
  first, last = scene.life[obj].tolist()
  share = (time - (first - 0.5)) / (last - first + 1)
  return scene.path[obj, 0] * (1 - share) + scene.path[obj, 1] * share


def side(scene, obj, time):
  x, y = corners(scene, obj, time)
  return ("north" if y < 112 else "south") + ("west" if x < 112 else "east")


def physical(scene, objects):
  """Returns how many things these are: phases of one thing count once."""
  into = dict(scene.changes)
  return len(set(objects) - {into[obj] for obj in objects if obj in into})


def seen_first(scene, obj):
  return min(t for t in range(32) if world.visible(scene.life, t)[obj])


def solve(scene, question):
  """Returns the right options, from the words of the question alone."""
  text = question.text
  if match := re.fullmatch(r"Which letter is drawn on the (.+)\?", text):
    (obj,) = named(scene, match[1])
    return ["HKLOTUXZ"[scene.attributes[obj, 3]]]
  if match := re.fullmatch(
    r"How many different (.+) objects does the clip show\?", text
  ):
    return [str(physical(scene, named(scene, match[1])))]
  if match := re.fullmatch(
    r"In which order do 1 the (.+), 2 the (.+) and 3 the (.+) appear\?", text
  ):
    onsets = []
    for number in (1, 2, 3):
      (obj,) = named(scene, match[number])
      onsets.append((seen_first(scene, obj), number))
    assert len({onset for onset, _ in onsets}) == 3
    return [", ".join(str(number) for _, number in sorted(onsets))]
  if match := re.fullmatch(r"What does the (.+) turn into\?", text):
    (before,) = named(scene, match[1])
    # What is next in the same place.
    x, y = corners(scene, before, scene.life[before, 1] + 0.5)
    after = [
      obj
      for obj in range(len(scene.life))
      if scene.life[obj, 0] == scene.life[before, 1] + 1
      and np.hypot(*(corners(scene, obj, scene.life[obj, 0] - 0.5) - (x, y)))
      < 0.01
    ]
    key = scene.attributes[after[0]]
    assert len(after) == 1
    return [" ".join(n[k] for n, k in zip(NAMES, key, strict=False))]
  match = re.fullmatch(r"Where is the (.+) in the last frame\?", text)
  (obj,) = named(scene, match[1])
  assert side(scene, obj, scene.life[obj, 0]) != side(scene, obj, 31)
  return [side(scene, obj, 31)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_stated_option_is_right(variant):
  kinds = collections.Counter()
  for scene, question in every(variant):
    assert solve(scene, question) == [question.options[question.answer]]
    assert len(set(question.options)) == 4
    kinds[question.kind] += 1
  assert set(kinds) == set(KINDS)
  assert min(kinds.values()) >= 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_decisive_tokens_are_those_of_the_objects_asked_for(variant):
  for scene, question in every(variant):
    last = question.kind == "last_place"
    times = [31] if last else range(32)
    expected = set()
    for obj in question.objects:
      for time in times:
        if not scene.life[obj, 0] <= time <= scene.life[obj, 1]:
          continue
        x, y = np.rint(corners(scene, obj, time)).astype(int)
        drawn = np.zeros((224, 224))
        drawn[y - 7 : y + 8, x - 7 : x + 8] = 1 / 225
        share = drawn.reshape(14, 16, 14, 16).sum((1, 3)).reshape(-1)
        found = np.flatnonzero(share >= 0.25 - 1e-9)
        expected |= {time * 196 + cell for cell in found.tolist()}
    assert question.tokens(scene) == sorted(expected)
    about = []
    if question.kind == "changed":
      about = [named(scene, question.text.split(" the ")[1][:-11])[0]]
      about.append(dict(scene.changes)[about[0]])
    else:
      for words in re.findall(r"(\w+ \w+ \w+)", _names_of(question.text)):
        about += named(scene, words)
    assert sorted(question.objects) == sorted(about)


def _names_of(text):
  colors = "|".join(world.COLOR_NAMES)
  return ", ".join(re.findall(rf"(?:{colors}) \w+ \w+", text))


def test_scenes_need_several_times_what_a_tenth_can_keep():
  for scene, _ in asked("full")[:6]:
    held = (world.token_owners(scene) >= 0).sum()
    assert 4 * 627 <= held <= 6 * 627
    needed = set()
    rng, shares = np.random.default_rng(0), world.VARIANTS["full"].kind_shares
    for question in questions.sample_questions(rng, scene, 250, shares):
      needed |= set(question.tokens(scene))
    assert len(needed) >= 2 * 627


@pytest.mark.parametrize("variant", VARIANTS)
def test_scenes_keep_to_their_variant(variant):
  config = world.VARIANTS[variant]
  for scene, _ in asked(variant)[:8]:
    special = 2 * len(scene.changes)
    movers = [o for o in range(len(scene.life)) if scene.moves(o)]
    assert config.num_movers[0] - 2 <= len(movers) <= config.num_movers[1]
    ordinary = len(scene.life) - special - len(movers)
    assert 0.9 * config.num_objects[0] <= ordinary <= config.num_objects[1]
    assert scene.life.min() >= 0 and scene.life.max() < 32
    assert scene.path.min() >= 7 and scene.path.max() <= 217
    # At most one object in the middle of a cell.
    taken = (scene.coverage > 0.6).sum(0)
    assert taken.max() == 1
    for before, after in scene.changes:
      differ = scene.attributes[before] != scene.attributes[after]
      assert differ.sum() == 1 and not differ[3]
      assert scene.life[after, 0] == scene.life[before, 1] + 1
      np.testing.assert_array_equal(scene.path[before, 1], scene.path[after, 0])
    # Movers and what changes have their names to themselves at first.
    keys = [tuple(key[:3]) for key in scene.attributes.tolist()]
    special = [*movers, *(before for before, _ in scene.changes)]
    assert len({keys[obj] for obj in special}) == len(special)


def blind_tables(found):
  """Returns the answers' counts by what a guesser without a clip can read."""
  tables = collections.defaultdict(collections.Counter)
  for question in found:
    right = question.options[question.answer]
    for option in question.options:
      for clue in clues(question, option):
        tables[clue][option == right] += 1
  return tables


def clues(question, option):
  """Yields what is told of an option by the texts alone."""
  yield question.kind, "place", question.options.index(option)
  yield question.kind, "words", option
  yield question.kind, "rank", sorted(question.options).index(option)
  if question.kind == "changed":
    before = _names_of(question.text).split()
    pairs = zip(before, option.split(), strict=True)
    yield "changed", "part", [a == b for a, b in pairs].index(False)
    yield "changed", "into", *(set(option.split()) - set(before))
  if question.kind == "order_of_three":
    # Options that agree with others about who comes first, and last.
    for end in (0, -1):
      same = sum(other[end] == option[end] for other in question.options)
      yield question.kind, end, same


def blind_hits(learnt, found):
  """Returns bool[n], whether a guesser without a clip is right."""
  tables, right = blind_tables(learnt), []
  for question in found:
    scores = []
    for option in question.options:
      seen = [tables[clue] for clue in clues(question, option)]
      odds = [(c[True] + 1) / (c[False] + 3) for c in seen]
      scores.append(np.sum(np.log(odds)))
    right.append(int(np.argmax(scores)) == question.answer)
  return np.array(right)


@functools.cache
def halves(variant):
  """Returns the questions of every other clip, and of the rest."""
  clips = [found for _, found in asked(variant, 60, 12)]
  return sum(clips[::2], []), sum(clips[1::2], [])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_blind_guesser_stays_at_chance(variant):
  right = blind_hits(*halves(variant))
  # Three standard errors, for answers that are drawn apart.
  assert right.mean() < 0.25 + 3 * (0.1875 / len(right)) ** 0.5


def test_a_blind_guesser_would_find_a_shortcut():
  def of_colors(questions):
    """Has all that changes change its color, as far as there are such."""
    for question in questions:
      if question.kind == "changed":
        before = _names_of(question.text).split()[1:]
        same = [o.split()[1:] == before for o in question.options]
        if any(same):
          yield dataclasses.replace(question, answer=same.index(True))

  first, second = (list(of_colors(half)) for half in halves("full"))
  assert blind_hits(first, second).mean() > 0.5


def test_letters_are_drawn_on_the_objects_that_carry_them():
  scene = asked("full")[0][0]
  still = np.zeros((224, 224, 1), np.float32)
  time = 16.0
  shown = np.flatnonzero(world.visible(scene.life, time))
  carrying = [o for o in shown if scene.attributes[o, 3] >= 0][:6]
  assert len(carrying) == 6
  for obj in carrying:
    attributes = scene.attributes.copy()
    attributes[obj, 3] = -1
    bare = dataclasses.replace(scene, attributes=attributes)
    alone = world.centres(scene.life[[obj]], scene.path[[obj]], time)[0]
    changed = render.frame(scene, time, still) != render.frame(
      bare, time, still
    )
    rows, columns = np.nonzero(changed.any(-1))
    x, y = alone
    # In the lower right 7 x 7 of 15 x 15 pixels; another one may cover some.
    assert rows.min() >= y + 1 and rows.max() <= y + 7
    assert columns.min() >= x + 1 and columns.max() <= x + 7


def test_letters_differ():
  opacity, shade = render.sprite_tables()
  drawn = (opacity * shade)[33:].reshape(8, 32, 225)
  apart = np.abs(drawn[:, None] - drawn[None]).sum(-1)  # [8, 8, 32]
  apart[np.arange(8), np.arange(8)] = np.inf
  assert apart.min() >= 3  # Pixels.


# sha256 of what the generator makes; a change of it is a new benchmark.
HASHES = {
  world.SMALL: (
    "63b24ffe3d724af87f82bf20c58c6780688637f0d5230a89b6162b79b92d3f77"
  ),
  world.FULL: (
    "9a77c3048236abb04e4ab8631e7f6550e8a393b6ed13a8cfdc79d1879f02b756"
  ),
}


@pytest.mark.parametrize("stage", HASHES, ids=["small", "full"])
def test_what_is_drawn_and_asked_is_what_it_was(stage):
  assert build.generator_hash(stage) == HASHES[stage]


def test_lengths_are_drawn_and_hold_the_sampled_frames_exactly():
  config = build.BuildConfig(variant="full")
  seconds = collections.defaultdict(set)
  for number in range(60):
    name, length, rate = build.length_of(config, "test", number)
    seconds[name].add(length / rate)
    index = frames.eval_linspace(length, 32)
    # The times that frames are drawn at, in sampled frames.
    times = [i * 31 / (length - 1) for i in index.tolist()]
    assert times == list(range(32))
    assert 0.5 < rate <= 3.2
  for name, (low, high) in zip(
    ("short", "medium", "long"), ((10, 31), (32, 62), (63, 120)), strict=True
  ):
    assert low <= min(seconds[name]) <= max(seconds[name]) <= high
    assert len(seconds[name]) > 5
  assert build.length_of(config, "test", 7) != build.length_of(
    dataclasses.replace(config, seed=1), "test", 7
  )
  small = build.BuildConfig(variant="dense")
  assert build.length_of(small, "test", 7) == ("medium", 64, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("full") / "full"
  config = build.BuildConfig(variant="full", clips=(0, 0, 1, 0), seed=2)
  build.build(config, folder, num_workers=1)
  return folder


def test_a_decoded_file_gives_the_papers_grid(folder):
  row = readers.read_videomme(
    str(folder / "test.parquet"), folder, style="video-r1"
  )[0]
  path = video.safe_path(str(folder), row.video)
  clip = video.decode(path, frames.FrameRule(32))
  assert clip.frames.shape == (32, 224, 224, 3)
  # Patches of 8 x 8, pooled in pairs, as LLaVA-OneVision does.
  shape = llava_onevision.LlavaOnevisionConfig.tiny()
  vision = dict(image_size=224, patch_size=8)
  vision = dataclasses.replace(shape.vision, **vision)
  model = llava_onevision.LlavaOnevisionModel(
    dataclasses.replace(shape, vision=vision)
  )
  assert tuple(model.grid(*clip.frames.shape[:3])) == (32, 14, 14)
  config = build.BuildConfig(variant="full", seed=2)
  scene, found = build.draw(config, "test", 0)
  noise = render.grain(scene)
  weights = np.array([0.299, 0.587, 0.114])  # Chroma is halved in size.
  for time in (0, 13, 31):
    drawn = {
      near: render.frame(scene, float(near), noise) @ weights
      for near in (time - 1, time, time + 1)
      if 0 <= near < 32
    }
    shown = clip.frames[time] @ weights
    apart = {near: np.abs(shown - one).mean() for near, one in drawn.items()}
    assert min(apart, key=apart.get) == time
    assert apart[time] < 3
  with av.open(path) as container:
    seconds = container.duration / av.time_base
  name, length, rate = build.length_of(config, "test", 0)
  assert row.duration == name == "short"
  assert seconds == pytest.approx(length / rate, abs=0.05)
  assert pathlib.Path(path).stat().st_size < 3e6
  told = map(json.loads, (folder / "decisive.jsonl").read_text().splitlines())
  told = {line["question_id"]: line["tokens"] for line in told}
  assert told[row.id] == found[0].tokens(scene)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["num_frames"] == 32
  assert manifest["generator_hash"] == build.generator_hash(world.FULL)


def test_scenes_told_in_words_tell_changes_places_and_letters():
  for scene, _ in asked("plain")[:6]:
    lines = packing.describe(scene).splitlines()
    assert len(lines) == len(scene.life) - len(scene.changes)
    for before, after in scene.changes:
      words = " ".join(
        n[k] for n, k in zip(NAMES, scene.attributes[after], strict=False)
      )
      assert any(f"turns into {words} " in line for line in lines)
      assert before != after
    letters = [line.split()[3:4] for line in lines]
    carried = scene.attributes[:, 3]
    carried = np.delete(carried, [after for _, after in scene.changes])
    assert (
      sum(letter in map(list, "HKLOTUXZ") for letter in letters)
      == (carried >= 0).sum()
    )


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"variants": ("full", "sparse")}, "differ in their numbers of frames"),
    ({"variants": ("crowd", "plain")}, "no variant 'crowd' among dense"),
    ({"kind_shares": (0.0, 0.0)}, "give shares, not all 0, of attribute"),
    ({"kind_shares": (0.1,) * 11}, "of attribute, where"),
  ],
)
def test_batches_of_nothing_that_there_is_are_refused(fields, named):
  with pytest.raises(errors.UserError, match=named):
    packing.PackingConfig(tokenizer_file="", **fields)


def test_scenes_may_have_fewer_objects_than_groups_ask_for():
  few = dataclasses.replace(world.VARIANTS["full"], num_objects=(3, 3))
  scene = world.sample_scene(np.random.default_rng(0), few)
  names = [tuple(key[:3]) for key in scene.attributes.tolist()[-3:]]
  assert names[0] == names[1] != names[2]


def test_policies_are_trained_as_the_paper_says():
  ours, paper, public = (
    config_lib.load(f"configs/synthetic_full.py{arg}")
    for arg in ("", ":paper", ":public")
  )
  for config in (ours, paper, public):
    assert config.ratio.adaptive and config.ratio.start == 0.02
    assert config.sampling.num_combinations == 32 and config.iterations == 5
    assert min(config.evals.ratios) == 0.01 and max(config.evals.ratios) == 0.25
    assert config.data.num_frames == 32
  assert ours.objective.kl_weight > 0 == paper.objective.kl_weight
  assert paper.optimizer.schedule == "cosine"
  assert paper.data.frame_rule == frames.EVAL_RULE
  assert public.optimizer.schedule == "cosine_repeated"
  assert public.sampling.frame_cap == "public"
  assert public.data.frame_rule == frames.PUBLIC_RULE


def test_one_policy_is_trained_for_all_ratios_that_it_is_asked_at():
  config = config_lib.load("configs/synthetic_full.py:all_budgets")
  assert config.policy.budget_embedding and not config.ratio.adaptive
  ends = min(config.evals.ratios), max(config.evals.ratios)
  assert config.ratio.range == ends
  assert (config.ratio.rungs[0], config.ratio.rungs[-1]) == ends


def test_a_base_model_of_another_size_is_refused(tmp_path):
  config = config_lib.load(f"{CONFIG},debug", ["vision.image_size=112"])
  with pytest.raises(errors.UserError, match="full, plain are of 224 pixels"):
    pretraining.pretrain(config, tmp_path)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer_training.train(packing.corpus(20, VARIANTS), 640, folder)
  return str(folder / "tokenizer.json")


def test_batches_hold_all_of_questions_words_and_symbols(tokenizer_file):
  base = config_lib.load(f"{CONFIG},debug")
  given = base.pretrain.packing.to_dict()
  given |= {"text_only": 8, "batch_size": 2}
  config = packing.PackingConfig(tokenizer_file=tokenizer_file, **given)
  packer = packing.Packer(config)
  batch = packer.batch(config.ramp_steps)
  assert batch["labels"].shape == (2, 6272, 4)
  assert batch["sprite"].shape == (2, 32, 196)
  kinds = {questions.KINDS[kind] for kind in batch["kind"].flat if kind >= 0}
  assert kinds <= set(KINDS)
  # None is cut off.
  assert (batch["decisive"] >= 0).sum(-1).max() < config.max_decisive
  scene, _ = asked("full")[0]
  clip = packer.clip(np.random.default_rng(0), scene, 0.0)
  owners = world.token_owners(scene).reshape(-1)
  for token in range(0, 6272, 37):
    own = scene.attributes[owners[token]] if owners[token] >= 0 else [-1] * 4
    assert clip["labels"][token].tolist() == list(own)
  tokenizer = tokenizer_lib.Tokenizer.from_directory(
    pathlib.Path(tokenizer_file).parent
  )
  words = losses.words_of(world.FULL)
  assert len(words) == 8 + 4 + 8 + 8 + 4
  assert len(set(losses.word_ids(tokenizer, world.FULL))) == len(words)


def test_the_losses_fit_together_at_real_size(tokenizer_file):
  """Shapes alone: nothing is computed."""
  changes = ["attention=xla", "pretrain.packing.batch_size=1"]
  changes += ["pretrain.packing.text_only=2"]
  config = config_lib.load(CONFIG, changes)
  folder, stage = pathlib.Path(tokenizer_file).parent, world.FULL
  tokenizer = tokenizer_lib.Tokenizer.from_directory(folder)
  model = base_models.model_of(config, tokenizer)
  pack = pretraining.packing_of(config, folder)
  assert pack.stage == stage
  params = jax.eval_shape(
    lambda rng: pretraining.init_params(rng, model, stage), jax.random.key(0)
  )
  sizes = [leaf.size for leaf in jax.tree.leaves(params["model"])]
  assert 2 * sum(sizes) < 8e6  # Bytes of bfloat16.
  assert tuple(model.grid(32, 224, 224)) == (32, 14, 14)
  family = base_models.of(config)
  prompts = base_models.prompts_of(family, model, tokenizer, pack)
  # cuDNN differentiates a masked attention of an even number of rows only.
  around = prompts.text_start - stage.num_tokens + pack.question_length
  asked = pack.questions_per_clip * pack.question_length
  assert (prompts.text_start + asked) % 2 == 0
  assert (config.pretrain.num_keep + around) % 2 == 0
  batch = packing.Packer(pack).batch(0)
  found, right = jax.eval_shape(
    lambda params, rng: losses.answer_losses(
      prompts,
      params,
      rng,
      batch,
      config=config.pretrain,
      word_ids=losses.word_ids(tokenizer, stage),
      stage=stage,
    ),
    params,
    jax.random.key(0),
  )
  assert set(found) == set(config.pretrain.weights)
  assert all(loss.shape == () for loss in found.values())
  assert right["full"].shape == right["pruned"].shape == (1, 8)


def test_a_small_stage_with_symbols_is_pretrained(tmp_path, monkeypatch):
  """As the full size is, whose two steps take minutes on a CPU."""
  one, stage = mesh_lib.make_mesh(1), world.Stage(8, 6, world.SYMBOLS)
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda: one)
  sizes = {"num_objects": (10, 12), "life": (2, 4), "long_life": (6, 8)}
  sizes["distractor_life"] = sizes["life"]
  monkeypatch.setattr(packing, "corpus", functools.partial(packing.corpus, 30))
  for name in VARIANTS:
    small = dataclasses.replace(world.VARIANTS[name], stage=stage, **sizes)
    monkeypatch.setitem(world.VARIANTS, name, small)
  changes = ["vision.image_size=96", "pretrain.min_keep=4"]
  changes += ["pretrain.num_keep=28", "pretrain.packing.dense_objects=(10,12)"]
  changes += ["pretrain.init="]
  config = config_lib.load(f"{CONFIG},debug", changes)
  folder = pretraining.pretrain(config, tmp_path)
  made = checkpoints.load(folder)
  assert made.model.processor.fixed_grid(8) == (8, 6, 6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made.params))
  rows = json.loads((tmp_path / "probe.json").read_text())
  assert set(rows) == set(VARIANTS)
  # Every clip has questions, and some token of the best tenth may be asked for.
  assert all(0 <= row["asked_0.10"] <= 1 for row in rows.values())
  asked = {
    name.split("/")[1] for row in rows.values() for name in row if "/" in name
  }
  assert asked <= set(KINDS)
  first = metrics.read(tmp_path)[0]
  assert all(first[f"loss_{name}"] > 0 for name in config.pretrain.weights)


def test_the_label_loss_reads_symbols_and_leaves_out_the_middle():
  stage = world.Stage(1, 2, ("H", "K"))
  labels = np.full((1, 4, 4), -1, np.int8)
  labels[0, 0] = 1, 2, 3, -1
  labels[0, 3] = 4, 0, 5, 1
  logits = np.random.default_rng(0).normal(size=(1, 4, 27)).astype(np.float32)
  z = logits[0].astype(np.float64)

  def entropy(row, start, size, value):
    part = z[row, start : start + size]
    return np.log(np.exp(part).sum()) - part[value]

  expected = sum(np.log1p(np.exp(-z[row, 0])) for row in (0, 3)) / 3
  expected += sum(np.log1p(np.exp(z[row, 0])) for row in (1, 2)) / 3
  for start, size, column in ((1, 8, 0), (9, 4, 1), (13, 8, 2)):
    expected += (
      sum(entropy(row, start, size, labels[0, row, column]) for row in (0, 3))
      / 3
    )
  # One of the two has a letter; all four cells are next to the middle.
  expected += entropy(3, 21, 2, 1) / 2
  found = losses.label_loss(jnp.asarray(logits), labels, stage)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_jax_draws_what_numpy_draws_at_full_size(monkeypatch):
  scene = asked("full")[0][0]
  scene = dataclasses.replace(scene, background=scene.background * 0.6)
  scene.background[1:, :3] *= 0.3
  monkeypatch.setattr(losses, "_NOISE", 0.0)
  monkeypatch.setattr(losses, "_GRAIN", 0.0)
  monkeypatch.setattr(losses, "_halve_chroma", lambda frames: frames)
  # Its first two frames are enough.
  stage = dataclasses.replace(world.FULL, num_frames=2)
  drawn = [render.slots(scene, float(time)) for time in range(2)]
  names = ("sprite", "corner", "color")
  batch = {
    name: np.stack(part)[None]
    for name, part in zip(names, zip(*drawn, strict=True), strict=True)
  }
  batch["background"] = scene.background[None]
  found = losses.draw_frames(jax.random.key(0), batch, stage)
  found = (np.asarray(found[0]) + 1) * 127.5
  still = np.zeros((224, 224, 1), np.float32)
  for time, frame in enumerate(found):
    expected = render.frame(scene, float(time), still)
    assert np.abs(frame - expected).max() <= 1.0
