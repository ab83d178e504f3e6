"""Lines and a progress bar on standard output.

`contextlib.redirect_stdout` silences them.
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator

import rich.console
import rich.progress
import rich.table
from absl import logging


class Progress:
  """Prints lines and, on a terminal, a progress bar below them.

  If standard output is not a terminal, each report is a line. No failure of
  the output stops a run: characters that its encoding lacks are replaced, and
  a closed output (`train | head`) causes one warning on standard error.

  Args:
    active: False prints nothing, for all processes but the first.
  """

  def __init__(self, active: bool = True):
    self._console = rich.console.Console(
      file=_Output(sys.stdout or io.StringIO()),
      soft_wrap=True,
      quiet=not active,
    )
    self._total, self._bar = 0, None

  def start(self, total: int, step: int) -> None:
    """Shows a bar of `total` steps, of which `step` are done."""
    self._total = total
    if self._console.is_terminal:
      self._bar = bar(self._console)
      self._task = self._bar.add_task("", total=total, completed=step, note="")
      self._bar.start()

  def advance(self, step: int) -> None:
    """Moves the bar to `step`."""
    if self._bar:
      self._bar.update(self._task, completed=step)

  def report(self, step: int, note: str) -> None:
    """Shows `note` in the bar, or prints it if there is no bar."""
    if self._bar:
      self._bar.update(self._task, completed=step, note=note)
    else:
      self.say(f"step {step}/{self._total}  {note}")

  def say(self, text: str) -> None:
    """Prints a line."""
    self._console.print(text, markup=False, highlight=False)

  @contextlib.contextmanager
  def doing(self, what: str) -> Iterator[None]:
    """Prints what the code inside does, and its time if a second or more."""
    self.say(f"{what} ...")
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    if seconds >= 1:
      self.say(f"{what} took {seconds:.1f} s")

  def close(self) -> None:
    """Removes the bar and restores the terminal."""
    if self._bar:
      self._bar.stop()


def bar(console: rich.console.Console) -> rich.progress.Progress:
  """A bar as wide as `console`; a note that is too long is truncated."""
  fixed = [
    rich.progress.MofNCompleteColumn(),
    rich.progress.BarColumn(bar_width=16),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn("left"),
    rich.progress.TimeRemainingColumn(),
  ]
  note = rich.progress.TextColumn(
    "{task.fields[note]}",
    markup=False,
    table_column=rich.table.Column(ratio=1, no_wrap=True, overflow="ellipsis"),
  )
  return rich.progress.Progress(
    *fixed[:2], note, *fixed[2:], console=console, expand=True
  )


class _Output:
  """A stream whose writes never raise."""

  def __init__(self, stream: io.TextIOBase):
    self._stream = stream
    self._failed = False  # a warning was given
    self._closed = False

  def write(self, text: str) -> int:
    encoding = self._stream.encoding or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    self._surviving(self._stream.write, text)
    return len(text)

  def flush(self) -> None:
    self._surviving(self._stream.flush)

  def __getattr__(self, name: str):
    return getattr(self._stream, name)

  def _surviving(self, write, *text) -> None:
    if self._closed:
      return
    try:
      write(*text)
    except (OSError, ValueError) as error:  # ValueError: it is closed
      self._closed = not isinstance(error, OSError) or isinstance(
        error, BrokenPipeError
      )
      if not self._failed:
        logging.warning(
          "standard output cannot be written: %s. The run goes on; its logs "
          "are in the workdir",
          error,
        )
      self._failed = True
      if self._closed:
        with contextlib.suppress(OSError, ValueError):
          # Python flushes the buffer at exit, which would fail again.
          null = os.open(os.devnull, os.O_WRONLY)
          os.dup2(null, self._stream.fileno())
          os.close(null)
