"""What the heads learn from: this machine's files, or the model's own texts."""

import json
import pathlib

import numpy as np

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
    max_bytes=4 * (scale.train_tokens + scale.held_tokens) + 2**21,
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
  beginning and what follows. Texts are kept as they are finished: after an
  interruption only the missing ones are drawn, from another seed.
  """
  count = -(-scale.train_tokens // scale.written_new)
  prompts = train.excerpts(
    count, scale.written_prompt, scale.written_prompt, per_document=64
  )
  partial = file.with_name(file.name + ".partial")
  lines = _whole_lines(partial)
  done = {json.loads(line)["number"] for line in lines}
  left = [i for i in range(count) if i not in done]
  with open(partial, "w", encoding="utf-8") as out:
    out.writelines(lines)

    def keep(i, text):
      tokens = np.concatenate([prompts[left[i]], text.tokens])
      row = {"number": left[i], "text": codec.decode(tokens)}
      out.write(json.dumps(row) + "\n")
      out.flush()

    if left:
      serve.generate_all(
        decoder,
        [prompts[i] for i in left],
        rows=min(scale.written_rows, len(left)),
        heads=1,
        max_new=scale.written_new,
        stop=codec.ends,
        rule=accept.SpeculativeSampling(
          sampling.Sampler(temperature=TEMPERATURE)
        ),
        seed=len(done),
        on_text=keep,
      )
  partial.rename(file)


def _whole_lines(file: pathlib.Path) -> list[str]:
  """Lines of a file that a kill may have cut; none if it is missing."""
  if not file.exists():
    return []
  lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
  return [line for line in lines if line.endswith("}\n")]


def written(
  file: pathlib.Path, tokenizer: str, codec: tokenizer_lib.Tokenizer
) -> pipeline.Packed:
  """The texts of `write`, packed."""
  data = config.Data(
    source="jsonl", path=str(file), tokenizer=tokenizer, held_out=0.01
  )
  return pipeline.pack(data.check(), codec)[0]
