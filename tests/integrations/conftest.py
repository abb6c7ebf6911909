"""The tiny checkpoint and benchmark of the evaluation tests."""

from tests.evals.conftest import *  # noqa: F403
