"""Questions about scenes, with the tokens that their answers rest on.

Kinds: the color, shape or pattern of an object named by the other two
attributes ("attribute"), "where" an object is, which of four comes "first",
which of four comes "after" or "before" a named one ("order"), and "count". Five
harder ones, of stages with symbols: the "symbol" that an object carries, how
many objects of one name the clip shows over time ("count_over_time"), the order
in which three appear ("order_of_three"), what an object turns into ("changed"),
and where one that moves is in the last frame ("last_place"). A question is only
asked of objects that its words single out in the whole clip.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from cacovid_jax.synthetic import world

LETTERS = "ABCD"
# One word each, as colors and shapes are.
PLACES = ("northwest", "northeast", "southwest", "southeast")
# Cells from an object to a middle line, at least, for its place to be asked.
_CLEAR = 0.6
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
  frames: tuple[int, ...] | None = None  # That it is about; None is all.

  def tokens(self, scene: world.Scene) -> list[int]:
    """Returns the decisive tokens, flat and ascending."""
    return world.covered_tokens(scene, self.objects, self.frames)


class Facts:
  """What of a scene can be asked: which attribute groups are unique."""

  def __init__(self, scene: world.Scene):
    self.scene = scene
    self.keys = [tuple(int(v) for v in row) for row in scene.attributes]
    # Of objects that change: what they are called is true of a while.
    self.phases = {obj for change in scene.changes for obj in change}
    self.groups = {}
    for parts in (world.NAME, (0, 1), (0, 2), (1, 2)):
      self.groups[parts] = table = collections.defaultdict(list)
      for obj, key in enumerate(self.keys):
        table[tuple(key[p] for p in parts)].append(obj)

  def unique(self, parts: tuple[int, ...]) -> list[int]:
    """Objects singled out by these attributes alone, that keep them."""
    alone = (v[0] for v in self.groups[parts].values() if len(v) == 1)
    return [obj for obj in alone if obj not in self.phases]

  def name(self, obj: int, parts: Sequence[int] = world.NAME) -> str:
    return name_of(self.keys[obj], parts)

  def symbol(self, obj: int) -> str | None:
    """Returns the symbol that an object carries."""
    if not (symbols := self.scene.stage.symbols):
      return None
    found = self.keys[obj][len(world.NAME)]
    return None if found < 0 else symbols[found]

  def onset(self, obj: int) -> int:
    return int(self.scene.life[obj, 0])


def name_of(key: Sequence[int], parts: Sequence[int] = world.NAME) -> str:
  """Returns the words of an object's attributes."""
  return " ".join(world.ATTRIBUTES[p][key[p]] for p in sorted(parts))


def _place_at(stage, centre) -> tuple[str, float]:
  middle = (stage.side - 1) / 2
  x, y = centre / world.CELL - 0.5
  name = PLACES[2 * int(y > middle) + int(x > middle)]
  return name, min(abs(x - middle), abs(y - middle))


def place_of(scene: world.Scene, obj: int) -> tuple[str, float]:
  """Returns where an object is, and its cells to the nearer middle line."""
  return _place_at(scene.stage, scene.path[obj].mean(0))


def end_places(scene: world.Scene, obj: int) -> tuple[str, str] | None:
  """Returns where an object is when it is first and when it is last seen.

  None too close to a middle line in either frame.
  """
  found = []
  for time in scene.life[obj]:
    one = scene.life[[obj]], scene.path[[obj]], float(time)
    found.append(_place_at(scene.stage, world.centres(*one)[0]))
  names, distances = zip(*found, strict=True)
  return names if min(distances) >= _CLEAR else None


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


def _others(rng, values, right):
  """Returns the values that are not right, shuffled."""
  wrong = [value for value in values if value != right]
  return [wrong[i] for i in rng.permutation(len(wrong))]


def _attribute(rng, facts):
  asked = int(rng.integers(3))
  parts = tuple(p for p in range(3) if p != asked)
  obj = _pick(rng, facts.unique(parts))
  if obj is None:
    return None
  values = world.ATTRIBUTES[asked]
  right = values[facts.keys[obj][asked]]
  wrong = _others(rng, values, right)[:3]
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
  """Returns where an object stays, None too close to a middle line."""
  name, distance = place_of(scene, obj)
  return None if distance < _CLEAR or scene.moves(obj) else name


def _where(rng, facts):
  place = functools.partial(_clear_place, facts.scene)
  obj = _pick(rng, [o for o in facts.unique(world.NAME) if place(o)])
  if obj is None:
    return None
  right = place(obj)
  wrong = [p for p in PLACES if p != right]
  text = f"Where is the {facts.name(obj)}?"
  return _shuffled(rng, right, wrong, kind="where", text=text, objects=(obj,))


def _in_any_order(rng, facts):
  """Returns the objects that all three attributes single out, shuffled."""
  named = facts.unique(world.NAME)
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


def _symbol(rng, facts):
  obj = _pick(rng, [o for o in facts.unique(world.NAME) if facts.symbol(o)])
  if obj is None:
    return None
  right = facts.symbol(obj)
  wrong = _others(rng, facts.scene.stage.symbols, right)[:3]
  text = f"Which letter is drawn on the {facts.name(obj)}?"
  return _shuffled(rng, right, wrong, kind="symbol", text=text, objects=(obj,))


def _count_over_time(rng, facts):
  count = int(rng.integers(1, 5))
  objects = _pick(
    rng,
    [
      group
      for group in facts.groups[world.NAME].values()
      if len(group) == count and facts.phases.isdisjoint(group)
    ],
  )
  # Not of another count: the options would tell which one is likely.
  if objects is None:
    return None
  wrong = [other for other in "1234" if other != str(count)]
  name = facts.name(objects[0])
  text = f"How many different {name} objects does the clip show?"
  about = {"kind": "count_over_time", "text": text, "objects": tuple(objects)}
  return _shuffled(rng, str(count), wrong, **about)


def _order_of_three(rng, facts):
  chosen = []
  for obj in _in_any_order(rng, facts):
    gaps = [abs(facts.onset(obj) - facts.onset(other)) for other in chosen]
    if min(gaps, default=_ORDER_GAP) >= _ORDER_GAP:
      chosen.append(obj)
    if len(chosen) == 3:
      break
  else:
    return None
  appear = sorted(range(3), key=lambda i: facts.onset(chosen[i]))
  orders = [", ".join(map(str, o)) for o in itertools.permutations((1, 2, 3))]
  right = ", ".join(str(i + 1) for i in appear)
  wrong = _others(rng, orders, right)[:3]
  first, second, third = map(facts.name, chosen)
  text = (
    f"In which order do 1 the {first}, 2 the {second} and 3 the {third} appear?"
  )
  about = {"kind": "order_of_three", "text": text, "objects": tuple(chosen)}
  return _shuffled(rng, right, wrong, **about)


def _changed(rng, facts):
  groups = facts.groups[world.NAME]
  changes = [
    (before, after)
    for before, after in facts.scene.changes
    if len(groups[facts.keys[before][: len(world.NAME)]]) == 1
  ]
  if not changes:
    return None
  objects = _pick(rng, changes)
  before, after = (facts.keys[obj][: len(world.NAME)] for obj in objects)
  wrong = _others(rng, world.neighbours(before), after)
  # Those that other objects have come first: being there tells nothing.
  wrong = sorted(wrong, key=lambda name: name not in groups)[:3]
  text = f"What does the {name_of(before)} turn into?"
  about = {"kind": "changed", "text": text, "objects": objects}
  return _shuffled(rng, name_of(after), map(name_of, wrong), **about)


def _last_place(rng, facts):
  scene, places = facts.scene, {}
  last = scene.stage.num_frames - 1
  for obj in facts.unique(world.NAME):
    if scene.life[obj, 1] == last and scene.moves(obj):
      ends = end_places(scene, obj)
      if ends and ends[0] != ends[1]:
        places[obj] = ends[1]
  obj = _pick(rng, list(places))
  if obj is None:
    return None
  wrong = [place for place in PLACES if place != places[obj]]
  text = f"Where is the {facts.name(obj)} in the last frame?"
  about = {"kind": "last_place", "text": text, "objects": (obj,)}
  return _shuffled(rng, places[obj], wrong, frames=(last,), **about)


_MAKERS = {
  "attribute": _attribute,
  "where": _where,
  "first": _first,
  "order": _order,
  "count": _count,
  "symbol": _symbol,
  "count_over_time": _count_over_time,
  "order_of_three": _order_of_three,
  "changed": _changed,
  "last_place": _last_place,
}
KINDS = tuple(_MAKERS)
# How often each of them is drawn on small stages.
SHARES = world.VARIANTS["dense"].kind_shares


def sample_questions(rng, scene: world.Scene, num_questions, shares=SHARES):
  """Returns `SceneQuestion`s of different wordings about one scene.

  Fewer than asked for only if 20 draws a question do not find more; `shares`
  say how often each of the first `KINDS` is drawn.
  """
  facts, shares = Facts(scene), np.divide(shares, sum(shares))
  found: dict[str, SceneQuestion] = {}
  for _ in range(20 * num_questions):
    if len(found) == num_questions:
      break
    kind = KINDS[int(rng.choice(len(shares), p=shares))]
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
