"""Multi-token prediction for JAX (arXiv 2404.19737).

  mtp_jax.Config      a run's settings
  mtp_jax.fit         trains a run, or goes on with it
  mtp_jax.load        (model, config, tokenizer) of a trained run
  mtp_jax.generate    continues prompts, several tokens per forward pass

The packages, each of which imports only what stands above it:

  config, fields, tokenizer, sharding      settings; text as ids; meshes
  data        documents, packed once; a batch is a function of (seed, step)
  model       attention, layers, heads, the model that joins them, its cost
  loss, cross_entropy    over all heads; memory does not grow with them
  checkpoint  orbax's checkpoints, a checksum per array
  decode      drafts, verification, sampling, batches of prompts
  evaluate    held-out loss of each head, expected tokens per forward
  train       the step, the loop around it, what a run keeps and says
"""

import importlib

__version__ = "0.1.0"

# Imported when first asked for: a program that reads a config needs no JAX.
_FACE = {
  "Config": ("mtp_jax.config", "Config"),
  "fit": ("mtp_jax.train.loop", "fit"),
  "load": ("mtp_jax.train.workdir", "load"),
  "generate": ("mtp_jax.decode.generate", "generate"),
}
__all__ = [*_FACE]


def __getattr__(name: str):
  if name not in _FACE:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, attribute = _FACE[name]
  return getattr(importlib.import_module(module), attribute)
