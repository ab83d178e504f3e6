"""Sweeps: runs that resume, tidy rows, and what is drawn from them."""

import dataclasses
import errno
import io
import shutil
import sys
import types

import pytest

from experiments.claims import __main__ as claims
from experiments.measure import plots, study, sweep, tidy
from mtp_jax.checkpoint import checkpoints
from mtp_jax.train import lock


def runs(log, values=(0.5, 0.25), seeds=(0, 1), n=2):
  """One run per seed, that notes in `log` when it is measured."""

  def measured(seed):
    def measure(folder):
      assert folder.is_dir()
      print("what the run says")
      for i, value in enumerate(values):
        log.append(seed)
        if isinstance(value, BaseException):
          raise value
        yield sweep.Figure(10 * i, "nats", value + seed)

    return measure

  return [
    sweep.Run("demo", f"1M n={n}", {"n": n, "size": "1M"}, s, measured(s))
    for s in seeds
  ]


def test_rows_are_tidy(tmp_path, capsys):
  outcome = sweep.run(runs([]), tmp_path)
  assert outcome.done == ["1M n=2, seed 0", "1M n=2, seed 1"]
  assert not (outcome.left or outcome.failed or outcome.skipped)
  rows = tidy.read(tmp_path)
  nats = [(r.seed, r.step, r.value) for r in rows if r.metric == "nats"]
  assert nats == [(0, 0, 0.5), (0, 10, 0.25), (1, 0, 1.5), (1, 10, 1.25)]
  assert [r.metric for r in rows].count("seconds") == 2
  for row in rows:
    assert (row.claim, row.run) == ("demo", "1M n=2")
    assert row.overrides == {"n": 2, "size": "1M"}
    assert row.hardware == study.device() and row.commit == study.commit()
    assert "jax " in row.versions and row.date
  text = (tmp_path / "1M-n=2-seed1" / "log.txt").read_text()
  assert text == "what the run says\n"
  assert "what the run says" not in capsys.readouterr().out


def test_a_bar_counts_the_runs_on_a_terminal(tmp_path, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setattr(sys, "stdout", Terminal())
  sweep.run(runs([]), tmp_path)
  shown = sys.stdout.getvalue()
  assert "2/2" in shown and "2 of 2: 1M n=2, seed 1 ..." in shown
  assert "what the run says" not in shown


def test_a_sweep_resumes(tmp_path):
  """A run that is done is skipped; rows of one that was cut are replaced."""
  log = []
  with pytest.raises(KeyboardInterrupt):
    sweep.run(runs(log, values=(0.5, KeyboardInterrupt())), tmp_path)
  assert log == [0, 0] and len(tidy.read(tmp_path)) == 1
  with open(tmp_path / tidy.FILE, "a", encoding="utf-8") as file:
    file.write('demo,1M n=2,"{""n"": 2')  # a write that a kill cut
  sweep.run(runs(log, seeds=(0,)), tmp_path)
  assert len(tidy.read(tmp_path)) == 3
  log.clear()
  outcome = sweep.run(runs(log), tmp_path)
  assert log == [1, 1]
  assert outcome.skipped == ["1M n=2, seed 0"]
  assert outcome.done == ["1M n=2, seed 1"]
  assert len(tidy.read(tmp_path)) == 6


def test_a_run_goes_on_where_it_was_cut(tmp_path):
  """Figures up to the step after which it goes on stay; later ones do not."""
  last = []

  def measure(folder):
    for step in range(0, 40, 10):
      if step > max(last, default=-1):
        yield sweep.Figure(step, "nats", float(step + len(last)))
      if step == 20 and not last:
        raise KeyboardInterrupt

  def resume_step(folder):
    assert folder == tmp_path / "n-seed0"
    return max(last, default=-1)

  one = sweep.Run("demo", "n", {}, 0, measure, resume_step)
  with pytest.raises(KeyboardInterrupt):
    sweep.run([one], tmp_path)
  last.append(15)  # of which the file has no figure
  before = (tmp_path / tidy.FILE).read_text()
  (why,) = sweep.run([one], tmp_path).failed.values()
  assert "from step 15, but" in why and f"remove {tmp_path}/n-seed0" in why
  assert (tmp_path / tidy.FILE).read_text() == before
  last[:] = [10]
  assert sweep.run([one], tmp_path).done == ["n, seed 0"]
  rows = tidy.read(tmp_path)[:-1]
  assert [(r.step, r.value) for r in rows] == [
    *((0, 0.0), (10, 10.0), (20, 21.0), (30, 31.0))
  ]


def test_what_would_fail_is_said_before_the_first_run(tmp_path):
  def check():
    raise ValueError("no data")

  log = []
  first, last = runs(log)
  last = dataclasses.replace(last, check=check)
  with pytest.raises(ValueError, match="no data"):
    sweep.run([first, last], tmp_path)
  assert not log
  sweep.run([first, dataclasses.replace(last, check=lambda: None)], tmp_path)
  assert log == [0, 0, 1, 1]
  assert sweep.run([first, last], tmp_path).skipped  # they need nothing more


def test_a_cut_row_is_left_out_and_an_odd_one_is_damage(tmp_path):
  sweep.run(runs([]), tmp_path)
  file = tmp_path / tidy.FILE
  sound = file.read_bytes()
  rows = tidy.read(tmp_path)
  file.write_bytes(sound[:-3])  # of the last row's commit
  assert tidy.read(tmp_path) == rows[:-1]
  for same in (sound[:-1], b"\xef\xbb\xbf" + sound):  # as editors leave it
    file.write_bytes(same)
    assert tidy.read(tmp_path) == rows
  *_, last = sound.splitlines(keepends=True)
  for odd, why in (
    (sound + last, "row 7 of .* repeats a figure.*remove"),
    (sound.replace(b",0.25,", b",nan,"), "row 2 of .*value nan"),
    (sound.replace(b",10,", b",-10,"), "row 2 of .*step -10"),
    (sound.replace(b"seed,step", b"step,seed"), "the header is not claim,run,"),
    (sound.replace(b"demo,", b"demo,,", 1), "row 1 of .*too many cells"),
  ):
    file.write_bytes(odd)
    with pytest.raises(ValueError, match=why):
      tidy.read(tmp_path)


def test_no_row_is_dropped_before_its_run_begins(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    sweep.run(runs([], (0.5, KeyboardInterrupt())), tmp_path)
  before = (tmp_path / tidy.FILE).read_text()
  assert len(sweep.run(runs([]), tmp_path, minutes=0).left) == 2
  assert (tmp_path / tidy.FILE).read_text() == before


def test_a_full_disk_ends_the_sweep(tmp_path):
  full = OSError(errno.ENOSPC, "No space left on device")
  log = []
  some = runs(log, (0.5, full), seeds=(0,)) + runs(log, seeds=(1,))
  line = f"1M n=2, seed 0 cannot write to {tmp_path}: no space is left"
  with pytest.raises(ValueError, match=line):
    sweep.run(some, tmp_path)
  try:  # as a save that fails says so
    raise checkpoints.CheckpointError("step 1 was not saved") from full
  except checkpoints.CheckpointError as error:
    some = runs(log, (0.5, error), seeds=(0,)) + some[1:]
  with pytest.raises(ValueError, match=line):
    sweep.run(some, tmp_path)
  assert 1 not in log


@pytest.mark.parametrize("bad", [(0, "x", float("nan")), (-1, "x", 1.0), 2])
def test_a_figure_that_could_not_be_read_fails_its_run_alone(tmp_path, bad):
  def measure(folder):
    yield sweep.Figure(0, "nats", 0.5)
    yield sweep.Figure(*bad) if bad != 2 else sweep.Figure(0, "nats", 0.4)

  one = sweep.Run("demo", "bad", {}, 0, measure)
  outcome = sweep.run([one, *runs([])], tmp_path)
  assert len(outcome.failed) == 1 and len(outcome.done) == 2
  assert len(tidy.read(tmp_path)) == 1 + 6


def test_two_claims_take_two_folders(tmp_path):
  sweep.run(runs([]), tmp_path)
  (one,) = runs([], seeds=(0,))
  other = dataclasses.replace(one, claim="other")
  with pytest.raises(ValueError, match="has runs of demo.*another --output"):
    sweep.run([other], tmp_path)


def test_a_damaged_file_is_left_as_it_is(tmp_path):
  sweep.run(runs([]), tmp_path)
  file, log = tmp_path / tidy.FILE, []
  sound = file.read_text()
  head, first, *rest = sound.splitlines(keepends=True)
  for old, new in (
    (",10,", ",ten,"),
    ("commit", "sha"),
    ("demo,", "de,mo,"),
    (first, first[:20] + "\n"),  # no kill cuts a row that others follow
  ):
    assert old in sound and rest
    file.write_text(sound.replace(old, new))
    with pytest.raises(ValueError, match=r"row \d of .*sweep.csv is damaged"):
      sweep.run(runs(log), tmp_path)
    assert file.read_text() == sound.replace(old, new) and not log


def test_one_sweep_at_a_time_writes_to_a_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "_RELEASE", 0)
  with pytest.raises(ValueError, match="minutes=nan must be a number"):
    sweep.run(runs([]), tmp_path / "folder", float("nan"))
  assert not (tmp_path / "folder").exists()

  def measure(folder):
    with pytest.raises(checkpoints.CheckpointError, match="in use by another"):
      sweep.run(runs([]), tmp_path)
    yield sweep.Figure(0, "nats", 0.5)

  one = sweep.Run("demo", "first", {}, 0, measure)
  assert sweep.run([one], tmp_path).done == ["first, seed 0"]
  assert sweep.run(runs([]), tmp_path).done


def test_runs_that_were_cut_are_in_no_table(tmp_path):
  """Of two runs one was cut; the rows of another claim are left out, too."""
  sweep.run(runs([], seeds=(0,)), tmp_path)
  with pytest.raises(KeyboardInterrupt):
    sweep.run(runs([], (0.5, KeyboardInterrupt()), seeds=(1,)), tmp_path)
  rows = tidy.read(tmp_path)
  assert [row.seed for row in rows] == [0, 0, 0, 1]
  assert tidy.finished(rows, "demo") == rows[:3]
  others = [row._replace(claim="other") for row in rows]
  assert tidy.finished(others + rows, "demo") == rows[:3]


def test_a_figure_does_not_end_its_run(tmp_path):
  def measure(folder):
    yield sweep.Figure(0, "seconds", 1.0)

  one = sweep.Run("demo", "n=2", {}, 0, measure)
  (why,) = sweep.run([one], tmp_path).failed.values()
  assert "a figure is named 'seconds', which ends a run's rows" in why
  assert tidy.read(tmp_path) == []


def test_what_another_sweep_wrote_stays(tmp_path):
  sweep.run(runs([]), tmp_path)
  kept = tidy.read(tmp_path)
  sweep.run(runs([], n=4), tmp_path)
  assert tidy.read(tmp_path)[: len(kept)] == kept
  assert len(tidy.read(tmp_path)) == 2 * len(kept)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
  bad = ValueError("no\nroom")
  mixed = runs([], values=(0.5, bad), seeds=(0,)) + runs([], seeds=(1,))
  outcome = sweep.run(mixed, tmp_path)
  assert outcome.failed == {"1M n=2, seed 0": "ValueError: no room"}
  assert outcome.done == ["1M n=2, seed 1"]
  assert "failed: 1M n=2, seed 0: ValueError: no room" in str(outcome)
  log = []
  sweep.run(runs(log), tmp_path)
  assert log == [0, 0]  # it is tried again


def test_a_program_ends_with_an_error_if_runs_failed(tmp_path, capsys):
  """What is finished is kept, and shown."""

  def count(rows, path):
    return f"{len(rows)} rows of {path.name}"

  mixed = runs([], values=(ValueError("no room"),), seeds=(0,))
  with pytest.raises(ValueError, match="^1 of 1 runs failed: 1M n=2, seed 0"):
    sweep.run_and_show(mixed, tmp_path, 9, count)
  assert "rows" not in capsys.readouterr().out  # no table of nothing
  mixed += runs([], seeds=(1,))
  line = f"^1 of 2 runs failed: .*seed 0. See above.*kept in {tmp_path}/sweep.c"
  with pytest.raises(ValueError, match=line):
    sweep.run_and_show(mixed, tmp_path, 9, count)
  out = capsys.readouterr().out
  shown = f"3 rows of sweep.csv\n{tidy.origin(tidy.read(tmp_path))}.\n"
  assert out.endswith(f"failed: 1M n=2, seed 0: ValueError: no room\n{shown}")
  sweep.run_and_show(runs([]), tmp_path, 9, count)
  assert (
    "1 runs done, 1 done before\n6 rows of sweep.csv\n"
    in capsys.readouterr().out
  )
  # What another sweep left in the folder is not shown.
  sweep.run_and_show(runs([], seeds=(0,), n=4), tmp_path, 9, count)
  assert "1 runs done, 0 done before\n3 rows of" in capsys.readouterr().out


def test_a_signal_ends_the_program_without_an_error(tmp_path, capsys):
  some = runs([], seeds=(0,)) + runs([], (0.5, sweep.Stopped()), seeds=(1,))
  sweep.run_and_show(some, tmp_path, 9, lambda *_: "table")
  out = capsys.readouterr().out
  assert out.endswith("stopped: 1M n=2, seed 1. The same command resumes it\n")
  assert "table" not in out and len(tidy.read(tmp_path)) == 4


def test_runs_are_chosen_by_a_pattern():
  some = runs([]) + runs([], n=4)
  assert sweep.chosen(some, "") == some
  assert [str(one) for one in sweep.chosen(some, "n=4, seed 1|n=2.*0$")] == [
    *("1M n=2, seed 0", "1M n=4, seed 1")
  ]
  with pytest.raises(ValueError, match="--runs=n=8 is in no run's name: 1M n="):
    sweep.chosen(some, "n=8")
  with pytest.raises(ValueError, match=r"--runs=\( is no regular expression"):
    sweep.chosen(some, "(")


def test_one_cause_of_several_failures_is_told_once():
  outcome = sweep.Outcome(failed={"a": "no room", "b": "other", "c": "no room"})
  assert str(outcome).splitlines() == [
    "0 runs done, 0 done before",
    "failed: a; c: no room",
    "failed: b: other",
  ]


def test_every_program_of_a_sweep_does_so():
  for path in claims.ROOT.rglob("*.py"):
    assert "sweep.run(" not in path.read_text("utf-8"), path


def test_no_run_begins_after_the_time(tmp_path, monkeypatch):
  ticks = iter(range(0, 10_000, 20))  # seconds; three to a run
  clock = types.SimpleNamespace(monotonic=lambda: next(ticks))
  monkeypatch.setattr(sweep, "time", clock)
  outcome = sweep.run(runs([], seeds=range(9)), tmp_path, minutes=3)
  assert len(outcome.done) == 3 and len(outcome.left) == 6
  assert outcome.left[0] == "1M n=2, seed 3"
  assert "not begun: 1M n=2, seed 8" in str(outcome)


def test_other_settings_under_a_name_are_refused(tmp_path):
  log = []
  sweep.run(runs(log), tmp_path)
  (one,) = runs(log, seeds=(0,))
  other = sweep.Run("demo", one.name, {"n": 2, "size": "3M"}, 0, one.measure)
  log.clear()
  line = "has 1M n=2, seed 0 with size '1M', not '3M': name another --output"
  with pytest.raises(ValueError, match=line):
    sweep.run([other], tmp_path)
  with pytest.raises(ValueError, match="two runs are named 1M n=2, seed 0"):
    sweep.run([one, one], tmp_path)
  assert not log


def lines():
  rows = [
    tidy.Row("c", "r", {"n": n}, seed, m, "exact", n + m + seed, *("",) * 4)
    for n in (1, 2)
    for seed in (0, 1)
    for m in (1, 3)
  ]
  return plots.group(rows, lambda r: f"n={r.overrides['n']}", lambda r: r.step)


def test_values_of_seeds_are_collected():
  assert lines() == [
    plots.Line("n=1", {1: [2, 3], 3: [4, 5]}),
    plots.Line("n=2", {1: [3, 4], 3: [5, 6]}),
  ]


def test_a_table_shows_every_seed():
  found = [*lines(), plots.Line("n=4", {3: [0.25]})]
  assert plots.table(found, "n", "{:.2f}") == (
    "| n | 1 | 3 |\n"
    "| --- | --- | --- |\n"
    "| n=1 | 2.50 (2.00, 3.00) | 4.50 (4.00, 5.00) |\n"
    "| n=2 | 3.50 (3.00, 4.00) | 5.50 (5.00, 6.00) |\n"
    "| n=4 |  | 0.25 |\n"
  )


def test_the_same_rows_give_the_same_picture(tmp_path):
  for name in ("a.png", "b.png"):
    plots.curves(
      tmp_path / name, {"left": lines(), "right": lines()}, ("m", "right")
    )
  plots.curves(tmp_path / "c.png", {"left": []}, ("m", "right"))  # no line
  first, second = (path.read_bytes() for path in tmp_path.iterdir())
  assert first == second and first.startswith(b"\x89PNG")


def _section(rows, path):
  path.with_name(f"{path.stem}_loss.png").touch()
  return f"{len(rows)} rows of {path.name}\n"


def test_each_scale_is_a_section(tmp_path):
  """A file for each scale, with its pictures; none of unfinished runs."""
  sweep.run(runs([]), tmp_path)
  rows = tidy.read(tmp_path)
  origin = f"{tidy.origin(rows)}."
  results = tmp_path / "results"
  results.mkdir()
  for scale, some in ("gpu", rows), ("cpu", rows[:3]), ("paper", rows[:2]):
    tidy.write(results / f"{scale}.csv", some)
  assert tidy.read(results / "gpu.csv") == rows
  (results / "gpu.png").touch()
  (results / "gpus.png").touch()  # of no CSV file
  report = types.SimpleNamespace(section=_section)
  drawn = claims.redraw("demo", report, results)
  assert max(map(len, drawn.split("\n"))) <= 100
  assert [part.replace("\n", " ") for part in drawn.split("\n\n")] == [
    "`cpu`",
    "![demo, cpu_loss](results/cpu_loss.png)",
    "3 rows of cpu.csv",
    f"{tidy.origin(rows[:3])}.",
    "`gpu`",
    "![demo, gpu](results/gpu.png)",
    "![demo, gpu_loss](results/gpu_loss.png)",
    "6 rows of gpu.csv",
    origin,
  ]


def test_a_readme_takes_its_table_again(tmp_path, monkeypatch, capsys):
  folder = tmp_path / "demo"
  (folder / "results").mkdir(parents=True)
  page = folder / "README.md"
  empty = f"above\n\n{claims._BEGIN}{claims._END}\nbelow\n"
  page.write_text(empty)
  report = types.SimpleNamespace(section=_section)
  monkeypatch.setattr(claims, "ROOT", tmp_path)
  monkeypatch.setattr(claims, "reports", lambda: {"demo": report})
  claims.main([])
  assert "no results yet" in capsys.readouterr().out
  assert page.read_text() == empty
  sweep.run(runs([]), tmp_path)
  text = claims.redraw("demo", report, tmp_path)
  shutil.copy(tmp_path / tidy.FILE, folder / "results" / "cpu.csv")
  for _ in range(2):  # what is drawn again is the same
    claims.main([])
    assert page.read_text() == (
      f"above\n\n{claims._BEGIN}\n{text.replace('sweep', 'cpu')}\n\n"
      f"{claims._END}\nbelow\n"
    )
  with pytest.raises(ValueError, match="needs the lines"):
    claims.put("no marks", "text")


def test_tables_are_those_of_the_results(monkeypatch):
  """`make results` would change no README."""
  monkeypatch.setattr(plots, "curves", lambda *_, **__: None)
  pages = {path.parent.name: path for path in claims.ROOT.glob("*/README.md")}
  pages = {name: path.read_text("utf-8") for name, path in pages.items()}
  found = claims.reports()
  assert found.keys() == {
    n for n, page in pages.items() if claims._BEGIN in page
  }
  for name, module in found.items():
    results = claims.ROOT / name / "results"
    text = claims.redraw(name, module, results)
    assert claims.put(pages[name], text) == pages[name], name
    for path in results.glob("*.csv"):  # each has finished runs of its claim
      assert f"`{path.stem}`\n" in text, path


def test_every_claim_is_in_the_table():
  page = (claims.ROOT.parent / "README.md").read_text("utf-8")
  for path in claims.ROOT.glob("*/__main__.py"):
    assert f"](claims/{path.parent.name}/README.md)" in page, path
