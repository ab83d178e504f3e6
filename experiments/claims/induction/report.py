"""Tables and plots of the induction sweep, from its rows."""

import pathlib

from experiments.measure import plots, tidy


def section(rows: list[tidy.Row], path: pathlib.Path) -> str:
  """Draws accuracy by step beside a CSV file; returns tables as Markdown."""
  panels = {}
  for size in dict.fromkeys(row.overrides["size"] for row in rows):
    some = [
      row
      for row in rows
      if row.metric == "accuracy" and row.overrides["size"] == size
    ]
    panels[size] = plots.group(some, _label, lambda row: row.step)
  labels = "training steps", "accuracy on the second token"
  plots.curves(path.with_suffix(".png"), panels, labels)
  settings = rows[0].overrides
  corpus = f"the corpus {settings.get('path')}"
  if "tokens" in settings:
    corpus = (
      f"a corpus of about {settings['tokens']:,} tokens with "
      f"{settings['names']} names"
    )
  text = [
    f"{settings['steps']} steps of {settings['batch']} x "
    f"{settings['seq_len']} tokens, {corpus}, {settings['test']} test "
    "stories.\n",
    "Best accuracy by size: the mean (each seed)\n",
    plots.table(best(rows), "n", "{:.1%}"),
  ]
  if learnt := steps_to(rows, 0.5):
    text += [
      "Training steps until accuracy was 50 %, of the runs that got there\n",
      plots.table(learnt, "n", "{:.0f}"),
    ]
  return "\n".join(text)


def best(rows: list[tidy.Row]) -> list[plots.Line]:
  """The best accuracy of each finished run: a line per n and mixture."""
  found = {}
  for row in rows:
    if row.metric == "accuracy":
      best = found.setdefault(row.key, row)
      found[row.key] = max(best, row, key=lambda row: row.value)
  return plots.group(
    found.values(),
    _label,
    lambda row: row.overrides["size"],
  )


def steps_to(rows: list[tidy.Row], share: float) -> list[plots.Line]:
  """Steps after which a run's accuracy was first `share`: a line per n.

  Runs that never got there are left out.
  """
  first = {}
  for row in rows:
    if row.metric == "accuracy" and row.value >= share:
      first.setdefault((row.run, row.seed), row._replace(value=row.step))
  return plots.group(first.values(), _label, lambda row: row.overrides["size"])


def _label(row):
  books = row.overrides["books"]
  return f"n={row.overrides['n']}" + f", {books:.0%} books" * (books > 0)
