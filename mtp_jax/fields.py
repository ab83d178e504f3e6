"""Checks of single fields of a config: type, sign, size.

Each raises ValueError that names the field, its value and what it takes.
"""

import dataclasses
import math
import typing

INT32 = 2**31 - 1  # JAX counts in 32 bits
INT64 = 2**63 - 1
FLOAT32 = 3.4028234663852886e38


def kind_of(kind: type) -> str:
  """A type in a sentence: 'an int', 'a list'."""
  return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def check(
  section,
  zero: tuple[str, ...] = (),
  any_sign: tuple[str, ...] = (),
  most: dict[str, int] | None = None,
):
  """Checks type and bounds of every field.

  Args:
    section: a dataclass of `config`.
    zero: numbers that may be 0; the others are positive.
    any_sign: numbers without a lower bound.
    most: upper bounds of ints; it is 2**31 - 1 for the others.

  Returns:
    A copy with a float for every int where one belongs.
  """
  values = {}
  for field, kind in typing.get_type_hints(type(section)).items():
    path = f"{type(section).__name__.lower()}.{field}"
    value = getattr(section, field)
    if typing.get_origin(kind) is tuple and type(value) is tuple:
      item = typing.get_args(kind)[0]
      value = tuple(_typed(f"an entry of {path}", v, item) for v in value)
    else:
      value = _typed(path, value, typing.get_origin(kind) or kind)
    values[field] = value
    if kind in (int, float) and field not in any_sign:
      if value < 0 or (value == 0 and field not in zero):
        bound = "at least 0" if field in zero else "positive"
        raise ValueError(f"{path} is {value}; it must be {bound}")
    if kind is int and value > (bound := (most or {}).get(field, INT32)):
      raise ValueError(f"{path} is {_short(value)}; it must be at most {bound}")
  return dataclasses.replace(section, **values)


def _typed(path: str, value, kind: type):
  """`value` as a `kind`; ValueError if it is another, or not finite."""
  if kind is float and type(value) is int:
    try:
      value = float(value)
    except OverflowError:
      value = math.inf
  if type(value) is not kind:
    raise ValueError(
      f"{path} is {value!r:.60}, {kind_of(type(value))}; "
      f"it takes {kind_of(kind)}"
    )
  if kind is float:
    if not abs(value) <= FLOAT32:
      raise ValueError(f"{path} is {value}; it must be finite in 32 bits")
    value += 0.0  # -0.0 becomes 0.0
  return value


def _short(number: int) -> str:
  """Python writes no integer of more than 4300 digits."""
  bits = number.bit_length()
  return str(number) if bits < 1000 else f"an integer of {bits} bits"


def share(section, name: str, inside: bool) -> None:
  """ValueError unless the field is `inside` of what a share may be."""
  if not inside:
    path = f"{type(section).__name__.lower()}.{name}"
    value = getattr(section, name)
    raise ValueError(f"{path} {value} is not between 0 and 1")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
  """ValueError that lists the choices, unless `value` is one."""
  if value not in choices:
    raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def divides(name: str, value: int, by_name: str, by: int) -> None:
  """ValueError unless `by` divides `value`."""
  if value % by:
    raise ValueError(f"{name} {value} is not divisible by {by_name} {by}")
