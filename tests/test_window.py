"""The decoder's view of the model: what it caches, reads and rolls back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import config
from mtp_jax.decode import accept, cpu, interface, loop
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.decode import window as window_lib
from mtp_jax.model import heads, layers, model

# Logits are of order 1 and sums of at most 64 float32 products, each rounded
# at 1e-7 and in another order when a window is cut differently.
ATOL = 2e-5
B, T, S = 5, 29, 37
LENGTHS = np.array([1, 2, 11, 16, 7], np.int32)  # each row's prompt
KINDS = config.HEAD_KINDS
TREE = tree_lib.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0]])


def shape(kind, **fields):
  blocks = 0 if kind in ("linear", "unembedding") else 3
  fields = {
    "vocab": 31,
    "width": 24,
    "mlp": 41,
    "layers": 2 + blocks,
    "attn_heads": 6,
    "kv_heads": 2,
    "n_future": 3,
  } | fields
  return config.Model(head=kind, **fields)


def create(cfg):
  """A random model, its norms too, made without compiling an initialiser."""
  rng = np.random.default_rng(0)
  key = jax.random.key(0)

  def fill(path, a):
    is_norm = "norm" in jax.tree_util.keystr(path)
    value = is_norm + rng.normal(size=a.shape) * 0.2
    return jnp.asarray(value, jnp.float32)

  net = jax.eval_shape(lambda: model.Model(cfg, key))
  return jax.tree_util.tree_map_with_path(fill, net)


decoder_of = jax.jit(decoder_lib.lay_out)


@pytest.fixture(autouse=True, scope="module")
def weights_are_turned():
  """Small as they are."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cpu, "LARGE", 0)
    yield


@pytest.fixture(scope="module", params=KINDS)
def net(request):
  return create(shape(request.param))


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(1).integers(0, 31, (B, T)).astype(np.int32)


@functools.partial(jax.jit, static_argnames="heads")
def read(decoder, cache, window, start, at, *, heads):
  """One pass: the cache, and logits [k, B, W', V] of k heads at `at`."""
  memory = decoder.forward(cache, window, start)
  logits = [decoder.logits(memory, i, at) for i in range(heads)]
  return memory.cache, jnp.stack(logits)


uncached = jax.jit(lambda net, tokens: net(tokens))


def windows(tokens, start, width):
  return np.stack(
    [t[s : s + width] for t, s in zip(tokens, start, strict=True)]
  )


def places(width):
  return np.broadcast_to(np.arange(width, dtype=np.int32), (B, width))


ZERO = np.zeros(B, np.int32)


@pytest.mark.parametrize("k", [2, 3])
def test_windows_at_ragged_starts_equal_the_uncached_model(net, tokens, k):
  want = np.asarray(uncached(net, tokens))
  decoder = decoder_of(net)
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
  window = np.where(places(16) < LENGTHS[:, None], tokens[:, :16], 30)
  cache, logits = read(decoder, cache, window, start, places(16), heads=k)
  check(logits, LENGTHS)
  start = LENGTHS
  for step in ([3, 1, 2, 3, 1], [1, 3, 3, 2, 2], [0, 0, 0, 0, 0]):
    window = windows(tokens, start, 3)
    cache, logits = read(decoder, cache, window, start, places(3), heads=k)
    check(logits, [3] * B)
    start = start + np.int32(step)


def test_one_place_equals_the_whole_window(net, tokens):
  decoder = decoder_of(net)
  cache = decoder.empty_cache(B, S, 3)
  at = np.array([[0], [15], [3], [7], [11]], np.int32)
  window = tokens[:, :16]
  _, whole = read(decoder, cache, window, ZERO, places(16), heads=3)
  _, one = read(decoder, cache, window, ZERO, at, heads=3)
  want = np.take_along_axis(np.asarray(whole), at[None, ..., None], 2)
  np.testing.assert_allclose(one, want, rtol=0, atol=ATOL)


def test_padding_ids_are_never_written(net, tokens):
  """A padded vocabulary's other columns are cut off, for every head."""
  whole, cut = decoder_of(net), decoder_lib.lay_out(net, 19)
  assert (whole.vocab, cut.vocab) == (31, 19)
  window = tokens[:, :7] % 19
  found = [
    read(d, d.empty_cache(B, S, 3), window, ZERO, places(7), heads=3)[1]
    for d in (whole, cut)
  ]
  cut, whole = found[1][..., :19], found[0][..., :19]
  np.testing.assert_allclose(cut, whole, rtol=0, atol=ATOL)
  assert np.isneginf(found[1][..., 19:]).all()
  with pytest.raises(ValueError, match="vocab 99 exceeds .* 31 ids"):
    decoder_lib.lay_out(net, 99)


def test_a_smaller_start_rolls_back(net, tokens):
  """Drafts that were refused leave no trace, to the last bit."""
  decoder = decoder_of(net)
  cache = decoder.empty_cache(B, S, 3)
  cache, _ = read(decoder, cache, tokens[:, :16], ZERO, places(16), heads=3)
  window = windows(tokens, LENGTHS, 3)
  wrong = np.concatenate([window[:, :1], 30 - window[:, 1:]], 1)
  at = places(3)
  _, want = read(decoder, cache, window, LENGTHS, at, heads=3)
  detour, _ = read(decoder, cache, wrong, LENGTHS, at, heads=3)
  # Far larger than any key or value: one look at it would show.
  behind = (np.arange(S) >= LENGTHS[:, None])[:, None, :, None]
  spoilt = jax.tree.map(lambda a: jnp.where(behind, 1e4, a), detour)
  for cache in (detour, spoilt):
    _, got = read(decoder, cache, window, LENGTHS, at, heads=3)
    np.testing.assert_array_equal(got, want)


def test_caches_are_only_those_that_the_heads_need():
  slots = {"parallel": 1, "causal": 1, "anticausal": 3}
  for kind in KINDS:
    cfg = shape(kind)
    decoder = decoder_of(create(cfg))
    for k in (1, 3):
      cache = decoder.empty_cache(B, S, k)
      own = (3 if k == 3 else slots[kind]) if kind in slots else 0
      assert len(cache) == cfg.trunk_layers + own
      assert {a.shape for a in jax.tree.leaves(cache)} == {(B, 2, S, 4)}


@pytest.mark.parametrize("kind", ["parallel", "unembedding"])
def test_bfloat16_casts_matrices_and_keeps_norms(kind, tokens):
  half = create(shape(kind, dtype="bfloat16"))
  full = create(shape(kind))
  decoder = decoder_of(half)
  kinds = {
    ".".join(str(getattr(p, "name", p)) for p in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(decoder)
  }
  for name, leaf in kinds.items():
    want = jnp.float32 if "norm" in name else jnp.bfloat16
    assert leaf.dtype == want, name
  assert half.embed[...].dtype == jnp.float32  # the trained model is as it was
  cache = decoder.empty_cache(B, S, 3)
  assert {a.dtype for a in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
  _, got = read(decoder, cache, tokens[:, :16], ZERO, places(16), heads=3)
  assert got.dtype == jnp.float32
  # A rounding to 8 bits errs by 0.002 of a value; some thirty of them in a
  # row walk to 0.01.
  for want in (uncached(half, tokens), uncached(full, tokens)):
    error = got - want[:, :, :16]
    assert jnp.std(error) < 0.02 * jnp.std(want)


@pytest.mark.parametrize("rows", [(1, 1), (3, 5), (2, cpu.FEW)])
@pytest.mark.parametrize("axes", [1, 2])
def test_a_weight_that_is_turned_multiplies_as_it_was(rows, axes):
  rng = np.random.default_rng(0)
  w = rng.normal(size=(7, 3, 5)).astype(np.float32)
  x = rng.normal(size=(*rows, *w.shape[:axes])).astype(np.float32)
  turned = cpu.matrix(jnp.asarray(w), axes)
  np.testing.assert_array_equal(turned.array(), w)
  got = layers.product("", x, turned, "float32")
  np.testing.assert_allclose(got, np.tensordot(x, w, axes), rtol=0, atol=1e-5)
  half = layers.product("", x.astype("bfloat16"), turned)
  assert half.dtype == jnp.bfloat16 and half.shape == got.shape


def test_weights_are_turned_for_a_cpu_alone(net, tokens, monkeypatch):
  """Another platform's weights lie as they were, and say the same; so do small
  ones."""
  seen = []
  for platform in (None, "gpu", "tpu"):
    decoder = decoder_lib.lay_out(net, on=platform)
    weight = decoder.trunk[0].wo.get_value()
    assert isinstance(weight, cpu.Matrix) == (platform is None)
    cache = decoder.empty_cache(B, S, 3)
    args = tokens[:, :16], ZERO, places(16)
    seen.append(read(decoder, cache, *args, heads=3)[1])
  for got in seen[1:]:
    np.testing.assert_allclose(got, seen[0], rtol=0, atol=ATOL)
  size = net.trunk.wo[0].size
  for large, turned in ((size, True), (size + 1, False)):
    monkeypatch.setattr(cpu, "LARGE", large)
    weight = decoder_lib.lay_out(net).trunk[0].wo.get_value()
    assert isinstance(weight, cpu.Matrix) == turned


# --- Trees --------------------------------------------------------------------


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
  decoder = decoder_of(net)
  cache = decoder.empty_cache(B, S, k)
  cache, _ = read(decoder, cache, tokens[:, :16], ZERO, places(16), heads=k)
  window = np.random.default_rng(2).integers(0, 31, (B, tree.size))
  window = window.astype(np.int32)
  memory, judged = read_tree(decoder, cache, window, LENGTHS, tree=tree)
  after = windows(tokens, LENGTHS, 3)
  for turn in range(tree.size):
    node = (np.arange(B) + turn) % tree.size  # every row keeps every node
    kept, drafted = commit(decoder, memory, node.astype(np.int32), heads=k)
    start = LENGTHS + tree.depth[node] + 1
    _, later = read(decoder, kept, after, start, places(3), heads=k)
    texts, ends = np.zeros((B, S), np.int32), LENGTHS + tree.depth[node]
    for b, m in enumerate(node):
      path = window[b, tree.path[m][: tree.depth[m] + 1]]
      text = [*tokens[b, : LENGTHS[b]], *path, *after[b]]
      texts[b, : len(text)] = text
    want = np.asarray(uncached(net, texts))
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
    call = getattr(layers.Block, name)

    def spy(self, x, *rest):
      widths[name].append(x.shape[1])
      return call(self, x, *rest)

    monkeypatch.setattr(layers.Block, name, spy)

  for name in widths:
    spy_on(name)
  decoder = decoder_of(create(shape(kind, n_future=5, layers=7)))

  def advance(tree):
    window = np.zeros((B, tree.size), np.int32)
    cache = decoder.empty_cache(B, S, tree.heads)
    memory = decoder.forward(cache, window, LENGTHS, tree=tree)
    decoder.logits(memory, 0, places(tree.size))
    memory = decoder.keep_path(memory, ZERO)
    return decoder.draft(memory, tree.heads, None) if tree.drafts else memory

  jax.eval_shape(lambda: advance(TREE))
  assert widths == {"project_kv": written, "mix": run}
  for seen in widths.values():
    seen.clear()
  jax.eval_shape(lambda: advance(tree_lib.Tree()))
  judging = [1] * written.count(7)
  assert widths == {"project_kv": judging, "mix": judging}


@pytest.mark.parametrize("kind", ["parallel", "causal"])
def test_a_head_that_has_not_read_the_drafts_is_not_asked(kind):
  decoder = decoder_of(create(shape(kind)))
  window, waits = np.zeros((B, 7), np.int32), "head 1 reads drafts after"

  def ask(heads):
    cache = decoder.empty_cache(B, S, heads)
    memory = decoder.forward(cache, window, LENGTHS, tree=TREE)
    with pytest.raises(ValueError, match=waits):
      decoder.logits(memory, 1, places(7))
    with pytest.raises(ValueError, match=waits):
      decoder.draft(memory, 3, None)
    kept = decoder.keep_path(memory, ZERO)
    with pytest.raises(ValueError, match="head 3, but the cache is for 3"):
      decoder.logits(kept, 3, places(1))

  jax.eval_shape(lambda: ask(3))


# --- Sliding windows, smaller caches and drafts -------------------------------


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
  decoder = decoder_lib.lay_out(net, sliding_window=6)
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
  last = np.asarray(tree.path)[:, -1].argmax()  # a deepest node
  path = tree.path[last]
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
  net = create(shape("parallel", n_future=5, layers=6))
  decoder = decoder_lib.lay_out(net, sliding_window=window)
  tokens = np.random.default_rng(3).integers(0, 31, (B, 16)).astype(np.int32)
  memory = decoder.forward(
    decoder.empty_cache(B, S, 5), tokens, ZERO, valid=LENGTHS
  )
  drafts = np.random.default_rng(window).integers(0, 31, (B, tree.size))
  memory = decoder.forward(
    memory.cache, drafts.astype(np.int32), LENGTHS, tree=tree
  )
  judged = decoder.logits(memory, 0, places(tree.size))
  node = np.full(B, tree.size - 1, np.int32)  # a deepest one
  drafted = decoder.draft(decoder.keep_path(memory, node), 5, None)[0]
  texts = np.zeros((tree.size, B, 21), np.int32)
  for m, b in np.ndindex(tree.size, B):
    path = drafts[b, tree.path[m][: tree.depth[m] + 1]]
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


def test_smaller_caches(net, tokens):
  """Bytes as promised, and logits near enough: errors in deviations."""
  want, sizes = np.asarray(uncached(net, tokens))[:, :, :16], {}
  errors = {}
  for dtype in ("float32", "bfloat16", "int8"):
    decoder = jax.jit(
      functools.partial(decoder_lib.lay_out, cache_dtype=dtype)
    )(net)
    cache = decoder.empty_cache(B, S, 3)
    sizes[dtype] = sum(a.nbytes for a in jax.tree.leaves(cache))
    _, got = read(decoder, cache, tokens[:, :16], ZERO, places(16), heads=3)
    errors[dtype] = float(jnp.std(got - want) / jnp.std(want))
  print(errors)
  # 4 channels of 4, 2 and 1 bytes, and a float32 scale beside int8's.
  assert sizes["bfloat16"] * 2 == sizes["float32"] == sizes["int8"] * 2
  # Rounding errs by 2**-9 of a value at most, or by half of a 127th of the
  # largest of 4 channels, and the softmax averages over positions.
  assert errors["float32"] < 1e-5 < errors["bfloat16"] < 0.01
  assert 1e-5 < errors["int8"] < 0.02


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_drafts_leave_head_1_alone(net, tokens, dtype):
  lower = functools.partial(decoder_lib.lay_out, draft_dtype=dtype)
  if net.cfg.head == "anticausal":
    with pytest.raises(ValueError, match="would change the text"):
      lower(net)
    return
  full, low = decoder_of(net), jax.jit(lower)(net)
  args = tokens[:, :16], ZERO, places(16)
  want = read(full, full.empty_cache(B, S, 3), *args, heads=3)[1]
  got = read(low, low.empty_cache(B, S, 3), *args, heads=3)[1]
  np.testing.assert_array_equal(got[0], want[0])
  for i in (1, 2):
    error = float(jnp.std(got[i] - want[i]) / jnp.std(want[i]))
    assert 1e-5 < error < 0.05, (i, error)
  kinds = {str(a.dtype) for a in jax.tree.leaves(low)}
  assert dtype in kinds


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"sliding_window": 0}, "sliding_window=0 is too small"),
    ({"cache_dtype": "int4"}, "cache_dtype='int4' is none of float32"),
    ({"draft_dtype": "float16"}, "draft_dtype='float16' is none of None"),
  ],
)
def test_settings_that_there_are_not(settings, words):
  with pytest.raises(ValueError, match=words):
    decoder_lib.lay_out(create(shape("parallel")), **settings)


# --- Memory -------------------------------------------------------------------


@pytest.mark.parametrize(
  "tree", [tree_lib.chain(3), TREE], ids=["chain", "tree"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_updates_its_cache_in_place(kind, tree):
  """Temp memory of the compiled loop below a tenth of its cache."""
  heads = shape(kind).head_layers
  cfg = shape(kind, width=192, layers=5 + heads, attn_heads=3, kv_heads=3)
  key = jax.random.key(0)
  decoder = jax.eval_shape(lambda: decoder_lib.lay_out(model.Model(cfg, key)))
  rule = accept.Greedy()
  settings = interface.check_settings(
    decoder, heads=tree, max_new=3980, rule=rule
  )
  state = loop.abstract_state(decoder, settings, batch=3, slots=4000)
  compiled = loop.run_jit.lower(decoder, rule, state).compile()
  memory = compiled.memory_analysis()
  cache = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.cache))
  print(f"{kind}: temp / cache {memory.temp_size_in_bytes / cache:.3f}")
  assert memory.temp_size_in_bytes < 0.1 * cache
  assert memory.alias_size_in_bytes > cache  # the state's buffers are donated


MESHES = """
import jax, numpy as np
from mtp_jax import config, sharding
from mtp_jax.decode import accept, interface, loop, sampling, serve
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import generate as decode
from mtp_jax.decode import tree as tree_lib
from tests.test_window import create, shape

TREE = tree_lib.from_paths([[0], [1], [0, 0], [0, 1], [1, 0]])
rng = np.random.default_rng(0)
prompts = [rng.integers(0, 31, n).tolist() for n in (1, 5, 3, 11, 2, 7, 13, 2)]
net = create(shape("parallel", vocab=32, mlp=44, attn_heads=12, kv_heads=4))
plain = decoder_lib.lay_out(net, 31)
drawn = accept.Lossless(sampling.Sampler(temperature=0.8, top_k=7))
want = {
  (heads, rule): decode.generate(
    plain, prompts, heads=heads, max_new=23, rule=rule)
  for heads, rule in ((3, accept.GREEDY), (TREE, accept.GREEDY), (TREE, drawn))
}
for shape in ((4, 2), (2, 4), (8, 1)):
  mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices())
  decoder = decoder_lib.lay_out(net, 31, on=mesh)
  assert decoder.trunk[0].wq[...].sharding.spec == jax.P(None, "model", None)
  for (heads, rule), text in want.items():
    got = decode.generate(decoder, prompts, heads=heads, max_new=23, rule=rule)
    same = [np.array_equal(a, b)
            for a, b in zip(got.tokens, text.tokens, strict=True)]
    assert all(same), (shape, heads, rule, same)
    for a, b in zip(got.texts, text.texts, strict=True):
      np.testing.assert_allclose(a.logprob, b.logprob, atol=3e-5)
      np.testing.assert_array_equal(a.per_pass, b.per_pass)
  if shape == (4, 2):
    turn = serve._decode
    def split(decoder, rule, state, *rest):
      assert state.cache[0][0].sharding.spec == jax.P("data", "model")
      return turn(decoder, rule, state, *rest)
    serve._decode = split
    served = serve.generate_all(
      decoder, prompts[:7], slots=4, heads=TREE, max_new=23, rule=drawn)
    for a, b in zip(served.tokens, want[TREE, drawn].tokens[:7], strict=True):
      np.testing.assert_array_equal(a, b)
    for call, words in (
      (lambda: decode.generate(decoder, prompts[:3], heads=1, max_new=5),
       "3 rows do not divide by the 4 devices"),
      (lambda: serve.generate_all(
        decoder, prompts, slots=6, heads=1, max_new=5),
       "slots=6 do not divide by the 4 devices"),
    ):
      try:
        call()
      except ValueError as error:
        assert words in str(error), error
      else:
        raise AssertionError(words)
  tokens, lengths = np.ones((8, 16), np.int32), np.full(8, 5, np.int32)
  settings = interface.check_settings(decoder, heads=TREE, max_new=9)
  state = decode.start(decoder, tokens, lengths, settings)
  state = loop.advance_jit(decoder, accept.GREEDY, state)
  k = state.cache[0][0]
  part = k.addressable_shards[0].data.shape
  assert part[:2] == (8 // shape[0], 4 // shape[1]), (shape, part)
try:
  decoder_lib.lay_out(
    net, on=sharding.make_mesh(config.Mesh(1, 8), jax.devices()))
except ValueError as error:
  assert "kv_heads 4 is not divisible by 8" in str(error), error
print("equal")
"""


def test_meshes_write_the_same_texts(run_with_devices):
  assert run_with_devices(8, MESHES) == "equal\n"
