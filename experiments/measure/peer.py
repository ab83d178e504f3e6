"""The peer: Hugging Face transformers decoding one token at a time on a CPU.

It gets our weights and the greedy text must be ours, so that what is compared
is the speed of ordinary decoding alone.
"""

import os
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from mtp_jax.decode import cpu, prompts
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import layers

try:
  import torch
  import transformers
except ImportError as error:
  raise ImportError(
    "the peer needs torch and transformers, which mtp_jax does not: "
    "pip install torch transformers"
  ) from error


def export(
  decoder: decoder_lib.Transformer, attention: str = "sdpa"
) -> transformers.LlamaForCausalLM:
  """The same ordinary decoder as a Hugging Face Llama, in memory.

  Its logits equal head 1's up to rounding: the trunk, in a parallel model
  head 1's own layer as the last one, the norm and head 1's unembedding. Ids
  beyond `decoder.vocab`, a padded vocabulary's, are left out.

  Args:
    decoder: from `mtp_jax.lay_out`, without a sliding window.
    attention: transformers' attn_implementation.

  Returns:
    A float32 model in eval mode, whatever the decoder's dtype.

  Raises:
    ValueError: heads of another kind than 'parallel' or 'unembedding', or a
      decoder with a sliding window; a Llama has neither.
  """
  cfg = decoder.cfg
  kind = heads_lib.KINDS[cfg.head]
  if kind.feeds or kind.layer not in (layers.Block, None):
    raise ValueError(
      f"model.head is {cfg.head!r}; only 'parallel' and 'unembedding' are "
      "exported as a Llama"
    )
  if decoder.sliding_window is not None:
    raise ValueError(
      f"the decoder looks back over {decoder.sliding_window} tokens; a Llama "
      "sees all"
    )
  blocks = decoder.trunk + decoder.heads[:1] * (kind.layer is not None)
  weights = {
    "model.embed_tokens": _numpy(decoder.embed)[: decoder.vocab],
    "model.norm": _numpy(decoder.norm),
    "lm_head": _numpy(decoder.unembed[0])[:, : decoder.vocab].T,
  }
  for i, block in enumerate(blocks):
    for name, weight in _layer(block).items():
      weights[f"model.layers.{i}.{name}"] = weight
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=decoder.vocab,
      hidden_size=cfg.width,
      intermediate_size=cfg.mlp,
      num_hidden_layers=len(blocks),
      num_attention_heads=cfg.attn_heads,
      num_key_value_heads=cfg.kv_heads,
      rms_norm_eps=cfg.norm_eps,
      rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
      tie_word_embeddings=False,
      bos_token_id=None,
      eos_token_id=None,  # no text ends early
      attn_implementation=attention,
    )
  )
  model.load_state_dict(
    {
      f"{name}.weight": torch.tensor(np.ascontiguousarray(weight))
      for name, weight in weights.items()
    }
  )
  return model.eval()


def load(
  folder: pathlib.Path, attention: str = "sdpa"
) -> transformers.PreTrainedModel:
  """The model of a Hugging Face folder, float32; no end token ends a text."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation=attention
  )
  model.generation_config = transformers.GenerationConfig()
  return model.eval()


def generate(
  model: transformers.PreTrainedModel,
  texts: Sequence[Sequence[int]],
  max_new: int,
  threads: int | None = None,
) -> list[np.ndarray]:
  """Continues every prompt greedily, all of them in one batch.

  Measure it on an idle machine: OpenMP's threads wait for one another by
  spinning, and beside another busy process two took up to 60 times as long
  as one. OMP_WAIT_POLICY=PASSIVE in the environment softens that.

  Args:
    model: from `export` or `load`.
    texts: prompts, sequences of token ids of any lengths.
    max_new: tokens to write per prompt, exactly.
    threads: torch's, for the whole process; None: one per core.

  Returns:
    New tokens [max_new] int64 of each prompt.

  Raises:
    ValueError: an empty prompt, or an id outside the vocabulary.
  """
  tokens, lengths = prompts.pad(texts, model.config.vocab_size)
  width = lengths.max()
  pad = width - lengths  # transformers continues rows padded on the left
  tokens = [np.roll(t[:width], p) for t, p in zip(tokens, pad, strict=True)]
  mask = np.arange(width) >= pad[:, None]
  torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
  with torch.inference_mode():
    out = model.generate(
      torch.tensor(np.stack(tokens)).long(),
      attention_mask=torch.tensor(mask).long(),
      max_new_tokens=max_new,
      do_sample=False,
      use_cache=True,
    )
  return list(out[:, width:].numpy())


def decode(
  model: transformers.PreTrainedModel, groups: Sequence, new: int
) -> tuple[list[list[np.ndarray]], np.ndarray]:
  """What `compare.decode` returns; prompts are not timed apart."""
  found, seconds = [], 0.0
  for group in groups:
    begin = time.perf_counter()
    found.append(generate(model, group, new))
    seconds += time.perf_counter() - begin
  return found, np.array([0.0, seconds])


def _layer(block) -> dict[str, np.ndarray]:
  """Weights of a `layers.Block` by transformers' names, [out, in]."""
  wq, wk, wv, wo = (_numpy(w) for w in (block.wq, block.wk, block.wv, block.wo))
  width, channels = wq.shape[0], wq.shape[-1]
  # we rotate channels 2i and 2i+1 together, they i and i + channels / 2
  halves = np.r_[0:channels:2, 1:channels:2]
  return {
    "input_layernorm": _numpy(block.attn_norm),
    "self_attn.q_proj": wq[..., halves].reshape(width, -1).T,
    "self_attn.k_proj": wk[..., halves].reshape(width, -1).T,
    "self_attn.v_proj": wv.reshape(width, -1).T,
    "self_attn.o_proj": wo.reshape(-1, width).T,
    "post_attention_layernorm": _numpy(block.mlp_norm),
    "mlp.gate_proj": _numpy(block.w_gate).T,
    "mlp.up_proj": _numpy(block.w_up).T,
    "mlp.down_proj": _numpy(block.w_down).T,
  }


def _numpy(param) -> np.ndarray:
  weight = param.get_value()
  weight = weight.array() if isinstance(weight, cpu.Matrix) else weight
  return np.asarray(weight, np.float32)
