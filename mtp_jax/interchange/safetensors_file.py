"""Writes safetensors files, one tensor at a time.

A file is the length of a header (8 bytes, little-endian), the header (JSON: the
dtype, shape and place of each tensor, and metadata), and the tensors' bytes.
The `safetensors` package, which reads these files here, would write them from
arrays that are all in memory.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Entry(NamedTuple):
  """A tensor to be written."""

  shape: tuple[int, ...]
  dtype: str  # 'float32', 'float16' or 'bfloat16'
  make: Callable[[], np.ndarray]  # called once, when its turn comes

  @property
  def size(self) -> int:
    """Bytes."""
    return math.prod(self.shape) * _SIZES[self.dtype]


def write(
  path: pathlib.Path, entries: dict[str, Entry], metadata: dict[str, str]
) -> None:
  """Writes a file, and has it reach the disk.

  Args:
    path: the file.
    entries: by the tensor's name.
    metadata: kept in the header.
  """
  header, end = {"__metadata__": metadata}, 0
  # Larger numbers first: each tensor begins at a multiple of its number's size.
  order = sorted(entries, key=lambda name: -_SIZES[entries[name].dtype])
  for name in order:
    entry = entries[name]
    begin, end = end, end + entry.size
    header[name] = {
      "dtype": _NAMES[entry.dtype],
      "shape": entry.shape,
      "data_offsets": [begin, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
      value = entries[name].make()
      if value.shape != entries[name].shape:
        raise AssertionError(f"{name}: {value.shape}, {entries[name].shape}")
      file.write(value.data if value.dtype.kind == "f" else value.tobytes())
    file.flush()
    os.fsync(file.fileno())
