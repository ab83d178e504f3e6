"""Converts text to ids and back.

interface       what every kind of tokenizer has; decoding piece by piece
byte_ids        one id per byte
sentence_piece  SentencePiece models
hugging_face    tokenizer.json
special_ids     bos, eos and the like, from the files beside a tokenizer's own
json_file       reads JSON files of models' folders
files           which kind a file or a folder holds
chat            a conversation as ids, by the chat template of a model
"""

from mtp_jax.tokenizer.byte_ids import Bytes
from mtp_jax.tokenizer.files import find, load
from mtp_jax.tokenizer.hugging_face import HuggingFace
from mtp_jax.tokenizer.interface import (
  Ids,
  Tokenizer,
  character,
  decode_parts,
  utf8,
)
from mtp_jax.tokenizer.sentence_piece import SentencePiece

__all__ = [
  "Bytes",
  "HuggingFace",
  "Ids",
  "SentencePiece",
  "Tokenizer",
  "character",
  "decode_parts",
  "find",
  "load",
  "utf8",
]
