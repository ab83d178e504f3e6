"""The cache against a dict of positions: what was written last is read."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mtp_jax.decode import cache

B, K, C = 3, 2, 5
S = 13  # positions that fit
RING = 7  # slots of a ring


@functools.partial(jax.jit, static_argnames="ring")
def write(layer, k, v, start, places=None, **where):
  """A window, and then its `places` from its beginning on."""
  new = cache.stored(k, v, layer[0].dtype.name)
  layer = cache.write(layer, new, start, **where)
  if places is None:
    return layer
  return cache.write(layer, cache.pick(new, places), start, ring=where["ring"])


def read(layer, dtype):
  """k, v [B, K, S, C] as `attend` takes them to be."""
  k, v, *scales = (a.astype(dtype) for a in layer)
  return (k * scales[0], v * scales[1]) if scales else (k, v)


def kept(x, dtype):
  """(x as it is kept, how far it may be off) of x [..., C] float32.

  Int8 is off by half a step of its scale; reading multiplies, which rounds.
  """
  if dtype == "int8":
    step = abs(x).max(-1, keepdims=True) / 127
    return x, step / 2 * (1 + 1e-4) + 0 * x
  return x.astype(dtype).astype(np.float32), 0 * x


class Slots:
  """What each slot of each row holds: {slot: (k, v) [K, C]}, else zeros."""

  def __init__(self, slots, dtype, ring):
    self.slots, self.dtype, self.ring = slots, dtype, ring
    self.rows = [{} for _ in range(B)]

  def slot(self, position):
    if self.ring:
      return position % self.slots
    assert 0 <= position < self.slots
    return position

  def write(self, k, v, start, valid=None):
    for b, row in enumerate(self.rows):
      count = k.shape[1] if valid is None else min(valid[b], k.shape[1])
      for i in range(count):
        row[self.slot(start[b] + i)] = k[b, i], v[b, i]

  def move(self, start, places):
    for b, row in enumerate(self.rows):
      zeros = np.zeros((2, K, C), np.float32)
      moved = [row.get(self.slot(start[b] + p), zeros) for p in places[b]]
      for i, pair in enumerate(moved):
        row[self.slot(start[b] + i)] = pair

  def check(self, layer):
    """Every slot of every row, written or not."""
    want = np.zeros((2, B, K, self.slots, C), np.float32)
    for b, row in enumerate(self.rows):
      for slot, pair in row.items():
        want[:, b, :, slot] = pair
    want, off = kept(want, self.dtype)
    got = np.stack(read(layer, jnp.float32))
    assert (abs(got - want) <= off).all()


def normal(rng, *shape):
  scale = 10.0 ** rng.integers(-3, 3, (*shape[:-1], 1))
  return (rng.normal(size=shape) * scale).astype(np.float32)


def windows(rng, width):
  return (normal(rng, B, width, K, C) for _ in range(2))


STEPS = st.lists(
  st.tuples(
    st.sampled_from(["write", "write", "move"]),
    st.sampled_from([1, 4]),
    st.lists(st.integers(0, 10**6), min_size=B, max_size=B),
    st.lists(st.integers(0, 5), min_size=B, max_size=B),
  ),
  min_size=1,
  max_size=7,
)


@pytest.mark.parametrize("ring", [False, True], ids=["plain", "ring"])
@pytest.mark.parametrize("dtype", cache.DTYPES)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(steps=STEPS, seed=st.integers(0, 2**32 - 1))
def test_any_writes_and_moves_against_a_dict(dtype, ring, steps, seed):
  """Rows at offsets of their own, rolled back and on, round and round."""
  rng, slots = np.random.default_rng(seed), RING if ring else S
  slots_by_hand = Slots(slots, dtype, ring)
  layer = cache.empty(B, K, slots, C, dtype)
  for kind, width, start, valid in steps:
    start = np.array(start, np.int32)
    start = start % 10_000 if ring else start % (slots - width + 1)
    k, v = windows(rng, width)
    if kind == "write":
      where = {"valid": np.array(valid, np.int32)} if ring else {}
      layer = write(layer, k, v, start, ring=ring, **where)
      slots_by_hand.write(k, v, start, **where)
    else:
      places = np.sort(rng.integers(0, width, (B, width)), -1)
      layer = write(layer, k, v, start, places, ring=ring)
      slots_by_hand.write(k, v, start)
      slots_by_hand.move(start, places)
  slots_by_hand.check(layer)


@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_an_empty_cache(dtype):
  layer = cache.empty(B, K, S, C, dtype)
  assert cache.length(layer) == S
  shapes = [(B, K, S, C)] * 2 + [(B, K, S, 1)] * 2 * (dtype == "int8")
  assert [a.shape for a in layer] == shapes
  assert [a.dtype for a in layer[:2]] == [jnp.dtype(dtype)] * 2
  assert all(a.dtype == jnp.float32 for a in layer[2:])
  assert not any(np.asarray(a).any() for a in layer)


def test_a_written_window_lies_where_it_should():
  """One write, element by element; the last position of the cache included."""
  rng = np.random.default_rng(0)
  k, v = windows(rng, 4)
  start = np.array([0, 5, S - 4], np.int32)
  got = write(cache.empty(B, K, S, C, "float32"), k, v, start)
  for b in range(B):
    for s in range(S):
      place = s - start[b]
      for array, new in zip(got, (k, v), strict=True):
        want = new[b, place] if 0 <= place < 4 else np.zeros((K, C))
        np.testing.assert_array_equal(array[b, :, s], want)


def test_a_ring_forgets_no_live_position():
  """Padding behind a window's own tokens falls on none; rows count alone."""
  rng = np.random.default_rng(1)
  k, v = windows(rng, RING)
  full = write(cache.empty(B, K, RING, C, "float32"), k, v, 0 * np.arange(B))
  more, start = list(windows(rng, 4)), np.array([RING, RING + 2, 50], np.int32)
  for valid in ([0, 0, 0], [1, 0, 4], [4, 9, 2]):
    got = write(full, *more, start, ring=True, valid=np.array(valid))
    for b in range(B):
      own = [(start[b] + i) % RING for i in range(min(valid[b], 4))]
      for array, old, new in zip(got, full, more, strict=True):
        for s in range(RING):
          want = new[b, own.index(s)] if s in own else old[b, :, s]
          np.testing.assert_array_equal(array[b, :, s], want)


@pytest.mark.parametrize("ring", [False, True], ids=["plain", "ring"])
@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_a_path_of_a_tree_comes_to_lie_in_order(dtype, ring):
  """Bit for bit, scales included, and nothing else changes."""
  rng, slots = np.random.default_rng(2), RING if ring else S
  start = np.array([0, 5, 9], np.int32)  # two of them wrap round in a ring
  start = start if ring else np.minimum(start, S - 6)
  places = np.array([[0, 2, 5], [0, 1, 2], [0, 4, 4]], np.int32)
  empty = cache.empty(B, K, slots, C, dtype)
  window = list(windows(rng, 6))
  whole = write(empty, *window, start, ring=ring)
  got = write(empty, *window, start, places, ring=ring)
  for array, old in zip(got, whole, strict=True):
    want = np.array(old)
    for b in range(B):
      for i, place in enumerate(places[b]):
        there, here = (start[b] + place) % slots, (start[b] + i) % slots
        want[b, :, here] = old[b, :, there]
    np.testing.assert_array_equal(array, want)
    np.testing.assert_array_equal(array[1], old[1])  # a chain stays
    assert (array != old).any()


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 30))
def test_int8_is_off_by_half_a_step(seed, exponent):
  rng = np.random.default_rng(seed)
  k, v = (x * np.float32(10.0**exponent) for x in windows(rng, 4))
  k[0, 1, 1] = v[2, 3, 0] = 0  # a scale of 0
  layer = write(cache.empty(B, K, S, C, "int8"), k, v, np.zeros(B, np.int32))
  for got, values, scale, new in zip(
    read(layer, jnp.float32), layer[:2], layer[2:], (k, v), strict=True
  ):
    got, values = np.asarray(got)[:, :, :4], np.asarray(values)[:, :, :4]
    new = new.swapaxes(1, 2)
    want, off = kept(new, "int8")
    assert (abs(got - want) <= off).all()
    # The largest channel of each takes the whole range.
    assert (abs(values).max(-1) == 127 * new.any(-1)).all()
    largest = abs(new).max(-1)
    np.testing.assert_allclose(  # one division, rounded
      np.asarray(scale)[:, :, :4, 0] * 127, largest, rtol=2e-7
    )


@pytest.mark.parametrize("model", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_attention_equals_the_formula(dtype, model):
  """Two query heads per kv head; scores of some size, each key a scale."""
  rng, W, G = np.random.default_rng(3), 4, 2
  k, v = (rng.normal(size=(B, S, K, C)).astype(np.float32) for _ in range(2))
  layer = write(cache.empty(B, K, S, C, dtype), k, v, np.zeros(B, np.int32))
  q = jnp.asarray(8 * rng.normal(size=(B, W, K * G, C)), model)
  mask = rng.random((B, W, S)) < 0.5
  mask[..., 7] = True
  got = jax.jit(cache.attend)(mask, q, *layer)
  assert got.shape == q.shape and got.dtype == q.dtype

  keys, values = (np.asarray(a, np.float64) for a in read(layer, jnp.float32))
  queries = np.asarray(q, np.float64).reshape(B, W, K, G, C)
  scores = np.einsum("bwkgc,bksc->bkgws", queries, keys) / np.sqrt(C)
  scores = np.where(mask[:, None, None], scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum("bkgws,bksc->bwkgc", weights, values)
  most = np.einsum("bkgws,bksc->bwkgc", weights, abs(values))
  # The model's dtype rounds the weights and the result, nothing before them.
  unit = 3 * 2.0**-9 if model == "bfloat16" else 1e-5
  got = np.asarray(got, np.float64).reshape(want.shape)
  assert (abs(got - want) <= unit * most).all()


def test_a_model_in_bfloat16_writes_any_cache():
  rng = np.random.default_rng(4)
  k, v = (x.astype(jnp.bfloat16) for x in windows(rng, 4))
  start = np.array([3, 0, 9], np.int32)
  for dtype in cache.DTYPES:
    layer = write(cache.empty(B, K, S, C, dtype), k, v, start)
    assert layer[0].dtype == jnp.dtype(dtype)
    slots_by_hand = Slots(S, dtype, False)
    slots_by_hand.write(*(x.astype(np.float32) for x in (k, v)), start)
    slots_by_hand.check(layer)


@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_a_grown_cache_holds_the_same(dtype):
  rng = np.random.default_rng(5)
  k, v = windows(rng, S)
  layer = write(cache.empty(B, K, S, C, dtype), k, v, np.zeros(B, np.int32))
  for slots in (S, 2 * S + 3):
    grown = cache.grow(layer, slots)
    assert cache.length(grown) == slots
    for array, old in zip(grown, layer, strict=True):
      assert array.dtype == old.dtype and array.shape[2] == slots
      np.testing.assert_array_equal(array[:, :, :S], old)
      assert not np.asarray(array[:, :, S:]).any()
  more, start = list(windows(rng, 4)), np.array([S, 0, 2 * S - 1], np.int32)
  got = np.stack(read(write(grown, *more, start), jnp.float32))
  want, off = np.stack(read(grown, jnp.float32)), np.zeros(got.shape)
  for b in range(B):
    there = slice(start[b], start[b] + 4)
    new = np.stack([x[b].swapaxes(0, 1) for x in more])
    want[:, b, :, there], off[:, b, :, there] = kept(new, dtype)
  assert (abs(got - want) <= off).all()


def test_held_without_a_ring_is_the_slot():
  got = cache.slot_positions(S, jnp.array([3, 5]), 4)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, np.arange(S)[None])


@functools.partial(jax.jit, static_argnums=(0, 2))
def held_in_a_ring(slots, start, width):
  return cache.slot_positions(slots, start, width, ring=True)


@pytest.mark.parametrize(
  "slots, width", [(RING, 1), (RING, 4), (7, 7), (11, 3)]
)
def test_held_in_a_ring_against_a_text_that_is_written(slots, width):
  start = np.arange(4 * slots, dtype=np.int32)
  got = held_in_a_ring(slots, start, width)
  assert got.shape == (4 * slots, slots) and got.dtype == jnp.int32
  for b in range(len(start)):
    ring = [None] * slots
    for position in range(start[b] + width):
      ring[position % slots] = position
    known = [int(p) if p >= 0 else None for p in got[b]]
    assert known == ring


def test_a_ring_is_read_by_the_positions_it_holds():
  """Windows of drafts, of which some stay: no rejected one is left behind."""
  rng, width = np.random.default_rng(6), 3
  layer = cache.empty(B, K, RING, C, "float32")
  start, text = np.zeros(B, np.int32), [{} for _ in range(B)]
  for _ in range(13):
    k, v = windows(rng, width)
    layer = write(layer, k, v, start, ring=True)
    held = np.asarray(held_in_a_ring(RING, start, width))
    keys, values = (np.asarray(a) for a in read(layer, jnp.float32))
    for b in range(B):
      for i in range(width):
        text[b][start[b] + i] = k[b, i], v[b, i]
      assert held[b].max() == start[b] + width - 1
      for s, position in enumerate(held[b]):
        if position >= 0:
          np.testing.assert_array_equal(keys[b, :, s], text[b][position][0])
          np.testing.assert_array_equal(values[b, :, s], text[b][position][1])
    start = start + rng.integers(1, width + 1, B).astype(np.int32)
  assert len(set(start.tolist())) > 1 and start.min() > 2 * RING


@pytest.mark.parametrize(
  ("platform", "sizes"),
  [
    ("cpu", [256, 384, 640, 1024]),
    ("gpu", [512, 768, 1152, 1792]),
    ("tpu", [512, 768, 1152, 1792]),
  ],
)
def test_the_sizes_of_a_cache(monkeypatch, platform, sizes):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  found = [cache.ladder(1)]
  while len(found) < len(sizes):
    found.append(cache.ladder(found[-1] + 1))
  assert found == sizes
  assert [cache.ladder(size) for size in sizes] == sizes
