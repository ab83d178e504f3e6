"""Where documents come from: files and records, checked and in fixed order.

Files are read in the order of a hash of their names, so that a corpus cut by
`max_bytes` is a sample of the whole and not its first folder. Names are
relative to the corpus: the order does not depend on where it lies.
"""

import collections
import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import zstandard
from array_record.python import array_record_module

from mtp_jax import config

PIECE = 1 << 16  # bytes; a longer text file becomes several documents
_NAMES = {  # of the files wanted in a folder
  "python": r"\.py$",
  "text": r"",
  "jsonl": r"\.jsonl(\.gz|\.zst)?$",
  "array_record": r"\.array_record(-\d+-of-\d+)?$",
}
_ROOTS = (  # of Python: sysconfig's label, prefix of the names, left out
  ("stdlib", "stdlib", ("site-packages", "dist-packages")),
  ("purelib", "packages", ()),
  ("platlib", "packages", ()),
)


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and where it comes from: 'path' or 'path:line'."""

  name: str
  text: bytes  # UTF-8


class _Damage(NamedTuple):
  reason: str  # few different ones, to count by
  detail: str


def read(
  data: config.Data, skipped: collections.Counter | None = None
) -> Iterator[Document]:
  """Documents of a corpus, one at a time, in a fixed order.

  `python` takes the .py files of the running interpreter's standard library
  and packages, `text` the files of a folder, `jsonl` one field of each line,
  `array_record` each record. `text` and `jsonl` may be .gz or .zst. Hidden
  files are left out. A text file above 64 KiB is cut at a line end into
  several documents, so that one long file is a corpus too. Documents without
  a byte are left out and counted.

  Args:
    data: `source`, `path`, `field`, `max_bytes` and `on_error` are used. The
      last document is cut, between characters, to keep `max_bytes`.
    skipped: takes the number of records left out, by reason.

  Raises:
    ValueError: no documents; or, where `on_error` is 'raise', a damaged,
      truncated or non-UTF-8 record or a missing field, by file and line (by
      index for `array_record`). Files of `python` are the machine's, not the
      user's: broken ones are always skipped and counted.
  """
  found = files(data)
  skipped = collections.Counter() if skipped is None else skipped
  return _documents(data, found, skipped)


def files(data: config.Data) -> list[tuple[str, pathlib.Path]]:
  """Names and paths of a corpus's files, in reading order.

  Raises:
    ValueError: there are none, or `data.path` does not exist.
  """
  found = {}
  if data.source == "python":
    for label, prefix, without in _ROOTS:
      root = sysconfig.get_path(label)
      for name, path in _walk(root, _NAMES["python"], without):
        found[f"{prefix}/{name}"] = path
  else:
    root = pathlib.Path(data.path).expanduser()
    if not root.exists():
      raise ValueError(f"data.path {data.path!r} does not exist")
    if root.is_file():
      found = {root.name: root}
    else:
      found = dict(_walk(root, _NAMES[data.source]))
  if not found:
    raise ValueError(f"no {data.source} files in {data.path!r}")
  return sorted(found.items(), key=lambda item: (_digest(item[0]), item[0]))


def deduplicated(
  documents: Iterable[Document], skipped: collections.Counter | None = None
) -> Iterator[Document]:
  """Drops every document whose bytes came before; keeps 16 bytes of each."""
  seen = set()
  for document in documents:
    digest = hashlib.sha256(document.text).digest()[:16]
    if digest not in seen:
      seen.add(digest)
      yield document
    elif skipped is not None:
      skipped["duplicate"] += 1


def position(text: bytes) -> float:
  """Place of a document in [0, 1], uniform, from a hash of its bytes."""
  first = hashlib.sha256(b"split" + text).digest()[:8]
  return int.from_bytes(first, "big") / 2**64


def is_held_out(text: bytes, share: float) -> bool:
  """Whether a document belongs to the held-out share of its corpus.

  Only the bytes decide: neither the other documents, nor the order, nor the
  machine. A larger share holds out all that a smaller one does.
  """
  return position(text) < share


def split(
  documents: Iterable[Document], held_out: float
) -> Iterator[tuple[Document, bool]]:
  """Pairs each document with `is_held_out`; deduplicate before."""
  for document in documents:
    yield document, is_held_out(document.text, held_out)


def _documents(data, found, skipped) -> Iterator[Document]:
  lenient = data.on_error == "skip" or data.source == "python"
  left = data.max_bytes or math.inf
  count = 0
  for name, path, line, record in _all_records(data, found):
    if isinstance(record, _Damage):
      if not lenient:
        where = path if line is None else f"{path}:{line}"
        raise ValueError(f"{where}: {record.reason}: {record.detail}")
      skipped[record.reason] += 1
      continue
    if not record:
      skipped["empty"] += 1
      continue
    text = record[: _character(record, left)] if len(record) > left else record
    if text:
      count += 1
      yield Document(name if line is None else f"{name}:{line}", text)
    left -= len(text)
    if len(text) < len(record) or not left:
      break
  if not count:
    raise ValueError(
      f"no documents in {data.source} corpus {data.path!r}; "
      f"skipped: {dict(skipped) or 'nothing'}"
    )


def _all_records(data, found):
  """Name, path, line and record; damage that ends a file comes last."""
  for name, path in found:
    line = None
    try:
      for line, record in _READERS[data.source](path, data):
        yield name, path, line, record
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
      kind = "unreadable" if isinstance(error, PermissionError) else "damaged"
      yield name, path, line or 1, _Damage(kind, f"no more after it: {error}")


def _python(path, data) -> Iterator[tuple[None, bytes | _Damage]]:
  del data
  yield None, _checked(path.read_bytes(), 1)[1]


def _text(path, data) -> Iterator[tuple[int, bytes | _Damage]]:
  del data
  line, rest = 1, b""
  with _open(path) as file:
    while True:
      rest += file.read(PIECE + 1 - len(rest))
      end = len(rest)
      if end > PIECE:
        end = rest.rfind(b"\n", 0, PIECE) + 1 or _character(rest, PIECE)
      yield _checked(rest[:end], line)
      line += rest.count(b"\n", 0, end)
      rest = rest[end:]
      if not rest:
        return


def _jsonl(path, data) -> Iterator[tuple[int, bytes | _Damage]]:
  with _open(path) as file:
    for line, raw in enumerate(file, 1):
      if not raw.isspace():
        yield line, _field(raw, data.field)


def _field(raw: bytes, field: str) -> bytes | _Damage:
  try:
    record = json.loads(raw.decode("utf-8-sig"))
  except UnicodeDecodeError as error:
    return _Damage("not UTF-8", str(error))
  except (ValueError, RecursionError) as error:
    return _Damage("not JSON", str(error))
  if not isinstance(record, dict) or field not in record:
    has = sorted(record)[:9] if isinstance(record, dict) else type(record)
    return _Damage("missing field", f"no {field!r} among {has}")
  if not isinstance(record[field], str):
    kind = type(record[field]).__name__
    return _Damage("missing field", f"{field!r} is no string but {kind}")
  try:
    return record[field].encode("utf-8")
  except UnicodeEncodeError as error:
    return _Damage("not UTF-8", str(error))


def _array_record(path, data) -> Iterator[tuple[int, bytes | _Damage]]:
  del data
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    for index in range(reader.num_records()):
      yield index, _checked(reader.read(), index, counts_lines=False)[1]
    reader.close()
  except (RuntimeError, IndexError, ValueError) as error:
    raise OSError(f"not a whole ArrayRecord file: {error}") from error


_READERS = {
  "python": _python,
  "text": _text,
  "jsonl": _jsonl,
  "array_record": _array_record,
}


def _checked(
  text: bytes, line: int, counts_lines: bool = True
) -> tuple[int, bytes | _Damage]:
  """The text, or its damage with the line where UTF-8 breaks."""
  try:
    text.decode("utf-8")
  except UnicodeDecodeError as error:
    if counts_lines:
      line += text.count(b"\n", 0, error.start)
    return line, _Damage("not UTF-8", str(error))
  return line, text


def _character(text: bytes, end: int) -> int:
  """The last start of a UTF-8 character at or before `end`.

  No character has more than four bytes: where none starts there, the text is
  not UTF-8, and `end` is as good a place as any.
  """
  for start in range(end, max(end - 4, -1), -1):
    if text[start] & 0xC0 != 0x80:
      return start
  return end


def _walk(root, pattern: str, without: tuple[str, ...] = ()):
  """Name relative to root, and path, of the files that are not hidden."""
  for folder, inner, names in os.walk(root):
    inner[:] = [n for n in inner if n[0] != "." and n not in without]
    for name in names:
      path = pathlib.Path(folder, name)
      if name[0] != "." and re.search(pattern, name) and path.is_file():
        yield path.relative_to(root).as_posix(), path


def _digest(name: str) -> bytes:
  return hashlib.sha256(os.fsencode(name)).digest()


def _open(path: pathlib.Path) -> io.BufferedIOBase:
  if path.suffix == ".gz":
    return gzip.open(path)
  if path.suffix == ".zst":
    return io.BufferedReader(_Zstandard(path))
  return path.open("rb")


class _Zstandard(io.RawIOBase):
  """Decompressed bytes of a .zst file of any number of frames.

  `zstandard`'s own stream reader takes a truncated file for a whole one.
  """

  def __init__(self, path: pathlib.Path):
    self._file = path.open("rb")
    self._frame, self._input, self._output = None, b"", b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._output:
      self._input = self._input or self._file.read(io.DEFAULT_BUFFER_SIZE)
      if not self._input:
        if self._frame is not None:
          raise EOFError("the file ends inside a zstandard frame")
        return 0
      if self._frame is None:
        limit = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = limit.decompressobj()
      self._output = self._frame.decompress(self._input)
      self._input = self._frame.unused_data
      if self._frame.eof:
        self._frame = None
    size = min(len(buffer), len(self._output))
    buffer[:size] = self._output[:size]
    self._output = self._output[size:]
    return size

  def close(self) -> None:
    self._file.close()
    super().close()
