"""Blockwise self-speculative greedy decoding, for any batch of prompts.

One forward pass reads the window [last accepted token, k-1 drafts]. Head 1's
choices at the k places verify the drafts: the longest agreeing prefix is
accepted, and the choice after it comes free. At the last accepted place heads
2..k write the next drafts. Each pass therefore writes 1 to k tokens, and with
k = 1 this is ordinary decoding, token by token.

  read      absorb(window)                            one trunk pass
  verify    best = argmax head 1 over the window      [B, k]
  accept    n = 1 + |longest prefix with best = draft|
  draft     argmax heads 2..k at place n - 1          [B, k-1]

Reference: the paper, section 3.2; Stern et al. 2018 (arXiv 1811.03115).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import prompts as prompts_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Everything a decoding loop carries."""

  tokens: jax.Array  # [B, S] prompts and what was written after them
  length: jax.Array  # [B] tokens so far; the cache holds length - 1 of them
  end: jax.Array  # [B] length at which a row is full
  drafts: jax.Array  # [B, k-1]
  done: jax.Array  # [B] stopped at an end token or at `end`
  passes: jax.Array  # [] decoding passes so far, the prompt's not counted
  written_in: jax.Array  # [B, S] pass that wrote a token; 0: the prompt's
  cache: tuple


@dataclasses.dataclass(frozen=True)
class Result:
  """Texts and counts on the host; rows in the order of the prompts."""

  tokens: list[np.ndarray]  # new tokens of each row, its end token included
  per_pass: list[np.ndarray]  # tokens written by each of a row's passes

  @property
  def passes(self) -> np.ndarray:
    """Passes [B] in which each row wrote, the prompt's not counted."""
    return np.array([len(counts) for counts in self.per_pass])

  @property
  def tokens_per_forward(self) -> float:
    """New tokens over decoding passes, all rows together, from 1 to k.

    The free token of each pass (head 1's own) counts; the prompt's pass and
    the token that it writes do not. Without any other pass it is nan.
    """
    counts = np.concatenate(self.per_pass)
    return float(counts.mean()) if counts.size else float("nan")


def begin(
  network,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  heads: int,
  max_new: int,
  stop: int,
  cache_len: int | None = None,
) -> State:
  """Reads the prompts, writes the first token and the first drafts.

  Args:
    network: a `network.Network`, or whatever has its methods.
    tokens: [B, P] int32 prompts from `prompts.pad`.
    lengths: [B] int32, at least 1.
    heads: k, from 1 to N.
    max_new: most tokens to write per row, at least 1.
    stop: id of the end token; -1 for none.
    cache_len: S, P + max_new + heads if it is None.

  Raises:
    ValueError: heads, max_new or cache_len out of bounds.
  """
  B, P = tokens.shape
  needed = P + max_new + heads  # a last window may reach past the end
  cache_len = needed if cache_len is None else cache_len
  if not 1 <= heads <= network.n_future:
    raise ValueError(f"heads={heads} is outside 1..{network.n_future}")
  if max_new < 1:
    raise ValueError(f"max_new={max_new} writes nothing; give at least 1")
  if cache_len < needed:
    raise ValueError(
      f"prompts of {P} tokens, max_new={max_new} and heads={heads} need "
      f"{needed} positions, but cache_len={cache_len}"
    )
  cache = network.empty_cache(B, cache_len, heads)
  memory = network.absorb(cache, tokens, jnp.zeros_like(lengths), heads)
  last = (lengths - 1)[:, None]
  best = network.predict(memory, 0, last).argmax(-1).astype(jnp.int32)
  buffer = jnp.zeros((B, cache_len), jnp.int32).at[:, :P].set(tokens)
  return State(
    tokens=_put(buffer, best, lengths, jnp.ones((B, 1), bool)),
    length=lengths + 1,
    end=lengths + max_new,
    drafts=_draft(network, memory, last, heads),
    done=(best[:, 0] == stop) | (max_new <= 1),
    passes=jnp.zeros((), jnp.int32),
    written_in=jnp.zeros((B, cache_len), jnp.int32),
    cache=memory.cache,
  )


def advance(network, state: State, stop: int) -> State:
  """One forward pass: verify, accept 1..k tokens in every row, draft anew.

  A row that is done computes along and writes nothing.
  """
  k, start = state.drafts.shape[1] + 1, state.length - 1
  window = jnp.concatenate(
    [jnp.take_along_axis(state.tokens, start[:, None], 1), state.drafts], 1
  )
  memory = network.absorb(state.cache, window, start, k)
  places = jnp.broadcast_to(jnp.arange(k), window.shape)
  best = network.predict(memory, 0, places).argmax(-1).astype(jnp.int32)

  agree = jnp.cumprod(best[:, :-1] == state.drafts, 1)
  count = jnp.minimum(1 + agree.sum(1), state.end - state.length)
  stops = (best == stop) & (places < count[:, None])
  count = jnp.where(stops.any(1), stops.argmax(1) + 1, count)
  count = jnp.where(state.done, 0, count)

  fresh = places < count[:, None]
  passes = state.passes + 1
  length = state.length + count
  return dataclasses.replace(
    state,
    tokens=_put(state.tokens, best, state.length, fresh),
    length=length,
    drafts=_draft(network, memory, jnp.maximum(count - 1, 0)[:, None], k),
    done=state.done | stops.any(1) | (length >= state.end),
    passes=passes,
    written_in=_put(
      state.written_in,
      jnp.broadcast_to(passes, best.shape),
      state.length,
      fresh,
    ),
    cache=memory.cache,
  )


def _draft(network, memory, at, heads):
  """Choices of heads 2..k at window place `at` [B, 1] -> [B, k-1] int32."""
  drafts = [network.predict(memory, i, at).argmax(-1) for i in range(1, heads)]
  empty = jnp.zeros((at.shape[0], 0), jnp.int32)
  return jnp.concatenate([empty, *drafts], 1).astype(jnp.int32)


def _put(buffer, new, start, keep):
  """buffer [B, S] with new [B, W] from `start` [B] on, where `keep` [B, W]."""

  def row(buffer, new, start, keep):
    old = jax.lax.dynamic_slice_in_dim(buffer, start, new.shape[0])
    new = jnp.where(keep, new, old)
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, 0)

  return jax.vmap(row)(buffer, new, start, keep)


# The loop's parts as a notebook or a server calls them: shapes compile once,
# the state's buffers are donated.
begin_jit = jax.jit(begin, static_argnames=("heads", "max_new", "cache_len"))
advance_jit = jax.jit(advance, donate_argnames="state")


@functools.partial(jax.jit, donate_argnames="state")
def run(network, state: State, *, stop: int) -> State:
  """`advance` until every row is done, in one `while_loop` on the device."""
  return jax.lax.while_loop(
    lambda s: ~s.done.all(), lambda s: advance(network, s, stop), state
  )


def generate(
  network,
  prompts: Sequence[Sequence[int]],
  *,
  heads: int,
  max_new: int,
  stop: int | None = None,
  cache_len: int | None = None,
) -> Result:
  """Continues every prompt greedily.

  Equals appending head 1's choice to the text until it ends, one pass per
  token, which is what heads=1 does. A pass over k tokens rounds differently
  from a pass over one, so near-ties between two tokens may fall the other way.

  Args:
    network: from `network.prepare(model)`.
    prompts: sequences of token ids, of any lengths.
    heads: k, from 1 (ordinary decoding) to N.
    max_new: most tokens to write per prompt.
    stop: id of the end token, or None.
    cache_len: positions of the cache; None: as many as are needed.

  Returns:
    The new tokens of each prompt and the passes they took.

  Raises:
    ValueError: an empty prompt, an id outside the vocabulary, heads outside
      1..N, max_new below 1, a prompt that with max_new + heads exceeds
      cache_len.
  """
  stop = -1 if stop is None else stop
  tokens, lengths = prompts_lib.pad(
    prompts, network.vocab, cache_len=cache_len, reserve=max_new + heads
  )
  state = begin_jit(
    network,
    tokens,
    lengths,
    heads=heads,
    max_new=max_new,
    stop=stop,
    cache_len=cache_len,
  )
  return collect(run(network, state, stop=stop), lengths)


def collect(state: State, lengths: np.ndarray) -> Result:
  """Copies a state's texts to the host; `lengths` [B] are the prompts'."""
  tokens, written_in, ends = jax.device_get(
    (state.tokens, state.written_in, state.length)
  )
  rows = [slice(a, b) for a, b in zip(lengths, ends, strict=True)]
  return Result(
    tokens=[t[new] for t, new in zip(tokens, rows, strict=True)],
    per_pass=[
      np.bincount(w[new])[1:] for w, new in zip(written_in, rows, strict=True)
    ],
  )
