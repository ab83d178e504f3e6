"""Plots and tables of a sweep, from its CSV rows alone.

`group` collects the values of several seeds; `curves` draws them and `table`
writes them. Every seed is shown: a mean alone would hide the spread.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from experiments.measure import tidy


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a plot or a row of a table: the values of all seeds by x."""

  name: str
  points: Mapping[float | str, Sequence[float]]


def group(
  rows: Iterable[tidy.Row],
  name: Callable[[tidy.Row], str],
  x: Callable[[tidy.Row], float | str],
) -> list[Line]:
  """Rows as lines, in the order in which they first appear.

  `group(rows, lambda r: f"n={r.overrides['n']}", lambda r: r.step)` is a line
  for each n, by step; at each step it has the values of all seeds.

  Args:
    rows: of one metric.
    name: which line a row belongs to.
    x: its place on the line.
  """
  lines = {}
  for row in rows:
    points = lines.setdefault(name(row), {})
    points.setdefault(x(row), []).append(row.value)
  return [Line(name, points) for name, points in lines.items()]


def curves(
  path: pathlib.Path,
  panels: Mapping[str, Sequence[Line]],
  labels: tuple[str, str],
  *,
  log_x: bool = False,
) -> None:
  """Draws panels side by side: a line through the means, a dot per seed.

  A name has the same colour in every panel. Without lines nothing is drawn,
  and nothing without matplotlib: `make results` does it later.

  Args:
    path: of the PNG file.
    panels: title -> lines.
    labels: of the horizontal and the vertical axis, with units.
    log_x: a logarithmic horizontal axis, which shows only the x that occur.
  """
  if not any(panels.values()):
    return
  try:
    import matplotlib  # not above: tables are wanted where it is missing
  except ImportError:
    logging.warning("matplotlib is missing: %s is not drawn", path)
    return

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(
    1,
    len(panels),
    figsize=(max(4.0 * len(panels), 5.0), 3.4),
    sharey=True,
    squeeze=False,
    layout="constrained",
  )
  names = list({line.name: 0 for lines in panels.values() for line in lines})
  for ax, (title, lines) in zip(axes[0], panels.items(), strict=True):
    for line in lines:
      colour = f"C{names.index(line.name) % 10}"
      xs = list(line.points)
      means = [sum(v) / len(v) for v in line.points.values()]
      ax.plot(xs, means, color=colour, label=line.name)
      for x, values in line.points.items():
        ax.plot([x] * len(values), values, ".", color=colour, alpha=0.6)
    if log_x:
      ax.set_xscale("log")
      ticks = sorted({x for line in lines for x in line.points})
      ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
      ax.minorticks_off()
    ax.set(title=title, xlabel=labels[0])
    ax.grid(alpha=0.3)
  axes[0][0].set_ylabel(labels[1])
  axes[0][-1].legend(fontsize="small")
  path.parent.mkdir(parents=True, exist_ok=True)
  # Without the version of matplotlib: the same rows give the same file.
  figure.savefig(path, dpi=120, metadata={"Software": None})
  pyplot.close(figure)


def table(lines: Sequence[Line], corner: str, form: str = "{:.3g}") -> str:
  """Lines as a Markdown table: the mean, and all seeds' values behind it.

  A cell is '82.1 (81.0, 83.2)', or '81.0' where there is one seed.

  Args:
    lines: rows of the table; its columns are their x.
    corner: what stands above the rows' names.
    form: a format for a value, such as '{:.1%}'.
  """
  columns = list({x: 0 for line in lines for x in line.points})

  def cell(values):
    if not values:
      return ""
    every = ", ".join(form.format(v) for v in values)
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({every})"

  header = [corner, *map(str, columns)]
  body = [
    [line.name, *(cell(line.points.get(x, ())) for x in columns)]
    for line in lines
  ]
  text = [header, ["---"] * len(header), *body]
  return "".join(f"| {' | '.join(row)} |\n" for row in text)
