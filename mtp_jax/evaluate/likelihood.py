"""Log-likelihoods of texts under head 1, as benchmarks of choices ask for them.

A prefix that several texts share is read once, and its keys and values serve
all of them.
"""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import tokenizer
from mtp_jax.decode import checks, interface
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import window as window_lib
from mtp_jax.tokenizer import interface as tokenizer_ids

_BLOCK = 32  # positions of each row whose logits exist at once


class Item(NamedTuple):
  """A text to score after another; both are ids, at least one each."""

  context: Sequence[int]
  continuation: Sequence[int]


class Score(NamedTuple):
  """What head 1 says of a continuation."""

  logprob: float  # natural logarithm of its probability after the context
  greedy: bool  # whether each of its tokens has the highest probability


class _Tail(NamedTuple):
  """What follows a shared prefix: the rest of a context, a continuation."""

  index: int  # of the item
  tokens: Sequence[int]
  skip: int  # tokens of the context, which are not scored


def score(
  decoder: interface.Decoder, items: Sequence[Item], *, rows: int = 8
) -> list[Score]:
  """Scores every continuation after its context.

  `logprob` is the sum of log softmax(model(context + continuation)) over the
  continuation's tokens, without the logits of all positions in memory. Items
  of one context read it once. If all contexts begin alike, as with few-shot
  examples, and it is less to read, this beginning is read once instead.

  A model with dynamic rotary scaling scales by the length read so far, so
  beyond its trained length a shared prefix is read otherwise than alone.

  Args:
    decoder: from `mtp_jax.lay_out`.
    items: contexts and continuations. `of_texts` makes one of two texts.
    rows: texts at once.

  Returns:
    A Score for each item, in order.

  Raises:
    ValueError: an empty context or continuation, or an id outside the
      vocabulary; names the item.

  Example, with the run that the example of `mtp_jax.fit` trains:
    >>> import mtp_jax
    >>> from mtp_jax.evaluate import likelihood
    >>> net, _, codec = mtp_jax.load("runs/tiny")
    >>> decoder = mtp_jax.lay_out(net, codec.vocab)
    >>> items = [
    ...   likelihood.of_texts(codec, "To be or", text)
    ...   for text in (" not to be.", " so.")
    ... ]
    >>> [found.logprob < 0 for found in likelihood.score(decoder, items)]
    [True, True]
  """
  rows = checks.integer("rows", rows, 1)
  if rows % decoder.row_step:
    raise ValueError(
      f"rows={rows} do not divide by the {decoder.row_step} devices of axis "
      "'data'"
    )
  items = [
    _checked(i, Item(*item), decoder.vocab) for i, item in enumerate(items)
  ]
  found = [None] * len(items)
  groups = sorted(_shared(items).items(), key=lambda group: len(group[0]))
  for some in _batches(groups, rows):
    prefixes = [prefix for prefix, _ in some]
    tails = [(i, tail) for i, (_, group) in enumerate(some) for tail in group]
    tails.sort(key=lambda pair: len(pair[1].tokens))
    width = _width(max(len(tail.tokens) for _, tail in tails))
    prompt = _read(decoder, prefixes, rows, width)
    for batch in _batches(tails, rows):
      places, texts, skips = _padded(batch, rows)
      logprob, greedy = jax.device_get(
        _score(decoder, prompt, places, *texts, skips)
      )
      for row, (_, tail) in enumerate(batch):
        found[tail.index] = Score(float(logprob[row]), bool(greedy[row]))
  return found


def rolling(
  decoder: interface.Decoder,
  texts: Sequence[Sequence[int]],
  *,
  prefix: int,
  length: int,
  rows: int = 8,
) -> list[float]:
  """The log-likelihood of whole texts, of any length, each after `prefix`.

  Args:
    decoder: from `mtp_jax.lay_out`.
    texts: ids; an empty text has 0.
    prefix: the id that stands before each, such as the tokenizer's bos.
    length: tokens that the model reads at once; see `windows`.
    rows: windows at once.
  """
  items, of_text = [], []
  for i, text in enumerate(texts):
    for item in windows(text, prefix, length):
      items.append(item)
      of_text.append(i)
  totals = [0.0] * len(texts)
  for i, found in zip(of_text, score(decoder, items, rows=rows), strict=True):
    totals[i] += found.logprob
  return totals


def windows(text: Sequence[int], prefix: int, length: int) -> Iterator[Item]:
  """Cuts a text into windows that together predict each token once.

  A window reads `length` tokens. The first begins with `prefix`, each further
  one with the last token of the one before; the last window begins earlier, so
  that it reads `length` tokens too.

  Example:
    >>> from mtp_jax.evaluate import likelihood
    >>> list(map(tuple, likelihood.windows([1, 2, 3, 4, 5], 0, 2)))
    [([0], [1, 2]), ([2], [3, 4]), ([3, 4], [5])]
  """
  text = list(text)
  checks.integer("length", length, 1)
  if text:
    yield Item([prefix], text[:length])
  for done in range(length, len(text), length):
    end = min(done + length, len(text))
    yield Item(text[end - length - 1 : done], text[done:end])


def of_texts(
  codec: tokenizer.Tokenizer,
  context: str,
  continuation: str,
  length: int | None = None,
) -> Item:
  """Two texts as ids; spaces at the end of the context go to the continuation.

  An empty context is the tokenizer's bos.

  Args:
    codec: the tokenizer.
    context: text before.
    continuation: text to score.
    length: tokens that the model reads at most; of a longer context the end is
      kept. None: no limit.

  Raises:
    ValueError: the continuation has no token, or more than `length`.
  """
  kept = context.rstrip()
  continuation = context[len(kept) :] + continuation
  before = [*codec.prefix, *codec.encode(kept)] if kept else []
  ids = codec.encode_after(continuation, kept).tolist()
  before = before or [codec.bos]
  if not ids:
    raise ValueError(f"the continuation {continuation!r} has no token")
  if length is not None:
    if len(ids) > length:
      raise ValueError(
        f"the continuation {continuation!r:.60} has {len(ids)} tokens, more "
        f"than the {length} that the model reads: raise the length"
      )
    before = before[-(length + 1 - len(ids)) :]
  return Item([int(i) for i in before], ids)


def _checked(i: int, item: Item, vocab: int) -> Item:
  for name, ids in zip(("context", "continuation"), item, strict=True):
    if not len(ids):
      raise ValueError(
        f"the {name} of item {i} is empty; give one token or more"
      )
    try:
      tokenizer_ids.checked_ids(ids, vocab)
    except ValueError as error:
      raise ValueError(f"the {name} of item {i}: {error}") from error
  return Item(*(tuple(map(int, ids)) for ids in item))


def _shared(items: list[Item]) -> dict[tuple[int, ...], list[_Tail]]:
  """Items by the prefix that is read once for them."""
  contexts = {item.context for item in items}
  common = len(os.path.commonprefix(list(contexts))) if contexts else 0
  apart = sum(map(len, contexts))
  together = common + sum(len(item.context) - common for item in items)
  groups = {}
  for i, (context, continuation) in enumerate(items):
    size = common if 0 < common and together < apart else len(context)
    tail = _Tail(i, context[size:] + continuation, len(context) - size)
    groups.setdefault(context[:size], []).append(tail)
  return groups


def _batches(items: list, size: int) -> Iterator[list]:
  for first in range(0, len(items), size):
    yield items[first : first + size]


def _width(longest: int) -> int:
  """Width to which tails are padded: one token, and whole windows after it."""
  rest = max(longest - 1, 8)  # few widths, so few programs
  if rest <= window_lib.CHUNK:
    return 1 + (1 << (rest - 1).bit_length())
  return 1 + -(-rest // window_lib.CHUNK) * window_lib.CHUNK


def _read(decoder, prefixes, rows, width):
  """The prefixes, read, with room for tails of `width` tokens."""
  padding = [[0]] * (rows - len(prefixes))  # one program for all
  tokens, lengths = prompts_lib.pad([*prefixes, *padding], decoder.vocab)
  return prompts_lib.read_jit(
    decoder, tokens, lengths, heads=1, cache_len=tokens.shape[1] + width
  )


def _padded(batch, rows):
  """places [rows], (tokens [rows, W], lengths [rows]), skips [rows]."""
  width = _width(max(len(tail.tokens) for _, tail in batch))
  tokens = np.zeros((rows, width), np.int32)
  places, lengths, skips = np.zeros((3, rows), np.int32)
  for row, (place, tail) in enumerate(batch):
    tokens[row, : len(tail.tokens)] = tail.tokens
    places[row], lengths[row], skips[row] = place, len(tail.tokens), tail.skip
  return places, (tokens, lengths), skips


@jax.jit
def _score(decoder, prompt, places, tokens, lengths, skips):
  """(logprob [B], greedy [B]) of tails [B, W] after the prompts at `places`.

  The prompt's pass gives the logits for the first token of each tail. Windows
  over the tail give the logits for the others.
  """
  prompt = jax.tree.map(lambda a: a[places], prompt)
  counted = (jnp.arange(tokens.shape[1]) >= skips[:, None]) & (
    jnp.arange(tokens.shape[1]) < lengths[:, None]
  )
  first = _logprobs(prompt.logits[:, None], tokens[:, :1], counted[:, :1])
  size = min(tokens.shape[1] - 1, window_lib.CHUNK)

  def one_window(carry, i):
    cache, logprob, greedy = carry
    read, targets, count = (
      jax.lax.dynamic_slice_in_dim(a, i * size + ahead, size, 1)
      for a, ahead in ((tokens, 0), (tokens, 1), (counted, 1))
    )
    valid = jnp.clip(lengths - 1 - i * size, 0, size)
    start = prompt.length + i * size
    window = decoder.forward(cache, read, start, valid=valid)
    block = min(_BLOCK, size)

    def one_block(j):
      at = jnp.broadcast_to(j * block + jnp.arange(block), (len(start), block))
      logits = decoder.logits(window, 0, at)
      picked = (jnp.take_along_axis(a, at, 1) for a in (targets, count))
      return _logprobs(logits, *picked)

    sums, all_best = jax.lax.map(one_block, jnp.arange(size // block))
    carry = window.cache, logprob + sums.sum(0), greedy & all_best.all(0)
    return carry, None

  carry = prompt.window.cache, *first
  count = (tokens.shape[1] - 1) // size
  return jax.lax.scan(one_window, carry, jnp.arange(count))[0][1:]


def _logprobs(logits, tokens, counted):
  """Sums of log-probabilities [B], and whether all counted are the best."""
  logits = logits - jax.nn.logsumexp(logits, -1, keepdims=True)
  own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  best = logits.argmax(-1) == tokens
  return jnp.where(counted, own, 0.0).sum(1), (best | ~counted).all(1)
