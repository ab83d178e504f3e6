"""Several processes, on one host or on many, as one run.

All run the same program, each with its own devices and its own rows of a batch;
JAX connects them. If one dies, the others stop after the heartbeat timeout,
because none can continue alone. When all are started again, the run resumes.
"""

import contextlib
import itertools
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from jax._src import distributed  # barrier, SIGTERM: no public API
from jax.experimental import multihost_utils

HEARTBEAT = 20  # seconds without a sign of life until a process counts as dead
_PATIENCE = 24 * 3600 * 1000  # ms; one host may take hours to pack the corpus
# In messages of JAX's runtime about a lost process.
_SIGNS = re.compile("Gloo|NCCL|UNAVAILABLE:|DEADLINE_EXCEEDED:|[Bb]arrier")


class PeerLost(Exception):
  """Another process of the run is lost, so this one cannot continue."""


def join(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  *,
  heartbeat: int = HEARTBEAT,
) -> None:
  """Connects this process with the others. Call it before any use of JAX.

  On a TPU slice and under SLURM, Open MPI or Kubernetes, JAX finds the
  arguments that are None. Elsewhere all three must be given.

  Args:
    coordinator: host:port of process 0, reachable by all.
    processes: number of processes.
    process: index of this process.
    heartbeat: seconds without a sign of life until a process counts as dead
      and all others stop.

  Raises:
    ValueError: an argument is missing and JAX does not find it, the numbers do
      not fit each other, or the port of process 0 is in use.
  """
  _check_join(coordinator, processes, process, heartbeat)
  # `StopEvent.watch` does it later: JAX would from now on only note a SIGTERM.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator, processes, process, heartbeat_timeout_seconds=heartbeat
    )
  except ValueError as error:
    raise ValueError(
      f"cannot join the other processes: {error} JAX finds no cluster here: "
      "give the coordinator (host:port of process 0), the number of processes, "
      "and the index of this one"
    ) from error
  if jax.default_backend() == "cpu":
    # A program from the compilation cache runs its collectives in varying
    # order (jaxlib 0.10.2), but processes match messages by their order.
    jax.config.update("jax_enable_compilation_cache", False)


def _check_join(coordinator, processes, process, heartbeat) -> None:
  if heartbeat < 1:
    raise ValueError(f"heartbeat is {heartbeat}; it must be at least 1 second")
  if processes is not None and processes < 1:
    raise ValueError(f"the number of processes is {processes}; at least 1")
  if process is not None and not 0 <= process < (processes or process + 1):
    count = f"{processes} processes" if processes else "processes"
    raise ValueError(f"process {process} is none of {count}, counted from 0")
  if not coordinator:
    return
  host, _, port = coordinator.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 2**16):
    raise ValueError(
      f"coordinator {coordinator!r} is not host:port, such as localhost:1234"
    )
  if process == 0:
    try:  # JAX 0.10 crashes if the port is in use
      socket.create_server(("", int(port))).close()
    except OSError as error:
      raise ValueError(
        f"process 0 cannot listen at port {port} of coordinator {coordinator}: "
        f"{error.strerror}. Name a free port to all processes"
      ) from error


def gather(text: str) -> list[str]:
  """The texts of all processes, in their order; waits for the slowest.

  It waits up to a day. Collectives on a CPU wait only 30 seconds for the first
  contact, so a run calls this before anything else that needs all processes.

  Raises:
    ValueError: there are several processes, but `join` was not called.
  """
  if jax.process_count() == 1:
    return [text]
  if not jax.distributed.is_initialized():
    raise ValueError(
      f"JAX sees {jax.process_count()} processes that were not joined: start "
      "each with --distributed, or call processes.join first"
    )
  distributed.global_state.client.wait_at_barrier("mtp_jax", _PATIENCE)
  raw = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(raw.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: raw.size] = raw
  rows = multihost_utils.process_allgather(padded)
  return [r[:n].tobytes().decode() for r, n in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def watched(when_lost: Callable[[], None] = lambda: None) -> Iterator[None]:
  """Converts JAX's errors about a lost process, raised inside, to PeerLost.

  Args:
    when_lost: called before raising, to release what would wait for the lost
      process.

  Raises:
    PeerLost: another process is gone; the message names the remedy.
  """
  try:
    yield
  except Exception as error:
    if not is_loss(error):
      raise
    when_lost()
    text = " ".join(map(str, _chain(error)))
    raise PeerLost(
      f"process {jax.process_index()} of {jax.process_count()} stops: another "
      "process is gone, or cannot be reached. Its last output tells why. Start "
      "all of them again, the same number or another: the run resumes from its "
      f"newest checkpoint. (JAX said: {' '.join(text.split())[:200]})"
    ) from error


def is_loss(error: BaseException) -> bool:
  """Whether `error` is JAX's message about a lost process."""
  # An OSError of a file system may contain the same words.
  chain = [str(e) for e in _chain(error) if not isinstance(e, OSError)]
  return jax.process_count() > 1 and bool(_SIGNS.search(" ".join(chain)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  while error:
    yield error
    error = error.__cause__ or error.__context__


class StopEvent(threading.Event):
  """An event that SIGTERM or Ctrl-C sets, after `watch` was called.

  Before that, both signals have their usual effect. After it, a signal sets
  the event the first time and has its usual effect the second time. Among
  several processes JAX keeps SIGTERM from the first `watch` on: between two
  runs of one process it stops the second at one of its first steps.
  """

  def __init__(self):
    super().__init__()
    self._several = jax.process_count() > 1
    self._old = {}  # handlers by signal
    self._seen = set()

  def watch(self) -> None:
    """Installs the signal handlers; later calls have no effect.

    With several processes, JAX's own handler of SIGTERM makes all of them stop
    at the same step. SIGTERM is left to it, and Ctrl-C raises SIGTERM.
    """
    if self._several and not distributed.global_state.preemption_sync_manager:
      jax.config.update("jax_enable_preemption_service", True)
      distributed.global_state.initialize_preemption_sync_manager()
    if self._old or threading.current_thread() is not threading.main_thread():
      return
    for number in (signal.SIGINT, signal.SIGTERM)[: 1 if self._several else 2]:
      self._old[number] = signal.signal(number, self._ask)

  def release(self) -> None:
    """Restores the previous handlers."""
    for number, handler in self._old.items():
      signal.signal(number, handler)
    self._old = {}

  def _ask(self, number, frame):
    del frame
    if number in self._seen:
      self.release()
      signal.raise_signal(number)
      return
    self._seen.add(number)
    self.set()
    logging.info("signal %d: saving and stopping after this step", number)
    if self._several:
      signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopEvent]:
  """A `StopEvent`, which is released at the end.

  Call its `watch` when there is something to save.
  """
  asked = StopEvent()
  try:
    yield asked
  finally:
    asked.release()


_calls = itertools.count()  # of `told_to_stop` in this process


def told_to_stop(asked: threading.Event) -> bool:
  """Whether the run stops at this step, because a process got a signal.

  Every process must call this at every step; all get the same answer.

  Args:
    asked: from `stop_signals`.
  """
  if jax.process_count() == 1:
    return asked.is_set()
  # Not the run's step: JAX plans the stop for a later number than any it has
  # seen, and a second run of the process would begin at 1 again.
  return multihost_utils.reached_preemption_sync_point(next(_calls))
