"""Frames are written down once and must be the same ever after."""

import dataclasses
import functools
import hashlib
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors, json_lines
from cacovid_jax.data import frame_record, video
from cacovid_jax.evals import frame_manifest
from cacovid_jax.models import processors, video_llm
from tests.evals import tiny


class Model:
  """Features are mean colours."""

  config = types.SimpleNamespace(text=types.SimpleNamespace(hidden_size=3))
  dtype, backend, num_deep = jnp.float32, "auto", 0

  def tower_inputs(self, inputs, bucket=None):
    return inputs

  def encode(self, params, inputs, signals=()):
    inputs = video_llm.normalised(inputs)
    colours = inputs.values.mean(axis=(1, 2)) * params["weight"]
    return video_llm.VideoFeatures(colours, inputs.grid)


@pytest.fixture
def root(tmp_path):
  for name in "ab":
    tiny.write_clip(tmp_path / f"{name}.mp4", seed=ord(name), num_frames=9)
  (tmp_path / "text.mp4").write_text("no video")
  return tmp_path


def manifest_of(root, given="", num_frames=4):
  return frame_manifest.FrameManifest(
    root / "run" / "frames.jsonl", num_frames=num_frames, given=given
  )


def source_of(root, manifest):
  return tiny.open_store(
    root,
    Model(),
    {"weight": jnp.float32(1)},
    processors.LlavaOnevisionProcessor(image_size=16, frame_side=1),
    num_frames=4,
    manifest=manifest,
  )


def frame_hash(pixels):
  """Returns the sha256 of frames and their shape, the plain way."""
  shape = str(pixels.shape).encode()
  return hashlib.sha256(shape + pixels.tobytes()).hexdigest()


def lines_of(root):
  """Returns the objects of the run's file without their checksums."""
  lines = (root / "run" / "frames.jsonl").read_bytes().splitlines(True)
  found = map(json.loads, lines)
  records = [{k: v for k, v in x.items() if k != "crc"} for x in found]
  assert lines == [*map(json_lines.encode, records)]
  return records


def test_a_clip_is_written_down_when_it_is_asked_for(root):
  with source_of(root, manifest_of(root)) as source:
    # Decoding ahead changes nothing of the order.
    source.prefetch(["b.mp4", "a.mp4", "text.mp4"])
    shown = {name: source[name] for name in ("a.mp4", "text.mp4", "b.mp4")}
    source["a.mp4"]
  header, first, bad, second = lines_of(root)
  assert header["frames"]["num_frames"] == 4
  assert header["frames"]["decoder"].startswith("PyAV")
  assert (first["video"], second["video"]) == ("a.mp4", "b.mp4")
  assert bad == {"video": "text.mp4", "fault": "unreadable"}
  # linspace(0, 8, 4), truncated.
  assert first["indices"] == [0, 2, 5, 8]
  assert (first["num_frames"], first["size"]) == (9, [32, 32])
  assert first["duration"] == pytest.approx(9 / 8)
  content = hashlib.blake2b((root / "a.mp4").read_bytes(), digest_size=16)
  assert first["content"] == content.hexdigest()
  pixels = video.read_frames(root / "a.mp4", [0, 2, 5, 8])
  assert first["frame_hash"] == shown["a.mp4"].frame_hash == frame_hash(pixels)
  # Both clips are asked about at the same four of nine frames.
  assert shown["a.mp4"].index_hash == shown["b.mp4"].index_hash != ""
  assert shown["text.mp4"].index_hash == ""


def test_the_indices_of_the_manifest_are_decoded(root):
  with source_of(root, manifest_of(root)) as source:
    source["a.mp4"]
  path = root / "run" / "frames.jsonl"
  header, line = lines_of(root)
  # Somebody else's frame rule.
  line["indices"] = [1, 2, 3, 8]
  pixels = video.read_frames(root / "a.mp4", line["indices"])
  line["frame_hash"] = frame_hash(pixels)
  given = root / "given.jsonl"
  given.write_text(json.dumps(header) + "\n" + json.dumps(line) + "\n")
  path.unlink()
  manifest = manifest_of(root, given)
  with source_of(root, manifest) as source:
    np.testing.assert_array_equal(source.frames("a.mp4"), pixels)
    source["a.mp4"]
  # The run keeps its own copy of what it has shown.
  assert lines_of(root)[1] == line
  manifest.require(["a.mp4"])
  with pytest.raises(errors.UserError, match="1 of 2 clips .first: b.mp4"):
    manifest.require(["a.mp4", "b.mp4", "b.mp4"])


def test_lines_without_counts_of_damage_are_read(root):
  with source_of(root, manifest_of(root)) as source:
    source["a.mp4"]
  record = manifest_of(root)["a.mp4"]
  assert record.damage == {}
  counted = dataclasses.replace(record, replaced=1, lost=2)
  assert counted == record and counted.damage == {"replaced": 1, "lost": 2}
  manifest = manifest_of(root)
  manifest.add(counted)
  manifest.add(dataclasses.replace(counted, video="b.mp4"))
  *_, first, second = lines_of(root)
  assert "lost" not in first and second["lost"] == 2
  assert manifest_of(root)["b.mp4"].damage == {"replaced": 1, "lost": 2}
  path = root / "run" / "frames.jsonl"
  json_lines.append(path, [second | {"video": "c.mp4", "lost": "2"}])
  assert manifest_of(root)["c.mp4"] is None
  assert b"c.mp4" in path.with_name("frames.jsonl.damaged").read_bytes()


def test_a_clip_that_was_mended_is_taken(root):
  good = (root / "a.mp4").read_bytes()
  (root / "a.mp4").write_bytes(b"not a video")
  with source_of(root, manifest_of(root)) as source:
    assert source["a.mp4"].fault == "unreadable"
  given = root / "given.jsonl"
  given.write_bytes((root / "run" / "frames.jsonl").read_bytes())
  (root / "a.mp4").write_bytes(good)
  with source_of(root, manifest_of(root)) as source:
    assert source["a.mp4"].fault == ""
  assert [line.get("fault") for line in lines_of(root)[1:]] == [
    "unreadable",
    None,
  ]
  assert manifest_of(root)["a.mp4"].indices == (0, 2, 5, 8)
  # The file of another run says what that run was shown: nothing.
  (root / "run" / "frames.jsonl").unlink()
  with source_of(root, manifest_of(root, given)) as source:
    assert source["a.mp4"].fault == "unreadable"


def test_another_file_of_the_same_name_is_refused(root):
  with source_of(root, manifest_of(root)) as source:
    source["a.mp4"]
  tiny.write_clip(root / "a.mp4", seed=7, num_frames=9)
  with source_of(root, manifest_of(root)) as source:
    with pytest.raises(errors.UserError, match="a.mp4: .*another content") as e:
      source["a.mp4"]
  assert "frames.jsonl" in str(e.value) and "\n" not in str(e.value)
  tiny.write_clip(root / "a.mp4", seed=7, num_frames=5)
  with source_of(root, manifest_of(root)) as source:
    with pytest.raises(errors.UserError, match="5 frames instead of 9"):
      source["a.mp4"]


def test_another_decoder_is_refused_by_name(root, monkeypatch):
  with source_of(root, manifest_of(root)) as source:
    source["a.mp4"]
  decode = video.decode

  def changed(*args, **options):
    clip = decode(*args, **options)
    return dataclasses.replace(clip, frame_hash=clip.frame_hash[::-1])

  monkeypatch.setattr(video, "decode", changed)
  with source_of(root, manifest_of(root)) as source:
    with pytest.raises(errors.UserError, match="may have sought wrongly;") as e:
      source["a.mp4"]
  assert "PyAV" not in str(e.value) and "frames.jsonl" in str(e.value)
  monkeypatch.setattr(frame_record, "decoder", lambda: "New 2.0")
  with source_of(root, manifest_of(root)) as source:
    with pytest.raises(
      errors.UserError, match="New 2.0 gives other frames than PyAV"
    ):
      source["a.mp4"]


def test_processes_share_a_file(root):
  """Each reads what the other has added in the meantime."""
  path = root / "run" / "frames.jsonl"
  with (
    source_of(root, manifest_of(root)) as first,
    source_of(root, manifest_of(root)) as second,
  ):
    first["a.mp4"]
    second["b.mp4"]
    # Killed while it wrote: what is cut off is removed.
    with open(path, "a") as f:
      f.write('{"video": "c.m')
    first["b.mp4"]
    second["a.mp4"]
    second["text.mp4"]
  assert [line.get("video") for line in lines_of(root)] == [
    None,
    "a.mp4",
    "b.mp4",
    "text.mp4",
  ]


def plain(record, **changes):
  return json.dumps(record | changes).encode() + b"\n"


@pytest.mark.parametrize(
  "change, bad",
  [
    (lambda header, first, second: [header, b"{]\n", first, second], b"{]\n"),
    (lambda header, first, second: [b"\xff\n", first, second], b"\xff\n"),
    (lambda header, first, second: [first, second], b""),
    (
      lambda header, first, second: [
        *(header, first, second),
        plain({"video": "x"}),
      ],
      b'{"video": "x"}\n',
    ),
    (
      lambda header, first, second: [
        *(header, first, second),
        plain({"video": "x", "indices": [0, 2, 5, 9], "num_frames": 9,
               "size": [32, 32], "frame_hash": "0"}),
      ],
      b'{"video": "x", "indices": [0, 2, 5, 9], "num_frames": 9,'
      b' "size": [32, 32], "frame_hash": "0"}\n',
    ),
    (lambda header, first, second: [header, first, second[:30]], None),
    (
      lambda header, first, second: [
        *(header, first),
        second.replace(b"5, 8]", b"5, 7]"),
      ],
      None,
    ),
  ],
)  # fmt: skip
def test_a_damaged_line_is_set_aside_and_its_clip_decoded_again(
  root, change, bad
):
  with source_of(root, manifest_of(root)) as source:
    source["a.mp4"], source["b.mp4"]
  path, expected = root / "run" / "frames.jsonl", lines_of(root)
  lines = list(map(json_lines.encode, expected))
  path.write_bytes(b"".join(change(*lines)))
  with source_of(root, manifest_of(root)) as source:
    source["b.mp4"], source["text.mp4"]
  # The header, whose place is not fixed, and every clip once.
  expected.append({"video": "text.mp4", "fault": "unreadable"})
  found = lines_of(root)
  text = functools.partial(json.dumps, sort_keys=True)
  assert sorted(map(text, found)) == sorted(map(text, expected))
  aside = path.with_name("frames.jsonl.damaged")
  if bad == b"":
    assert not aside.exists()
  elif bad:
    assert aside.read_bytes() == bad
  else:
    assert b"b.mp4" in aside.read_bytes() or len(aside.read_bytes()) == 31


def test_damage_that_another_process_finds_moves_nothing(root):
  """The file is then another one, and shorter."""
  first = manifest_of(root)
  with source_of(root, first) as source:
    source["a.mp4"], source["b.mp4"]
  path, expected = root / "run" / "frames.jsonl", lines_of(root)
  data = path.read_bytes()
  path.write_bytes(data.replace(b'"a.mp4"', b'"c.mp4"'))
  manifest_of(root)
  assert path.stat().st_size < len(data)
  with source_of(root, first) as source:
    source["text.mp4"]
  expected = [expected[0], expected[2]]
  expected.append({"video": "text.mp4", "fault": "unreadable"})
  assert lines_of(root) == expected


@pytest.mark.parametrize(
  "change, match",
  [
    (
      lambda header, line: [header, line, line | {"indices": [1, 2, 5, 8]}],
      "two different lines about a.mp4",
    ),
    (
      lambda header, line: [
        {"frames": header["frames"] | {"num_frames": 8}},
        line,
      ],
      "--num_frames=8",
    ),
  ],
)
def test_a_file_of_something_else_is_named(root, change, match):
  with source_of(root, manifest_of(root)) as source:
    source["a.mp4"]
  path = root / "run" / "frames.jsonl"
  changed = change(*lines_of(root))
  path.write_bytes(b"".join(map(json_lines.encode, changed)))
  with pytest.raises(errors.UserError, match=match) as error:
    manifest_of(root)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damage_of_a_given_file_is_told_and_left_there(root, caplog):
  with source_of(root, manifest_of(root)) as source:
    source["a.mp4"], source["b.mp4"]
  header, first, _ = map(json_lines.encode, lines_of(root))
  given = root / "given.jsonl"
  given.write_bytes(header + b"\xff\n" + first)
  (root / "run" / "frames.jsonl").unlink()
  manifest = manifest_of(root, given)
  assert "1 damaged lines" in caplog.text
  assert given.read_bytes() == header + b"\xff\n" + first
  manifest.require(["a.mp4"])
  with pytest.raises(errors.UserError, match="1 of 1 clips .first: b.mp4"):
    manifest.require(["b.mp4"])


def test_a_manifest_that_is_not_there(root):
  with pytest.raises(errors.UserError, match="no frame manifest nowhere"):
    manifest_of(root, "nowhere.jsonl")


def test_a_given_fault_of_two_words_is_told_as_it_was(root):
  with source_of(root, manifest_of(root)) as source:
    source["a.mp4"]
  header, _ = lines_of(root)
  given = root / "given.jsonl"
  line = {"video": "b.mp4", "fault": "too short"}
  given.write_text(json.dumps(header) + "\n" + json.dumps(line) + "\n")
  (root / "run" / "frames.jsonl").unlink()
  with source_of(root, manifest_of(root, given)) as source:
    with pytest.raises(video.VideoError, match="too short"):
      source.load("b.mp4")
    assert source["b.mp4"].fault == "too short"
