"""Many prompts over a fixed number of rows: a finished row is refilled.

The device decodes `slots` rows. When one finishes, the loop ends, its text is
returned and the next prompt, read beforehand, takes its place. While the device
decodes, the host prepares prompts, copies texts and calls `on_text`.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import accept, blockwise, checks, choose, generate
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib

_READ = 8  # prompts read, and rows refilled, together at most


def generate_all(
  network,
  prompts: Sequence[Sequence[int]],
  *,
  slots: int,
  heads: int | tree_lib.Tree | str,
  max_new: int,
  stop: int | Sequence[int] | None = None,
  rule=accept.GREEDY,
  seed: int = 0,
  samples: int = 1,
  on_text: Callable[[int, generate.Text], None] | None = None,
) -> generate.Result:
  """Continues any number of prompts, `slots` rows at a time.

  Equals `generate.generate` of all prompts in one batch, without waiting for
  its longest text. Takes the caches of `slots` rows and, for a moment three
  times, of the prompts that are read together: 8, or on a mesh the next
  multiple of the devices that share rows. They are as long as the longest
  prompt needs; the rows' grow by half when a text fills them, and then the old
  ones live beside the new.

  Args:
    network: from `prepare.decoder(model)`.
    prompts: sequences of token ids, of any lengths.
    slots: rows B that are decoded at once.
    heads: k, a tree of drafts, or 'auto': what `choose.choose` finds fastest
      on the first prompts.
    max_new: most tokens to write per prompt.
    stop: id of the end token, several of them, or None.
    rule: from `accept`; decides which drafts are accepted.
    seed: of the rules that draw, from 0 to 2**32 - 1; text i depends on
      (seed, i) alone.
    samples: texts per prompt. They share one reading of it.
    on_text: called with (i, text) as texts are finished, in any order; not
      with a text whose logits were not finite.

  Returns:
    The texts: text i is sample i % samples of prompt i // samples.

  Raises:
    ValueError: as `generate.generate`; slots or samples below 1, or slots
      that a mesh does not divide. After all texts: logits that were not
      finite in some; names the first.
  """
  slots = checks.integer("slots", slots, 1)
  samples = checks.integer("samples", samples, 1)
  stops, seed = checks.stop_ids(stop, network.vocab), checks.seed(seed)
  if slots % network.row_step:
    raise ValueError(
      f"slots={slots} do not divide by the {network.row_step} devices of axis "
      "'data'"
    )
  prompts_lib.pad(prompts, network.vocab)  # all of them, before any work
  if isinstance(heads, str):
    if heads != "auto":
      raise ValueError(f"heads={heads!r}: give a number, a tree or 'auto'")
    count = _rounded(min(slots, len(prompts)), network.row_step)
    heads = choose.choose(
      network,
      [prompts[i % len(prompts)] for i in range(count)],
      batch=slots,
      max_new=max_new,
      stop=stop,
      rule=rule,
      seed=seed,
    ).tree
  tree = blockwise.plan(network, rule, heads, max_new=max_new)
  texts = {}
  for i, text in _serve(
    network, prompts, slots, tree, max_new, stops, rule, seed, samples
  ):
    texts[i] = text
    if on_text is not None and not np.isnan(text.logprob).any():
      on_text(i, text)
  generate.finite(sorted(texts.items()))
  return generate.Result([texts[i] for i in range(len(texts))], tree)


def _serve(
  network, prompts, slots, tree, max_new, stops, rule, seed, samples
) -> Iterator[tuple[int, generate.Text]]:
  width = prompts_lib.width(max(map(len, prompts)))
  size, cache_len = generate.sizes(width, tree, max_new, None)
  groups = _read_all(network, prompts, samples, tree, cache_len)
  prompt, ready = next(groups)
  state = _empty(network, rule, prompt, stops, slots, tree, size, cache_len)
  waiting = len(prompts) * samples  # texts that have not begun
  rows = [None] * slots  # (text number, prompt length) in each row
  finished = ([], None)  # rows whose copied texts have not been fetched

  while True:
    while waiting and None in rows:
      if not ready:
        prompt = None  # its cache is free for the next ones
        prompt, ready = next(groups)
      free = [b for b, row in enumerate(rows) if row is None]
      count = min(len(ready), _READ)
      batch = [(b, *ready.popleft()) for b in free[:count]]
      waiting -= len(batch)
      for b, number, _ in batch:
        rows[b] = (number, len(prompts[number // samples]))
      # Padded to a power of two, so that few shapes compile. The padding names
      # row `slots`, which does not exist, so its copies are dropped.
      padding = (1 << (len(batch) - 1).bit_length()) - len(batch)
      batch += [(slots, 0, 0)] * padding
      places, numbers, sources = map(np.array, zip(*batch, strict=True))
      state = _fill(
        network,
        rule,
        state,
        prompt,
        sources,
        places,
        numbers.astype(np.uint32),
        seed=seed,
        max_new=jnp.int32(max_new),
        stop=stops,
      )
    live = np.array([row is not None for row in rows])
    if live.any():
      state = _turn(network, rule, state, live, waiting > 0)
    # While the device decodes: read prompts, return the last turn's texts.
    if waiting and not ready:
      prompt = None
      prompt, ready = next(groups)
    for (i, length), text in zip(
      finished[0], jax.device_get(finished[1]) or [], strict=True
    ):
      yield i, generate.text(text, length)
    if not live.any():
      return
    done = np.flatnonzero(np.asarray(state.done) & live)
    finished = [rows[b] for b in done], [_take(state, b) for b in done]
    for b in done:
      rows[b] = None
    if not done.size:  # the turn ended because the cache is full
      state = blockwise.grow(network, state)


def _read_all(network, prompts, samples, tree, cache_len):
  """Prompts read together, and a (text number, row) for each of their texts."""
  together = _rounded(min(_READ, len(prompts)), network.row_step)
  for first in range(0, len(prompts), together):
    group = prompts[first : first + together]
    padding = [[0]] * (together - len(group))  # one program for all
    tokens, lengths = prompts_lib.pad([*group, *padding], network.vocab)
    numbers = range(first * samples, (first + len(group)) * samples)
    yield (
      prompts_lib.read_jit(
        network, tokens, lengths, heads=tree.heads, slots=cache_len
      ),
      collections.deque((i, i // samples - first) for i in numbers),
    )


def _rounded(count: int, step: int) -> int:
  return -(-count // step) * step


@functools.partial(
  jax.jit, static_argnames=("slots", "tree", "size", "cache_len")
)
def _empty(network, rule, prompt, stops, slots, tree, size, cache_len):
  """A state of `slots` rows that are done."""

  def make(prompt):
    row = jax.tree.map(lambda a: a[:1], prompt)
    key = jnp.zeros((1, 2), jnp.uint32)
    return blockwise.begin(
      rule, row, tree=tree, size=size, max_new=1, stop=stops, key=key
    )

  row = jax.eval_shape(make, prompt)
  state = jax.tree.map(lambda a: jnp.zeros((slots, *a.shape[1:]), a.dtype), row)
  return dataclasses.replace(
    state,
    done=jnp.ones((slots,), bool),
    cache=network.empty_cache(slots, cache_len, tree.heads),
  )


@functools.partial(jax.jit, donate_argnames="state")
def _fill(
  network,
  rule,
  state,
  prompt,
  sources,
  rows,
  numbers,
  *,
  seed,
  max_new,
  stop,
):
  """Texts `numbers` [A], begun from `sources` [A] of a batch, in `rows` [A]."""
  prompt = jax.tree.map(lambda a: a[sources], prompt)
  cache_len = network.room(state.cache) or state.tokens.shape[1]
  prompt = dataclasses.replace(
    prompt, cache=network.grow(prompt.cache, cache_len)
  )
  fresh = blockwise.begin(
    rule,
    prompt,
    tree=state.tree,
    size=state.tokens.shape[1],
    max_new=max_new,
    stop=stop,
    key=blockwise.row_keys(seed, numbers),
  )
  state = jax.tree.map(
    lambda old, new: old.at[rows].set(new, mode="drop"), state, fresh
  )
  # As large as before, and where it belongs on a mesh.
  return dataclasses.replace(state, cache=network.grow(state.cache, cache_len))


@functools.partial(jax.jit, donate_argnames="state")
def _turn(network, rule, state, live, waiting):
  """Decodes until a live row is done, or all of them if no prompt waits."""
  return blockwise.loop(
    network, rule, state, until=lambda s: waiting & (s.done & live).any()
  )


@jax.jit
def _take(state, b):
  """What a text is made from, of row b, in buffers of its own."""
  return {n: getattr(state, n)[b] for n in generate.FIELDS}
