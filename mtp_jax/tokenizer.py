"""Text to ids and back: plain bytes, and SentencePiece models.

Both classes have the same face: `bos`, `eos`, `pad`, `vocab`, `fingerprint`,
`encode`, `decode` and `decode_bytes`. `encode` adds no special ids; whoever
packs documents or builds prompts adds `bos` and `eos`.
"""

import codecs
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

Ids = Sequence[int] | np.ndarray

_SPACE = "\u2581"  # what SentencePiece writes where the text has a space
_SENTENCE = 4000  # bytes; its trainer drops sentences above 4192


class Bytes:
  """Every byte is its own id; lossless on any file.

  Ids 0 to 255 are the bytes, 256 begins a document, 257 ends it and 258 pads.

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
    """Ids [length], int32; a str is taken as UTF-8."""
    raw = _utf8(text) if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8).astype(np.int32)

  def decode(self, ids: Ids, after: Ids = ()) -> str:
    """Text of the ids, specials dropped; broken UTF-8 becomes U+FFFD.

    Args:
      ids: [length].
      after: ids of the text that they continue. A space at the start and a
        character that begins there and ends here then come out whole.
    """
    return "".join(decode_parts(self, [ids], after))

  def decode_bytes(self, ids: Ids, after: Ids = ()) -> bytes:
    """The inverse of `encode`: exact bytes, specials dropped.

    What comes `after` other ids has the same bytes.

    Raises:
      ValueError: an id is outside the vocabulary; the message names it.
    """
    del after
    ids = _inside(ids, self.vocab)
    return ids[ids < 256].astype(np.uint8).tobytes()


class SentencePiece:
  """A SentencePiece model behind the interface of `Bytes`.

  Models made by `train_sentencepiece` give back every valid UTF-8 text
  exactly; a model from elsewhere normalises as it was trained to. Where a
  model defines no `pad`, its `eos` stands in (padding is known by segment 0,
  never by id); where it defines no `bos`, `eos` stands in as well.

  Args:
    path: the `.model` file; `~` is the home folder.

  Raises:
    ValueError: the file is missing, is no model, or defines no end id.
  """

  def __init__(self, path: str | os.PathLike):
    try:
      model = pathlib.Path(path).expanduser().read_bytes()
      if not model:
        raise RuntimeError("the file is empty")
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError) as error:
      raise ValueError(f"{path} is no SentencePiece model: {error}") from error
    p = self._processor
    self.vocab = p.vocab_size()
    self.eos = p.eos_id()
    if self.eos < 0:
      raise ValueError(f"{path} defines no id for the end of a document")
    self.bos = p.bos_id() if p.bos_id() >= 0 else self.eos
    self.pad = p.pad_id() if p.pad_id() >= 0 else self.eos
    self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
    self._pieces = [_piece_bytes(p, i) for i in range(self.vocab)]
    # A dummy prefix would be added to every part of a text cut at U+2581.
    self._adds_space = p.id_to_piece(p.encode("a")[0]).startswith(_SPACE)
    mark = [p.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    self._mark = mark if all(p.is_byte(i) for i in mark) else None

  def encode(self, text: str | bytes) -> np.ndarray:
    """Ids [length], int32; bytes must be UTF-8.

    SentencePiece reads U+2581 in a text as a space. Here it goes through the
    byte pieces instead, so that it survives.

    Raises:
      ValueError: the text has no UTF-8 form; the message says where.
    """
    raw = _utf8(text) if isinstance(text, str) else _checked(text)
    text = raw.decode("utf-8")
    if self._mark is None or self._adds_space or _SPACE not in text:
      return np.array(self._processor.encode(text), np.int32)
    first, *rest = self._processor.encode(text.split(_SPACE))
    for part in rest:
      first += self._mark + part
    return np.array(first, np.int32)

  def decode(self, ids: Ids, after: Ids = ()) -> str:
    """Text of the ids, specials dropped; broken UTF-8 becomes U+FFFD.

    Args:
      ids: [length].
      after: ids of the text that they continue. A space at the start and a
        character that begins there and ends here then come out whole.
    """
    return "".join(decode_parts(self, [ids], after))

  def decode_bytes(self, ids: Ids, after: Ids = ()) -> bytes:
    """Bytes of the ids, specials dropped; an unknown piece is U+FFFD.

    A model with a dummy prefix writes a space before the first word of a
    text. It is dropped, unless the ids come `after` others that hold text.

    Raises:
      ValueError: an id is outside the vocabulary; the message names it.
    """
    raw = b"".join(self._pieces[i] for i in _inside(ids, self.vocab))
    if self._adds_space and raw[:1] == b" ":
      begun = any(self._pieces[i] for i in _inside(after, self.vocab))
      return raw if begun else raw[1:]
    return raw


def train_sentencepiece(
  documents: Iterable[str | bytes], path: str | os.PathLike, vocab: int
) -> SentencePiece:
  """Trains a lossless byte-pair model and writes it to a file.

  Byte fallback, no normalisation, no dummy prefix, whitespace kept, runs of
  whitespace as pieces of their own: what source code needs.

  Args:
    documents: texts, UTF-8 where bytes; read once, one at a time.
    path: the `.model` file to write, in a folder that is made if missing. It
      appears whole or not at all, and that it can be written is seen before
      the training.
    vocab: ids wanted, the 256 bytes and 4 specials included. A small corpus
      may support fewer: the returned tokenizer's `vocab` tells.

  Raises:
    ValueError: no text, a vocabulary too small for its characters, or a path
      that is a folder; and whatever reading `documents` raises.
    OSError: the file cannot be written.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    raise ValueError(
      f"{path} is a folder: name the file to write, such as {path}/code.model"
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  model, failed = io.BytesIO(), []

  def sentences():
    try:
      yield from _sentences(documents)
    except Exception as error:  # the trainer would wrap it in its own
      failed.append(error)
      raise

  try:
    with partial.open("wb") as file:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        vocab_size=vocab,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
      )
      file.write(model.getvalue())
    os.replace(partial, path)
  except RuntimeError as error:
    if failed:
      raise failed[0] from None
    raise ValueError(
      f"SentencePiece cannot learn {vocab} ids from this text: "
      f"{_in_words(str(error))}"
    ) from error
  finally:
    partial.unlink(missing_ok=True)
  return SentencePiece(path)


def _in_words(error: str) -> str:
  """What the trainer's error means, where that is known."""
  if "sentences_.empty()" in error:
    return "there is no text"
  if numbers := re.search(r"required_chars\. \d+ vs (\d+)", error):
    return (
      f"its characters, the 256 bytes and the 4 specials need {numbers[1]}: "
      "ask for more"
    )
  return error


Tokenizer = Bytes | SentencePiece


def decode_parts(
  codec: Tokenizer, parts: Iterable[Ids], after: Ids = ()
) -> Iterator[str]:
  """The text of ids that come part by part, as from the passes of a decoder.

  Args:
    codec: the tokenizer.
    parts: ids; each part continues the one before.
    after: ids of the text that they continue.

  Yields:
    What each part adds to the text, then what is left. A character whose
    bytes are spread over several parts comes with the last of them; U+FFFD
    stands where the bytes are not UTF-8.
  """
  utf8 = codecs.getincrementaldecoder("utf-8")("replace")
  seen = list(after)
  utf8.decode(codec.decode_bytes(seen))
  for part in parts:
    yield utf8.decode(codec.decode_bytes(part, after=seen))
    seen.extend(part)
  yield utf8.decode(b"", final=True)


def character(text: bytes, end: int) -> int:
  """The last start of a UTF-8 character at or before `end`.

  No character has more than four bytes: where none starts there, the text is
  not UTF-8, and `end` is as good a place as any.
  """
  for start in range(end, max(end - 4, -1), -1):
    if text[start] & 0xC0 != 0x80:
      return start
  return end


def load(name: str) -> Tokenizer:
  """The tokenizer that `config.Data.tokenizer` names.

  Args:
    name: 'bytes', or the path of a SentencePiece model.

  Raises:
    ValueError: neither of the two.
  """
  if name == "bytes":
    return Bytes()
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    raise ValueError(
      f"tokenizer {name!r} is neither 'bytes' nor the file of a model"
    )
  return SentencePiece(path)


def _sentences(documents: Iterable[str | bytes]) -> Iterator[str]:
  """Documents cut into what the trainer accepts.

  It drops in silence a sentence of more than 4192 bytes, and one that holds
  U+0000 or U+2585. So texts are cut at line ends, where a line is longer
  before a space, and where there is none between two characters. Those two
  characters alone are left out: byte pieces write them.
  """
  for text in documents:
    raw = _utf8(text) if isinstance(text, str) else _checked(text)
    for part in re.split(b"\0|\xe2\x96\x85", raw):
      start = 0
      while start < len(part):
        end = min(start + _SENTENCE, len(part))
        if end < len(part):
          end = (
            part.rfind(b"\n", start, end) + 1
            or max(part.rfind(b" ", start + 1, end), 0)
            or character(part, end)
          )
        yield part[start:end].decode("utf-8")
        start = end


def _piece_bytes(processor, index: int) -> bytes:
  piece = processor.id_to_piece(index)
  if processor.is_byte(index):
    return bytes([int(piece[1:-1], 16)])
  if processor.is_control(index):
    return b""
  if processor.is_unknown(index):
    return "\ufffd".encode()
  return piece.replace(_SPACE, " ").encode()


def _utf8(text: str) -> bytes:
  try:
    return text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"text has no UTF-8 form: {error}") from error


def _checked(raw: bytes) -> bytes:
  try:
    raw.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"SentencePiece takes UTF-8 only: {error}") from error
  return raw


def _inside(ids: Ids, vocab: int) -> np.ndarray:
  ids = np.asarray(ids, np.int64)
  outside = ids[(ids < 0) | (ids >= vocab)]
  if outside.size:
    raise ValueError(f"id {outside[0]} is outside the vocabulary of {vocab}")
  return ids.ravel()
