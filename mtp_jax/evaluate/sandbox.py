"""Runs programs that a model wrote, where they can do no harm.

A program runs as a user without rights, in namespaces of its own: no network,
no files but the interpreter's and /usr (read only) and a small folder in
memory, no process but its own. Limits hold its CPU time, wall time, memory,
processes, files and output. When it has ended, or is killed, so are all of its
processes. The kernel is the host's: this is no virtual machine.

Backends, in this order: bubblewrap (`bwrap`), util-linux (`unshare`). Without
either, nothing is run unless the caller says so.

The verdict is a nonce, which the checker (`isolation.checker`) writes once the
tests have run. The program is in another process, which never sees the nonce,
the tests or the outputs wanted; its exit code says nothing. No sandbox can tell
that a program knows the answers to the tests by heart. An object of the
program's own class compares, hashes and iterates as the program wants, but it
never equals a plain value.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent import futures

from mtp_jax.evaluate import isolation
from mtp_jax.evaluate.isolation import backends, seccomp

FLAG = "--allow_unsandboxed_execution"
NO_VERDICT, OUT_OF_TIME = "ended without a verdict", "out of time"
_FILES = 32  # open in each process
_START = 5.0  # seconds that a sandbox may take to begin and to end
# What the interpreter in a sandbox runs: these modules, and then the checker.
_SOURCES = ("messages", "untrusted", "checker")
_RUN = f"""
import sys
def add(name, source=""):
  module = sys.modules[name] = type(sys)(name)
  package, _, last = name.rpartition(".")
  if package: setattr(sys.modules[package], last, module)
  exec(compile(source, name, "exec"), module.__dict__)
add("mtp_jax"), add("mtp_jax.evaluate"), add("{isolation.__name__}")
"""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a program may use.

  At worst it takes processes times memory and twice `file`; pipes and sockets
  add 200 MB by Linux's defaults. `isolation.seccomp` denies calls that would
  hold more. One way is open: bubblewrap does not limit the number of files, and
  empty ones can take an eighth of the machine's memory. Where memory runs out,
  Linux ends programs in a sandbox first. A control group bounds the sum of all,
  as in `systemd-run --scope -p MemoryMax=8G python ...`.
  """

  cpu: int = 3  # seconds, of each of its processes
  wall: float = 10.0  # seconds, of all tests, or for each input
  memory: int = 512 << 20  # bytes of address space, of each process
  processes: int = 16  # threads count; the checker is one
  file: int = 16 << 20  # bytes of a file; all files, which are in memory, twice
  output: int = 1 << 18  # bytes that a script may print

  def check(self) -> None:
    """Raises ValueError where a program could not even begin."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 < value < math.inf:
        raise ValueError(f"limit {field.name}={value!r} is not above 0")


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Whether a program passed; if not, why."""

  passed: bool
  error: str = ""
  seconds: float = 0.0  # wall time, the sandbox's start included


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """One way to run programs; `find` chooses it."""

  backend: str  # 'bwrap', 'unshare', or 'none', which protects nothing
  limits: Limits = Limits()

  def check(
    self,
    program: str,
    tests: str | Sequence[tuple[str, str]],
    replaced: Sequence[str] = (),
  ) -> Verdict:
    """Runs one program on its tests.

    Args:
      program: Python source.
      tests: source that calls the program's functions and raises an error if
        it is not content. Values go there and come back as copies: None,
        numbers, strings, bytes, lists, tuples, sets, dicts; other objects stay
        with the program. Or pairs of strings: what the program, as a script,
        reads, and what it has to print (`same_output`).
      replaced: builtins, such as 'sum', of which the tests mean the program's
        own. All others stay Python's, whatever the program defines.
    """
    self.limits.check()
    begin = time.monotonic()
    job = {
      "program": program,
      "cpu": self.limits.cpu,
      "limits": {
        "RLIMIT_AS": self.limits.memory,
        "RLIMIT_FSIZE": self.limits.file,
        "RLIMIT_NOFILE": _FILES,
        "RLIMIT_CORE": 0,
      },
    }
    if self.backend == "none":
      job["filter"] = ""
    else:
      job["filter"] = seccomp.assemble().hex()
      # Without a sandbox the user's other processes would count.
      job["limits"]["RLIMIT_NPROC"] = self.limits.processes
    secret = {"nonce": secrets.token_hex(16)}
    wall = self.limits.wall
    if isinstance(tests, str):
      secret |= {"tests": tests, "replaced": list(replaced)}
    else:
      job |= {
        "inputs": [text for text, _ in tests],
        "seconds": wall,
        "output": self.limits.output,
      }
      wall *= max(1, len(tests))
    report, error = self._run(job, secret, wall)
    if report and not isinstance(tests, str):
      report["error"] = _compare(tests, report["runs"])
    error = report["error"] if report else error
    return Verdict(error is None, error or "", time.monotonic() - begin)

  def check_all(
    self,
    jobs: Sequence[tuple],
    workers: int | None = None,
  ) -> list[Verdict]:
    """`check` of (program, tests) or (program, tests, replaced).

    A program whose verdict is in doubt (`doubt`) runs once more, alone.

    Args:
      jobs: the arguments of `check`.
      workers: so many at once; None: as many as cores that this process may
        use.
    """
    workers = workers or len(os.sched_getaffinity(0))
    with futures.ThreadPoolExecutor(workers) as pool:
      verdicts = list(pool.map(lambda job: self.check(*job), jobs))
    return [
      self.check(*job) if doubt(verdict.error) else verdict
      for job, verdict in zip(jobs, verdicts, strict=True)
    ]

  def _run(self, job, secret, wall):
    """(the checker's report or None, what went wrong)."""
    # A user that nobody else is: its processes are counted by themselves.
    root = os.geteuid() == 0 and self.backend != "none"
    job |= {"uid": (1 << 30) + secrets.randbelow(1 << 29) if root else 0}
    data = _message(job) + _message(secret)
    with tempfile.TemporaryDirectory() as folder:
      command = backends.COMMANDS[self.backend](
        pathlib.Path(folder), 2 * self.limits.file
      )
      process = subprocess.Popen(
        [*command, *_python()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"},
        start_new_session=True,
      )
      try:
        out, err = process.communicate(data, wall + _START)
      except subprocess.TimeoutExpired:
        return None, OUT_OF_TIME
      finally:
        _kill(process)
    with contextlib.suppress(ValueError, TypeError, KeyError):
      report = json.loads(out[10:])
      if report["nonce"] == secret["nonce"]:
        return report, None
    said = err.decode("utf-8", "replace").strip().splitlines()
    return None, f"{NO_VERDICT}: {said[-1][:300] if said else ''}"


def find(*, allow_unsandboxed_execution: bool = False) -> str:
  """The name of the first backend that works here.

  Raises:
    ValueError: none does; says why, and what to do.
  """
  if sys.platform != "linux":
    raise ValueError(
      f"programs that a model wrote are run on Linux alone, not {sys.platform}"
    )
  reasons = []
  for name in ("bwrap", "unshare", "none")[: 2 + allow_unsandboxed_execution]:
    if name != "none" and not shutil.which(name):
      reasons.append(f"{name} is not installed")
      continue
    try:
      error = Sandbox(name).check("def f(): return 1", "assert f() == 1").error
    except ValueError as refused:
      error = str(refused)
    if not error:
      return name
    reasons.append(f"{name} fails ({error})")
  remedy = "Install bubblewrap (Debian: apt install bubblewrap)"
  if not allow_unsandboxed_execution:
    remedy += f", or give {FLAG}, which lets them do all that you can do"
  raise ValueError(
    f"no sandbox for the programs that a model wrote: {'; '.join(reasons)}. "
    f"{remedy}"
  )


def doubt(error: str) -> str | None:
  """Why a verdict may be the fault of a busy machine; None: it is not.

  A program whose CPU time is used up ends as "out of CPU time", however busy
  the machine is.

  Returns:
    OUT_OF_TIME (of wall time), NO_VERDICT or None.
  """
  found = re.match(rf"(?:input \d+: )?({OUT_OF_TIME}|{NO_VERDICT})", error)
  return found and found[1]


def same_output(got: str, wanted: str) -> bool:
  """Whether a script printed what it had to, but for white space.

  Numbers with a point may differ by 1e-6, relative or absolute.
  """

  def alike(a, b):
    if a == b:
      return True
    try:
      return "." in b and math.isclose(
        float(a), float(b), rel_tol=1e-6, abs_tol=1e-6
      )
    except ValueError:
      return False

  got, wanted = got.split(), wanted.split()
  return len(got) == len(wanted) and all(map(alike, got, wanted))


def _compare(tests, runs) -> str | None:
  """What is wrong with [output, error] of each input, or None."""
  if not tests:
    return "no tests"
  for i, ((output, error), (_, wanted)) in enumerate(
    zip(runs, tests, strict=False)
  ):
    if error:
      return f"input {i}: {error}"
    if not same_output(output, wanted):
      return f"input {i}: wrong output"
  return None if len(runs) == len(tests) else "not all inputs were run"


def _message(value) -> bytes:
  """As `checker.receive` reads it."""
  data = json.dumps(value).encode()
  return b"%10d" % len(data) + data


def _python() -> list[str]:
  """The interpreter, without packages, running the checker."""
  name, lines = isolation.__name__, [_RUN]
  for module in _SOURCES:
    path = pathlib.Path(isolation.__file__).with_name(f"{module}.py")
    lines.append(f"add('{name}.{module}', {path.read_text('utf-8')!r})")
  lines.append(f"sys.modules['{name}.checker'].main()")
  return [backends.interpreter(), "-I", "-S", "-B", "-c", "\n".join(lines)]


def _kill(process) -> None:
  """Ends the sandbox, and with its first process all others."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, 9)
  process.kill()
  process.communicate()
