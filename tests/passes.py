"""Passes of a decoder over windows, and the model without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import layout

# Logits are of order 1 and sums of at most 64 float32 products, each rounded
# at 1e-7 and in another order when a window is cut differently.
ATOL = 2e-5
B, T, S = 5, 29, 37
ZERO = np.zeros(B, np.int32)

decoder_of = jax.jit(layout.lay_out)
uncached = jax.jit(lambda net, tokens: net(tokens))


@functools.partial(jax.jit, static_argnames="heads")
def read(decoder, cache, window, start, at, *, heads):
  """One pass: the cache, and logits [k, B, W', V] of k heads at `at`."""
  memory = decoder.forward(cache, window, start)
  logits = [decoder.logits(memory, i, at) for i in range(heads)]
  return memory.cache, jnp.stack(logits)


def text() -> np.ndarray:
  """[B, T] random tokens."""
  return np.random.default_rng(1).integers(0, 31, (B, T)).astype(np.int32)


def places(width: int) -> np.ndarray:
  """[B, W] every place of a window."""
  return np.broadcast_to(np.arange(width, dtype=np.int32), (B, width))
