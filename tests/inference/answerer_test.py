"""One question about one clip: answers, times, the page, and mistakes."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import answer as command
from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import simple
from cacovid_jax.data import frames, readers, video
from cacovid_jax.evals.report import answer as answer_page
from cacovid_jax.inference import answerer as answerer_lib
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import generation, processor_files
from cacovid_jax.synthetic import build
from tests.evals import report_test, tiny

QUESTION = "What colour is <b>it</b>?"
NEW = 3


pytestmark = pytest.mark.usefixtures("one_compilation")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  path = tmp_path_factory.mktemp("clips") / "a:b [1].mp4"
  tiny.write_clip(path, seed=3, num_frames=12)
  return path


@pytest.fixture(scope="module")
def answerer(checkpoint_dir, policy_file):
  with answerer_lib.Answerer(
    checkpoint_dir, policy_file, num_frames=tiny.FRAMES, max_new_tokens=NEW
  ) as made:
    yield made


@pytest.fixture(scope="module")
def asked(answerer, clip):
  return answerer.ask(
    clip, QUESTION, tiny.COLOURS, ratios=(1.0, 0.25), method="cacovid"
  )


def by_hand(checkpoint, checkpoint_dir, path, text, index):
  """Returns the answer from the tokens `index`, without any of the runner."""
  model, params = checkpoint.model, checkpoint.params
  count = video.probe(path).num_frames
  shown = video.read_frames(path, frames.eval_linspace(count, tiny.FRAMES))
  inputs = model.read_processor(checkpoint_dir)(shown)
  prompt = checkpoint.tokenizer.encode_prompt(text, tiny.NUM_VIDEO)
  dropped = set(range(tiny.NUM_VIDEO)) - set(np.asarray(index).tolist())
  rows = jnp.array(
    [i for i in range(prompt.length) if i - prompt.video_rows[0] not in dropped]
  )

  @jax.jit
  def answer(params, inputs):
    features = model.encode(params, inputs).features
    x = model.embed_prompt(
      params, jnp.asarray(prompt.ids), features, prompt.video_rows
    )
    return generation.greedy(
      model,
      params,
      x[rows][None],
      rows[None, None],
      jnp.array([len(rows)]),
      jnp.array([prompt.length]),
      max_new_tokens=NEW,
      eos_ids=checkpoint.eos_ids,
      pad_id=checkpoint.pad_id,
    )

  ids = answer(params, inputs)
  return checkpoint.tokenizer.decode(ids[0]).strip()


def test_answers_are_those_of_the_model_alone(
  answerer, checkpoint, checkpoint_dir, clip
):
  found = answerer.ask(
    clip,
    QUESTION,
    tiny.COLOURS,
    ratios=(0.25,),
    method="uniform",
    warm_up=False,
  )
  answer = found.answers[0]
  assert (answer.method, answer.kept) == ("uniform", 16)
  index = simple.even_positions(tiny.NUM_VIDEO, 16)
  expected = by_hand(
    checkpoint, checkpoint_dir, clip, found.question.prompt, index
  )
  assert answer.text == expected and expected


def test_a_policy_is_followed_at_every_ratio(asked, answerer):
  assert [answer.kept for answer in asked.answers] == [64, 16]
  assert [a.method for a in asked.answers] == ["vanilla", "cacovid"]
  assert asked.num_video == 64 and asked.grid == tiny.GRID
  engine = engine_lib.Engine(
    answerer.checkpoint,
    answerer.source(tiny.GRID),
    [asked.question],
    answerer.settings,
    policies=answerer.policies,
  )
  method = methods_lib.Method.parse("cacovid")
  for answer in asked.answers[1:]:
    condition = methods_lib.Condition(method, answer.ratio)
    found = engine.answer(asked.question, condition)
    np.testing.assert_array_equal(answer.trace.index, found.trace.index)
    assert answer.text == found.text


def test_options_are_lettered_as_in_training(asked):
  assert asked.question.prompt == (
    f"{QUESTION}\nA. red\nB. green\nC. blue\nD. grey\n Please provide only the"
    " single option letter (e.g., A, B, C, D, etc.)."
  )
  assert all(a.letter in ("", *"ABCD") for a in asked.answers)
  # Without options, the text is asked as it is.
  assert answerer_lib.as_question("x", " why? ").prompt == "why?"
  other = answerer_lib.as_question("x", "q", ("a", "b"), style="videomme")
  assert other.prompt.startswith("Select the best answer")


def test_every_stage_is_timed_apart_from_compilation(asked, answerer):
  assert set(asked.milliseconds) == {"decode", "tower"}
  whole, *pruned = asked.answers
  assert set(whole.milliseconds) == {"embed", "answer"}
  for answer in pruned:
    assert set(answer.milliseconds) == {"embed", "scores", "select", "answer"}
  times = [*asked.milliseconds.values()]
  for answer in asked.answers:
    times += answer.milliseconds.values()
    parts = sum(asked.milliseconds.values()) + sum(answer.milliseconds.values())
    assert asked.total(answer) == pytest.approx(parts)
  assert min(times) > 0
  # Compilation takes longer than all that is timed.
  assert asked.warm_up > sum(times) / 1e3


def test_another_question_compiles_nothing(asked, answerer, tmp_path):
  del asked  # It has compiled.
  programs = answerer.programs
  before = programs.compiled
  tiny.write_clip(tmp_path / "other.mp4", seed=8)
  again = answerer.ask(
    tmp_path / "other.mp4",
    "What colour is <i>it</i>?",
    tiny.COLOURS[::-1],
    ratios=(1.0, 0.25),
    warm_up=False,
  )
  assert programs.compiled == before
  assert min(before[kind] for kind in ("answer", "vanilla", "scores")) > 0
  assert again.warm_up is None


def test_attention_of_the_whole_prompt_counts_as_scores(answerer, clip):
  found = answerer.ask(
    clip,
    QUESTION,
    tiny.COLOURS,
    ratios=(0.25,),
    method="last_query",
    warm_up=False,
  )
  assert set(found.answers[0].milliseconds) == {
    "embed", "scores", "select", "answer",
  }  # fmt: skip


@pytest.mark.parametrize("num_frames", [1, 3])  # 0.125 and 0.375 s.
def test_short_clips_repeat_frames_with_a_warning(
  answerer, tmp_path, num_frames
):
  path = tmp_path / "short.mp4"
  tiny.write_clip(path, seed=5, num_frames=num_frames)
  found = answerer.ask(
    path,
    QUESTION,
    tiny.COLOURS,
    ratios=(0.25,),
    method="uniform",
    warm_up=False,
  )
  answer_page.write(tmp_path / "report.html", answerer, found)
  assert f"Warning: {path} has" in (tmp_path / "report.html").read_text()
  assert len(found.warnings) == 1
  assert f"has {num_frames} frame" in found.warnings[0]
  assert "\n" not in found.warnings[0]
  features = answerer.source(tiny.GRID)[found.question.video].features
  rows = features.reshape(tiny.FRAMES, 16, -1)
  shown = frames.eval_linspace(num_frames, tiny.FRAMES)
  for t in range(1, tiny.FRAMES):
    same = np.array_equal(rows[t], rows[t - 1])
    assert same == (shown[t] == shown[t - 1])
  assert found.answers[0].kept == 16


def test_a_clip_that_is_long_enough_warns_of_nothing(asked):
  assert asked.warnings == ()


def test_a_link_to_a_clip_is_followed(answerer, clip, tmp_path):
  link = tmp_path / "link.mp4"
  link.symlink_to(clip)
  found = answerer.ask(
    link,
    QUESTION,
    tiny.COLOURS,
    ratios=(0.25,),
    method="uniform",
    warm_up=False,
  )
  assert found.question.id == clip.name


def test_page_shows_what_was_kept_and_loads_nothing(asked, answerer, tmp_path):
  path = tmp_path / "not" / "yet" / "report.html"
  answer_page.write(path, answerer, asked)
  assert [p.name for p in path.parent.iterdir()] == ["report.html"]
  page = path.read_text(encoding="utf-8")
  outline = report_test.Outline(page)
  # One clip, T pictures, every ratio and the policy's scores for the script.
  assert len(outline.classed("clip")) == 1
  pictures = [a for t, a in outline.tags if t == "img" and "src" in a]
  assert len(pictures) == tiny.FRAMES
  kept = [a["d"] for a in outline.classed("kept") if "d" in a]
  assert sum(len(report_test.squares(path)) for path in kept) == 16
  (clip,) = outline.data()["viewer"]["clips"]
  (method,) = clip["views"]
  counts = {
    ratio: len(report_test.unpack(mask, tiny.NUM_VIDEO))
    for ratio, mask in clip["views"][method].items()
  }
  assert counts == {"1": 64, "0.25": 16}
  assert len(clip["scores"][method]["frames"]) == tiny.FRAMES
  assert clip["gold"] == ""
  text = " ".join(" ".join(outline.texts).split())
  for expected in ("vanilla", "64 of 64 (100 %)", "16 of 64 (25 %)", QUESTION):
    assert expected in text, expected
  # What is right is not known, so nothing is called right or wrong.
  assert not outline.classed("verdict")
  assert not outline.classed("up") and not outline.classed("down")
  assert "<b>it" not in page
  for tag, attributes in outline.tags:
    assert tag not in ("link", "iframe", "object", "embed")
    for name in ("src", "href"):
      value = attributes.get(name)
      assert value is None or value.startswith("data:image/jpeg;base64,")
  assert not re.search(r"https?://|@import", page)
  assert "default-src 'none'" in page


def test_page_of_vanilla_alone_shows_every_token(answerer, clip, tmp_path):
  found = answerer.ask(
    clip, QUESTION, tiny.COLOURS, ratios=(1.0,), warm_up=False
  )
  answer_page.write(tmp_path / "report.html", answerer, found)
  outline = report_test.Outline((tmp_path / "report.html").read_text("utf-8"))
  kept = [a["d"] for a in outline.classed("kept") if "d" in a]
  assert sum(len(report_test.squares(d)) for d in kept) == tiny.NUM_VIDEO


@pytest.mark.parametrize(
  "change,match",
  [
    ({"path": "nowhere.mp4"}, "nowhere.mp4: missing; give the path"),
    ({"path": "."}, "not a file"),
    ({"question": " \n"}, "the question is empty"),
    ({"question": "caf\udce9?"}, r"caf.udce9.* not UTF-8; set the terminal"),
    ({"options": ("red", "bl\udce9u")}, "or an option of it is not UTF-8"),
    ({"question": "why? " * 40_000}, "the model takes"),
    ({"question": "what is in <video>?"}, "stands for the clip"),
    ({"ratios": (0.0,)}, r"outside \(0, 1\]"),
    ({"ratios": (1.01,)}, r"outside \(0, 1\]"),
    ({"ratios": ("a tenth",)}, r"outside \(0, 1\]"),
    ({"ratios": (0.001,)}, "keeps no token"),
    ({"ratios": ()}, "no ratio given"),
    ({"method": "unifrom"}, "did you mean uniform?"),
    ({"method": "uniform?speed=2"}, "no option 'speed'"),
    ({"method": "decisive_boxes"}, "knows where the answer lies"),
    ({"method": "cacovid_other_question"}, "several clips"),
    ({"options": ("red",)}, "at least two"),
    ({"options": ("red", " ")}, "at least two"),
    ({"options": ("x",) * 27}, "more than there are letters"),
    ({"style": "plain"}, "give 'video-r1' or 'videomme'"),
  ],
)
def test_mistakes_are_one_line_before_anything_runs(
  answerer, clip, monkeypatch, change, match
):
  def never(*unused):
    raise AssertionError("the model ran")

  monkeypatch.setattr(answerer.source(tiny.GRID), "_encode", never)
  answerer.source(tiny.GRID).clear()
  arguments = dict(path=clip, question=QUESTION, method="uniform") | change
  with pytest.raises(errors.UserError, match=match) as caught:
    answerer.ask(arguments.pop("path"), arguments.pop("question"), **arguments)
  assert "\n" not in str(caught.value)


def test_clips_that_cannot_be_decoded(answerer, clip, tmp_path):
  broken = tmp_path / "broken.mp4"
  broken.write_bytes(b"no video at all")
  with pytest.raises(errors.UserError, match="broken.mp4: unreadable"):
    answerer.ask(broken, QUESTION, method="uniform")
  # The table of frames is whole; the pictures are not.
  data = bytearray(clip.read_bytes())
  start = data.find(b"mdat") + 4
  end = data.find(b"moov") - 4
  assert 4 <= start < end
  data[start:end] = bytes(end - start)
  hollow = tmp_path / "hollow.mp4"
  hollow.write_bytes(data)
  with pytest.raises(errors.UserError, match="hollow.mp4: no frames"):
    answerer.ask(hollow, QUESTION, method="uniform")


def test_a_clip_of_which_too_much_is_replaced_is_named(
  answerer, caplog, monkeypatch
):
  """Two of four frames: not too many, but for a stricter limit."""
  asking = dict(method="uniform", ratios=(0.25,), warm_up=False)
  folder = pathlib.Path(__file__).parents[1] / "data" / "cases"
  path = folder / "middle_zeroed.mp4"
  found = answerer.ask(path, QUESTION, tiny.COLOURS, **asking)
  assert len(found.warnings) == 2
  assert f"{path}: 2 of 4 frames cannot be decoded" in found.warnings[1]
  assert not caplog.records  # It would be said twice.
  source = answerer.source(tiny.GRID)
  source.clear()
  strict = dataclasses.replace(source.reader, max_replaced=0.4)
  monkeypatch.setattr(source, "reader", strict)
  with pytest.raises(errors.UserError) as caught:
    answerer.ask(path, QUESTION, tiny.COLOURS, **asking)
  assert str(caught.value).endswith(
    "zeroed.mp4: too damaged (2 of 4 frames cannot be decoded); download the"
    " clip again or raise config.data.max_replaced"
  )
  source.clear()


def test_learned_methods_say_where_a_policy_comes_from(
  checkpoint_dir, clip, policy_file, monkeypatch, tmp_path
):
  monkeypatch.setattr(experiment_lib, "SHIPPED_MODEL", checkpoint_dir)
  monkeypatch.setattr(experiment_lib, "SHIPPED_POLICY", tmp_path / "none")
  with answerer_lib.Answerer() as shipped:
    with pytest.raises(errors.UserError, match="make quickstart"):
      shipped.ask(clip, QUESTION)
  with answerer_lib.Answerer(checkpoint_dir) as own:
    with pytest.raises(errors.UserError, match="give that of this model"):
      own.ask(clip, QUESTION)
  # A shipped policy is taken with the shipped model, and with no other.
  folder = pathlib.Path(policy_file).parent
  monkeypatch.setattr(experiment_lib, "SHIPPED_POLICY", folder)
  with answerer_lib.Answerer() as shipped:
    assert list(shipped.policies) == ["policy"]
  with answerer_lib.Answerer(checkpoint_dir) as own:
    assert not own.policies


def test_number_of_frames_is_the_checkpoints(checkpoint_dir, tmp_path):
  assert processor_files.default_num_frames(experiment_lib.SHIPPED_MODEL) == 16
  assert processor_files.default_num_frames(checkpoint_dir) == 32
  assert processor_files.default_num_frames(tmp_path) == 32
  path = tmp_path / "video_preprocessor_config.json"
  for wrong in ("16", 0, True, 2.5):
    path.write_text(json.dumps({"num_frames": wrong}))
    with pytest.raises(errors.UserError, match="num_frames is .*must be a"):
      processor_files.default_num_frames(tmp_path)


def test_bad_settings_are_one_line(checkpoint_dir):
  for change, match in (
    ({"dtype": "int8"}, "one of float32, bfloat16"),
    ({"num_frames": 0}, "must be at least 1"),
    ({"model": "nowhere"}, "config.json is missing"),
    ({"policy": "nowhere"}, "there is no policy in nowhere"),
  ):
    with pytest.raises(errors.UserError, match=match):
      answerer_lib.Answerer(**({"model": checkpoint_dir} | change))


def test_a_report_that_cannot_be_there_is_refused_before_the_work(
  tmp_path, monkeypatch
):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(answerer_lib.Answerer, "from_config", None)
  more = ("--question=and?",)
  for report, match in (
    (".", "is a folder; give --report"),
    (tmp_path, "is a folder; give --report"),
    (tmp_path / "file" / "report.html", "file is no folder"),
    (tmp_path / ("x" * 300), "File name too long"),
  ):
    arguments = ("--video=a.mp4", "--question=?", f"--report={report}")
    args = command.COMMAND.parse(["answer", *arguments, *more])
    with pytest.raises(errors.UserError, match=match):
      command.main(args)


def test_the_shipped_model_answers_about_a_drawn_clip(
  tmp_path, monkeypatch, capsys
):
  root = tmp_path / "drawn"
  config = build.BuildConfig(
    variant="sparse", seed=3, clips=(1, 1, 1, 0), questions_per_clip=4
  )
  build.build(config, root, num_workers=1)
  rows = readers.read_videomme(str(root / "test.parquet"), root, "video-r1")
  # The kind that the model always answers rightly, with all tokens.
  question = next(row for row in rows if row.category == "attribute")
  (tmp_path / "clip.mp4").write_bytes((root / question.video).read_bytes())
  monkeypatch.chdir(tmp_path)
  # The Python lines of the module, with this question in them.
  code = re.search(r"\n\n((?:    .*\n|\n)+)", answerer_lib.__doc__).group(1)
  code = textwrap.dedent(code)
  code = code.replace("Which of these appears first?", question.question)
  code = code.replace('("red moon", "blue star")', repr(question.options))
  names = {}
  exec(compile(code, "answerer", "exec"), names)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2
  assert lines[0].startswith(f"vanilla 784 {question.answer} ")
  assert lines[1].startswith("uniform 78 ")
  names["model"].close()
  answer_page.show(names["asked"])
  out = capsys.readouterr().out
  assert "784 of 784 (100 %)" in out
  assert f"{question.answer} (" in out


def test_command(checkpoint_dir, policy_file, clip, tmp_path, capsys):
  report = tmp_path / "new" / "r.html"
  short = tmp_path / "short.mp4"
  tiny.write_clip(short, seed=1, num_frames=2)
  words = [
    f"--model={checkpoint_dir}", f"--policy={policy_file}", f"--video={short}",
    "--question=What colour is [it]?", "--options=red,blue,green",
    "--compare=0.25", "--num_frames=4", f"--max_new_tokens={NEW}",
    f"--report={report}",
  ]  # fmt: skip
  command.main(command.COMMAND.parse(["answer", *words]))
  out, err = capsys.readouterr()
  assert "What colour is [it]?" in out
  assert re.search(r"cacovid +16 of 64 \(25 %\)", out)
  assert "with compilation" in out
  assert "warning: " in err and "2 frame(s)" in err
  assert report.is_file() and str(report) in out
  words = [
    f"--model={checkpoint_dir}", "--methods=uniform", f"--video={short}",
    f"--video={clip}", "--question=What [it]?", "--options=red,blue",
    "--options=", "--ratios=0.25", "--num_frames=4", "--max_new_tokens=2",
    f"--report={report}", "--config.mesh.data=2",
  ]  # fmt: skip
  command.main(command.COMMAND.parse(["answer", *words]))
  out, _ = capsys.readouterr()
  assert out.count("16 of 64 (25 %)") == 2
  assert out.count("second run of 2 questions at once") == 2
  assert (report.parent / "r_2.html").is_file()


def test_flags_are_given_once_or_as_often():
  words = ["--video=a", "--video=b", "--video=c", "--question=?"]
  parse = command.COMMAND.parse
  asked = command.questions(parse(["answer", *words]))
  assert asked == [(name, "?", []) for name in "abc"]
  args = parse(["answer", *words, "--options=x|y", "--options=x,y"])
  with pytest.raises(errors.UserError, match="--options is given 2 times, ano"):
    command.questions(args)


@pytest.mark.parametrize("name", ["video", "question", "methods", "ratios"])
def test_command_refuses_what_is_empty(name):
  words = ["--video=a.mp4", "--question=What?", f"--{name}="]
  with pytest.raises(errors.UserError, match=f"which {name}: add --{name}"):
    command.main(command.COMMAND.parse(["answer", *words]))


def test_command_says_what_is_missing():
  done = subprocess.run(
    [sys.executable, "-m", "cacovid_jax.answer", "--video=clip.mp4"],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 2
  assert done.stderr.strip() == (
    "error: nothing says which question: add --question"
  )
