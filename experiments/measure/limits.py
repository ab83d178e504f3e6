"""Limits of a device: its bytes and FLOPs per second, and a pass's bytes."""

import jax
import jax.numpy as jnp

from experiments.measure import timing
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import heads as heads_lib


def bandwidth(megabytes: int = 1024, repeats: int = 9) -> float:
  """Bytes per second at which the device reads a large array; measured."""
  x = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
  read = jax.jit(lambda x: x.sum())
  return x.nbytes / timing.median(lambda: read(x), repeats)


def flop_rate(size: int = 8192, repeats: int = 9) -> float:
  """bfloat16 FLOP/s of a product of two square matrices; measured.

  On random numbers: with zeros some processors are faster.
  """
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  product = jax.jit(lambda x: x @ x)
  return 2 * size**3 / timing.median(lambda: product(x), repeats)


def bytes_per_pass(
  decoder: decoder_lib.Transformer,
  tree: tree_lib.Tree,
  batch: int,
  length: float,
) -> float:
  """Bytes of weights and cache that one pass reads, each once.

  An unembedding that heads share is read twice where heads draft: for head 1
  over the window, and for the others once the accepted place is known.

  Args:
    decoder: the weights.
    tree: which heads are used.
    batch: rows B.
    length: tokens in each row's cache.
  """
  heads = range(tree.heads)
  if heads_lib.KINDS[decoder.cfg.head].feeds < 0:  # head 1 reads the others
    heads = range(decoder.n_future)
  modules = [decoder.head_modules[i] for i in heads]
  weights = [decoder.trunk, decoder.norm, *modules]
  own = len(decoder.unembed) > 1
  weights += decoder.unembed[: tree.heads] if own else decoder.unembed
  if not own and tree.max_depth:
    weights += decoder.unembed
  cache = jax.eval_shape(
    lambda d: d.empty_cache(batch, 1024, tree.heads), decoder
  )
  return _bytes(weights) + _bytes(cache) * length / 1024


def _bytes(tree) -> int:
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
