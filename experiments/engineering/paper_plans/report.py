"""The README's table of slices, made from the results.

python -m experiments.engineering.paper_plans.report
"""

from experiments.engineering.paper_plans import run
from experiments.measure import study


def table(rows: list[dict[str, str]], groups: dict[str, list[str]]) -> str:
  """Markdown: a line for every group of runs that take the same memory.

  Args:
    rows: lines of the results.
    groups: from `run.distinct`.
  """
  missing = []
  lines = [
    "| runs | slice | serial, GiB | formula, GiB | too small |",
    "|---|---|---|---|---|",
  ]
  for name, members in groups.items():
    mine = [row for row in rows if row["run"] == name]
    serial = [row for row in mine if row["loss"] == "serial"]
    small = [row["slice"] for row in serial if row["fits"] == "False"]
    fits = [row for row in serial if row["fits"] == "True"]
    if not fits:
      missing += members
      continue
    formula = [row for row in mine if row["loss"] == "formula"]
    peak = formula[0]["peak_gib"] if formula else "not yet"
    if formula and formula[0]["fits"] == "False":
      peak += ": does not fit"
    lines.append(
      f"| {label(members)} | {fits[0]['slice']} | {fits[0]['peak_gib']} | "
      f"{peak} | {', '.join(small)} |"
    )
  if missing:
    lines += [
      "",
      f"Not planned yet, {len(missing)} runs: {label(missing)}.",
    ]
  return "\n".join(lines)


def label(members: list[str]) -> str:
  """'scaling: 6.7B-n1; code_7b: 200B-n1, 1T-n1', a family at a time."""
  families = {}
  for member in members:
    family, name = member.split(":")
    families.setdefault(family, []).append(name)
  return "; ".join(f"{f}: {', '.join(n)}" for f, n in families.items())


if __name__ == "__main__":
  results = study.read_csv(run.FOLDER / "v5e.csv")
  print(table(results, run.distinct(run.runs())))
