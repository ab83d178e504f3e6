"""The bugs that `tests.mutants` plants, by what they are in."""

from typing import NamedTuple


class Mutant(NamedTuple):
  """`old` becomes `new` in `file`; `tests` must see it."""

  bug: str
  file: str
  old: str
  new: str
  tests: str
