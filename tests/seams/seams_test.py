"""Sampler, objective and reward of one's own: trained, evaluated, refused."""

import difflib
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax.evals import evaluation
from cacovid_jax.models import token_grid
from cacovid_jax.policy import loading, network, objective, sampling
from cacovid_jax.training import ratio, rollout, seams
from tests.evals import tiny as evals_tiny
from tests.seams import device_reward, plain_sampler, rloo_objective
from tests.training import tiny

FOLDER = os.path.dirname(__file__)
POLICY = "tests.policy.bilinear_policy:Bilinear"  # Compiles sooner.
# Key, file and name, overrides beside it.
SEAMS = {
  "objective.module": (
    "rloo_objective.py:RLOO",
    ["objective.entropy_weight=0.01"],
  ),
  "rollout.reward": ("device_reward.py:probability", ["rollout.temperature=2"]),
  "rollout.reward on the host": (
    "host_reward.py:similarity",
    ["rollout.ignore_case=false", "rollout.max_new_tokens=3"],
  ),
  "sampling.module": ("plain_sampler.py:Plain", ["sampling.temperature=0.5"]),
}


def config(*overrides, **changes):
  return config_lib.replace(tiny.config(**changes), {}, overrides)


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
  return evals_tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return evals_tiny.write_data(tmp_path_factory.mktemp("blocks"), num_clips=1)


@pytest.mark.parametrize("seam", SEAMS)
def test_a_file_of_ones_own_is_trained_evaluated_and_recorded(
  seam, tmp_path, checkpoint_dir, data_dir
):
  key, (spec, options) = seam.partition(" ")[0], SEAMS[seam]
  name, _, thing = spec.partition(":")
  file, workdir = tmp_path / name, tmp_path / "run"
  shutil.copy(os.path.join(FOLDER, name), file)
  # What says which options there are may stand behind them.
  overrides = ["policy.rank=4", *options, f"{key}={file}:{thing}"]
  overrides += [f"policy.module={POLICY}", "total_steps=2", "iterations=1"]
  made = config(*overrides)
  checkpoint = evals_tiny.load_checkpoint(checkpoint_dir)
  seen = []

  def train(made):
    return tiny.train(
      workdir,
      made,
      checkpoint=checkpoint,
      on_step=lambda *given: seen.append(given[1:]),
    )

  result = train(made)
  start = result.run.init_params()
  assert start["question"]["kernel"].shape == (32, 4)
  moved = jax.tree.map(
    lambda a, b: bool(np.any(np.asarray(a) != b)), result.state.params, start
  )
  assert any(jax.tree.leaves(moved))
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  metrics = json.loads(rows[-1])
  assert np.isfinite(metrics["loss"]) and metrics["skipped_update"] == 0
  assert ("reward_frame" in metrics) == (key != "sampling.module")
  if "host" in seam:
    for questions, ids, rewards in seen:
      _check_similarity(checkpoint.tokenizer, questions, ids, rewards)

  spec = f"{workdir}?module={POLICY}"
  loaded = loading.load_policy(spec, checkpoint)
  jax.tree.map(
    np.testing.assert_array_equal, loaded.params, result.state.params
  )
  experiment = evals_tiny.experiment(
    tmp_path / "evaluation",
    data=data_dir,
    checkpoint=checkpoint_dir,
    policies={"policy": spec},
    methods=("cacovid",),
    ratios=(0.1,),
    batch_size=2,
    max_new_tokens=2,
  )
  out = evaluation.evaluate(experiment)
  assert out["methods"]["cacovid"]["0.10"]["kept_tokens"] == 6

  described = json.loads((workdir / "policy/policy_config.json").read_text())
  assert described["policy"]["rank"] == 4
  digest = hashlib.sha256(file.read_bytes()).hexdigest()
  assert described["code"][key] == digest
  file.write_text(file.read_text() + "# Changed.\n")
  with pytest.raises(
    errors.UserError, match=rf"config\.{key} is not.*accept_changed_code"
  ):
    train(made)
  train(config("ckpt.accept_changed_code=true", *overrides))


def _check_similarity(tokenizer, questions, ids, rewards):
  assert rewards.shape == ids.shape[:3]
  for question, row, given in zip(questions, ids, rewards, strict=True):
    for index in np.ndindex(given.shape):
      text = tokenizer.decode(row[index]).strip()
      ratio_of = difflib.SequenceMatcher(None, question.answer, text).ratio()
      assert given[index] == np.float32(ratio_of)


_BAD = """
import dataclasses, jax, jax.numpy as jnp
from cacovid_jax.policy import sampling

def f64(scores, old, memory, grid):
  with jax.enable_x64(True):
    return scores.token.sum().astype(jnp.float64), {}

def by_token(scores, old, memory, grid):
  return scores.token[:, 0], {}

def no_metrics(scores, old, memory, grid):
  return scores.token.sum()

def metric(scores, old, memory, grid):
  return scores.token.sum(), {"count": memory.token_valid.sum()}

def letters(answers, target):
  return answers.ids[:, 0]

def column(answers, target):
  return answers.ids.astype(jnp.float32)

def three(question, texts):
  return [0.0, 1.0, 0.5]
three.on_host = True

def words(question, texts):
  return texts
words.on_host = True

@dataclasses.dataclass(frozen=True)
class More:
  modes = sampling.Modes(token=4)
  more: int = 1
  def sample(self, rng, scores, features, plan):
    index = jnp.zeros((4, plan.shape.num_keep + self.more), jnp.int32)
    return sampling.Combinations(index, jnp.zeros((0, 4), bool))

class Frames(More):
  modes = sampling.Modes(token=3, frame=1)
  def sample(self, rng, scores, features, plan):
    index = jnp.zeros((4, plan.shape.num_keep), jnp.int32)
    return sampling.Combinations(index, jnp.zeros((0, 4), bool))

class Nothing(More):
  modes = sampling.Modes(token=0)

class NoModes:
  def sample(self, rng, scores, features, plan): ...

@dataclasses.dataclass
class Thawed:
  more: int = 0

@dataclasses.dataclass(frozen=True)
class Needs:
  temperature: float
"""
_RETURNS = r"it must return"


@pytest.mark.parametrize(
  ("key", "name", "message"),
  [
    (
      "objective.module",
      "f64",
      r"f64' returns \(float64\[\], \{\}\); it must return \(float32\[\], \{\}",
    ),
    ("objective.module", "by_token", rf"float32\[64\], .*{_RETURNS}"),
    ("objective.module", "no_metrics", r"float32\[\]; it.*\(float32\[\], \{na"),
    ("objective.module", "metric", r"count: int32\[\]\}.*count: float32\[\]\}"),
    ("objective.module", "jnp", "is no class or function"),
    ("objective.module", "none", "has no none"),
    ("rollout.reward", "letters", r"int32\[8\]; it must return float32\[8\]"),
    ("rollout.reward", "column", r"float32\[8, 1\]; it must return float32"),
    ("rollout.reward", "three", r"float64\[3\] for question q0.* 8 answers"),
    ("rollout.reward", "words", "one number for each"),
    ("sampling.module", "More", r"\(int32\[4, 9\], .*return \(int32\[4, 8\]"),
    ("sampling.module", "Frames", r"bool\[0, 4\].*return .*bool\[1, 4\]"),
    ("sampling.module", "Nothing", "at least one combination"),
    ("sampling.module", "NoModes", "lacks modes"),
    ("sampling.module", "Thawed", "frozen dataclass"),
    ("objective.module", "Needs", "give its options defaults"),
  ],
)
def test_a_wrong_seam_is_one_line(key, name, message, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(_BAD)
  made = config(f"{key}={file}:{name}", f"policy.module={POLICY}")
  with pytest.raises(errors.UserError, match=message) as caught:
    tiny.train(tmp_path / "run", made)
  assert "\n" not in str(caught.value)
  assert key in str(caught.value) or key.partition(".")[0] in str(caught.value)


RLOO = f"objective.module={FOLDER}/rloo_objective.py:RLOO"
PLAIN = f"sampling.module={FOLDER}/plain_sampler.py:Plain"


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (
      ["objective.entropy_wieght=1", RLOO],
      "config.objective.entropy_wieght: RLOO has no.*'entropy_weight'; correct",
    ),
    ([RLOO, "objective.kl_weight=1"], "RLOO has no option 'kl_weight'"),
    ([PLAIN, "sampling.group_size=3"], "Plain has no option 'group_size'"),
    (["objective.entropy_weight=1"], "unknown config key"),
    (
      ["policy.rnk=8", f"policy.module={POLICY}"],
      "Bilinear has no option 'rnk', the nearest is 'rank'",
    ),
  ],
)
def test_an_option_that_a_module_lacks_is_one_line(overrides, message):
  with pytest.raises(errors.UserError, match=message):
    config(*overrides)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sampling.temperatur": 1.0}, "SamplingConfig has no option 'temperatur'"),
    ({"rollout.rewards": "margin"}, "no option 'rewards', the near.* 'reward'"),
    ({"objective.klweight": 1.0}, "the nearest is 'kl_weight'"),
    ({"sampling.frame_cap": "half"}, "must be one of per_frame, public"),
    ({"optimizer.schedule": "linear"}, "one of cosine, cosine_repeated"),
    ({"ratio.adaptive": True}, "rollout.reward=margin is graded"),
  ],
)
def test_mistakes_in_the_papers_own_are_named(changes, message, tmp_path):
  made = tiny.config(**changes)
  with pytest.raises(errors.UserError, match=message):
    tiny.train(tmp_path, made)


def test_options_reach_what_they_are_of():
  found = seams.load(
    config(
      RLOO,
      PLAIN,
      f"rollout.reward={FOLDER}/device_reward.py:probability",
      "rollout.temperature=2.0",
      "objective.entropy_weight=0.5",
      "sampling.num_combinations=12",
    )
  )
  assert found.objective.entropy_weight == 0.5
  assert sum(found.sampler.modes) == 12
  assert found.rollout.function.keywords == {"temperature": 2.0}
  assert found.rollout.answer_length == 1 and found.rollout.graded
  assert set(found.code) == {
    "objective.module",
    "sampling.module",
    "rollout.reward",
  }
  assert seams.load(tiny.config()).code == {}


def test_the_place_of_a_reward_is_its_own():
  spec = f"rollout.reward={FOLDER}/host_reward.py:similarity"
  with pytest.raises(errors.UserError, match="runs on the host"):
    seams.load(config(spec, "rollout.marking=device"))
  spec = f"rollout.reward={FOLDER}/device_reward.py:probability"
  with pytest.raises(errors.UserError, match="on the device"):
    seams.load(config(spec, "rollout.marking=host"))


def test_rloo_of_two_combinations_by_hand():
  # Kept and dropped with rewards 1 and 0: advantages 1 and -1. At equal scores
  # both log-probs are log 1/2, and that of keeping rises by 1/2 with its score.
  memory = objective.Memory(
    np.array([[True], [False]]),
    np.float32([1, 0]),
    np.ones(2, bool),
    np.zeros((2, 1), bool),
    np.zeros(2, np.float32),
    np.zeros(2, bool),
  )
  scores = network.Scores(frame=jnp.zeros((1, 2)), token=jnp.zeros((1, 2)))
  grid = token_grid.TokenGrid.of((1, 1, 1))

  def loss(scores, weight):
    return rloo_objective.RLOO(weight)(scores, scores, memory, grid)[0]

  grads = jax.grad(loss)(scores, 0.0)
  np.testing.assert_allclose(loss(scores, 0.0), 0.0, atol=1e-7)
  np.testing.assert_allclose(grads.token, [[0.5, -0.5]])
  np.testing.assert_allclose(grads.frame, [[0.0, 0.0]])
  # The entropy of a fair choice, of tokens and of frames.
  np.testing.assert_allclose(loss(scores, 1.0), -2 * np.log(2), rtol=1e-6)


def test_the_probability_of_a_letter_by_hand():
  logits = jnp.log(jnp.array([[4.0, 1.0, 3.0, 9.0]]))
  answers = rollout.Answers(jnp.zeros((1, 1), jnp.int32), logits)
  target = rollout.Target(
    jnp.int32(1), jnp.array([1, 2, -1]), jnp.zeros(4, jnp.int32)
  )
  found = device_reward.probability(answers, target)
  np.testing.assert_allclose(found, [1 / 4], rtol=1e-6)


def test_a_plain_sampler_in_a_bucket_draws_the_videos_own_tokens():
  sampler = plain_sampler.Plain(num_combinations=6)
  bucket = token_grid.GridBucket(3, 10, 24)
  ladder = ratio.make_ladder(bucket, sampler, ratio.RatioConfig(), fixed=0.25)
  grid = (2, 2, 4)  # 16 tokens, 2 of each frame are kept.
  rng = np.random.default_rng(0)
  scores = network.Scores(
    frame=jnp.zeros((3, 2)), token=jnp.asarray(rng.normal(size=(24, 2)))
  )
  rungs = ladder.rungs(grid)
  drawn, count = sampling.sample_rung(
    jax.random.key(0),
    scores,
    jnp.zeros((24, 4)),
    rungs.plans,
    rungs.start,
    num_keep=ladder.num_keep[0],
    sampler=sampler,
  )
  index = np.asarray(drawn.index)
  assert count == 4 and ladder.num_combinations == 6
  assert (index[:, 4:] == 24).all() and (np.diff(index[:, :4]) > 0).all()
  assert index[:, :4].max() < 16 and drawn.frame_mask.shape == (0, 3)
  gap = np.asarray(scores.token)[:16] @ [-1, 1]
  np.testing.assert_array_equal(index[0, :4], np.sort(np.argsort(-gap)[:4]))
