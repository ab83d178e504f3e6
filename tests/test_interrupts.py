"""Ctrl-C, SIGTERM and closed pipes end a program at once and quietly."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

PROGRAM = r"""
import contextlib, hashlib, signal, sys, time, warnings
import rich.console
from experiments.startup import interrupts, program
from mtp_jax.train import processes

def compile():  # like a compiler: long, not in Python
  print("compiling", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def train():
  with processes.stop_signals() as asked:
    asked.watch()
    compile()

def take_over():
  interrupts.PATIENCE = 9  # a busy machine may not run this within 3 seconds
  with processes.stop_signals() as asked:
    try:
      print("compiling", flush=True)
      while True:  # a signal just before a sleep would not end that sleep
        time.sleep(0.1)
    except KeyboardInterrupt:
      pass  # Python ignores it in a finalizer
    asked.watch()
    print("stopped" if asked.wait(40) else "lost")

def take_over_first():  # before the thread can look at the handler
  interrupts.PATIENCE = 9
  sys.setswitchinterval(9)
  with processes.stop_signals() as asked:
    try:
      signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
      pass
    asked.watch()
    sys.setswitchinterval(0.005)
    print("stopped" if asked.wait(40) else "lost")

def texts():
  interrupts.PATIENCE = 0.5
  signal.signal(signal.SIGINT, interrupts.stop_text)
  for work in (lambda: time.sleep(99), lambda: time.sleep(99), compile):
    try:
      print("text", flush=True)
      work()
    except KeyboardInterrupt:
      pass

def write():
  while True:
    print("text")

def show():
  while True:
    rich.console.Console().print("text")

def say():
  warnings.warn("the first\nof two lines")
  print("na\u00efve \u4e2d \udc80")

main = globals()[sys.argv.pop()]
program.start(lambda _: main())
"""


def started(name, **variables):
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, name],
    env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def test_ctrl_c_ends_a_program_where_python_does_not_run():
  process = started("compile")
  assert process.stdout.readline() == b"compiling\n"
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, b"interrupted\n")


@pytest.mark.slow
def test_a_training_that_begins_hears_of_a_ctrl_c_that_python_ignored():
  """Its loop takes the signal over while the program is to end."""
  running = [started(name) for name in ("take_over", "take_over_first")]
  assert running[0].stdout.readline() == b"compiling\n"
  running[0].send_signal(signal.SIGINT)
  for process in running:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"stopped\n"), err


def test_ctrl_c_stops_a_text_and_twice_the_program():
  """Also where Python does not run, in the third text."""
  process = started("texts")
  for _ in range(2):
    assert process.stdout.readline() == b"text\n"
    time.sleep(0.6)  # not within the same half second
    process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == b"text\n"
  assert process.stdout.readline() == b"compiling\n"
  time.sleep(0.6)
  process.send_signal(signal.SIGINT)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(1)
  while process.poll() is None:
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, b"interrupted\n")


@pytest.mark.parametrize("number, code", [(2, 130), (15, 143)])
def test_the_second_signal_to_a_training_ends_it_at_once(number, code):
  process = started("train")
  assert process.stdout.readline() == b"compiling\n"
  process.send_signal(number)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(0.5)  # it would save after this step
  for _ in range(60):  # two that wait on a busy machine are one to the system
    process.send_signal(number)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(1)
      break
  _, err = process.communicate(timeout=60)
  assert process.returncode == code
  # The first may have met Python, which says that it is saving.
  assert err.endswith(b"interrupted\n") and err.count(b"\n") < 3


def test_a_closed_pipe_and_a_poor_encoding_are_no_errors():
  """Side by side: most of their time is the imports."""
  processes = {
    name: started(name, PYTHONIOENCODING="latin-1")
    for name in ("write", "show", "say")
  }
  for name in ("write", "show"):
    assert processes[name].stdout.readline() == b"text\n"
    processes[name].stdout.close()
    assert processes[name].wait(60) == 141
    assert processes[name].stderr.read() == b""
  out, err = processes["say"].communicate(timeout=60)
  assert processes["say"].returncode == 0
  assert out == b"na\xefve ? ?\n"
  assert err == b"warning: the first of two lines\n"
