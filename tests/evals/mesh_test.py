"""Evaluation on a mesh: the letters of one device, whatever it shares."""

import itertools
import json

import jax.numpy as jnp
import pytest

from cacovid_jax import errors
from cacovid_jax.data import readers
from cacovid_jax.evals import evaluation
from cacovid_jax.inference import answerer as answerer_lib
from cacovid_jax.models import checkpoints
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.preparation import blind_filter as blind
from tests.evals import tiny
from tests.parallel import kernels
from tests.preparation import blind_test

# A policy, draws, a rule per clip, what the language model looks at, and two
# that choose inside it, the second one by masks that differ by row.
METHODS = (
  "cacovid", "random", "divprune", "last_query?layer=1", "fastv?layer=1",
  "framefusion",
)  # fmt: skip


@pytest.fixture(scope="module")
def asked(checkpoint_dir, data_dir, policy_file):
  """Returns a function of a mesh: {(method, question): answer}."""

  def ask(workdir, **mesh):
    experiment = tiny.experiment(
      workdir,
      data=data_dir,
      checkpoint=checkpoint_dir,
      policies={"policy": policy_file},
      methods=METHODS,
      ratios=(0.5,),
      batch_size=4,
      max_new_tokens=2,
      **mesh,
    )
    evaluation.evaluate(experiment)
    lines = (workdir / "answers.jsonl").read_text().splitlines()[1:]
    answers = map(json.loads, lines)
    return experiment, {
      (one["method"], one["question"]): (one["text"], one["kept"])
      for one in answers
    }

  return ask


@pytest.fixture(scope="module")
def alone(asked, tmp_path_factory):
  return asked(tmp_path_factory.mktemp("alone"))[1]


@pytest.mark.parametrize(("data", "model"), [(4, 1), (1, 4), (2, 2)])
def test_four_devices_give_the_answers_of_one(
  data, model, asked, alone, tmp_path, monkeypatch
):
  heads = kernels.stand_in(monkeypatch)
  mesh = {"mesh.data": data, "mesh.model": model}
  experiment, found = asked(tmp_path, **mesh)
  assert dict(experiment.mesh.shape) == {"data": data, "model": model}
  assert min(heads)[0] <= 4 // model
  assert {method for method, _ in found} == {"vanilla", *METHODS}
  assert len(set(alone.values())) > len(METHODS)
  assert found == alone


def test_zero_takes_the_devices_that_divide_a_batch(tmp_path):
  # Of eight, four and two.
  for batch_size, model, data in ((4, 1, 4), (6, 1, 6), (7, 2, 1), (8, 2, 4)):
    found = tiny.experiment(
      tmp_path, batch_size=batch_size, **{"mesh.data": 0, "mesh.model": model}
    )
    assert found.mesh.shape["data"] == data
    assert found.mesh.shape["model"] == model


@pytest.mark.parametrize(
  ("mesh", "match"),
  [
    ({"mesh.data": 3}, "evals.batch_size=4 does not divide among the 3 dev"),
    ({"mesh.data": 16}, "needs 16 devices and there are 8; lower"),
    ({"mesh.model": 3}, "model=3 does not divide the base model's 4 attention"),
    ({"mesh.model": 9}, "needs 9 devices and there are 8; lower"),
  ],
)
def test_a_mesh_that_does_not_fit_is_one_line(asked, mesh, match, tmp_path):
  with pytest.raises(errors.UserError, match=match) as caught:
    asked(tmp_path, **mesh)
  assert "\n" not in str(caught.value)


def test_one_question_is_answered_on_a_mesh(checkpoint_dir, tmp_path):
  tiny.write_clip(tmp_path / "clip.mp4", seed=1)
  texts = []
  for model, layers in itertools.product((1, 2), ("stacked", "separate")):
    made = tiny.experiment(
      None,
      checkpoint=checkpoint_dir,
      max_new_tokens=2,
      methods=("uniform",),
      **{"mesh.model": model, "mesh.data": 0, "model.layers": layers},
    )
    with answerer_lib.Answerer.from_config(made.config) as answerer:
      assert answerer.experiment.mesh.size == model
      params = answerer.experiment.checkpoint.params["language_model"]
      assert ("0" in params["layers"]) == (layers == "separate")
      asked = answerer.ask(
        tmp_path / "clip.mp4", "What is it?", ("red", "blue"),
        ratios=(1.0, 0.25), method="uniform", warm_up=False,
      )  # fmt: skip
    texts.append([answer.text for answer in asked.answers])
  assert texts == texts[:1] * 4


def test_devices_answer_as_many_questions(
  checkpoint_dir, policy_file, tmp_path
):
  for number in range(3):
    tiny.write_clip(tmp_path / f"{number}.mp4", seed=number)
  # Five for four devices, and two of one name about one clip.
  asked = [
    (tmp_path / f"{number % 3}.mp4", f"What is {number % 4}?", ("red", "blue"))
    for number in (0, 1, 2, 3, 4)
  ]
  how = {"ratios": (1.0, 0.5), "warm_up": False}
  found, methods = {}, ("cacovid", "random", "divprune", "fastv?layer=1")
  for axes in ((1, 1), (4, 1), (2, 2), (0, 4)):
    made = tiny.experiment(
      None,
      checkpoint=checkpoint_dir,
      policies={"policy": policy_file},
      max_new_tokens=2,
      **dict(zip(("mesh.data", "mesh.model"), axes, strict=True)),
    )
    with answerer_lib.Answerer.from_config(made.config, at_once=5) as answerer:
      assert answerer.experiment.mesh.shape["data"] == (axes[0] or 2)
      for method in methods:
        answers = answerer.ask_all(asked, method=method, **how)
        assert [one.path for one in answers] == [str(a[0]) for a in asked]
        found.setdefault(method, []).append([
          [(x.text, x.letter, x.trace.index.tolist()) for x in one.answers]
          for one in answers
        ])  # fmt: skip
      if axes == (1, 1):
        alone = answerer.ask(*asked[4], method="random", **how)
        kept = [x.trace.index.tolist() for x in alone.answers]
        assert kept == [x[2] for x in found["random"][0][4]]
  assert [one.together for one in answers] == [2, 2, 2, 2, 1]
  for method, (expected, *others) in found.items():
    assert len({str(one[1][2]) for one in expected}) > 1
    assert others == [expected] * 3, method
  with answerer_lib.Answerer(checkpoint_dir, at_once=3) as answerer:
    assert answerer.experiment.mesh.shape["data"] == 3


@pytest.mark.parametrize(
  ("mesh", "match"),
  [
    ({"mesh.data": 3}, "data=3 devices share 2 question.s.; lower it"),
    ({"mesh.data": 2, "mesh.model": 8}, "needs 16 devices and there are 8"),
    ({"mesh.data": 2, "mesh.model": 3}, "model=3 does not divide the base mod"),
  ],
)
def test_a_mesh_that_two_questions_do_not_fit(checkpoint_dir, mesh, match):
  made = tiny.experiment(None, checkpoint=checkpoint_dir, **mesh)
  with pytest.raises(errors.UserError, match=match) as caught:
    answerer_lib.Answerer.from_config(made.config, at_once=2)
  assert "\n" not in str(caught.value)


def test_the_blind_filter_shares_its_batches(checkpoint_dir, tmp_path):
  rows = readers.read_video_r1(blind_test.write(tmp_path / "rows.json"))
  expected = blind.ask(
    checkpoints.load(checkpoint_dir, jnp.float32), rows, blind_test.SETTINGS
  )
  assert len(set(expected)) > 1
  for axes in ((2, 1), (1, 2)):
    mesh = mesh_lib.make_mesh(*axes)
    checkpoint = checkpoints.load(checkpoint_dir, jnp.float32, mesh=mesh)
    found = blind.ask(checkpoint, rows, blind_test.SETTINGS, mesh=mesh)
    assert found == expected
