r"""Asks a video model a question and says what it answers from fewer tokens.

python -m cacovid_jax.answer --video clip.mp4 --question "Which came first?" \
    --options "red,blue,green,grey" --method uniform --ratios 1.0,0.25,0.1
python -m cacovid_jax.answer --model DIR --policy POLICY --video clip.mp4 \
    --question "What happens?" --ratios 0.1 --report report.html

Prints the answer, the tokens kept of all, and milliseconds per stage of a
second run, so that compilation is apart. Without --model, the small model of
the embedded benchmark answers; it knows questions with options, about clips as
`python -m cacovid_jax.prepare` draws them.
"""

from cacovid_jax import command, files, terminal
from cacovid_jax.evals.report import answer as answer_page
from cacovid_jax.inference import answerer as answerer_lib

COMMAND = command.Command(
  __doc__,
  {
    "video": command.Flag("Video file."),
    "question": command.Flag("What to ask about it."),
    "options": command.Flag(
      "Choices, comma-separated (or separated by | where one holds a comma)."
    ),
    "report": command.Flag("HTML page to write: kept tokens on the frames."),
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
  if args.report:
    files.check_writable(args.report, "--report")
  evals, options = args.config.evals, args.options
  with answerer_lib.Answerer.from_config(args.config) as answerer:
    asked = answerer.ask(
      args.video,
      args.question,
      options.split("|" if "|" in options else ",") if options else (),
      ratios=evals.ratios,
      method=evals.methods[0],
      style=evals.prompt_style or answerer_lib.STYLES[0],
    )
    for warning in asked.warnings:
      terminal.tell(f"warning: {warning}", error=True)
    answer_page.show(asked)
    if args.report:
      answer_page.write(args.report, answerer, asked)
      terminal.tell(f"report: {args.report}")


if __name__ == "__main__":
  COMMAND.run(main)
