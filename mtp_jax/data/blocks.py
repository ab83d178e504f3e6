"""Arrays on disk, whose blocks are verified whenever they are read.

Files are read with `pread` and not through a memory map: if a mapped file is
truncated, the system kills the process that reads it (SIGBUS).
"""

import array
import functools
import os
import pathlib
import weakref
import zlib

import numpy as np

BLOCK = 1 << 13  # bytes per checksum; verifying takes 5 to 15 microseconds


class CacheDamaged(ValueError):
  """A packed corpus has changed on the disk since it was written."""


class Array:
  """A read-only array [size] on disk, verified on every read.

  Like a NumPy array it supports `len`, slices, `searchsorted` and `np.asarray`.
  Threads may share it. Pickling stores the path, not the elements.

  Args:
    path: the file, written by `Writer`.
    dtype: of the elements.
    checksums: [blocks], uint32; see `checksums`.
    size: number of elements.

  Raises:
    CacheDamaged: by a read, if a block has changed or the file is too short.
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
    # The last block read, and its bytes: `Packed.window` reads a block of
    # `starts` three times.
    self._last = -1, b""
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
    del copy  # this always copies
    return self[:].astype(dtype or self.dtype)

  def searchsorted(self, value: int, side: str = "left") -> int:
    """Like `np.searchsorted` on an ascending array; reads one block."""
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
    """The bytes of a block; CacheDamaged if its checksum differs."""
    last, raw = self._last
    if index == last:
      return raw
    start = index * BLOCK
    size = min(BLOCK, self._size * self.dtype.itemsize - start)
    try:
      raw = os.pread(self._file, size, start)
    except OSError as error:
      error.filename = str(self.path)  # `os.pread` knows no name
      raise
    if len(raw) < size or zlib.crc32(raw) != self._checksums[index]:
      raise CacheDamaged(
        f"{self.path} was damaged while it was in use: bytes {start} to "
        f"{start + size - 1} are not what was packed. They were not used. "
        "Start again: the damaged corpus is then packed anew. If it happens "
        "again, set data.cache to a folder on another disk"
      )
    self._last = index, raw
    return raw

  def __reduce__(self):
    return Array, (self.path, self.dtype.str, self._checksums, self._size)


class Writer:
  """Writes a new file sequentially and computes a checksum per block."""

  def __init__(self, path: pathlib.Path):
    self._path, self._file = path, path.open("xb")
    self._done = array.array("I")  # checksums of full blocks
    self._crc, self._left = 0, BLOCK  # of the current block; its bytes left

  def write(self, raw: bytes) -> None:
    """Appends bytes. This or `close` raises OSError if the disk is full."""
    self._file.write(raw)
    raw = memoryview(raw)
    while raw:
      part, raw = raw[: self._left], raw[self._left :]
      self._crc = zlib.crc32(part, self._crc)
      self._left -= len(part)
      if not self._left:
        self._done.append(self._crc)
        self._crc, self._left = 0, BLOCK

  def checksum(self) -> int:
    """The checksum of all blocks' checksums; the last block may be shorter."""
    rest = [self._crc] if self._left < BLOCK else []
    return zlib.crc32((self._done + array.array("I", rest)).tobytes())

  def close(self) -> None:
    """Closes the file, which is complete then."""
    self._file.close()


def checksums(path: pathlib.Path) -> np.ndarray:
  """Computes the checksums of a file's blocks: [blocks], uint32."""
  values = array.array("I")
  with path.open("rb", buffering=1 << 20) as file:
    while block := file.read(BLOCK):
      values.append(zlib.crc32(block))
  return np.frombuffer(values.tobytes(), np.uint32)
