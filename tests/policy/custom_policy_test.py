"""A policy from a user's own file, from its name to its weights on disk."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.models import qwen2, token_grid
from cacovid_jax.policy import modules, network, objective, selection

FILE = os.path.join(os.path.dirname(__file__), "bilinear_policy.py")
GRID = (2, 2, 3)
ROWS = np.arange(2, 14)


def make(**options):
  policy_class = modules.load_policy_module(f"{FILE}:Bilinear")
  # As the trainer calls it: with the options of every policy.
  policy = policy_class.from_llm_config(
    qwen2.Qwen2Config.tiny(), dtype=jnp.bfloat16, num_halvings=4, **options
  )
  return policy, policy.init_from_llm(jax.random.key(0), {})


def test_an_empty_name_is_the_papers_policy():
  assert modules.load_policy_module("") is network.Policy


def test_a_class_of_a_module_on_the_path():
  name = "cacovid_jax.policy.network:Policy"
  assert modules.load_policy_module(name) is network.Policy


def test_it_scores_learns_and_selects():
  policy, params = make(rank=4)
  assert params["question"]["kernel"].shape == (32, 4)
  x = jax.random.normal(jax.random.key(1), (16, 32))
  positions = jnp.arange(16)[None]
  memory = objective.Memory(
    token_mask=np.arange(24).reshape(2, 12) % 3 == 0,
    token_reward=np.float32([0, 1]),
    token_valid=np.ones(2, bool),
    frame_mask=np.eye(2, dtype=bool),
    frame_reward=np.float32([0, 1]),
    frame_valid=np.ones(2, bool),
  )
  memory.token_mask[1] = ~memory.token_mask[1]

  @jax.jit
  def step(params):
    def loss(params):
      scores = policy.apply({"params": params}, x, positions, ROWS, GRID, 16)
      old = jax.lax.stop_gradient(scores)
      return objective.loss(scores, old, memory)[0], scores

    return jax.grad(loss, has_aux=True)(params)

  grads, scores = step(params)
  assert scores.token.shape == (12, 2) and scores.frame.shape == (2, 2)
  assert all(np.any(g) for g in jax.tree.leaves(grads))
  index = selection.select(scores, selection.budget(GRID, 0.5))
  assert index.shape == (6,)


def test_in_a_bucket_it_selects_as_alone():
  policy, params = make(rank=4)
  bucket = token_grid.GridBucket(3, 10, 24)
  x = np.full((30, 32), 9.0, np.float32)
  x[:16] = np.random.default_rng(1).standard_normal((16, 32))
  rows = np.full(24, 30)
  rows[:12] = ROWS

  @jax.jit
  def select(budget, *prompt):
    scores = policy.apply({"params": params}, *prompt)
    return selection.select(scores, budget)

  budget = selection.budget(GRID, 0.5, bucket=bucket)
  positions = np.arange(30)[None]
  index = select(budget, x, positions, rows, budget.grid, 16)
  alone = policy.apply(
    {"params": params}, x[:16], positions[:, :16], ROWS, GRID
  )
  expected = selection.select(alone, selection.budget(GRID, 0.5))
  assert budget.kept == 6
  np.testing.assert_array_equal(index[:6], expected)
  assert (np.asarray(index[6:]) == 24).all()


def test_its_weights_are_kept_under_its_own_names(tmp_path):
  policy, params = make()
  path = tmp_path / "mine.safetensors"
  modules.save(path, policy, params)
  assert "question/kernel" in modules.read(path)
  back = modules.load(path, policy, params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  other, other_params = make(rank=3)
  with pytest.raises(errors.UserError, match="misshaped question/bias"):
    modules.load(path, other, other_params)


@pytest.mark.parametrize(
  ("spec", "named"),
  [
    ("bilinear", "must read"),
    (":Bilinear", "must read"),
    ("no/such/file.py:Bilinear", "no file"),
    ("no_such_package.module:Bilinear", "ModuleNotFoundError"),
    (f"{FILE}:Trilinear", "no class"),
    (f"{FILE}:nn", "no class"),
    ("cacovid_jax.policy.network:Head", "lacks from_llm_config"),
  ],
)
def test_a_name_that_leads_nowhere_is_refused(spec, named):
  with pytest.raises(errors.UserError, match=named):
    modules.load_policy_module(spec)


def test_a_file_that_fails_is_named_with_its_error(tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("1 / 0\n")
  with pytest.raises(errors.UserError, match=r"broken\.py.*ZeroDivisionError"):
    modules.load_policy_module(f"{path}:Any")
