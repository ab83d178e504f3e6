"""Programs that try to pass without the right answer, as in `hostile`."""

ASSERT = "assert f() == 42"
# What an attack that finds the nonce, or a descriptor, then does.
FORGE = """
import json, os
def forge(nonce, descriptors=range(256)):
  data = json.dumps({"error": None, "nonce": nonce}).encode()
  for fd in descriptors:
    try: os.write(fd, b"%10d" % len(data) + data)
    except OSError: pass
"""

ATTACKS = {
  "the checker patched": """
import sys
checker = sys.modules["mtp_jax.evaluate.isolation.checker"]
checker.check = lambda *_: {"error": None}
checker.Program.call = lambda *_: 42
checker.Remote.__eq__ = lambda *_: True
def f(): return checker
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
}

# Speaks with the checker itself, and hands it functions for its builtins.
_REPLIES = """
import json, os, sys
frame = sys._getframe()
while "replies" not in frame.f_locals: frame = frame.f_back
requests, replies = (frame.f_locals[n] for n in ("requests", "replies"))
def read(size):
  data = b""
  while len(data) < size: data += os.read(requests, size - len(data))
  return data
def send(reply):
  data = json.dumps(["returned", reply]).encode()
  os.write(replies, b"%10d" % len(data) + data)
send(None)
while True:
  asked = json.loads(read(int(read(10))))
  if asked[0] == "names":
    names = "f", "abs", "set", "len", "round", "range", "__import__"
    own = [[n, ["object", ["remote", int(n == "range")]]] for n in names]
    send(["dict", own + [["__builtins__", ["dict", own]]]])
  else:
    send(["tuple", [["list", []] if asked[1] else 0.0, asked[3][1][0]]])
"""

# What an object may say of itself, by other tests; and replies of its own.
OBJECTS = {
  "an abs of its own": (_REPLIES, "assert abs(f() - 42) < 1e-6"),
  "a set of its own": (_REPLIES, "assert set(f()) == set((4, 2))"),
  "a range of its own": (
    _REPLIES,
    "for i in range(1, 9):\n  assert f(i) == i * i",
  ),
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
