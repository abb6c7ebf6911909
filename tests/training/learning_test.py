"""The whole step learns: a model that must see marked tokens to answer.

The stand-in for the video LLM answers right if, and only if, it sees enough
tokens with a mark in their first feature. For token mode one of 64 tokens has
it, and a blind combination of 8 holds it in 1 of 8 cases. For frame mode all 16
tokens of one frame have it and 4 must be seen: token mode, with 2 of each
frame, never does, and a blind draw of one frame does in 1 of 4 cases.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.policy import objective
from tests.training import tiny

RIGHT, WRONG = 2, 3
_AREA = tiny.NUM_VIDEO // tiny.FRAMES


@dataclasses.dataclass(frozen=True)
class Spotter:
  """Answers RIGHT if enough visible rows carry the mark."""

  def embed_prompt(self, params, ids, features, video_rows):
    del params
    x = jnp.zeros((ids.shape[0], features.shape[1]))
    return x.at[video_rows].set(features)

  def prefill(self, params, x, positions, lengths, **unused):
    del positions, unused
    visible = jnp.arange(x.shape[1]) < lengths[:, None]
    seen = jnp.sum(visible & (x[..., 0] > 2.0), axis=1) >= params["needed"]
    logits = jnp.zeros((x.shape[0], tiny.VOCABULARY))
    logits = logits.at[:, RIGHT].set(jnp.where(seen, 5.0, 1.0))
    return logits.at[:, WRONG].set(3.0), None, {}


def batch(seed, marked, videos=8):
  """Returns a batch with `marked` tokens, of one frame, marked per video."""
  made = tiny.batch(videos, seed)
  rng = np.random.default_rng(seed)
  frames = rng.integers(0, tiny.FRAMES, videos)
  video = made.prompts.features.copy()
  video[..., 0] = 0.0
  for row, frame in enumerate(frames):
    tokens = frame * _AREA + rng.permutation(_AREA)[:marked]
    video[row, tokens, 0] = 8.0
  return made.replace(
    prompts=made.prompts._replace(features=video),
    answer_id=np.full(videos, RIGHT, np.int32),
    decisive_frames=np.eye(tiny.FRAMES, dtype=bool)[frames],
  )


def curves(needed, marked, reward, steps=60, **credit):
  """Returns {metric: f32[steps]} of a run."""
  config = dataclasses.replace(
    tiny.step_config(
      reward=reward, iterations=3, learning_rate=2e-2, total_steps=steps
    ),
    model=Spotter(),
    objective=objective.ObjectiveConfig(**credit),
  )
  # As data, so that both uses share a program.
  weights = tiny.constants(tiny.step_config())
  weights = weights.replace(params={"needed": np.int32(needed)})
  batches = [batch(seed, marked) for seed in range(steps)]
  _, _, outs = tiny.run(config, batches, weights=weights)
  return {
    name: np.array([metrics.mean[name].mean() for _, _, metrics in outs])
    for name in outs[0][2].mean
  }


def test_token_head_learns_to_keep_the_decisive_token():
  found = curves(needed=1, marked=1, reward="accuracy")
  greedy = found["reward_token_greedy"]
  assert greedy[:2].mean() < 0.6
  assert greedy[-5:].mean() > 0.8


@pytest.mark.parametrize("frame_credit", ["row", "frame"])
def test_frame_head_learns_to_draw_the_decisive_frame(frame_credit):
  found = curves(4, _AREA, "accuracy", frame_credit=frame_credit)
  np.testing.assert_allclose(found["decisive_chance"], 0.25)
  assert found["decisive_frame"][-5:].mean() > 0.9
  assert found["reward_frame_greedy"][-5:].mean() > 0.9
  assert not found["reward_token"].any()


def test_graded_reward_teaches_the_same():
  greedy = curves(needed=1, marked=1, reward="margin")["reward_token_greedy"]
  assert greedy[-5:].mean() > 0.8 * 2 - 0.2 * 2  # 2 if right, else -2.
