"""One run at a time in a workdir, which all of its processes share."""

import errno
import json
import os
import resource
import subprocess
import sys

import jax
import pytest

from mtp_jax.checkpoint import checkpoints
from mtp_jax.train import lock, processes

HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("host h, process id", os.getpid(), file=file, flush=True)
print("locked", flush=True)
time.sleep(100)
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "_RELEASE", 0.1)
  target = tmp_path / "runs" / "w"
  with lock.exclusive(target):
    with pytest.raises(checkpoints.CheckpointError) as error:
      with lock.exclusive(target):
        pass
    text = (target / "lock").read_text()
    assert f"in use by another run ({text})" in str(error.value)
    for word in ("host ", f"process id {lock.os.getpid()}, ", "since 20"):
      assert word in text
  with lock.exclusive(target):
    assert (target / "lock").read_text() != text
  assert (target / "lock").read_text() == ""


def test_a_link_in_place_of_the_lock_empties_nothing(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  (tmp_path / "w").mkdir()
  (tmp_path / "w" / "lock").symlink_to(victim)
  with pytest.raises(checkpoints.CheckpointError, match="is a link.*remove it"):
    with lock.exclusive(tmp_path / "w"):
      pass
  assert victim.read_text() == "precious"


def test_a_killed_run_leaves_no_lock(tmp_path):
  command = [sys.executable, "-c", HOLDER, tmp_path / "lock"]
  holder = subprocess.Popen(command, stdout=subprocess.PIPE)
  try:
    assert holder.stdout.readline() == b"locked\n"
  finally:
    holder.kill()
  with lock.exclusive(tmp_path):  # `kill` does not wait for the end
    text = (tmp_path / "lock").read_text()
  assert f"process id {holder.pid}" not in text
  holder.communicate()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
  def flock(file, how):
    raise OSError(errno.ENOSYS, "Function not implemented")

  said = []
  monkeypatch.setattr(lock.fcntl, "flock", flock)
  monkeypatch.setattr(lock.logging, "warning", lambda *text: said.append(text))
  with lock.exclusive(tmp_path):
    assert "process id" in (tmp_path / "lock").read_text()
  assert len(said) == 1 and "without locks" in said[0][0]


@pytest.mark.parametrize("kind", ["file", "below a file", "lock is a folder"])
def test_a_workdir_that_cannot_be_written(tmp_path, kind):
  target = tmp_path / "w"
  if kind == "lock is a folder":
    (target / "lock").mkdir(parents=True)
  else:
    target.write_text("in the way")
  target = target / "w" if kind == "below a file" else target
  line = f"cannot write to workdir {target}: "
  with pytest.raises(checkpoints.CheckpointError, match=line):
    with lock.exclusive(target):
      pass


def test_a_full_disk_is_told_with_path_and_remedy(tmp_path, monkeypatch):
  """No byte can be written, and `close` tries again what `write` could not."""
  line = f"cannot write to workdir {tmp_path}: .*; take another workdir"
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))  # EFBIG
  try:
    with pytest.raises(checkpoints.CheckpointError, match=line):
      with lock.exclusive(tmp_path):
        pass
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)

  def fsync(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(lock.os, "fsync", fsync)
  line = f"{tmp_path}: .*No space left .*; free space there, or take another"
  with pytest.raises(checkpoints.CheckpointError, match=line):
    with lock.exclusive(tmp_path):
      pass


def test_processes_have_to_share_the_workdir(tmp_path, monkeypatch):
  """Process 1, as it sees its own folder and what process 0 told."""
  monkeypatch.setattr(lock, "_VISIBLE", 0.1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  said = []

  def gather(text):
    said.append(text)
    first = json.dumps({"error": "", "holder": "host a"})
    return [first if len(said) == 1 else "yes", text]

  monkeypatch.setattr(processes, "gather", gather)
  with pytest.raises(checkpoints.CheckpointError) as error:
    with lock.exclusive(tmp_path):
      pass
  assert said[-1] == "no"
  for text in ("do not share workdir", "processes [1] do not see"):
    assert text in str(error.value)
  (tmp_path / "lock").write_text("host a")
  said.clear()
  with lock.exclusive(tmp_path):
    assert said[-1] == "yes"


def test_process_0_tells_the_others_why_it_stops(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  first = json.dumps({"error": "in use by another run", "holder": ""})
  monkeypatch.setattr(processes, "gather", lambda text: [first, text])
  with pytest.raises(checkpoints.CheckpointError, match="in use by another"):
    with lock.exclusive(tmp_path):
      pass
