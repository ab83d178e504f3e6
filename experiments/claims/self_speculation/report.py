"""Tables and plots of `self_speculation`, from its rows."""

import pathlib

from experiments.measure import plots, tidy


def tables(rows: list[tidy.Row]) -> str:
  """Markdown: what each way is worth, with every seed."""
  parts = [
    ("", ("tokens per forward", "predicted tokens per forward"), "{:.2f}"),
    ("draft of head", ("accepted 2", "accepted 3", "accepted 4"), "{:.1%}"),
    ("right on text, head", [f"accuracy {i}" for i in (1, 2, 3, 4)], "{:.1%}"),
    ("nats per token, head", [f"nats {i}" for i in (1, 2, 3, 4)], "{:.3f}"),
  ]
  text = [
    plots.table(_lines(rows, metrics), title, form)
    for title, metrics, form in parts
  ]
  return "\n".join(text)


def _lines(rows, metrics) -> list[plots.Line]:
  def label(row):
    return row.metric.split()[-1] if row.metric[-1].isdigit() else row.metric

  chosen = [row for metric in metrics for row in rows if row.metric == metric]
  return plots.group(chosen, lambda row: row.run, label)


def section(rows: list[tidy.Row], path: pathlib.Path) -> str:
  """Draws the share of drafts that is accepted; returns the tables."""
  chosen = [row for row in rows if row.metric.startswith("accepted")]
  lines = plots.group(chosen, lambda r: r.run, lambda r: int(r.metric[-1]))
  plots.curves(
    path.with_suffix(".png"),
    {"Greedy texts": lines},
    ("head", "share of passes that accept its draft"),
  )
  return tables(rows)
