"""What is made of the rows: the README's table, the picture."""

import pathlib

import matplotlib
from matplotlib import pyplot

matplotlib.use("Agg")


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """A panel for each of memory, FLOPs and time, against n."""
  panels = [("temp_mib", "temporary memory, MiB"), ("gflop", "GFLOP")]
  if "seconds" in rows[0]:
    panels.append(("seconds", "seconds, loss and gradient"))
  figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4))
  for axis, (column, label) in zip(axes, panels, strict=True):
    for name in dict.fromkeys(row["implementation"] for row in rows):
      points = [row for row in rows if row["implementation"] == name]
      axis.plot(
        [row["n"] for row in points],
        [row[column] for row in points],
        marker="o",
        label=name,
      )
    axis.set(xlabel="n, future tokens predicted", ylabel=label, ylim=(0, None))
    axis.set_xticks(_heads(rows))
    axis.spines[["top", "right"]].set_visible(False)
  axes[0].legend(frameon=False)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def table(rows: list[dict]) -> str:
  """The README's table: a line per implementation, a column group per n."""
  columns = [c for c in ("temp_mib", "gflop", "seconds") if c in rows[0]]
  head = [f"n={n}" for n in _heads(rows)]
  lines = [
    f"| | {' | '.join(head)} |",
    "|---|" + "---|" * len(_heads(rows)),
  ]
  for name in dict.fromkeys(row["implementation"] for row in rows):
    cells = [
      " / ".join(f"{row[c]:.4g}" for c in columns)
      for row in rows
      if row["implementation"] == name
    ]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _heads(rows):
  return sorted({row["n"] for row in rows})
