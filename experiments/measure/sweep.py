"""Runs that differ in a few settings, whose figures go to one CSV file.

A sweep resumes: a run that is finished is not measured again. Of one that was
cut short, the rows up to the step from which it resumes stay. In several
processes all of them measure, and process 0 writes.
"""

import contextlib
import csv
import dataclasses
import errno
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import mtp_jax
from experiments.measure import sweep_state, tidy
from mtp_jax import config
from mtp_jax.model import model
from mtp_jax.train import lock, terminal


class Stopped(Exception):
  """A signal stopped a run, which is saved; the sweep ends without an error."""


class Figure(NamedTuple):
  """One number that a run measures."""

  step: int  # training steps before it
  metric: str  # such as "accuracy m=3"
  value: float


def _from_the_start(folder: pathlib.Path) -> int:
  del folder
  return -1


def nothing() -> None:
  """The check of a run that needs no files."""


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
  # Takes that folder. The step from which `measure` resumes in it, or -1. The
  # file has figures of that step; they and earlier ones are not yielded again.
  resume_step: Callable[[pathlib.Path], int] = _from_the_start
  # Raises ValueError if something that the run needs is missing. It is called
  # before the first run of a sweep.
  check: Callable[[], None] = nothing

  @property
  def key(self) -> tidy.Key:
    """What names the run, as `tidy.Row.key` does."""
    return self.claim, self.name, self.seed

  @property
  def folder(self) -> str:
    """The name of the run's folder."""
    kept = "".join(c if c.isalnum() or c in ".=-" else "-" for c in self.name)
    return f"{kept}-seed{self.seed}"

  def __str__(self) -> str:
    return f"{self.name}, seed {self.seed}"


@dataclasses.dataclass
class Outcome:
  """What `run` did with each run, by name and seed."""

  done: list[str] = dataclasses.field(default_factory=list)
  skipped: list[str] = dataclasses.field(default_factory=list)  # done before
  failed: dict[str, str] = dataclasses.field(default_factory=dict)  # and why
  left: list[str] = dataclasses.field(default_factory=list)  # no time

  def __str__(self) -> str:
    lines = [f"{len(self.done)} runs done, {len(self.skipped)} done before"]
    for why in dict.fromkeys(self.failed.values()):
      names = [name for name, found in self.failed.items() if found == why]
      lines.append(f"failed: {'; '.join(names)}: {why}")
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
  fails is reported, and the next begins; of several processes perhaps only
  some have failed, so the sweep ends.

  Args:
    runs: of one claim.
    folder: takes sweep.csv, and a folder for each run. Several processes
      share it.
    minutes: no run begins after so much time.

  Returns:
    Which runs are done, were done before, failed, or were not begun.

  Raises:
    ValueError: two runs have one name and seed, or `folder` has a run of the
      same name and seed and other overrides, or of another claim; `minutes`
      is not at least 0; sweep.csv is damaged; a run's `check` says so; or
      processes were asked for other runs. Nothing is measured then. Or the disk
      is full.
    checkpoints.CheckpointError: another sweep writes to `folder`.
    Stopped: a signal stopped a run.

  Example:
    >>> import pathlib
    >>> from experiments.measure import sweep, tidy
    >>> def measure(folder):
    ...   yield sweep.Figure(100, "nats", 0.7)
    >>> one = sweep.Run("demo", "n=2", {"n": 2}, seed=0, measure=measure)
    >>> outcome = sweep.run([one], pathlib.Path("runs/demo"))
    each run prints to log.txt in its folder in runs/demo
    1 of 1: n=2, seed 0 ...
    >>> tidy.read(pathlib.Path("runs/demo"))[0].value
    0.7
  """
  if not minutes >= 0:
    raise ValueError(f"minutes={minutes} must be a number, and at least 0")
  asked = {}
  for one in runs:
    if one.key in asked:
      raise ValueError(f"two runs are named {one}")
    asked[one.key] = one
  # Two sweeps would each replace the file that the other one appends to.
  with lock.exclusive(folder):
    return _run(asked, folder, minutes)


def run_and_show(
  runs: Sequence[Run],
  folder: pathlib.Path,
  minutes: float,
  section: Callable[[list[tidy.Row], pathlib.Path], str],
) -> None:
  """Does what a program does: `run`, then prints the outcome and its tables.

  Args:
    runs: see `run`, and so are `folder` and `minutes`.
    section: of a claim's report. It is given the rows of those of `runs` that
      are finished, if there are any, and the path of sweep.csv, beside which
      it draws.

  Raises:
    ValueError: see `run`; or some runs failed. It names them, and is raised
      last: the figures of the others are kept.
  """
  try:
    outcome = run(runs, folder, minutes)
  except Stopped as stopped:
    if jax.process_index() == 0:
      print(f"stopped: {stopped}. The same command resumes it")
    return
  if jax.process_index() == 0:
    print(outcome)
    asked = {one.key for one in runs}
    rows = tidy.finished(tidy.read(folder), runs[0].claim)
    if rows := [row for row in rows if row.key in asked]:
      print(section(rows, folder / tidy.FILE))
      print(f"{tidy.origin(rows)}.")
  if outcome.failed:
    raise ValueError(
      f"{len(outcome.failed)} of {len(runs)} runs failed: "
      f"{'; '.join(outcome.failed)}. See above why. Those that are done are "
      f"kept in {folder / tidy.FILE}; the same command runs only the others "
      "again"
    )


def _run(asked, folder, minutes) -> Outcome:
  begin, outcome = time.monotonic(), Outcome()
  ended = sweep_state.ended(asked, folder)
  is_first, here = jax.process_index() == 0, tidy.here()
  progress = terminal.Progress(is_first)  # one bar, and a line for each run
  with contextlib.closing(progress):
    progress.say(f"each run prints to log.txt in its folder in {folder}")
    progress.start(len(asked), 0)
    for i, one in enumerate(asked.values()):
      progress.advance(i)
      if one.key in ended:
        outcome.skipped.append(str(one))
        continue
      late = time.monotonic() - begin > 60 * minutes
      if sweep_state.together(lambda late=late: late)[0]:
        outcome.left.append(str(one))
        continue
      try:
        with progress.doing(f"{i + 1} of {len(asked)}: {one}"):
          _measure(one, folder, is_first, here)
      except Stopped as stopped:
        raise Stopped(str(one)) from stopped
      except Exception as error:  # the others may work
        if jax.process_count() > 1:
          raise
        if _is_full(error):
          raise ValueError(
            f"{one} cannot write to {folder}: no space is left. Make room; the "
            f"same command resumes ({error})"
          ) from error
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        outcome.failed[str(one)] = why
        progress.say(f"failed: {why}")
      else:
        outcome.done.append(str(one))
    progress.advance(len(asked))
  return outcome


def chosen(runs: Sequence[Run], pattern: str) -> list[Run]:
  """The runs in whose "NAME, seed SEED" a regular expression is found.

  Raises:
    ValueError: it is found in none, or is no regular expression.
  """
  try:
    found = [one for one in runs if re.search(pattern, str(one))]
  except re.error as error:
    raise ValueError(
      f"--runs={pattern} is no regular expression: {error}"
    ) from error
  if not found:
    names = "; ".join(map(str, runs))
    raise ValueError(f"--runs={pattern} is in no run's name: {names}")
  return found


def use_compilation_cache(folder: pathlib.Path) -> None:
  """Keeps what JAX compiles for the next start, unless it is told where."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def train(
  cfg: config.Config,
  workdir: pathlib.Path,
  init: model.Model | Callable[[], tuple[model.Model, dict]] | None = None,
) -> model.Model:
  """The model that `mtp_jax.fit` trains in a folder of a run.

  Args:
    cfg: the run's settings.
    workdir: takes what `fit` writes.
    init: the model to start from, see `mtp_jax.fit`; None: at random.

  Raises:
    Stopped: a signal stopped the training, which is saved.
  """
  state = mtp_jax.fit(cfg, workdir, init=init)
  if int(state.step) < cfg.train.steps:
    raise Stopped
  return state.model


def _measure(one, folder, is_first, here):
  """Runs one run; process 0 appends its figures as they come."""
  place = folder / one.folder
  begin, step = time.monotonic(), 0
  with contextlib.ExitStack() as stack:
    if is_first:
      place.mkdir(exist_ok=True)
      sweep_state.remove_later_rows(one, folder)
      file, log = (
        stack.enter_context(open(path, "a", newline="", encoding="utf-8"))
        for path in (folder / tidy.FILE, place / "log.txt")
      )
      writer = csv.writer(file, lineterminator="\n")
      stack.enter_context(contextlib.redirect_stdout(log))

    def write(step, metric, value):
      if is_first:
        row = tidy.Row(
          *(one.claim, one.name, one.overrides, one.seed),
          *(step, metric, value),
          **here,
        )
        writer.writerow(tidy.line(row))
        file.flush()

    seen = set()
    for step, metric, value in one.measure(place):
      if metric == tidy.LAST:
        raise ValueError(
          f"a figure is named {metric!r}, which ends a run's rows: give it "
          "another name"
        )
      # What `tidy.read` would refuse.
      if not math.isfinite(value) or step < 0 or (step, metric) in seen:
        twice = ", a second time" * ((step, metric) in seen)
        raise ValueError(f"{metric} is {value} at step {step}{twice}")
      seen.add((step, metric))
      write(step, metric, value)
    write(step, tidy.LAST, time.monotonic() - begin)


def _is_full(error: BaseException | None) -> bool:
  """Whether a full disk is among the causes of an error."""
  while error:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      return True
    error = error.__cause__ or error.__context__
  return False
