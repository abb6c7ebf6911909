"""Reads training and benchmark files into `Question` rows.

Every fault names the file, the row (counted from 1), the field and the reason.
`on_bad_row="skip"` leaves such rows out, counts and lists them in the report.
Pictures are outside the method: image rows of Video-R1 are left out and
counted. Each data set has a module, with its layout on disk and its prompt.
"""

from cacovid_jax.data.readers.egoschema import read_egoschema
from cacovid_jax.data.readers.longvideobench import read_longvideobench
from cacovid_jax.data.readers.mlvu import read_mlvu
from cacovid_jax.data.readers.mvbench import read_mvbench
from cacovid_jax.data.readers.nextqa import read_nextqa
from cacovid_jax.data.readers.own import read_own
from cacovid_jax.data.readers.tables import BadRow, Report
from cacovid_jax.data.readers.validation import find_missing
from cacovid_jax.data.readers.video_r1 import read_video_r1
from cacovid_jax.data.readers.videomme import read_videomme

__all__ = [
  "BadRow", "Report", "find_missing", "read_egoschema", "read_longvideobench",
  "read_mlvu", "read_mvbench", "read_nextqa", "read_own", "read_video_r1",
  "read_videomme",
]  # fmt: skip
