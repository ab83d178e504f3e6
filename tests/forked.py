"""Starts programs as `python` does, with the imports paid only once.

A server, one for each worker of the suite, has imported what all programs use.
It forks a child for each program, which ends like any other: what is
registered with `atexit` runs.
"""

import functools
import gc
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading

ROOT = pathlib.Path(__file__).parents[1]
_WIDTH = 12  # bytes in which a number is handed over


class Process:
  """What tests use of `subprocess.Popen`, for `python *arguments`.

  Args:
    arguments: as Python takes them: -c PROGRAM, -m MODULE or FILE, and more.
    output: a file that takes standard output and errors; None: a pipe for
      the output, and a file of its own for the errors.
    cwd: the program's folder; None: the caller's.
    **variables: environment variables. Those of JAX become its settings.
      What Python itself reads as it starts is not heard, but for
      PYTHONUNBUFFERED.
  """

  def __init__(self, arguments, *, output=None, cwd=None, **variables):
    self._status, its_status = os.pipe()
    if output:
      out, self._err = os.dup(output.fileno()), output
    else:
      pipe, out = os.pipe()
      self.stdout, self._err = os.fdopen(pipe), tempfile.TemporaryFile()
    variables = {"XLA_FLAGS": os.environ["XLA_FLAGS"]} | variables
    request = [str(a) for a in arguments], str(cwd or os.getcwd()), variables
    socket.send_fds(
      _server(),
      [json.dumps(request).encode()],
      [out, self._err.fileno(), its_status],
    )
    os.close(out)
    os.close(its_status)
    self.returncode = None
    self.pid = int(os.read(self._status, _WIDTH))

  def wait(self, timeout: float | None = None) -> int:
    """The exit code; minus the number of the signal that ended it."""
    if self.returncode is None:
      if not select.select([self._status], [], [], timeout)[0]:
        raise subprocess.TimeoutExpired("python", timeout)
      self.returncode = int(os.read(self._status, _WIDTH))
      os.close(self._status)
    return self.returncode

  def poll(self) -> int | None:
    try:
      return self.wait(0)
    except subprocess.TimeoutExpired:
      return None

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)

  def communicate(self, timeout: float = 300) -> tuple[str, str]:
    """The rest of its output, and all of its errors; kills what is too late."""
    timer = threading.Timer(timeout, self.kill)
    timer.start()
    with self.stdout, self._err:
      out = self.stdout.read()
      self.wait()
      timer.cancel()
      self._err.seek(0)
      return out, self._err.read().decode()


@functools.cache
def _server() -> socket.socket:
  ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  subprocess.Popen(
    [sys.executable, __file__, str(its.fileno())],
    pass_fds=[its.fileno()],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,  # of no seekable file, as children have a pipe
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )
  its.close()
  return ours


def _serve(requests: socket.socket) -> None:
  """Forks a guard for each request, and this a child, until there are none."""
  # It imports what all programs do.
  from experiments.startup import options, program, terminal  # noqa: F401

  # Children would scan, and so copy, what was imported here.
  gc.freeze()
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a guard
  while True:
    text, files, *_ = socket.recv_fds(requests, 1 << 20, 3)
    if not text:
      return
    if not os.fork():
      requests.close()
      signal.signal(signal.SIGCHLD, signal.SIG_DFL)
      if not (child := os.fork()):
        _become(files, *json.loads(text))
        return
      out, err, status = files
      os.close(out)
      os.close(err)
      os.write(status, f"{child:{_WIDTH}}".encode())
      code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
      os.write(status, f"{code:{_WIDTH}}".encode())
      os._exit(0)
    for file in files:
      os.close(file)


def _become(files, arguments, folder, variables) -> None:
  """Runs a program in this process."""
  import jax

  for number, file in enumerate(files[:2], 1):
    os.dup2(file, number)
  for file in files:
    os.close(file)
  os.chdir(folder)
  for name, value in variables.items():
    os.environ[name] = value
    if name.startswith("JAX_"):
      old = getattr(jax.config, name.lower())
      new = value if isinstance(old, str | None) else json.loads(value)
      jax.config.update(name.lower(), new)
  if "PYTHONUNBUFFERED" in variables:
    sys.stdout.reconfigure(write_through=True)
  flag, *rest = arguments
  if flag == "-c":
    program, *rest = rest
    sys.argv[:] = [flag, *rest]
    exec(program, {"__name__": "__main__"})
  elif flag == "-m":
    sys.argv[:] = rest
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
  else:
    sys.argv[:] = arguments
    runpy.run_path(flag, run_name="__main__")


if __name__ == "__main__":
  _serve(socket.socket(fileno=int(sys.argv[1])))
