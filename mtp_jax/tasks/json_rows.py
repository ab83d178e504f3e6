"""Rows of a JSON file: one object in each line, or an array of objects."""

import contextlib
import gzip
import json
import pathlib
import zlib
from typing import Any, NamedTuple


class Row(NamedTuple):
  """An object of the file, or why there is none."""

  place: str  # such as 'line 3', counted from 1
  fields: dict[str, Any]  # empty where there is a fault
  fault: str  # empty where there is none


def read(path: pathlib.Path) -> list[Row]:
  """The rows of JSONL or of a JSON array, plain or .gz; blank lines are none.

  Raises:
    ValueError: the file cannot be read.
  """
  path = path.expanduser()
  try:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  if data.lstrip().startswith(b"["):
    # Otherwise it is JSONL of other values.
    with contextlib.suppress(ValueError, RecursionError):
      entries = json.loads(data.decode("utf-8"))
      return [_row(f"entry {i}", value) for i, value in enumerate(entries, 1)]
  found = []
  for number, line in enumerate(data.split(b"\n"), 1):
    if not line.strip():
      continue
    place = f"line {number}"
    try:
      found.append(_row(place, json.loads(line.decode("utf-8"))))
    except (ValueError, RecursionError) as error:  # of UTF-8 or of JSON
      found.append(Row(place, {}, str(error)))
  return found


def _row(place: str, value: Any) -> Row:
  if isinstance(value, dict):
    return Row(place, value, "")
  return Row(place, {}, "not an object of JSON")


# What a function that reads a row's fields may raise, and its words.
FAULTS = KeyError, TypeError, ValueError, AttributeError


def fault(error: Exception) -> str:
  """What one of FAULTS says of a row."""
  missing = isinstance(error, KeyError)
  return f"the field {error} is missing" if missing else str(error)


def text(fields: dict[str, Any], name: str) -> str:
  """A field that has to be a text with more than white space.

  Raises:
    KeyError: there is none.
    ValueError: it is something else.
  """
  value = fields[name]
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"the field {name!r} is {value!r:.40}, not a text")
  return value
