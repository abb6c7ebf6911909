"""The plan past one host: by hand, in the docs, and what it refuses."""

import pathlib

import pytest

from cacovid_jax import errors
from cacovid_jax.evals import tables
from experiments import planning
from tests.experiments import commands

_PAGE = pathlib.Path(__file__).parents[2] / "docs" / "planning.md"


def test_a_plan_is_what_a_pocket_calculator_says():
  # 32 x 14 x 14 tokens of 3584 numbers of 4 bytes.
  measured = planning.measured_of(commands.parse(planning))
  assert measured.feature_bytes == 89_915_392
  measured = measured._replace(
    seconds_per_video=1.0, tower_seconds=0.1, efficiency=0.5
  )
  one = planning.plan(36_000, "h200", 1, measured)
  assert one.hours == one.accelerator_hours == pytest.approx(10)
  assert one.hours_saved == pytest.approx(1)
  assert one.steps == 36_000
  assert one.cache_bytes == 36_000 * 89_915_392
  # A clip's features every 0.9 s.
  assert one.read_rate == pytest.approx(89_915_392 / 0.9)
  # Eight at half of the efficiency are four.
  eight = planning.plan(36_000, "h200", 8, measured)
  assert eight.hours == pytest.approx(2.5)
  assert (eight.accelerator_hours, eight.steps) == (pytest.approx(20), 4500)
  slower = planning.plan(36_000, "v5p", 8, measured)
  assert slower.hours == pytest.approx(2.5 * 989 / 459)


def test_the_page_has_the_table_of_the_stated_numbers():
  args = commands.parse(planning)
  found = planning.rows(args.accelerators, planning.measured_of(args))
  assert len(found) == 3 * len(args.accelerators)
  text = tables.as_markdown(planning.HEAD, found, range(2, len(planning.HEAD)))
  page = _PAGE.read_text(encoding="utf-8")
  assert text in page
  assert f"{planning.state_bytes() / 1e9:.1f} GB" in page


def test_the_command_prints_the_table(capsys):
  commands.run(planning, accelerators="h200:2")
  assert "| 1e+08 | 2 x h200 |" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flags", "match"),
  [
    ({"accelerators": "a100:8"}, "NAME:NUMBER, a name of h200, v5p"),
    ({"accelerators": "h200:0"}, "--accelerators=h200:0"),
    ({"tower_seconds": 2}, "is no part of --seconds_per_video"),
    ({"efficiency": 0}, "--efficiency is 0"),
  ],
)
def test_what_cannot_be_planned_is_one_line(flags, match):
  with pytest.raises(errors.UserError, match=match):
    commands.run(planning, **flags)
