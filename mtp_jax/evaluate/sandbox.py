"""Runs programs that a model wrote, where they can do no harm.

A program runs as a user without rights, in namespaces of its own: no network,
no files but the interpreter's and /usr (read only) and a small folder in
memory, no process but its own. Limits hold its CPU time, wall time, memory,
processes, files and output. When it has ended, or is killed, so are all of its
processes. The kernel is the host's: this is no virtual machine.

Backends, in this order: bubblewrap (`bwrap`), util-linux (`unshare`). Without
either, nothing is run unless the caller says so.

The verdict is a nonce, which the checker (`checker`) writes once the tests have
run. The program is in another process, which never sees the nonce, the tests or
the outputs wanted; its exit code says nothing. What no sandbox can judge: a
program that computes the right answers to the tests by heart; and an object of
the program's own class compares, hashes and iterates as the program wants. It
never equals a plain value.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent import futures

FLAG = "--allow_unsandboxed_execution"
NO_VERDICT = "ended without a verdict"
_CHECKER = pathlib.Path(__file__).with_name("checker.py")
_FILES = 32  # open in each process
_START = 5.0  # seconds that a sandbox may take to begin and to end


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a program may use.

  At worst it takes processes times memory. Files in memory, which
  `os.memfd_create` makes, and System V segments come on top: at most `_FILES`
  of `file` bytes in each process, and without a limit. Only a control group
  would bound them.
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
    # Without a sandbox the processes of the user's other programs would count.
    if self.backend != "none":
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

    Args:
      jobs: the arguments of `check`.
      workers: so many at once; None: as many as there are cores.
    """
    workers = workers or os.cpu_count()
    with futures.ThreadPoolExecutor(workers) as pool:
      return list(pool.map(lambda job: self.check(*job), jobs))

  def _run(self, job, secret, wall):
    """(the checker's report or None, what went wrong)."""
    # A user that nobody else is: its processes are counted by themselves.
    root = os.geteuid() == 0 and self.backend != "none"
    job |= {"uid": (1 << 30) + secrets.randbelow(1 << 29) if root else 0}
    data = _message(job) + _message(secret)
    with tempfile.TemporaryDirectory() as folder:
      command = _BACKENDS[self.backend](pathlib.Path(folder), self.limits)
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
        return None, "out of time"
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
  reasons = []
  for name in ("bwrap", "unshare"):
    if not shutil.which(name):
      reasons.append(f"{name} is not installed")
      continue
    verdict = Sandbox(name).check("def f(): return 1", "assert f() == 1")
    if verdict.passed:
      return name
    reasons.append(f"{name} fails ({verdict.error})")
  if allow_unsandboxed_execution:
    return "none"
  raise ValueError(
    f"no sandbox for the programs that a model wrote: {'; '.join(reasons)}. "
    f"Install bubblewrap (Debian: apt install bubblewrap), or give {FLAG}, "
    "which lets them do all that you can do"
  )


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
  source = _CHECKER.read_text(encoding="utf-8")
  return [_interpreter(), "-I", "-S", "-B", "-c", source]


def _interpreter() -> str:
  return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _kill(process) -> None:
  """Ends the sandbox, and with its first process all others."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, 9)
  process.kill()
  process.communicate()


def _folders() -> list[str]:
  """What a program may read."""
  prefix = os.path.realpath(sys.base_prefix)
  folders = ["/usr"] if prefix.startswith("/usr") else ["/usr", prefix]
  links = [f"/{name}" for name in ("bin", "lib", "lib32", "lib64")]
  return [f for f in (*folders, *links) if os.path.exists(f)]


def _bwrap(folder: pathlib.Path, limits: Limits) -> list[str]:
  del folder
  command = shlex.split(
    "bwrap --unshare-pid --unshare-net --unshare-ipc --unshare-uts "
    "--unshare-cgroup-try --die-with-parent --new-session --cap-drop ALL "
    "--clearenv --setenv HOME /tmp --setenv LANG C.UTF-8"
  )
  # Process 1 has to end with bwrap, and holds the checker's descriptors. As
  # root it is bwrap's own process, since the checker becomes another user, and
  # Linux then forgets that it should end with its parent. Another user cannot
  # read its descriptors. Without root, process 1 is the checker.
  if os.geteuid() == 0:
    command += shlex.split("--cap-add CAP_SETUID --cap-add CAP_SETGID")
  else:
    command += ["--as-pid-1"]
  for name in _folders():
    if os.path.islink(name):
      command += ["--symlink", os.readlink(name), name]
      continue
    for parent in reversed(pathlib.Path(name).parents[:-1]):
      command += ["--perms", "0755", "--dir", str(parent)]
    command += ["--ro-bind", name, name]
  size = 2 * limits.file
  command += shlex.split(
    f"--proc /proc --dev /dev --perms 1777 --size {size} --tmpfs /tmp "
    "--remount-ro /dev --remount-ro / --chdir /tmp --"
  )
  return command


def _unshare(folder: pathlib.Path, limits: Limits) -> list[str]:
  """The same by mount and pivot_root, which takes twice as long."""
  root = os.geteuid() == 0
  lines = ["set -e", f"mount -t tmpfs -o mode=755,size=64k tmpfs {folder}"]
  lines += [f"cd {folder}", "mkdir proc dev tmp old"]
  for name in _folders():
    inside = shlex.quote(f".{name}")
    if os.path.islink(name):
      lines.append(f"ln -s {shlex.quote(os.readlink(name))} {inside}")
      continue
    lines.append(f"mkdir -p {inside}")
    lines.append(f"mount --rbind {shlex.quote(name)} {inside}")
    lines.append(f"mount -o remount,bind,ro {inside}")
  for name in ("null", "zero", "urandom", "random"):
    lines.append(f"touch dev/{name}; mount --bind /dev/{name} dev/{name}")
  lines += [
    "mount -t proc proc proc",
    f"mount -t tmpfs -o mode=1777,size={2 * limits.file} tmpfs tmp",
    "pivot_root . old",
    "umount -l /old; rmdir /old",
    "mount -o remount,bind,ro /",
    "cd /tmp",
    "export HOME=/tmp",
  ]
  # As in `_bwrap`: process 1 is this shell, or else the checker.
  keep, run = (",+setuid,+setgid", "") if root else ("", "exec ")
  lines.append(
    f"{run}setpriv --no-new-privs --inh-caps=-all --bounding-set=-all{keep} "
    '"$@"'
  )
  command = "setpriv --pdeathsig KILL unshare --mount --pid --net --ipc --uts "
  command += "--fork --kill-child=KILL"
  if not root:
    command += " --map-root-user"
  return [*shlex.split(command), "sh", "-c", "\n".join(lines), "sh"]


def _none(folder: pathlib.Path, limits: Limits) -> list[str]:
  del folder, limits
  return []


_BACKENDS = {"bwrap": _bwrap, "unshare": _unshare, "none": _none}
