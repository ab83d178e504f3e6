"""A stage in a process of its own, and how it ended, written down."""

import pathlib
import signal
import time
from collections.abc import Callable
from multiprocessing import context

from experiments.engineering.accelerator import record

GRACE = 15.0  # seconds after which a stage that does not end is ended
LEAST = 3.0  # seconds of its time without which a stage is not begun


def run(
  processes: context.BaseContext,
  work: Callable[[str, pathlib.Path, float, str | None], None],
  name: str,
  folder: pathlib.Path,
  until: float,
  scale: str | None,
) -> None:
  """Calls `work` with the last four arguments in a process of `processes`.

  Args:
    processes: from `multiprocessing.get_context`.
    work: the stage; it writes its own section.
    name: its key in the results.
    folder: of the results.
    until: when its time ends, in seconds since the epoch.
    scale: the stage's.
  """
  if until - time.time() < LEAST:
    _end(folder, name, "left out: no time")
    return
  child = processes.Process(target=work, args=(name, folder, until, scale))
  child.start()
  try:
    child.join(until + GRACE - time.time())
    late = child.exitcode is None
  finally:  # Ctrl-C, too
    if child.exitcode is None:
      child.kill()
      child.join()
  if late:
    _end(folder, name, f"ended {GRACE:g} s after its time")
  elif child.exitcode:
    code = child.exitcode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    _end(folder, name, f"ended by {how}")


def _end(folder, name, status):
  """Writes how a stage ended that did not do so itself."""
  whole = record.read(folder)
  section = whole["stages"].setdefault(name, {"status": "running"})
  if section["status"] == "running":
    section["status"] = status
    if running := section.get("running"):
      section["failed"][running] = status
      section["running"] = None
    record.write(folder, whole)
