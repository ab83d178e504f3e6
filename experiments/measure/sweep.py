"""Runs that differ in a few settings, and one tidy CSV row per figure.

A sweep resumes: a run that is finished is not measured again, and the rows of
a run that was cut short are replaced.
"""

import contextlib
import csv
import dataclasses
import datetime
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import mtp_jax
from experiments.measure import study
from mtp_jax import config
from mtp_jax.model import model
from mtp_jax.train import lock, logs, terminal

FILE = "sweep.csv"
_COLUMNS = ("claim", "run", "overrides", "seed", "step", "metric", "value")
_COLUMNS += ("hardware", "versions", "date", "commit")
_LAST = "seconds"  # the metric of the row that ends a finished run


class Figure(NamedTuple):
  """One number that a run measures."""

  step: int  # training steps before it
  metric: str  # such as "accuracy m=3"
  value: float


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of a sweep: what distinguishes it, and how it is measured.

  `name` and `seed` together name the run within a claim. No figure is named
  "seconds": that row ends a finished run.
  """

  claim: str
  name: str  # such as "3M n=2"
  overrides: Mapping[str, Any]  # what it depends on; values are numbers, texts
  seed: int
  # Takes a folder of its own, which exists; trains, and yields figures.
  measure: Callable[[pathlib.Path], Iterable[Figure]]

  @property
  def folder(self) -> str:
    """The name of the run's folder."""
    kept = "".join(c if c.isalnum() or c in ".=-" else "-" for c in self.name)
    return f"{kept}-seed{self.seed}"


class Row(NamedTuple):
  """A figure as it stands in the CSV file, and its run."""

  claim: str
  run: str
  overrides: dict[str, Any]
  seed: int
  step: int
  metric: str
  value: float
  hardware: str
  versions: str
  date: str
  commit: str


@dataclasses.dataclass
class Outcome:
  """What `run` did with each run, by name and seed."""

  done: list[str] = dataclasses.field(default_factory=list)
  skipped: list[str] = dataclasses.field(default_factory=list)  # done before
  failed: dict[str, str] = dataclasses.field(default_factory=dict)  # and why
  left: list[str] = dataclasses.field(default_factory=list)  # no time

  def __str__(self) -> str:
    lines = [f"{len(self.done)} runs done, {len(self.skipped)} done before"]
    lines += [f"failed: {name}: {why}" for name, why in self.failed.items()]
    lines += [f"not begun: {name}" for name in self.left]
    return "\n".join(lines)


def run(
  runs: Sequence[Run],
  folder: pathlib.Path,
  minutes: float = float("inf"),
) -> Outcome:
  """Measures runs in order, and appends their figures to `folder`/sweep.csv.

  Each figure is written as soon as it is known. What a run prints goes to
  log.txt in its own folder. On a terminal a bar counts the runs. A run that
  fails is reported, and the next begins.

  Args:
    runs: of one claim.
    folder: takes sweep.csv, and a folder for each run.
    minutes: no run begins after so much time.

  Returns:
    Which runs are done, were done before, failed, or were not begun.

  Raises:
    ValueError: two runs have one name and seed, or `folder` has a run of the
      same name and seed and other overrides; `minutes` is no time; sweep.csv is
      damaged. Nothing is measured then.
    checkpoints.CheckpointError: another sweep writes to `folder`.

  Example:
    >>> import pathlib
    >>> from experiments.measure import sweep
    >>> def measure(folder):
    ...   yield sweep.Figure(100, "nats", 0.7)
    >>> one = sweep.Run("demo", "n=2", {"n": 2}, seed=0, measure=measure)
    >>> outcome = sweep.run([one], pathlib.Path("runs/demo"))
    what a run prints: runs/demo/RUN/log.txt
    1 of 1: n=2, seed 0 ...
    >>> sweep.read(pathlib.Path("runs/demo"))[0].value
    0.7
  """
  if not minutes >= 0:
    raise ValueError(f"minutes={minutes} is no time; give a number from 0 on")
  # Two sweeps would each replace the file that the other one appends to.
  with lock.exclusive(folder):
    return _run(runs, folder, minutes)


def run_and_show(
  runs: Sequence[Run],
  folder: pathlib.Path,
  minutes: float,
  section: Callable[[list[Row], pathlib.Path], str],
) -> None:
  """Does what a program does: `run`, then prints the outcome and its tables.

  Args:
    runs: see `run`, and so are `folder` and `minutes`.
    section: of a claim's report. It is given the rows of finished runs, if
      there are any, and the path of sweep.csv, beside which it draws.

  Raises:
    ValueError: see `run`; or some runs failed. It names them, and is raised
      last: the figures of the others are kept.
  """
  outcome = run(runs, folder, minutes)
  print(outcome)
  if rows := finished(read(folder), runs[0].claim):
    print(section(rows, folder / FILE))
    print(f"{origin(rows)}.")
  if outcome.failed:
    raise ValueError(
      f"{len(outcome.failed)} of {len(runs)} runs failed: "
      f"{'; '.join(outcome.failed)}. See above why. Those that are done are "
      f"kept in {folder / FILE}; the same command runs only the others again"
    )


def _run(runs, folder, minutes) -> Outcome:
  begin, outcome = time.monotonic(), Outcome()
  ended = _check(runs, folder)
  constant = _constant_columns()
  progress = terminal.Progress()  # one bar, and a line for each run
  with contextlib.closing(progress):
    progress.say(f"what a run prints: {folder}/RUN/log.txt")
    progress.start(len(runs), 0)
    for i, one in enumerate(runs):
      name = _title(one)
      progress.advance(i)
      if _key(one) in ended:
        outcome.skipped.append(name)
        continue
      if time.monotonic() - begin > 60 * minutes:
        outcome.left.append(name)
        continue
      try:
        with progress.doing(f"{i + 1} of {len(runs)}: {name}"):
          _measure(one, folder, constant)
      except Exception as error:  # the others may work
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        outcome.failed[name] = why
        progress.say(f"failed: {why}")
      else:
        outcome.done.append(name)
    progress.advance(len(runs))
  return outcome


def keep_programs(folder: pathlib.Path) -> None:
  """Keeps what JAX compiles for the next start, unless it is told where."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def train(
  cfg: config.Config,
  folder: pathlib.Path,
  init: model.Model | Callable[[], tuple[model.Model, dict]] | None = None,
) -> model.Model:
  """The model that `mtp_jax.fit` trains in a run's folder.

  Args:
    cfg: the run's settings.
    folder: of the run.
    init: the model to start from, see `mtp_jax.fit`; None: at random.

  Raises:
    KeyboardInterrupt: a signal stopped the training; its state is saved, and
      the sweep ends. The same sweep goes on from there.
  """
  state = mtp_jax.fit(cfg, folder / "model", init=init)
  if int(state.step) < cfg.train.steps:
    raise KeyboardInterrupt
  return state.model


def read(path: pathlib.Path) -> list[Row]:
  """The rows of a sweep's CSV file; none where there is no file.

  A last row that was cut by a kill is left out.

  Args:
    path: the file, or a folder with sweep.csv.

  Raises:
    ValueError: a row is damaged; names the file and the row.
  """
  file, rows = path / FILE if path.is_dir() else path, []
  try:
    lines = study.read_csv(file)
    for i, row in enumerate(lines, 1):
      if None in row.values() or not row["commit"]:
        if i < len(lines):
          raise ValueError("it is cut short, and others follow it")
        continue
      row["overrides"] = json.loads(row["overrides"])
      row |= {name: int(row[name]) for name in ("seed", "step")}
      rows.append(Row(**row | {"value": float(row["value"])}))
  except (ValueError, KeyError, TypeError, csv.Error) as error:
    raise ValueError(
      f"row {len(rows) + 1} of {file} is damaged ({error}): mend or remove it, "
      "or name another --output"
    ) from error
  return rows


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes a header, and rows as `read` reads them, all or nothing."""
  if rows:
    text = [row._asdict() | {"overrides": _text(row.overrides)} for row in rows]
    study.write_csv(path, text)
  else:
    logs.write_whole(path, ",".join(_COLUMNS) + "\n")


def finished(rows: Sequence[Row], claim: str) -> list[Row]:
  """The rows of a claim's runs that were not cut short: what a table shows."""
  ended = {key for key in _ended(rows) if key[0] == claim}
  return [row for row in rows if _key(row) in ended]


def origin(rows: Sequence[Row]) -> str:
  """One line for a README: hardware, date, versions, commit, time in all.

  The time of a run that was resumed is that of its last start.
  """
  parts = [
    "; ".join(dict.fromkeys(getattr(row, name) for row in rows))
    for name in ("hardware", "date", "versions", "commit")
  ]
  seconds = sum(row.value for row in rows if row.metric == _LAST)
  seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
  return f"{', '.join(parts)}; seeds {seeds}; {seconds / 60:.1f} minutes in all"


def _measure(one, folder, constant):
  """Runs one run; its figures are appended as they come."""
  place = folder / one.folder
  place.mkdir(exist_ok=True)
  begin, step = time.monotonic(), 0
  with (
    open(folder / FILE, "a", newline="", encoding="utf-8") as file,
    open(place / "log.txt", "a", encoding="utf-8") as log,
  ):
    writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")

    def write(step, metric, value):
      writer.writerow(
        {
          "claim": one.claim,
          "run": one.name,
          "overrides": _text(one.overrides),
          "seed": one.seed,
          "step": step,
          "metric": metric,
          "value": f"{float(value):.9g}",
        }
        | constant
      )
      file.flush()

    with contextlib.redirect_stdout(log):
      for step, metric, value in one.measure(place):
        if metric == _LAST:
          raise ValueError(
            f"a figure is named {metric!r}, which ends a run's rows: give it "
            "another name"
          )
        write(step, metric, value)
    write(step, _LAST, time.monotonic() - begin)


def _check(runs, folder) -> set:
  """The keys of finished runs; rows of others in `runs` are removed."""
  asked = {}
  for one in runs:
    if _key(one) in asked:
      raise ValueError(f"two runs are named {_title(one)}")
    asked[_key(one)] = json.loads(_text(one.overrides))
  rows = read(folder)
  for row in rows:
    wanted = asked.get(_key(row), row.overrides)
    if row.overrides != wanted:
      raise ValueError(
        f"{folder} has {row.run}, seed {row.seed}, with {row.overrides}, and "
        f"{wanted} is asked for: name another --output"
      )
  ended = _ended(rows)
  kept = [r for r in rows if _key(r) in ended or _key(r) not in asked]
  write(folder / FILE, kept)
  return ended


def _ended(rows) -> set:
  return {_key(row) for row in rows if row.metric == _LAST}


def _key(one: Run | Row) -> tuple[str, str, int]:
  name = one.name if isinstance(one, Run) else one.run
  return one.claim, name, one.seed


def _title(one: Run) -> str:
  return f"{one.name}, seed {one.seed}"


def _text(overrides: Mapping[str, Any]) -> str:
  return json.dumps(dict(overrides), sort_keys=True)


def _constant_columns() -> dict[str, str]:
  found = study.versions("python", *study.PACKAGES)
  return {
    "hardware": study.device(),
    "versions": " ".join(f"{k} {v}" for k, v in found.items()),
    "date": datetime.date.today().isoformat(),
    "commit": study.commit(),
  }
