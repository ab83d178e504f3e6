"""Texts that are sampled, and yet the same for any number of heads.

The greedy texts of a small model repeat themselves. Sampling avoids that, but
speculative sampling promises the same distribution, not the same text. Here
the randomness is drawn before decoding, for every position of the text. Each
token is then a function of the tokens before it, as in greedy decoding, and
all numbers of heads have to write the same text.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.decode import interface, tree, window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noisy:
  """A decoder with noise added to its logits; see `interface.Decoder`.

  Heads that predict the same position add the same noise to their logits.
  The best token under Gumbel noise times a temperature is a sample at that
  temperature (the Gumbel-max trick).

  Attributes:
    decoder: from `mtp_jax.lay_out`.
    noise: [S, V] float32, of the token at each position of the text.
  """

  decoder: interface.Decoder
  noise: jax.Array

  @property
  def vocab(self) -> int:
    """V."""
    return self.decoder.vocab

  @property
  def n_future(self) -> int:
    """N, the number of heads."""
    return self.decoder.n_future

  @property
  def row_step(self) -> int:
    """The batch has to be a multiple of it."""
    return self.decoder.row_step

  def empty_cache(self, batch: int, cache_len: int, heads: int) -> tuple:
    """As of `decoder`."""
    return self.decoder.empty_cache(batch, cache_len, heads)

  def capacity(self, cache: tuple) -> int | None:
    """As of `decoder`."""
    return self.decoder.capacity(cache)

  def grow(self, cache: tuple, cache_len: int) -> tuple:
    """As of `decoder`."""
    return self.decoder.grow(cache, cache_len)

  def forward(
    self,
    cache: tuple,
    tokens: jax.Array,
    start: jax.Array,
    *,
    tree: tree.Tree | None = None,
    valid: jax.Array | None = None,
  ) -> window.Window:
    """As of `decoder`."""
    return self.decoder.forward(cache, tokens, start, tree=tree, valid=valid)

  def keep_path(self, window: window.Window, node: jax.Array) -> window.Window:
    """As of `decoder`."""
    return self.decoder.keep_path(window, node)

  def logits(
    self, window: window.Window, head: int, at: jax.Array
  ) -> jax.Array:
    """Logits [B, W', V] of one head at places [B, W'], with noise."""
    depth = at if window.tree is None else jnp.asarray(window.tree.depth)[at]
    positions = window.start[:, None] + depth + 1 + head
    return self.decoder.logits(window, head, at) + self.noise[positions]

  def draft(
    self, window: window.Window, heads: int, tokens: jax.Array
  ) -> tuple[jax.Array, window.Window]:
    """Logits [B, n, V] of the next heads after `tokens` [B, d], with noise."""
    logits, after = self.decoder.draft(window, heads, tokens)
    ahead = jnp.arange(1, 1 + logits.shape[1]) + tokens.shape[1]
    positions = window.start[:, None] + ahead
    return logits + self.noise[positions], after


def decoders(
  decoder: interface.Decoder, count: int, *, size: int, temperature: float
) -> list[Noisy]:
  """Decoders of `count` texts, each of which samples with its own noise.

  Args:
    decoder: from `mtp_jax.lay_out`.
    count: of texts; text i always gets the same noise.
    size: S, tokens of a text with its prompt, and of drafts behind its end.
    temperature: of the samples; 0: greedy decoding.
  """
  shape = size, decoder.vocab
  keys = map(jax.random.key, range(count))
  return [
    Noisy(decoder, temperature * jax.random.gumbel(key, shape)) for key in keys
  ]
