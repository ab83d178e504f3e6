"""The sandbox: no harm, no pass that was not earned, and none withheld."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import socket
import time
from concurrent import futures

import pytest

from mtp_jax.evaluate import sandbox
from mtp_jax.evaluate.isolation import backends, seccomp
from tests import hostile

LIMITS = sandbox.Limits(cpu=1, wall=2.0, output=1 << 12)
# Scripts, which get the first input of (input, output); none prints the output.
SCRIPTS = {
  "waits": "import time; time.sleep(60)",
  "floods": "while True: print('8' * 999)",
  "exits": "import os; os._exit(0)",
  "fails behind its answer": "print(42); raise ValueError",
  "asks for the answers": """
import gc, os
print(os.read(0, 99), str(gc.get_objects())[:999])
for fd in range(3, 256):
  try: os.write(fd, b'         9{"runs":0}')
  except OSError: pass
""",
  "prints twice": "print(42, 42)",
  "is no Python": "print(42",
}


@pytest.fixture(scope="session", params=["bwrap", "unshare"])
def executor(request):
  """A sandbox of each backend that works here."""
  if not shutil.which(request.param):
    pytest.skip(f"{request.param} is not installed")
  executor = sandbox.Sandbox(request.param, LIMITS)
  verdict = executor.check("def f(): return 1", "assert f() == 1")
  if not verdict.passed:
    pytest.skip(f"{request.param} does not work here: {verdict.error}")
  return executor


def alive(users) -> list[str]:
  """Processes of sandboxes: of their users, or in a namespace of their own."""
  found, ours = [], os.readlink("/proc/self/ns/pid")
  for process in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      if os.geteuid():
        if os.readlink(process / "ns/pid") != ours:
          found.append(process.name)
      elif process.stat().st_uid in users:
        found.append(process.name)
  return found


@pytest.fixture(scope="session")
def attacked(executor, tmp_path_factory):
  """What came of the hostile programs, all run at once.

  {name: verdict}, processes alive half a second after, the host's file, and
  how many connections came in.
  """
  home = tmp_path_factory.mktemp("host")
  (home / "kept.txt").write_text("a secret")
  users = range(
    (1 << 30) + (os.getpid() << 8), (1 << 30) + (1 + os.getpid() << 8)
  )
  numbers = itertools.count(users[0] - (1 << 30))
  with (
    pytest.MonkeyPatch.context() as patch,
    socket.create_server(("127.0.0.1", 0)) as server,
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
  ):
    port = server.getsockname()[1]
    datagrams.bind(("127.0.0.1", port))
    patch.setattr(sandbox.secrets, "randbelow", lambda _: next(numbers))
    programs = hostile.programs(str(home), port)
    with futures.ThreadPoolExecutor(8) as pool:
      verdicts = list(pool.map(lambda p: executor.check(*p[1:]), programs))
    time.sleep(0.5)
    left = alive(users)
    came = 0
    for listener, take in (server, "accept"), (datagrams, "recv"):
      listener.setblocking(False)
      with contextlib.suppress(BlockingIOError):
        getattr(listener, take)(*([9] if take == "recv" else []))
        came += 1
  names = [name for name, *_ in programs]
  return dict(zip(names, verdicts, strict=True)), left, home, came


@pytest.mark.slow
def test_no_hostile_program_passes(attacked):
  verdicts, *_ = attacked
  assert len(verdicts) >= 55
  assert not [name for name, v in verdicts.items() if v.passed]
  unclear = [n for n, v in verdicts.items() if not v.error]
  assert not unclear


@pytest.mark.slow
def test_nothing_happened_to_the_host(attacked):
  _, left, home, came = attacked
  assert not left
  assert (home / "kept.txt").read_text() == "a secret"
  assert os.listdir(home) == ["kept.txt"]
  assert came == 0
  assert "spoilt" not in pathlib.Path(os.__file__).read_text("utf-8")[-99:]


def test_what_loops_or_waits_is_out_of_time(attacked):
  verdicts, *_ = attacked
  assert verdicts["an endless sleep"].error == "out of time"
  assert "secret" not in "".join(v.error for v in verdicts.values())


def test_scripts_are_judged_by_what_they_print(executor):
  jobs = [(text, [("7", "42"), ("8", "42")]) for text in SCRIPTS.values()]
  jobs.append(("print(int(input()) * 6)", [("7", "42\n"), ("8", " 48")]))
  jobs.append(("print(42)", [("7", "42"), ("8", "48")]))
  jobs.append(("if __name__ == '__main__': print(42); exit()", [("", "42")]))
  jobs.append(("print(42)", []))
  verdicts = executor.check_all(jobs, workers=8)
  errors = dict(zip(SCRIPTS, (v.error for v in verdicts), strict=False))
  assert errors == {
    "waits": "input 0: out of time",
    "floods": "input 0: more than 4096 bytes of output",
    "exits": "input 0: wrong output",
    "fails behind its answer": "input 0: exit code 1",
    "asks for the answers": "input 0: wrong output",
    "prints twice": "input 0: wrong output",
    "is no Python": "input 0: exit code 1",
  }
  last = [(v.passed, v.error) for v in verdicts[len(SCRIPTS) :]]
  assert last == [
    (True, ""),
    (False, "input 1: wrong output"),
    (True, ""),
    (False, "no tests"),
  ]


def test_inputs_may_be_longer_in_all_than_a_programs_message(executor):
  text = "7" * (9 << 20)
  tests = [(text, f"{len(text)}")] * 2
  verdict = sandbox.Sandbox(executor.backend).check(
    "print(len(input()))", tests
  )
  assert (verdict.passed, verdict.error) == (True, "")


def test_a_builtin_is_pythons_unless_it_is_replaced(executor):
  program = "def sum(a, b): return a + b\nall = lambda _: True"
  tests = "assert sum(10, 15) == 25"
  verdicts = executor.check_all(
    [
      (program, tests, ["sum"]),
      (program, tests),
      (program, f"{tests} and all([False])", ["sum"]),
    ]
  )
  assert [v.passed for v in verdicts] == [True, False, False]


def test_a_script_that_closes_its_output_and_waits(executor):
  limits = dataclasses.replace(executor.limits, wall=0.5)
  verdict = dataclasses.replace(executor, limits=limits).check(
    "import os, time\nos.close(1)\ntime.sleep(99)", [("", ""), ("", "")]
  )
  assert verdict.error == "input 0: out of time"
  assert verdict.seconds < 8  # and not until the whole sandbox ends, at 6 more


def test_what_is_right_passes(executor):
  """Values of every kind, objects, errors and modules go there and back."""
  program = """
import math, re, collections
Point = collections.namedtuple("Point", "x y")
class Node:
  def __init__(self, value): self.value, self.next = value, None
class Bag(dict): pass
LIMIT = 7
def same(x): return x
def sort(x): x.sort()
def grow(x, *, key): x[key] = [1]; return None
def last(node):
  while node.next: node = node.next
  return node.value
def count(n): yield from range(n)
def fail(): raise KeyError("no")
def own(): raise type("Own", (Exception,), {})("mine")
"""
  tests = """
for x in (None, True, 3, -0.5, "né\\ud800", b"\\x00", [1, (2,)], {1, 2}, 1j,
          {(1, 2): [3]}, 7**4000, float("inf"), frozenset([1]), [], ()):
  got = same(x)
  assert got == x and type(got) is type(x), x
assert str(same(float("nan"))) == "nan"
x, y = [3, 1, 2], {}
assert sort(x) is None and x == [1, 2, 3]
grow(y, key="k"); assert y == {"k": [1]}
assert Point(1, 2).x == 1 if hasattr(Point(1, 2), "x") else True
a, b = Node(1), Node(2)
a.next = b
assert last(a) == 2 and a.next == b and a != b and LIMIT == 7
assert list(count(3)) == [0, 1, 2] and math.pi > 3
assert isinstance(same({"a": 1}), dict) and Bag() == {}
for function, kind in (fail, KeyError), (own, Exception):
  try: function()
  except kind as error: caught = str(error)
  else: raise AssertionError
assert "mine" in caught
assert count(0) and not same([])
"""
  good = executor.check(program, tests)
  assert good == sandbox.Verdict(True, "", good.seconds)


def test_threads_processes_and_event_loops_work(executor):
  program = """
import asyncio, os, subprocess, threading
def by_thread():
  found = []
  thread = threading.Thread(target=found.append, args=(1,))
  thread.start(); thread.join()
  return found
def by_process():
  return subprocess.run(["/bin/echo", "2"], capture_output=True).stdout
def by_loop():
  async def later(): await asyncio.sleep(0.001); return 3
  return asyncio.run(later())
def spaces(names): return [os.readlink(f"/proc/self/ns/{n}") for n in names]
"""
  names = ["pid", "net", "ipc", "uts", "mnt"]
  ours = [os.readlink(f"/proc/self/ns/{name}") for name in names]
  tests = f"""
assert by_thread() == [1] and by_process() == b"2\\n" and by_loop() == 3
for ours, its in zip({ours}, spaces({names})): assert ours != its, ours
"""
  verdict = executor.check(program, tests)
  assert verdict.passed, verdict.error


def test_a_wrong_answer_says_which_test(executor):
  verdicts = executor.check_all(
    [
      ("def f(): return 1", "assert f() == 2, 'two'"),
      ("def f(:", "f()"),
      ("def g(): pass", "f()"),
      ("def f(): return 1", "assert f() == "),
      ("def f(x): return 1", "f(lambda: 0)"),
      ("", "raise SystemExit(0)"),
    ]
  )
  errors = [v.error for v in verdicts]
  assert errors[0] == "AssertionError: two"
  assert errors[1].startswith("SyntaxError") and "solution.py" in errors[1]
  assert errors[2] == "NameError: name 'f' is not defined"
  assert errors[3].startswith("SyntaxError") and "tests.py" in errors[3]
  assert "pass a function to the program" in errors[4]
  assert errors[5] == "SystemExit: 0"


def test_without_a_sandbox_nothing_is_run(monkeypatch):
  monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
  with pytest.raises(ValueError) as error:
    sandbox.find()
  line = str(error.value)
  assert "bwrap is not installed; unshare is not installed" in line
  assert sandbox.FLAG in line and "\n" not in line
  assert sandbox.find(allow_unsandboxed_execution=True) == "none"


def test_a_sandbox_that_fails_is_passed_over(monkeypatch):
  monkeypatch.setattr(sandbox.shutil, "which", lambda name: name)
  broken = {"bwrap": lambda *_: ["false"], "unshare": lambda *_: []}
  monkeypatch.setattr(backends, "COMMANDS", broken)
  assert sandbox.find() == "unshare"
  broken["unshare"] = broken["bwrap"]
  with pytest.raises(ValueError, match="bwrap fails .ended without a verdict"):
    sandbox.find()
  broken["none"] = broken["bwrap"]
  with pytest.raises(ValueError, match="none fails .ended without a") as error:
    sandbox.find(allow_unsandboxed_execution=True)
  assert sandbox.FLAG not in str(error.value)
  monkeypatch.setattr(sandbox.sys, "platform", "darwin")
  with pytest.raises(ValueError, match="on Linux alone, not darwin"):
    sandbox.find(allow_unsandboxed_execution=True)


def test_a_kernel_without_the_filter_is_named(executor, monkeypatch):
  bad = b"\0" * 7 + b"\1"  # Linux refuses it
  monkeypatch.setattr(seccomp, "assemble", lambda: bad)
  verdict = executor.check("def f(): return 1", "assert f() == 1")
  assert verdict.error == "OSError: this kernel has no seccomp"


def test_a_machine_whose_calls_are_not_known_is_refused(monkeypatch):
  with pytest.raises(ValueError, match="for riscv64, only for x86_64, aarch64"):
    seccomp.assemble("riscv64")
  monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
  monkeypatch.setattr(sandbox.shutil, "which", lambda name: name)
  with pytest.raises(ValueError, match="bwrap fails .no filter of system call"):
    sandbox.find()
  assert sandbox.find(allow_unsandboxed_execution=True) == "none"


def test_a_busy_machine_is_told_from_a_wrong_program(executor, monkeypatch):
  """What ended for want of time runs again; CPU time is the program's own."""
  patient = dataclasses.replace(
    executor, limits=dataclasses.replace(LIMITS, wall=30.0)
  )
  loops = [
    ("def f():\n  while True: pass", "f()"),
    ("while True: pass", [("", "42")]),
  ]
  errors = [verdict.error for verdict in patient.check_all(loops)]
  assert errors == ["Failed: out of CPU time", "input 0: out of CPU time"]
  assert not any(map(sandbox.doubt, errors))
  assert sandbox.doubt("Failed: input 1: out of time") is None  # as one may say
  assert sandbox.doubt("input 12: out of time") == sandbox.OUT_OF_TIME
  assert sandbox.doubt("out of time") == sandbox.OUT_OF_TIME
  assert sandbox.doubt("ended without a verdict: x") == sandbox.NO_VERDICT
  lost, run = f"{sandbox.NO_VERDICT}: ", []
  first = {"slow": "out of time", "lost": lost, "bad": "TypeError"}

  def check(self, name):
    run.append(name)
    again = run.count(name) > 1
    return sandbox.Verdict(again, "" if again else first[name])

  monkeypatch.setattr(sandbox.Sandbox, "check", check)
  found = executor.check_all([(name,) for name in first])
  assert [v.passed for v in found] == [True, True, False]
  assert run[3:] == ["slow", "lost"]


def test_a_verdict_needs_the_nonce(monkeypatch):
  """What is said without it, or with another, is not a pass."""
  executor = sandbox.Sandbox("none")
  for report in '{"error": null}', '{"error": null, "nonce": "0"}', "[]", "":
    said = ["echo", "-n", f"{len(report):10}{report}"]
    monkeypatch.setattr(sandbox, "_python", lambda said=said: said)
    verdict = executor.check("def f(): return 1", "assert f() == 1")
    assert not verdict.passed
    assert "ended without a verdict" in verdict.error


def test_a_limit_is_a_number():
  executor = sandbox.Sandbox("none", sandbox.Limits(cpu=0))
  with pytest.raises(ValueError, match="limit cpu=0 is not above 0"):
    executor.check("", "")


@pytest.mark.parametrize(
  "got, wanted, same",
  [
    ("1 2\n", "1\n2", True),
    ("0.30000000001", "0.3", True),
    ("3.0", "3", False),
    ("1", "1 2", False),
    ("nan", "0.5", False),
    ("yes", "YES", False),
    ("", "", True),
  ],
)
def test_same_output(got, wanted, same):
  assert sandbox.same_output(got, wanted) is same
