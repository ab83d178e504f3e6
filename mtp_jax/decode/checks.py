"""Settings that a caller gives, checked before any work is done."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST = 2**30  # tokens; positions are int32, prompt and window included
_STOPS = 4  # width of the array of end tokens: so many share a program


def integer(name: str, value: Any, least: int | None = None) -> int:
  """`value`, an integer of any kind, as an int.

  Raises:
    ValueError: a bool, a float, a text, or less than `least`.
  """
  try:
    if isinstance(value, bool | np.bool_):
      raise TypeError
    result = operator.index(value)
  except TypeError:
    raise ValueError(f"{name}={value!r} is not an integer") from None
  if least is not None and result < least:
    raise ValueError(f"{name}={result} is too small; give at least {least}")
  return result


def number(name: str, value: Any) -> float:
  """`value`, a number of any kind, as a float; ValueError for anything else."""
  try:
    if isinstance(value, bool | np.bool_ | str | bytes):
      raise TypeError
    return float(value)
  except (TypeError, ValueError, OverflowError):
    raise ValueError(f"{name}={value!r} is not a number") from None


def max_new(value: Any) -> np.int32:
  """Most tokens to write after a prompt.

  Raises:
    ValueError: not an integer from 1 to 2**30.
  """
  result = integer("max_new", value)
  if result < 1:
    raise ValueError(f"max_new={result} writes nothing; give at least 1")
  if result > _MOST:
    raise ValueError(f"max_new={result} is too many; give at most {_MOST}")
  return np.int32(result)


def seed(value: Any) -> np.uint32:
  """A seed of 32 bits; JAX would drop or extend any others silently.

  Raises:
    ValueError: not an integer from 0 to 2**32 - 1.
  """
  result = integer("seed", value)
  if not 0 <= result < 2**32:
    raise ValueError(f"seed={result} is outside 0..{2**32 - 1}")
  return np.uint32(result)


def stop_ids(
  stop: int | Sequence[int] | None, vocab: int, name: str = "stop"
) -> np.ndarray:
  """End tokens [E] int32, padded with -1 to a multiple of four.

  Args:
    stop: one id, several, or None.
    vocab: V.
    name: what the caller calls them, for messages.

  Raises:
    ValueError: not ids, or an id that is never written; names it.
  """
  if stop is None:
    stop = []
  elif isinstance(stop, str | bytes) or np.ndim(stop) > 1:
    raise ValueError(f"{name}={stop!r} is not an id or a list of ids")
  elif np.ndim(stop) == 0:
    stop = [stop]
  ids = [integer(name, i) for i in stop]
  for i in ids:
    if not 0 <= i < vocab:
      raise ValueError(
        f"{name}={i} is outside the vocabulary 0..{vocab - 1}: no text would "
        "end there; leave it out to write on to max_new"
      )
  width = max(_STOPS, -(-len(ids) // _STOPS) * _STOPS)
  return np.array(ids + [-1] * (width - len(ids)), np.int32)
