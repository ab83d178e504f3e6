"""Any path can be saved to and read; a failed save is told of once."""

import logging
import sys
import types

import jax.numpy as jnp
import pytest

from mtp_jax.checkpoint import checkpoints, storage
from tests import states

pytestmark = states.pytestmark


def test_only_the_caller_tells_of_a_failed_save(monkeypatch):
  """tensorstore's late writes and asyncio's lost tasks say nothing; other
  libraries are heard as ever."""
  heard = []

  def hook(failure):
    heard.append(str(failure.exc_value))

  def fail(text):
    failure = dict(exc_value=RuntimeError(text), exc_traceback=None)
    sys.unraisablehook(types.SimpleNamespace(**failure))

  monkeypatch.setattr(sys, "unraisablehook", hook)
  tasks = logging.getLogger("asyncio")
  handler = logging.Handler()
  handler.emit = lambda line: heard.append(line.getMessage())
  tasks.addHandler(handler)
  try:
    with storage.quiet():
      for text in ("Event loop is closed", "ours"):
        fail(text)
      for text in ("Task <site-packages/orbax/checkpoint/x.py>", "Task <y.py>"):
        tasks.error(text)
    assert heard == ["ours", "Task <y.py>"]
    fail("Event loop is closed")
    assert heard.pop() == "Event loop is closed"
  finally:
    tasks.removeHandler(handler)


def test_a_thread_that_failed_waits_for_no_one(monkeypatch):
  """orbax's barrier in a `finally`, as its threads come to it."""
  waited = []
  monkeypatch.setattr(
    storage.multihost,
    "get_barrier_sync_fn",
    lambda: lambda key, timeout_ms: waited.append((key, timeout_ms)),
  )
  storage.barrier(key="a", timeout_ms=3)
  assert waited == [("a", 3)]
  with pytest.raises(OSError, match="no space"):
    try:
      raise OSError("no space")
    finally:
      storage.barrier(key="b", timeout_ms=3)
  assert waited == [("a", 3)]


NAMES = (
  "lr[3e-4]", "a[b]", "run[0-9]", "[!x]", "[[]", "a[b", "a*b", "a?b", "{a}",
  " end ", "a%20b", "a#b", "a\nb", "a'b\"c", "$HOME", "a:b", "s3:/w",
  "x/../y", "ü日",
)  # fmt: skip


def test_any_path_can_be_read_back(tmp_path):
  state = {"w": jnp.arange(5.0)}
  for name in NAMES:
    with checkpoints.Checkpoints(tmp_path / name / "c") as saved:
      saved.save(1, state, {}, wait=True)
    with checkpoints.Checkpoints(tmp_path / name / "c") as saved:
      assert states.raw(saved.restore(state)[0]) == states.raw(state)


def test_paths_that_orbax_cannot_write_to(tmp_path):
  for name, why in (
    ("a\\b", "a backslash"),
    ("a\udcff", "not valid UTF-8"),
    ("a\0b", "path '.*' has a null character"),
    ("gs:/w", "whose name ends in 'gs:'"),
    ("w/logs:", "whose name ends in 'gs:'"),
  ):
    with pytest.raises(ValueError, match=why):
      checkpoints.Checkpoints(tmp_path / name)


def test_a_path_through_a_link_is_the_systems(tmp_path):
  """link/.. is beside what the link leads to, not beside the link."""
  (tmp_path / "far" / "home").mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "far" / "home")
  with checkpoints.Checkpoints(tmp_path / "link" / ".." / "c") as saved:
    saved.save(1, {"w": jnp.arange(5.0)}, {})
  assert (tmp_path / "far" / "c" / "1").is_dir()


def test_what_cannot_be_read_back_stops_the_first_save(tmp_path, monkeypatch):
  """As orbax alone saves below a folder with brackets."""
  monkeypatch.delattr(storage._Path, "glob")
  state = {"w": jnp.arange(5.0)}
  line = "checkpoint 1 was saved in .*, but cannot be read back: .*NOT_FOUND"
  with checkpoints.Checkpoints(tmp_path / "[a]") as saved:
    with pytest.raises(checkpoints.CheckpointError, match=line):
      saved.save(1, state, {})
