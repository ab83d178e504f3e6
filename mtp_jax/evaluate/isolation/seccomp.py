"""A filter of system calls: no memory beyond the limits, no new namespace.

RLIMIT_AS bounds what a process maps. Some calls hold memory that is not mapped:
files of `memfd_create`, System V segments and queues, buffers of sockets that
`setsockopt` widens, pages lent to a pipe. In a user namespace of its own a
program could mount file systems in memory, and reach more of the kernel. These
calls fail with EPERM.

The filter is a program of classic BPF, which Linux runs for each call. It needs
no right and no package, and no child can take it off. See
Documentation/userspace-api/seccomp_filter.rst of Linux.
"""

import errno
import platform
import struct

# Of each call, its number on x86_64, and on aarch64.
_DENIED = {
  "memfd_create": (319, 279),
  "memfd_secret": (447, 447),
  "shmget": (29, 194),
  "msgget": (68, 186),
  "semget": (64, 190),
  "socket": (41, 198),  # not socketpair, with which event loops wake themselves
  "setsockopt": (54, 208),
  "vmsplice": (278, 75),  # a pipe keeps a whole huge page for each byte
  "splice": (275, 76),
  "tee": (276, 77),
  "io_setup": (206, 0),  # the host has so many, for all users
  "io_uring_setup": (425, 425),
  "bpf": (321, 280),
  "unshare": (272, 97),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NAMESPACES = 0x7E020000  # of clone's flags: CLONE_NEW...
# As linux/audit.h names the machines, and what follows their own calls: on
# x86_64, from this number on, those of the x32 interface.
_MACHINES = {
  "x86_64": (0xC000003E, 1 << 30),
  "aarch64": (0xC00000B7, 1 << 32),
}
# struct seccomp_data: the call's number, the machine, ..., the first argument.
_NUMBER, _MACHINE, _FLAGS = 0, 4, 16
# BPF: load a word, jump, return.
_LOAD, _EQUAL, _FROM, _ANY, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000


def assemble(machine: str | None = None) -> bytes:
  """The filter, as an array of `struct sock_filter`.

  Args:
    machine: as `platform.machine` calls it; None: this one.

  Raises:
    ValueError: the numbers of its system calls are not known.
  """
  machine = machine or platform.machine()
  if machine not in _MACHINES:
    raise ValueError(
      f"no filter of system calls for {machine}, only for "
      f"{', '.join(_MACHINES)}"
    )
  name, end = _MACHINES[machine]
  place = [*_MACHINES].index(machine)
  # (a jump's code and operand): it leads to a refusal, or else to the next.
  denied = [(_EQUAL, numbers[place]) for numbers in _DENIED.values()]
  if end < 1 << 32:
    denied.append((_FROM, end))
  lines = [
    (_LOAD, 0, 0, _MACHINE),
    (_EQUAL, 1, 0, name),  # programs of 32 bits have other numbers
    (_RETURN, 0, 0, _FAIL | errno.EPERM),
    (_LOAD, 0, 0, _NUMBER),
  ]
  for code, operand in denied:
    lines += [(code, 0, 1, operand), (_RETURN, 0, 0, _FAIL | errno.EPERM)]
  # The flags of clone3 are in memory, where no filter can look. Without it, the
  # C library calls clone.
  lines += [
    (_EQUAL, 0, 1, _CLONE3[place]),
    (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
    (_EQUAL, 0, 3, _CLONE[place]),
    (_LOAD, 0, 0, _FLAGS),
    (_ANY, 0, 1, _NAMESPACES),
    (_RETURN, 0, 0, _FAIL | errno.EPERM),
    (_RETURN, 0, 0, _ALLOW),
  ]
  return b"".join(struct.pack("HBBI", *line) for line in lines)
