"""The tiny checkpoint and benchmark of the evaluation tests."""

from tests.evals.conftest import checkpoint, checkpoint_dir, data_dir

__all__ = ["checkpoint", "checkpoint_dir", "data_dir"]
