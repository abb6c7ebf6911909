r"""Asks a video model a question and says what it answers from fewer tokens.

python -m cacovid_jax.answer --video clip.mp4 --question "Which came first?" \
    --options "red,blue,green,grey" --methods uniform --ratios 1.0,0.25,0.1
python -m cacovid_jax.answer --model DIR --policy POLICY --video clip.mp4 \
    --question "What happens?" --ratios 0.1 --report report.html
python -m cacovid_jax.answer --video a.mp4 --video b.mp4 \
    --question "What happens?" --config.mesh.data=2

Prints the answer, the tokens kept of all, and milliseconds per stage of a
second run, so that compilation is apart. Without --model, the small model of
the embedded benchmark answers; it knows questions with options, about clips as
`python -m cacovid_jax.prepare` draws them.

--video, --question and --options may be given several times, one of them for
each question; what is given once is that of all. Several devices answer as many
questions at once, by default all that there are, or config.mesh.data of them.
"""

from cacovid_jax import command, errors, files, terminal
from cacovid_jax.evals.report import answer as answer_page
from cacovid_jax.inference import answerer as answerer_lib

COMMAND = command.Command(
  __doc__,
  {
    "video": command.Flag("Video file.", default=(), many=True),
    "question": command.Flag("What to ask about it.", default=(), many=True),
    "options": command.Flag(
      "Choices, comma-separated (or separated by | where one holds a comma).",
      default=(),
      many=True,
    ),
    "report": command.Flag(
      "HTML page to write: kept tokens on the frames. Of further questions,"
      " REPORT_2.html and so on."
    ),
    "model": command.Flag(
      "Hugging Face checkpoint directory, or org/name of one in the local"
      " cache; the shipped model if empty.",
      "model.path",
    ),
    "policy": command.Flag(
      "Training workdir or .safetensors file of a trained policy.",
      "evals.policies",
    ),
    "ratios": command.Flag(
      "Shares of the video tokens to keep, side by side; 1.0 keeps everything.",
      "evals.ratios",
      old=("ratio", "compare"),
    ),
    "methods": command.Flag(
      "Which tokens are kept, by the first of these; see compressors.names().",
      "evals.methods",
      old=("method",),
    ),
    "num_frames": command.Flag(
      "Frames shown; 0 is what the checkpoint's files say, or 32.",
      "data.num_frames",
    ),
    "max_new_tokens": command.Flag(
      "Longest answer in tokens; 0 is 64.", "evals.max_new_tokens"
    ),
    "dtype": command.Flag("Of weights and computation.", "model.dtype"),
    "prompt_style": command.Flag(
      "Wording around the options; empty is video-r1.",
      "evals.prompt_style",
      choices=answerer_lib.STYLES,
    ),
  },
  defaults={
    "model.dtype": "float32",
    "data.num_frames": 0,
    "evals.ratios": (0.1,),
    "evals.methods": ("cacovid",),
  },
)


def main(args):
  """Asks what the command line says."""
  COMMAND.require(args, "video", "question", "methods", "ratios")
  asked, evals = questions(args), args.config.evals
  reports = []
  if args.report:
    reports = [files.check_writable(args.report, "--report")]
    for number in range(2, len(asked) + 1):
      path = reports[0].with_stem(f"{reports[0].stem}_{number}")
      reports.append(files.check_writable(path, "--report"))
  with answerer_lib.Answerer.from_config(
    args.config, at_once=len(asked)
  ) as answerer:
    found = answerer.ask_all(
      asked,
      ratios=evals.ratios,
      method=evals.methods[0],
      style=evals.prompt_style or answerer_lib.STYLES[0],
    )
    for number, answers in enumerate(found):
      for warning in answers.warnings:
        terminal.tell(f"warning: {warning}", error=True)
      answer_page.show(answers)
      if reports:
        answer_page.write(reports[number], answerer, answers)
        terminal.tell(f"report: {reports[number]}")


def questions(args) -> list[tuple[str, str, list[str]]]:
  """Returns video, question and options of each question."""
  given = {"video": args.video, "question": args.question}
  given["options"] = args.options or ("",)
  count = max(map(len, given.values()))
  for name, texts in given.items():
    errors.check(
      len(texts) in (1, count),
      f"--{name} is given {len(texts)} times, another flag {count} times; give"
      " it once, or as often",
    )
  rows = zip(*(x * (count // len(x)) for x in given.values()), strict=True)
  return [
    (video, text, words.split("|" if "|" in words else ",") if words else [])
    for video, text, words in rows
  ]


if __name__ == "__main__":
  COMMAND.run(main)
