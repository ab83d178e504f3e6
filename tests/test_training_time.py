"""`experiments.claims.training_time`: ratios of measured steps."""

from configs.paper import scaling
from experiments.claims.training_time import __main__ as program
from experiments.claims.training_time import report
from experiments.measure import tidy


def step(n, seconds, loss="serial"):
  times = {"seconds": seconds, "least_seconds": 0.9, "most_seconds": 1.1}
  flops = {"model_flops": 1e9 * n, "executed_flops": 2e9}
  return {"size": "0.3B", "n": n, "loss": loss} | times | flops


def record(device, *steps):
  """One of `accelerator`, whose second call timed the steps."""
  machine = {"date": "2026-11-26", "device": device, "host": "A", "jax": "0.11"}
  training = {
    "call": 2,
    "seconds": {"programs": 9.0, "steps": 6.0},
    "results": {"programs": {"n=1": {}}, "steps": {"rows": [*steps]}},
    "machine": machine,
  }
  calls = [{"commit": "first"}, {"commit": "second"}]
  return {"calls": calls, "stages": {"training": training}}


def test_steps_are_found_with_their_machine(tmp_path):
  first = record("1 x A", step(1, 1.0), step(4, 1.5))
  other = record("1 x B", step(4, 9.0), step(4, 2.0, "formula"))
  rows = [*program.rows(first), *program.rows(other)]
  assert [
    (row.hardware, row.metric, row.value)
    for row in rows
    if row.metric.startswith(report.TIME)
  ] == [
    ("1 x A", "step seconds n=1", 1.0),
    ("1 x A", "step seconds n=4", 1.5),
    ("1 x B", "step seconds n=4", 9.0),
  ]
  assert {row[7:] for row in rows if row.hardware == "1 x A"} == {
    ("1 x A", "jax 0.11", "2026-11-26", "second")
  }
  tidy.write(tmp_path / "gpu.csv", rows)
  kept = tidy.read(tmp_path / "gpu.csv")
  assert tidy.finished(kept, "training_time") == kept == rows
  assert tidy.origin(rows).endswith("; 0.2 minutes in all")
  # That of B has no n=1 beside it.
  (line,) = report.section(rows, tmp_path / "gpu.csv").splitlines()[2:]
  assert line == "| 1 x A, 2026-11-26 | 0.3B | 4 | 1.22 | 1.50 | 4.00 | 1.00 |"


def test_a_record_without_training_has_no_steps():
  assert not [*program.rows({"calls": [], "stages": {"decoding": {}}})]


def test_every_size_of_the_paper_has_its_time():
  wanted = {(size, n) for size in scaling.STEPS for n in (2, 4)}
  assert set(report.PAPER) == wanted


def test_the_measured_steps_are_in_the_table(tmp_path):
  """The CSV file is what the program would write, and has each device."""
  path = program._HERE / "results" / "gpu.csv"
  tidy.write(tmp_path / path.name, [*program.measured()])
  assert (tmp_path / path.name).read_text() == path.read_text()
  text = report.section(tidy.read(path), path)
  for call in (
    "H100 80GB HBM3, 2026-11-26",
    "H200, 2026-11-26",
    "H200, 2026-11-27",
  ):
    assert f"| 1 x NVIDIA {call} | 1.3B | 4 | 1.12 |" in text
