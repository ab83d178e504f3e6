"""Tables and plots of the arithmetic sweep, from its CSV files."""

import pathlib

from experiments.measure import plots, sweep

_METRIC = "exact_match m="


def redraw(results: pathlib.Path) -> str:
  """Draws a plot beside each CSV file; returns their tables as Markdown."""
  paths = sorted(results.glob("*.csv"))
  return "\n".join(filter(None, map(_section, paths)))


def final(rows: list[sweep.Row]) -> dict[str, list[plots.Line]]:
  """Exact match at the end of each finished run: setting -> a line per n."""
  last = {(r.run, r.seed): r.step for r in rows if r.metric == "seconds"}
  panels = {}
  for row in rows:
    if not row.metric.startswith(_METRIC):
      continue
    if last.get((row.run, row.seed)) == row.step:
      panels.setdefault(_setting(row), []).append(row)
  return {
    setting: plots.group(
      some,
      lambda row: f"n={row.overrides['n']}",
      lambda row: int(row.metric.removeprefix(_METRIC)),
    )
    for setting, some in panels.items()
  }


def _setting(row):
  pauses = row.overrides["pauses"]
  return row.overrides["size"] + f", {pauses} pause tokens" * (pauses > 0)


def _section(path):
  rows = sweep.finished(sweep.read(path))
  panels = final(rows)
  if not panels:
    return ""
  labels = "operations m", "exact match"
  plots.curves(path.with_suffix(".png"), panels, labels)
  settings = rows[0].overrides
  text = [
    f"`{path.stem}`: trained on m = 1 to {settings['trained']}, "
    f"{settings['steps']} steps of {settings['batch']} x "
    f"{settings['seq_len']} tokens, {settings['expressions']} test expressions "
    f"per m. {sweep.origin(rows)}.\n"
  ]
  for title, lines in panels.items():
    text.append(f"{title}, by m: the mean (each seed)\n")
    text.append(plots.table(lines, "n", "{:.1%}"))
  return "\n".join(text)
