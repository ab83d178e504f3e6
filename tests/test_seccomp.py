"""The filter of system calls, read as Linux reads it."""

import errno
import pathlib
import struct

import pytest

from mtp_jax.evaluate.isolation import seccomp

HEADER = pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
ALLOWED, FAILS = 0x7FFF0000, 0x00050000
EPERM = FAILS | errno.EPERM
# Machine: its number in linux/audit.h, clone, clone3, and calls of every day.
MACHINES = {
  "x86_64": (0xC000003E, 56, 435, {"read": 0, "mmap": 9, "execve": 59}),
  "aarch64": (0xC00000B7, 220, 435, {"read": 63, "mmap": 222, "execve": 221}),
}


def answer(machine: str, number: int, *args: int, audit=None) -> int:
  """What the filter says of a call, by classic BPF's definition."""
  audit = MACHINES[machine][0] if audit is None else audit
  data = struct.pack("IIQ6Q", number, audit, 0, *[*args, *6 * [0]][:6])
  lines = list(struct.iter_unpack("HBBI", seccomp.assemble(machine)))
  place = word = 0
  while True:
    code, yes, no, operand = lines[place]
    place += 1
    if code == 0x06:
      return operand
    if code == 0x20:
      (word,) = struct.unpack_from("I", data, operand)
      continue
    jump = {
      0x15: word == operand,
      0x35: word >= operand,
      0x45: bool(word & operand),
    }
    place += yes if jump[code] else no


@pytest.mark.parametrize("machine", MACHINES)
def test_what_the_filter_says(machine):
  _, clone, clone3, daily = MACHINES[machine]
  place = [*MACHINES].index(machine)
  for name, numbers in seccomp._DENIED.items():
    assert answer(machine, numbers[place]) == EPERM, name
  for name, number in daily.items():
    assert answer(machine, number) == ALLOWED, name
    assert answer(machine, number, audit=0x40000003) == EPERM  # of 32 bits
  assert answer(machine, clone3) == FAILS | errno.ENOSYS
  assert answer(machine, clone, 0x003D0F00) == ALLOWED  # as a thread begins
  for bit in (17, *range(25, 31)):  # CLONE_NEWNS, CLONE_NEWCGROUP..NEWNET
    assert answer(machine, clone, 1 << bit | 17) == EPERM, bit


def test_calls_of_the_x32_interface_fail():
  assert answer("x86_64", 1 << 30 | 319) == EPERM
  assert answer("x86_64", 1 << 30) == EPERM


def test_the_numbers_are_linuxs():
  """Those of x86_64, where the C library's headers are installed."""
  try:
    lines = HEADER.read_text("utf-8").splitlines()
  except FileNotFoundError:
    pytest.skip("the headers are not installed")
  known = dict(
    line.removeprefix("#define __NR_").split()
    for line in lines
    if line.startswith("#define __NR_")
  )
  found = {name: str(numbers[0]) for name, numbers in seccomp._DENIED.items()}
  assert found.items() <= known.items()
