"""Golden files of the public code, and that a 1 % change would be seen.

The files in tests/golden/policy were computed with the public PyTorch code in
float32; METHOD.md 9 states the tolerances.
"""

import functools
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from cacovid_jax import errors
from cacovid_jax.parity import policy
from cacovid_jax.policy import objective, sampling, selection

FOLDER = os.path.join(os.path.dirname(__file__), "..", "golden", "policy")


def copy_case(name, case, folder):
  """Writes a golden file of one case of another."""
  with np.load(os.path.join(FOLDER, f"{name}.npz")) as arrays:
    ending = f"_{case}"
    chosen = {
      key[: -len(ending)] + "_0": arrays[key]
      for key in arrays.files
      if key.endswith(ending)
    }
    meta = json.dumps(json.loads(str(arrays["meta"]))[case : case + 1])
  np.savez(os.path.join(folder, f"{name}.npz"), meta=meta, **chosen)


def failures(folder):
  return [stage.name for stage in policy.check(folder) if not stage.ok]


def test_every_stage_of_every_file_is_within_its_tolerance():
  checked = policy.check(FOLDER)
  assert [stage for stage in checked if not stage.ok] == []
  assert len(checked) == 94
  files = {stage.name.split()[0].split("[")[0] for stage in checked}
  present = {name[:-4] for name in os.listdir(FOLDER) if name.endswith(".npz")}
  assert files == present | {"defaults"}


# Mutations: each must be noticed by the stages named.


def scale_kappa(patch):
  share = objective.kept_share
  changed = lambda mask, items: 1.01 * share(mask, items)  # noqa: E731
  patch.setattr(objective, "kept_share", changed)


def scale_config(owner, name, field):
  """Returns a mutation of one field, wherever its value comes from."""

  def mutate(patch):
    config = getattr(owner, name)

    class Changed(config):
      def __init__(self, **fields):
        value = fields.pop(field, getattr(config(), field))
        super().__init__(**fields, **{field: 1.01 * value})

    patch.setattr(owner, name, Changed)

  return mutate


of_objective = functools.partial(scale_config, objective, "ObjectiveConfig")
of_sampling = functools.partial(scale_config, sampling, "SamplingConfig")


def scale_group_cap(patch):
  cap = sampling._group_cap
  patch.setattr(sampling, "_group_cap", lambda *args: 1.01 * cap(*args))


def scale_cap(patch):
  capped = sampling.capped_distribution
  patch.setattr(
    sampling,
    "capped_distribution",
    lambda probs, cap: capped(
      probs, sampling.ProbabilityCap.of(cap.size, 1.01 * cap.cap)
    ),
  )


def scale_sharpness(patch):
  budget = functools.partial(selection.budget, frame_sharpness=3.03)
  patch.setattr(selection, "budget", budget)


@pytest.mark.parametrize(
  ("name", "case", "mutate", "noticed"),
  [
    ("objective_mixed", 0, scale_kappa, "grad_token"),
    ("objective_mixed", 0, of_objective("clip_low"), "token_loss"),
    ("objective_mixed", 0, of_objective("clip_high"), "token_loss"),
    ("sampling", 0, scale_group_cap, "group_probs"),
    ("sampling", 5, scale_group_cap, "group_cap"),
    ("clip_max_probability", 0, scale_cap, "q"),
    ("sampling", 3, of_sampling("min_token_weight"), "token_weights"),
    ("sampling", 3, of_sampling("max_token_weight"), "token_weights"),
    ("sampling", 1, of_sampling("mass_epsilon"), "token_weights"),
    ("sampling", 1, of_sampling("max_group_prob"), "group_probs"),
    ("select", 1, scale_sharpness, "keep"),
  ],
)
def test_a_change_of_one_per_cent_is_noticed(
  name, case, mutate, noticed, tmp_path, monkeypatch
):
  copy_case(name, case, tmp_path)
  # The defaults have their own stage; here the numbers must tell.
  monkeypatch.setattr(policy, "_PAPER", {})
  mutate(monkeypatch)
  assert f"{name}[0] {noticed}" in failures(tmp_path)


def test_unchanged_single_cases_pass(tmp_path):
  copy_case("sampling", 1, tmp_path)
  copy_case("clip_max_probability", 0, tmp_path)
  assert failures(tmp_path) == []


def test_a_changed_default_is_noticed(monkeypatch):
  defaults = objective.ObjectiveConfig.__init__.__kwdefaults__
  monkeypatch.setitem(defaults, "clip_high", 0.2828)
  assert [s.name for s in policy._check_defaults() if not s.ok] == [
    "defaults objective"
  ]


# Other folders.


def test_other_shapes_are_read(tmp_path):
  rng = np.random.default_rng(5)
  x = rng.standard_normal((11, 3)).astype(np.float32)
  keep = np.zeros(11, np.uint8)
  np.savez(
    tmp_path / "density_peaks_mine.npz",
    x_0=x,
    keep_0=keep,
    meta=json.dumps([{"n": 11, "d": 3, "k": 2}]),
  )
  assert failures(tmp_path) == ["density_peaks_mine[0] keep"]


def test_a_wrong_answer_of_another_shape_is_a_failure(tmp_path):
  with np.load(os.path.join(FOLDER, "sampling.npz")) as arrays:
    changed = {key: arrays[key] for key in arrays.files if "_6" in key}
  changed = {key.replace("_6", "_0"): value for key, value in changed.items()}
  changed["group_probs_0"] = np.ones(2, np.float32)
  meta = {
    "num_tokens": 64,
    "retention_ratio": 0.5,
    "group_size": 2.0,
    "max_group_prob": 2.0,
  }
  np.savez(tmp_path / "sampling.npz", meta=json.dumps([meta]), **changed)
  assert failures(tmp_path) == ["sampling[0] group_probs"]


def test_a_missing_or_empty_folder_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match="is not a folder"):
    policy.check(tmp_path / "absent")
  with pytest.raises(errors.UserError, match="holds no golden file"):
    policy.check(tmp_path)


@pytest.mark.parametrize(
  ("arrays", "named"),
  [
    ({}, "no entry meta"),
    ({"meta": "{"}, "not readable as JSON"),
    ({"meta": "{}"}, "it must be a list"),
    ({"meta": "[{}]"}, "n is None; it must be a whole number"),
    ({"meta": '[{"n": 2, "max_prob": 0.7}]'}, "no array p_0"),
    (
      {"meta": '[{"n": 2.5, "max_prob": 0.7}]'},
      "n is 2.5; it must be a whole number",
    ),
    (
      {"meta": '[{"n": 2, "max_prob": 0.7}]', "p_0": np.ones(3)},
      r"p_0 is float64\[3\], expected numbers of shape \[2\]",
    ),
    (
      {"meta": '[{"n": 2, "max_prob": 0.7}]', "p_0": np.array(["a", "b"])},
      "expected numbers",
    ),
  ],
)
def test_a_file_of_another_format_is_refused(arrays, named, tmp_path):
  np.savez(tmp_path / "clip_max_probability.npz", **arrays)
  with pytest.raises(errors.UserError, match=named) as raised:
    policy.check(tmp_path)
  assert "\n" not in str(raised.value)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
  (tmp_path / "select.npz").write_bytes(b"PK\x03\x04 not an archive")
  with pytest.raises(errors.UserError, match="cannot be read"):
    policy.check(tmp_path)


@pytest.mark.parametrize(
  "content",
  [
    b"hello",  # Read as bytes, not as an array.
    b"\x93NUMPY\x01\x00\x02\x00{\n",
    b"\x93NUMPY\x01\x00\x88\x13" + b"(" * 4999 + b"\n",
    b"\x93NUMPY\x01\x00\x3d\x00{'descr': '<M8[s]', 'fortran_order': False,"
    b" 'shape': (1,)}\n" + b"1" * 8,
  ],
)
def test_a_member_that_is_no_array_is_refused(tmp_path, content):
  with zipfile.ZipFile(tmp_path / "select.npz", "w") as archive:
    archive.writestr("a.npy", content)
  with pytest.raises(errors.UserError, match="select.npz cannot be read"):
    policy.check(tmp_path)


def test_a_policy_file_needs_its_weights_and_all_of_them(tmp_path):
  shutil.copy(os.path.join(FOLDER, "policy_gqa7.npz"), tmp_path)
  with pytest.raises(errors.UserError, match=r"policy_gqa7\.safetensors"):
    policy.check(tmp_path)
  weights = safetensors.numpy.load_file(
    os.path.join(FOLDER, "policy_gqa7.safetensors")
  )
  del weights["compression_policy.layernorm.weight"]
  safetensors.numpy.save_file(weights, tmp_path / "policy_gqa7.safetensors")
  with pytest.raises(errors.UserError, match="missing .*layernorm"):
    policy.check(tmp_path)
