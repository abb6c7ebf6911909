r"""Asks a video model a question and says what it answers from fewer tokens.

python -m cacovid_jax.answer --video clip.mp4 --question "Which came first?" \
    --options "red,blue,green,grey" --method uniform --compare 1.0,0.25,0.1
python -m cacovid_jax.answer --model DIR --policy POLICY --video clip.mp4 \
    --question "What happens?" --ratio 0.1 --report report.html

Prints the answer, the tokens kept of all, and milliseconds per stage of a
second run, so that compilation is apart. Without --model, the small model of
the embedded benchmark answers; it knows questions with options, about clips as
`python -m cacovid_jax.prepare` draws them.
"""

import sys

from absl import flags

from cacovid_jax import errors
from cacovid_jax.evals import answering
from cacovid_jax.evals.report import answer as answer_page

_MODEL = flags.DEFINE_string(
  "model", None, "Hugging Face checkpoint directory; the shipped model if none."
)
_POLICY = flags.DEFINE_string(
  "policy", None, "Training workdir or policy file; PATH?module=F.py:CLASS."
)
_VIDEO = flags.DEFINE_string("video", None, "Video file.")
_QUESTION = flags.DEFINE_string("question", None, "What to ask about it.")
_OPTIONS = flags.DEFINE_string(
  "options",
  None,
  "Choices, comma-separated (or separated by | where one holds a comma).",
)
_RATIO = flags.DEFINE_string(
  "ratio", None, "Share of the video tokens to keep, in (0, 1]; 0.1 if none."
)
_COMPARE = flags.DEFINE_string(
  "compare", None, "Several ratios side by side; 1.0 keeps everything."
)
_METHOD = flags.DEFINE_string(
  "method", "cacovid", "Which tokens are kept; see compressors.names()."
)
_NUM_FRAMES = flags.DEFINE_integer(
  "num_frames", None, "Frames shown; what the checkpoint's files say, or 32."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 64, "Longest answer in tokens."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", answering.DTYPES, "Of weights and computation."
)
_STYLE = flags.DEFINE_enum(
  "prompt_style", "video-r1", answering.STYLES, "Wording around the options."
)
_REPORT = flags.DEFINE_string(
  "report", None, "HTML page to write: kept tokens on the frames."
)


def main(argv):
  """Asks what the flags say."""
  if len(argv) > 1:
    raise errors.UserError(
      f"unexpected argument {argv[1]!r}; flags start by --"
    )
  for flag in (_VIDEO, _QUESTION):
    if flag.value is None:
      raise errors.UserError(
        f"nothing says which {flag.name}: add --{flag.name}"
      )
  if _REPORT.value:
    answering.check_report_path(_REPORT.value)
  with answering.Answerer(
    _MODEL.value,
    _POLICY.value,
    num_frames=_NUM_FRAMES.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    dtype=_DTYPE.value,
  ) as answerer:
    asked = answerer.ask(
      _VIDEO.value,
      _QUESTION.value,
      _listed(_OPTIONS.value),
      ratios=_ratios(),
      method=_METHOD.value,
      style=_STYLE.value,
    )
    for warning in asked.warnings:
      print(f"warning: {warning}", file=sys.stderr)
    answer_page.show(asked)
    if _REPORT.value:
      answerer.write_report(_REPORT.value, asked)
      print(f"report: {_REPORT.value}")


def _ratios():
  if _RATIO.value is not None and _COMPARE.value is not None:
    raise errors.UserError(
      "--ratio and --compare are both given; --compare takes all the ratios"
    )
  if _COMPARE.value is None:
    return [0.1 if _RATIO.value is None else _RATIO.value]
  return [part for part in _COMPARE.value.split(",") if part.strip()]


def _listed(text):
  if not text:
    return ()
  return text.split("|" if "|" in text else ",")


if __name__ == "__main__":
  errors.run(main)
