"""A config.json of wrong types or impossible sizes is one line, or loads."""

import json
import pathlib
import re

import pytest

from cacovid_jax import errors
from cacovid_jax.models import checkpoints

_HERE = pathlib.Path(__file__).parent
_GOLDEN = _HERE.parent / "golden"
_MODELS = ("llava_onevision_tiny", "qwen2_5_vl_tiny", "qwen3_vl_tiny")
_VALUES = (
  None, True, -1, 0, 3, 2**31, 10**30, 1e400, -1e400, "x", [], [None], {},
  {"content": None}, [[[[]]]],
)  # fmt: skip


@pytest.mark.parametrize(
  ("number", "message"),
  [
    (1, "model_type is {'content': None}; give a checkpoint of"),
    (2, r"text_config.intermediate_size is 1000.*; it must be a whole number"),
    (3, "vision_config.num_attention_heads is 2147483648; it must be a whole"),
    (4, "vision_config.image_size 3 is below patch_size 8"),
  ],
)
def test_recorded_cases_are_one_line(tmp_path, number, message):
  text = (_HERE / "cases" / f"config_{number}.json").read_text()
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(errors.UserError, match=message) as caught:
    checkpoints.load_config(tmp_path)
  assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
  assert "\n" not in str(caught.value)


def _changed(config, value):
  """Yields (key, copy of a config whose value there is another)."""
  for key, old in config.items():
    yield key, {**config, key: value}
    if isinstance(old, dict):
      for inner, changed in _changed(old, value):
        yield f"{key}.{inner}", {**config, key: changed}


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize("value", _VALUES, ids=repr)
def test_any_value_of_any_key_loads_or_is_one_line(tmp_path, model, value):
  good = json.loads((_GOLDEN / model / "config.json").read_text())
  path = tmp_path / "config.json"
  for key, changed in _changed(good, value):
    # As JSON spells an infinity: 1e400.
    text = json.dumps(changed)
    path.write_text(re.sub(r"Infinity", "1e400", text))
    try:
      checkpoints.load_config(tmp_path)
    except errors.UserError as error:
      assert str(error).startswith(f"{path}"), (key, error)
      # Without a section, its fields are sought at the top level.
      names = key.split(".")[0], "vocab_size"
      assert any(name in str(error) for name in names), (key, error)
      assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [-2, 2**40, "x", [None], {}, True, 1.5])
def test_ends_of_answers_are_numbers(tmp_path, name, value):
  (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
  path = tmp_path / "generation_config.json"
  path.write_text(json.dumps({name: value}))
  with pytest.raises(errors.UserError, match=f"{path}: {name}.*must be"):
    checkpoints._ending(tmp_path)


@pytest.mark.parametrize(
  ("section", "key", "value", "message"),
  [
    (
      "",
      "model_type",
      "qwen3_vl_moe",
      "a mixture of experts, unlike the dense",
    ),
    ("", "model_type", "qwen3_5", "a decoder of linear attention"),
    ("text_config", "attention_bias", True, "attention_bias is True"),
    ("vision_config", "deepstack_visual_indexes", [3, 1], "rising"),
    ("vision_config", "deepstack_visual_indexes", [], "rising"),
    ("vision_config", "num_position_embeddings", 24, "24 is no square"),
    ("vision_config", "out_hidden_size", 32, "text_config.hidden_size 64"),
    ("vision_config", "hidden_act", "silu", "hidden_act is 'silu'"),
  ],
)
def test_what_is_not_qwen3_vl_is_named(tmp_path, section, key, value, message):
  path = _GOLDEN / "qwen3_vl_tiny" / "config.json"
  config = json.loads(path.read_text())
  (config[section] if section else config)[key] = value
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match=message) as caught:
    checkpoints.load_config(tmp_path)
  assert "\n" not in str(caught.value)
