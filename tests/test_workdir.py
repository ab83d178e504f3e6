"""Workdirs: one run at a time, shared by all processes of the run."""

import errno
import json
import subprocess
import sys

import jax
import pytest

from mtp_jax import checkpoint, config, processes, tokenizer, workdir

HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("host h, process id", os.getpid(), file=file, flush=True)
print("locked", flush=True)
time.sleep(100)
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "_RELEASE", 0.1)
  target = tmp_path / "runs" / "w"
  with workdir.lock(target):
    with pytest.raises(checkpoint.CheckpointError) as error:
      with workdir.lock(target):
        pass
    text = (target / "lock").read_text()
    assert f"in use by another run ({text})" in str(error.value)
    for word in ("host ", f"process id {workdir.os.getpid()}, ", "since 20"):
      assert word in text
  with workdir.lock(target):
    assert (target / "lock").read_text() != text
  assert (target / "lock").read_text() == ""


def test_a_killed_run_leaves_no_lock(tmp_path):
  command = [sys.executable, "-c", HOLDER, tmp_path / "lock"]
  holder = subprocess.Popen(command, stdout=subprocess.PIPE)
  try:
    assert holder.stdout.readline() == b"locked\n"
  finally:
    holder.kill()
  with workdir.lock(tmp_path):  # `kill` does not wait for the end
    text = (tmp_path / "lock").read_text()
  assert f"process id {holder.pid}" not in text
  holder.communicate()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
  def flock(file, how):
    raise OSError(errno.ENOSYS, "Function not implemented")

  said = []
  monkeypatch.setattr(workdir.fcntl, "flock", flock)
  monkeypatch.setattr(
    workdir.logging, "warning", lambda *text: said.append(text)
  )
  with workdir.lock(tmp_path):
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
  with pytest.raises(checkpoint.CheckpointError, match=line):
    with workdir.lock(target):
      pass


def test_processes_have_to_share_the_workdir(tmp_path, monkeypatch):
  """Process 1, as it sees its own folder and what process 0 told."""
  monkeypatch.setattr(workdir, "_VISIBLE", 0.1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  said = []

  def gather(text):
    said.append(text)
    first = json.dumps({"error": "", "holder": "host a"})
    return [first if len(said) == 1 else "yes", text]

  monkeypatch.setattr(processes, "gather", gather)
  with pytest.raises(checkpoint.CheckpointError) as error:
    with workdir.lock(tmp_path):
      pass
  assert said[-1] == "no"
  for text in ("do not share workdir", "processes [1] do not see"):
    assert text in str(error.value)
  (tmp_path / "lock").write_text("host a")
  said.clear()
  with workdir.lock(tmp_path):
    assert said[-1] == "yes"


def test_process_0_tells_the_others_why_it_stops(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  first = json.dumps({"error": "in use by another run", "holder": ""})
  monkeypatch.setattr(processes, "gather", lambda text: [first, text])
  with pytest.raises(checkpoint.CheckpointError, match="in use by another"):
    with workdir.lock(tmp_path):
      pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Two files of SentencePiece models."""
  folder = tmp_path_factory.mktemp("models")
  for name, vocab in (("a.model", 290), ("b.model", 285)):
    text = [f"def f(x):\n  return {name}\n" * 9]
    tokenizer.train_sentencepiece(text, folder / name, vocab)
  return folder


def settings(name, vocab=300):
  return config.Config(
    model=config.Model(vocab=vocab), data=config.Data(tokenizer=str(name))
  )


def test_a_refused_start_leaves_no_tokenizer(models, tmp_path):
  """So that the next one trains with the tokenizer that it names."""
  target = tmp_path / "w"
  with pytest.raises(ValueError, match="model.vocab 280 .* 290 ids"):
    workdir.tokenizer(settings(models / "a.model", 280), target)
  assert not target.exists()
  codec = workdir.tokenizer(settings(models / "b.model"), target)
  assert (
    codec.fingerprint == tokenizer.load(str(models / "b.model")).fingerprint
  )


def test_a_run_keeps_its_tokenizer(models, tmp_path):
  original = tmp_path / "a.model"
  original.write_bytes((models / "a.model").read_bytes())
  target = tmp_path / "w"
  target.mkdir()
  workdir.write_settings(settings(original), target)
  assert sorted(p.name for p in target.iterdir()) == [
    "config.json",
    "tokenizer.model",
  ]
  fingerprint = tokenizer.load(str(original)).fingerprint
  other = tokenizer.load(str(models / "b.model")).fingerprint
  line = f"b.model' has fingerprint {other}, the run in .* has {fingerprint}"
  with pytest.raises(ValueError, match=f"{line}: take another workdir"):
    workdir.tokenizer(settings(models / "b.model"), target)
  original.unlink()
  for name in (original, target / "tokenizer.model", models / "a.model"):
    codec = workdir.tokenizer(settings(name), target)
    assert codec.fingerprint == fingerprint
  with pytest.raises(ValueError) as error:
    workdir.tokenizer(settings(tmp_path / "typo.model"), target)
  for text in ("no tokenizer '", "typo.model'", f"began with '{original}'"):
    assert text in str(error.value)


def test_a_workdir_without_a_run_names_what_may_be_meant(tmp_path):
  (tmp_path / "runs/mine/checkpoints/375").mkdir(parents=True)
  (tmp_path / "empty").mkdir()
  (tmp_path / "file").write_text("")
  mine = tmp_path / "runs" / "mine"
  meant = f"Did you mean {mine}?"
  for path, texts in {
    "runs/mine/checkpoints": ("has no folder", meant),
    "runs/mine/checkpoints/375": ("has no folder", meant),
    "runs/mine/checkpoints/400": ("does not exist", meant),
    "runs": ("has no folder", meant),
    "runs/mime": ("does not exist", meant),
    "file": ("is a file",),
    "nowhere/at all": ("does not exist",),
    "empty": ("has no folder `checkpoints`",),
  }.items():
    with pytest.raises(checkpoint.CheckpointError) as error:
      workdir.load(tmp_path / path)
    assert str(tmp_path / path) in str(error.value)
    for text in texts:
      assert text in str(error.value)
    assert ("Did you mean" in str(error.value)) == (meant in texts)
