"""Tables and plots of `summarisation`, from its rows."""

import pathlib

from experiments.measure import plots, tidy


def lines(rows: list[tidy.Row], task: str) -> list[plots.Line]:
  """F1 by measure, a line for each way."""
  chosen = [
    row
    for row in rows
    if row.overrides["task"] == task and row.metric.endswith(" f1")
  ]
  return plots.group(
    chosen,
    lambda row: row.overrides["way"],
    lambda row: row.metric.removesuffix(" f1"),
  )


def tables(rows: list[tidy.Row]) -> str:
  """Markdown: F1 of each task, with every seed."""
  tasks = list(dict.fromkeys(row.overrides["task"] for row in rows))
  return "\n".join(
    plots.table(lines(rows, task), f"{task}, (n, n')", "{:.1%}")
    for task in tasks
  )


def section(rows: list[tidy.Row], path: pathlib.Path) -> str:
  """Draws F1 by measure, and returns the tables."""
  tasks = list(dict.fromkeys(row.overrides["task"] for row in rows))
  plots.curves(
    path.with_suffix(".png"),
    {task: lines(rows, task) for task in tasks},
    ("measure", "F1"),
  )
  return tables(rows)
