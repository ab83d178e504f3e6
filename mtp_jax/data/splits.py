"""Divides a corpus into a training split and a held-out split.

A hash of its bytes puts a document into one of them, so no document moves when
others are added.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator

from mtp_jax import tokenizer
from mtp_jax.data import corpora

_SHORTEST = 64  # bytes; no part of a document that is cut may be shorter


def deduplicated(
  documents: Iterable[corpora.Document],
  skipped: collections.Counter | None = None,
) -> Iterator[corpora.Document]:
  """Yields each text once, at its first place; `skipped` counts the others.

  Memory holds 16 bytes of hash per document.
  """
  seen = set()
  for document in documents:
    digest = hashlib.sha256(document.text).digest()[:16]
    if digest not in seen:
      seen.add(digest)
      yield document
    elif skipped is not None:
      skipped["duplicate"] += 1


def position(text: bytes) -> float:
  """A hash of the document's bytes as a number, uniform in [0, 1]."""
  first = hashlib.sha256(b"split" + text).digest()[:8]
  return int.from_bytes(first, "big") / 2**64


def is_held_out(text: bytes, share: float) -> bool:
  """Whether a document is held out, if `share` of the documents are to be.

  This depends on the document's bytes alone. A larger share holds out every
  document that a smaller one does.
  """
  return position(text) < share


@dataclasses.dataclass(frozen=True)
class Cut:
  """A document whose first `at` bytes are trained on, the others held out."""

  document: corpora.Document
  at: int

  def __str__(self) -> str:
    size = len(self.document.text)
    if not self.at:
      return f"{self.document.name}, {size} bytes"
    return f"the last {size - self.at} of {size} bytes of {self.document.name}"


def find_cut(
  documents: Iterable[corpora.Document], held_out: float
) -> Cut | None:
  """Finds a document to cut if `is_held_out` would leave one split empty.

  That happens to small corpora: a text file of one megabyte is 18 documents,
  of which a share of 0.02 usually holds out none. The longest document, or the
  first of equally long ones, is then cut. Its end is held out: the held-out
  share of the whole corpus, but at most half of the document, from a line end
  if possible. If every document is too short to be cut, the longest is held
  out whole, and so is a document with a prompt. The result depends on the
  documents alone.

  Args:
    documents: deduplicated. They are read until both splits have one, which
      in a large corpus takes few of them.
    held_out: the share.

  Returns:
    The cut; None if both splits have whole documents.

  Raises:
    ValueError: the corpus is one document, which is too short to be cut.
  """
  splits, total, count = set(), 0, 0  # total: bytes
  longest = corpora.Document("", b"")
  for document in documents:
    splits.add(is_held_out(document.text, held_out))
    if len(splits) == 2:
      return None
    total, count = total + len(document.text), count + 1
    longest = max(longest, document, key=lambda d: len(d.text))
  text = longest.text
  if (longest.answer or len(text) < 2 * _SHORTEST) and count > 1:
    return Cut(longest, 0)
  if longest.answer:
    raise ValueError(
      f"data.held_out {held_out} leaves one split empty: the corpus is one "
      "prompt with its answer, which is not cut. Give more of them"
    )
  if len(text) < 2 * _SHORTEST:
    raise ValueError(
      f"data.held_out {held_out} leaves one split empty: the corpus is one "
      f"document of {len(text)} bytes, fewer than the {2 * _SHORTEST} that can "
      "be cut into a part for training and a held-out part. Give more text"
    )
  size = min(max(_SHORTEST, round(held_out * total)), len(text) // 2)
  at = len(text) - size
  ends = (
    text.rfind(b"\n", max(len(text) // 2, at - size), at) + 1,
    text.find(b"\n", at, len(text) - max(_SHORTEST, size // 2)) + 1,
    tokenizer.character(text, at),
  )
  return Cut(longest, next(end for end in ends if end))


def split(
  documents: Iterable[corpora.Document],
  held_out: float,
  cut: Cut | None = None,
) -> Iterator[tuple[corpora.Document, bool]]:
  """Yields (document, whether it is held out).

  Args:
    documents: the corpus, deduplicated.
    held_out: the share, see `is_held_out`.
    cut: from `find_cut`. If given, only the end of its document is held out.
  """
  for document in documents:
    if cut is None:
      yield document, is_held_out(document.text, held_out)
    elif document.text != cut.document.text:
      yield document, False
    elif not cut.at:
      yield document, True
    else:
      for text, is_end in (
        (document.text[: cut.at], False),
        (document.text[cut.at :], True),
      ):
        yield corpora.Document(document.name, text), is_end
