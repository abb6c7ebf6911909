"""A policy that lies among its base model's weights, as it was released."""

import jax
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.models import checkpoints
from cacovid_jax.policy import loading, network
from tests.evals import tiny


def test_a_checkpoint_directory_can_be_the_policy(tmp_path):
  base = checkpoints.load(tiny.write_checkpoint(tmp_path / "base"))
  file = tiny.write_policy(tmp_path / "policy", base)
  alone = loading.load_policy(file, base)
  released = tmp_path / "released"
  checkpoints.save(
    released,
    base.model.config,
    base.params,
    eos_ids=base.eos_ids,
    pad_id=base.pad_id,
    extra=base.extra | network.to_public(alone.params),
    max_shard_bytes=50_000,
  )
  assert not loading.has_policy(str(tmp_path / "base"))
  with pytest.raises(errors.UserError, match="no policy in"):
    loading.load_policy(str(tmp_path / "base"), base)
  assert loading.has_policy(str(released))
  found = loading.load_policy(str(released), base)
  assert found.module == alone.module
  jax.tree.map(np.testing.assert_array_equal, found.params, alone.params)
  assert found.identity == checkpoints.identity(str(released))["sha256"]
