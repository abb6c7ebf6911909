"""Embedded clips with captions, and the two retrieval studies on them."""

import json
import shutil

import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.related import clips as clips_lib
from cacovid_jax.related import emcl, hcq
from cacovid_jax.related import study as study_lib
from configs import related_systems


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Returns four clips to train on and two to test on."""
  root = str(tmp_path_factory.mktemp("related") / "clips")
  return clips_lib.Clips(root=root, variant="sparse", count=(4, 2))


def test_captions_are_those_of_the_clips(clips):
  text, video = clips.pairs("test")
  assert clips.names("test") == ["sparse_test_00000", "sparse_test_00001"]
  x, mask = text
  assert x.shape[:2] == mask.shape == (2, int(mask.sum(axis=1).max()))
  assert not np.asarray(x)[~np.asarray(mask)].any()
  features = clips.features(clips.names("test"))
  np.testing.assert_allclose(video[0], features.mean(axis=2), atol=1e-6)
  few, there = clips.pairs("test", 8)[1]
  assert few.shape == (2, 8, 128) and there.all()
  flat = features.reshape(2, -1, 128)
  for one, tokens in zip(few, flat, strict=True):
    assert all((row == tokens).all(axis=1).any() for row in np.asarray(one))


@pytest.mark.parametrize("module", [emcl, hcq])
def test_the_smallest_study_of_clips_runs(clips, module):
  name = module.__name__.rpartition(".")[2]
  config = related_systems.get_config("debug")[
    name
  ].copy_and_resolve_references()
  study = module.study(config, clips)
  arms_of = study.cases["embedded clips"]
  outcome = study_lib.Outcome([("embedded clips", 0, arms_of(0))])
  for case, arm in outcome.rows:
    assert 0 <= outcome.mean(case, arm, "t2v R@1") <= 1


def test_clips_without_captions_are_one_line(clips, tmp_path):
  assert clips.experiment  # Built.
  root = tmp_path / "clips"
  shutil.copytree(clips.root, root)
  other = clips_lib.Clips(root=str(root), variant="sparse", count=(4, 2))
  (root / "captions.jsonl").write_text(
    json.dumps({"clip": "sparse_test_00000"})
  )
  with pytest.raises(errors.UserError, match="captions.jsonl: no captions"):
    other.pairs("test")
