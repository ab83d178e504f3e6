"""Converts text to ids and back: by bytes or by a SentencePiece model.

Both classes have the same interface: `bos`, `eos`, `pad`, `vocab`,
`fingerprint`, `encode`, `decode` and `decode_bytes`. `encode` adds no special
ids; callers add `bos` and `eos` to documents and prompts.
"""

import codecs
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

Ids = Sequence[int] | np.ndarray

_SPACE = "\u2581"  # stands for a space in SentencePiece's pieces


class Bytes:
  """A tokenizer with one id per byte; lossless for any bytes.

  Ids 0 to 255 are the bytes, 256 is `bos`, 257 `eos` and 258 `pad`.

  Example:
    >>> from mtp_jax import tokenizer
    >>> codec = tokenizer.Bytes()
    >>> ids = codec.encode("né")
    >>> ids.tolist()
    [110, 195, 169]
    >>> codec.decode([codec.bos, *ids, codec.eos])
    'né'
  """

  bos, eos, pad, vocab = 256, 257, 258, 259
  fingerprint = hashlib.sha256(b"bytes bos=256 eos=257").hexdigest()[:16]

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns ids [length], int32, of bytes or of a str's UTF-8 form."""
    raw = utf8(text) if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8).astype(np.int32)

  def decode(self, ids: Ids, after: Ids = ()) -> str:
    """Text of the ids, without special ids; invalid UTF-8 becomes U+FFFD.

    Args:
      ids: [length].
      after: ids of the text before. With them, a space at the start is kept,
        and so is a character whose first bytes are in `after`.
    """
    return "".join(decode_parts(self, [ids], after))

  def decode_bytes(self, ids: Ids, after: Ids = ()) -> bytes:
    """The inverse of `encode`: the exact bytes, without special ids.

    Raises:
      ValueError: an id is outside the vocabulary.
    """
    del after  # the bytes of an id do not depend on the text before it
    ids = _checked_ids(ids, self.vocab)
    return ids[ids < 256].astype(np.uint8).tobytes()


class SentencePiece:
  """A tokenizer that reads a SentencePiece model.

  Models trained by `tokenizer_training` decode to exactly the text that was
  encoded. Other models may normalise the text. If a model has no `bos` or no
  `pad`, its `eos` is used instead. Padding is told by segment 0, not by id.

  Args:
    path: the `.model` file; `~` is expanded.

  Raises:
    ValueError: the file is missing, is not a SentencePiece model, or defines
      no id for the end of a document.
  """

  def __init__(self, path: str | os.PathLike):
    try:
      model = pathlib.Path(path).expanduser().read_bytes()
      if not model:
        raise RuntimeError("the file is empty")
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError) as error:
      raise ValueError(
        f"{path} is not a SentencePiece model: {error}"
      ) from error
    p = self._processor
    self.vocab = p.vocab_size()
    self.eos = p.eos_id()
    if self.eos < 0:
      raise ValueError(f"{path} defines no id for the end of a document")
    self.bos = p.bos_id() if p.bos_id() >= 0 else self.eos
    self.pad = p.pad_id() if p.pad_id() >= 0 else self.eos
    self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
    self._pieces = [_piece_bytes(p, i) for i in range(self.vocab)]
    # Whether the model adds a dummy prefix, a space before every text.
    self._adds_space = p.id_to_piece(p.encode("a")[0]).startswith(_SPACE)
    byte_ids = [p.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    # The ids of the bytes of U+2581, or None without byte fallback.
    self._u2581 = byte_ids if all(p.is_byte(i) for i in byte_ids) else None

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns ids [length], int32; bytes must be UTF-8.

    SentencePiece would take U+2581 in the text for a space. It is encoded by
    its bytes instead, so that decoding restores it. A model with a dummy prefix
    would add a space to every part, so its text is encoded in one piece.

    Raises:
      ValueError: the text is not valid UTF-8; the message says where.
    """
    text = utf8(text).decode("utf-8")
    if self._u2581 is None or self._adds_space or _SPACE not in text:
      return np.array(self._processor.encode(text), np.int32)
    ids, *rest = self._processor.encode(text.split(_SPACE))
    for part in rest:
      ids += self._u2581 + part
    return np.array(ids, np.int32)

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
    raw = b"".join(self._pieces[i] for i in _checked_ids(ids, self.vocab))
    if self._adds_space and raw[:1] == b" ":
      before = any(self._pieces[i] for i in _checked_ids(after, self.vocab))
      return raw if before else raw[1:]
    return raw


Tokenizer = Bytes | SentencePiece


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


def load(name: str) -> Tokenizer:
  """Returns the tokenizer that `config.Data.tokenizer` names.

  Args:
    name: 'bytes', or the path of a SentencePiece model.

  Raises:
    ValueError: `name` is neither of the two.
  """
  if name == "bytes":
    return Bytes()
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    raise ValueError(
      f"tokenizer {name!r} is neither 'bytes' nor the file of a model"
    )
  return SentencePiece(path)


def _piece_bytes(processor, index: int) -> bytes:
  piece = processor.id_to_piece(index)
  if processor.is_byte(index):
    return bytes([int(piece[1:-1], 16)])
  if processor.is_control(index):
    return b""
  if processor.is_unknown(index):
    return "\ufffd".encode()
  return piece.replace(_SPACE, " ").encode()


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
    raise ValueError(f"SentencePiece takes UTF-8 only: {error}") from error
  return text


def _checked_ids(ids: Ids, vocab: int) -> np.ndarray:
  """Ids as int64 [length]; ValueError if one is outside the vocabulary."""
  ids = np.asarray(ids, np.int64)
  outside = ids[(ids < 0) | (ids >= vocab)]
  if outside.size:
    raise ValueError(f"id {outside[0]} is outside the vocabulary of {vocab}")
  return ids.ravel()
