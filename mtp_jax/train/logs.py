"""The logs of a run: CSV, TensorBoard events and samples, in UTF-8."""

import contextlib
import csv
import io
import itertools
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from absl import logging
from tensorboardX import record_writer, summary
from tensorboardX.proto import event_pb2, summary_pb2


class Writer:
  """Writes numbers by step to CSV files and TensorBoard events, and samples.

  Each group of numbers has one CSV file. A run that resumes appends to it, and
  removes the rows of later steps, which were written before it was killed. A
  failed write does not stop the run. It is reported once and repeated with the
  next row. A file that cannot be parsed is renamed.

  Args:
    folder: made if it is missing.
    start: step from which the run starts.
    active: False writes nothing, for all processes but the first.
  """

  def __init__(self, folder: pathlib.Path, start: int, active: bool = True):
    self._folder, self._start, self._active = folder, start, active
    self._groups = {}
    self._events = _Events(folder / "tensorboard", start)
    self._reported = False  # a failed write was reported
    if active:
      with self._surviving():
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / "samples").glob("*.txt"):
          if path.stem.isdecimal() and int(path.stem) > start:
            path.unlink()

  def write(self, group: str, step: int, values: dict[str, float]) -> None:
    """Appends a row to `group`.csv and to the TensorBoard events."""
    if not self._active:
      return
    if group not in self._groups:
      self._groups[group] = _Rows(self._folder / f"{group}.csv", self._start)
    with self._surviving():
      self._groups[group].write(
        {"step": f"{step}"} | {k: f"{v:.9g}" for k, v in values.items()}
      )
    with self._surviving():
      self._events.write(
        step, [summary.scalar(f"{group}/{k}", v) for k, v in values.items()]
      )

  def write_sample(self, step: int, text: str) -> None:
    """Writes samples/<step>.txt, and adds the text to the events."""
    if not self._active:
      return
    with self._surviving():
      path = self._folder / "samples" / f"{step:06d}.txt"
      path.parent.mkdir(parents=True, exist_ok=True)
      write_whole(path, f"{text}\n")
    with self._surviving():
      self._events.write(step, [summary.text("sample", f"```\n{text}\n```")])

  def has(self, group: str, step: int) -> bool:
    """Whether `group`.csv has a row of `step`; False if it is unreadable."""
    with self._surviving():
      rows = _read(self._folder / f"{group}.csv")[1]
      return any(int(row["step"]) == step for row in rows)
    return False

  @contextlib.contextmanager
  def _surviving(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      if not self._reported:
        logging.warning(
          "logs cannot be written to %s: %s. The run goes on, and tries again "
          "with every row; this is not said again",
          self._folder,
          error,
        )
      self._reported = True


class _Rows:
  """Appends rows to a CSV file.

  The file is opened for each row. So a deleted file is made again, and a row
  that was written in part is removed.
  """

  def __init__(self, path: pathlib.Path, start: int):
    self._path, self._written = path, start
    self._names = None  # columns; None if the file must be read again
    self._pending = []  # rows that are not in the file yet

  def write(self, row: dict[str, str]) -> None:
    self._pending.append(row)
    if self._names is None or not self._path.is_file():
      self._names = self._begin(list(row))
    names, self._names = self._names, None
    with self._path.open("a", encoding="utf-8", newline="") as file:
      csv.DictWriter(file, names).writerows(self._pending)
    self._names = names
    self._written = int(row["step"])
    self._pending.clear()

  def _begin(self, names: list[str]) -> list[str]:
    """Writes the file with all columns and the rows that are kept.

    Returns:
      The columns: `names`, then others that the file had.
    """
    self._path.parent.mkdir(parents=True, exist_ok=True)
    old, rows, unreadable = _read(self._path)
    kept = [row for row in rows if int(row["step"]) <= self._written]
    names += [name for name in old if name not in names]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(kept)
    if self._path.exists() and not self._path.is_file():
      aside = _free_name(self._path)
      os.replace(self._path, aside)
      logging.warning(
        "%s is not a regular file: it is renamed to %s, and a new file is made",
        self._path,
        aside.name,
      )
    if unreadable:
      aside = _free_name(self._path)
      os.replace(self._path, aside)
      logging.warning(
        "%d lines of %s cannot be read: a copy is kept as %s, and the other "
        "rows stay",
        unreadable,
        self._path,
        aside.name,
      )
    write_whole(self._path, text.getvalue())
    return names


def _read(path: pathlib.Path) -> tuple[list[str], list[dict[str, str]], int]:
  """Columns, rows and number of unreadable lines of a CSV file of numbers.

  A last line without a newline is ignored: the process was killed while it
  wrote the line. No field holds a comma or a quotation mark. A device or a FIFO
  is not read, because it may never end.
  """
  if not path.is_file():
    return [], [], 0
  text = path.read_bytes().decode("utf-8", errors="replace")
  lines = [line.removesuffix("\r") for line in text.split("\n")[:-1]]
  names = lines[0].split(",") if lines else []
  if names[:1] != ["step"] or "\ufffd" in lines[0]:
    return [], [], len(lines)
  rows = [line.split(",") for line in lines[1:]]
  valid = [row for row in rows if len(row) == len(names) and _is_row(row)]
  by_name = [dict(zip(names, row, strict=True)) for row in valid]
  return names, by_name, len(rows) - len(valid)


def _is_row(values: list[str]) -> bool:
  try:
    for value in filter(None, values[1:]):  # a later column is empty here
      float(value)
    return int(values[0]) >= 0
  except ValueError:
    return False


def _free_name(path: pathlib.Path) -> pathlib.Path:
  names = (path.with_name(f"{path.name}.damaged{i}") for i in itertools.count())
  return next(name for name in names if not name.exists())


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file in UTF-8; the old one stays if the process is killed."""
  partial = path.with_name(f"{path.name}.partial")
  partial.write_bytes(text.encode("utf-8", errors="replace"))
  os.replace(partial, path)


class _Events:
  """A file of TensorBoard events, made when the first event is written.

  `tensorboardX.SummaryWriter` writes in a thread. If the disk is full, the
  thread ends, and after ten more events the run hangs. This class loses events
  that cannot be written; the CSV files keep the numbers.
  """

  def __init__(self, folder: pathlib.Path, start: int):
    self._folder, self._written = folder, start
    self._file = None

  def write(self, step: int, values: list[summary_pb2.Summary]) -> None:
    if self._file is None or not pathlib.Path(self._file.path).exists():
      self._folder.mkdir(parents=True, exist_ok=True)
      name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
      self._file = record_writer.RecordWriter(str(self._folder / name))
      begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      # Makes TensorBoard hide this step and later ones in other files.
      purge = event_pb2.Event(step=self._written + 1, session_log=begin)
      try:
        self._append(event_pb2.Event(file_version="brain.Event:2"), purge)
      except OSError:
        (self._folder / name).unlink(missing_ok=True)
        raise
    summaries = summary_pb2.Summary(value=[v for s in values for v in s.value])
    self._append(event_pb2.Event(step=step, summary=summaries))
    self._written = step

  def _append(self, *events: event_pb2.Event) -> None:
    file, self._file = self._file, None  # after an error, a new file is made
    for event in events:
      event.wall_time = time.time()
      file.write(event.SerializeToString())
    file.flush()
    self._file = file
