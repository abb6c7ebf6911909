"""From requests of either form to the same question."""

import os

import pytest

from cacovid_jax import errors
from cacovid_jax.evals import benchmarks
from cacovid_jax.integrations.lmms_eval import requests
from tests.data import benchmark_files


def _messages(*content, role="user"):
  return [{"role": role, "content": list(content)}]


_VIDEO = {"type": "video", "url": "clips/a.mp4"}
_TEXT = {"type": "text", "text": "What?\nA. x\nB. y\n"}


def test_both_forms_ask_the_same():
  expected = requests.Asked(
    place="t/test/0",
    identity="001-1",
    video="clips/a.mp4",
    prompt="What?\nA. x\nB. y\n",
  )
  simple = requests.from_simple(
    "What?\nA. x\nB. y\n", ["clips/a.mp4"], "t/test/0", "001-1"
  )
  chat = requests.from_chat(_messages(_VIDEO, _TEXT), "t/test/0", "001-1")
  assert simple == chat == expected


def test_texts_of_a_turn_are_put_together():
  parts = [{"type": "text", "text": text} for text in ("one ", "two")]
  found = requests.from_chat(_messages(parts[0], _VIDEO, parts[1]), "p")
  assert (found.prompt, found.identity) == ("one two", "")


@pytest.mark.parametrize(
  "messages, match",
  [
    (_messages(_TEXT), "hands over no video"),
    ([{"role": "user", "content": "Hello"}], "hands over no video"),
    (_messages(_VIDEO, _VIDEO, _TEXT), "hands over 2 visuals"),
    (_messages({"type": "image", "url": 0}, _TEXT), "content of type 'image'"),
    (_messages(_TEXT, role="system"), "conversation of"),
    (_messages(_VIDEO) + _messages(_TEXT), "conversation of"),
    ([], "conversation of"),
  ],
)
def test_other_conversations_are_refused(messages, match):
  with pytest.raises(errors.UserError, match=match) as caught:
    requests.from_chat(messages, "t/test/7")
  assert str(caught.value).startswith("t/test/7: ")


@pytest.mark.parametrize(
  "visuals, match",
  [
    ([], "no video"),
    (None, "no video"),
    (["a.mp4", "b.mp4"], "2 visuals"),
    ([object()], "a object"),
  ],
)
def test_other_visuals_are_refused(visuals, match):
  with pytest.raises(errors.UserError, match=match):
    requests.from_simple("What?", visuals, "t/test/0")


def _asked(place, identity, prompt="What?", video="a.mp4"):
  return requests.Asked(place, identity, video, prompt)


def test_rows_keep_their_own_ids_unless_they_share_one():
  found = requests.as_questions(
    [
      _asked("t/test/0", "1"),
      _asked("t/test/1", "2"),
      _asked("u/test/0", "2", prompt="Who?"),
      _asked("t/test/2", ""),
      _asked("u/test/1", "1"),
    ]
  )
  assert [question.id for question in found] == [
    "1", "t/test/1", "u/test/0", "t/test/2", "1",
  ]  # fmt: skip
  assert found[0] == found[4]
  assert found[2].prompt == "Who?"
  # Draws go by the row's own name, whatever other tasks call theirs.
  assert [question.rng_id for question in found] == [
    "1", "2", "2", "t/test/2", "1",
  ]  # fmt: skip


@pytest.mark.parametrize(
  "name, task, expected",
  [
    ("videomme", "videomme", "001-1"),
    ("mlvu_dev", "mlvu_dev", "plotQA_0"),
    ("mlvu_test", "mlvu_test_paper", "topic_reasoning_0"),
    ("longvideobench", "longvideobench_val_v", "vX0_0"),
    ("egoschema", "egoschema_subset", "10"),
    ("nextqa", "nextqa_mc_test", "1234567890_0"),
  ],
)
def test_rows_are_called_as_the_readers_call_them(
  name, task, expected, tmp_path
):
  fixture = benchmark_files.write(name, tmp_path)
  found = [
    requests.identity(row, task, number)
    for number, row in enumerate(fixture.rows)
  ]
  questions = benchmarks.load(tmp_path, benchmark=name).questions
  assert found == [question.id for question in questions]
  assert found[0] == expected
  assert len(set(found)) == len(found) > 1


def test_rows_without_a_name_are_counted_as_the_readers_count_them(tmp_path):
  fixture = benchmark_files.write("mvbench", tmp_path)
  rows = {
    path.stem: row
    for path, row in zip(fixture.files, fixture.rows, strict=True)
  }
  for question in benchmarks.load(tmp_path, benchmark="mvbench").questions:
    kind = question.category
    found = requests.identity(rows[kind], f"mvbench_{kind}", 0)
    assert found == question.id == f"{kind}:1"
  mlvu = {"video_name": "a.mp4", "task_type": "ego", "question": "What?"}
  found = requests.identity(mlvu, "mlvu_dev", 4)
  assert found == "test-00000-of-00001:5"


def test_other_rows_have_no_name_but_their_place():
  assert requests.identity({"question": "What?"}, "mvbench_other", 0) == ""
  assert requests.identity({"question": "What?"}, "mlvu_dev", 0) == ""
  assert requests.identity({"qid": 3}, "t", 0) == ""
  assert requests.identity("What?", "t", 0) == ""


def test_a_clip_is_named_from_the_root_of_the_file_system(tmp_path):
  path = tmp_path / "10:30.mp4"
  path.touch()
  (question,) = requests.as_questions([_asked("p", "1", video=str(path))])
  joined = os.path.join(os.path.abspath(os.sep), question.video)
  assert os.path.samefile(joined, path)
  assert not os.path.isabs(question.video)


def test_the_longest_answer_is_the_tasks():
  def length(**kwargs):
    return requests.max_new_tokens(kwargs, 1024, "t/test/0")

  assert length(until=["\n\n"], do_sample=False) == 1024
  assert length(max_new_tokens=16, temperature=0, num_beams=1) == 16
  with pytest.raises(errors.UserError, match="do_sample is set"):
    length(do_sample=True)
  with pytest.raises(errors.UserError, match="num_beams=3"):
    length(num_beams=3)
  with pytest.raises(errors.UserError, match="max_new_tokens=0 is no length"):
    length(max_new_tokens=0)
