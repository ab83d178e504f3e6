"""The tables and the pictures of `byte_level`, from its CSV file."""

import pathlib

from experiments.claims import byte_sweeps
from experiments.measure import plots, sweep

_HEADS = (1, 2, *range(4, 33, 4))  # shown, of up to 32; k as in table S3


def redraw(results: pathlib.Path) -> str:
  """As `byte_sweeps.redraw`, with the loss per head, and the speed by k."""
  rows = sweep.finished(sweep.read(results))
  byte_sweeps.draw(rows, results)
  last = byte_sweeps.final(rows)
  losses = _lines(last, {f"bits_per_byte_{i}": i for i in _HEADS})
  speeds = _lines(last, {f"tokens per forward k={k}": k for k in _HEADS})
  parts = [
    byte_sweeps.table(rows),
    plots.table(losses, "bits per byte, head", "{:.2f}"),
    plots.table(speeds, "tokens per forward, k =", "{:.2f}"),
    f"{sweep.origin(rows)}.\n",
  ]
  return "\n".join(parts)


def _lines(rows, columns):
  kept = [row for row in rows if row.metric in columns]
  return plots.group(kept, lambda r: r.run, lambda r: columns[r.metric])
