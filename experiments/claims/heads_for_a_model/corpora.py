"""What the heads learn from: this machine's files, or the model's own texts."""

import json
import pathlib

import numpy as np
from absl import logging

from experiments.claims.heads_for_a_model import scales
from mtp_jax import config
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.data import pipeline
from mtp_jax.decode import accept, sampling, serve
from mtp_jax.decode import decoder as decoder_lib

NAMES = ("files", "written")
# Draws at this temperature: greedy texts of small models end in loops.
TEMPERATURE = 0.7


def files(
  scale: scales.Scale, tokenizer: str, codec: tokenizer_lib.Tokenizer
) -> tuple[pipeline.Packed, pipeline.Packed]:
  """This machine's Python files, packed: (train, held out)."""
  data = config.Data(
    source="python",
    tokenizer=tokenizer,
    max_bytes=8 * (scale.train_tokens + scale.held_tokens) + 2**21,
    held_out=0.1,
  )
  return pipeline.pack(data.check(), codec)


def write(
  decoder: decoder_lib.Transformer,
  codec: tokenizer_lib.Tokenizer,
  train: pipeline.Packed,
  scale: scales.Scale,
  file: pathlib.Path,
) -> None:
  """Writes texts of the model to a JSONL file, until there are enough.

  The model continues beginnings of the training files; a document is the
  beginning and what follows. The heads see none of these files otherwise.
  """
  count = -(-scale.train_tokens // scale.written_new)
  prompts = train.excerpts(
    count, scale.written_prompt, scale.written_prompt, per_document=64
  )
  rule = accept.SpeculativeSampling(sampling.Sampler(temperature=TEMPERATURE))
  done = []

  def log(i, text):
    del i
    done.append(len(text.tokens))
    if len(done) % 100 == 0:
      logging.info("%d of %d texts written", len(done), count)

  texts = serve.generate_all(
    decoder,
    prompts,
    rows=min(scale.written_rows, count),
    heads=1,
    max_new=scale.written_new,
    stop=codec.eos,
    rule=rule,
    on_text=log,
  ).tokens
  partial = file.with_name(file.name + ".partial")
  with open(partial, "w", encoding="utf-8") as out:
    for prompt, text in zip(prompts, texts, strict=True):
      document = codec.decode(np.concatenate([prompt, text]))
      out.write(json.dumps({"text": document}) + "\n")
  partial.rename(file)


def written(
  file: pathlib.Path, tokenizer: str, codec: tokenizer_lib.Tokenizer
) -> pipeline.Packed:
  """The texts of `write`, packed."""
  data = config.Data(
    source="jsonl", path=str(file), tokenizer=tokenizer, held_out=0.01
  )
  return pipeline.pack(data.check(), codec)[0]
