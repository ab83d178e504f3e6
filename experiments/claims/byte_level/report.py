"""The tables and the pictures of `byte_level`, from its CSV file."""

import pathlib

from experiments.claims import byte_sweeps
from experiments.measure import plots, sweep

_SPEED = "tokens per forward k="


def redraw(results: pathlib.Path) -> str:
  """As `byte_sweeps.redraw`, with tokens per forward by heads used."""
  text = byte_sweeps.redraw(results)
  rows = byte_sweeps.final(sweep.finished(sweep.read(results)))
  lines = plots.group(
    [row for row in rows if row.metric.startswith(_SPEED)],
    lambda row: row.run,
    lambda row: row.metric.removeprefix(_SPEED),
  )
  return f"{text}\n{plots.table(lines, 'tokens per forward, k =', '{:.2f}')}"
