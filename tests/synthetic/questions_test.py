"""Questions about scenes, answered again by brute force."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from cacovid_jax.synthetic import questions, world

VARIANTS = ("dense", "sparse")
NAMES = (tuple(world.COLOR_NAMES), world.PATTERNS, world.SHAPES)


def scene_and_questions(variant, seed, count=8):
  rng = np.random.default_rng(seed)
  scene = world.sample_scene(rng, world.VARIANTS[variant])
  return scene, questions.sample_questions(rng, scene, count)


def many(variant, scenes=25, count=8):
  for seed in range(scenes):
    scene, asked = scene_and_questions(variant, seed, count)
    for question in asked:
      yield scene, question


def described(scene, words):
  """Returns the objects that have all attributes in a text's words."""
  found = []
  words = [word for word in words.split() if any(word in n for n in NAMES)]
  assert words
  for obj, key in enumerate(scene.attributes):
    mine = {names[value] for names, value in zip(NAMES, key, strict=True)}
    if mine.issuperset(words):
      found.append(obj)
  return found


def only(scene, words):
  found = described(scene, words)
  assert len(found) == 1, (words, found)
  return found[0]


def solve(scene, question):
  """Returns the texts of the right options, from the words alone."""
  text = question.text
  if match := re.fullmatch(r"What color is the (.+)\?", text):
    key = scene.attributes[only(scene, match[1])]
    return [NAMES[0][key[0]]]
  if match := re.fullmatch(r"What pattern does the (.+) have\?", text):
    key = scene.attributes[only(scene, match[1])]
    return [NAMES[1][key[1]]]
  if match := re.fullmatch(r"What shape is the (.+) object\?", text):
    key = scene.attributes[only(scene, match[1])]
    return [NAMES[2][key[2]]]
  if match := re.fullmatch(r"Where is the (.+)\?", text):
    x, y = scene.path[only(scene, match[1])].mean(0)
    half = world.SMALL.image_size / 2
    side = "west" if x < half else "east"
    return [f"{'north' if y < half else 'south'}{side}"]
  if match := re.fullmatch(r"How many (.+) objects appear\?", text):
    return [str(len(described(scene, match[1])))]
  begins = {o: int(scene.life[only(scene, o), 0]) for o in question.options}
  if text == "Which of these appears first?":
    return [o for o in begins if begins[o] == min(begins.values())]
  match = re.fullmatch(
    r"Which of these appears (after|before) the (.+)\?", text
  )
  onset = int(scene.life[only(scene, match[2]), 0])
  if match[1] == "after":
    return [option for option in begins if begins[option] > onset]
  return [option for option in begins if begins[option] < onset]


@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_stated_option_is_right(variant):
  kinds = collections.Counter()
  for scene, question in many(variant):
    right = solve(scene, question)
    assert right == [question.options[question.answer]], question
    assert len(set(question.options)) == 4
    kinds[question.kind] += 1
  assert set(kinds) == {"attribute", "where", "first", "order", "count"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_decisive_tokens_are_those_of_all_objects_it_is_about(variant):
  sizes = []
  for scene, question in many(variant, scenes=40):
    tokens = question.tokens(scene)
    expected = set()
    for obj in question.objects:
      expected |= set(world.covered_tokens(scene, [obj]))
    assert tokens == sorted(expected)
    assert 0 <= tokens[0] and tokens[-1] < world.SMALL.num_tokens
    named = [question.text.split("?")[0].split(" the ")[-1]]
    if question.kind in ("first", "order"):
      named = [*question.options, *(named if question.kind == "order" else [])]
    about = set()
    for words in named:
      about |= set(described(scene, words))
    assert set(question.objects) == about
    sizes.append(len(tokens))
  assert np.median(sizes) <= 8


def test_dense_scenes_ask_for_more_than_a_tenth_can_keep():
  budget = world.SMALL.num_tokens // 10
  for seed in range(3):
    scene, asked = scene_and_questions("dense", seed, count=150)
    needed = set()
    for question in asked:
      needed |= set(question.tokens(scene))
    assert len(needed) >= 2 * budget


def test_the_right_option_is_anywhere_equally_often():
  places = np.zeros(4)
  for _, question in many("dense", scenes=100):
    places[question.answer] += 1
  total = places.sum()
  # 0.999 quantile of chi-square with three degrees of freedom.
  assert ((places - total / 4) ** 2 / (total / 4)).sum() < 16.3


def test_kinds_differ_in_their_number_of_decisive_tokens():
  sizes = collections.defaultdict(list)
  for scene, question in many("dense"):
    sizes[question.kind].append(len(question.tokens(scene)))
  assert np.median(sizes["attribute"]) < np.median(sizes["first"])


def test_questions_of_a_scene_differ_and_are_reproducible():
  scene, asked = scene_and_questions("dense", 7, count=20)
  assert len(asked) == 20
  wordings = {(q.text, frozenset(q.options)) for q in asked}
  assert len(wordings) == 20
  _, again = scene_and_questions("dense", 7, count=20)
  assert asked == again


def test_what_a_scene_does_not_allow_is_not_asked():
  lonely = dataclasses.replace(
    world.VARIANTS["sparse"], num_objects=(1, 1), repeats=1
  )
  rng = np.random.default_rng(0)
  scene = world.sample_scene(rng, lonely)
  asked = questions.sample_questions(rng, scene, 30)
  assert {q.kind for q in asked} <= {"attribute", "where", "count"}
  assert all(set(q.objects) == {0} for q in asked)
  # One object is counted once and is in one place.
  assert sum(q.kind == "count" for q in asked) == 1
  assert sum(q.kind == "where" for q in asked) <= 1
