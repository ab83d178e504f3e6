"""The benchmark of training steps: the search for a batch, one small run."""

import json

import hypothesis
import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import strategies as st

from experiments.train_speed import run


@hypothesis.given(
  fixed=st.integers(0, 10**9),
  steps=st.lists(st.integers(1, 10**8), min_size=1, max_size=4),
  fits=st.integers(0, 5000),
  spare=st.floats(0, 0.99),
)
def test_most_rows(fixed, steps, fits, spare):
  """Memory that rises by uneven steps: the last count that fits, soon found."""
  asked = []

  def needed(rows):
    asked.append(rows)
    turns, rest = divmod(rows, len(steps))
    return fixed + turns * sum(steps) + sum(steps[:rest])

  limit = needed(fits) + spare * (needed(fits + 1) - needed(fits))
  asked.clear()
  assert run.most_rows(needed, limit) == fits
  assert len(asked) == len(set(asked))  # each program is compiled once
  if len(steps) == 1:
    assert len(asked) <= 5


def row(n, loss, seconds, most, rows=2):
  return {
    "size": "1.3B",
    "n": n,
    "loss": loss,
    "rows": rows,
    "seconds": seconds,
    "flops_per_token": 10.0 + n,
    "flop_utilisation": 0.4 + n / 50,
    "most_rows": most,
  }


def test_verdicts():
  rows = [
    row(1, "serial", 1.1, 12),
    row(4, "serial", 1.4, 12),
    row(1, "formula", 1.0, 6),
    row(4, "formula", 9.0, 5),
  ]
  got = {k: (v["figure"], v["met"]) for k, v in run.verdicts(rows).items()}
  assert got == {
    "1.3B: FLOP utilisation, n=1": (pytest.approx(0.42), False),
    "1.3B: FLOP utilisation, n=4": (pytest.approx(0.48), True),
    "1.3B: step time over n=1's, by the ratio of FLOPs, n=4": (
      pytest.approx(1.0),
      True,
    ),
    "1.3B: most rows over the formula's, n=4": (pytest.approx(2.4), False),
  }


def test_one_small_run(tmp_path, capsys):
  flags.FLAGS.mark_as_parsed()
  path = tmp_path / "cpu.json"
  settings = {"rows": 1, "seq_len": 32, "rounds": 1, "steps": 1}
  with flagsaver.flagsaver(
    sizes=["1M"],
    heads=["4"],
    losses=["serial", "formula"],
    memory_gib=0.22,
    output=str(path),
    **settings,
  ):
    run.main(["run"])
  rows = json.loads(path.read_text())["rows"]
  assert [(r["n"], r["loss"]) for r in rows] == [
    (4, loss) for loss in ("serial", "formula")
  ]
  assert all(r["seconds"] > 0 and r["gib"] > 0.1 for r in rows)
  most = {(r["n"], r["loss"]): r["most_rows"] for r in rows}
  assert most[4, "serial"] > 2 * most[4, "formula"] > 0
  shown = capsys.readouterr().out
  assert "1M: most rows over the formula's, n=4" in shown


def test_a_device_that_does_not_tell_its_memory():
  flags.FLAGS.mark_as_parsed()
  with pytest.raises(ValueError, match="give --memory_gib"):
    run.memory()
