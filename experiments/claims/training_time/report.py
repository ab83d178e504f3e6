"""The table of `training_time`, from its rows."""

import pathlib
from collections.abc import Sequence

from experiments.measure import tidy

# Table S5: time relative to n=1, by size and n.
PAPER = {
  ("0.3B", 2): 1.07,
  ("0.3B", 4): 1.22,
  ("0.6B", 2): 1.05,
  ("0.6B", 4): 1.13,
  ("1.3B", 2): 1.04,
  ("1.3B", 4): 1.12,
  ("3B", 2): 1.02,
  ("3B", 4): 1.07,
  ("6.7B", 2): 1.02,
  ("6.7B", 4): 1.07,
  ("13B", 2): 1.04,
  ("13B", 4): 1.09,
}
# Of one step; each is the name of a metric, followed by " n=1", " n=2", ...
TIME, MODEL_FLOPS, RUN_FLOPS = "step seconds", "model FLOPs", "run FLOPs"


def section(rows: Sequence[tidy.Row], path: pathlib.Path) -> str:
  """Markdown: time and FLOPs of a step over those of n=1 in one call."""
  del path  # no picture
  runs = {}
  for row in rows:
    key = row.hardware, row.date, row.commit, row.overrides["size"]
    runs.setdefault(key, {})[row.metric] = row.value
  lines = [
    "| call | size | n | time, paper | ours | model FLOPs | run FLOPs |",
    "|---" * 7 + "|",
  ]
  for (device, date, _, size), found in runs.items():
    for n in (2, 4):
      if not {f"{TIME} n=1", f"{TIME} n={n}"} <= found.keys():
        continue
      ratios = (
        found[f"{name} n={n}"] / found[f"{name} n=1"]
        for name in (TIME, MODEL_FLOPS, RUN_FLOPS)
      )
      cells = f"{device}, {date}", size, str(n), f"{PAPER[size, n]:.2f}"
      cells += tuple(f"{ratio:.2f}" for ratio in ratios)
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)
