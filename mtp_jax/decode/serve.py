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
_LOOK = 8  # passes between two looks at texts that `end` may end


def generate_all(
  decoder: interface.Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  rows: int,
  samples: int | Sequence[Sequence[int]] = 1,
  on_text: Callable[[int, generate.Text], None] | None = None,
  **settings: Any,
) -> generate.Result:
  """Continues any number of prompts, `rows` of them at a time.

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
    samples: texts per prompt. They share one reading of it. Or, for each
      prompt, the numbers of its texts, from 0 to 2**31 - 1: what is drawn
      depends on the seed and on this number alone. The number of text i of
      `samples` texts per prompt is i.
    on_text: called with (i, text) as texts are finished, in any order; not
      with a text whose logits were not finite.
    **settings: of `interface.check_settings`: heads and max_new; if wanted
      stop, rule and seed. heads='auto' is what `autotune.choose` finds fastest
      on the first prompts. And `end`: called with (prompt's place, new tokens
      [n]) of a text every few passes and when it is finished, it returns how
      many of these tokens the text is to have, or None if it goes on; such as
      `stream.ends`. A row whose text ends so takes the next one.

  Returns:
    The texts, prompt by prompt: with an integer `samples`, text i is sample
    i % samples of prompt i // samples.

  Raises:
    ValueError: as `generate.generate`; rows or samples below 1, or rows
      that a mesh does not divide. After all texts: logits that were not
      finite in some; names the first.
  """
  rows = checks.integer("rows", rows, 1)
  numbers = _numbers(samples, len(prompts))
  end = settings.pop("end", None)
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
  for i, text in _serve(decoder, prompts, rows, numbers, checked, end):
    texts[i] = text
    if on_text is not None and not np.isnan(text.logprob).any():
      on_text(i, text)
  generate.finite(sorted(texts.items()))
  return generate.Result([texts[i] for i in range(len(texts))], checked.tree)


def _numbers(samples, count) -> list[list[int]]:
  """The numbers of each prompt's texts, by which they draw."""
  if not isinstance(samples, Sequence):
    samples = checks.integer("samples", samples, 1)
    first = range(0, count * samples, samples)
    return [[*range(i, i + samples)] for i in first]
  numbers = [
    [checks.integer("samples", i, 0) for i in each] for each in samples
  ]
  if len(numbers) != count or not all(numbers):
    raise ValueError(
      f"samples has the numbers of {sum(map(bool, numbers))} prompts' texts; "
      f"there are {count} prompts"
    )
  if (most := max(map(max, numbers))) >= 2**31:
    raise ValueError(f"samples has the number {most}, which is above 2**31 - 1")
  return numbers


def _serve(
  decoder, prompts, rows, numbers, settings, end
) -> Iterator[tuple[int, generate.Text]]:
  """(place, text) of every text, in the order in which they are finished.

  Arguments as of `generate_all`, checked. One turn of the loop fills the free
  rows, starts the device, returns the texts of the turn before while the device
  decodes, and then sees which texts are finished.
  """
  tree, rule = settings.tree, settings.rule
  # Of each text: its prompt's place, and its number.
  all_texts = [(p, n) for p, some in enumerate(numbers) for n in some]
  width = prompts_lib.width(max(map(len, prompts)))
  size, cache_len = generate.sizes(width, tree, int(settings.max_new), None)
  groups = _read_all(decoder, prompts, numbers, tree, cache_len)
  prompt, ready = next(groups)
  state = _empty(decoder, settings, prompt, rows, size, cache_len)
  waiting = len(all_texts)  # texts that have not begun
  texts = [None] * rows  # the one in each row, by its place
  finished = ([], None)  # rows whose copied texts have not been fetched

  while True:
    while waiting and None in texts:
      if not ready:
        prompt = None  # its cache is free for the next ones
        prompt, ready = next(groups)
      begun = _assign(texts, ready)
      waiting -= len(begun)
      batch = _padded([(b, all_texts[i][1], at) for b, i, at in begun], rows)
      state = _fill(decoder, settings, state, prompt, batch)
    live = np.array([text is not None for text in texts])
    if live.any():
      state = loop.make_room(decoder, state)
      look = None if end is None else _LOOK
      state = _decode(decoder, rule, state, live, waiting > 0, look)
    # While the device decodes: read prompts, return the texts finished before.
    if waiting and not ready:
      prompt = None
      prompt, ready = next(groups)
    for (i, kept), text in zip(
      finished[0], jax.device_get(finished[1]) or [], strict=True
    ):
      yield i, generate.text(text, len(prompts[all_texts[i][0]]), kept)
    if not live.any():
      return
    done, kept = np.asarray(state.done) & live, {}
    if end is not None:
      places = {b: all_texts[texts[b]][0] for b in np.flatnonzero(live)}
      kept = _ends(state, prompts, places, end)
      ended = [b for b, count in kept.items() if count is not None]
      done[ended] = True
      if ended:
        state = dataclasses.replace(state, done=state.done | done)
    done = np.flatnonzero(done)
    finished = (
      [(texts[b], kept.get(b)) for b in done],
      [_take(state, b) for b in done],
    )
    for b in done:
      texts[b] = None


def _assign(texts, ready) -> list[tuple[int, int, int]]:
  """Puts texts that are ready into free rows of `texts`, some at a time.

  Returns (row, text's place, its prompt's row in the group) of each.
  """
  free = [b for b, text in enumerate(texts) if text is None]
  begun = [(b, *ready.popleft()) for b in free[: min(len(ready), _READ)]]
  for b, i, _ in begun:
    texts[b] = i
  return begun


def _padded(batch, rows) -> np.ndarray:
  """The columns of a batch for `_fill`, [3, A].

  A is a power of two, so that few shapes compile. The padding names a row that
  does not exist, so its copies are dropped.
  """
  padding = (1 << (len(batch) - 1).bit_length()) - len(batch)
  return np.array(batch + [(rows, 0, 0)] * padding).T


def _ends(state, prompts, places, end) -> dict[int, int | None]:
  """What `end` says of the text in each row of `places`, row -> prompt."""
  tokens, lengths = jax.device_get((state.tokens, state.length))
  return {
    b: end(place, tokens[b, len(prompts[place]) : lengths[b]])
    for b, place in places.items()
  }


def _read_all(decoder, prompts, numbers, tree, cache_len):
  """Prompts read together, and (text's place, row) for each of their texts."""
  begin = np.cumsum([0, *map(len, numbers)])  # of each prompt's texts
  together = _rounded(min(_READ, len(prompts)), decoder.row_step)
  for first in range(0, len(prompts), together):
    group = prompts[first : first + together]
    padding = [[0]] * (together - len(group))  # one program for all
    tokens, lengths = prompts_lib.pad([*group, *padding], decoder.vocab)
    texts = (
      (i, row)
      for row in range(len(group))
      for i in range(begin[first + row], begin[first + row + 1])
    )
    yield (
      prompts_lib.read_jit(
        decoder, tokens, lengths, heads=tree.heads, cache_len=cache_len
      ),
      collections.deque(texts),
    )


def _rounded(count: int, step: int) -> int:
  return -(-count // step) * step


@functools.partial(jax.jit, static_argnames=("rows", "size", "cache_len"))
def _empty(decoder, settings, prompt, rows, size, cache_len):
  """A state of rows that are done."""

  def make(prompt):
    row = jax.tree.map(lambda a: a[:1], prompt)
    key = loop.row_keys(jnp.uint32(0), jnp.arange(1))
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


@functools.partial(jax.jit, static_argnames="look", donate_argnames="state")
def _decode(decoder, rule, state, live, waiting, look=None):
  """Decodes until a live row is done, or all of them if no prompt waits.

  Or until some row has made `look` passes.
  """
  before = state.statistics.passes

  def until(state):
    over = waiting & (state.done & live).any()
    if look is not None:
      over |= (state.statistics.passes - before).max() >= look
    return over

  return loop.run(decoder, rule, state, until=until)


@jax.jit
def _take(state, b):
  """What a text is made from, of row b, in buffers of its own."""
  return jax.tree.map(lambda a: a[b], generate.parts(state))
