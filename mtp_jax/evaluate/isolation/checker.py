"""What runs inside a sandbox: a checker, and the program in another process.

The host hands the text of this file, of `messages` and of `untrusted` to
`python -c` there. They import nothing else but the standard library.

The program's process is forked before the checker reads the tests and the
nonce, so its memory holds neither. It has no descriptor of the checker but two
pipes, and it can neither trace the checker nor open its /proc files, because
the checker is not dumpable. Tests run in the checker and call the program's
functions through the pipes. What comes back is a copy, made of plain values: an
object whose == is always true arrives as an object, not as the value wanted.
"""

import builtins
import ctypes
import fcntl
import functools
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable

from mtp_jax.evaluate.isolation import messages, untrusted

_JOB = 1 << 30  # bytes of the host's messages, which hold all tests and inputs


def main() -> None:
  """Reads a job from descriptor 0, then a secret; writes a report to 1."""
  sys.set_int_max_str_digits(0)
  builtins.exit = builtins.quit = sys.exit  # what a script expects of `site`
  job = messages.receive(0, _JOB)
  confine(job)
  if "inputs" in job:
    report = {"runs": runs(job)}
    secret = messages.receive(0, _JOB)
  else:
    requests, replies = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
      os.close(requests[1])
      os.close(replies[0])
      try:
        untrusted.isolate(job)
      except OSError as error:  # the checker says why it has no program
        messages.send(replies[1], ["raised", ["OSError", str(error)]])
        os._exit(1)
      untrusted.serve(job["program"], requests[0], replies[1])
    os.close(requests[0])
    os.close(replies[1])
    secret = messages.receive(0, _JOB)
    program = Program(requests[1], replies[0], lambda: finish(pid, job["cpu"]))
    report = check(secret["tests"], program, secret["replaced"])
  messages.send(1, report | {"nonce": secret["nonce"]})
  os._exit(0)


def confine(job: dict) -> None:
  """Sets the limits of all processes; makes this one opaque to the others."""
  with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
    file.write("1000")
  for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
  if uid := job["uid"]:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
  PR_SET_DUMPABLE = 4
  ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


class Program:
  """The program, as the checker sees it: two pipes.

  Raises:
    Failed: the program has ended, or its answer cannot be read.
  """

  def __init__(
    self, requests: int, replies: int, finish: Callable[[], str | None]
  ):
    self._requests, self._replies = requests, replies
    self._finish = functools.cache(finish)

  def load(self) -> None:
    """Runs the program's definitions."""
    self._ask("load")

  def names(self, names: list[str]) -> dict:
    """Those of its top-level names that it has."""
    return self._ask("names", names)

  def call(self, number: int, method: str, args=(), named=None):
    """A method of one of its objects; lists among `args` change as there."""
    given = messages.pack([args, named or {}], _number)
    result, after = self._ask("call", number, method, given)
    for old, new in zip(args, after, strict=True):
      if type(old) in (list, bytearray):
        old[:] = new
      elif type(old) in (dict, set):
        old.clear()
        old.update(new)
    return result

  def _ask(self, *request):
    try:
      messages.send(self._requests, request)
    except BrokenPipeError:
      raise self._ended() from None
    return self._reply()

  def _reply(self):
    reply = messages.receive(self._replies)
    if reply is None:
      raise self._ended()
    if reply[0] == "returned":
      return messages.unpack(reply[1], self._find)
    name, text = reply[1]
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
      try:
        error = kind(text)
      except TypeError:
        error = Failed(f"{name}: {text}")
      raise error
    raise Failed(f"{name}: {text}")

  def _ended(self):
    return Failed(self._finish() or "the program ended")

  def _find(self, reference):
    kind, name = reference
    if kind == "remote":
      return Remote(self, name)
    if name.partition(".")[0] not in sys.stdlib_module_names:
      raise Failed(f"the module {name} is not of the standard library")
    __import__(name)
    return sys.modules[name]


class Failed(Exception):
  """The program ended early, or raised an error of its own."""


class Remote:
  """An object of the program that is not plain, such as a function.

  Compared with a plain value it is unequal, whatever the program says.
  """

  def __init__(self, program: Program, number: int):
    self.__dict__.update(_program=program, _number=number)

  def __call__(self, *args, **named):
    """The program's answer."""
    return self._program.call(self._number, "__call__", args, named)

  def __getattr__(self, name):
    return self._program.call(self._number, "getattr", (name,))

  def __bool__(self):
    return self._program.call(self._number, "bool") is True


def _forward(name, with_plain=True):
  def method(self, *args):
    if not (with_plain or isinstance(args[0], Remote)):
      return NotImplemented
    return self._program.call(self._number, name, args)

  setattr(Remote, name, method)


for _name in "setattr hash len iter next getitem setitem delitem str".split():
  _forward(f"__{_name}__")
for _name in "eq ne lt le gt ge".split():
  _forward(f"__{_name}__", with_plain=False)


def _number(value):
  if isinstance(value, Remote):
    return ["remote", value._number]
  raise Failed(f"the tests pass a {type(value).__name__} to the program")


def check(tests: str, program: Program, replaced: list[str]) -> dict:
  """Runs the tests; 'error' is None, or says what went wrong first.

  A builtin stays Python's own, unless it is among `replaced`: else a program
  could define `all` or `len` and so pass.
  """
  try:
    program.load()
    code = compile(tests, "tests.py", "exec")
    wanted = [
      n for n in _names(code) if n in replaced or not hasattr(builtins, n)
    ]
    given = program.names(wanted)  # by a process that may answer anything
    known = {n: given[n] for n in wanted if n in given}
    own = {"__name__": "tests", "__builtins__": builtins.__dict__}
    exec(code, known | own)
  except BaseException as error:
    return {"error": f"{type(error).__name__}: {error}"[:300]}
  return {"error": None}


def _names(code) -> set[str]:
  """What the tests may look up, whichever function of them does."""
  inner = (_names(c) for c in code.co_consts if type(c) is type(code))
  return set(code.co_names).union(*inner)


def runs(job: dict) -> list:
  """`run` of each input, up to the first error."""
  found = []
  for text in job["inputs"]:
    found.append(run(job, text))
    if found[-1][1]:
      break
  return found


_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT  # asks, and leaves it waitable


def run(job: dict, text: str) -> list:
  """[output, error] of the program as a script that reads `text`."""
  stdin = os.memfd_create("stdin", os.MFD_ALLOW_SEALING)
  with open(stdin, "wb", closefd=False) as file:
    file.write(text.encode("utf-8", "surrogatepass"))
  os.lseek(stdin, 0, os.SEEK_SET)
  # Else a program could keep this file of every input, and fill them.
  fcntl.fcntl(stdin, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
  ours, theirs = os.pipe()
  pid = os.fork()
  if not pid:
    untrusted.isolate(job, stdin, theirs)
    os.closerange(3, 256)
    untrusted.script(job["program"])
  os.close(theirs)
  os.close(stdin)
  output, error, end = b"", None, time.monotonic() + job["seconds"]
  while not error:
    left = max(0, end - time.monotonic())
    if not select.select([ours], [], [], left)[0]:
      error = "out of time"
    elif not (part := os.read(ours, 1 << 16)):
      break
    else:
      output += part
    if len(output) > job["output"]:
      error = f"more than {job['output']} bytes of output"
  os.close(ours)
  # It may have closed its output and run on.
  while not error and not os.waitid(os.P_PID, pid, _ENDED):
    if time.monotonic() > end:
      error = "out of time"
    time.sleep(0.001)
  ending = finish(pid, job["cpu"])
  text = output[: job["output"]].decode("utf-8", "replace")
  return [text, error or ending]


def finish(pid: int, cpu: int) -> str | None:
  """Ends a process, if it has not ended; says why it ended.

  None: by itself, with exit code 0. `cpu`: the seconds that it had.
  """
  os.kill(pid, signal.SIGKILL)
  _, status, used = os.wait4(pid, 0)
  code = os.waitstatus_to_exitcode(status)
  busy = used.ru_utime + used.ru_stime >= cpu
  if code == -signal.SIGXCPU or (code == -signal.SIGKILL and busy):
    return "out of CPU time"
  if code:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
  return None
