"""Multi-token prediction for JAX (arXiv 2404.19737).

  mtp_jax.Config      a run's settings
  mtp_jax.fit         trains a model in a folder, or resumes there
  mtp_jax.load        the model, config and tokenizer of a run, or of a folder
                      of Hugging Face or Meta
  mtp_jax.save        a model as a folder of Hugging Face
  mtp_jax.lay_out     a decoder: the weights of a model, arranged for decoding
  mtp_jax.generate    continues prompts, several tokens per forward pass

The packages, each of which imports only what stands above it:

  fields, section_checks, sections, config    a run's settings, and their checks
  tokenizer   text to ids and back: bytes, SentencePiece, tokenizer.json
  tokenizer_training    trains SentencePiece models
  sharding    meshes, and which axis of an array is split over which devices
  data        the corpus: read, split, tokenised once, served in batches
  model       attention, layers, heads, the whole model, surgery on it, cost
  loss        the loss over all heads; its memory does not grow with N
  checkpoint  saving and restoring with orbax; a checksum per array
  decode      drafts, verification, sampling, batches of prompts
  evaluate    held-out loss of each head, expected tokens per forward; a sandbox
              for programs that a model wrote
  tasks       documents of a task, and its measure; what tasks share
  train       the training step, the loop around it, logs, resuming
  interchange    models in and out of the formats of others
"""

import importlib

__version__ = "0.1.0"

# Imported at first use: a program that only reads a config needs no JAX.
_FACE = {
  "Config": ("mtp_jax.config", "Config"),
  "fit": ("mtp_jax.train.loop", "fit"),
  "load": ("mtp_jax.interchange.folders", "load"),
  "save": ("mtp_jax.interchange.export", "save"),
  "lay_out": ("mtp_jax.decode.layout", "lay_out"),
  "generate": ("mtp_jax.decode.generate", "generate"),
}
__all__ = [*_FACE]


def __getattr__(name: str):
  if name not in _FACE:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, attribute = _FACE[name]
  return getattr(importlib.import_module(module), attribute)
