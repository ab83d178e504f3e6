"""Many prompts over a fixed number of rows: a finished row is refilled.

The device decodes `slots` rows. When one finishes, the loop ends, its text is
handed out and the next prompt, read beforehand, takes its place. Texts are
copied and `on_text` is called while the device is at work on the next turn.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import accept, blockwise, choose, generate
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib

_READ = 8  # prompts read together, at most


def generate_all(
  network,
  prompts: Sequence[Sequence[int]],
  *,
  slots: int,
  heads: int | tree_lib.Tree | str,
  max_new: int,
  stop: int | None = None,
  rule=accept.GREEDY,
  seed: int = 0,
  samples: int = 1,
  on_text: Callable[[int, generate.Text], None] | None = None,
) -> generate.Result:
  """Continues any number of prompts, `slots` rows at a time.

  Equals `generate.generate` of all prompts in one batch, without waiting for
  its longest text. Takes the caches of `slots` rows and of the 8 prompts that
  are read together, each as long as the longest prompt and max_new need.

  Args:
    network: from `network.prepare(model)`.
    prompts: sequences of token ids, of any lengths.
    slots: rows B that are decoded at once.
    heads: k, a tree of drafts, or 'auto': what `choose.choose` finds fastest
      on the first prompts.
    max_new: most tokens to write per prompt.
    stop: id of the end token, or None.
    rule: what stands, from `accept`.
    seed: of the rules that draw; text i depends on (seed, i) alone.
    samples: texts per prompt. They share one reading of it.
    on_text: called with (i, text) as texts are finished, in any order.

  Returns:
    The texts: text i is sample i % samples of prompt i // samples.

  Raises:
    ValueError: as `generate.generate`, or slots or samples below 1.
  """
  for name, value in (("slots", slots), ("samples", samples)):
    if value < 1:
      raise ValueError(f"{name}={value} writes nothing; give at least 1")
  prompts_lib.pad(prompts, network.vocab)  # all of them, before any work
  if isinstance(heads, str):
    if heads != "auto":
      raise ValueError(f"heads={heads!r}: give a number, a tree or 'auto'")
    heads = choose.choose(
      network,
      prompts[:slots],
      batch=slots,
      max_new=max_new,
      stop=stop,
      rule=rule,
      seed=seed,
    ).tree
  tree = blockwise.plan(network, rule, heads, max_new=max_new)
  texts = {}
  for i, text in _serve(
    network, prompts, slots, tree, max_new, stop, rule, seed, samples
  ):
    texts[i] = text
    if on_text is not None:
      on_text(i, text)
  return generate.Result([texts[i] for i in range(len(texts))], tree)


def _serve(
  network, prompts, slots, tree, max_new, stop, rule, seed, samples
) -> Iterator[tuple[int, generate.Text]]:
  longest = max(map(len, prompts))
  width = prompts_lib.width(longest)
  size = blockwise.sizes(width, tree, max_new, None)[0]
  entries = _read_all(network, prompts, samples, tree, size)
  head = next(entries, None)
  state = _empty(network, rule, head[2], slots, tree, size)
  rows = [None] * slots  # (text number, prompt length) in each row
  finished = ([], None)  # rows whose copied texts have not been fetched

  while True:
    while head is not None and None in rows:
      batch = []  # entries of one prompt batch, a row for each
      free = collections.deque(b for b, row in enumerate(rows) if row is None)
      while free and head and (not batch or head[2] is batch[0][1][2]):
        batch.append((free.popleft(), head))
        rows[batch[-1][0]] = (head[0], len(prompts[head[0] // samples]))
        head = next(entries, None)
      # Padded to a power of two, which drops the copies beyond the last row.
      padding = (1 << (len(batch) - 1).bit_length()) - len(batch)
      numbers, sources = zip(*[(e[0], e[1]) for _, e in batch], strict=True)
      state = _fill(
        rule,
        state,
        batch[0][1][2],
        np.array([*sources, *[0] * padding]),
        np.array([*(b for b, _ in batch), *[slots] * padding]),
        np.array([*numbers, *[0] * padding], np.uint32),
        seed=jnp.uint32(seed & 0xFFFFFFFF),
        max_new=jnp.int32(max_new),
        stop=jnp.int32(-1 if stop is None else stop),
      )
    live = np.array([row is not None for row in rows])
    if live.any():
      state = _turn(network, rule, state, live, head is not None)
    # The device is at work: hand out what the turn before finished.
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


def _read_all(network, prompts, samples, tree, slots):
  """(text number, row, prompt batch) for every text, as they are asked for."""
  for first in range(0, len(prompts), _READ):
    group = prompts[first : first + _READ]
    padded = [*group, *[[0]] * (_READ - len(group))]  # one program for all
    if len(prompts) < _READ:
      padded = group
    tokens, lengths = prompts_lib.pad(padded, network.vocab)
    batch = blockwise.read_jit(
      network, tokens, lengths, heads=tree.heads, slots=slots
    )
    for row in range(len(group)):
      for sample in range(samples):
        yield (first + row) * samples + sample, row, batch


def _empty(network, rule, prompt, slots, tree, size):
  """A state of `slots` rows that are done."""

  def make(prompt):
    row = jax.tree.map(lambda a: a[:1], prompt)
    key = jnp.zeros((1, 2), jnp.uint32)
    return blockwise.begin(
      rule, row, tree=tree, size=size, max_new=1, stop=-1, key=key
    )

  row = jax.eval_shape(make, prompt)
  state = jax.tree.map(lambda a: jnp.zeros((slots, *a.shape[1:]), a.dtype), row)
  return jax.tree_util.tree_map_with_path(
    lambda path, a: a | (path[0].name == "done") if a.dtype == bool else a,
    state,
  )


@functools.partial(jax.jit, donate_argnames="state")
def _fill(rule, state, prompt, sources, rows, numbers, *, seed, max_new, stop):
  """Texts `numbers` [A], begun from `sources` [A] of a batch, in `rows` [A]."""
  prompt = jax.tree.map(lambda a: a[sources], prompt)
  fresh = blockwise.begin(
    rule,
    prompt,
    tree=state.tree,
    size=state.tokens.shape[1],
    max_new=max_new,
    stop=stop,
    key=blockwise.row_keys(seed, numbers),
  )
  return jax.tree.map(
    lambda old, new: old.at[rows].set(new, mode="drop"), state, fresh
  )


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
