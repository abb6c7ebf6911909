"""Command lines of the experiments, written as keyword arguments."""


def parse(module, **flags):
  """Returns what a module's command line says.

  Args:
    module: with a `COMMAND`.
    **flags: by name; None leaves one out, a list is joined by commas.
  """
  words = [module.__name__.split(".")[-1]]
  for name, value in flags.items():
    if isinstance(value, (list, tuple)):
      value = ",".join(map(str, value))
    if value is not None:
      words.append(f"--{name}={value}")
  return module.COMMAND.parse(words)


def run(module, **flags):
  """Runs a module as its command line says, see `parse`."""
  return module.main(parse(module, **flags))
