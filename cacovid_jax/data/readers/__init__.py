"""Reads training and benchmark files into `Question` rows.

Every fault names the file, the row (counted from 1), the field and the reason.
`on_bad_row="skip"` leaves such rows out, counts and lists them in the report.
Pictures are outside the method: image rows of Video-R1 are left out and
counted. Each benchmark has a module, with its layout on disk and its prompt.
"""

from cacovid_jax.data.readers.mlvu import DEV_TYPES as MLVU_DEV_TYPES
from cacovid_jax.data.readers.mlvu import TEST_TYPES as MLVU_TEST_TYPES
from cacovid_jax.data.readers.mlvu import read_mlvu
from cacovid_jax.data.readers.rows import (
  BadRow,
  Report,
  check_media,
  require_media,
)
from cacovid_jax.data.readers.video_r1 import read_video_r1
from cacovid_jax.data.readers.videomme import read_videomme

__all__ = [
  "BadRow",
  "MLVU_DEV_TYPES",
  "MLVU_TEST_TYPES",
  "Report",
  "check_media",
  "read_mlvu",
  "read_video_r1",
  "read_videomme",
  "require_media",
]
