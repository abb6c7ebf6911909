"""Settings of an evaluation, for the `evals` section of a config."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the unlocked defaults of `config.evals`."""
  return ml_collections.ConfigDict(
    dict(
      # Rows: names of `compressors.names()`, with options as in
      # "density_peaks?scope=video", or one's own "path/file.py:function";
      # "label=name?option=value" gives a row another name.
      methods=(
        "cacovid",
        "cacovid_untrained",
        "cacovid_other_question",
        "random",
        "uniform",
        "last_query",
        "divprune",
        "density_peaks",
      ),
      # Bounds, shown apart; only where decisive tokens are known.
      oracles=("decisive_boxes",),
      ratios=(0.25, 0.1, 0.05),
      # What is asked: one of `benchmarks.names()`, in the folder `data.root`.
      benchmark="prepared",
      # Empty takes the benchmark's first split.
      split="",
      # Seeds of random draws, of the untrained policy and of other questions;
      # accuracies are means over them.
      seeds=(0,),
      batch_size=8,
      # Longest answer in tokens; 0 takes the benchmark's own.
      max_new_tokens=0,
      # How letters are taken from answers: "paper" or "lmms-0.7.3".
      rule="paper",
      # The user's text: empty is the benchmark's own, "video-r1" that of
      # training, which prepared data has as its own.
      prompt_style="",
      # Chat template: "processor" or "tokenizer"; empty is the checkpoint's
      # default, the processor's where there is one.
      template="",
      # Rows that are unfit: "raise", or "skip" to leave them out and list them.
      on_bad_row="raise",
      # Clips that are not there: "raise" before anything is asked, or "count"
      # to count their questions as wrong and list them.
      on_missing="raise",
      # First so many questions; 0 asks all of them.
      num_questions=0,
      # File of another run's frames, which this one then has to show as well.
      frame_manifest="",
      # Where options are chosen: "validation" or "none". Candidates are
      # "name?option=value" texts by method; last_query tries all layers even
      # if it is not listed. The best one at `select_ratio` goes to the test.
      select_on="validation",
      select_ratio=0.1,
      select_questions=200,
      candidates=dict(),
      # Clips that the report shows frame by frame.
      num_examples=8,
    )
  )
