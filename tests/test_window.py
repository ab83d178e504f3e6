"""Windows over a cache: what is read, kept and rolled back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import config
from mtp_jax.decode import cpu, layout
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.decode import window as window_lib
from mtp_jax.model import heads, layers
from tests import parameters, passes

ATOL, B, S, T, ZERO = passes.ATOL, passes.B, passes.S, passes.T, passes.ZERO

LENGTHS = np.array([1, 2, 11, 16, 7], np.int32)  # each row's prompt


KINDS = config.HEAD_KINDS


TREE = tree_lib.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0]])


@pytest.fixture(autouse=True, scope="module")
def weights_are_turned():
  """Small as they are."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cpu, "LARGE", 0)
    yield


@pytest.fixture(scope="module", params=KINDS)
def net(request):
  return parameters.random_model(request.param)


@pytest.fixture(scope="module")
def tokens():
  return passes.text()


def windows(tokens, start, width):
  return np.stack(
    [t[s : s + width] for t, s in zip(tokens, start, strict=True)]
  )


@pytest.mark.parametrize("k", [2, 3])
def test_windows_at_ragged_starts_equal_the_uncached_model(net, tokens, k):
  want = np.asarray(passes.uncached(net, tokens))
  decoder = passes.decoder_of(net)
  cache, start = decoder.empty_cache(B, S, k), ZERO

  def check(logits, valid):
    for b in range(B):
      np.testing.assert_allclose(
        logits[:, b, : valid[b]],
        want[:k, b, start[b] : start[b] + valid[b]],
        rtol=0,
        atol=ATOL,
      )

  # The prompts' pass reads all rows as wide as the longest: what lies behind
  # a row's own prompt is rubbish, and the next window overwrites it.
  window = np.where(passes.places(16) < LENGTHS[:, None], tokens[:, :16], 30)
  cache, logits = passes.read(
    decoder, cache, window, start, passes.places(16), heads=k
  )
  check(logits, LENGTHS)
  start = LENGTHS
  for step in ([3, 1, 2, 3, 1], [1, 3, 3, 2, 2], [0, 0, 0, 0, 0]):
    window = windows(tokens, start, 3)
    cache, logits = passes.read(
      decoder, cache, window, start, passes.places(3), heads=k
    )
    check(logits, [3] * B)
    start = start + np.int32(step)


def test_one_place_equals_the_whole_window(net, tokens):
  decoder = passes.decoder_of(net)
  cache = decoder.empty_cache(B, S, 3)
  at = np.array([[0], [15], [3], [7], [11]], np.int32)
  window = tokens[:, :16]
  _, whole = passes.read(
    decoder, cache, window, ZERO, passes.places(16), heads=3
  )
  _, one = passes.read(decoder, cache, window, ZERO, at, heads=3)
  want = np.take_along_axis(np.asarray(whole), at[None, ..., None], 2)
  np.testing.assert_allclose(one, want, rtol=0, atol=ATOL)


def test_a_smaller_start_rolls_back(net, tokens):
  """Drafts that were refused leave no trace, to the last bit."""
  decoder = passes.decoder_of(net)
  cache = decoder.empty_cache(B, S, 3)
  cache, _ = passes.read(
    decoder, cache, tokens[:, :16], ZERO, passes.places(16), heads=3
  )
  window = windows(tokens, LENGTHS, 3)
  wrong = np.concatenate([window[:, :1], 30 - window[:, 1:]], 1)
  at = passes.places(3)
  _, want = passes.read(decoder, cache, window, LENGTHS, at, heads=3)
  detour, _ = passes.read(decoder, cache, wrong, LENGTHS, at, heads=3)
  # Far larger than any key or value: one look at it would show.
  behind = (np.arange(S) >= LENGTHS[:, None])[:, None, :, None]
  spoilt = jax.tree.map(lambda a: jnp.where(behind, 1e4, a), detour)
  for cache in (detour, spoilt):
    _, got = passes.read(decoder, cache, window, LENGTHS, at, heads=3)
    np.testing.assert_array_equal(got, want)


def test_caches_are_only_those_that_the_heads_need():
  layers = {"parallel": 1, "causal": 1, "anticausal": 3}
  for kind in KINDS:
    cfg = parameters.model_config(kind)
    decoder = passes.decoder_of(parameters.random_model(kind))
    for k in (1, 3):
      cache = decoder.empty_cache(B, S, k)
      own = (3 if k == 3 else layers[kind]) if kind in layers else 0
      assert len(cache) == cfg.trunk_layers + own
      assert {a.shape for a in jax.tree.leaves(cache)} == {(B, 2, S, 4)}


@functools.partial(jax.jit, static_argnames="tree")
def read_tree(decoder, cache, window, start, *, tree):
  """Logits [B, M, V] of head 1 at every node, and the memory."""
  memory = decoder.forward(cache, window, start, tree=tree)
  every = jnp.broadcast_to(jnp.arange(tree.size), window.shape)
  return memory, decoder.logits(memory, 0, every)


@functools.partial(jax.jit, static_argnames="heads")
def commit(decoder, memory, node, *, heads=3):
  """What `node` [B] leaves, and the drafts [B, k-1, V] behind it."""
  memory = decoder.keep_path(memory, node)
  return memory.cache, decoder.draft(memory, heads, None)[0]


@pytest.mark.parametrize(
  "tree, k",
  [
    (TREE, 3),
    (tree_lib.chain(3), 3),
    (tree_lib.from_paths([[0], [1]]), 2),
    # The cache is for more heads than the drafts.
    (tree_lib.from_paths([[0], [1]]), 3),
    (tree_lib.chain(2), 3),
  ],
  ids=["tree", "chain", "two heads", "shallow", "short"],
)
def test_nodes_of_a_tree_equal_the_text_of_their_path(net, tokens, tree, k):
  """Head 1 at every node and, once it is kept, the others; then the cache."""
  decoder = passes.decoder_of(net)
  cache = decoder.empty_cache(B, S, k)
  cache, _ = passes.read(
    decoder, cache, tokens[:, :16], ZERO, passes.places(16), heads=k
  )
  window = np.random.default_rng(2).integers(0, 31, (B, tree.size))
  window = window.astype(np.int32)
  memory, judged = read_tree(decoder, cache, window, LENGTHS, tree=tree)
  after = windows(tokens, LENGTHS, 3)
  for turn in range(tree.size):
    node = (np.arange(B) + turn) % tree.size  # every row keeps every node
    kept, drafted = commit(decoder, memory, node.astype(np.int32), heads=k)
    start = LENGTHS + tree.depth[node] + 1
    _, later = passes.read(
      decoder, kept, after, start, passes.places(3), heads=k
    )
    texts, ends = np.zeros((B, S), np.int32), LENGTHS + tree.depth[node]
    for b, m in enumerate(node):
      path = window[b, tree.path_nodes[m][: tree.depth[m] + 1]]
      text = [*tokens[b, : LENGTHS[b]], *path, *after[b]]
      texts[b, : len(text)] = text
    want = np.asarray(passes.uncached(net, texts))
    for b, end in enumerate(ends):
      here = want[:, b, end]
      for got, want_here in (
        (judged[b, node[b]], here[0]),
        (drafted[b], here[1:k]),
        (later[:, b], want[:k, b, end + 1 : end + 4]),
      ):
        np.testing.assert_allclose(got, want_here, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
  "kind, written, run",
  [
    ("parallel", [7] * 3 + [3, 3], [7] * 3 + [1, 1]),
    ("causal", [7] * 3 + [3, 3], [7] * 3 + [3, 1]),
    ("anticausal", [7] * 7, [7] * 7),  # head 1 stands on the other four
  ],
)
def test_heads_read_what_is_kept(kind, written, run, monkeypatch):
  """Tokens that each layer writes and runs on: a pass over 7 nodes, 3 of 5
  heads; and with head 1 alone the other heads do nothing."""
  widths = {"project_kv": [], "mix": []}

  def spy_on(name):
    call = getattr(decoder_lib, name)

    def spy(block, x, *rest):
      widths[name].append(x.shape[1])
      return call(block, x, *rest)

    monkeypatch.setattr(decoder_lib, name, spy)

  for name in widths:
    spy_on(name)
  decoder = passes.decoder_of(
    parameters.random_model(kind, n_future=5, layers=7)
  )

  def advance(tree):
    window = np.zeros((B, tree.size), np.int32)
    cache = decoder.empty_cache(B, S, tree.heads)
    memory = decoder.forward(cache, window, LENGTHS, tree=tree)
    decoder.logits(memory, 0, passes.places(tree.size))
    memory = decoder.keep_path(memory, ZERO)
    return decoder.draft(memory, tree.heads, None) if tree.max_depth else memory

  jax.eval_shape(lambda: advance(TREE))
  assert widths == {"project_kv": written, "mix": run}
  for seen in widths.values():
    seen.clear()
  jax.eval_shape(lambda: advance(tree_lib.Tree()))
  judging = [1] * written.count(7)
  assert widths == {"project_kv": judging, "mix": judging}


@pytest.mark.parametrize("kind", ["parallel", "causal"])
def test_a_head_that_has_not_read_the_drafts_is_not_asked(kind):
  decoder = passes.decoder_of(parameters.random_model(kind))
  window, waits = np.zeros((B, 7), np.int32), "head 1 reads drafts after"

  def ask(heads):
    cache = decoder.empty_cache(B, S, heads)
    memory = decoder.forward(cache, window, LENGTHS, tree=TREE)
    with pytest.raises(ValueError, match=waits):
      decoder.logits(memory, 1, passes.places(7))
    with pytest.raises(ValueError, match=waits):
      decoder.draft(memory, 3, None)
    kept = decoder.keep_path(memory, ZERO)
    with pytest.raises(ValueError, match="head 3, but the cache is for 3"):
      decoder.logits(kept, 3, passes.places(1))

  jax.eval_shape(lambda: ask(3))


@jax.jit
def banded(net, tokens, window):
  """The uncached model with a sliding window that includes the token itself."""
  T = tokens.shape[1]
  ahead = np.arange(T)[:, None] - np.arange(T)
  mask = jnp.asarray((ahead >= 0) & (ahead < window))

  def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])

  positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
  ctx = layers.context(positions, jax.tree_util.Partial(attend), net.cfg)
  return net.heads.logits(
    net.heads(heads.Inputs(net.run_trunk(tokens, ctx), ctx))
  )


@pytest.mark.parametrize(
  "tree", [tree_lib.chain(3), TREE], ids=["chain", "tree"]
)
def test_a_ring_equals_a_band(net, tokens, tree, monkeypatch):
  """Windows and prompts that wrap round, rows at odds, nothing beyond sight."""
  monkeypatch.setattr(window_lib, "CHUNK", 7)  # a ring of 13 positions
  decoder = layout.lay_out(net, sliding_window=6)
  want = np.asarray(banded(net, tokens, 6))
  cache = decoder.empty_cache(B, S, 3)
  assert cache[0][0].shape[2] == 13 and decoder.capacity(cache) is None

  @jax.jit
  def forward(cache, window, start, keep):
    memory = decoder.forward(cache, window, start, valid=keep)
    every = jnp.broadcast_to(jnp.arange(7), window.shape)
    logits = [decoder.logits(memory, i, every) for i in range(3)]
    return memory.cache, jnp.stack(logits)

  for s in range(0, 21, 7):
    keep = np.clip(LENGTHS - s, 0, 7)
    cache, got = forward(cache, tokens[:, s : s + 7], ZERO + s, keep)
    for b in range(B):
      np.testing.assert_allclose(
        got[:, b, : keep[b]],
        want[:, b, s : s + keep[b]],
        rtol=0,
        atol=ATOL,
      )
  start, rng = LENGTHS.copy(), np.random.default_rng(4)
  last = np.asarray(tree.path_nodes)[:, -1].argmax()  # a deepest node
  path = tree.path_nodes[last]
  for _ in range(4):
    window = rng.integers(0, 31, (B, tree.size)).astype(np.int32)
    right = windows(tokens, start, 3)
    for b in range(B):  # the text along one path, rubbish elsewhere
      window[b, path] = right[b]
    memory, got = read_tree(decoder, cache, window, start, tree=tree)
    node = path[rng.integers(0, 3, B)]
    cache, drafted = commit(decoder, memory, node)
    kept = start + tree.depth[node]
    for b in range(B):
      for got_here, want_here in (
        (got[b, path], want[0, b, start[b] : start[b] + 3]),
        (drafted[b], want[1:, b, kept[b]]),
      ):
        np.testing.assert_allclose(got_here, want_here, rtol=0, atol=ATOL)
    start = kept + 1


DEEP = [[0], [1], [0, 0], [1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize(
  "tree",
  [tree_lib.from_paths([*DEEP, [1, 0, 0, 0], [1, 0, 0, 1]]), tree_lib.chain(5)],
  ids=["tree", "chain"],
)
def test_drafts_deeper_than_the_window(tree, window):
  """A node sees the tokens before it on its path, not the nodes before it."""
  net = parameters.random_model("parallel", n_future=5, layers=6)
  decoder = layout.lay_out(net, sliding_window=window)
  tokens = np.random.default_rng(3).integers(0, 31, (B, 16)).astype(np.int32)
  memory = decoder.forward(
    decoder.empty_cache(B, S, 5), tokens, ZERO, valid=LENGTHS
  )
  drafts = np.random.default_rng(window).integers(0, 31, (B, tree.size))
  memory = decoder.forward(
    memory.cache, drafts.astype(np.int32), LENGTHS, tree=tree
  )
  judged = decoder.logits(memory, 0, passes.places(tree.size))
  node = np.full(B, tree.size - 1, np.int32)  # a deepest one
  drafted = decoder.draft(decoder.keep_path(memory, node), 5, None)[0]
  texts = np.zeros((tree.size, B, 21), np.int32)
  for m, b in np.ndindex(tree.size, B):
    path = drafts[b, tree.path_nodes[m][: tree.depth[m] + 1]]
    text = [*tokens[b, : LENGTHS[b]], *path]
    texts[m, b, : len(text)] = text
  want = np.asarray(banded(net, texts.reshape(-1, 21), window))
  want = want.reshape(5, tree.size, B, 21, 31)
  for m, b in np.ndindex(tree.size, B):
    here = want[:, m, b, LENGTHS[b] + tree.depth[m]]
    np.testing.assert_allclose(judged[b, m], here[0], rtol=0, atol=ATOL)
  for b in range(B):
    here = want[1:, -1, b, LENGTHS[b] + tree.depth[-1]]
    np.testing.assert_allclose(drafted[b], here, rtol=0, atol=ATOL)
