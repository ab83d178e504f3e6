"""The table and the picture of `planning`, from its rows."""

import pathlib
from collections.abc import Sequence

from experiments.measure import plots, tidy


def table(rows: Sequence[tidy.Row]) -> str:
  """Markdown: accuracies when training ended, and the steps until then."""
  last = {}
  for row in rows:
    if row.metric in ("first", "path"):
      last[row.run, row.seed, row.metric] = row
  lines = plots.group(
    last.values(), lambda row: row.run, lambda row: _TITLES[row.metric]
  )
  text = plots.table(lines, "graph and heads", "{:.1%}")
  steps = {(row.run, row.seed): row for row in rows if row.metric == "first"}
  ends = [row._replace(value=row.step) for row in steps.values()]
  ends = plots.group(ends, lambda row: row.run, lambda _: "steps of training")
  return f"{text}\n{plots.table(ends, 'graph and heads', '{:.0f}')}"


_TITLES = {"first": "first step right", "path": "whole path right"}


def section(rows: Sequence[tidy.Row], path: pathlib.Path) -> str:
  """Draws first-step accuracy by training step, and returns the table."""
  panels = {}
  for row in rows:
    if row.metric == "first":
      graph, _ = row.run.split()
      panels.setdefault(graph, []).append(row)
  panels = {
    graph: plots.group(
      kept, lambda row: f"n={row.overrides['n']}", lambda row: row.step
    )
    for graph, kept in panels.items()
  }
  labels = "training step", "first step right"
  plots.curves(path.with_suffix(".png"), panels, labels)
  return table(rows)
