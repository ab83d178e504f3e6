"""The tables and the pictures of `byte_level`, from its rows."""

import pathlib
from collections.abc import Sequence

from experiments.claims import byte_sweeps
from experiments.measure import plots, tidy

_HEADS = (1, 2, *range(4, 33, 4))  # shown, of up to 32; k as in table S3


def section(rows: Sequence[tidy.Row], path: pathlib.Path) -> str:
  """As `byte_sweeps.section`, with the loss per head, and the speed by k."""
  last = byte_sweeps.final(rows)
  losses = _lines(last, {f"bits_per_byte_{i}": i for i in _HEADS})
  speeds = _lines(last, {f"tokens per forward k={k}": k for k in _HEADS})
  parts = [
    byte_sweeps.section(rows, path),
    plots.table(losses, "bits per byte, head", "{:.2f}"),
    plots.table(speeds, "tokens per forward, k =", "{:.2f}"),
  ]
  return "\n".join(parts)


def _lines(rows, columns):
  kept = [row for row in rows if row.metric in columns]
  return plots.group(kept, lambda r: r.run, lambda r: columns[r.metric])
