"""A decoder with chosen logits, and what it has to write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.decode import generate as decode
from mtp_jax.decode import interface
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.decode import window as window_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mock:
  """The next token is a sum over the whole prefix; drafts are right to order.

  Its cache holds the tokens themselves: one that is stale, misplaced or
  clamped changes every later choice. A draft that is not to be right has the
  right token second.
  """

  wanted: jax.Array  # [B, S] right first choices of a pass drafted at s, and 1
  vocab: int = dataclasses.field(metadata={"static": True})
  n_future: int = dataclasses.field(metadata={"static": True})
  row_step = 1

  def empty_cache(self, batch, cache_len, heads):
    return (jnp.full((batch, cache_len), 10_000),)

  def capacity(self, cache):
    return cache[0].shape[1]

  def grow(self, cache, cache_len):
    old = cache[0]
    return (jnp.pad(old, ((0, 0), (0, cache_len - old.shape[1]))),)

  def forward(self, cache, tokens, start, *, tree=None, valid=None):
    def write(old, new, start):
      return jax.lax.dynamic_update_slice_in_dim(old, new, start, 0)

    cache = jax.vmap(write)(cache[0], tokens, start)
    trunk = jnp.zeros((*tokens.shape, 1))
    return window_lib.Window((cache,), start, trunk, tree=tree)

  def keep_path(self, window, node):
    cache, start = window.cache[0], window.start[:, None]
    path, depth = (
      jnp.asarray(x)[node] for x in (window.tree.path_nodes, window.tree.depth)
    )
    rows = jnp.arange(len(path))[:, None]
    to = start + jnp.arange(path.shape[1])
    cache = cache.at[rows, to].set(cache[rows, start + path])
    trunk = jnp.zeros((len(path), 1, 1))
    return window_lib.Window((cache,), window.start + depth, trunk)

  def draft(self, window, heads, tokens):
    at = jnp.zeros((len(window.start), 1), jnp.int32)
    logits = [self.logits(window, i, at) for i in range(1, heads)]
    return jnp.concatenate(logits, 1), window

  def logits(self, window, head, at):
    total, position = self.totals(window, at)
    token = total % self.vocab
    for ahead in range(head):
      total += (token + 1) * (position + 2 + ahead)
      token = total % self.vocab
    return self.told(token, head, position)

  def totals(self, window, at):
    """What decides the next token after places [B, W'], and their positions."""
    cache, start = window.cache[0], window.start[:, None]
    slot = jnp.arange(cache.shape[1])
    if window.tree is None:
      depth, position = slot, start + at
      seen = slot <= position[..., None]  # [B, W', S]
      place = slot
    else:
      depth, sees = map(
        jnp.asarray, (window.tree.depth, window.tree.ancestor_mask)
      )
      position, node = start + depth[at], slot - start  # [B, W'], [B, S]
      inside = jnp.clip(node, 0, len(depth) - 1)
      ours = jax.vmap(lambda a, n: sees[a][:, n])(at, inside)
      ours &= (node < len(depth))[:, None]
      seen = (node < 0)[:, None] | ours
      place = jnp.where(node < 0, slot, start + depth[inside])[:, None]
    return ((cache[:, None] + 1) * (place + 1) * seen).sum(-1), position

  def told(self, token, head, position):
    """Logits of a token; of a draft that is to be wrong, second."""
    logits = jax.nn.one_hot(token, self.vocab)
    if head:
      wanted = jnp.take_along_axis(self.wanted, position, 1)
      wrong = jax.nn.one_hot((token + 1) % self.vocab, self.vocab)
      logits += 2 * wrong * (head >= wanted)[..., None]
    return logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequential(Mock):
  """Its heads read tokens: each drafts alone, from the drafts before it."""

  def draft(self, window, heads, tokens):
    head = tokens.shape[1]
    at = jnp.zeros((len(window.start), 1), jnp.int32)
    total, position = self.totals(window, at)
    for ahead in range(head):
      total += (tokens[:, ahead, None] + 1) * (position + 2 + ahead)
    return self.told(total % self.vocab, head, position), window


class Broken(Mock):
  """Its logits are not finite where a text begins with 9."""

  def logits(self, window, head, at):
    logits = super().logits(window, head, at)
    spoilt = window.cache[0][:, 0] == 9
    return jnp.where(spoilt[:, None, None], jnp.nan, logits)


jax.tree_util.register_dataclass(Broken, ["wanted"], ["vocab", "n_future"])


def mock_text(prompt, vocab, max_new, stop=None):
  """What the mock's head 1 writes, in plain Python."""
  text, stops = list(prompt), np.atleast_1d(-1 if stop is None else stop)
  while len(text) < len(prompt) + max_new:
    text.append(sum((t + 1) * (s + 1) for s, t in enumerate(text)) % vocab)
    if text[-1] in stops:
      break
  return text[len(prompt) :]


def mock_counts(prompt, text, wanted, tree):
  """Tokens of each pass, given the whole new text and one row of `wanted`."""
  counts, length = [], len(prompt) + 1
  while length < len(prompt) + len(text):
    path = ()
    for head in range(1, tree.heads):
      step = (*path, 0 if head < wanted[length - 2] else 1)
      if step not in tree.paths:
        break
      path = step
    room = len(prompt) + len(text) - length
    counts.append(min(len(path) + 1, room))
    length += counts[-1]
  return counts


def check_mock(mock, prompts, heads, max_new, stop=None, cache_len=None):
  got = decode.generate(
    mock, prompts, heads=heads, max_new=max_new, stop=stop, cache_len=cache_len
  )
  tree = tree_lib.chain(heads) if isinstance(heads, int) else heads
  for b, prompt in enumerate(prompts):
    text = mock_text(prompt, mock.vocab, max_new, stop)
    counts = mock_counts(prompt, text, mock.wanted[b], tree)
    assert got.tokens[b].tolist() == text
    assert got.per_pass[b].tolist() == counts
    assert got.passes[b] == len(counts)
  written = sum(len(t) - 1 for t in got.tokens)
  if written:
    assert got.tokens_per_forward == pytest.approx(written / sum(got.passes))
  else:
    assert np.isnan(got.tokens_per_forward)
  return got


def start(decoder, prompts, *, cache_len=None, **settings):
  """The state after the prompts' pass."""
  tokens, lengths = prompts_lib.pad(prompts, decoder.vocab)
  checked = interface.check_settings(decoder, **settings)
  return decode.start(decoder, tokens, lengths, checked, cache_len=cache_len)


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]]


# Nodes where a right token may come second, at every depth but the last.
TREE = tree_lib.from_paths(
  [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
)
