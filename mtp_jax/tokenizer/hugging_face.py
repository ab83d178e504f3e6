"""tokenizer.json, through the `tokenizers` package."""

import hashlib
import json
import os
import pathlib
import re

import numpy as np
import tokenizers

from mtp_jax.tokenizer import interface, special_ids


class HuggingFace(interface.Tokenizer):
  """A tokenizer that reads a tokenizer.json.

  Byte-level models decode to exactly the text that was encoded, unless they
  normalise it. Others keep to what SentencePiece models do: "▁" stands for a
  space, and pieces such as <0x0A> for bytes. Special ids are read from the
  files beside it (`special_ids`).

  Args:
    path: the file; `~` is expanded.

  Raises:
    ValueError: the file is missing, damaged, or of a kind that is not
      supported; or no id ends a document.

  Example:
    >>> import json, pathlib
    >>> import tokenizers
    >>> from mtp_jax import tokenizer
    >>> model = tokenizers.Tokenizer(tokenizers.models.BPE())
    >>> model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    >>> model.decoder = tokenizers.decoders.ByteLevel()
    >>> trainer = tokenizers.trainers.BpeTrainer(
    ...   special_tokens=["<end>"], show_progress=False,
    ...   initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ... )
    >>> model.train_from_iterator(["to be or not to be"] * 9, trainer)
    >>> model.save("tokenizer.json")
    >>> settings = json.dumps({"eos_token": "<end>"})
    >>> _ = pathlib.Path("tokenizer_config.json").write_text(settings)
    >>> codec = tokenizer.load("tokenizer.json")
    >>> codec.eos, codec.decode(codec.encode("né"))
    (0, 'né')
  """

  def __init__(self, path: str | os.PathLike):
    path = pathlib.Path(path).expanduser()
    try:
      self._json = path.read_bytes()
      fields = json.loads(self._json)
      self._tokenizer = tokenizers.Tokenizer.from_buffer(self._json)
    except Exception as error:  # `tokenizers` raises no subclass of it
      raise ValueError(
        f"{path} cannot be read as a tokenizer.json: {error}"
      ) from error
    if fields["model"].get("dropout"):
      raise ValueError(f"{path} drops merges at random (model.dropout)")
    try:
      decoder = _Decoder(fields.get("decoder"))
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
    t, ids = self._tokenizer, self._tokenizer.get_vocab()
    t.no_truncation()
    t.no_padding()
    self.vocab = 1 + max(ids.values(), default=-1)
    self.special = special_ids.read(path, t.token_to_id, self.vocab)
    self.bos, self.eos = self.special.bos, self.special.eos
    self.pad = self.special.pad
    # What text becomes that no piece has; a byte-level model has all bytes.
    unknown = None if decoder.byte_level else fields["model"].get("unk_token")
    self._unknown = ids.get(unknown, -1)
    self._special = self._mark_special()
    self._pieces = self._make_pieces(decoder, ids)
    self._adds_space = decoder.strips
    self._prefix = self._find_prefix()
    identity = json.dumps([self.bos, self.eos, self.pad]).encode()
    self.fingerprint = hashlib.sha256(self._json + identity).hexdigest()[:16]

  @property
  def prefix(self) -> tuple[int, ...]:
    """Ids that stand before a prompt; most models have none or `bos`."""
    return self._prefix

  @property
  def special_names(self) -> list[str]:
    """Names of the special tokens, the longest first."""
    names = (self._tokenizer.id_to_token(i) for i in self._special)
    return sorted(filter(None, names), key=len, reverse=True)

  def files(self) -> dict[str, bytes]:
    """tokenizer.json, and two files with its special ids."""
    return self.special.files() | {"tokenizer.json": self._json}

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns ids [length], int32; bytes must be UTF-8.

    Raises:
      ValueError: the text is not valid UTF-8; the message says where.
    """
    text = interface.utf8(text).decode("utf-8")
    ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    # Merges or a whole word may still make one, in an unusual model.
    if not self._special.isdisjoint(i for i in ids if i != self._unknown):
      ids = [j for i in ids for j in self._spelled(i)]
    return np.array(ids, np.int32)

  def encode_marked(self, text: str) -> np.ndarray:
    """Like `encode`, but names of special tokens, such as <s>, become ids."""
    self._tokenizer.encode_special_tokens = False
    try:
      ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    finally:
      self._tokenizer.encode_special_tokens = True
    return np.array(ids, np.int32)

  def _mark_special(self) -> set[int]:
    """Has `tokenizers` treat every special id as special; returns them."""
    t, s = self._tokenizer, self.special
    added = t.get_added_tokens_decoder()
    used = {s.bos, s.eos, s.pad, *s.ends}
    for i in used - {i for i, token in added.items() if token.special}:
      if name := t.id_to_token(i):  # ids may have gaps
        token = tokenizers.AddedToken(name, normalized=False, special=True)
        t.add_special_tokens([token])
    t.encode_special_tokens = True
    return used | {i for i, token in added.items() if token.special}

  def _make_pieces(self, decoder, ids) -> list[bytes]:
    pieces = [b""] * self.vocab
    added = self._tokenizer.get_added_tokens_decoder()
    for name, i in ids.items():
      if i not in self._special:
        pieces[i] = name.encode() if i in added else decoder.piece(name)
    if self._unknown not in {-1, self.bos, self.pad, *self.ends}:
      pieces[self._unknown] = "\ufffd".encode()
    return pieces

  def _find_prefix(self) -> tuple[int, ...]:
    """What the file's post-processor puts before a text."""
    if self.special.adds_bos is not None:
      return (self.bos,) if self.special.adds_bos else ()
    encoded = self._tokenizer.encode("a")
    count = (encoded.special_tokens_mask + [0]).index(0)
    return tuple(encoded.ids[:count])

  def _spelled(self, i: int) -> list[int]:
    """An id that text may have; a special one is spelled by characters."""
    if i not in self._special or i == self._unknown:
      return [i]
    name = self._tokenizer.id_to_token(i)
    ids = [self._tokenizer.token_to_id(character) for character in name]
    if None in ids:
      raise ValueError(f"the vocabulary cannot spell {name!r} as plain text")
    return ids


class _Decoder:
  """How pieces become bytes: the section "decoder" of tokenizer.json.

  Raises:
    ValueError: a step of it is not supported; names it.
  """

  def __init__(self, section: dict | None):
    self.strips = False  # one space, at the start of a text
    self.byte_level = self._byte_pieces = False
    self._replaced = {}
    self._add(section or {"type": "none"})
    self._byte_of = bytes_of_characters() if self.byte_level else {}

  def piece(self, name: str) -> bytes:
    """Bytes of a piece of the model's own vocabulary."""
    if self.byte_level and all(c in self._byte_of for c in name):
      return bytes(self._byte_of[c] for c in name)
    if self._byte_pieces and (hexadecimal := _BYTE.fullmatch(name)):
      return bytes.fromhex(hexadecimal[1])
    for old, new in self._replaced.items():
      name = name.replace(old, new)
    return name.encode()

  def _add(self, step):
    match step:
      case {"type": "Sequence", "decoders": list(steps)}:
        for each in steps:
          self._add(each)
      case {"type": "ByteLevel"}:
        self.byte_level = True
      case {"type": "ByteFallback"}:
        self._byte_pieces = True
      case {"type": "Fuse"}:
        pass
      case {"type": "Replace", "pattern": {"String": old}, "content": new}:
        self._replaced[old] = new
      case {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0}:
        self.strips = self.strips or step["start"] == 1
      case {"type": "Metaspace", "replacement": old}:
        self._replaced[old] = " "
        scheme = step.get("prepend_scheme", "always")
        self.strips = step.get("add_prefix_space", scheme != "never")
      case _:
        known = "ByteLevel, ByteFallback, Fuse, Replace, Strip and Metaspace"
        kind = step.get("type") if isinstance(step, dict) else step
        raise ValueError(
          f"its decoder {kind!r} is not supported, or not in this form: "
          f"{known} are"
        )


_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def bytes_of_characters() -> dict[str, int]:
  """The byte of each character of a byte-level model's pieces.

  Bytes that Latin-1 prints stand for themselves; the others, in order, are the
  characters from U+0100 on (GPT-2's table).
  """
  printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = (byte for byte in range(256) if byte not in printed)
  table = {chr(byte): byte for byte in printed}
  return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
