"""What measuring programs share: provenance, files, verdicts, turns."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from experiments.measure import study, timing


def test_provenance_says_what_ran_on_what(tmp_path, monkeypatch):
  """As a program that is started with -m sees itself."""
  (tmp_path / "program").mkdir()
  (tmp_path / "program" / "__main__.py").write_text(
    "import json\nfrom experiments.measure import study\n"
    "print(json.dumps(study.provenance(seed=7)))\n"
  )
  done = subprocess.run(
    [sys.executable, "-m", "program", "--name=a b"],
    cwd=tmp_path,
    env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/nowhere"},
    capture_output=True,
    text=True,
    check=True,
  )
  found = json.loads(done.stdout)
  assert found["command"] == "python -m program '--name=a b'"
  assert found["commit"] == "unknown"  # no git on that path
  assert found["machine"]["jax"] == jax.__version__
  assert " x " in found["machine"]["device"]
  assert found["seed"] == 7 and "seed" not in study.provenance()


def test_the_commit_is_gits():
  head = subprocess.run(
    ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
  )
  if head.returncode:
    pytest.skip("not a git checkout")
  assert study.commit().removesuffix("-dirty") == head.stdout.strip()


def test_versions_are_of_what_is_installed():
  found = study.versions("jax", "no-such-package", "python")
  assert found["jax"] == jax.__version__ and list(found) == ["jax", "python"]
  assert list(study.stamp("jax")) == ["date", "jax"]


def test_rows_come_back_and_more_can_follow(tmp_path):
  path = tmp_path / "r.csv"
  assert study.read_csv(path) == []
  study.write_csv(path, [{"run": "a", "fits": True, "x": 1 / 3}])
  rows = study.read_csv(path)
  assert rows == [{"run": "a", "fits": "True", "x": "0.333333333"}]
  study.write_csv(path, [*rows, {"run": "b, c", "fits": False, "x": 12345678}])
  assert path.read_text().splitlines() == [
    "run,fits,x",
    "a,True,0.333333333",
    '"b, c",False,12345678',
  ]


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "r.json"
  bounds = {"time": study.Bound.at_most(2.0, 1.5)}
  study.write_json(path, {"bounds": bounds, "x": np.float32(0.5)})
  found = json.loads(path.read_text())
  entry = {"figure": 2.0, "bound": 1.5, "met": False}
  assert found == {"bounds": {"time": entry}, "x": 0.5}
  assert study.Bound(**entry) == bounds["time"]
  with pytest.raises(TypeError):
    study.write_json(path, {"x": object()})
  assert json.loads(path.read_text()) == found


def test_bounds():
  at_most, at_least = study.Bound.at_most, study.Bound.at_least
  assert str(at_most(1.05, 1.05)) == "1.05 (bound 1.05): met"
  assert str(at_most(1.0512, 1.05)) == "1.051 (bound 1.05): NOT MET"
  assert str(at_least(0.31, 0.45)) == "0.31 (bound 0.45): NOT MET"
  assert str(at_least(3, 3)) == "3 (bound 3): met"
  assert str(study.Bound(2.01234)) == "2.012: for comparison"
  # Of a program that failed: it is not met, whichever way the bound points.
  assert not at_most(math.nan, 1).met and not at_least(math.nan, 1).met


def test_calls_take_turns():
  said = []
  calls = {
    name: lambda name=name: said.append(name) or len(said) for name in "ab"
  }
  assert timing.alternate(calls, 3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
  assert "".join(said) == "ababab"


def test_seconds(monkeypatch):
  now = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0, 0.0, 5.0])
  monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
  assert timing.median(lambda: np.ones(1), 3) == 2
  assert timing.timed(lambda: 7) == (5, 7)


def test_times_are_told_by_their_median():
  assert timing.spread([3, 1, 8]) == {
    "seconds": 3, "least_seconds": 1, "most_seconds": 8,
  }  # fmt: skip
  # Round by round: a slow round does not count as a slow program.
  assert timing.median_ratio([2, 20, 4], [1, 10, 2]) == 2
