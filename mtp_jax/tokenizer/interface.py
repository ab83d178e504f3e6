"""What every kind of tokenizer has, and decoding piece by piece."""

import codecs
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mtp_jax.tokenizer import special_ids

Ids = Sequence[int] | np.ndarray


class Tokenizer:
  """Converts text to ids and back.

  `encode` adds no special ids, and never makes one from text; callers add them:
  `bos` and `eos` to documents, `prefix` to prompts.

  Attributes:
    bos: id that begins a document.
    eos: id that ends a document.
    pad: id without meaning.
    vocab: number of ids.
    fingerprint: text that differs between tokenizers.
    special: from the files of a model's folder. With them come `special_names`
      and `encode_marked`.
  """

  bos: int
  eos: int
  pad: int
  vocab: int
  fingerprint: str
  special: special_ids.SpecialIds | None = None
  _pieces: Sequence[bytes]  # of each id; empty for special ids
  _adds_space = False  # a space before every text: a dummy prefix

  @property
  def ends(self) -> tuple[int, ...]:
    """Ids that end a text that a model writes; `eos` is one of them."""
    return self.special.ends if self.special else (self.eos,)

  @property
  def prefix(self) -> tuple[int, ...]:
    """Ids that stand before a prompt."""
    return (self.bos,)

  def files(self) -> dict[str, bytes]:
    """Content of the files that a folder needs to load this tokenizer."""
    return {}

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns ids [length], int32, of a str or of UTF-8 bytes."""
    raise NotImplementedError

  def encode_after(self, text: str | bytes, before: str | bytes) -> np.ndarray:
    """Ids [length], int32, of a text that continues another.

    `encode(before)` and these are `encode(before + text)`. Where a piece of
    that spans both texts, these are the ids of `text` alone.
    """
    text, before = utf8(text), utf8(before)
    whole, first = self.encode(before + text), self.encode(before)
    if np.array_equal(whole[: len(first)], first):
      return whole[len(first) :]
    return self.encode(text)

  def decode(self, ids: Ids, after: Ids = ()) -> str:
    """Text of the ids, without special ids; invalid UTF-8 becomes U+FFFD.

    Args:
      ids: [length].
      after: ids of the text before. With them, a space at the start is kept,
        and so is a character whose first bytes are in `after`.
    """
    return "".join(decode_parts(self, [ids], after))

  def decode_bytes(self, ids: Ids, after: Ids = ()) -> bytes:
    """Bytes of the ids, without special ids; an unknown piece is U+FFFD.

    A dummy prefix, the space that some models add before a text, is removed
    unless `after` holds text.

    Raises:
      ValueError: an id is outside the vocabulary.
    """
    raw = b"".join(self._pieces[i] for i in checked_ids(ids, self.vocab))
    if self._adds_space and raw[:1] == b" ":
      before = any(self._pieces[i] for i in checked_ids(after, self.vocab))
      return raw if before else raw[1:]
    return raw


def decode_parts(
  codec: Tokenizer, parts: Iterable[Ids], after: Ids = ()
) -> Iterator[str]:
  """Decodes ids that arrive in parts, such as from the passes of a decoder.

  Args:
    codec: the tokenizer.
    parts: ids [length]; each part continues the previous one.
    after: ids of the text before the first part.

  Yields:
    The text that each part adds, then the rest. A character whose bytes are in
    several parts is yielded with the last of them. Invalid UTF-8 becomes
    U+FFFD.
  """
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  before = list(after)
  decoder.decode(codec.decode_bytes(before))
  for part in parts:
    yield decoder.decode(codec.decode_bytes(part, after=before))
    before.extend(part)
  yield decoder.decode(b"", final=True)


def character(text: bytes, end: int) -> int:
  """Returns where the last UTF-8 character at or before `end` begins.

  A character has at most four bytes. If none begins in the last four, the text
  is not UTF-8, and `end` itself is returned.
  """
  for start in range(end, max(end - 4, -1), -1):
    if text[start] & 0xC0 != 0x80:
      return start
  return end


def utf8(text: str | bytes) -> bytes:
  """Returns the text as UTF-8.

  Raises:
    ValueError: a str has no UTF-8 form, or bytes are not UTF-8.
  """
  try:
    if isinstance(text, str):
      return text.encode("utf-8")
    text.decode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"text has no UTF-8 form: {error}") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"the tokenizer takes UTF-8 only: {error}") from error
  return text


def checked_ids(ids: Ids, vocab: int) -> np.ndarray:
  """Ids as int64 [length]; ValueError if one is outside the vocabulary."""
  ids = np.asarray(ids, np.int64)
  outside = ids[(ids < 0) | (ids >= vocab)]
  if outside.size:
    raise ValueError(f"id {outside[0]} is outside the vocabulary of {vocab}")
  return ids.ravel()
