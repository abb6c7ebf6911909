"""Small clips for tests; a bar code of eight columns numbers the frames."""

import fractions
import struct

import av
import numpy as np

from experiments import clip_matrix


def decode_all(path) -> list[np.ndarray]:
  """Returns the pictures uint8[h,w,3] of the whole stream, as they come."""
  return list(clip_matrix.truth(path))


def picture(number: int, size: int = 64, height=None) -> np.ndarray:
  """Returns uint8[height or size,size,3] that shows a number below 256."""
  image = np.zeros((height or size, size, 3), np.uint8)
  width = size // 8
  for bit in range(8):
    if number >> bit & 1:
      image[:, bit * width : (bit + 1) * width] = 255
  return image


def numbers(frames: np.ndarray) -> list[int]:
  """Returns the numbers that uint8[T,h,w,3] frames show."""
  width = frames.shape[2] // 8
  return [
    sum(
      1 << bit
      for bit in range(8)
      if frame[:, bit * width + 2 : (bit + 1) * width - 2].mean() > 128
    )
    for frame in frames
  ]


def write(
  path,
  num_frames=24,
  *,
  size=64,
  width=None,
  height=None,
  stamps=None,
  gop=8,
  rate=10,
  codec="libx264",
  show=picture,
  pix_fmt="yuv420p",
  **options,
):
  """Writes a clip whose frames show 0, 1, 2, ..., at `stamps` milliseconds."""
  width, height = width or size, height or size
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height = width, height
    stream.pix_fmt = pix_fmt
    if codec == "libx264":
      options = {"g": str(gop), "preset": "ultrafast", **options}
    stream.options = options
    if stamps is not None:
      stream.codec_context.time_base = fractions.Fraction(1, 1000)
    for number in range(num_frames):
      image = show(number, width, height)
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      if stamps is not None:
        frame.pts = stamps[number]
        frame.time_base = fractions.Fraction(1, 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def write_sound(path):
  """Writes a file that holds sound only."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=8000)
    frame = av.AudioFrame.from_ndarray(
      np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
    )
    frame.sample_rate = 8000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def write_edited(path, source, hidden=5):
  """Copies a clip with an edit list that hides its first frames."""

  def earlier(_, packet, ticks):
    return clip_matrix.moved(packet, -hidden * ticks)

  options = {"avoid_negative_ts": "disabled"}
  return clip_matrix.copy(path, source, earlier, options)


# Display matrices (a, b, c, d): a player moves the pixel at (x, y) to
# (a x + c y, b x + d y).
TURNED = (0, 1, -1, 0)  # By a quarter, clockwise.


def write_rotated(path, source, matrix=TURNED):
  """Copies an mp4 with a display matrix, as of a camera that lay or stood."""
  data = bytearray(source.read_bytes())
  start = data.find(b"tkhd")
  # Version 0: times, id, duration (20 bytes), then 16 more before the matrix.
  place = start + 8 + 20 + 16
  a, b, c, d = (65536 * value for value in matrix)
  data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
  path.write_bytes(data)
  return path
