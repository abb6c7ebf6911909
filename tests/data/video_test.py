"""Clips are made here with PyAV; the number that a frame shows is its index."""

import functools
import os
import pickle

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from cacovid_jax import errors
from cacovid_jax.data import clip_index, frames, video
from cacovid_jax.models import processors

from . import clips

WANTED = [0, 3, 3, 7, 8, 9, 17, 23]


def _to(size):
  return functools.partial(frames.resize_frame, size=size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  clips.write(folder / "plain.mp4")
  return folder


@pytest.mark.parametrize(
  "name, options",
  [
    ("ahead.mp4", {"preset": "medium", "bf": "2"}),
    ("long_gop.mp4", {"gop": 250}),
    ("clip.mkv", {}),
    ("clip.avi", {"codec": "mpeg4"}),
    ("clip.ts", {}),
    ("fast.mp4", {"size": 48}),
  ],
)
def test_exactly_the_frames_asked_for(folder, name, options):
  path = clips.write(folder / name, **options)
  assert video.probe(path).num_frames == 24
  assert clips.numbers(video.read_frames(path, WANTED)) == WANTED


def test_order_and_repetition_of_the_indices_are_kept(folder):
  got = video.read_frames(folder / "plain.mp4", [20, 2, 2, 11])
  assert clips.numbers(got) == [20, 2, 2, 11]


def test_probe_tells_frames_and_seconds(folder):
  got = video.probe(folder / "plain.mp4")
  assert got.num_frames == 24
  assert video.frame_size(folder / "plain.mp4") == (64, 64)
  assert got.duration == pytest.approx(2.4)


def test_sequential_fallback_gives_the_same_frames(folder, monkeypatch):
  expected = video.read_frames(folder / "plain.mp4", WANTED)
  monkeypatch.setattr(
    clip_index.ClipIndex, "of_packets", lambda *a, **k: clip_index.ClipIndex()
  )
  got = video.read_frames(folder / "plain.mp4", WANTED)
  np.testing.assert_array_equal(got, expected)


def test_a_wrong_seek_index_falls_back_to_counting(folder, monkeypatch):
  # Keyframes that are none: the seek lands on an earlier one, or beyond.
  of_packets = clip_index.ClipIndex.of_packets
  whole = video._Reader.whole
  decoded = []

  def wrong(*args, **options):
    index = of_packets(*args, **options)
    keys = np.array([0, 5, 13])
    landings = np.stack([index.stamps[keys + [8, 3, 0]]] * 3, axis=1)
    return index._replace(keys=keys, landings=landings)

  def count(self, index):
    decoded.append(index)
    return whole(self, index)

  monkeypatch.setattr(clip_index.ClipIndex, "of_packets", wrong)
  monkeypatch.setattr(video._Reader, "whole", count)
  got = video.read_frames(folder / "plain.mp4", WANTED)
  assert clips.numbers(got) == WANTED and len(decoded) == 1


def test_frames_that_an_edit_list_hides_do_not_count(folder):
  path = clips.write_edited(folder / "edited.mp4", folder / "plain.mp4")
  assert video.probe(path).num_frames == 19
  assert clips.numbers(video.read_frames(path, [0, 1, 10, 18])) == [
    5,
    6,
    15,
    23,
  ]


@pytest.mark.parametrize(
  "matrix, turned",
  [
    ((1, 0, 0, 1), lambda x: x),
    ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    ((0, -1, 1, 0), np.rot90),
    # Mirrored, as front cameras do.
    ((-1, 0, 0, 1), np.fliplr),
    ((1, 0, 0, -1), np.flipud),
    ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
  ],
)
def test_the_display_matrix_is_applied(folder, matrix, turned):
  source = clips.write(folder / "lying.mp4", 8, width=64, height=32)
  path = clips.write_rotated(folder / "rotated.mp4", source, matrix)
  plain = video.read_frames(source, [5])[0]
  got = video.read_frames(path, [5])[0]
  np.testing.assert_array_equal(got, turned(plain))
  # What resizes sees the picture upright.
  shapes = []
  video.decode(
    path, lambda n, s: [5], resize=lambda x: shapes.append(x.shape) or x
  )
  assert shapes == [turned(plain).shape]
  assert video.frame_size(path) == turned(plain).shape[:2]


def test_the_size_of_a_clip_that_holds_no_picture(folder):
  with pytest.raises(video.VideoError, match="missing"):
    video.frame_size(folder / "nowhere.mp4")
  clips.write_sound(folder / "sound.mp4")
  with pytest.raises(video.VideoError, match="no video stream"):
    video.frame_size(folder / "sound.mp4")


@pytest.mark.parametrize("name", ["varies.mp4", "varies.mkv"])
def test_a_variable_rate_is_told_and_frames_are_picked_by_number(folder, name):
  stamps = [0, 40, 80, 500, 1000, 1040, 3000, 3100]
  path = clips.write(folder / name, 8, stamps=stamps)
  got = video.probe(path)
  assert got.num_frames == 8
  # 3.1 s and what the last frame lasts.
  assert 3.1 < got.duration < 3.7
  assert any("rate varies" in text for text in got.warnings)
  clip = video.decode(path, lambda n, s: np.linspace(0, n - 1, 4, dtype=int))
  assert clips.numbers(clip.frames) == [0, 2, 4, 7]
  assert clip.warnings == got.warnings and clip.duration == got.duration


def test_stamps_win_against_a_header_that_is_wrong(folder):
  # Matroska keeps the rate of 10 that the writer was given.
  stamps = range(0, 8000, 500)
  path = clips.write(folder / "slow.mkv", 16, stamps=stamps)
  got = video.probe(path)
  assert got.duration == pytest.approx(8.0, abs=0.5)
  (warning,) = got.warnings
  assert "the header gives 1.60 s" in warning


@pytest.mark.parametrize(
  "name", ["plain.mp4", "steady.mkv", "steady.avi", "steady.ts", "edited.mp4"]
)
def test_a_steady_rate_brings_no_warning(folder, name):
  if name == "edited.mp4":
    clips.write_edited(folder / name, folder / "plain.mp4")
  elif name != "plain.mp4":
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    clips.write(folder / name, codec=codec)
  got = video.probe(folder / name)
  assert got.warnings == ()
  assert got.duration == pytest.approx(got.num_frames / 10)


def test_a_clip_of_a_fraction_of_a_second_repeats_its_frames(folder):
  path = clips.write(folder / "short.mp4", 4)
  assert video.probe(path).duration == pytest.approx(0.4)
  clip = video.decode(path, lambda n, s: frames.eval_linspace(n, 8))
  # linspace(0, 3, 8): steps of 3/7.
  assert clips.numbers(clip.frames) == [0, 0, 0, 1, 1, 2, 2, 3]
  with pytest.raises(video.VideoError, match="too short .*4 frames, 0.40 s"):
    video.decode(path, lambda n, s: frames.train_linspace_1fps(n, s))


def test_4k_frames_are_decoded_and_resized_one_by_one(folder):
  path = clips.write(folder / "4k.mp4", 4, width=3840, height=2160)
  assert video.probe(path).warnings == ()
  assert video.frame_size(path) == (2160, 3840)
  clip = video.decode(path, lambda n, s: [0, 1, 3], resize=_to(64))
  assert clip.frames.shape == (3, 64, 64, 3)
  assert clips.numbers(clip.frames) == [0, 1, 3]
  config = processors.Qwen2_5VLProcessor(
    min_pixels=processors.PAPER_MIN_PIXELS,
    max_pixels=processors.PAPER_MAX_PIXELS,
  )
  fit = functools.partial(config.resize_frame, num_frames=3)
  clip = video.decode(path, lambda n, s: [0, 1, 3], resize=fit)
  # sqrt(3840 * 2160 / 200704) = 6.43: 336 and 597 pixels.
  assert clip.frames.shape == (3, 336, 588, 3)
  assert clips.numbers(clip.frames) == [0, 1, 3]
  fps = frames.sampled_fps(3, clip.duration)
  patches = config(clip.frames, fps=fps, resized=True)
  assert patches.grid == (2, 12, 21)
  assert patches.second_per_grid_t == pytest.approx(2 * 0.4 / 3)


def _converting(path, fault):
  """Returns what is raised where a picture's conversion raises `fault`."""

  class Converter:
    def reformat(self, *unused, **options):
      raise fault

  with video._Reader(path, video.Limits()) as reader:
    reader._converter = Converter()
    with pytest.raises(errors.UserError) as caught:
      reader.upright(av.VideoFrame(64, 64, "rgb24"))
  return caught


def test_a_system_without_threads_is_not_taken_for_a_bad_clip(folder):
  fault = av.error.BlockingIOError(11, "Resource temporarily unavailable")
  caught = _converting(folder / "plain.mp4", fault)
  assert caught.match("run fewer processes")
  assert not isinstance(caught.value, video.VideoError)


def test_a_picture_that_cannot_be_converted_is_the_clips_fault(folder):
  fault = av.error.OSError(95, "Operation not supported")
  caught = _converting(folder / "plain.mp4", fault)
  assert caught.match("not supported")
  assert isinstance(caught.value, video.VideoError)
  assert caught.value.reason == "unreadable"


def test_frames_are_resized_while_decoding(folder):
  clip = video.decode(
    folder / "plain.mp4", lambda n, s: [0, n - 1], resize=_to(32)
  )
  assert clip.frames.shape == (2, 32, 32, 3)
  assert clip.num_frames == 24 and clip.replaced == 0


def test_an_encoded_clip_in_memory_is_decoded(folder):
  data = (folder / "plain.mp4").read_bytes()
  clip = video.decode(data, lambda n, s: [4])
  assert clips.numbers(clip.frames) == [4]


def test_a_clip_with_one_frame(folder):
  path = clips.write(folder / "one.mp4", 1)
  assert video.probe(path).warnings == ()
  clip = video.decode(path, lambda n, s: frames.eval_linspace(n, 3))
  assert clips.numbers(clip.frames) == [0, 0, 0]
  assert clip.duration == pytest.approx(0.1)
  patches = processors.Qwen2_5VLProcessor.tiny()(video.read_frames(path, [0]))
  assert patches.grid[0] == 1
  # Both frames of the only slice are that frame.
  halves = patches.values.reshape(-1, 3, 2, 4, 4)
  np.testing.assert_array_equal(halves[:, :, 0], halves[:, :, 1])


def test_a_cut_tail_shortens_the_clip(folder):
  # Matroska keeps no index at the front, so a cut file still plays.
  whole = clips.write(folder / "whole.mkv").read_bytes()
  path = folder / "cut.mkv"
  path.write_bytes(whole[: len(whole) * 2 // 3])
  num_frames = video.probe(path).num_frames
  assert 2 < num_frames < 24
  assert clips.numbers(video.read_frames(path, [0, 2])) == [0, 2]


def test_a_damaged_tail_clamps_to_the_last_decoded_frame(folder):
  clips.write(folder / "index_first.mp4", gop=24)
  data = bytearray((folder / "index_first.mp4").read_bytes())
  start = data.find(b"mdat") + 4
  end = data.find(b"moov") - 4
  middle = (start + end) // 2
  data[middle:end] = bytes(end - middle)
  path = folder / "damaged.mp4"
  path.write_bytes(data)
  clip = video.decode(path, lambda n, s: [0, 1, n - 2, n - 1])
  assert clip.frames.shape == (4, 64, 64, 3)
  assert clips.numbers(clip.frames[:2]) == [0, 1]
  np.testing.assert_array_equal(clip.frames[2], clip.frames[3])
  assert clip.replaced == 2
  assert "2 of 4 frames cannot be decoded" in clip.warnings[-1]


def _reason(path, **limits) -> str:
  with pytest.raises(video.VideoError) as caught:
    video.decode(
      path, lambda n, s: [0], limits=video.Limits(**limits) if limits else None
    )
  assert "\n" not in str(caught.value)
  assert isinstance(caught.value, errors.UserError)
  return caught.value.reason


def test_every_unusable_file_has_a_typed_reason(folder):
  data = (folder / "plain.mp4").read_bytes()
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "half.mp4").write_bytes(data[: len(data) // 2])
  (folder / "text.mp4").write_text("not a clip" * 100)
  os.mkfifo(folder / "pipe.mp4")
  clips.write_sound(folder / "sound.mp4")
  assert _reason(folder / "absent.mp4") == "missing"
  assert _reason(folder / "empty.mp4") == "empty"
  assert _reason(folder / "half.mp4") == "unreadable"
  assert _reason(folder / "text.mp4") == "unreadable"
  assert _reason(folder / "sound.mp4") == "no_video_stream"
  assert _reason(folder / "pipe.mp4") == "not_a_file"
  assert _reason(folder) == "not_a_file"
  assert _reason(b"") == "empty"


@pytest.mark.parametrize("partial", [False, True])
def test_a_gif_is_read_as_it_is_shown(tmp_path, partial):
  """Pillow composes the frames, of which each may change a part alone."""
  path, pictures = tmp_path / "clip.gif", []
  for number in range(7):
    picture = Image.new("RGB", (40, 30), (30, 60, 90))
    place = (4 * number, 10) if partial else (0, 0)
    picture.paste((25 * number, 200, 0), (*place, place[0] + 9, place[1] + 12))
    pictures.append(picture)
  times = [40, 40, 100, 40, 40, 40, 400]
  pictures[0].save(
    path, save_all=True, append_images=pictures[1:], duration=times,
    optimize=partial, disposal=1 + partial, loop=0,
  )  # fmt: skip
  with Image.open(path) as opened:
    composed = ImageSequence.Iterator(opened)
    shown = [np.asarray(frame.convert("RGB")) for frame in composed]
  clip = video.decode(path, lambda n, s: range(n))
  np.testing.assert_array_equal(clip.frames, shown)
  assert clip.num_frames == 7 and clip.replaced == clip.lost == 0
  assert clip.duration == pytest.approx(sum(times) / 1000)
  assert video.frame_size(path) == (30, 40)


def test_an_animated_webp_is_refused_with_the_reason(tmp_path):
  path = tmp_path / "clip.mp4"
  pictures = [Image.new("RGB", (16, 16), (9 * n, 0, 0)) for n in range(4)]
  pictures[0].save(path, "WebP", save_all=True, append_images=pictures[1:])
  for given in (path, path.read_bytes()):
    with pytest.raises(video.VideoError) as caught:
      video.probe(given)
    assert str(caught.value).endswith(
      ": unreadable (WebP, which FFmpeg does not read in motion); convert it,"
      " as by `magick clip.webp clip.mp4`"
    )


def test_caps_are_checked_before_decoding(folder):
  path = folder / "plain.mp4"
  assert _reason(path, max_bytes=100) == "too_many_bytes"
  assert _reason(path, max_pixels=64 * 63) == "too_large"
  assert _reason(path, max_seconds=2.0) == "too_long"
  assert _reason(path, max_frames=10) == "too_long"
  assert _reason(path, timeout_s=0.0) == "timeout"


@pytest.mark.parametrize(
  "text",
  [
    "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nplain.mp4\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile plain.mp4\n",
    "#EXTM3U\n#EXTINF:5,\nhttp://127.0.0.1:9/clip.ts\n#EXT-X-ENDLIST\n",
  ],
)
def test_a_renamed_playlist_opens_nothing(folder, text):
  (folder / "list.mp4").write_text(text)
  assert _reason(folder / "list.mp4") == "unreadable"


def test_a_path_that_looks_like_a_protocol_is_a_file_name(folder, monkeypatch):
  monkeypatch.chdir(folder)
  assert _reason("concat:plain.mp4|plain.mp4") == "missing"
  assert _reason("http://127.0.0.1:9/clip.mp4") == "missing"


def test_a_rule_that_takes_no_frame_or_an_impossible_one(folder):
  with pytest.raises(video.VideoError, match="too short"):
    video.decode(folder / "plain.mp4", lambda n, s: [])
  with pytest.raises(errors.UserError, match="0..24 lie outside"):
    video.read_frames(folder / "plain.mp4", [0, 24])


def test_errors_travel_between_processes():
  error = video.VideoError("clip.mp4", "empty", "0 bytes")
  again = pickle.loads(pickle.dumps(error))
  assert (again.reason, again.path) == ("empty", "clip.mp4")
  assert str(again) == str(error)


def test_paths_stay_below_the_media_root(tmp_path):
  root = tmp_path / "media"
  (root / "a").mkdir(parents=True)
  (tmp_path / "secret.mp4").write_bytes(b"x")
  (root / "out.mp4").symlink_to(tmp_path / "secret.mp4")
  (root / "a" / "in.mp4").symlink_to(root / "a" / "clip.mp4")
  real = os.path.realpath(root)
  assert video.safe_path(root, "a/clip.mp4") == f"{real}/a/clip.mp4"
  assert video.safe_path(root, "a/in.mp4") == f"{real}/a/clip.mp4"
  for relative in (
    "",
    "../secret.mp4",
    "a/../../secret.mp4",
    "a\\..\\..\\secret.mp4",
    str(tmp_path / "secret.mp4"),
    "out.mp4",
    "http://example.org/clip.mp4",
    "file:///etc/passwd",
    "concat:a.mp4|b.mp4",
    "a\0.mp4",
  ):
    with pytest.raises(video.VideoError) as caught:
      video.safe_path(root, relative)
    assert caught.value.reason == "unsafe"


def test_damaged_bytes_give_frames_or_a_typed_error(folder):
  data = (folder / "plain.mp4").read_bytes()
  rng = np.random.default_rng(0)
  outcomes = set()
  for _ in range(60):
    damaged = bytearray(data)
    for place in rng.integers(0, len(data), 8):
      damaged[place] = int(rng.integers(0, 256))
    try:
      clip = video.decode(
        bytes(damaged),
        lambda n, s: [0, n - 1],
        resize=_to(32),
        limits=video.Limits(timeout_s=20.0, max_pixels=2**22),
      )
      assert clip.frames.shape == (2, 32, 32, 3)
      outcomes.add("frames")
    except video.VideoError as error:
      outcomes.add(error.reason)
  assert "frames" in outcomes and len(outcomes) > 1
