"""QueCC in front of the frozen base model, trained on answers.

On their letters, and to give questions the keys and values that whole clips
give. At the same number of rows: with the question and without it, cells
averaged as they are and with a trained map, and tokens that a policy or a rule
selects.

Axes: B questions, T frames, H W token grid of one, S cells along a side, D
width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.related import answers as answers_lib
from cacovid_jax.related import fitting, quecc
from cacovid_jax.related import study as study_lib
from cacovid_jax.synthetic import world

# Without training, at the budget of a whole clip.
_SELECTED = {
  "CaCoVID, selected": "cacovid?importance_ratio=1.0&budget=clip",
  "uniform, selected": "uniform",
}
QUECC, BLIND, MEAN = "QueCC", "blind", "average"
MAPPED = "average, trained map"


class Mapped(nn.Module):
  """Averages of cells, plus what two layers make of them: nothing at first."""

  side: int
  width: int = 0  # 0 is the averages alone.

  @nn.compact
  def __call__(self, x, question):
    """Returns float32[T, S * S, D] of [T, H, W, D], whatever is asked."""
    del question
    x = quecc.mean_of_cells(x, self.side)
    if not self.width:
      return x
    h = nn.gelu(nn.Dense(self.width, name="hidden")(x))
    zeros = nn.initializers.zeros
    return x + nn.Dense(x.shape[-1], kernel_init=zeros, name="out")(h)


def _modules(settings, side):
  """Returns {arm: module} of what is trained."""
  sizes = side, settings.width, settings.heads
  return {
    QUECC: quecc.QueCC(*sizes),
    BLIND: quecc.QueCC(*sizes, blind=True),
    MAPPED: Mapped(side, settings.width),
  }


def compress(answers, module, params, features, ids, unused_letter):
  """Returns (rows float32[B, T * S * S, D], int32[B, T * S * S]) of a batch."""
  x = features.reshape(len(ids), *world.SMALL.grid, -1)
  one = functools.partial(module.apply, {"params": params})
  rows = jax.vmap(one)(x, answers.text(ids))
  rows = rows.reshape(len(ids), -1, rows.shape[-1])
  index, _ = quecc.places(world.SMALL.grid, module.side)
  return rows, jnp.broadcast_to(index, rows.shape[:2])


def accuracy(answers, module, params):
  """Returns the share of test questions answered right behind a module."""
  return answers.accuracy(functools.partial(compress, answers, module), params)


def _loss(answers, module, batch, params, data, rng, step):
  model, asked, heard = data
  which = jax.random.randint(rng, [batch], 0, len(asked.ids))
  features, ids, letter = asked.take(which)
  made = compress(answers, module, params, features, ids, letter)
  own = None if heard is None else heard[which]
  return answers.loss(model, *made, ids, letter, own)


def train(answers, module, settings, seed, folder=None):
  """Returns the parameters of a module, trained before the frozen model."""
  grid, width = world.SMALL.grid, answers.prompts.model.config.text.hidden_size
  start = module.init(
    jax.random.key(seed), jnp.zeros((*grid, width)), jnp.zeros(width)
  )["params"]
  heard = answers.heard() if settings.distil else None
  data = answers.params, answers.asked("train"), heard
  return fitting.fit(
    (_loss, answers, module, settings.batch), start, data,
    jax.random.key(seed), settings.fit, folder=folder,
  )  # fmt: skip


@functools.cache
def _untrained(answers, side):
  """Returns the arms of S * S tokens a frame that no seed changes."""
  num_keep = world.SMALL.num_frames * side**2
  out = {MEAN: accuracy(answers, Mapped(side), {})}
  for name, spec in _SELECTED.items():
    out[name] = answers.accuracy(answers.method(spec, num_keep))
  return out


def _arms(settings, answers, side, folder, seed):
  out = dict(_untrained(answers, side))
  for name, module in _modules(settings, side).items():
    at = f"{answers.variant}_{side}_{name.replace(', ', '_')}_{seed}"
    at = folder and folder / at.replace(" ", "_")
    params = train(answers, module, settings, seed, at)
    if name in (QUECC, BLIND) and folder:
      quecc.save(at.with_suffix(".safetensors"), params)
    out[name] = accuracy(answers, module, params)
  tokens = world.SMALL.num_frames * side**2
  found = {
    name: {"tokens": float(tokens), "accuracy": value}
    for name, value in out.items()
  }
  whole = {"tokens": float(world.SMALL.num_tokens), "accuracy": _whole(answers)}
  return found | {"the whole video": whole}


@functools.cache
def _whole(answers) -> float:
  # Of cells of one token.
  return accuracy(answers, Mapped(world.SMALL.side), {})


def study(settings, clips, folder=None) -> study_lib.Study:
  """Returns the comparison at each number of tokens a frame.

  Raises:
    UserError: no sizes, cells along a side that do not fit the grid, or heads
      that do not divide the width.
  """
  del clips
  errors.check(
    settings.width % settings.heads == 0,
    f"config.quecc_llm.width {settings.width}: give a multiple of"
    f" heads={settings.heads}",
  )
  for _, side in settings.sizes:
    quecc.places(world.SMALL.grid, side)
  cases = answers_lib.cases(
    "quecc_llm", settings, _arms, folder, lambda side: f"{side**2} a frame",
    settings.policy,
  )  # fmt: skip

  def bars(outcome):
    first, *_, last = [*cases] * 2
    gap = functools.partial(outcome.gap, measure="accuracy")
    out = [
      study_lib.Bar.least(
        f"{first}: QueCC less {other}", min(gap(first, QUECC, other)), 0.1
      )
      for other in (BLIND, MAPPED, MEAN)
    ]
    if last != first:
      least = max(gap(last, QUECC, BLIND))
      told = f"{last}: QueCC less {BLIND}"
      out.append(study_lib.Bar.most(told, least, 0.05))
    return out

  shown = list(cases), "accuracy", "accuracy (chance 0.25)"
  title = "QueCC in front of the base model"
  return study_lib.Study(title, cases, bars, shown)
