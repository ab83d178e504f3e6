"""What programs write to a terminal, or to the file that stands for it."""

import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence

import rich.console
import rich.table


def show_table(
  title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
  """Prints a table whose cells stand on the right."""
  table = rich.table.Table(title=title)
  for name in columns:
    table.add_column(name, justify="right")
  for row in rows:
    table.add_row(*row)
  rich.console.Console().print(table)


def escaped(text: str) -> str:
  """Control characters, which could take over a terminal, as escapes."""
  return "".join(
    c.encode("unicode_escape").decode()
    if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf")
    else c
    for c in text
  )


def note(text: str) -> None:
  """Writes to standard error, which holds all but the result."""
  print(text, end="", file=sys.stderr, flush=True)


def read_line() -> bytes:
  """A line that is typed, without its end.

  Raises:
    EOFError: there is no more.
  """
  note("> ")
  line = sys.stdin.buffer.readline()
  if not line:
    raise EOFError
  return line.removesuffix(b"\n").removesuffix(b"\r")


def print_if_possible(text: str) -> None:
  """Prints the last words of work that is saved already.

  Where standard output cannot be written, they and what is printed after them
  are lost without an error.
  """
  try:
    print(text, end="", flush=True)
  except OSError:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
