"""The settings of a run, and config.json.

`Config` holds one section per part of the library (`sections.py`). It is
frozen: `replace` returns a copy with other values, and `check` a copy whose
values are valid.
"""

import dataclasses
import difflib
import json
import pathlib
import typing
from collections.abc import Iterator

from mtp_jax import fields, section_checks, sections

# Format of config.json and of checkpoint records; a file without a number has
# format 1. A change that this version would misread needs the next number.
FORMAT = 1

# The library and its users write `config.Model`, `config.LOSSES` and so on.
Model, Data, Optim = sections.Model, sections.Data, sections.Optim
Mesh, Train, Decode = sections.Mesh, sections.Train, sections.Decode
HEAD_KINDS, ATTENTION = sections.HEAD_KINDS, sections.ATTENTION
OPTIMISERS, LOSSES = sections.OPTIMISERS, sections.LOSSES
HEAD_CHANGES = sections.HEAD_CHANGES
REMAT_POLICIES, SOURCES = sections.REMAT_POLICIES, sections.SOURCES
ROPE_SCALING, FREEZE = sections.ROPE_SCALING, sections.FREEZE


@dataclasses.dataclass(frozen=True)
class Config:
  """The settings of a run, one section per part of the library.

  Only `train` and the programs read a whole Config. Every other function
  takes the section or the numbers that it needs.

  Example:
    >>> import mtp_jax
    >>> cfg = mtp_jax.Config().replace(model={"width": 64, "layers": 5})
    >>> cfg.model.trunk_layers
    1
    >>> cfg.replace(model={"attn_heads": 5}).check()
    Traceback (most recent call last):
    ValueError: model.width 64 is not divisible by model.attn_heads 5
  """

  model: Model = dataclasses.field(default_factory=Model)
  data: Data = dataclasses.field(default_factory=Data)
  optim: Optim = dataclasses.field(default_factory=Optim)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  train: Train = dataclasses.field(default_factory=Train)
  decode: Decode = dataclasses.field(default_factory=Decode)

  def sections(self) -> dict[str, typing.Any]:
    """The sections by name; ValueError if one has the wrong class."""
    by_name = {}
    for name, kind in typing.get_type_hints(Config).items():
      section = by_name[name] = getattr(self, name)
      if type(section) is not kind:
        raise ValueError(
          f"config.{name} is {fields.kind_of(type(section))}; it takes a "
          f"config.{kind.__name__}"
        )
    return by_name

  def check(self) -> "Config":
    """Returns a valid copy, in which every number has its field's type.

    Raises:
      ValueError: a value is invalid. The message names the field, the value
        and the remedy.
    """
    checked = Config(**{k: s.check() for k, s in self.sections().items()})
    fields.divides(
      "data.batch", self.data.batch, "train.accumulate", self.train.accumulate
    )
    n, train = self.model.n_future, self.train
    stages = len(train.head_stages) + 1
    section_checks.for_heads(n, train.head_weights, stages, train.detach)
    if self.decode.heads > n:
      raise ValueError(
        f"decode.heads={self.decode.heads} but model.n_future={n}: use at most "
        "the heads that the model has"
      )
    if self.decode.heads > self.model.drafting:
      raise ValueError(
        f"decode.heads={self.decode.heads} but model.offsets is "
        f"{self.model.offsets}: only the {self.model.drafting} before its "
        "first gap can draft; use at most so many"
      )
    if self.optim.warmup >= self.train.steps:
      raise ValueError(
        f"optim.warmup {self.optim.warmup} is not below train.steps "
        f"{self.train.steps}; set --config.optim.warmup below that"
      )
    return checked

  def replace(self, /, **changes: dict[str, typing.Any]) -> "Config":
    """Returns a copy with other values in some fields; does not check them.

    `cfg.replace(model={"width": 64, "layers": 4}, train={"steps": 9})`

    Raises:
      ValueError: a section or a field does not exist, or the fields of a
        section are not given as a dict.
    """
    by_name = self.sections()
    for section, values in changes.items():
      if section not in by_name:
        raise ValueError(unknown_field(self, section))
      if not isinstance(values, dict):
        raise ValueError(
          f"config.{section} is {values!r:.60}, "
          f"{fields.kind_of(type(values))}; it takes an object of fields"
        )
      for name in values:
        if name not in _fields(by_name[section]):
          raise ValueError(unknown_field(self, f"{section}.{name}"))
      by_name[section] = dataclasses.replace(by_name[section], **values)
    return Config(**by_name)


def to_json(config: Config) -> str:
  """The text of config.json: the format's number, then the sections."""
  tree = {"format": FORMAT} | dataclasses.asdict(config)
  return json.dumps(tree, indent=2) + "\n"


def from_json(text: str) -> Config:
  """The inverse of `to_json`. Missing fields take their defaults.

  Raises:
    ValueError: `text` is not JSON, has a key twice or an unknown format, or
      `from_dict` refuses it.
  """
  try:
    tree = json.loads(text, object_pairs_hook=_unique_keys)
  except json.JSONDecodeError as error:
    raise ValueError(f"the config is not JSON: {error}") from error
  except RecursionError as error:
    raise ValueError("the config is not JSON: nested too deeply") from error
  if isinstance(tree, dict):
    check_format("the config", tree.pop("format", 1))
  return from_dict(tree)


def check_format(what: str, number) -> None:
  """Raises ValueError if `what` has a format that this version cannot read.

  Args:
    what: subject of the error message.
    number: its format.
  """
  if type(number) is not int or not 1 <= number <= FORMAT:
    raise ValueError(
      f"{what} has format {number!r:.60}, and this version of mtp_jax reads "
      f"formats up to {FORMAT}: install the version that wrote it"
    )


def from_dict(tree: dict) -> Config:
  """The inverse of `dataclasses.asdict`. Missing fields take their defaults.

  Raises:
    ValueError: `tree` is not a dict of dicts, a field does not exist, or
      `Config.check` refuses a value.
  """
  if not isinstance(tree, dict):
    raise ValueError(
      f"the config is {fields.kind_of(type(tree))}; it takes an object of "
      'sections, such as {"model": {"width": 256}}'
    )
  changes = {name: _tuples(values) for name, values in tree.items()}
  return Config().replace(**changes).check()


def _tuples(values):
  """`values` with tuples in place of lists: JSON has no tuples."""
  if not isinstance(values, dict):
    return values  # `replace` raises for it
  return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _unique_keys(pairs: list[tuple[str, typing.Any]]) -> dict:
  tree = dict(pairs)
  if len(tree) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"the config has the key {twice!r} twice; keep one")
  return tree


def load(path: str | pathlib.Path) -> Config:
  """Reads a config.json, as a run writes it to its workdir.

  Raises:
    ValueError: the file is missing, is not UTF-8, or `from_json` refuses it.
  """
  try:
    return from_json(pathlib.Path(path).expanduser().read_text("utf-8"))
  except OSError as error:
    raise ValueError(f"cannot read {path}: {error.strerror}") from error
  except ValueError as error:  # UnicodeDecodeError is one
    raise ValueError(f"{path}: {error}") from error


def paths(config: Config) -> Iterator[str]:
  """The path of every field, such as 'model.width'."""
  for name, section in config.sections().items():
    for field in _fields(section):
      yield f"{name}.{field}"


def unknown_field(config: Config, path: str) -> str:
  """The error message for a field that does not exist; names similar ones."""
  known = list(paths(config))
  near = difflib.get_close_matches(path, _fields(config) + known, 3, 0.5)
  hint = f"; did you mean {' or '.join(near)}?" if near else ""
  return f"config has no field {path!r}{hint}"


def _fields(section) -> list[str]:
  return [f.name for f in dataclasses.fields(section)]
