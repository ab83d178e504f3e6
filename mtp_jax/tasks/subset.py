"""Some of a task's problems, or of the texts that it asks about."""

from collections.abc import Sequence
from typing import TypeVar

Problem = TypeVar("Problem")


def evenly(problems: Sequence[Problem], count: int) -> list[Problem]:
  """`count` of the problems, in equal steps from the first one on.

  Args:
    problems: in the order of their file.
    count: how many; `min(count, len(problems))` takes all if there are fewer.

  Raises:
    ValueError: there are fewer than `count`.

  Example:
    >>> from mtp_jax.tasks import subset
    >>> subset.evenly(range(164), 4)
    [0, 41, 82, 123]
  """
  size = len(problems)
  if count > size:
    raise ValueError(f"problems={count}: there are {size}; ask for fewer")
  return [problems[i * size // count] for i in range(count)]
