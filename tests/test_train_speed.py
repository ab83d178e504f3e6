"""The benchmark of training steps: the search for a batch, one small run."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from experiments.engineering.train_speed import bounds
from experiments.measure import largest


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
  assert largest.most_rows(needed, limit) == fits
  assert len(asked) == len(set(asked))  # each program is compiled once
  assert max(asked) <= max(4 * fits, 2)  # and none that is out of all reason
  assert len(asked) <= (10 if len(steps) == 1 else 30)


def test_most_rows_where_memory_is_flat_at_first_and_the_compiler_gives_up():
  asked = []

  def needed(rows):
    asked.append(rows)
    used = max(10e9, 5e9 + 0.4e9 * rows)
    return used if used <= 90e9 else float("inf")

  assert largest.most_rows(needed, 70e9) == 162
  assert max(asked) <= 4 * 162 and len(asked) <= 15


def row(n, loss, seconds, most, rows=2):
  return {
    "size": "1.3B",
    "n": n,
    "loss": loss,
    "rows": rows,
    "seconds": seconds,
    "executed_flops": 10.0 + n,
    "model_flops": 10.0,
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
  got = {k: (v.figure, v.met) for k, v in bounds.verdicts(rows).items()}
  assert got == {
    "1.3B: FLOP utilisation, n=1": (pytest.approx(0.42), False),
    "1.3B: FLOP utilisation, n=4": (pytest.approx(0.48), True),
    "1.3B: step time over n=1's, by executed FLOPs, n=4": (
      pytest.approx(1.4 / 1.1 / (14 / 11)),
      True,
    ),
    "1.3B: step time over n=1's, by model FLOPs, n=4": (
      pytest.approx(1.4 / 1.1),
      False,
    ),
    "1.3B: most rows over the formula's, n=4": (pytest.approx(2.4), False),
  }


def test_a_formula_of_which_no_row_fits():
  rows = [row(4, "serial", 1.4, 12), {**row(4, "formula", 9.0, 0)}]
  del rows[1]["seconds"]
  figures = bounds.verdicts(rows)
  (name,) = (name for name in figures if "most rows" in name)
  assert "none fits" in name and figures[name].figure == 12
  assert "| 1.3B | 4 | formula | does not fit |" in bounds.table(rows)


MODULE = "experiments.engineering.train_speed.run"


@pytest.mark.slow
def test_one_small_run(call, tmp_path):
  path = tmp_path / "cpu.json"
  code, out, err = call(
    "--sizes=1M",
    "--heads=4",
    "--losses=serial,formula",
    "--rows=1",
    "--seq_len=32",
    "--rounds=1",
    "--steps=1",
    "--memory_gib=0.203",
    f"--output={path}",
    module=MODULE,
  )
  assert code == 0, err[-3000:]
  rows = json.loads(path.read_text())["rows"]
  assert [(r["n"], r["loss"]) for r in rows] == [(4, "serial"), (4, "formula")]
  assert all(r["seconds"] > 0 and r["gib"] > 0.1 for r in rows)
  serial, formula = (r["most_rows"] for r in rows)
  assert serial > 2 * formula > 0
  assert "1M: most rows over the formula's, n=4" in out


def test_a_device_that_does_not_tell_its_memory(call, tmp_path):
  code, _, err = call(f"--output={tmp_path}/none.json", module=MODULE)
  assert code == 1 and "give --memory_gib" in err
