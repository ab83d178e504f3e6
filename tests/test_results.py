"""Results that are kept are read by the programs of today, and say the same."""

import json
import pathlib

import pytest
from conftest import ROOT

from experiments.engineering.accelerator import report
from experiments.engineering.heads_memory import run as heads_memory
from experiments.engineering.heads_memory import scales
from experiments.engineering.overlap import run as overlap
from experiments.engineering.train_speed import bounds
from experiments.measure import study

FOLDER = ROOT / "experiments" / "engineering"


def numbers(path: pathlib.Path) -> list[dict]:
  """Rows of a CSV file, as numbers where they are."""

  def number(text):
    try:
      return float(text)
    except ValueError:
      return text

  return [
    {name: number(text) for name, text in row.items()}
    for row in study.read_csv(path)
  ]


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_verdicts_on_the_memory_of_heads(scale):
  path = FOLDER / "heads_memory" / "results" / f"{scale}.json"
  kept = json.loads(path.read_text())
  grown = {int(n): x for n, x in kept["serial_temp_mib_same_trunk"].items()}
  steps = numbers(path.with_name(f"{scale}_step.csv"))
  found = heads_memory.verdicts(
    scales.SCALES[scale], numbers(path.with_suffix(".csv")), grown, steps
  )
  assert list(found) == list(kept["bounds"])
  for name, bound in found.items():
    entry = kept["bounds"][name]
    # The files have six digits.
    assert bound.figure == pytest.approx(entry["figure"], rel=1e-5)
    assert (bound.bound, bound.met) == (entry["bound"], entry["met"])


def test_verdicts_on_overlap():
  folder = FOLDER / "overlap" / "results"
  found = overlap.verdicts(numbers(folder / "0.3B.csv"))
  kept = json.loads((folder / "0.3B.json").read_text())["step_over_flops"]
  assert {name: round(b.figure, 4) for name, b in found.items()} == kept
  assert all(bound.met for bound in found.values())


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_verdicts_on_the_steps_of_an_accelerator(device):
  path = FOLDER / "accelerator" / "results" / f"{device}.json"
  told = 0
  for call in json.loads(path.read_text()):
    text = report.text(call["stages"])
    for result in (
      call["stages"].get("training", {}).get("results", {}).values()
    ):
      kept = result.get("bounds", {})
      found = bounds.verdicts(result["rows"]) if kept else {}
      assert found.keys() == kept.keys()
      for name, bound in found.items():
        assert kept[name]["figure"] == pytest.approx(bound.figure, abs=5e-4)
        assert bound.met == kept[name]["met"]
        assert f"  {name}: {study.Bound(**kept[name])}" in text
        told += 1
  assert told
