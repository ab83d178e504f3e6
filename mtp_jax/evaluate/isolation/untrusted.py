"""The process of a program that a model wrote.

It is forked from the checker's. From `isolate` on it has the program's limits
and no descriptor of the checker but two pipes.
"""

import builtins
import ctypes
import os
import resource
import struct
import sys

from mtp_jax.evaluate.isolation import messages


def isolate(job: dict, stdin=None, stdout=None) -> None:
  """Gives this process descriptors, a CPU limit and the filter of its own.

  Raises:
    OSError: this kernel has no seccomp.
  """
  if code := bytes.fromhex(job["filter"]):
    _install(code)
  null = os.open(os.devnull, os.O_RDWR)
  os.dup2(null if stdin is None else stdin, 0)
  os.dup2(null if stdout is None else stdout, 1)
  os.dup2(null, 2)
  resource.setrlimit(resource.RLIMIT_CPU, (job["cpu"], job["cpu"] + 1))


def _install(code: bytes) -> None:
  """Has the kernel ask `code` (`seccomp.assemble`) about every system call."""
  PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2
  kernel, place = ctypes.CDLL(None), ctypes.create_string_buffer(code)
  lines = struct.pack("HP", len(code) // 8, ctypes.addressof(place))
  kernel.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  if kernel.prctl(PR_SET_SECCOMP, FILTER, lines, 0, 0):
    raise OSError("this kernel has no seccomp")


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
    args, named = messages.unpack(given, lambda place: objects[place[1]])
    target = objects[number]
    if method in ("getattr", "bool"):
      return getattr(builtins, method)(target, *args), args
    special = getattr(type(target), method, None)
    if special is None:
      raise TypeError(f"{type(target).__name__} has no {method}")
    return special(target, *args, **named), args  # which the call may change

  answers = {"load": load, "names": names, "call": call}
  while (request := messages.receive(requests)) is not None:
    try:
      name, *given = request
      reply = ["returned", messages.pack(answers[name](*given), refer)]
    except BaseException as error:
      reply = ["raised", [type(error).__name__, str(error)[:300]]]
    messages.send(replies, reply)
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
