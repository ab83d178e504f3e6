"""From lists of ids to prompts that have been read, in a cache."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import window as window_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
  """Prompts that have been read, and what head 1 says after them."""

  tokens: jax.Array  # [B, P]
  length: jax.Array  # [B]
  logits: jax.Array  # [B, V] head 1
  window: window_lib.Window  # of each prompt's last token; holds the cache


def pad(
  prompts: Sequence[Sequence[int]],
  vocab: int,
  *,
  cache_len: int | None = None,
  reserve: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the right with zeros, to which no row ever attends.

  The width is rounded up to a power of two, at least 16, where the cache has
  the room, so that prompts of many lengths compile only a few programs.

  Args:
    prompts: sequences of ids.
    vocab: V.
    cache_len: positions of the cache, if they are bounded.
    reserve: positions of it that the prompts may not use.

  Returns:
    tokens [B, P] int32, lengths [B] int32.

  Raises:
    ValueError: no prompts, an empty one, one too long for the cache, or an id
      outside 0..V-1 (JAX would clamp both silently); names the prompt.
  """
  if not len(prompts):
    raise ValueError("no prompts")
  rows = [_check(i, p, vocab) for i, p in enumerate(prompts)]
  longest = max(row.size for row in rows)
  padded = width(longest)
  if cache_len is not None:
    for i, row in enumerate(rows):
      if row.size + reserve > cache_len:
        raise ValueError(
          f"prompt {i} has {row.size} tokens; with {reserve} positions kept "
          f"for new ones it does not fit into a cache of {cache_len}"
        )
    padded = min(padded, cache_len - reserve)
  tokens = np.zeros((len(rows), padded), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : row.size] = row
  return tokens, np.array([row.size for row in rows], np.int32)


def width(longest: int) -> int:
  """Width P to which prompts of up to `longest` tokens are padded."""
  return max(16, 1 << (longest - 1).bit_length())


def read(
  decoder, tokens: jax.Array, lengths: jax.Array, *, heads: int, cache_len: int
) -> Prompt:
  """Reads prompts, at most `window.CHUNK` tokens per pass.

  As many passes as the longest prompt needs, whatever P is: prompts of all
  lengths up to P share one program, and no array grows with P squared.

  Args:
    decoder: an `interface.Decoder`.
    tokens: [B, P] int32 prompts from `pad`.
    lengths: [B] int32, at least 1.
    heads: k.
    cache_len: positions of the cache.
  """
  B, P = tokens.shape
  chunk_len = min(P, window_lib.CHUNK)
  last = lengths - 1

  def forward(cache, i):
    # The last window is shifted left so that it ends at P. Where it overlaps
    # the one before, it computes the same keys and values again.
    start = jnp.minimum(i * chunk_len, P - chunk_len)
    chunk = jax.lax.dynamic_slice_in_dim(tokens, start, chunk_len, 1)
    starts = jnp.full((B,), start, jnp.int32)
    valid = jnp.maximum(lengths - start, 0)
    return decoder.forward(cache, chunk, starts, valid=valid)

  def one_pass(i, carry):
    cache, states = carry
    window = forward(cache, i)
    place = last - window.start
    ends_here = ((place >= 0) & (place < chunk_len))[:, None, None]
    here = window.at(jnp.clip(place, 0, chunk_len - 1)[:, None], last)
    states = jax.tree.map(
      lambda old, new: jnp.where(ends_here, new, old),
      states,
      (here.trunk, here.states),
    )
    return window.cache, states

  cache = decoder.empty_cache(B, cache_len, heads)
  window = jax.eval_shape(forward, cache, 0)
  states = jax.tree.map(
    lambda s: jnp.zeros((B, 1, *s.shape[2:]), s.dtype),
    (window.trunk, window.states),
  )
  passes = (lengths.max() + chunk_len - 1) // chunk_len
  cache, states = jax.lax.fori_loop(0, passes, one_pass, (cache, states))
  trunk, states = states
  window = dataclasses.replace(
    window,
    cache=cache,
    start=last.astype(jnp.int32),
    trunk=trunk,
    states=states,
  )
  logits = decoder.logits(window, 0, jnp.zeros((B, 1), jnp.int32))[:, 0]
  return Prompt(tokens, lengths, logits, window)


read_jit = jax.jit(read, static_argnames=("heads", "cache_len"))


def _check(i: int, prompt: Sequence[int], vocab: int) -> np.ndarray:
  row = np.asarray(prompt)
  if row.ndim != 1:
    raise ValueError(f"prompt {i} is {prompt!r}, not a sequence of token ids")
  if not row.size:
    raise ValueError(
      f"prompt {i} is empty; give at least one token, such as the "
      "tokenizer's bos"
    )
  if not np.issubdtype(row.dtype, np.integer):
    raise ValueError(f"prompt {i} holds {row.dtype}, not token ids")
  bad = row[(row < 0) | (row >= vocab)]
  if bad.size:
    raise ValueError(
      f"prompt {i} holds id {bad[0]}, outside the vocabulary 0..{vocab - 1}"
    )
  return row
