"""Tables and plots of `finetuning`, from its CSV files."""

import pathlib

from experiments.measure import plots, sweep


def lines(rows: list[sweep.Row], name: str) -> list[plots.Line]:
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


def tables(rows: list[sweep.Row]) -> str:
  """Markdown: pass@k of the best temperature, with every seed."""
  return plots.table(lines(rows, "oracle"), "(n, n'), pass@", "{:.1%}")


def redraw(results: pathlib.Path) -> str:
  """Draws `results`/pass_at_k.png; returns the table."""
  rows = sweep.finished(sweep.read(results))
  plots.curves(
    results / "pass_at_k.png",
    {"held-out functions": lines(rows, "oracle")},
    ("k", "pass@k, best temperature"),
    log_x=True,
  )
  return f"{tables(rows)}\n{sweep.origin(rows)}.\n"
