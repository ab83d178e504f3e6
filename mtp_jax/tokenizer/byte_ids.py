"""One id per byte."""

import hashlib

import numpy as np
import tokenizers

from mtp_jax.tokenizer import hugging_face, interface, special_ids


class Bytes(interface.Tokenizer):
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

  def files(self) -> dict[str, bytes]:
    """The same ids as a tokenizer.json, for folders of Hugging Face."""
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    characters = hugging_face.bytes_of_characters()
    model = tokenizers.Tokenizer(tokenizers.models.BPE(characters, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(list(names.values()))
    model.post_processor = tokenizers.processors.TemplateProcessing(
      single="<bos> $A", special_tokens=[("<bos>", self.bos)]
    )
    special = special_ids.SpecialIds(
      self.bos, self.eos, self.pad, self.ends, True, names, None
    )
    return special.files() | {"tokenizer.json": model.to_str().encode()}

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns ids [length], int32, of bytes or of a str's UTF-8 form."""
    raw = interface.utf8(text) if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8).astype(np.int32)

  def decode_bytes(
    self, ids: interface.Ids, after: interface.Ids = ()
  ) -> bytes:
    """The inverse of `encode`: the exact bytes, without special ids.

    Raises:
      ValueError: an id is outside the vocabulary.
    """
    del after  # the bytes of an id do not depend on the text before it
    ids = interface.checked_ids(ids, self.vocab)
    return ids[ids < 256].astype(np.uint8).tobytes()
