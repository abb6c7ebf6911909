"""The words behind `--model_args`."""

import logging

import pytest

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.integrations.lmms_eval import arguments


def cell(**given):
  return arguments.condition(arguments.parse(**given))


def test_nothing_given_is_the_shipped_model_and_its_policy_at_ten_percent():
  found = arguments.parse(batch_size="1")
  assert found.model.path == str(experiment_lib.SHIPPED_MODEL)
  assert found.evals.policies == (f"policy={experiment_lib.SHIPPED_POLICY}",)
  assert found.evals.methods == ("cacovid",) and found.evals.ratios == (0.1,)
  assert found.evals.batch_size == 1
  assert found.data.num_frames == 16  # Of the shipped model's files.
  asked = arguments.condition(found)
  assert (asked.spec, asked.ratio) == ("cacovid", 0.1)


def test_values_arrive_as_lmms_eval_reads_them():
  found = arguments.parse(
    pretrained="some/folder",
    topk=0.25,
    max_frames_num=32,
    batch_size="8",
    dtype="bfloat16",
    method="divprune?exact_budget=false",
    device=None,
    max_batch_size=64,
  )
  default = arguments.parse()
  assert found == config_lib.replace(
    default,
    {
      "model.path": "some/folder",
      "evals.policies": (),
      "evals.ratios": (0.25,),
      "data.num_frames": 32,
      "evals.batch_size": 8,
      "model.dtype": "bfloat16",
      "evals.methods": ("divprune?exact_budget=false",),
    },
  )


def test_a_config_and_its_keys_are_arguments_too():
  found = arguments.parse(
    config="configs/synthetic.py:size=quickstart",
    ratio=0.2,
    **{"mesh.model": "2", "data.feature_cache": "cache"},
  )
  assert found.model.path == "cacovid_jax/assets/base_model"
  assert found.evals.ratios == (0.2,) and found.mesh.model == 2
  assert found.data.feature_cache == "cache"


def test_the_whole_prompt_needs_no_method():
  assert cell(ratio=1).method is None
  assert cell(ratio=1.0, method="random").spec == "vanilla"


def test_the_seed_is_that_of_methods_that_draw():
  assert cell(method="random", seed=3).seed == 3
  assert cell(method="uniform", seed=3).seed == 0


@pytest.mark.parametrize(
  "given, match",
  [
    (
      {"model": "x"},
      "unknown model argument 'model'; known: batch_size, config, dtype",
    ),
    ({"ratio": 0.1, "topk": 0.2}, "topk is another name of ratio"),
    ({"ratio": "half"}, "ratio='half' is not a number"),
    ({"ratio": True}, "ratio=True is not a number"),
    ({"ratio": 1.5}, "1.5"),
    ({"batch_size": "auto"}, "batch_size='auto' is not a whole number"),
    ({"batch_size": 0}, "batch_size=0: at least 1"),
    ({"max_frames_num": 2.5}, "max_frames_num=2.5 is not a whole number"),
    ({"max_frames_num": -1}, "max_frames_num=-1: at least 1"),
    ({"max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
    ({"dtype": "float16"}, "dtype is 'float16'; .*one of float32, bfloat16"),
    ({"template": "own"}, "template is 'own'; .*one of processor, tokenizer"),
  ],
)
def test_a_mistake_is_one_line(given, match):
  with pytest.raises(errors.UserError, match=match) as caught:
    arguments.parse(**given)
  assert "\n" not in str(caught.value)


def test_oracles_and_unknown_methods_are_refused():
  with pytest.raises(errors.UserError, match="knows where the answer lies"):
    cell(method="decisive_boxes")
  with pytest.raises(errors.UserError, match="nonesuch"):
    cell(method="nonesuch")


def test_a_device_that_is_not_ours_is_told(caplog):
  with caplog.at_level(logging.WARNING):
    arguments.parse(device="cpu")
    assert not caplog.messages
    arguments.parse(device="cuda:0")
  assert "device=cuda:0 is not followed: JAX computes on cpu" in caplog.text
