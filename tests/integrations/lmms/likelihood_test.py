"""Tasks that ask for the likelihood of options, under lmms-eval."""

import json

import pytest

from cacovid_jax import errors
from cacovid_jax.integrations.lmms_eval import answerer, arguments, requests
from tests.integrations.lmms import conftest

_FUNCTIONS = "cacovid_jax.integrations.lmms_eval.functions"
_YAML = f"""\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "ROWS"}}}}
test_split: test
doc_to_visual: !function {_FUNCTIONS}.doc_to_visual
doc_to_text: !function {_FUNCTIONS}.doc_to_text
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def run(task_dir, tmp_path):
  """Returns a function from the rest of a task to its samples."""

  def run(rest, **args):
    rows = str(task_dir / "cacovid_prepared.jsonl")
    text = _YAML.replace("ROWS", rows) + rest
    (tmp_path / "choices.yaml").write_text(text)
    return conftest.run("choices", tmp_path, **args)["samples"]["choices"]

  return run


@pytest.fixture(scope="module")
def rows(task_dir):
  text = (task_dir / "cacovid_prepared.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_the_likeliest_letter_is_the_one_that_is_generated(
  run, rows, evaluated
):
  samples = run(
    """\
output_type: multiple_choice
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{['A', 'B', 'C', 'D'].index(answer)}}"
target_delimiter: ""
""",
    ratio=0.1,
    method="divprune",
  )
  out, said = evaluated
  assert len(samples) == len(rows)
  for sample in samples:
    losses, greedy = zip(*sample["filtered_resps"], strict=True)
    assert min(losses) > 0 and len(set(losses)) == 4
    text = said["divprune", rows[sample["doc_id"]]["question_id"]]
    assert text in tuple("ABCD")
    assert "ABCD"[losses.index(min(losses))] == text
    assert greedy == tuple(letter == text for letter in "ABCD")
  accuracy = sum(sample["acc"] for sample in samples) / len(samples)
  expected = out["methods"]["divprune"]["0.10"]["accuracy"]
  assert accuracy == pytest.approx(expected)


_SCORE = """
def process_results(doc, results):
  (loss, greedy), = results
  return {"acc": float(greedy)}
"""


def test_a_loss_is_the_mean_over_the_tokens_of_our_own_call(
  run, rows, tmp_path
):
  (tmp_path / "score.py").write_text(_SCORE)
  samples = run(
    """\
output_type: loglikelihood
doc_to_target: prompt
process_results: !function score.process_results
""",
    ratio=1.0,
  )
  model = answerer.RequestAnswerer(arguments.parse(ratio=1.0, batch_size="4"))
  asked = [
    requests.Asked("", row["question_id"], row["video"], row["prompt"])
    for row in rows
  ]
  found = model.likelihoods(asked, [row["prompt"] for row in rows])
  encode = model.checkpoint.tokenizer.encode
  model.close()
  assert len(samples) == len(rows)
  for sample in samples:
    ((loss, greedy),) = sample["filtered_resps"]
    own = found[sample["doc_id"]]
    count = len(encode(rows[sample["doc_id"]]["prompt"]))
    assert count > 8
    assert loss == pytest.approx(-own.log_prob / count, rel=1e-5)
    assert greedy == own.greedy


def test_a_task_of_several_rounds_is_refused(run):
  with pytest.raises(errors.UserError, match="a task of several rounds"):
    run(
      "output_type: generate_until_multi_round\ndoc_to_target: answer\n",
      ratio=1.0,
    )
