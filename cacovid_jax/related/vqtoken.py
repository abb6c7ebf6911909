"""VQToken's trained form: next-token loss through the means of clusters.

The published code trains tower, projector and language model through means
whose labels are constants (https://arxiv.org/abs/2503.16980). Here the tower is
frozen; a linear map stands for the projector, which of means is the mean of
mapped tokens, and the language model is trained or frozen.

Axes: n clips, N video tokens, K clusters, B questions, D width.
"""

import functools

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.related import answers as answers_lib
from cacovid_jax.related import clips as clips_lib
from cacovid_jax.related import fitting
from cacovid_jax.related import study as study_lib
from cacovid_jax.synthetic import world

FROZEN, MAPPED, TUNED = "means, frozen", "means, map", "means, map and model"
UNIT, RELEASED = "unit means, frozen", "unit means, map and model (released)"
UNIFORM, TUNED_UNIFORM = "uniform, frozen", "uniform, map and model"
# Arm -> (method, whether the map is trained, whether the model is).
_ARMS = {
  FROZEN: ("vqtoken", False, False),
  MAPPED: ("vqtoken", True, False),
  TUNED: ("vqtoken", True, True),
  UNIT: ("vqtoken?codes=unit", False, False),
  RELEASED: ("vqtoken?codes=unit", True, True),
  UNIFORM: ("uniform", False, False),
  TUNED_UNIFORM: ("uniform", True, True),
}


def mapped(params, rows):
  """Returns float32[..., D] of rows float32[..., D]; nothing changes at first.

  `params` are {} or {"kernel": [D, D], "bias": [D]}.
  """
  if "kernel" not in params:
    return rows
  return rows + rows @ params["kernel"] + params["bias"]


def _loss(answers, batch, params, data, rng, step):
  model, clips, asked = data
  which = jax.random.randint(rng, [batch], 0, len(asked.ids))
  own = jax.tree.map(lambda x: x[asked.clip[which]], clips)
  return answers.loss(
    params.get("model", model), mapped(params["map"], own.rows), own.index,
    asked.ids[which], asked.letter[which],
  )  # fmt: skip


def train(answers, clips, settings, seed, tuned, folder=None):
  """Returns {"map", and if `tuned` "model"} trained on `Rows` of clips."""
  width = clips.rows.shape[-1]
  start = {
    "map": {"kernel": jnp.zeros((width, width)), "bias": jnp.zeros(width)}
  }
  if tuned:
    # A copy: the shipped one answers for other arms.
    start["model"] = jax.tree.map(jnp.array, answers.params)
  asked = answers.asked("train")._replace(features=None)
  return fitting.fit(
    (_loss, answers, settings.batch), start, (answers.params, clips, asked),
    jax.random.key(seed), settings.fit, folder=folder,
  )  # fmt: skip


def _arms(settings, answers, num_keep, folder, seed):
  out, test = {}, answers.asked("test")
  rng = jax.random.key(seed)
  for place, (arm, (spec, maps, tunes)) in enumerate(_ARMS.items()):
    given = dict(spec=spec, num_keep=num_keep)
    params = {"map": {}}
    if maps:
      clips = clips_lib.rows_of(rng, answers.asked("train").features, **given)
      at = folder and folder / f"{answers.variant}_{num_keep}_{place}_{seed}"
      params = train(answers, clips, settings, seed, tunes, at)
    own = clips_lib.rows_of(jax.random.fold_in(rng, 1), test.features, **given)
    right = answers.hits(
      lambda which, own=own, params=params: (
        mapped(params["map"], own.rows[test.clip[which]]),
        own.index[test.clip[which]],
      ),
      params.get("model"),
    )
    out[arm] = {"tokens": float(num_keep), "accuracy": right}
  return out


def study(settings, clips, folder=None) -> study_lib.Study:
  """Returns the comparison of trained with frozen at numbers of clusters.

  Raises:
    UserError: no sizes, or a clip has fewer tokens than clusters.
  """
  del clips
  for _, num_keep in settings.sizes:
    errors.check(
      num_keep < world.SMALL.num_tokens,
      f"vqtoken: {num_keep} clusters of {world.SMALL.num_tokens} tokens; give"
      " fewer in config.vqtoken.sizes",
    )
  cases = answers_lib.cases(
    "vqtoken", settings, _arms, folder, lambda count: f"{count} clusters"
  )

  def bars(outcome):
    case = next(iter(cases))
    gap = functools.partial(outcome.gap, case, measure="accuracy")
    least = study_lib.Bar.least
    return [
      least(f"{case}: {one} less {other}", min(gap(one, other)), 0.0)
      for one, other in (
        (MAPPED, FROZEN), (TUNED, FROZEN), (RELEASED, UNIT),
        (TUNED, TUNED_UNIFORM),
      )
    ]  # fmt: skip

  shown = list(cases), "accuracy", "accuracy (chance 0.25)"
  return study_lib.Study("VQToken, trained", cases, bars, shown)
