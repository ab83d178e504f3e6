"""`experiments.claims.training_time`: ratios of measured steps."""

from configs.paper import scaling
from experiments.claims.training_time import __main__ as program
from experiments.claims.training_time import report
from experiments.measure import study


def step(n, seconds, loss="serial", **changes):
  times = {"seconds": seconds, "least_seconds": 0.9, "most_seconds": 1.1}
  flops = {"model_flops": 1e9 * n, "executed_flops": 2e9}
  row = {"size": "0.3B", "n": n, "loss": loss}
  return row | times | flops | changes


def test_steps_are_found_with_their_machine(tmp_path):
  machine = {"device": "1 x A", "date": "2026-11-26", "jax": "0.11.2"}
  other = machine | {"device": "1 x B"}
  calls = [
    {"results": {"steps": {"rows": [step(1, 1.0), step(4, 1.5)]}}}
    | {"machine": machine},
    {"machine": other, "rows": [step(4, 9.0), step(4, 2.0, "formula")]},
  ]
  rows = [*program.steps({"calls": calls}, None)]
  assert [(r["device"], r["n"], r["seconds"]) for r in rows] == [
    ("1 x A", 1, 1.0),
    ("1 x A", 4, 1.5),
    ("1 x B", 4, 9.0),
  ]
  study.write_csv(tmp_path / report.FILE, rows)
  # That of B has no n=1 beside it.
  (line,) = report.table(tmp_path).splitlines()[2:]
  assert line == "| 1 x A | 0.3B | 4 | 1.22 | 1.50 | 4.00 | 1.00 |"


def test_every_size_of_the_paper_has_its_time():
  wanted = {(size, n) for size in scaling.STEPS for n in (2, 4)}
  assert set(report.PAPER) == wanted


def test_the_measured_steps_are_in_the_table():
  folder = program._HERE / "results"
  assert "| 1 x NVIDIA H100 80GB HBM3 | 1.3B | 4 | 1.12 |" in report.table(
    folder
  )
