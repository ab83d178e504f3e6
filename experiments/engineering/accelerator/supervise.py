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
    record.leave_out(folder, name, "no time")
    return
  record.Stage(folder, name, until)  # its section, whatever becomes of it
  child = processes.Process(target=work, args=(name, folder, until, scale))
  how = "interrupted"
  try:
    child.start()
    child.join(until + GRACE - time.time())
    how = _how(child.exitcode)
  finally:  # Ctrl-C, too
    if child.pid and child.exitcode is None:
      child.kill()
      child.join()
    whole = record.read(folder)
    record.close(whole["stages"][name], how)
    record.write(folder, whole)


def _how(code: int | None) -> str:
  """How a process ended, which has not written that it is finished."""
  if code is None:
    return f"ended {GRACE:g} s after its time"
  name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
  return f"ended by {name}"
