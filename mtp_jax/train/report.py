"""What a run says on standard output: its start, its progress, its end.

`contextlib.redirect_stdout` silences it.
"""

import contextlib
import io
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import rich.console
import rich.progress
import rich.table
from absl import logging

from mtp_jax import config
from mtp_jax.data import pipeline
from mtp_jax.model import model


class Progress:
  """Lines that stay, and below them a bar on a terminal.

  Without a terminal the bar is a line per report. Nothing here ends a run:
  characters that the output's encoding lacks are replaced, and a closed output
  (`train | head`) is reported once on standard error.

  Args:
    active: False says nothing (processes other than the first).
  """

  def __init__(self, active: bool = True):
    self._console = rich.console.Console(
      file=_Output(sys.stdout or io.StringIO()),
      soft_wrap=True,
      quiet=not active,
    )
    self._total, self._bar = 0, None

  def start(self, total: int, step: int) -> None:
    """Begins the bar of `total` steps at `step`."""
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
    """Shows `note` beside the bar, or as a line."""
    if self._bar:
      self._bar.update(self._task, completed=step, note=note)
    else:
      self.say(f"step {step}/{self._total}  {note}")

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self._console.print(text, markup=False, highlight=False)

  @contextlib.contextmanager
  def doing(self, what: str) -> Iterator[None]:
    """Says what is done inside, and the seconds it took if they were any."""
    self.say(f"{what} ...")
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    if seconds >= 1:
      self.say(f"{what} took {seconds:.1f} s")

  def close(self) -> None:
    """Leaves the terminal as it was."""
    if self._bar:
      self._bar.stop()


def bar(console: rich.console.Console) -> rich.progress.Progress:
  """A bar as wide as `console`, of which only the task's note is cut."""
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


def settings(
  cfg: config.Config,
  packed: tuple[pipeline.Packed, pipeline.Packed],
  mesh: jax.sharding.Mesh,
) -> list[str]:
  """Lines on devices, model, corpus and steps of a run.

  Args:
    cfg: the run's settings.
    packed: its training split and its held-out split.
    mesh: its devices.
  """
  device, shape = mesh.devices.flat[0], mesh.shape
  processes = jax.process_count()
  counts = model.count_parameters(cfg.model)
  cut = f" ({packed[1].cut})" if packed[1].cut else ""
  source = f"{cfg.data.source} {cfg.data.path}".rstrip()
  files = f"{packed[0].files:,} file{'' if packed[0].files == 1 else 's'}"
  skipped = ", ".join(f"{n:,} {why}" for why, n in packed[0].skipped.items())
  tokens = cfg.data.batch * cfg.data.seq_len
  windows = packed[0].windows(cfg.data.seq_len)
  epochs = cfg.train.steps * cfg.data.batch / windows
  return [
    f"devices: {mesh.size} x {device.device_kind} (data {shape['data']} x "
    f"model {shape['model']}) in {processes} process"
    f"{'es' if processes > 1 else ''}, jax {jax.__version__}",
    f"model: {short(counts['total'])}parameters, {short(counts['layers'])}"
    f"of them not embeddings; {cfg.model.n_future} {cfg.model.head} heads",
    f"corpus: {source}, {files}; left out: {skipped or 'nothing'}",
    f"  to train on: {_size(packed[0])}",
    f"  held out: {_size(packed[1])}{cut}",
    f"steps: {cfg.train.steps:,} of {tokens:,} tokens, {epochs:.3g} epochs",
  ]


def end(workdir: pathlib.Path, step: int) -> str:
  """A line on where a finished run's files lie."""
  return (
    f"finished at step {step}; {workdir}/ has checkpoints/{step}, the logs "
    "train.csv, held_out.csv and tensorboard/, and samples/"
  )


def _size(split: pipeline.Packed) -> str:
  predicted = len(split.tokens) - split.documents
  size = round(split.bytes_per_token * predicted)
  return (
    f"{split.documents:,} documents, {short(size)}bytes, "
    f"{short(len(split.tokens))}tokens"
  )


def short(number: float) -> str:
  """A count with a space: '1.23 million ', '12,345 '."""
  for size, name in ((1e9, "billion"), (1e6, "million")):
    if number >= size:
      return f"{number / size:.2f} {name} "
  return f"{number:,} "


class _Output:
  """A stream whose writes never raise."""

  def __init__(self, stream: io.TextIOBase):
    self._stream, self._failed, self._gone = stream, False, False

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
    if self._gone:
      return
    try:
      write(*text)
    except (OSError, ValueError) as error:  # ValueError: it is closed
      self._gone = not isinstance(error, OSError) or isinstance(
        error, BrokenPipeError
      )
      if not self._failed:
        logging.warning(
          "standard output cannot be written: %s. The run goes on; its logs "
          "are in the workdir",
          error,
        )
      self._failed = True
      if self._gone:
        with contextlib.suppress(OSError, ValueError):
          # What is in the buffer still would fail when Python exits.
          nowhere = os.open(os.devnull, os.O_WRONLY)
          os.dup2(nowhere, self._stream.fileno())
          os.close(nowhere)
