"""What runs inside a sandbox: a checker, and the program in another process.

`sandbox` hands the text of this file to `python -c` there. It imports nothing
but the standard library.

The program's process is forked before the checker reads the tests and the
nonce, so its memory holds neither. It has no descriptor of the checker but two
pipes, and it can neither trace the checker nor open its /proc files, because
the checker is not dumpable. Tests run in the checker and call the program's
functions through the pipes. What comes back is a copy, made of plain values: an
object whose == is always true arrives as an object, not as the value wanted.
"""

import builtins
import json
import os
import resource
import select
import signal
import sys
import time

_MOST = 1 << 24  # bytes of a message
_PLAIN = {type(None), bool, int, float, str}
_MANY = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_RAW = {"bytes": bytes, "bytearray": bytearray}


def main() -> None:
  """Reads a job from descriptor 0, then a secret; writes a report to 1."""
  sys.set_int_max_str_digits(0)
  builtins.exit = builtins.quit = sys.exit  # what a script expects of `site`
  job = receive(0)
  confine(job)
  if "inputs" in job:
    report = {"runs": runs(job)}
    secret = receive(0)
  else:
    requests, replies = os.pipe(), os.pipe()
    if not os.fork():
      os.close(requests[1])
      os.close(replies[0])
      isolate(job)
      serve(job["program"], requests[0], replies[1])
    os.close(requests[0])
    os.close(replies[1])
    secret = receive(0)
    program = Program(requests[1], replies[0])
    report = check(secret["tests"], program, secret["replaced"])
  send(1, report | {"nonce": secret["nonce"]})
  os._exit(0)


def confine(job: dict) -> None:
  """Sets the limits of all processes; makes this one opaque to the others."""
  with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
    file.write("1000")
  for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
  if uid := job["uid"]:  # another user is not dumpable
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
  else:
    import ctypes

    PR_SET_DUMPABLE = 4
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def isolate(job: dict, stdin=None, stdout=None) -> None:
  """Gives the program's process descriptors and a CPU limit of its own."""
  null = os.open(os.devnull, os.O_RDWR)
  os.dup2(null if stdin is None else stdin, 0)
  os.dup2(null if stdout is None else stdout, 1)
  os.dup2(null, 2)
  resource.setrlimit(resource.RLIMIT_CPU, (job["cpu"], job["cpu"] + 1))


def receive(descriptor: int):
  """A message: its length in ten digits, then JSON. None: there is none."""
  size = _read(descriptor, 10)
  if not size:
    return None
  if int(size) > _MOST:
    raise ValueError(f"a value of {int(size)} bytes")
  return json.loads(_read(descriptor, int(size)))


def _read(descriptor, size):
  parts = []
  while size and (part := os.read(descriptor, min(size, 1 << 16))):
    parts.append(part)
    size -= len(part)
  return b"" if size else b"".join(parts)


def send(descriptor: int, message) -> None:
  """Writes what `receive` reads."""
  data = json.dumps(message).encode()
  data = b"%10d" % len(data) + data
  while data:
    data = data[os.write(descriptor, data) :]


def pack(value, refer):
  """A value as JSON; `refer(object)` stands for what is not plain."""
  kind = type(value)
  if kind in _PLAIN:
    return value
  for name, known in _MANY.items():
    if kind is known:
      return [name, [pack(v, refer) for v in value]]
  if isinstance(value, dict):
    pairs = [[pack(k, refer), pack(v, refer)] for k, v in value.items()]
    return ["dict", pairs]
  if kind is complex:
    return ["complex", [value.real, value.imag]]
  if kind.__name__ in _RAW and kind is _RAW[kind.__name__]:
    return [kind.__name__, value.hex()]
  for base in (int, float, str, *_MANY.values()):
    if isinstance(value, base):
      return pack(base(value), refer)
  return ["object", refer(value)]


def unpack(value, find):
  """What `pack` packed; `find(reference)` gives what is not plain."""
  if type(value) is not list:
    return value
  name, inside = value
  if name in _MANY:
    return _MANY[name](unpack(v, find) for v in inside)
  if name == "dict":
    return {unpack(k, find): unpack(v, find) for k, v in inside}
  if name == "complex":
    return complex(*inside)
  if name in _RAW:
    return _RAW[name].fromhex(inside)
  return find(inside)


# The program's process.


def serve(source: str, requests: int, replies: int) -> None:
  """Runs the program, then answers the checker's calls; never returns."""
  objects = []
  module = type(sys)("solution")
  sys.modules["solution"] = module

  def refer(value):
    if isinstance(value, type(sys)):
      return ["module", value.__name__]
    objects.append(value)
    return ["remote", len(objects) - 1]

  def load():
    exec(compile(source, "solution.py", "exec"), module.__dict__)

  def names(wanted):
    return {n: module.__dict__[n] for n in wanted if n in module.__dict__}

  def call(number, method, given):
    args, named = unpack(given, lambda reference: objects[reference[1]])
    target = objects[number]
    if method in ("getattr", "bool"):
      return getattr(builtins, method)(target, *args), args
    special = getattr(type(target), method, None)
    if special is None:
      raise TypeError(f"{type(target).__name__} has no {method}")
    return special(target, *args, **named), args  # which the call may change

  answers = {"load": load, "names": names, "call": call}
  while (request := receive(requests)) is not None:
    try:
      name, *given = request
      reply = ["returned", pack(answers[name](*given), refer)]
    except BaseException as error:
      reply = ["raised", [type(error).__name__, str(error)[:300]]]
    send(replies, reply)
  os._exit(0)


def script(source: str) -> None:
  """Runs the program as `__main__`; never returns."""
  module = sys.modules["__main__"] = type(sys)("__main__")
  code = 0
  try:
    exec(compile(source, "solution.py", "exec"), module.__dict__)
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else bool(error.code)
  except BaseException:
    code = 1
  try:
    sys.stdout.flush()
  except BaseException:
    code = 1
  os._exit(code & 255)


# The checker's process.


class Program:
  """The program, as the checker sees it: two pipes.

  Raises:
    Failed: the program has ended, or its answer cannot be read.
  """

  def __init__(self, requests: int, replies: int):
    self._requests, self._replies = requests, replies

  def load(self) -> None:
    """Runs the program's definitions."""
    self._ask("load")

  def names(self, names: list[str]) -> dict:
    """Those of its top-level names that it has."""
    return self._ask("names", names)

  def call(self, number: int, method: str, args=(), named=None):
    """A method of one of its objects; lists among `args` change as there."""
    given = pack([args, named or {}], _number)
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
      send(self._requests, request)
    except BrokenPipeError:
      raise Failed("the program ended") from None
    return self._reply()

  def _reply(self):
    reply = receive(self._replies)
    if reply is None:
      raise Failed("the program ended")
    if reply[0] == "returned":
      return unpack(reply[1], self._find)
    name, text = reply[1]
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
      try:
        error = kind(text)
      except TypeError:
        error = Failed(f"{name}: {text}")
      raise error
    raise Failed(f"{name}: {text}")

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
    exec(code, {"__name__": "tests"} | program.names(wanted))
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
  stdin = os.memfd_create("stdin")
  with open(stdin, "wb", closefd=False) as file:
    file.write(text.encode("utf-8", "surrogatepass"))
  os.lseek(stdin, 0, os.SEEK_SET)
  ours, theirs = os.pipe()
  pid = os.fork()
  if not pid:
    isolate(job, stdin, theirs)
    os.closerange(3, 256)
    script(job["program"])
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
  if error:
    os.kill(pid, signal.SIGKILL)
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  if not error and code in (-signal.SIGXCPU, -signal.SIGKILL):
    error = "out of time"
  elif not error and code:
    error = f"exit code {code}"
  return [output[: job["output"]].decode("utf-8", "replace"), error]


if __name__ == "__main__":
  main()
