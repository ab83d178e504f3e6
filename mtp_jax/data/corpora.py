"""Where documents come from: files and records, checked and in fixed order.

Files are read in the order of a hash of their names, so that a corpus cut by
`max_bytes` is a sample of the whole and not its first folder. Names are
relative to the corpus: the order does not depend on where it lies.
"""

import collections
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator

from mtp_jax import config, tokenizer
from mtp_jax.data import formats

_ROOTS = (  # of Python: sysconfig's label, prefix of the names, left out
  ("stdlib", "stdlib", ("site-packages", "dist-packages")),
  ("purelib", "packages", ()),
  ("platlib", "packages", ()),
)
_LEAST = 64  # bytes of each part of a document that is cut for two splits


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and where it comes from: 'path' or 'path:line'."""

  name: str
  text: bytes  # UTF-8


class Skipped(collections.Counter):
  """Records left out of a corpus, by reason, and where the first ones were."""

  def __init__(self, *counts):
    super().__init__(*counts)
    self.places: list[str] = []  # at most 3; not of empty or equal records

  def add(self, reason: str, place: object) -> None:
    """Counts one document for `reason`; the first three places are kept."""
    self[reason] += 1
    if len(self.places) < 3:
      self.places.append(str(place))

  def __str__(self) -> str:
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(self.items()))
    return f"{counts}; the first: {', '.join(self.places) or 'none'}"


def read(
  data: config.Data, skipped: Skipped | None = None
) -> Iterator[Document]:
  """Documents of a corpus, one at a time, in a fixed order.

  `python` takes the .py files of the running interpreter's standard library
  and packages, `text` the files of a folder, `jsonl` one field of each line,
  `array_record` each record. `text` and `jsonl` may be .gz or .zst. Hidden
  files are left out; linked folders are read, each folder once. A text file
  above 64 KiB is cut at a line end into several documents, so that one long
  file is a corpus too. Left out and counted: documents without a byte, pipes,
  devices, links that lead nowhere or to a folder around the corpus.

  Args:
    data: `source`, `path`, `field`, `max_bytes` and `on_error` are used. The
      last document is cut, between characters, to keep `max_bytes`.
    skipped: takes what was left out.

  Raises:
    ValueError: no documents; or, where `on_error` is 'raise', a folder that
      cannot be listed, or a damaged, truncated or non-UTF-8 record or a
      missing field, by file and line (by index for `array_record`). Files of
      `python` are the machine's, not the user's: broken ones are always
      skipped and counted.
  """
  skipped = Skipped() if skipped is None else skipped
  return _documents(data, _files(data, skipped), skipped)


def files(data: config.Data) -> list[tuple[str, pathlib.Path]]:
  """Names and paths of a corpus's files, in reading order.

  Raises:
    ValueError: there are none, `data.path` is neither file nor folder, or a
      folder cannot be listed and `on_error` is 'raise'.
  """
  return _files(data, Skipped())


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


@dataclasses.dataclass(frozen=True)
class Cut:
  """One document that is trained on up to a place, and held out from there."""

  document: Document
  at: int  # bytes

  def __str__(self) -> str:
    size = len(self.document.text)
    if not self.at:
      return f"{self.document.name}, {size} bytes"
    return f"the last {size - self.at} of {size} bytes of {self.document.name}"


def find_cut(documents: Iterable[Document], held_out: float) -> Cut | None:
  """How to divide a corpus of which no whole document would be held out.

  One text file of a megabyte is 18 documents, and as a rule none of them
  falls into a share of 0.02. Then the longest document (of equal ones, the
  first) is cut: the held-out share of the whole corpus is taken off its end,
  at most half of it, at a line end where there is one. Where all documents
  are too short to be cut, it is held out as a whole. That is a function of the
  documents alone.

  Args:
    documents: deduplicated. Read until both splits have one, which for a
      large corpus is soon.
    held_out: the share.

  Returns:
    The cut; None if both splits have whole documents.

  Raises:
    ValueError: the corpus is one document, too short to be cut.
  """
  sides, total, count = set(), 0, 0  # total: bytes
  longest = Document("", b"")
  for document in documents:
    sides.add(is_held_out(document.text, held_out))
    if len(sides) == 2:
      return None
    total, count = total + len(document.text), count + 1
    longest = max(longest, document, key=lambda d: len(d.text))
  text = longest.text
  if len(text) < 2 * _LEAST and count > 1:
    return Cut(longest, 0)
  if len(text) < 2 * _LEAST:
    raise ValueError(
      f"data.held_out {held_out} leaves one split empty: the corpus is one "
      f"document of {len(text)} bytes, fewer than the {2 * _LEAST} that can be "
      "cut into a part for training and a held-out one. Give more text"
    )
  size = min(max(_LEAST, round(held_out * total)), len(text) // 2)
  at = len(text) - size
  ends = (
    text.rfind(b"\n", max(len(text) // 2, at - size), at) + 1,
    text.find(b"\n", at, len(text) - max(_LEAST, size // 2)) + 1,
    tokenizer.character(text, at),
  )
  return Cut(longest, next(end for end in ends if end))


def split(
  documents: Iterable[Document], held_out: float, cut: Cut | None = None
) -> Iterator[tuple[Document, bool]]:
  """Pairs each document with whether it is held out; deduplicate before.

  Args:
    documents: the corpus.
    held_out: the share, see `is_held_out`.
    cut: from `find_cut`. With one, the end of its document alone is held out.
  """
  for document in documents:
    if cut is None:
      yield document, is_held_out(document.text, held_out)
    elif document.text != cut.document.text:
      yield document, False
    else:
      for text, side in (
        (document.text[: cut.at], False),
        (document.text[cut.at :], True),
      ):
        if text:
          yield Document(document.name, text), side


def _documents(data, found, skipped) -> Iterator[Document]:
  left = data.max_bytes or math.inf
  count = 0
  for name, record in _texts(data, found, skipped):
    fits = len(record) <= left
    text = record if fits else record[: tokenizer.character(record, left)]
    if text:
      count += 1
      yield Document(name, text)
    elif not count:
      raise ValueError(
        f"data.max_bytes {data.max_bytes} has no room for the first character "
        f"of {name}: raise it, or read everything with 0"
      )
    left -= len(text)
    if not fits or not left:
      break
  if not count:
    raise ValueError(
      f"no documents in {data.source} corpus {data.path!r}; "
      f"skipped: {dict(skipped) or 'nothing'}"
    )


def _texts(data, found, skipped) -> Iterator[tuple[str, bytes]]:
  """Names and texts of the records that are neither damaged nor empty."""
  for name, path in found:
    for line, record in formats.records(data.source, path, data.field):
      if isinstance(record, formats.Damage):
        place = path if line is None else f"{path}:{line}"
        _damaged(data, skipped, record, place)
      elif record:
        yield name if line is None else f"{name}:{line}", record
      else:
        skipped["empty"] += 1


def _damaged(data, skipped, damage: formats.Damage, where: object) -> None:
  """Counts damage, or raises it."""
  if data.on_error == "raise" and data.source != "python":
    raise ValueError(
      f"{where}: {damage.reason}: {damage.detail}. Mend it, or leave out what "
      "is damaged, counted, with data.on_error='skip'"
    )
  skipped.add(damage.reason, where)


def _files(data, skipped) -> list[tuple[str, pathlib.Path]]:
  found = {}
  if data.source == "python":
    for label, prefix, without in _ROOTS:
      root = pathlib.Path(sysconfig.get_path(label))
      for name, path in _walk(data, root, skipped, without):
        found[f"{prefix}/{name}"] = path
  else:
    if not data.path or data.source not in formats.NAMES:
      data.check()  # a notebook may not have; it says what is wrong
    root = pathlib.Path(data.path).expanduser()
    if not root.exists():
      raise ValueError(f"data.path {data.path!r} does not exist")
    if root.is_file():
      found = {root.name: root}
    elif root.is_dir():
      found = dict(_walk(data, root, skipped))
    else:
      raise ValueError(
        f"data.path {data.path!r} is neither a file nor a folder but a pipe or "
        "a device, which cannot be read twice: save its contents to a file"
      )
  if not found:
    names = formats.NAMES[data.source]
    wanted = f" (names that match {names})" if names else ""
    raise ValueError(f"no {data.source} files in {data.path!r}{wanted}")
  return sorted(found.items(), key=lambda item: (_digest(item[0]), item[0]))


def _walk(data, root: pathlib.Path, skipped, without: tuple[str, ...] = ()):
  """Name relative to root, and path, of the files that are not hidden.

  Linked folders come after all others, in the order of their names, and no
  folder twice: so links in a circle end, and the names do not depend on the
  order in which the disk lists them. A link to a folder around the corpus is
  not followed, since it would read far more than was named; neither are those
  of `python`, which lead to other installations.
  """
  pattern, seen = formats.NAMES[data.source], set()
  around = {root.resolve(), *root.resolve().parents}

  def unreadable(error):
    damage = formats.Damage("unreadable", str(error))
    _damaged(data, skipped, damage, error.filename)

  starts = [root]
  while starts:
    links = []
    for start in starts:
      for folder, inner, names in os.walk(start, onerror=unreadable):
        try:
          status = os.stat(folder)
        except OSError as error:
          unreadable(error)
          inner.clear()
          continue
        place = status.st_dev, status.st_ino
        if place in seen:
          inner.clear()
          continue
        seen.add(place)
        inner[:] = [n for n in inner if n[0] != "." and n not in without]
        folder = pathlib.Path(folder)
        links += [folder / n for n in inner if os.path.islink(folder / n)]
        for name in names:
          path = folder / name
          if name[0] == "." or not re.search(pattern, name):
            continue
          try:
            is_file = path.is_file()
          except OSError as error:
            unreadable(error)
            continue
          if is_file:
            yield path.relative_to(root).as_posix(), path
          else:
            skipped.add("no file", path)
    follow = []
    for link in sorted(links) if data.source != "python" else []:
      if link.resolve() in around:
        skipped.add("link", link)
      else:
        follow.append(link)
    starts = follow


def _digest(name: str) -> bytes:
  return hashlib.sha256(os.fsencode(name)).digest()
