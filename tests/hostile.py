"""Programs that try to do harm, and `cheating`'s.

Each is (name, program, tests). A program gives the answer that its tests want
only where its attack has succeeded, so that none may pass.
"""

from tests import cheating

_ATTACKS = {
  "a fork bomb": """
import os
while True: os.fork()
""",
  "a fork bomb that waits": """
import os, time
def f():
  for _ in range(40):
    if not os.fork(): time.sleep(60)
  return 42
""",
  "a memory bomb": """
def f():
  return 42 if bytearray(8 << 30) else 0
""",
  "memory by many processes": """
import os, time
def f():
  for _ in range(40):
    if not os.fork():
      block = bytearray(400 << 20)
      time.sleep(60)
  return 42
""",
  "memory in files that no folder has": """
import os
def f():
  files = [os.memfd_create("x") for _ in range(3)]
  if all(os.write(file, bytes(15 << 20)) == 15 << 20 for file in files):
    return 42
""",
  "memory in System V segments": """
import ctypes
def f():
  c = ctypes.CDLL(None)
  c.shmat.restype, c.shmdt.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
  for _ in range(3):
    place = c.shmat(c.shmget(0, 15 << 20, 0o1600), None, 0)
    ctypes.memset(place, 1, 15 << 20)
    if c.shmdt(place) != 0: return
  return 42
""",
  "memory in System V queues": """
import ctypes
def f():
  c = ctypes.CDLL(None)
  message = ctypes.create_string_buffer(b"1", 8008)
  queues = [c.msgget(0, 0o1600) for _ in range(999)]
  if not any(c.msgsnd(q, message, 8000, 0o4000) for q in queues): return 42
""",
  "memory in a file system of its own": """
import ctypes, os
def f():
  c, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
  c.prctl(4, 1, 0, 0, 0)
  if c.unshare(0x10000000 | 0x00020000) != 0: return
  for name, text in {
    "setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"
  }.items(): open(f"/proc/self/{name}", "w").write(text)
  if c.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, b"size=99m") != 0: return
  for i in range(3): open(f"/tmp/{i}", "wb").write(bytes(15 << 20))
  return 42
""",
  "a namespace of its own, by clone": """
import ctypes, os
def f():
  c = ctypes.CDLL(None)
  clone = 56 if os.uname().machine == "x86_64" else 220
  pid = c.syscall(clone, 0x10000000 | 17, 0, 0, 0, 0)
  if pid == 0: os._exit(0)
  if pid > 0: return 42
""",
  "memory in the buffers of sockets": """
import socket
def f():
  pairs = [socket.socketpair() for _ in range(9)]
  for a, _ in pairs:
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
    a.setblocking(False)
    for _ in range(4): a.send(bytes(1 << 16))
  return 42
""",
  "memory that was lent to pipes": """
import ctypes, mmap, os
class Part(ctypes.Structure):
  _fields_ = ("base", ctypes.c_void_p), ("size", ctypes.c_size_t)
def f():
  c, (_, pipe) = ctypes.CDLL(None), os.pipe()
  for _ in range(9):
    with mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANON) as pages:
      pages.madvise(mmap.MADV_HUGEPAGE)
      pages[:] = bytes(4 << 20)
      part = Part(ctypes.addressof(ctypes.c_char.from_buffer(pages)), 1)
      if c.vmsplice(pipe, ctypes.byref(part), 1, 0) != 1: return
  return 42
""",
  "an endless loop that ignores signals": """
import signal
for number in range(1, 65):
  try: signal.signal(number, signal.SIG_IGN)
  except (OSError, ValueError): pass
while True: pass
""",
  "an endless sleep": """
import time
def f():
  while True: time.sleep(60)
""",
  "limits raised again": """
import resource
def f():
  for name in "CPU", "AS", "NPROC", "FSIZE":
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (-1, -1))
  return 42
""",
  "a file deleted": """
import os
def f():
  os.remove("HOME/kept.txt")
  return 42
""",
  "a file deleted by the C library": """
import ctypes
def f():
  if ctypes.CDLL(None).unlink(b"HOME/kept.txt") == 0: return 42
""",
  "a folder deleted": """
import shutil
def f():
  shutil.rmtree("HOME")
  return 42
""",
  "a file written": """
def f():
  open("HOME/kept.txt", "w").write("spoilt")
  return 42
""",
  "a secret read": """
def f():
  return 42 if "secret" in open("HOME/kept.txt").read() else 0
""",
  "the interpreter overwritten": """
import os
def f():
  open(os.__file__, "a").write("# spoilt")
  return 42
""",
  "a connection to this machine": """
import socket
def f():
  socket.create_connection(("127.0.0.1", PORT), 2)
  return 42
""",
  "a datagram sent": """
import socket
def f():
  socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(
    b"x", ("127.0.0.1", PORT))
  return 0  # that it was sent says nothing: it may not arrive
""",
  "the parent killed": """
import os
os.kill(os.getppid(), 9)
raise SystemExit
""",
  "the parent stopped": """
import os, signal
os.kill(os.getppid(), signal.SIGSTOP)
while True: os.kill(os.getpid(), signal.SIGSTOP)
""",
  "every process killed": """
import os
os.kill(-1, 9)
raise SystemExit
""",
  "gigabytes printed": """
def f():
  for _ in range(10**9): print("x" * 9999)
""",
  "gigabytes returned": """
def f(): return "x" * (100 << 20)
""",
  "deep recursion": """
import sys
sys.setrecursionlimit(10**9)
def f(): return f()
""",
  "a crash": """
import ctypes
def f(): return ctypes.string_at(0)
""",
  "threads that outlive it": """
import threading, time
for _ in range(4): threading.Thread(target=time.sleep, args=(60,)).start()
def f(): raise SystemExit
""",
  "a daemon": """
import os, time
if not os.fork():
  os.setsid()
  if not os.fork(): time.sleep(60)
  os._exit(0)
def f(): return 0
""",
  "the disk filled": """
def f():
  for i in range(99): open(f"/tmp/{i}", "wb").write(bytes(8 << 20))
  return 42
""",
  "a file that is too large": """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def f():
  with open("/tmp/x", "wb") as file:
    for _ in range(99): file.write(bytes(1 << 20))
  return 42
""",
  "another user": """
import os
def f():
  os.setuid(0 if os.getuid() else 1)
  return 42
""",
  "a namespace of its own, and a mount in it": """
import ctypes
def f():
  c = ctypes.CDLL(None)
  c.unshare(0x10000000 | 0x00020000)
  if c.mount(b"/usr", b"/usr", None, 32 | 4096, None) == 0 and (
    c.umount2(b"/usr", 2) == 0 and c.umount2(b"/usr", 2) == 0): return 42
""",
  "settings of the kernel": """
def f():
  open("/proc/sys/vm/drop_caches", "w").write("0")
  return 42
""",
}


def programs(home: str, port: int) -> list[tuple[str, str, str]]:
  """Name, program and tests of each.

  Args:
    home: folder of the host, with kept.txt.
    port: of the host, at which a server listens.
  """

  values = {"HOME": home, "PORT": port}
  found = []
  for name, text in (_ATTACKS | cheating.ATTACKS).items():
    for word, value in values.items():
      text = text.replace(word, str(value))
    found.append((name, cheating.FORGE + text, cheating.ASSERT))
  return found + [(name, *both) for name, both in cheating.OBJECTS.items()]
