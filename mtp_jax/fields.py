"""The fields of a config section: how they are declared and checked.

Each check raises a ValueError that names the field, its value and what the
field takes.
"""

import dataclasses
import math
import typing

INT32 = 2**31 - 1  # the largest integer that JAX holds by default
INT64 = 2**63 - 1
FLOAT32 = 3.4028234663852886e38


# When a run resumes, its settings must equal those of the checkpoint. A field
# that may differ is declared by one of these functions; see `train/resume.py`.
def free(default):
  """A field that may differ: it changes no result, but for rounding."""
  return dataclasses.field(default=default, metadata={"on_resume": "free"})


def local(default):
  """A field that may differ, also between processes: a path on the host."""
  return dataclasses.field(default=default, metadata={"on_resume": "local"})


def reported(default):
  """A field that may differ: it changes all later steps; the run reports it."""
  return dataclasses.field(default=default, metadata={"on_resume": "reported"})


def kind_of(kind: type) -> str:
  """The name of a type with its article: 'an int', 'a list'."""
  return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def check(
  section,
  zero: tuple[str, ...] = (),
  any_sign: tuple[str, ...] = (),
  most: dict[str, int] | None = None,
):
  """Checks the type and the bounds of every field.

  Args:
    section: a dataclass of `sections`.
    zero: names of the numbers that may be 0. Others must be positive.
    any_sign: names of the numbers that may be negative.
    most: upper bounds of ints by name. The default is 2**31 - 1.

  Returns:
    A copy in which float fields that were given an int hold a float.

  Raises:
    ValueError: a field has another type, or its value is out of bounds.
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
        raise ValueError(f"{path} is {_short(value)}; it must be {bound}")
    if kind is int and value > (bound := (most or {}).get(field, INT32)):
      raise ValueError(f"{path} is {_short(value)}; it must be at most {bound}")
  return dataclasses.replace(section, **values)


def _typed(path: str, value, kind: type):
  """Returns `value`, a float field's int as a float.

  Raises:
    ValueError: `value` has another type, or is a float that is not finite.
  """
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
    value += 0.0  # turns -0.0 into 0.0, which equals it but prints otherwise
  return value


def _short(number: float) -> str:
  """`number` as text; its length in bits where Python refuses to print it."""
  bits = number.bit_length() if type(number) is int else 0
  return str(number) if bits < 1000 else f"an integer of {bits} bits"


def share(section, name: str, inside: bool) -> None:
  """Raises ValueError unless `inside`, which says that a share is valid."""
  if not inside:
    path = f"{type(section).__name__.lower()}.{name}"
    value = getattr(section, name)
    raise ValueError(f"{path} {value} is not between 0 and 1")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises ValueError, with the choices, unless `value` is one of them."""
  if value not in choices:
    raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def divides(name: str, value: int, by_name: str, by: int) -> None:
  """Raises ValueError unless `by` divides `value`."""
  if value % by:
    raise ValueError(f"{name} {value} is not divisible by {by_name} {by}")
