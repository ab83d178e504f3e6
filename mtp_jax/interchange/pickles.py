"""The pickles in files of `torch.save`, without torch and without `pickle`.

A pickle is a program, which can call any function of Python. This module
interprets it itself: of the functions that it may name, `OrderedDict` and the
one that makes a tensor become plain values here, and all else is refused before
anything is called.
"""

import math
import pickle
import pickletools
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# Classes of storages in module `torch`, and the numbers that they hold.
_STORAGES = {
  "FloatStorage": np.dtype("<f4"),
  "HalfStorage": np.dtype("<f2"),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "DoubleStorage": np.dtype("<f8"),
  "ComplexFloatStorage": np.dtype("<c8"),
  "ComplexDoubleStorage": np.dtype("<c16"),
  "LongStorage": np.dtype("<i8"),
  "IntStorage": np.dtype("<i4"),
  "ShortStorage": np.dtype("<i2"),
  "CharStorage": np.dtype("i1"),
  "ByteStorage": np.dtype("u1"),
  "BoolStorage": np.dtype("?"),
}
_STORAGE_OF = {str(dtype): name for name, dtype in _STORAGES.items()}
_DICT, _TENSOR = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"
_ALLOWED = {_DICT, _TENSOR, *(f"torch.{name}" for name in _STORAGES)}
_MOST_AXES = 8
_MOST_STEPS = 2**19  # opcodes, read in seconds; a tensor takes about 35


class Tensor(NamedTuple):
  """Where a tensor lies in a storage."""

  storage: str  # its key
  dtype: np.dtype
  size: int  # numbers in the storage
  offset: int  # of the first number in the storage
  shape: tuple[int, ...]
  strides: tuple[int, ...]  # in numbers


def load(program: bytes, storages: dict[str, int]) -> Any:
  """What a pickle makes: a `Tensor`, or dicts, lists and plain values of them.

  Args:
    program: the pickle.
    storages: bytes of each storage, by its key.

  Raises:
    ValueError: the pickle is damaged, needs more than the storages hold, or
      uses what no file of tensors needs.
  """
  interpreter = _Interpreter(storages)
  try:
    opcodes = pickletools.genops(program)
    for step, (opcode, argument, _) in enumerate(opcodes):
      if step == _MOST_STEPS:
        raise _Refused(f"the pickle has more than {_MOST_STEPS} opcodes")
      interpreter.step(opcode.name, argument)
    return interpreter.stack.pop()
  except _Refused as error:
    raise ValueError(str(error)) from error
  except (ValueError, LookupError, TypeError) as error:
    raise ValueError(f"the pickle is damaged ({error})") from error


def dump(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
  """The pickle of a dict of tensors, the i-th of which is all of storage 'i'.

  Args:
    tensors: dtype and shape, by name.
  """
  parts = [pickle.PROTO, b"\x02", _call(_DICT), pickle.MARK]
  for i, (name, (dtype, shape)) in enumerate(tensors.items()):
    storage = _tuple(
      _text("storage"),
      _global(f"torch.{_STORAGE_OF[dtype]}"),
      _text(str(i)),
      _text("cpu"),
      _integer(math.prod(shape)),
    )
    strides = [math.prod(shape[j + 1 :]) for j in range(len(shape))]
    parts += [
      _text(name),
      _call(
        _TENSOR,
        storage + pickle.BINPERSID,
        _integer(0),
        _tuple(*map(_integer, shape)),
        _tuple(*map(_integer, strides)),
        pickle.NEWFALSE,  # requires_grad
        _call(_DICT),  # hooks
      ),
    ]
  return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


class _Refused(Exception):
  """Says what a pickle may not do."""


class _Storage(NamedTuple):
  """The numbers of one or several tensors."""

  key: str
  dtype: np.dtype
  size: int


class _Name(str):
  """A class or function that a pickle names; it is never called."""


class _Interpreter:
  """Runs a pickle, opcode by opcode; errors are those of `load`, or others.

  Values of a pickle may be nested without end, so no message shows them.
  """

  def __init__(self, storages: dict[str, int]):
    self.stack, self._storages = [], storages
    self._marks, self._memo = [], {}

  def step(self, opcode, argument):
    push, pop = self.stack.append, self.stack.pop
    match opcode:
      case "PROTO" | "FRAME" | "STOP":
        pass
      case "MARK":
        self._marks.append(len(self.stack))
      case "NONE":
        push(None)
      case "NEWTRUE" | "NEWFALSE":
        push(opcode == "NEWTRUE")
      case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
        push(argument)
      case "BINUNICODE" | "SHORT_BINUNICODE":
        push(argument)
      case "BINPUT" | "LONG_BINPUT":
        self._memo[argument] = self.stack[-1]
      case "MEMOIZE":
        self._memo[len(self._memo)] = self.stack[-1]
      case "BINGET" | "LONG_BINGET":
        push(self._memo[argument])
      case "EMPTY_DICT":
        push({})
      case "EMPTY_LIST":
        push([])
      case "EMPTY_TUPLE":
        push(())
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        push(tuple(self._last(int(opcode[-1]))))
      case "TUPLE":
        push(tuple(self._since_mark()))
      case "APPEND" | "APPENDS":
        items = self._last(1) if opcode == "APPEND" else self._since_mark()
        self._top(list).extend(items)
      case "SETITEM" | "SETITEMS":
        items = self._last(2) if opcode == "SETITEM" else self._since_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
          if type(key) is not str:
            raise _Refused("a key of the pickle is no text")
          self._top(dict)[key] = value
      case "BUILD":  # attributes of a dict, such as the versions of modules
        pop()
        self._top(dict)
      case "GLOBAL":
        push(self._name(argument.replace(" ", ".", 1)))
      case "STACK_GLOBAL":
        module, name = self._last(2)
        if type(module) is not str or type(name) is not str:
          raise _Refused("the pickle names a function without a name")
        push(self._name(f"{module}.{name}"))
      case "BINPERSID":
        push(self._storage(pop()))
      case "REDUCE":
        arguments = pop()
        push(self._call(pop(), arguments))
      case _:
        raise _Refused(
          f"the pickle uses pickle's opcode {opcode}, which no file of tensors "
          "needs: it may be an attack, and nothing of it was run"
        )

  def _last(self, count):
    if len(self.stack) < count:
      raise ValueError("the stack is empty")
    items = self.stack[len(self.stack) - count :]
    del self.stack[len(self.stack) - count :]
    return items

  def _since_mark(self):
    return self._last(len(self.stack) - self._marks.pop())

  def _top(self, kind):
    if type(self.stack[-1]) is not kind:
      raise ValueError(f"a {kind.__name__} was expected")
    return self.stack[-1]

  def _name(self, name):
    if name not in _ALLOWED:
      raise _Refused(
        f"the pickle names {name!r:.80}, which no file of tensors needs: it "
        "may be an attack, and nothing of it was run"
      )
    return _Name(name)

  def _call(self, name, arguments):
    if type(name) is not _Name or type(arguments) is not tuple:
      raise _Refused("the pickle calls what is no function")
    if name == _DICT and not arguments:
      return {}
    if name == _TENSOR and 6 <= len(arguments) <= 7:
      return self._tensor(*arguments[:4])
    raise _Refused(f"the pickle calls {name} in a way that torch.save does not")

  def _storage(self, key) -> _Storage:
    """The storage that a persistent id names."""
    match key:
      case ("storage", _Name() as kind, str() as name, str(), int() as size):
        kind = _STORAGES.get(kind.removeprefix("torch."))
      case _:
        kind = None
    if kind is None:
      raise _Refused("a persistent id of the pickle is no storage of numbers")
    if name not in self._storages:
      raise _Refused(f"storage {name!r:.60} is missing")
    held = self._storages[name]
    if size * kind.itemsize != held:
      raise _Refused(
        f"storage {name!r:.60} has {held} bytes, but {size} numbers of "
        f"{kind.itemsize} by the pickle"
      )
    return _Storage(name, kind, size)

  def _tensor(self, storage, offset, shape, strides) -> Tensor:
    if type(storage) is not _Storage:
      raise _Refused("the pickle makes a tensor without a storage")
    sound = type(offset) is int and type(shape) is type(strides) is tuple
    sound = sound and len(shape) == len(strides) <= _MOST_AXES
    numbers = (offset, *shape, *strides) if sound else ()
    if not sound or any(type(n) is not int or n < 0 for n in numbers):
      raise _Refused("a tensor has an invalid offset, shape or strides")
    last = offset
    if math.prod(shape):
      steps = zip(shape, strides, strict=True)
      last += 1 + sum((n - 1) * stride for n, stride in steps)
    if last > storage.size:
      raise _Refused(
        f"a tensor of shape {list(shape)} needs {last} numbers of a storage of "
        f"{storage.size}"
      )
    return Tensor(*storage, offset, shape, strides)


def _call(name, *arguments):
  return _global(name) + _tuple(*arguments) + pickle.REDUCE


def _global(name):
  module, name = name.rsplit(".", 1)
  return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*parts):
  return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _text(text):
  raw = text.encode()
  return pickle.BINUNICODE + len(raw).to_bytes(4, "little") + raw


def _integer(number):
  if number < 2**31:
    return pickle.BININT + number.to_bytes(4, "little")
  raw = number.to_bytes(number.bit_length() // 8 + 1, "little")
  return pickle.LONG1 + bytes([len(raw)]) + raw
