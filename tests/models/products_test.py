"""Products in 8 bits, beside a loop over ml_dtypes' values."""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cacovid_jax import base_config, errors
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.models import checkpoints, processors, products, video_llm

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "llava_onevision_tiny"


def test_values_are_the_nearest_that_the_type_has():
  x = np.float32([0, 1.06, -0.3, 447, 500, -1e9, 2**-9, 3e-4])
  found = products.float8(jnp.asarray(x))
  nearest = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
  np.testing.assert_array_equal(found, nearest.astype(np.float32))
  # A small weight keeps three bits where it is scaled, and none without.
  small = jnp.float32(5e-4)
  assert abs(products.float8(small, 64.0) / small - 1) < 2**-4
  assert abs(products.float8(small) / small - 1) > 0.1


def test_a_product_is_that_of_rounded_values():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, 5, 16)).astype(np.float32)
  w = 0.03 * rng.standard_normal((16, 7)).astype(np.float32)
  dims = (((2,), (0,)), ((), ()))
  found = jax.jit(lambda x, w: products.float8_dot_general(x, w, dims))(x, w)
  kind, expected = ml_dtypes.float8_e4m3fn, np.zeros((3, 5, 7))
  for row in np.ndindex(3, 5):
    for n in range(7):
      left = x[row].astype(kind).astype(np.float64)
      right = (64 * w[:, n]).astype(kind).astype(np.float64) / 64
      expected[*row, n] = left @ right
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_features_of_a_tower_are_near_those_of_the_plain_one():
  loaded = checkpoints.load(GOLDEN)
  size = loaded.model.config.vision.image_size
  pixels = np.random.default_rng(1).standard_normal((2, size, size, 3))
  inputs = processors.TowerInputs(jnp.float32(pixels), (2, 4, 4))
  plain = loaded.model.encode(loaded.params, inputs).features
  model = loaded.model.with_float8_tower(True)
  found = model.encode(loaded.params, inputs).features
  error = np.linalg.norm(found - plain) / np.linalg.norm(plain)
  assert 1e-3 < error < 0.1
  assert model.precision == "float32 float8 tower"
  assert loaded.model.precision == "float32"
  assert (model.told, loaded.model.told) == ({"float8_tower": True}, {})
  assert model.with_float8_tower(False) == loaded.model


def test_the_config_chooses_it_and_features_say_so(tmp_path):
  config = base_config.get_config()
  config.model.path = str(experiment_lib.SHIPPED_MODEL)
  config.model.dtype = "float32"
  plain = config_lib.config_hash(config)
  config.model.float8_tower = True
  assert config_lib.config_hash(config) != plain
  experiment = experiment_lib.Experiment.from_config(config, tmp_path)
  assert experiment.loaded.model.float8_tower


def test_what_cannot_is_one_line(monkeypatch):
  with pytest.raises(errors.UserError, match="float8_tower is for the SigLIP"):
    video_llm.VideoLLM.with_float8_tower(None, True)
  client = types.SimpleNamespace(platform_version="cuda 13000")
  old = types.SimpleNamespace(
    client=client, compute_capability="8.0", device_kind="A100"
  )
  monkeypatch.setattr(jax, "devices", lambda: [old])
  model = checkpoints.make_model(checkpoints.load_config(GOLDEN))
  with pytest.raises(errors.UserError, match=r"needs .* 8.9, and A100 has 8.0"):
    model.with_float8_tower(True)
  assert dataclasses.replace(model).with_float8_tower(False) == model
