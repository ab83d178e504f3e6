"""What is asked of the figures: the largest batch, verdicts, a table."""

import functools
import math
from collections.abc import Callable

from experiments.measure import study

# The bounds, and what they are about.
OVER_FLOPS = 1.03  # serial's step time over n = 1's, by the ratio of FLOPs
UTILISATION = 0.45  # of serial at 1.3B
ROWS_OVER_FORMULA = 3  # the most rows of serial over the formula's, n = 4


def most_rows(needed: Callable[[int], int], limit: float) -> int:
  """The most rows of which `needed(rows)` bytes are at most `limit`.

  Memory is nearly affine in rows, so a program or two beside the first ones
  tell, where trying one count after another would compile dozens.

  Args:
    needed: bytes that a program for so many rows takes, rising; infinite
      where the compiler gives up.
    limit: bytes.

  Returns:
    Rows; 0 where a single one is too many.
  """
  known = functools.cache(needed)
  if known(1) > limit:
    return 0
  low, high = 1, 2  # low fits; high is the next to try
  while known(high) <= limit:
    per_row = (known(high) - known(low)) / (high - low)
    more = int((limit - known(high)) / max(per_row, 1)) + 1
    # No further at once: where the update takes most, memory is flat at first.
    low, high = high, min(high + more, 4 * high)
  bisect = False
  while high - low > 1:
    guess = (low + high) // 2
    if not bisect and math.isfinite(known(high)):
      per_row = (known(high) - known(low)) / (high - low)
      guess = low + int((limit - known(low)) / max(per_row, 1))
      guess = min(max(guess, low + 1), high - 1)
    bisect = not bisect
    low, high = (guess, high) if known(guess) <= limit else (low, guess)
  return low


def verdicts(rows: list[dict]) -> dict[str, study.Bound]:
  """Each bound, where its figure was measured."""
  at = {(row["size"], row["n"], row["loss"]): row for row in rows}
  found = {}
  for (size, n, loss), row in at.items():
    one, formula = at.get((size, 1, loss), {}), at.get((size, n, "formula"), {})
    if loss != "serial":
      continue
    if n > 1 and "seconds" in row and "seconds" in one:
      ratio = row["seconds"] / row["rows"] / (one["seconds"] / one["rows"])
      for kind in ("executed", "model"):
        work = row[f"{kind}_flops"] / one[f"{kind}_flops"]
        name = f"{size}: step time over n=1's, by {kind} FLOPs, n={n}"
        found[name] = study.Bound.at_most(ratio / work, OVER_FLOPS)
    if size == "1.3B" and "flop_utilisation" in row:
      name = f"{size}: FLOP utilisation, n={n}"
      use = row["flop_utilisation"]
      found[name] = study.Bound.at_least(use, UTILISATION)
    if n == 4 and "most_rows" in row and "most_rows" in formula:
      name = f"{size}: most rows over the formula's, n={n}"
      ratio = row["most_rows"] / max(formula["most_rows"], 1)
      if not formula["most_rows"]:
        name += " (of which none fits: counted as 1)"
      found[name] = study.Bound.at_least(ratio, ROWS_OVER_FORMULA)
  return found


def table(rows: list[dict]) -> str:
  """The README's table."""
  lines = [
    "| size | n | loss | s per step | tokens/s | FLOP utilisation | GiB | "
    "most rows |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    cells = [
      f"{row[key]:{form}}" if key in row else "does not fit"
      for key, form in (
        ("seconds", ".3f"),
        ("tokens_per_second", ",.0f"),
        ("gib", ".2f"),
        ("most_rows", ""),
      )
    ]
    use = row.get("flop_utilisation")
    cells.insert(2, "" if use is None else f"{use:.3f}")
    lines.append(
      f"| {row['size']} | {row['n']} | {row['loss']} | {' | '.join(cells)} |"
    )
  return "\n".join(lines)
