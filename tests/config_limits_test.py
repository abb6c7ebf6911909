"""Every key of every config refuses values of no sense, in one line."""

import importlib
import math
import pathlib

import ml_collections
import pytest

from cacovid_jax import base_config, config_limits, errors
from cacovid_jax import config as config_lib
from cacovid_jax.related import settings

_CONFIGS = sorted(
  path.stem
  for path in pathlib.Path("configs").glob("*.py")
  if path.stem not in ("__init__", "common")
)
_DEEP = []
for _ in range(10_000):
  _DEEP = [_DEEP]
# Some numbers may be missing; else none fits.
_VALUES = {
  "nothing": None, "nan": math.nan, "inf": math.inf, "-inf": -math.inf,
  "huge": 10**20, "-huge": -(10**400), "list": [1, "a", None], "deep": _DEEP,
  "group": {"a": {"b": 1}}, "bytes": b"a", "object": object(), "nul": "\0",
}  # fmt: skip
_TEXTS = (
  "", "nan", "inf", "-inf", "1e400", "-1", "99999999999999999999", "none",
  "null", "true", "b'a'", "{}", "{[]: 1}", "1j", "(((", "[" * 300 + "]" * 300,
  "-" * 100_000 + "1", "9" * 5000, "0x" + "f" * 5000, "x\ud800", "((1, 2), 3)",
)  # fmt: skip


def _flat(config, prefix=""):
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _nested(key, value):
  for name in reversed(key.split(".")):
    value = {name: value}
  return value


def _one_line(error, key):
  text = str(error.value if hasattr(error, "value") else error)
  assert key.split(".")[-1] in text, text
  assert "\n" not in text and len(text) < 1000, text


def test_every_number_of_every_config_has_a_range():
  configs = [importlib.import_module(f"configs.{name}") for name in _CONFIGS]
  configs = [base_config.get_config(), *(c.get_config() for c in configs)]
  for config in configs:
    kinds = settings.LIMITS if "hcq" in config else config_limits.kinds()
    for key, _ in _flat(config):
      if key.startswith("evals.candidates."):
        continue
      assert kinds[key] not in (int, float, tuple, None, type(None)), key
    config_limits.check(config, limits=kinds)


@pytest.mark.parametrize("key", sorted(config_limits.kinds()))
def test_values_of_no_sense_are_refused(key):
  kind = config_limits.kinds()[key]
  for name, value in _VALUES.items():
    if name == "nothing" and type(None) in getattr(kind, "__args__", ()):
      continue
    with pytest.raises(errors.UserError) as caught:
      config_limits.check(_nested(key, value), "FILE")
    _one_line(caught, key)
    assert str(caught.value).startswith("FILE: "), caught.value
  *groups, _ = key.split(".")
  for depth in range(1, len(groups) + 1):
    group = ".".join(groups[:depth])
    with pytest.raises(errors.UserError, match=f"{group} is 3; .* an object"):
      config_limits.check(_nested(group, 3))


@pytest.mark.parametrize("key", sorted(dict(_flat(base_config.get_config()))))
def test_texts_of_no_sense_are_one_line_or_a_value(key):
  for text in _TEXTS:
    config = base_config.get_config().lock()
    try:
      config_lib.override(config, f"{key}={text}")
      config_limits.check(config)
    except errors.UserError as error:
      _one_line(error, key)
      continue
    value = config_lib.value_of(config, key)
    assert value is None or value == value, (key, text)
    assert value not in (math.inf, -math.inf), (key, text)


@pytest.mark.parametrize(
  "text",
  [
    "ckpt.every_steps=0", "log_every=0", "seed=99999999999999999999", "seed=-1",
    "seed=none", "data.num_threads=-1", "data.num_workers=-1",
    "data.memory_items=-1", "policy.backend=x", "data.buckets=b'a'",
    "optimizer.lr_heads=inf", "objective.kl_weight=inf",
    "objective.log_ratio_clamp=-1", "evals.max_new_tokens=1000000000",
    "total_steps=-1", "ratio.rungs=0.1,2", "evals.ratios=0.1,0",
    "evals.seeds=0,-1", "prepare.clips=1,2,-3,4", "blind.threshold=7",
    "optimizer.average=1", "optimizer.average=-0.5",
    "ckpt.exit_code=256", "mesh.map=map", "table.tflops=0", "evals.rule=x",
    "evals.template=x", "data.reader=x", "data.on_missing=count",
    "evals.on_missing=skip", "data.on_bad_row=x", "evals.on_bad_row=count",
    "evals.select_on=test", "rollout.marking=x", "optimizer.schedule=x",
    "sampling.frame_cap=x", "tfds.name=x", "data.reader=", "data.root=a\0b",
    "evals.policies=a,\0", "model.layers=both", "evals.empty_frames=none",
    "objective.frame_credit=token",
  ],
)  # fmt: skip
def test_a_senseless_override_names_key_and_need(text):
  key, _, _ = text.partition("=")
  with pytest.raises(errors.UserError, match=rf"^config\.{key}.*must be"):
    config_lib.replace(base_config.get_config(), {}, [text])


def test_a_choice_that_may_be_empty_says_so():
  for key, told in (("rule", "paper, lmms-0.7.3, own"), ("select_on", "none")):
    with pytest.raises(errors.UserError) as caught:
      config_limits.check({"evals": {key: "x"}})
    may = ", or empty" if key == "rule" else ""
    assert str(caught.value).endswith(f"{told}{may}"), caught.value
  config_limits.check({"evals": {"rule": "", "template": ""}})


def test_a_group_without_keys_is_no_value():
  with pytest.raises(errors.UserError) as caught:
    config_lib.replace(base_config.get_config(), {}, ["evals.candidates=3"])
  assert str(caught.value) == (
    "config key 'evals.candidates' is a group, not a value: name its keys in a"
    " config file"
  )


def test_edges_of_sense_are_accepted():
  config_lib.replace(
    base_config.get_config(),
    {},
    [
      "seed=0", "seed=4294967295", "total_steps=0", "sampling.ratio=1",
      "optimizer.lr_layer=0", "objective.kl_weight=0", "data.num_threads=0",
      "objective.log_ratio_clamp=none", "evals.policies=5,1e3",
      "evals.oracles=", "data.prompt_rows=64", "optimizer.average=0.9999",
    ],
  )  # fmt: skip


def test_texts_of_a_list_that_is_empty_stay_texts():
  config = config_lib.replace(
    base_config.get_config(), {}, ["evals.policies=5,1e3", "table.folders=+a=b"]
  )
  assert config.evals.policies == ("5", "1e3")
  assert config.table.folders == ("a=b",)


def test_a_file_of_a_config_is_named(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"optimizer": {"lr_heads": "fast"}}')
  with pytest.raises(errors.UserError) as caught:
    config_lib.load(path)
  assert str(caught.value) == (
    f"{path}: optimizer.lr_heads is 'fast'; it must be a number at least 0 and"
    " at most 1e+09"
  )
