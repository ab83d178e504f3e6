"""Ensures that one run at a time writes to a workdir."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Iterator
from typing import BinaryIO

import jax
from absl import logging

from mtp_jax.checkpoint import checkpoints, storage
from mtp_jax.train import processes

_RELEASE = 3  # seconds to wait for a killed process to release its lock
_VISIBLE = 10  # seconds to wait for a network file system to show a file


@contextlib.contextmanager
def exclusive(workdir: pathlib.Path) -> Iterator[None]:
  """Locks `workdir`, which is made if missing, against other runs.

  Process 0 locks WORKDIR/lock and writes its host and process id into it. The
  operating system releases the lock when the process ends, however it ends.
  The other processes read what process 0 wrote, which proves that they share
  the folder.

  Raises:
    checkpoints.CheckpointError: another run holds the lock, the folder cannot
      be written, or the processes do not share it.
  """
  with contextlib.ExitStack() as stack:
    first = {"error": "", "holder": ""}
    if jax.process_index() == 0:
      try:
        if workdir.exists() and not workdir.is_dir():
          raise NotADirectoryError("it is a file, not a folder")
        workdir.mkdir(parents=True, exist_ok=True)
        # Unbuffered: on a full disk, `close` would try to write the buffer
        # again, and its error would hide the first one.
        path = workdir / "lock"
        file = stack.enter_context(
          open(path, "ab+", buffering=0, opener=_without_links)
        )
        first["holder"] = _take(file, workdir)
        stack.callback(file.truncate, 0)
      except checkpoints.CheckpointError as error:
        first["error"] = str(error)
      except (OSError, ValueError) as error:
        first["error"] = storage.not_writable(workdir, error)
    with processes.watched():
      first = json.loads(processes.gather(json.dumps(first))[0])
      if first["error"]:
        raise checkpoints.CheckpointError(first["error"])
      _check_shared(workdir, first["holder"])
    yield


def _without_links(path: str, flags: int) -> int:
  """Opens a file; a link could lead to one that must not be emptied."""
  if os.path.islink(path):
    raise OSError(f"{path} is a link, which no run makes: remove it")
  return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _take(file: BinaryIO, workdir: pathlib.Path) -> str:
  """Locks the file, writes who holds it, and returns that text."""
  deadline = time.monotonic() + _RELEASE
  locked = False
  while not locked:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      locked = True
    except BlockingIOError as error:
      if time.monotonic() > deadline:
        file.seek(0)
        holder = (
          file.read().decode(errors="replace").strip() or "an unknown process"
        )
        raise checkpoints.CheckpointError(
          f"folder {workdir} is in use by another run ({holder}). Stop that "
          "run, or take another folder"
        ) from error
      time.sleep(0.05)
    except OSError as error:
      logging.warning(
        "%s is on a file system without locks (%s): nothing prevents a second "
        "run from writing there",
        workdir,
        error,
      )
      break
  now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  holder = (
    f"host {socket.gethostname()}, process id {os.getpid()}, since {now}, "
    f"start {uuid.uuid4().hex}"
  )
  file.truncate(0)
  file.write(holder.encode())
  os.fsync(file.fileno())  # makes it visible to other hosts
  return holder


def _check_shared(workdir: pathlib.Path, holder: str) -> None:
  """Raises on all processes if one cannot read what process 0 wrote."""
  if jax.process_count() == 1:
    return

  def visible():
    try:
      return (workdir / "lock").read_text(encoding="utf-8") == holder
    except OSError:
      return False

  deadline = time.monotonic() + _VISIBLE
  while not visible() and time.monotonic() < deadline:
    time.sleep(0.05)
  answers = processes.gather("yes" if visible() else "no")
  if missing := [i for i, answer in enumerate(answers) if answer == "no"]:
    raise checkpoints.CheckpointError(
      f"the processes do not share workdir {workdir}: what process 0 writes "
      f"there, processes {missing} do not see. Give all of them the same "
      "folder, on a file system that all of their hosts mount"
    )
