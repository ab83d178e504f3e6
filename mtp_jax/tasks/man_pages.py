"""Manual pages as text: the NAME and DESCRIPTION of the roff source.

Enough of roff to read sentences, not to set a page: fonts and spacing are
dropped, unknown macros with their line.
"""

import gzip
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

FOLDER = pathlib.Path("/usr/share/man")

_ESCAPES = (
  (r'\\".*', ""),  # a comment
  (r"\\f(\(..|\[[^]]*\]|.)|\\s[-+]?\d|\\[&,/|^%:)]|\\[mk]\[[^]]*\]", ""),
  (r"\\(-|\(hy|\(mi)|\\\[(?:-|hy|mi)\]", "-"),
  (r"\\\((?:em|en)|\\\[(?:em|en)\]", " - "),
  (r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]|\\'|\\`|\\\*\(Aq", "'"),
  (r'\\\((?:lq|rq|dq)|\\\[(?:lq|rq|dq)\]|\\\*\([LR]"', '"'),
  (r"\\[~ 0]", " "),
  (r"\\\(..|\\\[[^]]*\]|\\\*\(..|\\\*\[[^]]*\]|\\\*.", ""),
  (r"\\e|\\\\", r"\\"),
)
# Macros whose arguments are text; those of alternating fonts join them.
_TEXT = {"B", "I", "SM", "SB", "Nm", "Fl", "Ar", "Em", "Sy", "Pa", "Cm", "Xr"}
_JOINED = {"BR", "RB", "BI", "IB", "IR", "RI"}


class Page(NamedTuple):
  """A page in English."""

  names: str  # that it explains, such as 'ls'
  summary: str  # of the NAME line, such as 'list directory contents'
  description: str  # the section's text


def read(folder: pathlib.Path = FOLDER, size: int = 4096) -> Iterator[Page]:
  """Yields the pages of a folder that have a NAME and a DESCRIPTION.

  In the order of their names. Pages that only refer to another, and links, are
  left out. Of a description it reads little more than `size` characters.

  Raises:
    ValueError: there are no manual pages in the folder.
  """
  files = sorted(p for p in folder.glob("man[1-9]*/*") if not p.is_symlink())
  if not files:
    raise ValueError(
      f"there are no manual pages in {folder}: on Debian and Ubuntu, install "
      "man-db, or remove the rule that leaves them out in /etc/dpkg/dpkg.cfg.d"
    )
  for file in files:
    try:
      opened = gzip.open if file.suffix == ".gz" else open
      with opened(file, "rb") as source:
        page = parse(source.read(1 << 20).decode("utf-8", "replace"), size)
    except (OSError, EOFError):
      continue
    if page:
      yield page


def parse(source: str, size: int = 4096) -> Page | None:
  """The page of a roff source; None if it has no NAME or no DESCRIPTION."""
  name, description = (
    _section(source, heading, size) for heading in ("NAME", "DESCRIPTION")
  )
  names, dash, summary = name.partition(" - ")
  if not (dash and summary.strip() and description):
    return None
  return Page(*(" ".join(t.split()) for t in (names, summary, description)))


def _section(source: str, heading: str, size: int) -> str:
  """The text of a section, or its beginning; empty if there is none."""
  start = re.search(rf'^\.S[Hh]\s+"?{heading}"?\s*\n', source, re.M | re.I)
  if not start:
    return ""
  texts, length = [], 0
  for line in source[start.end() : start.end() + 8 * size].splitlines():
    if re.match(r"\.S[Hh]\b", line) or length > size:
      break
    texts.append(_text(line))
    length += len(texts[-1])
  return " ".join(texts)


def _text(line: str) -> str:
  """What a line of roff says."""
  macro = re.match(r"[.']\s*(\w*)\s*(.*)", line)
  if not macro:
    return _plain(line)
  name, rest = macro.groups()
  if name == "Nd":
    return f"- {_plain(rest)}"
  words = re.findall(r'"[^"]*"|\S+', _plain(rest))
  words = [word.strip('"') for word in words]
  if name in _JOINED:
    return "".join(words)
  return " ".join(words) if name in _TEXT else ""


def _plain(text: str) -> str:
  if "\\" not in text:
    return text
  for pattern, new in _ESCAPES:
    text = re.sub(pattern, new, text)
  return text
