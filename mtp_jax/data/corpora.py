"""Reads the documents of a corpus from its files, in a fixed order.

Files are ordered by a hash of their names, so that the first `max_bytes` are a
sample of the whole corpus and not its first folder. Names are relative to the
corpus, so the order does not change when the corpus is moved.
"""

import collections
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator

from mtp_jax import config, tokenizer
from mtp_jax.data import formats

# Folders of Python: label of sysconfig, prefix of the names, folders left out.
_ROOTS = (
  ("stdlib", "stdlib", ("site-packages", "dist-packages")),
  ("purelib", "packages", ()),
  ("platlib", "packages", ()),
)


@dataclasses.dataclass(frozen=True)
class Document:
  """A text of a corpus."""

  name: str  # 'path' or 'path:line'
  text: bytes  # UTF-8
  answer: int = 0  # bytes of `text` before the answer: the prompt


class Skipped(collections.Counter):
  """Counts the records left out of a corpus, by reason."""

  def __init__(self, *counts):
    super().__init__(*counts)
    self.places: list[str] = []  # the first three that `add` was given

  def add(self, reason: str, place: object) -> None:
    """Counts one record, and keeps its place if it is among the first three."""
    self[reason] += 1
    if len(self.places) < 3:
      self.places.append(str(place))

  def __str__(self) -> str:
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(self.items()))
    return f"{counts}; the first: {', '.join(self.places) or 'none'}"


def read(
  data: config.Data, skipped: Skipped | None = None
) -> Iterator[Document]:
  """Yields the documents of a corpus in a fixed order.

  `python` reads the .py files of the running interpreter's standard library
  and packages, `text` the files of a folder, `jsonl` one field of each line,
  and `array_record` each record. `text` and `jsonl` files may be .gz or .zst.
  Text files of more than 64 KiB are cut at line ends into several documents.

  With `prompt`, a document of `jsonl` is two fields, a prompt and its answer.

  Hidden files are ignored. Links to folders are followed, but no folder is
  read twice. Empty documents, pipes, devices, broken links and links to a
  parent folder of the corpus are left out and counted, and so are prompts
  without an answer.

  Args:
    data: `source`, `path`, `field`, `prompt`, `max_bytes` and `on_error` are
      used. The last document is cut, between two characters, to fit
      `max_bytes`; one with a prompt is left out instead.
    skipped: counts what is left out.

  Raises:
    ValueError: there are no documents; or `on_error` is 'raise', and a folder
      cannot be listed, or a record is damaged, truncated, not UTF-8 or lacks
      `field`. The message names file and line (`array_record`: the index).
      With `python`, damaged files are always left out and counted, since the
      user did not choose them.
    OSError: a file or folder cannot be read now.
  """
  skipped = Skipped() if skipped is None else skipped
  return _documents(data, _files(data, skipped), skipped)


def files(data: config.Data) -> list[tuple[str, pathlib.Path]]:
  """Names and paths of a corpus's files, in the order of reading.

  Raises:
    ValueError: there are no files, `data.path` is neither a file nor a folder,
      or a folder cannot be listed and `on_error` is 'raise'.
  """
  return _files(data, Skipped())


def _documents(data, paths, skipped) -> Iterator[Document]:
  """The documents of the files `paths`, up to `max_bytes`."""
  budget = data.max_bytes or math.inf
  count = 0
  for name, record, answer in _texts(data, paths, skipped):
    fits = len(record) <= budget
    text = record if fits else record[: tokenizer.character(record, budget)]
    if not fits and answer:  # half an answer would be learnt as a whole one
      text = b""
    if text:
      count += 1
      yield Document(name, text, answer)
    elif not count:
      raise ValueError(
        f"data.max_bytes {data.max_bytes} has no room for the first "
        f"{'prompt and answer' if answer else 'character'} of {name}: raise "
        "it, or read everything with 0"
      )
    budget -= len(text)
    if not fits or not budget:
      break
  if not count:
    raise ValueError(
      f"no documents in {data.source} corpus {data.path!r}; "
      f"skipped: {dict(skipped) or 'nothing'}"
    )


def _texts(data, paths, skipped) -> Iterator[tuple[str, bytes, int]]:
  """Name, text and start of the answer of the records that are neither
  damaged nor empty."""
  for name, path in paths:
    for line, record in formats.records(
      data.source, path, data.field, data.prompt
    ):
      if isinstance(record, formats.Damage):
        place = path if line is None else f"{path}:{line}"
        _damaged(data, skipped, record, place)
        continue
      pair = isinstance(record, formats.Pair)
      prompt, text = record if pair else (b"", record)
      if text:
        place = name if line is None else f"{name}:{line}"
        yield place, prompt + text, len(prompt)
      else:
        skipped["empty"] += 1


def _damaged(data, skipped, damage: formats.Damage, place: object) -> None:
  """Counts the damage, or raises ValueError, as `on_error` says."""
  if data.on_error == "raise" and data.source != "python":
    raise ValueError(
      f"{place}: {damage.reason}: {damage.detail}. Repair it, or leave out and "
      "count damaged records with data.on_error='skip'"
    )
  skipped.add(damage.reason, place)


def _files(data, skipped) -> list[tuple[str, pathlib.Path]]:
  paths = {}
  if data.source == "python":
    for label, prefix, exclude in _ROOTS:
      root = pathlib.Path(sysconfig.get_path(label))
      for name, path in _walk(data, root, skipped, exclude):
        paths[f"{prefix}/{name}"] = path
  else:
    if not data.path or data.source not in formats.NAMES:
      data.check()  # raises; a caller in a notebook may not have called it
    root = pathlib.Path(data.path).expanduser()
    if not root.exists():
      raise ValueError(f"data.path {data.path!r} does not exist")
    if root.is_file():
      paths = {root.name: root}
    elif root.is_dir():
      paths = dict(_walk(data, root, skipped))
    else:
      raise ValueError(
        f"data.path {data.path!r} is neither a file nor a folder but a pipe or "
        "a device, which cannot be read twice: save its content to a file"
      )
  if not paths:
    names = formats.NAMES[data.source]
    pattern = f" (names that match {names})" if names else ""
    raise ValueError(f"no {data.source} files in {data.path!r}{pattern}")
  return sorted(paths.items(), key=lambda item: (_digest(item[0]), item[0]))


def _walk(data, root: pathlib.Path, skipped, exclude: tuple[str, ...] = ()):
  """Yields (name relative to root, path) of the files that are not hidden.

  Linked folders are read last, in the order of their names, and no folder is
  read twice. A cycle of links therefore ends, and names do not depend on the
  order in which the file system lists a folder. Links to a parent folder of
  the corpus are not followed: they would read more than the user named. With
  `python` no links are followed: they lead to other installations.
  """
  pattern, seen = formats.NAMES[data.source], set()
  parents = {root.resolve(), *root.resolve().parents}

  def unreadable(error):
    formats.raise_if_temporary(error, error.filename)
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
        identity = status.st_dev, status.st_ino
        if identity in seen:
          inner.clear()
          continue
        seen.add(identity)
        inner[:] = [n for n in inner if n[0] != "." and n not in exclude]
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
            skipped.add("not a regular file", path)
    follow = []
    for link in sorted(links) if data.source != "python" else []:
      if link.resolve() in parents:
        skipped.add("link to a parent folder", link)
      else:
        follow.append(link)
    starts = follow


def _digest(name: str) -> bytes:
  return hashlib.sha256(os.fsencode(name)).digest()
