"""Command lines: a config, its keys, aliases of keys, flags of a process.

Of several values for one key, the last one counts. No flag is global: several
commands may be imported, and their command lines parsed, in one process.
"""

import dataclasses
import difflib
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags as absl_flags

from cacovid_jax import base_config, config_files, config_values, errors, schema
from cacovid_jax import config as config_lib
from cacovid_jax.remote import store as remote

_HELP = ("help", "h", "helpshort", "helpfull")


class Flag(NamedTuple):
  """One flag of a command."""

  help: str  # One sentence.
  key: str = ""  # Of the config, that it is an alias of.
  default: Any = None  # Without a key, of its type; None is a text or nothing.
  choices: Sequence[str] = ()  # Texts that are allowed; empty allows all.
  old: Sequence[str] = ()  # Earlier spellings, accepted with a hint.
  least: float | None = None  # Smallest number that is allowed.
  many: bool = False  # May be given several times: all texts, in order.
  store: bool = False  # May be a folder on an object store.

  @property
  def is_switch(self) -> bool:
    """Whether the name alone, or with `no` before it, is a value."""
    return isinstance(self.value(base_config.get_config(), self.default), bool)

  def value(self, config, default) -> Any:
    """Returns the value of the flag's key in a config; else the default."""
    if config is None or not self.key:
      return default
    return config_lib.value_of(config, self.key)


def aliases(section: str, **flags: str | Flag) -> dict[str, Flag]:
  """Returns flags of keys of a section, by name; a text is a flag's help."""
  out = {}
  for name, flag in flags.items():
    flag = Flag(flag) if isinstance(flag, str) else flag
    out[name] = flag._replace(key=f"{section}.{name}")
  return out


@dataclasses.dataclass(frozen=True)
class Command:
  """What a command takes."""

  doc: str
  flags: Mapping[str, Flag]
  config: str = "optional"  # Where all keys have defaults; "required"; "none".
  # Config taken without `--config`; its `:debug` form with a flag `smoke`.
  default: str = ""
  # Key -> value that wins over that, or over `base_config`, without `--config`.
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  old_config: Sequence[str] = ()  # Earlier spellings of `--config`.
  sections: bool = True  # Whether `base_config` fills in missing keys.
  num_arguments: int = 0  # Words behind the command that are no flags, at most.

  def run(self, main: Callable[[types.SimpleNamespace], int | None]) -> None:
    """Runs `main` of the process's arguments; see `errors.run`."""
    errors.run(main, self.parse)

  def parse(self, argv: Sequence[str]) -> types.SimpleNamespace:
    """Returns flags without a key by their names, the locked `config`, and:

    `spec`, what --config says; `overrides`, texts "key=value" of flags, and
    `given`, their keys; `arguments`, the words that are no flags.
    """
    values = {n: f.default for n, f in self.flags.items() if not f.key}
    spec, overrides, words = "", [], []
    for name, text in self._words(argv[1:], words):
      if name == "config":
        spec = text
      elif name.startswith("config."):
        overrides.append((name.removeprefix("config."), text, ""))
      elif self.flags[name].key:
        overrides.append((self.flags[name].key, text, f"--{name}"))
      elif self.flags[name].many:
        values[name] = (*values[name], text)
      else:
        like = self.flags[name].default
        values[name] = config_values.parse(text, like, name=f"--{name}")
    if len(words) > self.num_arguments:
      raise errors.UserError(
        f"unexpected argument {words[self.num_arguments]!r}; flags start by --"
      )
    config = None
    if self.config != "none":
      config = self._load(spec, overrides, smoke=values.get("smoke", False))
    for name, flag in self.flags.items():
      value = flag.value(config, values.get(name))
      # A key has a range of its own.
      if type(value) in (int, float) and not (flag.key and flag.least is None):
        least = -schema.MOST if flag.least is None else flag.least
        kind = schema.within(type(value), least, schema.MOST)
        schema.fit(value, kind, key=f"--{name}")
    return types.SimpleNamespace(
      **values,
      config=config,
      spec=spec,
      overrides=[f"{key}={text}" for key, text, _ in overrides],
      given=frozenset(key for key, _, _ in overrides),
      arguments=words,
    )

  def require(self, args, *names: str) -> None:
    """Refuses what `parse` gave if it leaves one of these flags empty."""
    for name in names:
      value = self.flags[name].value(args.config, vars(args).get(name))
      if not value or (isinstance(value, tuple) and "" in value):
        raise errors.UserError(f"nothing says which {name}: add --{name}")

  def help(self) -> str:
    """Returns the documentation and every flag with its key and default."""
    lines = [self.doc.strip(), "", "Flags:"]
    if self.config != "none":
      default = f" ({self.default})" if self.default else ""
      lines += [
        f"  --config=FILE.py:ARGUMENT{default}",
        f"      Config file and argument; {self.config}.",
        "  --config.KEY=VALUE",
        "      Any key of the config; flags that name one are its aliases.",
      ]
    config = self._load("") if self.config == "optional" else None
    for name, flag in self.flags.items():
      default = flag.value(config, flag.default)
      told = [f"config.{flag.key}"] if flag.key else []
      if default not in (None, "", ()) and not (flag.key and config is None):
        told.append(f"default {_text(default)}")
      behind = f" ({', '.join(told)})" if told else ""
      lines.append(f"  --{'[no]' * flag.is_switch}{name}{behind}")
      lines.append(textwrap.indent(textwrap.fill(flag.help, 74), " " * 6))
    return "\n".join(lines) + "\n"

  def _load(self, spec: str, overrides=(), *, smoke: bool = False):
    """Returns the config of `--config`, or of the defaults, locked."""
    texts = [f"{key}={text}" for key, text, _ in overrides]
    try:
      if spec:
        return config_lib.load(spec, texts, fill=self.sections)
      if self.config == "required":
        raise config_files.no_config()
      config = base_config.get_config()
      if self.default:
        short = f"{self.default}:debug" if smoke else self.default
        config = config_lib.load(short, fill=self.sections)
      return config_lib.replace(config, self.defaults, texts)
    except errors.UserError as error:
      for key, _, name in overrides:
        told = str(error).removeprefix("config.")
        if name and told.startswith((f"{key}=", f"{key} is ", f"{key}[")):
          raise errors.UserError(told.replace(key, name, 1)) from error
      raise

  def _words(self, argv, words: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (flag, value), current names; other words go into `words`."""
    rest, others = iter(argv), []
    for argument in rest:
      if not argument.startswith("-"):
        words.append(argument)
        continue
      given, equals, text = argument.lstrip("-").partition("=")
      if given in _HELP:
        print(self.help(), end="")
        sys.exit(0)
      of_config = given.startswith("config.") and self.config != "none"
      name, negated = (given, False) if of_config else self._name(given)
      if name is None:
        # Of absl, such as --verbosity=1.
        others.append(argument)
        continue
      flag = self.flags.get(name)
      if not equals and flag and flag.is_switch:
        text = "false" if negated else "true"
      elif not equals:
        text = None if of_config else next(rest, None)
      if text is None:
        raise errors.UserError(f"--{given} has no value: write --{given}=X")
      schema.fit(text, schema.Text, key=f"--{given}")
      if not (flag and flag.store):
        remote.refuse(text, f"--{given}")
      if flag and flag.choices and text not in flag.choices:
        raise errors.UserError(
          f"--{given}={text}: choose {' or '.join(flag.choices)}"
        )
      yield name, text
    absl_flags.FLAGS([sys.argv[0], *others])

  def _name(self, given: str) -> tuple[str | None, bool]:
    """Returns (name of a flag today, whether `no` stands before it)."""
    switches = {f"no{n}": n for n, f in self.flags.items() if f.is_switch}
    old = dict.fromkeys(self.old_config, "config")
    old |= {o: name for name, flag in self.flags.items() for o in flag.old}
    if given in self.flags or (given == "config" and self.config != "none"):
      return given, False
    if given in switches:
      return switches[given], True
    if given in old:
      print(f"hint: --{given} is --{old[given]} now", file=sys.stderr)
      return old[given], False
    if given in absl_flags.FLAGS:
      return None, False
    names = [*self.flags, "config"]
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    told = ", ".join(f"--{name}" for name in near)
    raise errors.UserError(
      f"unknown flag --{given}"
      + (f"; nearest: {told}" if told else "")
      + " (--help lists the flags)"
    )


def _text(value) -> str:
  if isinstance(value, (tuple, list)):
    return ",".join(map(str, value))
  return str(value).lower() if isinstance(value, bool) else str(value)
