"""Rows of a JSON file: one object in each line, or an array of objects."""

import codecs
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple


class Row(NamedTuple):
  """An object of the file, or why there is none."""

  place: str  # such as 'line 3', counted from 1
  fields: dict[str, Any]  # empty where there is a fault
  fault: str  # empty where there is none


def read(path: pathlib.Path) -> Iterator[Row]:
  """The rows of JSONL or of a JSON array, plain or .gz; blank lines are none.

  Not `data.formats`, which yields texts: these rows have fields of all types.

  Raises:
    ValueError: by the iterator, if the file cannot be read, or is an array that
      was cut.
  """
  path = path.expanduser()
  try:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
      for number, line in enumerate(file, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
          continue
        if number == 1 and line.lstrip().startswith(b"["):
          yield from _entries(path, line, line + file.read())
          return
        yield _parsed(f"line {number}", line)
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error


def _entries(path, first: bytes, data: bytes) -> Iterator[Row]:
  """The rows of an array; of JSONL, if its first line is a whole array."""
  try:
    entries = json.loads(data.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    rows = [_parsed("line 1", first)]
    if rows[0].fault != _NO_OBJECT:
      raise ValueError(
        f"{path} begins as a JSON array, and is cut or damaged ({error}): get "
        "it again"
      ) from error
    for number, line in enumerate(data.split(b"\n")[1:], 2):
      rows += [_parsed(f"line {number}", line)] if line.strip() else []
    yield from rows
  else:
    for number, value in enumerate(entries, 1):
      yield _row(f"entry {number}", value)


def _parsed(place: str, line: bytes) -> Row:
  try:
    return _row(place, json.loads(line.strip().decode("utf-8")))
  except (ValueError, RecursionError) as error:  # of UTF-8 or of JSON
    return Row(place, {}, str(error))


_NO_OBJECT = "not an object of JSON"


def _row(place: str, value: Any) -> Row:
  if isinstance(value, dict):
    return Row(place, value, "")
  return Row(place, {}, _NO_OBJECT)


# What a function that reads a row's fields may raise.
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
