"""What a run writes down: CSV, TensorBoard events, samples. Always UTF-8."""

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
  """Numbers by step, into one CSV per group and TensorBoard events; samples.

  A resumed run appends to the same files. Rows after the step that it starts
  from belong to a run that was cut off, and are dropped. A log never ends a
  run. A failed write is reported once, and tried again with the next row. An
  unreadable file is renamed.

  Args:
    folder: made if it is not there.
    start: step that the run starts from.
    active: False writes nothing (processes other than the first).
  """

  def __init__(self, folder: pathlib.Path, start: int, active: bool = True):
    self._folder, self._start, self._active = folder, start, active
    self._groups = {}
    self._events = _Events(folder / "tensorboard", start)
    self._silent = False  # it was said that logs cannot be written
    if active:
      with self._surviving():
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / "samples").glob("*.txt"):
          if path.stem.isdecimal() and int(path.stem) > start:
            path.unlink()

  def write(self, group: str, step: int, values: dict[str, float]) -> None:
    """Appends a row to `group`.csv and to the events."""
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
    """Whether `group`.csv has a row of `step`; False where it is unreadable."""
    with self._surviving():
      rows = _read(self._folder / f"{group}.csv")[1]
      return any(int(row["step"]) == step for row in rows)
    return False

  @contextlib.contextmanager
  def _surviving(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      if not self._silent:
        logging.warning(
          "logs cannot be written to %s: %s. The run goes on, and tries again "
          "with every row; this is not said again",
          self._folder,
          error,
        )
      self._silent = True


class _Rows:
  """A CSV file that grows by rows.

  It is opened anew for each row: a file that was deleted is made again, and
  one that took only a part of a row loses that part.
  """

  def __init__(self, path: pathlib.Path, start: int):
    self._path, self._written = path, start
    self._names = None  # None: the file has to be looked at first
    self._pending = []  # rows that it does not have yet

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
    """Makes the file, with its columns and what may stay of its rows."""
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
        "%s is not a regular file: it is now %s, and a new file takes its rows",
        self._path,
        aside.name,
      )
    if unreadable:
      aside = _free_name(self._path)
      os.replace(self._path, aside)
      logging.warning(
        "%d lines of %s cannot be read: the file as it was is now %s, its "
        "other rows stay",
        unreadable,
        self._path,
        aside.name,
      )
    write_whole(self._path, text.getvalue())
    return names


def _read(path: pathlib.Path) -> tuple[list[str], list[dict[str, str]], int]:
  """Columns, rows and number of unreadable lines of a CSV file of numbers.

  A last line without an end was being written when the process was killed:
  it does not count. No field holds a comma or a quotation mark. A device or a
  FIFO is not read: it may have no end.
  """
  if not path.is_file():
    return [], [], 0
  text = path.read_bytes().decode("utf-8", errors="replace")
  lines = [line.removesuffix("\r") for line in text.split("\n")[:-1]]
  names = lines[0].split(",") if lines else []
  if names[:1] != ["step"] or "\ufffd" in lines[0]:
    return [], [], len(lines)
  rows = [line.split(",") for line in lines[1:]]
  whole = [row for row in rows if len(row) == len(names) and _is_row(row)]
  found = [dict(zip(names, row, strict=True)) for row in whole]
  return names, found, len(rows) - len(whole)


def _is_row(values: list[str]) -> bool:
  try:
    for value in filter(None, values[1:]):  # a new column is empty before
      float(value)
    return int(values[0]) >= 0
  except ValueError:
    return False


def _free_name(path: pathlib.Path) -> pathlib.Path:
  names = (path.with_name(f"{path.name}.damaged{i}") for i in itertools.count())
  return next(name for name in names if not name.exists())


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file in UTF-8; killed on the way, it leaves the old one."""
  partial = path.with_name(f"{path.name}.partial")
  partial.write_bytes(text.encode("utf-8", errors="replace"))
  os.replace(partial, path)


class _Events:
  """A file of TensorBoard events, made with the first of them.

  `tensorboardX.SummaryWriter` writes in a thread of its own; where the disk
  is full the thread ends, and the tenth event after that waits for it without
  end. Here events that cannot be written are lost; the CSV files keep rows.
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
      # TensorBoard hides what other files say of this step and later ones.
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
    file, self._file = self._file, None  # where it fails, a new one
    for event in events:
      event.wall_time = time.time()
      file.write(event.SerializeToString())
    file.flush()
    self._file = file
