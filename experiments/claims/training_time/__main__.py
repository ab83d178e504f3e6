"""What several heads cost in training time, from steps that were measured.

  python -m experiments.claims.training_time

Takes the steps out of `experiments/engineering/accelerator/results/`, writes
them to results/gpu.csv and prints the table. To measure others:
`python -m experiments.engineering.train_speed.run` or `...accelerator`.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.claims.training_time import report
from experiments.measure import tidy
from experiments.startup import program

_HERE = pathlib.Path(__file__).parent
_MEASURED = _HERE.parents[1] / "engineering" / "accelerator" / "results"
_FIGURES = {
  "seconds": report.TIME,
  "least_seconds": f"least {report.TIME}",
  "most_seconds": f"most {report.TIME}",
  "model_flops": report.MODEL_FLOPS,
  "executed_flops": report.RUN_FLOPS,
}


def main(_: list[str]) -> None:
  """Writes the CSV file and prints the table."""
  found, path = list(measured()), _HERE / "results" / "gpu.csv"
  tidy.write(path, found)
  print(report.section(found, path))


def measured() -> Iterator[tidy.Row]:
  """The rows of all that `accelerator` has kept."""
  for path in sorted(_MEASURED.glob("*.json")):
    for record in json.loads(path.read_text("utf-8")):
      yield from rows(record)


def rows(record: Mapping[str, Any]) -> Iterator[tidy.Row]:
  """The timed steps of the serial loss, a run for each size.

  Args:
    record: one of `accelerator`; without training it has no rows.

  Yields:
    The figures of a step for each n, in seconds and FLOPs per token. The last
    row of a run is the time that the timing of all its steps took.
  """
  stage = record["stages"].get("training", {"results": {}})
  for part, result in stage["results"].items():
    steps = [s for s in result.get("rows", ()) if s["loss"] == "serial"]
    if not steps:
      continue
    machine, size = stage["machine"], steps[0]["size"]
    versions = {k: v for k, v in machine.items() if k not in _OTHER}
    commit = record["calls"][stage["call"] - 1]["commit"]
    row = tidy.Row(
      claim="training_time",
      run=f"{size} on {machine['device']}, {machine['date']}, {commit}",
      overrides={"size": size},
      seed=0,
      step=0,
      metric="seconds",
      value=stage["seconds"][part],
      hardware=machine["device"],
      versions=" ".join(f"{k} {v}" for k, v in versions.items()),
      date=machine["date"],
      commit=commit,
    )
    for step in steps:
      for name, metric in _FIGURES.items():
        metric = f"{metric} n={step['n']}"
        yield row._replace(metric=metric, value=step[name])
    yield row


_OTHER = ("date", "device", "host")  # of a machine, beside versions

if __name__ == "__main__":
  program.start(main)
