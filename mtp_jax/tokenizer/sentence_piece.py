"""SentencePiece models."""

import hashlib
import json
import os
import pathlib
import re

import numpy as np
import sentencepiece

from mtp_jax.tokenizer import interface, special_ids

_SPACE = "\u2581"  # stands for a space in SentencePiece's pieces
_NO_PIECE = "\ue000"  # of private use: no piece has it


class SentencePiece(interface.Tokenizer):
  """A tokenizer that reads a SentencePiece model.

  Models trained by `tokenizer_training` decode to exactly the text that was
  encoded. Other models may normalise the text. The files beside it may name
  other special ids, and add some (`special_ids`). A missing bos or pad id is
  replaced by eos. Padding is told by segment 0, not by id.

  Args:
    path: the `.model` file; `~` is expanded.

  Raises:
    ValueError: the file is missing or is not a SentencePiece model, a file
      beside it is damaged, or no id ends a document.
  """

  def __init__(self, path: str | os.PathLike):
    path = pathlib.Path(path).expanduser()
    try:
      model = path.read_bytes()
      if not model:
        raise RuntimeError("the file is empty")
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError) as error:
      raise ValueError(
        f"{path} is not a SentencePiece model: {error}"
      ) from error
    p = self._processor
    pieces = [p.id_to_piece(i) for i in range(p.vocab_size())]
    own = {"bos_token": p.bos_id(), "eos_token": p.eos_id()}
    own |= {"pad_token": p.pad_id(), "unk_token": p.unk_id()}
    names = {key: pieces[i] for key, i in own.items() if i >= 0}
    self._added = special_ids.read_added(path.parent, pieces)
    self._ids = {name: i for i, name in enumerate(pieces)} | self._added
    self.vocab = 1 + max(self._ids.values())
    self.special = special_ids.read(path, self._ids.get, self.vocab, names)
    self.bos, self.eos = self.special.bos, self.special.eos
    self.pad = self.special.pad
    self._model = model
    self._pieces = [_piece_bytes(p, i) for i in range(len(pieces))]
    self._pieces += [b""] * (self.vocab - len(pieces))
    controls = {i for i in range(len(pieces)) if p.is_control(i)}
    used = {self.bos, self.pad, *self.ends}
    self._special = controls | used | set(self._added.values())
    # What text becomes that no piece has, even if its name is a special token.
    self._special -= {p.unk_id()} - used
    for i in self._special:
      self._pieces[i] = b""
    self._unknown = p.unk_id()
    # Whether the model adds a dummy prefix, a space before every text.
    self._adds_space = p.id_to_piece(p.encode("a")[0]).startswith(_SPACE)
    byte_ids = [p.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    # The ids of the bytes of U+2581, or None without byte fallback.
    self._u2581 = byte_ids if all(p.is_byte(i) for i in byte_ids) else None
    eos = p.eos_id()
    bos, pad = (i if i >= 0 else eos for i in (p.bos_id(), p.pad_id()))
    alone = special_ids.SpecialIds(bos, eos, pad, (eos,), None, names, None)
    self._alone = self.special == alone and not self._added
    identity = [self.bos, self.eos, self.pad, sorted(self._special - controls)]
    content = model
    if identity != [bos, eos, pad, []]:
      content += json.dumps(identity).encode()
    self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

  @property
  def prefix(self) -> tuple[int, ...]:
    """Ids that stand before a prompt: `bos`, unless a file says otherwise."""
    return () if self.special.adds_bos is False else (self.bos,)

  @property
  def special_names(self) -> list[str]:
    """Names of the special tokens, the longest first."""
    names = (name for name, i in self._ids.items() if i in self._special)
    return sorted(names, key=len, reverse=True)

  def files(self) -> dict[str, bytes]:
    """The model, and files with special ids that are not its own."""
    files = {"tokenizer.model": self._model}
    if self._alone:
      return files
    if self._added:
      files["added_tokens.json"] = json.dumps(self._added).encode()
    return files | self.special.files()

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns ids [length], int32; bytes must be UTF-8.

    SentencePiece would take U+2581 in the text for a space. It is encoded by
    its bytes instead, so that decoding restores it. A model with a dummy prefix
    would add a space to every part, so its text is encoded in one piece.

    Raises:
      ValueError: the text is not valid UTF-8; the message says where.
    """
    ids = self._encode(interface.utf8(text).decode("utf-8"))
    # SentencePiece finds the names of user-defined symbols in a text.
    if not self._special.isdisjoint(i for i in ids if i != self._unknown):
      ids = [j for i in ids for j in self._spelled(i)]
    return np.array(ids, np.int32)

  def encode_marked(self, text: str) -> np.ndarray:
    """Like `encode`, but names of special tokens, such as <s>, become ids.

    Only a text that begins with no such name gets the dummy prefix.
    """
    names = "|".join(map(re.escape, self.special_names))
    first, *rest = re.split(f"({names})", text)
    ids = self._encode(first)
    for i, part in enumerate(rest):
      ids += self._encode_inside(part) if i % 2 else [self._ids[part]]
    return np.array(ids, np.int32)

  def _encode(self, text: str) -> list[int]:
    if self._u2581 is None or self._adds_space or _SPACE not in text:
      return self._processor.encode(text)
    ids, *rest = self._processor.encode(text.split(_SPACE))
    for part in rest:
      ids += self._u2581 + part
    return ids

  def _encode_inside(self, text: str) -> list[int]:
    """Ids of what follows other text, without a dummy prefix."""
    if not self._adds_space:
      return self._encode(text)
    return self._encode(_NO_PIECE + text)[len(self._encode(_NO_PIECE)) :]

  def _spelled(self, i: int) -> list[int]:
    """An id that text may have; a special one is spelled by characters."""
    if i not in self._special or i == self._unknown:
      return [i]
    name = self._processor.id_to_piece(i)
    ids = []
    for character in name:
      found = [self._ids.get(character)]
      if None in found:
        found = [self._ids.get(f"<0x{b:02X}>") for b in character.encode()]
      ids += found
    if None in ids:
      raise ValueError(f"the vocabulary cannot spell {name!r} as plain text")
    return ids


def _piece_bytes(processor, index: int) -> bytes:
  piece = processor.id_to_piece(index)
  if processor.is_byte(index):
    return bytes([int(piece[1:-1], 16)])
  if processor.is_control(index):
    return b""
  if processor.is_unknown(index):
    return "\ufffd".encode()
  return piece.replace(_SPACE, " ").encode()
