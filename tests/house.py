"""Figures of the source code, with limits: `python -m tests.house`.

Counts the package, `configs` and `experiments`. Docstrings do not count as
lines of a function; nested functions do. `make lint` runs it: a figure beyond
its limit ends it with exit code 1. Imports between floors are checked by
import-linter (see pyproject.toml).
"""

import ast
import collections
import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("cacovid_jax", "configs", "experiments")
LONG_FILE, LONG_FUNCTION, MANY_PARAMETERS = 400, 50, 7
# Only models/checkpoints.py asks which model it has.
MODEL_CLASSES = (
  "LlavaOnevisionModel",
  "Qwen2_5VLModel",
  "Qwen3VLModel",
  "ProcessorConfig",
  "Preprocessing",
)
FAMILIES = "cacovid_jax/models/checkpoints.py"

# Largest values allowed; the last one is a smallest.
LIMITS = {
  "lines": 50_490,
  "files over 400 lines": 2,
  "functions over 50 lines, %": 0.3,
  "functions with more than 7 parameters, %": 0.9,
  "class names with two owners": 0,
  "isinstance on a model class": 0,
  "undocumented public functions that only tests call": 0,
}
LEAST_DOCUMENTED = 75.0


@dataclasses.dataclass(frozen=True)
class Module:
  """A source file.

  Attributes:
    path: relative to the repository.
    text: its content.
    tree: of `ast`.
  """

  path: str
  text: str
  tree: ast.Module

  @property
  def package(self) -> str:
    return self.path.rpartition("/")[0]

  @property
  def dotted(self) -> str:
    return self.path.removesuffix(".py").replace("/", ".")


def modules(folders=FOLDERS) -> list[Module]:
  """Returns the source files below some folders, in order."""
  out = []
  for folder in folders:
    for path in sorted((ROOT / folder).rglob("*.py")):
      text = path.read_text(encoding="utf-8")
      name = path.relative_to(ROOT).as_posix()
      out.append(Module(name, text, ast.parse(text)))
  return out


def functions(module: Module) -> Iterator[ast.FunctionDef]:
  """Yields all functions of a file, methods and nested ones among them."""
  for node in ast.walk(module.tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      yield node


def length(function) -> int:
  """Returns the lines of a function without its docstring."""
  lines = function.end_lineno - function.lineno + 1
  first = function.body[0]
  if ast.get_docstring(function, clean=False) is not None:
    lines -= first.end_lineno - first.lineno + 1
  return lines


def num_parameters(function) -> int:
  """Returns the parameters of a function, `self` and `cls` aside."""
  arguments = function.args
  names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
  if names[:1] in (["self"], ["cls"]):
    names = names[1:]
  return len(names) + len(arguments.kwonlyargs)


def imported(module: Module) -> dict[str, str]:
  """Returns local name -> dotted name of what a file imports of the package."""
  out = {}
  for node in ast.walk(module.tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        out[alias.asname or alias.name] = f"{node.module}.{alias.name}"
  return out


def double_classes(found: list[Module]) -> list[str]:
  """Returns public class names with two owners, one used in other packages."""
  owners = collections.defaultdict(set)
  for module in found:
    for node in module.tree.body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        owners[node.name].add(module.dotted)
  double = {name: files for name, files in owners.items() if len(files) > 1}
  out = set()
  for module in found:
    names = imported(module)
    for node in ast.walk(module.tree):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = names.get(node.value.id, "")
        if owner in double.get(node.attr, ()):
          if owner.rpartition(".")[0] != module.package.replace("/", "."):
            out.add(f"{node.attr}: {', '.join(sorted(double[node.attr]))}")
  return sorted(out)


def model_checks(found: list[Module]) -> list[str]:
  """Returns places that ask which model they have."""
  out = []
  for module in found:
    if module.path == FAMILIES:
      continue
    for node in ast.walk(module.tree):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "isinstance" and any(
          name in ast.unparse(node.args[1]) for name in MODEL_CLASSES
        ):
          out.append(f"{module.path}:{node.lineno}")
  return out


def _names(found: list[Module]) -> collections.Counter:
  """Returns how often each name is used, definitions and strings aside."""
  used = collections.Counter()
  for module in found:
    for node in ast.walk(module.tree):
      if isinstance(node, ast.Name):
        used[node.id] += 1
      elif isinstance(node, ast.Attribute):
        used[node.attr] += 1
      elif isinstance(node, ast.alias):
        used[node.name.rpartition(".")[2]] += 1
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        used[node.value] += 1
  return used


def only_tested(found: list[Module], tests: list[Module]) -> list[str]:
  """Returns public functions that only tests call and no page names."""
  used, tested = _names(found), _names(tests)
  pages = "".join(
    path.read_text(encoding="utf-8", errors="ignore")
    for pattern in (
      "*.md",
      "docs/**/*",
      "experiments/**/*.md",
      "cacovid_jax/**/*.yaml",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.is_file()
  )
  return [
    f"{module.path}: {function.name}"
    for module in found
    for function in functions(module)
    if not function.name.startswith("_")
    and not used[function.name]
    and tested[function.name]
    and not re.search(rf"\b{function.name}\b", pages)
  ]


def documented(found: list[Module]) -> float:
  """Returns the share of functions and classes with a docstring, in %."""
  nodes = [
    node
    for module in found
    for node in ast.walk(module.tree)
    if isinstance(node, (ast.FunctionDef, ast.ClassDef))
  ]
  return 100 * sum(map(bool, map(ast.get_docstring, nodes))) / len(nodes)


def figures(found: list[Module], tests: list[Module]) -> dict[str, list[str]]:
  """Returns figure -> the places that it counts."""
  every = [(module, one) for module in found for one in functions(module)]
  return {
    "files over 400 lines": [
      f"{module.path} {module.text.count(chr(10))}"
      for module in found
      if module.text.count("\n") > LONG_FILE
    ],
    "functions over 50 lines, %": [
      f"{module.path}:{one.lineno} {one.name} {length(one)}"
      for module, one in every
      if length(one) > LONG_FUNCTION
    ],
    "functions with more than 7 parameters, %": [
      f"{module.path}:{one.lineno} {one.name} {num_parameters(one)}"
      for module, one in every
      if num_parameters(one) > MANY_PARAMETERS
    ],
    "class names with two owners": double_classes(found),
    "isinstance on a model class": model_checks(found),
    "undocumented public functions that only tests call": only_tested(
      found, tests
    ),
  }


def main(argv: list[str]) -> int:
  """Prints the figures; `--all` lists the places. Returns the exit code."""
  found = modules()
  lines = collections.Counter()
  for module in found:
    folder = "/".join(module.path.split("/")[:2])
    lines[folder if module.path.count("/") > 1 else module.package] += (
      module.text.count("\n")
    )
  for folder, count in lines.most_common():
    print(f"{count:7,}  {folder}")
  num_functions = sum(len(list(functions(module))) for module in found)
  values = {"lines": sum(lines.values())}
  places = figures(found, modules(["tests"]))
  for name, listed in places.items():
    percent = name.endswith("%")
    values[name] = (
      round(100 * len(listed) / num_functions, 2) if percent else len(listed)
    )
  failed = False
  for name, value in values.items():
    over = value > LIMITS[name]
    failed |= over
    print(f"{value:7,}  {name} (limit {LIMITS[name]:,}){' OVER' * over}")
    if over or "--all" in argv:
      print("".join(f"           {place}\n" for place in places.get(name, ())))
  share = documented(found)
  failed |= share < LEAST_DOCUMENTED
  print(
    f"{share:7.1f}  documented functions and classes, % (at least"
    f" {LEAST_DOCUMENTED})"
  )
  return int(failed)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
