"""The table of `training_time`, from its CSV file."""

import pathlib

from experiments.measure import study

FILE = "training_time.csv"
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


def table(results: pathlib.Path) -> str:
  """Markdown: time and FLOPs of a step over those of n=1 on one device."""
  rows = study.read_csv(results / FILE)
  first = {(r["device"], r["size"]): r for r in rows if r["n"] == "1"}
  lines = [
    "| device | size | n | time, paper | ours | model FLOPs | run FLOPs |",
    "|---" * 7 + "|",
  ]
  for row in rows:
    base = first.get((row["device"], row["size"]))
    if row["n"] == "1" or not base:
      continue
    ratios = (
      float(row[name]) / float(base[name])
      for name in ("seconds", "model_flops", "executed_flops")
    )
    paper = PAPER[row["size"], int(row["n"])]
    cells = row["device"], row["size"], row["n"], f"{paper:.2f}"
    cells += tuple(f"{ratio:.2f}" for ratio in ratios)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


redraw = table
