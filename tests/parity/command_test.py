"""The command line of the parity check."""

import contextlib
import io
import subprocess
import sys
from unittest import mock

import jax
from absl.testing import absltest

from cacovid_jax.parity import __main__, stage


class ParityTest(absltest.TestCase):
  def test_report_says_what_missed(self):
    found = [
      stage.Stage("near", 1e-6, 2e-5, True),
      stage.Stage("far", 0.3, 2e-5, False),
    ]
    self.assertTrue(__main__.report("folder", found[:1]))
    self.assertFalse(__main__.report("folder", found))
    self.assertFalse(__main__.report("folder", []))

  def test_each_folder_has_a_table_and_one_that_misses_is_exit_code_1(self):
    near = stage.Stage("near", 1e-6, 2e-5, True)
    far = stage.Stage("far", 0.3, 2e-5, False)
    arguments = __main__.COMMAND.parse(["parity", "a", "b"])
    with (
      mock.patch.object(jax.config, "update"),  # Of other tests, too.
      mock.patch.object(__main__, "check", side_effect=[[near], [near, far]]),
      contextlib.redirect_stdout(io.StringIO()) as out,
    ):
      self.assertEqual(__main__.main(arguments), 1)
    for line in ("1 of 1 stages", "1 of 2 stages"):
      self.assertIn(f"{line} within tolerance", out.getvalue())

  def test_a_mistake_is_one_line_and_exit_code_2(self):
    absent = subprocess.run(
      [sys.executable, "-m", "cacovid_jax.parity", "nowhere"],
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(absent.returncode, 2)
    self.assertIn("error: nowhere is not a folder", absent.stderr)
    self.assertNotIn("Traceback", absent.stderr)


class CompareTest(absltest.TestCase):
  def test_shapes_and_values_that_are_not_finite_are_misses(self):
    inf = float("inf")
    self.assertFalse(stage.compare("s", [1.0, 2.0], [1.0], 1.0).ok)
    self.assertEqual(stage.compare("s", [1.0], [[1.0]], 1.0).max_abs_error, inf)
    self.assertFalse(stage.compare("s", [float("nan")], [0.0], 1.0).ok)
    self.assertTrue(stage.compare("s", [-inf, 1.0], [-inf, 1.0], 0.0).ok)
    self.assertFalse(stage.compare("s", [-inf], [0.0], 1.0).ok)
    self.assertTrue(stage.compare("s", [], [], 0.0).ok)

  def test_zero_tolerance_asks_for_equality(self):
    self.assertTrue(stage.compare("ids", [3, 4], [3, 4], 0.0).ok)
    self.assertFalse(stage.compare("ids", [3, 4], [3, 5], 0.0).ok)
    self.assertTrue(stage.compare("mask", [True], [True], 0.0).ok)


if __name__ == "__main__":
  absltest.main()
