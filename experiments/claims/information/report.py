"""Tables and the picture of `information`, from its rows."""

import pathlib
from collections.abc import Sequence

from experiments.measure import plots, tidy

_TERMS = "H(X)", "H(Y)", "H(X|Y)", "H(Y|X)", "I", "I standard error", "head 2"
_TERMS += ("I from heads",)
_PLACES = "a word begins", "a word goes on", "other"


def tables(rows: Sequence[tidy.Row]) -> str:
  """Markdown: residuals in nats, then every term of the loss in bits."""
  residuals = _lines(rows, lambda row: row.metric.startswith("largest"))
  models = [row for row in rows if row.run.startswith("n=")]
  terms = _lines(models, lambda row: row.metric in _TERMS)
  places = _lines(models, lambda row: " where " in row.metric)
  return "\n".join(
    [
      plots.table(residuals, "nats", "{:.1e}"),
      plots.table(terms, "bits", "{:.2f}"),
      plots.table(places, "", "{:.2f}"),
    ]
  )


def _lines(rows, wanted):
  kept = [row for row in rows if wanted(row)]
  # A bar in a cell of a Markdown table ends it.
  return plots.group(
    kept, lambda row: row.metric.replace("|", r"\|"), lambda row: row.run
  )


def section(rows: Sequence[tidy.Row], path: pathlib.Path) -> str:
  """Draws I by place, and returns the tables."""
  kept = [r for r in rows if r.metric.startswith("I where ")]
  lines = plots.group(
    kept, lambda row: row.run, lambda row: row.metric.removeprefix("I where ")
  )
  plots.curves(
    path.with_suffix(".png"),
    {"Relative mutual information of the next two bytes": lines},
    ("where the next byte stands", "bits"),
  )
  return tables(rows)
