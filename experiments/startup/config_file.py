"""Finds and runs config files; what is wrong with one is an error of a line."""

import dataclasses
import difflib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import re
import sys
import traceback

from mtp_jax import config
from mtp_jax.checkpoint import storage

HOME = pathlib.Path(__file__).parents[2]  # has configs/, cloned or installed


def load(text: str) -> config.Config:
  """The Config that `get_config` of a Python file returns, not checked yet.

  Args:
    text: FILE, or FILE:ARGUMENT where `get_config` takes one. FILE is looked
      for in the current folder, then beside `configs/` of the installation.
      It may also be the config.json of a run.

  Raises:
    ValueError: one line that names the file, and the line of it at fault.
  """
  name, colon, argument = text.partition(":")
  path = _find(name)
  if path.suffix == ".json":
    return config.load(path)
  loader = importlib.machinery.SourceFileLoader("config_file", str(path))
  module = importlib.util.module_from_spec(
    importlib.util.spec_from_loader(loader.name, loader)
  )
  sys.modules[loader.name] = module  # a dataclass defined there looks it up
  try:
    loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise ValueError(_blame(error, path, name)) from error
  get_config = getattr(module, "get_config", None)
  if not callable(get_config):
    raise ValueError(
      f"{name} has no function get_config(), which returns a config.Config"
    )
  arguments = [argument] if colon else []
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError as error:
    raise ValueError(
      f"get_config of {name} takes no argument: leave out :{argument}"
      if colon
      else f"get_config of {name} needs an argument: --config={name}:ARGUMENT"
    ) from error
  try:
    found = get_config(*arguments)
    if not isinstance(found, config.Config):
      missing = "; its return is missing" if found is None else ""
      raise ValueError(
        f"get_config returned an object of type {type(found).__name__}, "
        f"not an mtp_jax.config.Config{missing}"
      )
    found.sections()
  except (Exception, SystemExit) as error:
    raise ValueError(_blame(error, path, name)) from error
  return found


def check_overrides(arguments: list[str]) -> None:
  """Refuses `--config.SECTION.FIELD` of a field that does not exist.

  Raises:
    ValueError: names the nearest fields.
  """
  given, known = False, config.Config()
  fields = list(config.paths(known))
  for argument in arguments:
    if argument == "--":
      return
    given = given or bool(re.match(r"--?config(=|$)", argument))
    if not (match := re.match(r"--?(no)?config\.([^=]*)", argument)):
      continue
    name = match[2]
    section, _, field = name.partition(".")
    if section in known.sections() and not field:
      first = next(p for p in fields if p.startswith(f"{section}."))
      raise ValueError(
        f"--config.{section} is a section; set a field of it, such as "
        f"--config.{first}"
      )
    if name not in fields:
      raise ValueError(config.unknown_field(known, name))
    if not given:
      raise ValueError(
        f"--config.{name} changes a config; name its file before, as "
        "--config=configs/quickstart.py"
      )


def _find(name: str) -> pathlib.Path:
  if not name.strip():
    raise ValueError("--config is empty; try --config=configs/quickstart.py")
  path = storage.local(name)
  for candidate in (path, HOME / path):
    if candidate.is_dir():
      raise ValueError(f"--config={name} is a folder; name a file in it")
    if candidate.exists():
      return candidate
  installed = (HOME / "configs").rglob("*.py")
  known = [str(p) for p in path.parent.glob("*.py")]
  known += [p.relative_to(HOME).as_posix() for p in installed]
  known = [p for p in known if not p.endswith("__init__.py")]
  near = difflib.get_close_matches(name, known, 1, 0.5)
  raise ValueError(
    f"there is no config file {name}; did you mean "
    f"{near[0] if near else 'configs/quickstart.py'}?"
  )


def _blame(error: BaseException, path: pathlib.Path, name: str) -> str:
  """One line: the file, the line of it that failed, and why."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if f.filename == str(path)]
  if isinstance(error, SyntaxError) and error.filename == str(path):
    lines, text = [error.lineno], error.msg
  elif isinstance(error, dataclasses.FrozenInstanceError):
    text = (
      f"{error}: a config does not change; make another from it, such as "
      'cfg = cfg.replace(model={"width": 64})'
    )
  elif match := re.search(
    r"(\w+)(?:\.__init__\(\) got an unexpected keyword argument|"
    r"' object has no attribute) '(\w+)'",
    str(error),
  ):
    text = _misspelt(match[1], match[2]) or f"{type(error).__name__}: {error}"
  elif isinstance(error, ValueError):
    text = str(error)
  else:
    text = f"{type(error).__name__}: {error}"
  line = f", line {lines[-1]}" if lines else ""
  return f"{name}{line}: {' '.join(text.split())}"


def _misspelt(kind: str, field: str) -> str:
  """Message for a field that a class of `config` does not have, or ''."""
  known = config.Config()
  if kind == "Config":
    return config.unknown_field(known, field)
  if kind.lower() in known.sections():
    return config.unknown_field(known, f"{kind.lower()}.{field}")
  return ""
