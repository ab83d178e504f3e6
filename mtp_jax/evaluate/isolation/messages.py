"""Messages between the processes of a sandbox: JSON, and values in it."""

import json
import os

_MOST = 1 << 24  # bytes of a program's message
_PLAIN = {type(None), bool, int, float, str}
_MANY = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_RAW = {"bytes": bytes, "bytearray": bytearray}


def receive(descriptor: int, most: int = _MOST):
  """A message: its length in ten digits, then JSON. None: there is none.

  Raises:
    ValueError: it has more than `most` bytes.
  """
  size = _read(descriptor, 10)
  if not size:
    return None
  if int(size) > most:
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
