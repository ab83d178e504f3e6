"""Several processes, on one host or on many, as one run.

All run the same program, each with its own devices and rows; JAX connects them.
If one dies, the others end within the time of a heartbeat, since none can go on
alone. Started again, the run resumes.
"""

import contextlib
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from jax._src import distributed  # the barrier has no public name
from jax.experimental import multihost_utils

HEARTBEAT = 20  # seconds of silence after which a process counts as dead
_PATIENCE = 24 * 3600 * 1000  # ms; a host may have a large corpus to pack
# Messages of JAX's runtime when a peer is gone: collectives, coordinator.
_SIGNS = re.compile("Gloo|NCCL|UNAVAILABLE:|DEADLINE_EXCEEDED:|[Bb]arrier")


class PeerLost(Exception):
  """Another process of the run is gone, so this one cannot go on."""


def join(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  *,
  heartbeat: int = HEARTBEAT,
) -> None:
  """Connects this process with the others; before anything else of JAX.

  What is None is found by JAX itself: on a TPU slice, under SLURM, Open MPI
  and Kubernetes. Where nothing is found, all three are needed.

  Args:
    coordinator: host:port of process 0, which all can reach.
    processes: their number.
    process: which of them this is.
    heartbeat: seconds of silence after which a process counts as dead, and
      all others stop.

  Raises:
    ValueError: too little was given or found, numbers do not fit each other,
      or the port of process 0 is taken.
  """
  _check_join(coordinator, processes, process, heartbeat)
  try:
    jax.distributed.initialize(
      coordinator, processes, process, heartbeat_timeout_seconds=heartbeat
    )
  except ValueError as error:
    raise ValueError(
      f"cannot join the other processes: {error} No cluster tells of them; "
      "name all three: coordinator (host:port of process 0), the number of "
      "processes, and which of them this is"
    ) from error
  if jax.default_backend() == "cpu":
    # A program from the cache runs its collectives in no fixed order (jaxlib
    # 0.10.2), and processes match messages by their order.
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
    try:  # JAX 0.10 crashes at a port that is taken
      socket.create_server(("", int(port))).close()
    except OSError as error:
      raise ValueError(
        f"process 0 cannot listen at port {port} of coordinator {coordinator}: "
        f"{error.strerror}. Name a free port to all processes"
      ) from error


def gather(text: str) -> list[str]:
  """The text of every process, in their order; waits for the slowest.

  The first thing that processes do together: collectives on a CPU wait only
  30 seconds for each other at first, this waits for a day.

  Raises:
    ValueError: there are several processes, but they were never joined.
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
  """Turns what JAX raises inside, when a peer is gone, into one clear error.

  Args:
    when_lost: called first, to let go of what would wait for the peer.

  Raises:
    PeerLost: says which process stops, why, and what to do.
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
      "process is gone, or cannot be reached. What it wrote last tells why. "
      "Start all of them again, as before or another number: the run goes on "
      f"from its newest checkpoint. (JAX said: {' '.join(text.split())[:200]})"
    ) from error


def is_loss(error: BaseException) -> bool:
  """Whether JAX's runtime says with `error` that a peer is gone."""
  # A file system has words like JAX's.
  chain = [str(e) for e in _chain(error) if not isinstance(e, OSError)]
  return jax.process_count() > 1 and bool(_SIGNS.search(" ".join(chain)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  while error:
    yield error
    error = error.__cause__ or error.__context__


class StopEvent(threading.Event):
  """Set by SIGTERM or Ctrl-C from `watch` on.

  Before `watch`, both signals act as they do without it. After it, the first
  sets the event, and the same signal a second time acts as before again.
  """

  def __init__(self):
    super().__init__()
    self._several = jax.process_count() > 1
    self._old = {}  # handlers by signal
    self._seen = set()

  def watch(self) -> None:
    """Takes the signals over; nothing happens the second time.

    Among several processes JAX's own handler of SIGTERM makes all of them stop
    at the same step, and Ctrl-C is passed on to it.
    """
    if self._old or threading.current_thread() is not threading.main_thread():
      return
    for number in (signal.SIGINT, signal.SIGTERM)[: 1 if self._several else 2]:
      self._old[number] = signal.signal(number, self._ask)

  def release(self) -> None:
    """Gives the signals back."""
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
  """A `StopEvent`, to be watched once there is something to save."""
  asked = StopEvent()
  try:
    yield asked
  finally:
    asked.release()


def told_to_stop(asked: threading.Event, step: int) -> bool:
  """Whether all processes stop at this step; any of them may be told.

  Args:
    asked: of `stop_signals`.
    step: every process has to ask for every step.
  """
  if jax.process_count() == 1:
    return asked.is_set()
  return multihost_utils.reached_preemption_sync_point(step)
