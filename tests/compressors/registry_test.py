"""Methods by name, from files, with parameters; and which are the same."""

import dataclasses
import json
import pathlib
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base, fastv, registry
from cacovid_jax.inference import methods as methods_lib
from tests.compressors import given, quick

GRID = (8, 3, 4)
# What `Method.parse` made of these at commit 8040e3b: the specs are the keys of
# answer logs, the rest stands in results.json.
RECORDED = [
  json.loads(line)
  for line in (pathlib.Path(__file__).parent / "recorded_methods.jsonl")
  .read_text(encoding="utf-8")
  .splitlines()
]


def rows_of(compressor, ratio):
  try:
    if compressor.selects_first:
      return compressor.rows(GRID, ratio)
    return compressor.rows(GRID, ratio, 28)
  except errors.UserError as error:
    return str(error)


@pytest.mark.parametrize("record", RECORDED, ids=lambda r: r["given"])
def test_methods_are_what_they_were_in_older_answer_logs(record):
  method = methods_lib.Method.parse(record["given"])
  for name in ("label", "spec", "policy", "per_seed"):
    assert getattr(method, name) == record[name]
  compressor = method.compressor
  for name in ("name", "stochastic", "oracle", "sees_question", "note"):
    assert getattr(compressor, name) == record[name]
  assert compressor.exact_budget == record["exact_budget"]
  assert dict(compressor.options) == record["options"]
  assert sorted(compressor.requires) == record["requires"]
  known = list(compressor.known_options)
  if record["given"].startswith("flashvid?llm_stage=False"):
    # The options of the stage that is left out were not listed then.
    known = [name for name in known if not name.startswith("llm_")]
  if compressor.name.startswith("cacovid"):
    later = {"budget", "ladder", "size", "threshold"}
    known = [name for name in known if name not in later]
  assert known == record["known_options"]
  assert list(compressor.requirements) == record["requirements"]
  assert [rows_of(compressor, ratio) for ratio in (0.15, 0.5)] == record["rows"]
  assert compressor.selects_first == ("plan" not in record)
  if not compressor.selects_first:
    plan, minimum = record["plan"]
    assert [list(step) for step in compressor.plan(28, 96, 0.5)] == plan
    assert compressor.minimum_ratio(28, 96) == minimum


@pytest.mark.parametrize("name", compressors.names())
def test_equal_values_are_one_key_of_compiled_programs(name):
  first, second = compressors.get(name), compressors.get(name)
  assert first is not second
  assert first == second and hash(first) == hash(second)
  assert first != compressors.get(name, exact_budget=False)


def test_options_tell_methods_apart_and_defaults_do_not():
  get = compressors.get
  assert get("divprune?scope=video") == get("divprune") != get("uniform")
  assert get("divprune?scope=video").options == {"scope": "video"}
  assert get("divprune?scope=frame") != get("divprune")
  assert get("flashvid?llm_keep=0.5") != get("flashvid")
  kept = {get("floc?windows=2"): 1, get("floc"): 2}
  assert kept[get("floc", windows=2)] == 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ByIdentity(base.Compressor):
  """As classes of older files are made: still compared by its options."""

  places: int = 1


def test_a_class_without_an_equality_of_its_own_counts_by_its_options():
  assert ByIdentity() == ByIdentity(places=1) != ByIdentity(places=2)
  assert hash(ByIdentity()) == hash(ByIdentity(given=("places",)))


OWN = """
  import dataclasses
  import jax.numpy as jnp
  from cacovid_jax.compressors import base

  def ends(features, *, grid, num_keep, text=None, aux=None, rng=None,
           places=(0,)):
    values = jnp.zeros(len(features)).at[jnp.array(places)].set(1.0)
    return base.take_top(features, values, num_keep)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Ends(base.Compressor):
    places: tuple[int, ...] = (0,)

    def choose(self, inputs, num_keep, ratio):
      return ends(inputs.features, grid=inputs.grid, num_keep=num_keep,
                  places=self.places)
"""


@pytest.fixture(name="own")
def fixture_own(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(textwrap.dedent(OWN))
  return path


@pytest.mark.parametrize("name", ["ends", "Ends"])
def test_a_file_of_the_users_own_counts_by_its_content(own, name):
  first = compressors.get(f"{own}:{name}?places=[3, 9]")
  assert first.name == name and first.known_options == ("places",)
  assert list(first.options["places"]) == [3, 9]
  again = compressors.get(f"{own}:{name}?places=[3, 9]")
  assert first == again and hash(first) == hash(again)
  assert first != compressors.get(f"{own}:{name}")
  out = given.compress(first, jnp.ones([12, 2]), grid=(3, 2, 2), num_keep=3)
  np.testing.assert_array_equal(out.index, [0, 3, 9])
  spec = methods_lib.Method.parse(f"{own}:{name}").spec
  own.write_text(own.read_text() + "\n# Changed.\n")
  changed = compressors.get(f"{own}:{name}?places=[3, 9]")
  assert changed != first
  assert methods_lib.Method.parse(f"{own}:{name}").spec != spec
  with pytest.raises(errors.UserError, match="no option 'place'; .*: places"):
    compressors.get(f"{own}:{name}?place=3")


def test_a_dotted_name_leads_to_a_module(own, monkeypatch):
  monkeypatch.syspath_prepend(own.parent)
  method = compressors.get("own:Ends?places=[5]")
  out = given.compress(method, jnp.ones([12, 2]), grid=(3, 2, 2), num_keep=1)
  np.testing.assert_array_equal(out.index, [5])
  assert (
    methods_lib.Method.parse("own:Ends").spec
    == f"own:Ends#{method.fingerprint}"
  )
  with pytest.raises(errors.UserError, match="has no Starts"):
    compressors.get("own:Starts")
  with pytest.raises(errors.UserError, match="importing nowhere failed"):
    compressors.get("nowhere:Ends")


TRAINED = """
  import dataclasses
  from cacovid_jax.compressors import base

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Scorer(base.Compressor):
    trained = True
    power: float = 1.0

    def choose(self, inputs, num_keep, ratio, params):
      scores = inputs.features @ params["head"]
      return base.take_top(inputs.features, scores ** self.power, num_keep)
"""


@pytest.fixture(name="scorer")
def fixture_scorer(tmp_path):
  """A trained compressor, and its parameters beside it."""
  path, weights = tmp_path / "scorer.py", tmp_path / "scorer.safetensors"
  path.write_text(textwrap.dedent(TRAINED))
  head = np.array([0.0, 2.0, 0.0], np.float32)
  safetensors.numpy.save_file({"head": head}, weights)
  return path, weights


def test_a_trained_compressor_chooses_by_its_parameters(scorer):
  path, weights = scorer
  method = compressors.get(f"{path}:Scorer?weights={weights}")
  assert method.known_options == ("power", "weights")
  features = jax.random.normal(jax.random.key(0), [2, 24, 3])
  inputs = given.inputs(features, (4, 2, 3))
  program = quick.jit(
    lambda inputs, params: method.select_batch(
      inputs, num_keep=6, ratio=0.25, params=params
    )
  )
  out = program(inputs, method.load())
  for row in range(2):
    best = np.argsort(-np.asarray(features[row, :, 1]), kind="stable")[:6]
    np.testing.assert_array_equal(out.index[row], np.sort(best))
  # Read once, also by an equal method; not part of the compiled program.
  assert method.load() is compressors.get(method_spec(path, weights)).load()
  program(inputs, {"head": -method.load()["head"]})
  assert program._cache_size() == 1


def method_spec(path, weights):
  return f"{path}:Scorer?weights={weights}"


def test_other_parameters_make_another_method(scorer):
  path, weights = scorer
  spec = method_spec(path, weights)
  method, logged = compressors.get(spec), methods_lib.Method.parse(spec).spec
  head = np.array([1.0, 0.0, 0.0], np.float32)
  safetensors.numpy.save_file({"head": head}, weights)
  changed = compressors.get(spec)
  assert changed != method
  np.testing.assert_array_equal(changed.load()["head"], head)
  assert methods_lib.Method.parse(spec).spec != logged


@pytest.mark.parametrize(
  "query,said",
  [
    ("", "is trained: give its parameters, as weights=FILE"),
    ("?weights=nowhere.safetensors", "nowhere.safetensors': there is no such"),
    ("?weight=a", "no option 'weight'; known options: power, weights"),
  ],
)
def test_parameters_that_are_not_there_are_one_line(scorer, query, said):
  with pytest.raises(errors.UserError, match=said) as caught:
    compressors.get(f"{scorer[0]}:Scorer{query}")
  assert "\n" not in str(caught.value)


def test_a_file_that_holds_no_parameters_is_one_line(scorer):
  path, weights = scorer
  weights.write_bytes(b"no tensors")
  method = compressors.get(method_spec(path, weights))
  with pytest.raises(errors.UserError, match="not a readable safetensors"):
    method.load()


def test_only_trained_methods_take_parameters():
  with pytest.raises(errors.UserError, match="no option 'weights'"):
    compressors.get("uniform?weights=a.safetensors")


def test_classes_and_their_subclasses_have_the_names_of_the_registry():
  for name in (*compressors.names(), *registry.oracles()):
    method = type(compressors.get(name))
    assert method.name == name
  with pytest.raises(errors.UserError, match="^fastv: layer=99 "):
    fastv.FastV(layer=99, scale_layers=False).plan(28, 100, 0.5)
  mine = type("Mine", (fastv.FastV,), {})
  assert mine().name == "fastv"
