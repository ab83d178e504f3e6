"""Self-speculative decoding of any batch of prompts, by chains or trees.

One forward pass reads a window: the last token of the text and the drafts after
it, as a chain or a tree. Head 1 verifies each draft from the position before
it. The rule accepts a path of drafts and adds one bonus token. From the last
accepted node, heads 2..k draft the next tokens. A pass over a chain of k-1
drafts writes 1 to k tokens; with k = 1 this is ordinary decoding.

  read      window = forward(tokens)                  one trunk pass
  verify    logits = head 1 over the window           [B, M, V]
  accept    node, bonus = rule(logits, drafts)        [B], [B]
  write     the path's tokens and the bonus token     1..k tokens
  keep      keep the path to the node; the other heads read it
  draft     rule(heads 2..k at the node)              [B, k-1, R]

Reference: the paper, section 3.2; Stern et al. 2018 (arXiv 1811.03115).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import accept, interface, prompts, statistics
from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import tree as tree_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What a decoding loop carries; the first axis of all arrays is the row."""

  tokens: jax.Array  # [B, S] prompts and what was written after them
  length: jax.Array  # [B] tokens so far; the cache holds length - 1 of them
  end: jax.Array  # [B] length at which a row is full
  stop: jax.Array  # [B, E] end tokens; -1 is none
  key: jax.Array  # [B, ...] uint32, each row's own randomness
  drafts: accept.Drafts | None  # None: before the first ones
  seen: jax.Array | None  # [B, V] bool, where the rule uses it
  done: jax.Array  # [B] at an end token, at `end`, or at logits not finite
  statistics: statistics.Statistics
  cache: tuple
  tree: tree_lib.Tree = dataclasses.field(metadata={"static": True})


def begin(
  decoder: interface.Decoder,
  settings: interface.DecodingSettings,
  prompt: prompts.Prompt,
  *,
  size: int,
  key: jax.Array,
) -> State:
  """Writes the first token and drafts the next ones.

  Args:
    decoder: that read the prompts.
    settings: from `interface.check_settings`.
    prompt: from `prompts.read`, with the tree's heads.
    size: S, at least P + max_new + M - 1: the window of a row that is done
      begins at its last token.
    key: [B, ...] uint32, raw keys of the rows, from `row_keys`.
  """
  rule, tree, (B, P) = settings.rule, settings.tree, prompt.tokens.shape
  rows = jnp.arange(B)
  seen = None
  if rule.uses_seen():
    is_text = jnp.arange(P) < prompt.length[:, None]
    seen = jnp.zeros(prompt.logits.shape, bool)
    seen = seen.at[rows[:, None], prompt.tokens].max(is_text)
  stop = jnp.asarray(settings.stop, jnp.int32)
  state = State(
    tokens=jnp.zeros((B, size), jnp.int32).at[:, :P].set(prompt.tokens),
    length=prompt.length,
    end=prompt.length + settings.max_new,
    stop=jnp.broadcast_to(stop, (B, stop.size)),
    key=key,
    drafts=None,
    seen=seen,
    done=jnp.zeros((B,), bool),
    statistics=statistics.empty(B, size, tree),
    cache=(),
    tree=tree,
  )
  # The prompt's last logits verify a tree without drafts: the rule accepts its
  # root and adds the first token. The root's own token is never read.
  keys, root = _keys(key, jnp.zeros((B,), jnp.int32)), tree_lib.Tree()
  tokens = jnp.zeros((B, 1), jnp.int32)
  verification = _verification(state, tokens, prompt.logits[:, None])
  node, bonus = rule.accept(root, verification, keys[:, 0])
  state = _write(state, root, verification, node, bonus)
  return _draft(decoder, rule, state, prompt.window, bonus, keys[:, 1])


def advance(
  decoder: interface.Decoder, rule: interface.Rule, state: State
) -> State:
  """One forward pass: verifies drafts, writes 1..k tokens a row, drafts again.

  A row that is done is computed with the others but writes nothing.
  """
  tree, last = state.tree, state.length - 1
  rows = jnp.arange(len(last))[:, None]
  keys = _keys(state.key, state.statistics.passes + 1)

  last_token = state.tokens[rows, last[:, None]]
  drafts = state.drafts.tokens[:, tree.depth[1:] - 1, tree.rank[1:]]
  tokens = jnp.concatenate([last_token, drafts], 1)  # [B, M]
  window = decoder.forward(state.cache, tokens, last, tree=tree)

  every = jnp.broadcast_to(jnp.arange(tree.size), tokens.shape)
  logits = decoder.logits(window, 0, every)
  verification = _verification(state, tokens, logits)

  node, bonus = rule.accept(tree, verification, keys[:, 0])
  state = _write(state, tree, verification, node, bonus)
  window = decoder.keep_path(window, node)
  return _draft(decoder, rule, state, window, bonus, keys[:, 1])


def run(
  decoder: interface.Decoder, rule: interface.Rule, state: State, *, until=None
) -> State:
  """`advance` until every row is done, in one `while_loop` on the device.

  It also ends before a row's window would exceed the cache, and when
  `until(state)`, a traced bool, is true.
  """
  capacity = decoder.capacity(state.cache)

  def goes_on(state):
    active = ~state.done
    on = active.any()
    if capacity is not None:
      needed = jnp.where(active, state.length - 1 + state.tree.size, 0)
      on &= needed.max() <= capacity
    return on if until is None else on & ~until(state)

  return jax.lax.while_loop(goes_on, lambda s: advance(decoder, rule, s), state)


# As a notebook or a server calls them: shapes compile once, the state's
# buffers are donated.
begin_jit = jax.jit(begin, static_argnames="size")
advance_jit = jax.jit(advance, donate_argnames="state")
run_jit = jax.jit(run, static_argnames="until", donate_argnames="state")


def finish(
  decoder: interface.Decoder, rule: interface.Rule, state: State
) -> State:
  """`run_jit` until every row is done; the cache grows with the texts."""
  while not state.done.all():
    state = run_jit(decoder, rule, make_room(decoder, state))
  return state


def make_room(decoder: interface.Decoder, state: State) -> State:
  """The state itself or, where its next window does not fit, a grown one."""
  capacity, active = decoder.capacity(state.cache), ~np.asarray(state.done)
  longest = np.asarray(state.length)[active].max(initial=0)
  fits = capacity is None or longest - 1 + state.tree.size <= capacity
  return state if fits else grow(decoder, state)


def grow(decoder: interface.Decoder, state: State) -> State:
  """The state with a cache half as large again, at most of S positions."""
  cache_len = cache_lib.ladder(decoder.capacity(state.cache) + 1)
  cache_len = min(cache_len, state.tokens.shape[1])
  return dataclasses.replace(state, cache=decoder.grow(state.cache, cache_len))


def row_keys(seed: jax.Array, numbers: jax.Array) -> jax.Array:
  """Raw keys of texts `numbers` [B], whatever batch they are in.

  They are [B, 2] with JAX's default generator, and [B, 4] with 'rbg'.

  Args:
    seed: [] uint32, from `checks.seed`.
    numbers: [B] integers.
  """
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), jnp.asarray(numbers, jnp.uint32)
  )
  return jax.random.key_data(keys)


def abstract_state(
  decoder: interface.Decoder,
  settings: interface.DecodingSettings,
  *,
  batch: int,
  cache_len: int,
) -> State:
  """Shapes of a state of B rows, to compile programs ahead of time.

  Args:
    decoder: the model, or its shapes.
    settings: from `interface.check_settings`.
    batch: rows B.
    cache_len: positions S of the cache and of the text.
  """

  def make(decoder):
    tokens, lengths = np.zeros((batch, 1), np.int32), np.ones(batch, np.int32)
    prompt = prompts.read(
      decoder, tokens, lengths, heads=settings.tree.heads, cache_len=cache_len
    )
    key = row_keys(jnp.uint32(0), jnp.arange(batch))
    return begin(decoder, settings, prompt, size=cache_len, key=key)

  return jax.eval_shape(make, decoder)


def _keys(raw, number):
  """Keys [B, 2] of passes `number` [B]: one to accept with, one to draft."""
  keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(raw), number)
  return jax.vmap(jax.random.split)(keys)


def _verification(state, tokens, logits):
  best = logits.argmax(-1).astype(jnp.int32)
  return accept.Verification(tokens, logits, best, state.drafts, state.seen)


def _write(state, tree, verification, node, bonus) -> State:
  """The state once the accepted path and the bonus token are written."""
  rows = jnp.arange(len(node))[:, None]
  path = jnp.asarray(tree.path_nodes)[node]  # [B, k]
  depth = jnp.asarray(tree.depth)[node]
  place = jnp.arange(tree.heads, dtype=jnp.int32)
  tokens = verification.tokens[rows, path[:, 1:]]
  tokens = jnp.pad(tokens, ((0, 0), (0, 1)))
  tokens = jnp.where(place == depth[:, None], bonus[:, None], tokens)
  count = jnp.minimum(depth + 1, state.end - state.length)
  logprob, margin = statistics.scores(verification, path, tokens)
  # A text ends at an end token, and where the token's logits are not finite:
  # what follows would be worthless, and `generate.finite` says so.
  ends = (tokens[..., None] == state.stop[:, None]).any(-1) | jnp.isnan(logprob)
  ends &= place < count[:, None]
  first = ends.argmax(1).astype(jnp.int32) + 1
  count = jnp.where(ends.any(1), first, count)
  count = jnp.where(state.done, 0, count)
  keep = place < count[:, None]
  seen = state.seen
  if seen is not None:
    seen = seen.at[rows, tokens].max(keep)
  length = state.length + count
  block = statistics.Block(node, depth, tokens, keep, logprob, margin)
  return dataclasses.replace(
    state,
    tokens=statistics.put_rows(state.tokens, tokens, state.length, keep),
    length=length,
    seen=seen,
    done=state.done | ends.any(1) | (length >= state.end),
    statistics=state.statistics.update(
      block, state.drafts, state.length, ~state.done
    ),
  )


def _draft(decoder, rule, state, window, bonus, keys) -> State:
  """The state with drafts after the bonus token [B], and the window's cache."""
  tree, tokens, parts = state.tree, bonus[:, None], []
  # `tokens` [B, d] are the bonus token, which is head 1's, and the first
  # choices of heads 2..d; head d+1 is next. A decoder lets one or more heads
  # draft at once: `Transformer` all of them.
  while tokens.shape[1] < tree.heads:
    logits, window = decoder.draft(window, tree.heads, tokens)
    parts.append(rule.propose(logits, tree.width, state.seen, keys))
    tokens = jnp.concatenate([tokens, parts[-1].tokens[..., 0]], 1)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, tokens.shape[1])
  if not parts:
    parts = [accept.Drafts(jnp.zeros((len(bonus), 0, tree.width), jnp.int32))]
  drafts = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *parts)
  return dataclasses.replace(state, drafts=drafts, cache=window.cache)
