"""Code by name: what is found, and that what runs is what was hashed."""

import hashlib
import os
import py_compile

import pytest

from cacovid_jax import errors, extensions


def test_an_object_of_a_file_and_its_sha256(tmp_path):
  path = tmp_path / "mine.py"
  text = "import dataclasses\n@dataclasses.dataclass\nclass Mine:\n  a: int\n"
  path.write_text(text)
  found, digest = extensions.load(f"{path}:Mine", "key")
  assert found(3).a == 3
  assert digest == hashlib.sha256(text.encode()).hexdigest()


def test_an_object_of_a_module():
  found, digest = extensions.load("cacovid_jax.errors:UserError", "key")
  assert found is errors.UserError
  with open(errors.__file__, "rb") as file:
    assert digest == hashlib.sha256(file.read()).hexdigest()
  assert extensions.load("sys:path", "key")[1] == ""


def test_a_compiled_file_beside_the_source_is_not_run(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("what = 1\n")
  py_compile.compile(str(path))
  time = os.stat(path).st_mtime_ns
  path.write_text("what = 2\n")
  os.utime(path, ns=(time, time))
  assert extensions.load(f"{path}:what", "key")[0] == 2


@pytest.mark.parametrize(
  ("spec", "named"),
  [
    (3, "key 3 must read"),
    ("mine", "must read"),
    (":mine", "must read"),
    ("mine.py:", "must read"),
    ("no/such/file.py:mine", "there is no file no/such/file.py"),
    ("no_such_package.module:mine", "ModuleNotFoundError"),
    ("cacovid_jax.errors:Mine", "cacovid_jax.errors has no Mine"),
  ],
)
def test_a_name_that_leads_nowhere_is_refused(spec, named):
  with pytest.raises(errors.UserError, match=named):
    extensions.load(spec, "key")
