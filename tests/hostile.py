"""Programs that try to do harm, or to pass without the right answer.

Each is (name, program, tests). A program gives the answer that its tests want
only where its attack has succeeded, so that none may pass.
"""

ASSERT = "assert f() == 42"
# What an attack that finds the nonce, or a descriptor, then does.
_FORGE = """
import json, os
def forge(nonce, descriptors=range(256)):
  data = json.dumps({"error": None, "nonce": nonce}).encode()
  for fd in descriptors:
    try: os.write(fd, b"%10d" % len(data) + data)
    except OSError: pass
"""

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
  "the checker patched": """
import sys
main = sys.modules["__main__"]
main.check = lambda *_: {"error": None}
main.Program.call = lambda *_: 42
main.Remote.__eq__ = lambda *_: True
def f(): return main
""",
  "builtins patched": """
import builtins
builtins.compile = lambda *_: None
builtins.exec = lambda *_: None
builtins.AssertionError = builtins.Exception = ValueError
len = abs = lambda *_: 42
def f(): return 0
""",
  "modules replaced": """
import json, os, sys
json.dumps = lambda *_: '["returned", 42]'
os.write = lambda *_: 0
sys.modules["json"] = sys.modules["os"] = sys
def f(): return object()
""",
  "the nonce in a frame": """
import sys
def f():
  frame = sys._getframe()
  while frame:
    for space in frame.f_locals, frame.f_globals:
      if "secret" in space: forge(space["secret"]["nonce"])
    frame = frame.f_back
""",
  "the nonce in the collector's lists": """
import gc
def f():
  for item in gc.get_objects():
    if isinstance(item, dict) and "nonce" in item: forge(item["nonce"])
""",
  "the nonce in memory": """
import re
def f():
  for line in open("/proc/self/maps"):
    begin, end = (int(x, 16) for x in line.split()[0].split("-"))
    if "r" not in line.split()[1] or end - begin > 1 << 26: continue
    try:
      with open("/proc/self/mem", "rb", 0) as memory:
        memory.seek(begin)
        text = memory.read(end - begin)
    except OSError: continue
    for found in re.findall(rb'"nonce": "(\\w{32})"', text)[:9]:
      forge(found.decode())
""",
  "the nonce in a descriptor": """
for fd in os.listdir("/proc/self/fd"):
  try: os.set_blocking(int(fd), False)
  except OSError: continue
  try: text = os.read(int(fd), 9999)
  except OSError: continue
  if b"nonce" in text: forge(text[-34:-2].decode())
def f(): return 0
""",
  "the nonce in the parent's descriptors": """
def f():
  for pid in os.listdir("/proc"):
    if not pid.isdigit() or int(pid) == os.getpid(): continue
    for fd in range(8):
      try: file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_NONBLOCK)
      except OSError: continue
      return 42
""",
  "the nonce in the parent's memory": """
def f():
  if open(f"/proc/{os.getppid()}/mem", "rb", 0): return 42
""",
  "the parent traced": """
import ctypes
def f():
  if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0: return 42
""",
  "the parent's memory copied": """
import ctypes
def f():
  class Part(ctypes.Structure):
    _fields_ = ("base", ctypes.c_void_p), ("size", ctypes.c_size_t)
  text = ctypes.create_string_buffer(8)
  here = Part(ctypes.addressof(text), 8)
  size = ctypes.CDLL(None).process_vm_readv(
    os.getppid(), ctypes.byref(here), 1, ctypes.byref(here), 1, 0)
  if size > 0: return 42
""",
  "gigabytes printed": """
def f():
  for _ in range(10**9): print("x" * 9999)
""",
  "gigabytes returned": """
def f(): return "x" * (100 << 20)
""",
  "an answer too deep to read": """
def f():
  deep = []
  for _ in range(10**5): deep = [deep]
  return deep
""",
  "an exit before the tests": """
import os
os._exit(0)
""",
  "an exit in the tests": """
import sys
def f(): sys.exit(0)
""",
  "work left for the end": """
import atexit
atexit.register(forge, "0" * 32)
def f(): raise SystemExit
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

# What an object may say of itself, by other tests.
_OBJECTS = {
  "an object that equals all": (
    """
class All:
  def __eq__(self, other): return True
  def __ne__(self, other): return False
  __hash__ = None
def f(): return All()
""",
    ASSERT,
  ),
  "a number that equals all": (
    """
class All(int):
  def __eq__(self, other): return True
  def __hash__(self): return 0
def f(): return [All(0)]
""",
    "assert f() == [42]",
  ),
  "an object near to all": (
    """
class All:
  def __sub__(self, other): return 0.0
  __rsub__ = __abs__ = __sub__
  def __lt__(self, other): return True
  __le__ = __gt__ = __ge__ = __lt__
def f(): return All()
""",
    "assert abs(f() - 42) < 1e-6",
  ),
  "an object that holds all": (
    """
class All:
  def __contains__(self, other): return True
  def __lt__(self, other): return True
  def __iter__(self): return iter(())
def f(): return All()
""",
    "assert 42 in f()",
  ),
}


def programs(home: str, port: int) -> list[tuple[str, str, str]]:
  """Name, program and tests of each.

  Args:
    home: folder of the host, with kept.txt.
    port: of the host, at which a server listens.
  """

  def filled(text):
    return _FORGE + text.replace("HOME", home).replace("PORT", str(port))

  plain = [(name, filled(text), ASSERT) for name, text in _ATTACKS.items()]
  return plain + [(name, *both) for name, both in _OBJECTS.items()]
