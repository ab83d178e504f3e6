"""What several heads cost in training time, from steps that were measured.

  python -m experiments.claims.training_time

Takes the steps out of `experiments/engineering/accelerator/results/`, writes
them to results/training_time.csv and prints the table. To measure others:
`python -m experiments.engineering.train_speed.run` or `...accelerator`.
"""

import json
import pathlib
from collections.abc import Iterator

from experiments.claims.training_time import report
from experiments.measure import study
from experiments.startup import program

_HERE = pathlib.Path(__file__).parent
_MEASURED = _HERE.parents[1] / "engineering" / "accelerator" / "results"


def main(_: list[str]) -> None:
  """Writes the CSV file and prints the table."""
  rows = []
  for path in sorted(_MEASURED.glob("*.json")):
    rows += steps(json.loads(path.read_text("utf-8")), None)
  study.write_csv(_HERE / "results" / report.FILE, rows)
  print(report.table(_HERE / "results"))


def steps(found, machine: dict | None) -> Iterator[dict]:
  """The timed steps of the serial loss in a result, at any depth.

  Args:
    found: a part of it.
    machine: that the part around it was measured on.
  """
  if isinstance(found, list):
    for part in found:
      yield from steps(part, machine)
  elif isinstance(found, dict) and "seconds" in found and "size" in found:
    if found.get("loss") == "serial" and machine:
      kept = "size", "n", "seconds", "least_seconds", "most_seconds"
      kept += "model_flops", "executed_flops"
      yield {name: found[name] for name in kept} | {
        name: machine[name] for name in ("device", "date", "jax")
      }
  elif isinstance(found, dict):
    machine = found.get("machine", machine)
    for part in found.values():
      yield from steps(part, machine)


if __name__ == "__main__":
  program.start(main)
