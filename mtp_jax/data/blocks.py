"""Arrays of one axis on disk, whose blocks are checked whenever they are read.

Files are read with `pread`, not through a memory map: the system kills a
process (SIGBUS) that reads a map beyond the end of a file cut short.
"""

import array
import functools
import os
import pathlib
import weakref
import zlib

import numpy as np

BLOCK = 1 << 13  # bytes that share a checksum; 5 to 15 microseconds to check


class CacheDamaged(ValueError):
  """A packed corpus is not what was written; the message says where."""


class Array:
  """A read-only array on disk: what it returns is what was written.

  Has the length, slices, `searchsorted` and `np.asarray` of a NumPy array.
  Threads may share it; pickled, it sends the path and not the contents.

  Args:
    path: the file, written by `Writer`.
    dtype: of the elements.
    checksums: [blocks], uint32; see `checksums`.
    size: number of elements.

  Raises:
    CacheDamaged: on reading: the file is shorter, or a block has changed.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    dtype: np.dtype | str,
    checksums: np.ndarray,
    size: int,
  ):
    self.path, self.dtype = pathlib.Path(path), np.dtype(dtype)
    self._checksums, self._size = checksums, size
    self._last = -1, b""  # a window asks three times for a block of starts
    self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(self, os.close, self._file)

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, places: slice) -> np.ndarray:
    low, high, step = places.indices(self._size)
    if low >= high:
      return np.zeros(0, self.dtype)
    width = self.dtype.itemsize
    first, last = low * width // BLOCK, -(-high * width // BLOCK)
    raw = b"".join(map(self._block, range(first, last)))
    skip = first * BLOCK // width
    return np.frombuffer(raw, self.dtype)[low - skip : high - skip : step]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy  # always one
    return self[:].astype(dtype or self.dtype)

  def searchsorted(self, value: int, side: str = "left") -> int:
    """As `np.ndarray.searchsorted` of an ascending array; reads one block."""
    block = max(self._firsts.searchsorted(value, side) - 1, 0)
    start = block * (BLOCK // self.dtype.itemsize)
    inside = self[start : start + BLOCK // self.dtype.itemsize]
    return start + int(inside.searchsorted(value, side))

  @functools.cached_property
  def _firsts(self) -> np.ndarray:
    """The first element of each block."""
    step = BLOCK // self.dtype.itemsize
    starts = range(0, self._size, step)
    return np.array([self[i : i + 1][0] for i in starts], self.dtype)

  def _block(self, index: int) -> bytes:
    known, raw = self._last
    if index == known:
      return raw
    start = index * BLOCK
    size = min(BLOCK, self._size * self.dtype.itemsize - start)
    try:
      raw = os.pread(self._file, size, start)
    except OSError as error:
      error.filename = str(self.path)  # a descriptor has no name to tell
      raise
    if len(raw) < size or zlib.crc32(raw) != self._checksums[index]:
      raise CacheDamaged(
        f"{self.path} was damaged while it was in use: bytes {start} to "
        f"{start + size - 1} are not what was packed. They were not used. "
        "Start again: what is damaged is then packed anew. If it happens "
        "again, set data.cache to a folder on another disk"
      )
    self._last = index, raw
    return raw

  def __reduce__(self):
    return Array, (self.path, self.dtype.str, self._checksums, self._size)


class Writer:
  """Writes a new file from front to back, with a checksum per block."""

  def __init__(self, path: pathlib.Path):
    self._path, self._file = path, path.open("xb")
    self._done, self._crc, self._room = array.array("I"), 0, BLOCK

  def write(self, raw: bytes) -> None:
    """Appends bytes; like `close`, raises OSError if the disk is full."""
    self._file.write(raw)
    raw = memoryview(raw)
    while raw:
      part, raw = raw[: self._room], raw[self._room :]
      self._crc = zlib.crc32(part, self._crc)
      self._room -= len(part)
      if not self._room:
        self._done.append(self._crc)
        self._crc, self._room = 0, BLOCK

  def checksum(self) -> int:
    """Checksum of the blocks' checksums, the last and shorter one included."""
    rest = [self._crc] if self._room < BLOCK else []
    return zlib.crc32((self._done + array.array("I", rest)).tobytes())

  def close(self) -> None:
    """Closes the file; nothing can be read after it."""
    self._file.close()


def checksums(path: pathlib.Path) -> np.ndarray:
  """Checksums of a file's blocks as they are now, [blocks], uint32."""
  values = array.array("I")
  with path.open("rb", buffering=1 << 20) as file:
    while block := file.read(BLOCK):
      values.append(zlib.crc32(block))
  return np.frombuffer(values.tobytes(), np.uint32)
