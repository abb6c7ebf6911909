"""Qwen2.5-VL's positions, one token at a time: an oracle for the tests."""

import math

import numpy as np


def positions(ids, video_token, grid, seconds, tokens_per_second, rule):
  """Returns (int[3, L], next position): a counter that a video pushes ahead."""
  found, following, at_video = [], 0, 0
  _, height, width = grid
  for token in ids:
    if token != video_token:
      found.append((following,) * 3)
      following += 1
      continue
    if at_video == 0:
      start = following
    slice_number, place = divmod(at_video, height * width)
    # The margin is for decimal seconds, which float32 rounds up or down.
    time = math.floor(slice_number * seconds * tokens_per_second + 1e-4)
    found.append((start + time, start + place // width, start + place % width))
    at_video += 1
    if rule == "v5":
      following = start + max(height, width)
    else:
      following = max(following, *(value + 1 for value in found[-1]))
  return np.array(found).T, max(max(places) for places in found) + 1
