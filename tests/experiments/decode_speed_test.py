"""Readers take turns on clips of the lengths that are asked for."""

import pathlib

import pytest

from cacovid_jax import errors
from cacovid_jax.data import video
from experiments import clip_matrix, decode_speed
from tests.experiments import commands

HERE = pathlib.Path(__file__).parents[2]


def test_two_checkouts_are_compared(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(decode_speed, "_SIZE", (64, 48))
  commands.run(
    decode_speed, workdir=tmp_path, old=HERE, seconds="10,20", repeats=1
  )
  rows = [
    line.split()
    for line in capsys.readouterr().out.splitlines()
    if line.strip().startswith(("h264", "hevc"))
  ]
  assert [row[:2] for row in rows] == [
    [codec, seconds] for codec in ("h264", "hevc") for seconds in ("10", "20")
  ]
  for row in rows:
    ours, workers, old, *ratios = map(float, row[2:])
    expected = [old / ours, old / workers, 1]
    assert ratios == pytest.approx(expected, rel=1e-2)
  found = video.probe(tmp_path / "hevc_20.mp4")
  assert (found.num_frames, found.duration) == (500, 20)


def test_a_clip_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
  monkeypatch.setattr(decode_speed, "_SIZE", (64, 48))
  path, moving = tmp_path / "h264_20.mp4", clip_matrix.moving

  def killed(number, *size):
    assert not list(tmp_path.glob("*.mp4"))
    if number == 30:
      raise KeyboardInterrupt
    return moving(number, *size)

  monkeypatch.setattr(clip_matrix, "moving", killed)
  with pytest.raises(KeyboardInterrupt):
    decode_speed.make(path, "h264", 20)
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr(clip_matrix, "moving", moving)
  decode_speed.make(path, "h264", 20)
  assert video.probe(path).num_frames == 500
  assert {*tmp_path.iterdir()} == {path, tmp_path / "h264_10.mp4"}


def test_mistakes_are_named(tmp_path):
  with pytest.raises(errors.UserError, match="gone: no checkout"):
    commands.run(decode_speed, workdir=tmp_path, old=tmp_path / "gone")
  for seconds in ("5", "0", "long", ""):
    with pytest.raises(errors.UserError, match="give tens, as 10,60,600"):
      commands.run(decode_speed, workdir=tmp_path, seconds=seconds)
  with pytest.raises(errors.UserError, match="the reader ours ended"):
    list(decode_speed.measure([tmp_path / "no.mp4"], {"ours": (HERE, "")}, 1))
