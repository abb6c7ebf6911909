"""Questions about scenes, with the tokens that their answers rest on.

Six kinds: the color, shape or pattern of an object named by the other two
attributes ("attribute"), "where" an object is, which of four comes "first",
which of four comes "after" or "before" a named one ("order"), and "count". A
question is only asked of objects that its words single out in the whole clip.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from cacovid_jax.synthetic import world

LETTERS = "ABCD"
# One word each, as colors and shapes are.
PLACES = ("northwest", "northeast", "southwest", "southeast")
# Sampled frames between two first appearances, at least, for their order to
# be asked.
_ORDER_GAP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneQuestion:
  """A lettered question about one scene."""

  kind: str  # Of `KINDS`.
  text: str  # Without options.
  options: tuple[str, ...]  # Without letters, in the order shown.
  answer: int  # Index of the right option.
  objects: tuple[int, ...]  # That the question is about.

  def tokens(self, scene: world.Scene) -> list[int]:
    """Returns the decisive tokens, flat and ascending."""
    return world.covered_tokens(scene, self.objects)


class Facts:
  """What of a scene can be asked: which attribute groups are unique."""

  def __init__(self, scene: world.Scene):
    self.scene = scene
    self.keys = [tuple(int(v) for v in row) for row in scene.attributes]
    self.groups = {}
    for parts in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):
      self.groups[parts] = table = collections.defaultdict(list)
      for obj, key in enumerate(self.keys):
        table[tuple(key[p] for p in parts)].append(obj)

  def unique(self, parts: tuple[int, ...]) -> list[int]:
    """Objects singled out by these attributes alone."""
    return [v[0] for v in self.groups[parts].values() if len(v) == 1]

  def name(self, obj: int, parts: Sequence[int] = (0, 1, 2)) -> str:
    key = self.keys[obj]
    return " ".join(world.ATTRIBUTES[p][key[p]] for p in sorted(parts))

  def onset(self, obj: int) -> int:
    return int(self.scene.life[obj, 0])


def place_of(scene: world.Scene, obj: int) -> tuple[str, float]:
  """Returns where an object is, and its cells to the nearer middle line."""
  middle = (world.NUM_ROWS - 1) / 2
  x, y = scene.path[obj].mean(0) / world.CELL - 0.5
  name = PLACES[2 * int(y > middle) + int(x > middle)]
  return name, min(abs(x - middle), abs(y - middle))


def _pick(rng, items):
  return items[int(rng.integers(len(items)))] if len(items) else None


def _shuffled(rng, right, wrong, **fields):
  """Returns a question whose options are shuffled."""
  options = [right, *wrong]
  order = rng.permutation(len(options))
  return SceneQuestion(
    options=tuple(options[i] for i in order),
    answer=int(np.flatnonzero(order == 0)[0]),
    **fields,
  )


def _attribute(rng, facts):
  asked = int(rng.integers(3))
  parts = tuple(p for p in range(3) if p != asked)
  obj = _pick(rng, facts.unique(parts))
  if obj is None:
    return None
  values = world.ATTRIBUTES[asked]
  right = values[facts.keys[obj][asked]]
  wrong = [value for value in values if value != right]
  wrong = [wrong[i] for i in rng.permutation(len(wrong))[:3]]
  name = facts.name(obj, parts)
  text = (
    f"What color is the {name}?",
    f"What pattern does the {name} have?",
    f"What shape is the {name} object?",
  )[asked]
  return _shuffled(
    rng, right, wrong, kind="attribute", text=text, objects=(obj,)
  )


def _clear_place(scene, obj):
  """Returns where an object is, None too close to a middle line."""
  name, distance = place_of(scene, obj)
  return None if distance < 0.6 else name


def _where(rng, facts):
  place = functools.partial(_clear_place, facts.scene)
  obj = _pick(rng, [o for o in facts.unique((0, 1, 2)) if place(o)])
  if obj is None:
    return None
  right = place(obj)
  wrong = [p for p in PLACES if p != right]
  text = f"Where is the {facts.name(obj)}?"
  return _shuffled(rng, right, wrong, kind="where", text=text, objects=(obj,))


def _in_any_order(rng, facts):
  """Returns the objects that all three attributes single out, shuffled."""
  named = facts.unique((0, 1, 2))
  return [named[i] for i in rng.permutation(len(named))]


def _of_names(rng, facts, right, wrong, about=(), **fields):
  """Returns a question whose options are objects."""
  return _shuffled(
    rng,
    facts.name(right),
    [facts.name(obj) for obj in wrong],
    objects=(*about, right, *wrong),
    **fields,
  )


def _first(rng, facts):
  named = _in_any_order(rng, facts)
  # Any object may be the first of four: its rivals are drawn after it.
  for obj in named[:4]:
    soonest = facts.onset(obj) + _ORDER_GAP
    later = [o for o in named if facts.onset(o) >= soonest]
    if len(later) >= 3:
      text = "Which of these appears first?"
      return _of_names(rng, facts, obj, later[:3], kind="first", text=text)
  return None


def _order(rng, facts):
  after = bool(rng.integers(2))
  named = _in_any_order(rng, facts)
  for obj in named[:4]:
    onset = facts.onset(obj)
    later = [o for o in named if facts.onset(o) >= onset + _ORDER_GAP]
    earlier = [o for o in named if facts.onset(o) <= onset - _ORDER_GAP]
    right, wrong = (later, earlier) if after else (earlier, later)
    if right and len(wrong) >= 3:
      word = "after" if after else "before"
      text = f"Which of these appears {word} the {facts.name(obj)}?"
      return _of_names(
        rng, facts, right[0], wrong[:3], (obj,), kind="order", text=text
      )
  return None


def _count(rng, facts):
  groups = facts.groups[(0, 2)].values()
  count = int(rng.integers(1, 5))
  objects = _pick(rng, [g for g in groups if len(g) == count])
  if objects is None:
    objects = _pick(rng, [g for g in groups if len(g) <= 4])
  if objects is None:
    return None
  right = str(len(objects))
  wrong = [count for count in "1234" if count != right]
  text = f"How many {facts.name(objects[0], (0, 2))} objects appear?"
  about = {"kind": "count", "text": text, "objects": tuple(objects)}
  return _shuffled(rng, right, wrong, **about)


_MAKERS = {
  "attribute": _attribute,
  "where": _where,
  "first": _first,
  "order": _order,
  "count": _count,
}
KINDS = tuple(_MAKERS)
# How often each of them is drawn for the benchmark.
SHARES = (0.3, 0.15, 0.2, 0.2, 0.15)


def sample_questions(rng, scene: world.Scene, num_questions, shares=SHARES):
  """Returns `SceneQuestion`s of different wordings about one scene.

  Fewer than asked for only if 20 draws a question do not find more; `shares`
  say how often each of `KINDS` is drawn.
  """
  facts, shares = Facts(scene), np.divide(shares, sum(shares))
  found: dict[str, SceneQuestion] = {}
  for _ in range(20 * num_questions):
    if len(found) == num_questions:
      break
    kind = KINDS[int(rng.choice(len(KINDS), p=shares))]
    question = _MAKERS[kind](rng, facts)
    if question is not None:
      wording = question.text + "|".join(sorted(question.options))
      found.setdefault(wording, question)
  return list(found.values())


def caption(rng, scene: world.Scene, num_objects: int = 4) -> str:
  """Returns a sentence on some objects of a scene, in order of appearance.

  Of those that their attributes single out one is left out, so that a second
  caption may differ.
  """
  facts = Facts(scene)
  named = _in_any_order(rng, facts)
  told = named[: max(1, min(num_objects, len(named) - 1))]
  parts = []
  for obj in sorted(told, key=facts.onset):
    place = _clear_place(scene, obj)
    where = f" in the {place}" if place else ""
    parts.append(f"a {facts.name(obj)}{where}")
  return f"There is {', then '.join(parts)}."
