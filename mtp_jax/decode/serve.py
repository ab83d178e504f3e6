"""Many prompts over a fixed number of rows: a finished row is refilled.

When a row finishes, the device's loop ends, the row's text is returned and the
next prompt, read beforehand, takes its place. While the device decodes, the
host prepares prompts, copies texts and calls `on_text`.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import autotune, checks, generate, interface, loop
from mtp_jax.decode import prompts as prompts_lib

_READ = 8  # prompts read, and rows refilled, together at most


def generate_all(
  decoder: interface.Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  rows: int,
  samples: int = 1,
  on_text: Callable[[int, generate.Text], None] | None = None,
  **settings: Any,
) -> generate.Result:
  """Continues any number of prompts, so many rows at a time.

  Equals `generate.generate` of all prompts in one batch, without waiting for
  its longest text. Memory holds the caches of these rows and, for a moment
  three times, those of the prompts that are read together: 8, or on a mesh the
  next multiple of the devices that share rows. Caches are as long as the
  longest prompt needs. When a text fills its row, those of the rows grow by
  half, and for a moment the old ones are held beside the new.

  Example, with the run that the example of `mtp_jax.fit` trains:
    >>> import mtp_jax
    >>> from mtp_jax.decode import accept, sampling, serve
    >>> net, _, codec = mtp_jax.load("runs/tiny")
    >>> decoder = mtp_jax.lay_out(net, codec.vocab)
    >>> prompts = [[codec.bos, *codec.encode(text)] for text in ("To", "be or")]
    >>> rule = accept.SpeculativeSampling(sampling.Sampler(temperature=0.8))
    >>> result = serve.generate_all(
    ...   decoder, prompts, rows=3, samples=2, heads=4, max_new=9, rule=rule
    ... )
    >>> len(result.texts)
    4

  Args:
    decoder: from `mtp_jax.lay_out(model)`.
    prompts: sequences of token ids, of any lengths.
    rows: B, how many are decoded at once.
    samples: texts per prompt. They share one reading of it.
    on_text: called with (i, text) as texts are finished, in any order; not
      with a text whose logits were not finite.
    **settings: of `interface.check_settings`: heads and max_new; if wanted
      stop, rule and seed. heads='auto' is what `autotune.choose` finds fastest
      on the first prompts.

  Returns:
    The texts: text i is sample i % samples of prompt i // samples.

  Raises:
    ValueError: as `generate.generate`; rows or samples below 1, or rows
      that a mesh does not divide. After all texts: logits that were not
      finite in some; names the first.
  """
  rows = checks.integer("rows", rows, 1)
  samples = checks.integer("samples", samples, 1)
  heads = settings.get("heads")
  auto = isinstance(heads, str) and heads == "auto"
  if isinstance(heads, str) and not auto:
    raise ValueError(f"heads={heads!r}: give a number, a tree or 'auto'")
  checked = interface.check_settings(
    decoder, **(settings | {"heads": 1} if auto else settings)
  )
  if rows % decoder.row_step:
    raise ValueError(
      f"rows={rows} do not divide by the {decoder.row_step} devices of axis "
      "'data'"
    )
  prompts_lib.pad(prompts, decoder.vocab)  # all of them, before any work
  if auto:
    count = _rounded(min(rows, len(prompts)), decoder.row_step)
    some = [prompts[i % len(prompts)] for i in range(count)]
    del settings["heads"]
    best = autotune.choose(decoder, some, batch=rows, **settings)
    checked = interface.check_settings(decoder, heads=best.tree, **settings)
  texts = {}
  for i, text in _serve(decoder, prompts, rows, samples, checked):
    texts[i] = text
    if on_text is not None and not np.isnan(text.logprob).any():
      on_text(i, text)
  generate.finite(sorted(texts.items()))
  return generate.Result([texts[i] for i in range(len(texts))], checked.tree)


def _serve(
  decoder, prompts, rows, samples, settings
) -> Iterator[tuple[int, generate.Text]]:
  tree, rule = settings.tree, settings.rule
  width = prompts_lib.width(max(map(len, prompts)))
  size, cache_len = generate.sizes(width, tree, int(settings.max_new), None)
  groups = _read_all(decoder, prompts, samples, tree, cache_len)
  prompt, ready = next(groups)
  state = _empty(decoder, settings, prompt, rows, size, cache_len)
  waiting = len(prompts) * samples  # texts that have not begun
  texts = [None] * rows  # (number, prompt length) of the one in each row
  finished = ([], None)  # rows whose copied texts have not been fetched

  while True:
    while waiting and None in texts:
      if not ready:
        prompt = None  # its cache is free for the next ones
        prompt, ready = next(groups)
      free = [b for b, text in enumerate(texts) if text is None]
      count = min(len(ready), _READ)
      batch = [(b, *ready.popleft()) for b in free[:count]]
      waiting -= len(batch)
      for b, number, _ in batch:
        texts[b] = (number, len(prompts[number // samples]))
      # Padded to a power of two, so that few shapes compile. The padding names
      # a row that does not exist, so its copies are dropped.
      padding = (1 << (len(batch) - 1).bit_length()) - len(batch)
      batch += [(rows, 0, 0)] * padding
      state = _fill(decoder, settings, state, prompt, np.array(batch).T)
    live = np.array([text is not None for text in texts])
    if live.any():
      state = loop.make_room(decoder, state)
      state = _decode(decoder, rule, state, live, waiting > 0)
    # While the device decodes: read prompts, return the texts finished before.
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
    finished = [texts[b] for b in done], [_take(state, b) for b in done]
    for b in done:
      texts[b] = None


def _read_all(decoder, prompts, samples, tree, cache_len):
  """Prompts read together, and a (text number, row) for each of their texts."""
  together = _rounded(min(_READ, len(prompts)), decoder.row_step)
  for first in range(0, len(prompts), together):
    group = prompts[first : first + together]
    padding = [[0]] * (together - len(group))  # one program for all
    tokens, lengths = prompts_lib.pad([*group, *padding], decoder.vocab)
    numbers = range(first * samples, (first + len(group)) * samples)
    yield (
      prompts_lib.read_jit(
        decoder, tokens, lengths, heads=tree.heads, cache_len=cache_len
      ),
      collections.deque((i, i // samples - first) for i in numbers),
    )


def _rounded(count: int, step: int) -> int:
  return -(-count // step) * step


@functools.partial(jax.jit, static_argnames=("rows", "size", "cache_len"))
def _empty(decoder, settings, prompt, rows, size, cache_len):
  """A state of rows that are done."""

  def make(prompt):
    row = jax.tree.map(lambda a: a[:1], prompt)
    key = jnp.zeros((1, 2), jnp.uint32)
    return loop.begin(decoder, settings, row, size=size, key=key)

  row = jax.eval_shape(make, prompt)
  state = jax.tree.map(lambda a: jnp.zeros((rows, *a.shape[1:]), a.dtype), row)
  return dataclasses.replace(
    state,
    done=jnp.ones((rows,), bool),
    cache=decoder.empty_cache(rows, cache_len, settings.tree.heads),
  )


@functools.partial(jax.jit, donate_argnames="state")
def _fill(decoder, settings, state, prompt, batch):
  """Begins texts in free rows.

  Args:
    decoder: that read the prompts.
    settings: of all texts.
    state: its rows to be replaced are done.
    prompt: prompts that were read together.
    batch: [3, A] integers: the rows, the texts' numbers, and their places
      in `prompt`.
  """
  rows, numbers, places = batch
  prompt = jax.tree.map(lambda a: a[places], prompt)
  cache_len = decoder.capacity(state.cache) or state.tokens.shape[1]
  cache = decoder.grow(prompt.window.cache, cache_len)
  window = dataclasses.replace(prompt.window, cache=cache)
  fresh = loop.begin(
    decoder,
    settings,
    dataclasses.replace(prompt, window=window),
    size=state.tokens.shape[1],
    key=loop.row_keys(settings.seed, numbers),
  )
  state = jax.tree.map(
    lambda old, new: old.at[rows].set(new, mode="drop"), state, fresh
  )
  # As large as before, and where it belongs on a mesh.
  return dataclasses.replace(state, cache=decoder.grow(state.cache, cache_len))


@functools.partial(jax.jit, donate_argnames="state")
def _decode(decoder, rule, state, live, waiting):
  """Decodes until a live row is done, or all of them if no prompt waits."""
  return loop.run(
    decoder, rule, state, until=lambda s: waiting & (s.done & live).any()
  )


@jax.jit
def _take(state, b):
  """What a text is made from, of row b, in buffers of its own."""
  return jax.tree.map(lambda a: a[b], generate.parts(state))
