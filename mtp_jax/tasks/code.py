"""Programming problems: what a model reads, where it ends, what is tested.

`problem_files` reads the problems of public files.
"""

import builtins
import dataclasses
import functools
import symtable
import warnings
import zlib
from collections.abc import Sequence

from mtp_jax.decode import stream

Tests = str | tuple[tuple[str, str], ...]  # as `sandbox.Sandbox.check` takes


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem: what is read, where the answer ends, how it is tested."""

  name: str
  prompt: str  # what a model continues
  before: str  # the program is this, and what the model wrote
  stops: tuple[str, ...]  # an answer ends before the first of them
  tests: Tests
  solution: str | None = None  # said to be right; stands for an answer
  others: tuple[str, ...] = ()  # other solutions, to try where it fails
  group: str = ""  # such as the difficulty

  def program(self, answer: str) -> str:
    """The whole program that an answer makes."""
    return self.before + answer

  def job(self, answer: str) -> tuple[str, Tests, tuple[str, ...]]:
    """What `sandbox.Sandbox.check` takes.

    Where the known solution defines a builtin, as one of MBPP's defines `sum`,
    the tests mean that of the answer.
    """
    replaced = ()
    if self.solution is not None and isinstance(self.tests, str):
      replaced = _replaced(self.program(self.solution))
    return self.program(answer), self.tests, replaced

  def end(self, text: str, names: Sequence[str] = ()) -> int | None:
    """Where in `text` the answer ends; None: nowhere yet.

    A stop sequence inside a string of the program is none. One of `names`,
    those of the tokenizer's special tokens, always is.
    """
    ends = [stream.first(text, *names)] if names else []
    for stop in self.stops:
      place = text.find(stop)
      while place >= 0 and inside_string(self.before + text[:place], stop):
        place = text.find(stop, place + 1)
      ends.append(place if place >= 0 else None)
    return min((e for e in ends if e is not None), default=None)

  def number(self, sample: int) -> int:
    """The number by which a sample draws, whatever other samples there are."""
    return zlib.crc32(f"{self.name}/{sample}".encode()) & 0x7FFFFFFF


@functools.lru_cache(1024)
def _replaced(source: str) -> tuple[str, ...]:
  """The builtins that Python source defines for itself."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      table = symtable.symtable(source, "solution", "exec")
  except (SyntaxError, ValueError):
    return ()
  names = (s.get_name() for s in table.get_symbols() if s.is_assigned())
  return tuple(sorted(n for n in names if hasattr(builtins, n)))


def inside_string(source: str, then: str = "") -> bool:
  """Whether Python source ends inside a string literal.

  Args:
    source: up to there.
    then: what follows; a line's end closes all but a triple-quoted string.
  """
  quote, i = "", 0
  while i < len(source):
    if quote:
      if source[i] == "\\":
        i += 1
      elif source.startswith(quote, i):
        i += len(quote) - 1
        quote = ""
      elif source[i] == "\n" and len(quote) == 1:
        quote = ""
    elif source[i] == "#":
      end = source.find("\n", i)
      i = len(source) if end < 0 else end
    elif source[i] in "'\"":
      triple = source[i] * 3
      quote = triple if source.startswith(triple, i) else source[i]
      i += len(quote) - 1
    i += 1
  return len(quote) == 3 or (bool(quote) and not then.startswith("\n"))
