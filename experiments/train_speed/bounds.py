"""What is asked of the figures: the largest batch, verdicts, a table."""

import functools
from collections.abc import Callable

# The bounds, and what they are about.
OVER_FLOPS = 1.03  # serial's step time over n = 1's, by the ratio of FLOPs
UTILISATION = 0.45  # of serial at 1.3B
ROWS_OVER_FORMULA = 3  # the most rows of serial over the formula's, n = 4


def most_rows(needed: Callable[[int], int], limit: float) -> int:
  """The most rows of which `needed(rows)` bytes are at most `limit`.

  Memory is nearly affine in rows, so a program or two beside the first two
  tell, where trying one count after another would compile dozens.

  Args:
    needed: bytes that a program for so many rows takes; rising.
    limit: bytes.

  Returns:
    Rows; 0 where a single one is too many.
  """
  known = functools.cache(needed)
  if known(1) > limit:
    return 0
  low, high = 1, 2  # low fits; high is the next to try
  tried = 1
  while True:
    if known(high) > limit:
      break
    per_row = max((known(high) - known(tried)) / (high - tried), 1)
    tried = low = high
    high = low + max(1, int((limit - known(low)) / per_row))
  while high - low > 1:
    per_row = (known(high) - known(low)) / (high - low)
    guess = low + int((limit - known(low)) / max(per_row, 1))
    guess = min(max(guess, low + 1), high - 1)
    low, high = (guess, high) if known(guess) <= limit else (low, guess)
  return low


def verdicts(rows: list[dict]) -> dict[str, dict]:
  """Each bound's figure beside it, where it was measured."""
  at = {(row["size"], row["n"], row["loss"]): row for row in rows}
  found = {}

  def add(name, figure, bound, at_most):
    met = figure <= bound if at_most else figure >= bound
    found[name] = {"figure": figure, "bound": bound, "met": met}

  for (size, n, loss), row in at.items():
    one, formula = at.get((size, 1, loss)), at.get((size, n, "formula"))
    if loss != "serial":
      continue
    if n > 1 and one:
      ratio = row["seconds"] / row["rows"] / (one["seconds"] / one["rows"])
      work = row["flops_per_token"] / one["flops_per_token"]
      name = f"{size}: step time over n=1's, by the ratio of FLOPs, n={n}"
      add(name, ratio / work, OVER_FLOPS, True)
    if size == "1.3B" and "flop_utilisation" in row:
      name = f"{size}: FLOP utilisation, n={n}"
      add(name, row["flop_utilisation"], UTILISATION, False)
    if n == 4 and formula and formula["most_rows"]:
      name = f"{size}: most rows over the formula's, n={n}"
      ratio = row["most_rows"] / formula["most_rows"]
      add(name, ratio, ROWS_OVER_FORMULA, False)
  return found


def table(rows: list[dict]) -> str:
  """The README's table."""
  lines = [
    "| size | n | loss | s per step | tokens/s | FLOP utilisation | GiB | "
    "most rows |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    use = row.get("flop_utilisation")
    lines.append(
      f"| {row['size']} | {row['n']} | {row['loss']} | {row['seconds']:.3f} | "
      f"{row['tokens_per_second']:,.0f} | {'' if use is None else f'{use:.3f}'}"
      f" | {row['gib']:.2f} | {row['most_rows']} |"
    )
  return "\n".join(lines)
