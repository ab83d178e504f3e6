"""The tables of `humaneval`'s results, from its rows."""

import pathlib
from collections.abc import Sequence

from experiments.measure import plots, tidy

_COMPARED = ("ordinary", "chain", "tree")
_COLUMNS = {
  "tokens per forward": "{:.2f}",
  "minutes": "{:.1f}",
  "same texts": "{:.0f}",
  "tokens": "{:.0f}",
}


def table(rows: Sequence[tidy.Row]) -> str:
  """Markdown: three ways to decode, then pass@k."""
  runs, overrides = {}, {}
  for row in rows:
    runs.setdefault(row.run, {})[row.metric] = row.value
    overrides[row.run] = row.overrides
  lines = [f"| decoding | problems | {' | '.join(_COLUMNS)} | pass@1 |"]
  lines.append("|---" * (3 + len(_COLUMNS)) + "|")
  for name in filter(runs.__contains__, _COMPARED):
    cells = [name, str(overrides[name]["problems"])]
    for metric, form in _COLUMNS.items():
      value = runs[name].get(metric)
      cells.append("" if value is None else form.format(value))
    lines.append(_line(*cells, f"{runs[name]['pass@1']:.1%}"))
  ks = {m for found in runs.values() for m in found if m.startswith("pass@")}
  ks = sorted(int(m.removeprefix("pass@")) for m in ks if " " not in m)
  heads = [f"pass@{k}" for k in ks]
  lines += ["", f"| answers | problems | of each | {' | '.join(heads)} |"]
  lines.append("|---" * (3 + len(ks)) + "|")
  for name, found in runs.items():
    if name not in _COMPARED:
      some = overrides[name]
      count = str(some.get("samples", 1))
      cells = [_score(found, k) for k in ks]
      lines.append(_line(name, str(some["problems"]), count, *cells))
  return "\n".join(lines)


def section(rows: Sequence[tidy.Row], path: pathlib.Path) -> str:
  """Draws pass@k by k, and returns the tables."""
  sampled = [
    row
    for row in rows
    if row.metric.removeprefix("pass@").isdigit()
    and row.run not in ("greedy", *_COMPARED)
  ]
  lines = plots.group(
    sampled, lambda row: row.run, lambda row: int(row.metric[5:])
  )
  plots.curves(
    path.with_suffix(".png"),
    {"HumanEval": lines},
    ("k", "pass@k"),
    log_x=True,
  )
  return table(rows)


def _line(*cells) -> str:
  return f"| {' | '.join(cells)} |"


def _score(found, k) -> str:
  name = f"pass@{k}"
  if name not in found:
    return ""
  low, high = found[f"{name} low"], found[f"{name} high"]
  text = f"{found[name]:.1%} ({low:.1%} to {high:.1%})"
  temperature = found.get(f"{name} temperature")
  return text if temperature is None else f"{text}, T={temperature:g}"
