"""The peer: Hugging Face transformers decoding one token at a time on a CPU.

It gets our weights and the greedy text must be ours, so that what is compared
is the speed of ordinary decoding alone.
"""

import os
import pathlib
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from mtp_jax import tokenizer
from mtp_jax.decode import prompts
from mtp_jax.interchange import export
from mtp_jax.model import model, surgery, vocabulary

try:
  import torch
  import transformers
except ImportError as error:
  raise ImportError(
    "the peer needs torch and transformers, which mtp_jax does not: "
    "pip install torch transformers"
  ) from error


def of(
  net: model.Model, codec: tokenizer.Tokenizer, attention: str = "sdpa"
) -> transformers.PreTrainedModel:
  """Head 1's model in transformers; its logits are equal up to rounding.

  Ids beyond the tokenizer's, a padded vocabulary's, are left out.

  Args:
    net: the model.
    codec: its tokenizer.
    attention: transformers' attn_implementation.

  Returns:
    A float32 model in eval mode.

  Raises:
    ValueError: see `mtp_jax.save`.
  """
  first = surgery.drop_heads(net, 1)
  if codec.vocab < net.cfg.vocab:
    first = vocabulary.cut(first, range(codec.vocab))
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / "model"
    export.save(first, folder, codec=codec)
    return load(folder, attention)


def load(
  folder: pathlib.Path, attention: str = "sdpa", dtype: str = "float32"
) -> transformers.PreTrainedModel:
  """The model of a Hugging Face folder; no end token ends a text."""
  llama = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype), attn_implementation=attention
  )
  llama.generation_config = transformers.GenerationConfig()
  return llama.eval()


def generate(
  llama: transformers.PreTrainedModel,
  texts: Sequence[Sequence[int]],
  max_new: int,
  threads: int | None = None,
) -> list[np.ndarray]:
  """Continues every prompt greedily, all of them in one batch.

  Measure it on an idle machine: OpenMP's threads wait for one another by
  spinning, and beside another busy process two took up to 60 times as long
  as one. OMP_WAIT_POLICY=PASSIVE in the environment softens that.

  Args:
    llama: from `of` or `load`.
    texts: prompts, sequences of token ids of any lengths.
    max_new: tokens to write per prompt, exactly.
    threads: torch's, for the whole process; None: one per core.

  Returns:
    New tokens [max_new] int64 of each prompt.

  Raises:
    ValueError: an empty prompt, or an id outside the vocabulary.
  """
  tokens, lengths = prompts.pad(texts, llama.config.vocab_size)
  width = lengths.max()
  pad = width - lengths  # transformers continues rows padded on the left
  tokens = [np.roll(t[:width], p) for t, p in zip(tokens, pad, strict=True)]
  mask = np.arange(width) >= pad[:, None]
  torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
  with torch.inference_mode():
    out = llama.generate(
      torch.tensor(np.stack(tokens)).long(),
      attention_mask=torch.tensor(mask).long(),
      max_new_tokens=max_new,
      do_sample=False,
      use_cache=True,
    )
  return list(out[:, width:].numpy())


def decode(
  llama: transformers.PreTrainedModel, groups: Sequence, new: int
) -> tuple[list[list[np.ndarray]], np.ndarray]:
  """What `compare.decode` returns; prompts are not timed apart."""
  found, seconds = [], 0.0
  for group in groups:
    begin = time.perf_counter()
    found.append(generate(llama, group, new))
    seconds += time.perf_counter() - begin
  return found, np.array([0.0, seconds])
