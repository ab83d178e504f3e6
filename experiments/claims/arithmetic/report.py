"""Tables and plots of the arithmetic sweep, from its rows."""

import pathlib

from experiments.measure import plots, tidy

_METRIC = "exact_match m="


def section(rows: list[tidy.Row], path: pathlib.Path) -> str:
  """Draws exact match by m beside a CSV file; returns tables as Markdown."""
  panels = final(rows)
  labels = "operations m", "exact match"
  plots.curves(path.with_suffix(".png"), panels, labels)
  settings = rows[0].overrides
  text = [
    f"Trained on m = 1 to {settings['trained']}, "
    f"{settings['steps']} steps of {settings['batch']} x "
    f"{settings['seq_len']} tokens, {settings['expressions']} test expressions "
    "per m.\n"
  ]
  for title, lines in panels.items():
    text.append(f"{title}, by m: the mean (each seed)\n")
    text.append(plots.table(lines, "n", "{:.1%}"))
  return "\n".join(text)


def final(rows: list[tidy.Row]) -> dict[str, list[plots.Line]]:
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
