"""SentencePiece models."""

import hashlib
import os
import pathlib

import numpy as np
import sentencepiece

from mtp_jax.tokenizer import interface

_SPACE = "\u2581"  # stands for a space in SentencePiece's pieces


class SentencePiece(interface.Tokenizer):
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
    self._model = model
    self._pieces = [_piece_bytes(p, i) for i in range(self.vocab)]
    # Whether the model adds a dummy prefix, a space before every text.
    self._adds_space = p.id_to_piece(p.encode("a")[0]).startswith(_SPACE)
    byte_ids = [p.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    # The ids of the bytes of U+2581, or None without byte fallback.
    self._u2581 = byte_ids if all(p.is_byte(i) for i in byte_ids) else None

  def files(self) -> dict[str, bytes]:
    """The model's file, under the name that folders have it by."""
    return {"tokenizer.model": self._model}

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns ids [length], int32; bytes must be UTF-8.

    SentencePiece would take U+2581 in the text for a space. It is encoded by
    its bytes instead, so that decoding restores it. A model with a dummy prefix
    would add a space to every part, so its text is encoded in one piece.

    Raises:
      ValueError: the text is not valid UTF-8; the message says where.
    """
    text = interface.utf8(text).decode("utf-8")
    if self._u2581 is None or self._adds_space or _SPACE not in text:
      return np.array(self._processor.encode(text), np.int32)
    ids, *rest = self._processor.encode(text.split(_SPACE))
    for part in rest:
      ids += self._u2581 + part
    return np.array(ids, np.int32)


def _piece_bytes(processor, index: int) -> bytes:
  piece = processor.id_to_piece(index)
  if processor.is_byte(index):
    return bytes([int(piece[1:-1], 16)])
  if processor.is_control(index):
    return b""
  if processor.is_unknown(index):
    return "\ufffd".encode()
  return piece.replace(_SPACE, " ").encode()
