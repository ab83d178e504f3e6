"""Reads the records of one file.

A record is a text in UTF-8, a `Pair` of a prompt and an answer, or a `Damage`
that says why it cannot be used. If the rest of a file cannot be read, its last
record is a Damage. A byte order mark at the start of a text is part of the
text.
"""

import codecs
import errno
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import zstandard
from array_record.python import array_record_module

from mtp_jax import tokenizer

PIECE = 1 << 16  # bytes; longer text files are cut into several documents
LINE = 1 << 28  # bytes; longer lines of JSON are not read
NAMES = {  # source -> pattern of the names of its files
  "python": r"\.py$",
  "text": r"",
  "jsonl": r"\.jsonl(\.gz|\.zst)?$",
  "array_record": r"\.array_record(-\d+-of-\d+)?$",
}


class Damage(NamedTuple):
  """Why a record cannot be used."""

  reason: str  # a category, such as 'not UTF-8'; `corpora.Skipped` counts it
  detail: str  # of this record


class Pair(NamedTuple):
  """A prompt and its answer, both UTF-8."""

  prompt: bytes
  answer: bytes


def records(
  source: str, path: pathlib.Path, field: str, prompt: str = ""
) -> Iterator[tuple[int | None, bytes | Pair | Damage]]:
  """Yields the records of a file, each with its place.

  Args:
    source: one of `config.SOURCES`.
    path: the file; `text` and `jsonl` may be .gz or .zst.
    field: for `jsonl`, the field that holds the text.
    prompt: for `jsonl`, the field that holds the prompt of that text; with it,
      records are Pairs.

  Yields:
    (place, record). The place is the line where the record begins, for
    `array_record` its index, and for `python` None.

  Raises:
    OSError: the file cannot be read now, see `raise_if_temporary`.
  """
  line = None
  names = (prompt, field) if prompt else (field,)
  try:
    for line, record in _READERS[source](path, names):
      yield line, record
  except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
    raise_if_temporary(error, path)
    kind = "unreadable" if isinstance(error, PermissionError) else "damaged"
    yield line or 1, Damage(kind, f"the rest cannot be read: {error}")


# Errors that repeat at every read. None: of a reader, about the content.
_LASTING = {
  *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
  *(errno.ELOOP, errno.ENAMETOOLONG, None),
}


def raise_if_temporary(error: Exception, path: str | pathlib.Path) -> None:
  """Raises OSError if a read failed in a way that may pass.

  Such as EIO and ESTALE: the text may be whole, so it is never left out as
  damaged, whatever `on_error` says.
  """
  if isinstance(error, OSError) and error.errno not in _LASTING:
    raise OSError(
      error.errno,
      f"{path} cannot be read now ({error.strerror}), and may be whole: start "
      "again once it can, or take it out of the corpus",
    ) from error


def _python(path, names) -> Iterator[tuple[None, bytes | Damage]]:
  del names
  yield None, _checked(path.read_bytes(), 1)[1]


def _text(path, names) -> Iterator[tuple[int, bytes | Damage]]:
  """Pieces of at most PIECE bytes, cut after a line end if there is one."""
  del names
  line, rest = 1, b""
  with _open(path) as file:
    while True:
      rest += file.read(PIECE + 1 - len(rest))
      end = len(rest)
      if end > PIECE:
        end = rest.rfind(b"\n", 0, PIECE) + 1
        end = end or rest.rfind(b"\r", 0, PIECE) + 1
        end = end or tokenizer.character(rest, PIECE)
      yield _checked(rest[:end], line)
      line += rest.count(b"\n", 0, end)
      rest = rest[end:]
      if not rest:
        return


def _jsonl(path, names) -> Iterator[tuple[int, bytes | Pair | Damage]]:
  with _open(path) as file:
    lines = iter(lambda: file.readline(LINE + 1), b"")
    for line, raw in enumerate(lines, 1):
      if len(raw) > LINE:
        yield line, Damage("too long", f"a line of more than {LINE} bytes")
        while raw and not raw.endswith(b"\n"):
          raw = file.readline(LINE)
      elif not raw.isspace():
        yield line, _fields(raw, names)


def _fields(raw: bytes, names: tuple[str, ...]) -> bytes | Pair | Damage:
  """The text in a field of a line of JSON; of two fields, a Pair."""
  try:
    record = json.loads(raw.decode("utf-8-sig"))
  except UnicodeDecodeError as error:
    return _not_utf8(raw, error)
  except (ValueError, RecursionError) as error:
    has_return = b"\r" in raw.strip()
    hint = ": its lines end with carriage returns alone" if has_return else ""
    return Damage("not JSON", f"{error}{hint}")
  texts = [_text_of(record, name) for name in names]
  damages = [text for text in texts if isinstance(text, Damage)]
  if damages:
    return damages[0]
  return Pair(*texts) if len(texts) == 2 else texts[0]


def _text_of(record, field: str) -> bytes | Damage:
  """The text in a field of a decoded line of JSON."""
  if not isinstance(record, dict) or field not in record:
    has = sorted(record)[:9] if isinstance(record, dict) else type(record)
    return Damage("missing field", f"no {field!r} among {str(has)[:200]}")
  if not isinstance(record[field], str):
    kind = type(record[field]).__name__
    return Damage("missing field", f"{field!r} is a {kind}, not a string")
  try:
    return record[field].encode("utf-8")
  except UnicodeEncodeError as error:
    return Damage("not UTF-8", str(error))


def _array_record(path, names) -> Iterator[tuple[int, bytes | Damage]]:
  del names
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    for index in range(reader.num_records()):
      yield index, _checked(reader.read(), index, counts_lines=False)[1]
    reader.close()
  except (RuntimeError, IndexError, ValueError) as error:
    with path.open("rb") as file:  # raises what the disk says, if it fails
      while file.read(1 << 20):
        pass
    raise OSError(f"not a complete ArrayRecord file: {error}") from error


_READERS = {
  "python": _python,
  "text": _text,
  "jsonl": _jsonl,
  "array_record": _array_record,
}


def _checked(
  text: bytes, line: int, counts_lines: bool = True
) -> tuple[int, bytes | Damage]:
  """(line, text); if the text is not UTF-8, the line of the error and a
  Damage."""
  try:
    text.decode("utf-8")
  except UnicodeDecodeError as error:
    if counts_lines:
      line += text.count(b"\n", 0, error.start)
    return line, _not_utf8(text, error)
  return line, text


def _not_utf8(raw: bytes, error: UnicodeDecodeError) -> Damage:
  if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
    return Damage("not UTF-8", "it begins like UTF-16: convert the file")
  return Damage("not UTF-8", str(error))


def _open(path: pathlib.Path) -> io.BufferedIOBase:
  if path.suffix == ".gz":
    return gzip.open(path)
  if path.suffix == ".zst":
    return io.BufferedReader(_Zstandard(path))
  return path.open("rb")


class _Zstandard(io.RawIOBase):
  """Decompresses a .zst file of any number of frames.

  `zstandard`'s own stream reader accepts a truncated file without an error.
  """

  def __init__(self, path: pathlib.Path):
    self._file = path.open("rb")
    self._frame, self._input, self._output = None, b"", memoryview(b"")

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
      # A view, because slicing bytes would copy the rest at every read.
      self._output = memoryview(self._frame.decompress(self._input))
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
