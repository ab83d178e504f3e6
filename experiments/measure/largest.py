"""The search for the largest batch that a device holds."""

import functools
import math
from collections.abc import Callable


def most_rows(needed: Callable[[int], int], limit: float) -> int:
  """The most rows of which `needed(rows)` bytes are at most `limit`.

  Memory is nearly affine in rows, so a few programs are enough. Trying one
  count after another would compile dozens.

  Args:
    needed: bytes that a program for so many rows takes, rising; infinite
      where the compiler gives up.
    limit: bytes.

  Returns:
    Rows; 0 where a single one is too many.
  """
  memory = functools.cache(needed)
  if memory(1) > limit:
    return 0
  low, high = 1, 2  # low fits; high is the next to try
  while memory(high) <= limit:
    per_row = (memory(high) - memory(low)) / (high - low)
    more = int((limit - memory(high)) / max(per_row, 1)) + 1
    # No further at once: where the update takes most, memory is flat at first.
    low, high = high, min(high + more, 4 * high)
  bisect = False
  while high - low > 1:
    guess = (low + high) // 2
    if not bisect and math.isfinite(memory(high)):
      per_row = (memory(high) - memory(low)) / (high - low)
      guess = low + int((limit - memory(low)) / max(per_row, 1))
      guess = min(max(guess, low + 1), high - 1)
    bisect = not bisect
    low, high = (guess, high) if memory(guess) <= limit else (low, guess)
  return low
