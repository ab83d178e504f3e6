"""Tables and plots of `finetuning`, from its rows."""

import pathlib

from experiments.measure import plots, tidy


def lines(rows: list[tidy.Row], name: str) -> list[plots.Line]:
  """pass@k by k, of a temperature or of the 'oracle'."""
  chosen = [
    row
    for row in rows
    if row.metric.startswith("pass@") and row.metric.endswith(f" {name}")
  ]
  return plots.group(
    chosen,
    lambda row: row.run,
    lambda row: int(row.metric.split()[0].removeprefix("pass@")),
  )


def tables(rows: list[tidy.Row]) -> str:
  """Markdown: pass@k of the best temperature, with every seed."""
  return plots.table(lines(rows, "oracle"), "(n, n'), pass@", "{:.1%}")


def section(rows: list[tidy.Row], path: pathlib.Path) -> str:
  """Draws pass@k by k, and returns the table."""
  plots.curves(
    path.with_suffix(".png"),
    {"held-out functions": lines(rows, "oracle")},
    ("k", "pass@k, best temperature"),
    log_x=True,
  )
  return tables(rows)
