"""What is asked of the figures: verdicts, and the README's table."""

from experiments.measure import study

# The bounds, and what they are about.
OVER_FLOPS = 1.03  # serial's step time over n = 1's, by the ratio of FLOPs
UTILISATION = 0.45  # of serial at 1.3B
ROWS_OVER_FORMULA = 3  # the most rows of serial over the formula's, n = 4


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
