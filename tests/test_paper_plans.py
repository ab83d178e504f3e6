"""The table of slices: what it covers, and that the README holds it."""

import importlib
import re

import pytest

from configs.paper import base
from experiments.engineering.paper_plans import report, run
from experiments.measure import study

pytest.importorskip("libtpu")


@pytest.fixture(scope="module")
def every():
  return run.runs()


def test_every_run_is_in_one_group(every):
  groups = run.distinct(every)
  members = [name for names in groups.values() for name in names]
  assert sorted(members) == sorted(every) and len(every) == 109
  for first, names in groups.items():
    for name in names:
      assert every[name].model == every[first].model
      assert every[name].data.seq_len == every[first].data.seq_len


def test_one_row_per_chip(every):
  for cfg in every.values():
    got = base.one_row_per_chip(cfg, 4)
    assert got.data.batch == cfg.data.batch
    assert got.data.batch / got.train.accumulate / got.mesh.data == 1


def test_parameters_alone_rule_a_slice_out(every):
  cfg = every["scaling:3B-n4"]  # 3.02e9 x (4 + 8 + 8) bytes are 56 GiB
  assert [run.plausible(cfg, s) for s in ("1x1", "2x2", "4x4")] == [
    False, True, True,
  ]  # fmt: skip


def test_the_readme_holds_the_table(every):
  rows = study.read_csv(run.FOLDER / "v5e.csv")
  assert rows and {row["loss"] for row in rows} <= {"serial", "formula"}
  text = (run.FOLDER.parent / "README.md").read_text()
  assert report.table(rows, run.distinct(every)) in text


def test_configs_name_their_slices(every):
  """Each family the slices that its runs fit, and no other."""
  rows = study.read_csv(run.FOLDER / "v5e.csv")
  fits = {
    row["run"]: row["slice"]
    for row in rows
    if (row["loss"], row["fits"]) == ("serial", "True")
  }
  found = {family: set() for family in run.FAMILIES}
  for first, members in run.distinct(every).items():
    for member in members:
      found[member.split(":")[0]].add(fits[first])
  for family, slices in found.items():
    text = importlib.import_module(f"configs.paper.{family}").__doc__
    assert (
      set(re.findall(r"v\d\w*:\w+", text.split("Planned slice")[1])) == slices
    )


def test_heads_fit_where_one_head_fits(every):
  """The bounds on 13B and on bytes: n = 4 and 32 on the slice of n = 1."""
  rows = study.read_csv(run.FOLDER / "v5e.csv")

  def smallest(name):
    return min(
      row["slice"]
      for row in rows
      if row["run"] == name and (row["loss"], row["fits"]) == ("serial", "True")
    )

  assert smallest("scaling:13B-n4") == smallest("scaling:13B-n1")
  assert smallest("bytes_7b:7B-n32") == smallest("bytes_7b:7B-n1")


def test_the_table():
  rows = [
    dict(run="f:a", slice=s, loss=x, fits=f, peak_gib=p)
    for s, x, f, p in (
      ("v5e:2x2", "serial", "False", "17.1"),
      ("v5e:2x4", "serial", "True", "9.3"),
      ("v5e:2x4", "formula", "False", "16.2"),
    )
  ]
  got = report.table(rows, {"f:a": ["f:a", "f:b", "g:c"], "g:d": ["g:d"]})
  assert got.splitlines()[2:] == [
    "| f: a, b; g: c | v5e:2x4 | 9.3 | 16.2: does not fit | v5e:2x2 |",
    "",
    "Not planned yet, 1 runs: g: d.",
  ]


def test_a_line_is_planned_once(tmp_path, monkeypatch):
  path, made = tmp_path / "r.csv", []

  def line(name, cfg, slice_, loss):
    made.append(name)
    return {"run": name, "slice": f"v5e:{slice_}", "loss": loss, "fits": True}

  monkeypatch.setattr(run, "line", line)
  for name in ("a", "b", "a"):
    row = run.planned(path, name, None, "1x1", "serial")
    assert (row["run"], row["fits"]) == (name, "True")
  assert made == ["a", "b"]
  assert [r["run"] for r in study.read_csv(path)] == made


def test_the_commands_leave_each_chip_one_row(every):
  """Those of the docstrings, on the slice that holds the run."""
  rows = study.read_csv(run.FOLDER / "v5e.csv")
  slices = {
    row["run"]: row["slice"]
    for row in rows
    if (row["loss"], row["fits"]) == ("serial", "True")
  }
  first = {n: f for f, names in run.distinct(every).items() for n in names}
  for family in run.FAMILIES:
    text = importlib.import_module(f"configs.paper.{family}").__doc__
    asked = re.search(rf"{family}.py:(\S+)", text)[1]
    name = f"{family}:{asked}"
    parts = re.search(r"accumulate=(\d+)", text)[1]
    wide, high = slices[first[name]].removeprefix("v5e:").split("x")
    chips = int(wide) * int(high)
    planned = base.one_row_per_chip(every[name], chips)
    assert planned.train.accumulate == int(parts), name
