"""One process's part in a run of several: joining, signals, lost peers."""

import re
import signal
import socket

import jax
import pytest

from mtp_jax.train import processes


@pytest.mark.parametrize(
  "arguments, line",
  [
    (("localhost", 1, 0), "coordinator 'localhost' is not host:port"),
    ((":1234", 1, 0), "coordinator ':1234' is not host:port"),
    (("localhost:0", 1, 0), "'localhost:0' is not host:port"),
    (("localhost:65536", 1, 0), "'localhost:65536' is not host:port"),
    (("localhost:1", 0, 0), "the number of processes is 0; at least 1"),
    (("localhost:1", 2, 2), "process 2 is none of 2 processes, counted from 0"),
    (("localhost:1", 2, -1), "process -1 is none of 2 processes"),
    ((None, None, -1), "process -1 is none of processes"),
  ],
)
def test_what_does_not_fit_is_refused_before_joining(arguments, line):
  with pytest.raises(ValueError, match=re.escape(line)):
    processes.join(*arguments)


def test_a_taken_port_is_refused():
  """JAX would crash: it starts its service there and goes on without it."""
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(ValueError, match=f"cannot listen at port {port} of"):
      processes.join(f"localhost:{port}", 1, 0)
  with pytest.raises(ValueError, match="heartbeat is 0"):
    processes.join("localhost:1", 1, 1, heartbeat=0)


def test_alone_nothing_changes():
  asked = processes.threading.Event()
  assert processes.gather("text") == ["text"]
  assert not processes.told_to_stop(asked)
  with pytest.raises(ValueError, match="^Gloo failed$"), processes.watched():
    raise ValueError("Gloo failed")


def test_a_lost_peer_is_one_clear_line(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  called = []
  with (
    pytest.raises(processes.PeerLost) as error,
    processes.watched(lambda: called.append(1)),
  ):
    try:
      raise ValueError("UNKNOWN: Gloo AllGather\nfailed")
    except ValueError as cause:
      raise RuntimeError("checkpoint 3 was not saved") from cause
  assert called == [1]
  for text in (
    "process 0 of 2 stops: another process is gone",
    "resumes from its newest checkpoint",
    "(JAX said: checkpoint 3 was not saved UNKNOWN: Gloo AllGather failed)",
  ):
    assert text in str(error.value)
  for text in ("no space", "UNAVAILABLE: /barrier: try again"):
    with pytest.raises(OSError, match=text), processes.watched():
      raise OSError(text)
  with pytest.raises(ValueError, match="503"), processes.watched():
    raise ValueError("503 Service Unavailable")


def test_ctrl_c_among_several_is_a_sigterm(monkeypatch):
  """Which JAX tells to all; a second Ctrl-C interrupts."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  # JAX's service, which needs other processes, has been started.
  jax_has = processes.distributed.global_state
  monkeypatch.setattr(jax_has, "preemption_sync_manager", object())
  heard = []
  old = {
    number: signal.signal(number, handler)
    for number, handler in (
      (signal.SIGTERM, lambda *_: heard.append("SIGTERM")),
      # In the background of a script it would be ignored from the start.
      (signal.SIGINT, signal.default_int_handler),
    )
  }
  try:
    with processes.stop_signals() as asked:
      asked.watch()
      signal.raise_signal(signal.SIGINT)
      assert heard == ["SIGTERM"]
      with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def test_signals_are_taken_over_once_there_is_something_to_save():
  heard = []
  old = {
    number: signal.signal(number, lambda number, _: heard.append(number))
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    for number in old:
      heard.clear()
      with processes.stop_signals() as asked:
        signal.raise_signal(number)
        assert heard == [number] and not asked.is_set()
        asked.watch()
        asked.watch()
        signal.raise_signal(number)
        assert heard == [number] and asked.is_set()
        signal.raise_signal(number)  # a second time: as without the event
        assert heard == [number, number]
      signal.raise_signal(number)
      assert heard == [number] * 3
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
