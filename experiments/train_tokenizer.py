"""Trains a SentencePiece model on a corpus and proves it lossless there.

  python -m experiments.train_tokenizer --vocab=4096 --output=code.model
  python -m experiments.train --config=configs/quickstart.py \\
    --workdir=runs/pieces --config.data.tokenizer=code.model \\
    --config.model.vocab=4096

About 20 s on two cores for the default 20 MB of the machine's Python files.
Prints the bytes per token of documents that the model was not trained on.
"""

import re

from absl import flags, logging

from experiments.startup import options, program
from mtp_jax import config, tokenizer_training
from mtp_jax.data import corpora, splits

_SOURCE = flags.DEFINE_enum(
  "source", "python", config.SOURCES, "Kind of corpus."
)
_PATH = options.define_path("path", None, "File or folder of the corpus.")
_FIELD = flags.DEFINE_string("field", "text", "JSONL field of the text.")
_VOCAB = flags.DEFINE_integer("vocab", 4096, "Ids wanted.", lower_bound=260)
_OUTPUT = options.define_output("The model file to write.")
_MAX_BYTES = flags.DEFINE_integer(
  "max_bytes", 20_000_000, "Read no more of the corpus; 0: read it all."
)
_HELD_OUT = flags.DEFINE_float("held_out", 0.02, "Share not trained on.")
_ON_ERROR = flags.DEFINE_enum(
  "on_error", "raise", ("raise", "skip"), "What to do about damaged records."
)
_FIELDS = "source|path|field|max_bytes|held_out|on_error"


def main(_: list[str]) -> None:
  """Trains a SentencePiece model on the training split and writes it."""
  options.make_room(_OUTPUT.value)
  data = config.Data(
    source=_SOURCE.value,
    path=str(_PATH.value or ""),
    field=_FIELD.value,
    max_bytes=_MAX_BYTES.value,
    held_out=_HELD_OUT.value,
    on_error=_ON_ERROR.value,
  )
  try:
    _train(data.check())
  except ValueError as error:  # the library names fields, which are flags here
    text = re.sub(
      rf"(?<!\S)data\.({_FIELDS})\b(?:='(\w+)')?",
      lambda m: f"--{m[1]}" + (f"={m[2]}" if m[2] else ""),
      str(error),
    )
    raise ValueError(text) from error


def _train(data: config.Data) -> None:
  cut = splits.find_cut(splits.deduplicated(corpora.read(data)), data.held_out)
  skipped = corpora.Skipped()
  trained = tokenizer_training.train(
    _texts(data, skipped, cut, held_out=False), _OUTPUT.value, _VOCAB.value
  )
  if trained.vocab < _VOCAB.value:
    logging.warning("the corpus supports only %d ids", trained.vocab)
  if skipped.places and data.source != "python":
    logging.warning("left out of the corpus: %s", skipped)
  documents = size = tokens = 0
  for text in _texts(data, corpora.Skipped(), cut, held_out=True):
    ids = trained.encode(text)
    if trained.decode_bytes(ids) != text:
      raise RuntimeError(f"lossy on held-out document {documents}")
    documents, size = documents + 1, size + len(text)
    tokens += len(ids)
  print(f"{_OUTPUT.value}: {trained.vocab} ids, {trained.fingerprint}")
  print(
    f"{documents} held-out documents{f' ({cut})' if cut else ''}, {size} "
    "bytes: all come back exactly, "
    f"{size / tokens:.3f} bytes per token"
  )


def _texts(data, skipped, cut, held_out: bool):
  documents = splits.deduplicated(corpora.read(data, skipped), skipped)
  for document, is_held_out in splits.split(documents, data.held_out, cut):
    if is_held_out == held_out:
      yield document.text


if __name__ == "__main__":
  program.start(main)
