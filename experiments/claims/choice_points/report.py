"""The table and the picture of `choice_points`, from its rows."""

import pathlib
from collections.abc import Sequence

from experiments.measure import plots, tidy

RATIOS = {"loss ratio": "loss", "gradient ratio": "gradient of the trunk"}


def table(rows: Sequence[tidy.Row]) -> str:
  """Markdown: ratios of choice to idle by n, after each number of steps."""
  heads = sorted({row.overrides["n"] for row in rows})
  lines = [plots.Line("(n+1)/2", {n: [(n + 1) / 2] for n in heads})]
  for metric, title in RATIOS.items():
    lines += plots.group(
      [row for row in rows if row.metric == metric],
      lambda row, title=title: f"{title}, step {row.step}",
      lambda row: row.overrides["n"],
    )
  return plots.table(lines, "choice over idle, n =", "{:.2f}")


def section(rows: Sequence[tidy.Row], path: pathlib.Path) -> str:
  """Draws the ratios by n, and returns the table."""
  heads = sorted({row.overrides["n"] for row in rows})
  panels = {}
  for metric, title in RATIOS.items():
    kept = [row for row in rows if row.metric == metric]
    panels[title] = [plots.Line("(n+1)/2", {n: [(n + 1) / 2] for n in heads})]
    panels[title] += plots.group(
      kept, lambda row: f"step {row.step}", lambda row: row.overrides["n"]
    )
  labels = "n, heads", "choice points over idle transitions"
  plots.curves(path.with_suffix(".png"), panels, labels)
  return table(rows)
