"""One program and one report for claims that compare models of Python files.

A claim's `scales.runs(scale)` lists its runs, made by `python_models.run`. Its
`__main__` is `start(scales.runs, report.section)`; its `report.section` is the
one here, or begins with it.
"""

import pathlib
from collections.abc import Callable, Sequence

from experiments.measure import plots, python_models, sweep
from experiments.startup import options, program

HEAD_1 = "bits_per_byte_1"
SPEED = "tokens_per_forward_greedy"
COLUMNS = {HEAD_1: "bits per byte, head 1", SPEED: "tokens per forward"}


def start(
  runs: Callable[[str], list[sweep.Run]],
  section: Callable[[list[sweep.Row], pathlib.Path], str],
) -> None:
  """The program of a claim: flags, its runs, its table.

  Args:
    runs: takes the name of a scale, one of `python_models.SIZES`.
    section: of the claim's report, see `sweep.run_and_show`.
  """
  scale = options.define_scale(
    python_models.SIZES, "cpu", "Size of the models, and of their training."
  )
  output = options.define_output("Folder that takes everything.")
  minutes = options.define_minutes()

  def main(_: list[str]) -> None:
    sweep.run_and_show(runs(scale.value), output.value, minutes.value, section)

  program.start(main)


def final(rows: Sequence[sweep.Row]) -> list[sweep.Row]:
  """The rows of each run's last evaluation, every metric once."""
  last = {(row.run, row.seed, row.metric): row for row in rows}
  return list(last.values())


def table(rows: Sequence[sweep.Row]) -> str:
  """Markdown: head 1's loss and speed of each run when it ended."""
  rows = [row for row in final(rows) if row.metric in COLUMNS]
  lines = plots.group(rows, lambda r: r.run, lambda r: COLUMNS[r.metric])
  return plots.table(lines, "model", "{:.3f}")


def section(rows: Sequence[sweep.Row], path: pathlib.Path) -> str:
  """Draws head 1's loss and the speed by training step; returns the table."""
  claim = rows[0].claim
  for metric, title in COLUMNS.items():
    kept = [row for row in rows if row.metric == metric]
    lines = plots.group(kept, lambda r: r.run, lambda r: r.step)
    name = "loss" if metric == HEAD_1 else "speed"
    picture = path.with_name(f"{path.stem}_{name}.png")
    plots.curves(picture, {claim: lines}, ("step", title))
  return table(rows)
