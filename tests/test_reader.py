"""Reading checkpoints: failed reads are no damage, and races are met."""

import errno
import os
import shutil

import pytest

from mtp_jax.checkpoint import checkpoints, reader
from tests import states

pytestmark = states.pytestmark
folder, two_steps = states.folder, states.two_steps
warnings = states.warnings


def chained(error, cause):
  error.__cause__ = cause
  return error


FAILED_READS = (
  OSError(errno.EIO, "Input/output error"),
  OSError(errno.ESTALE, "Stale file handle"),
  PermissionError(errno.EACCES, "Permission denied"),
  TimeoutError(),
  MemoryError(),
  ValueError("UNKNOWN: Error reading local file [os_error_code='5']"),
  ValueError("UNAVAILABLE: 503"),
  RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
  chained(Exception("reading"), ValueError("ABORTED: [os_error_code='116']")),
)


def test_a_failed_read_is_no_damage(folder, monkeypatch):
  """Not of the record, not of the arrays: the run stops, the step stays."""
  with checkpoints.Checkpoints(folder) as saved:
    restore = saved._reader._restore
    for error in FAILED_READS:
      for item in ("state", "metadata"):

        def fail(step, error=error, item=item, **items):
          if step == 2 and item in items:
            raise error
          return restore(step, **items)

        monkeypatch.setattr(saved._reader, "_restore", fail)
        with pytest.raises(checkpoints.CheckpointError) as found:
          saved.restore(states.make_state(0))
        cause = str(error.__cause__ or error)
        for text in ("checkpoint 2 in ", "could not be read", cause):
          assert text in str(found.value)
    monkeypatch.undo()
    saved.save(3, states.make_state(3), states.META)
    assert saved.steps() == [1, 2, 3]


def test_a_folder_that_cannot_be_looked_into(folder, monkeypatch):
  """It does not count as empty: the run would begin again."""
  find, listing = os.stat, os.listdir

  def fail(path, *args, **kwargs):
    if os.fspath(path) in (str(folder), str(folder / "2")):
      raise PermissionError(errno.EACCES, "Permission denied", path)
    return {"stat": find, "listdir": listing}[name](path, *args, **kwargs)

  for name in ("stat", "listdir"):
    with checkpoints.Checkpoints(folder) as saved:
      with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        for ask in (lambda: saved.restore(states.make_state(0)), saved.steps):
          with pytest.raises(checkpoints.CheckpointError, match="denied"):
            ask()


def test_what_is_not_proven_damaged_is_never_removed(folder, monkeypatch):
  """Steps that fail for an unknown reason stay under another name."""
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(3, states.make_state(3), states.META)
  (folder / "unreadable-3").mkdir()
  (folder / "damaged-9").mkdir()
  with checkpoints.Checkpoints(folder) as saved:
    restore = saved._reader._restore
    errors = {
      2: OSError(errno.EINVAL, "Invalid argument"),
      3: RuntimeError("of an unknown kind"),
    }

    def fail(step, **items):
      if step in errors:
        raise errors[step]
      return restore(step, **items)

    monkeypatch.setattr(saved._reader, "_restore", fail)
    assert saved.restore(states.make_state(0))[2] == 1
    monkeypatch.undo()
    saved.save(4, states.make_state(4), states.META)
  assert sorted(os.listdir(folder)) == [
    "1",
    "4",
    "damaged-9",
    "unreadable-2",
    "unreadable-3",
    "unreadable-3-",
  ]
  shutil.rmtree(folder / "4")
  (folder / "unreadable-3-").rename(folder / "3")
  assert states.restored(folder) == 3


def test_reading_beside_a_run_that_keeps_one(folder, warnings, monkeypatch):
  """Each step is replaced while it is read, a few times or without end."""
  with checkpoints.Checkpoints(folder) as saved:
    left = 3

    def record(step):
      nonlocal left
      left -= 1
      if left < 0:
        return {"metadata": step}
      (folder / str(step)).rename(folder / str(step + 1))
      raise reader.Damaged("its files are gone")

    monkeypatch.setattr(saved._reader, "record", record)
    assert saved.metadata() == 2 + 3
    left = 1000
    with pytest.raises(checkpoints.CheckpointError, match="times a checkpoint"):
      saved.metadata()
  assert not warnings  # it was no damage


def test_a_step_removed_while_it_is_read(folder, monkeypatch):
  """Of a run that goes on beside: the step that was asked for is no damage."""
  with checkpoints.Checkpoints(folder) as saved:

    def record(step):
      shutil.rmtree(folder / str(step))
      raise reader.Damaged("its files are gone")

    monkeypatch.setattr(saved._reader, "record", record)
    line = r"no checkpoint 1 in .*; it holds \[2\]"
    with pytest.raises(checkpoints.CheckpointError, match=line):
      saved.metadata(1)


def test_a_step_removed_while_the_folder_is_listed(folder, monkeypatch):
  """orbax lists names first, and looks at each step afterwards."""
  fail = True
  reload = reader.ocp.CheckpointManager._load_checkpoint_infos

  def race(manager, *args, **kwargs):
    nonlocal fail
    fail = not fail
    if not fail:
      raise FileNotFoundError(errno.ENOENT, "No such file or directory")
    return reload(manager, *args, **kwargs)

  monkeypatch.setattr(
    reader.ocp.CheckpointManager, "_load_checkpoint_infos", race
  )
  assert states.restored(folder) == 2


def test_names_that_are_no_steps(folder):
  (folder / "7").write_text("a file")
  for name in ("notes", "²", "٣", "007"):
    (folder / name).mkdir()
  assert states.restored(folder) == 2
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(3, states.make_state(3), states.META)
    assert saved.steps() == [1, 2, 3]


def test_nothing_to_read_is_said_as_it_is(tmp_path):
  for folder, why in ((tmp_path, "it is empty"), (tmp_path / "a", "no such")):
    with checkpoints.Checkpoints(folder) as saved:
      with pytest.raises(checkpoints.CheckpointError, match=why):
        saved.metadata()
