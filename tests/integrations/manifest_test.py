"""What lmms-eval sees before it loads anything."""

import ast
import importlib.util
import pathlib
import subprocess
import sys
import types

import cacovid_jax

_ROOT = pathlib.Path(cacovid_jax.__file__).parent.parent


def test_the_entry_point_of_the_package_is_the_manifest():
  text = (_ROOT / "setup.py").read_text(encoding="utf-8")
  assert (
    '"lmms_eval.models": [\n'
    '      "cacovid_jax = cacovid_jax.integrations.lmms_eval.manifest:manifest"'
  ) in text


def test_reading_the_manifest_imports_nothing_heavy():
  code = (
    "import sys\n"
    "from cacovid_jax.integrations.lmms_eval import manifest\n"
    "assert callable(manifest.manifest)\n"
    "print(sorted(n for n in sys.modules if n.startswith('cacovid_jax')))\n"
    "print([n for n in ('jax', 'numpy', 'torch', 'av') if n in sys.modules])\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.splitlines() == [
    "['cacovid_jax', 'cacovid_jax.integrations',"
    " 'cacovid_jax.integrations.lmms_eval',"
    " 'cacovid_jax.integrations.lmms_eval.manifest']",
    "[]",
  ]


def test_it_names_a_simple_and_a_chat_class(monkeypatch):
  # Stands for lmms-eval, which is not installed here.
  registry = types.ModuleType("lmms_eval.models.registry_v2")
  registry.ModelManifest = lambda **fields: fields
  models = types.ModuleType("lmms_eval.models")
  models.registry_v2 = registry
  package = types.ModuleType("lmms_eval")
  package.models = models
  for module in (package, models, registry):
    monkeypatch.setitem(sys.modules, module.__name__, module)
  from cacovid_jax.integrations.lmms_eval import manifest

  found = manifest.manifest()
  assert found.pop("model_id") == "cacovid_jax"
  assert sorted(found) == ["chat_class_path", "simple_class_path"]
  for path in found.values():
    module, _, name = path.rpartition(".")
    spec = importlib.util.find_spec(module)
    tree = ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8"))
    classes = [
      node.name for node in tree.body if isinstance(node, ast.ClassDef)
    ]
    assert name in classes
