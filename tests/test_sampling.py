"""Distributions against loops in float64; draws against exact laws."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mtp_jax.decode import sampling

V = 7
# Logits up to 4 over a temperature of 0.6, rounded to float32 a few times,
# are off by 7 * 6e-8 a time, and so are the probabilities, relatively.
CLOSE = {"rtol": 3e-6, "atol": 1e-7}

probabilities = jax.jit(lambda s, logits, seen: s.probabilities(logits, seen))


def by_hand(logits, seen, sampler):
  """One row's probabilities, and how far each decision was from another."""
  x = [float(value) for value in logits]
  margin = math.inf
  if sampler.penalty is not None:
    for i, value in enumerate(x):
      if seen[i]:
        x[i] = value / sampler.penalty if value > 0 else value * sampler.penalty
  if sampler.temperature is not None:
    x = [value / sampler.temperature for value in x]
  weight = [math.exp(value - max(x)) for value in x]
  if sampler.top_k is not None:
    last = sorted(weight, reverse=True)[min(sampler.top_k, len(x)) - 1]
    weight = [w if w >= last else 0.0 for w in weight]
  if sampler.top_p is not None:
    held = 0.0
    for w in sorted(weight, reverse=True):
      held += w / sum(weight)
      margin = min(margin, abs(held - sampler.top_p))
      if held >= sampler.top_p:
        break
    weight = [value if value >= w else 0.0 for value in weight]
  if sampler.min_p is not None:
    best = max(weight)
    others = [w for w in weight if 0 < w < best]
    margin = min([margin, *(abs(w / best - sampler.min_p) for w in others)])
    weight = [w if w >= sampler.min_p * best else 0.0 for w in weight]
  return np.array(weight) / sum(weight), margin


def rows():
  """[61, V] logits: plain ones, ties, an extreme one, impossible tokens."""
  rng = np.random.default_rng(2)
  plain = rng.uniform(-4, 4, (23, V))
  ties = rng.integers(-3, 3, (23, V)) / 2
  extreme = rng.uniform(-4, 4, (5, V))
  extreme[range(5), [0, 3, 6, 2, 2]] = [1e4, 1e4, 1e30, -1e4, -1e30]
  impossible = np.where(
    rng.random((9, V)) < 0.5, -np.inf, rng.uniform(-4, 4, (9, V))
  )
  impossible[:, 4] = rng.uniform(-4, 4, 9)  # one is left at least
  logits = np.concatenate([plain, ties, extreme, impossible, np.zeros((1, V))])
  return logits.astype(np.float32), rng.random(logits.shape) < 0.4


NUMBERS = {
  "temperature": (0.6, 1.0, 1.7),
  "top_k": (1, 2, 3, 5, V, V + 10),
  "top_p": (0.11, 0.52, 0.9, 0.997),
  "min_p": (0.0, 0.07, 0.45, 1.0),
  "penalty": (0.8, 1.3, 2.0),
}


@pytest.mark.parametrize(
  "names",
  [
    (),
    *((name,) for name in NUMBERS),
    ("top_k", "top_p"),
    ("top_k", "min_p"),
    ("top_p", "min_p"),
    ("temperature", "top_p", "penalty"),
    tuple(NUMBERS),
  ],
  ids=lambda names: "-".join(names) or "nothing",
)
def test_filters_against_loops(names):
  logits, seen = rows()
  rng = np.random.default_rng(3)
  chosen = list(itertools.product(*(NUMBERS[name] for name in names)))
  chosen = [chosen[i] for i in rng.permutation(len(chosen))[:29]]
  cut = 0
  for numbers in chosen:
    sampler = sampling.Sampler(**dict(zip(names, numbers, strict=True)))
    got = np.asarray(probabilities(sampler, logits, seen))
    assert got.dtype == np.float32
    want, margins = zip(
      *(by_hand(*row, sampler) for row in zip(logits, seen, strict=True)),
      strict=True,
    )
    # Beyond float32's rounding of a sum: no decision is a coin's.
    assert min(margins) > 3e-7
    np.testing.assert_allclose(got, np.stack(want), **CLOSE)
    np.testing.assert_array_equal(got > 0, np.stack(want) > 1e-45)
    cut += ((got == 0) & np.isfinite(logits)).sum()
  if set(names) & {"top_k", "top_p", "min_p"}:  # each cuts something
    assert cut > 100


def test_what_each_filter_keeps():
  """Cases small enough to be read."""

  def kept(logits, **numbers):
    p = sampling.Sampler(**numbers).probabilities(jnp.asarray(logits))
    return np.flatnonzero(p).tolist()

  shares = np.log([0.1, 0.4, 0.2, 0.25, 0.05]).astype(np.float32)
  assert kept(shares, top_k=2) == [1, 3]
  assert kept(shares, top_p=0.3) == [1]
  assert kept(shares, top_p=0.5) == [1, 3]  # the one that crosses it stays
  assert kept(shares, top_p=0.7) == [1, 2, 3]
  assert kept(shares, min_p=0.4) == [1, 2, 3]
  # Shares of what top-k left: 0.4 of 0.65 crosses 0.6, 0.4 of 1 does not.
  assert kept(shares, top_p=0.6) == [1, 3]
  assert kept(shares, top_p=0.6, top_k=2) == [1]
  ties = np.array([1.0, 3, 2, 2, 0], np.float32)
  assert kept(ties, top_k=2) == [1, 2, 3]  # tied with the last
  assert kept(ties, top_p=0.6) == [1, 2, 3]
  assert kept(np.array([0.0, 1e30, -1e30], np.float32)) == [1]


@pytest.mark.parametrize(
  "numbers",
  [
    {"top_k": V},
    {"top_k": 1000},
    {"min_p": 0.0},
    {"temperature": 1.0},
    {"penalty": 1.0},
    {"temperature": 1},
  ],
)
def test_numbers_that_change_nothing(numbers):
  logits, seen = rows()
  got = probabilities(sampling.Sampler(**numbers), logits, seen)
  plain = probabilities(sampling.Sampler(), logits, seen)
  np.testing.assert_array_equal(got, plain)


def test_top_p_1_keeps_all_that_is_no_rounding():
  logits = np.random.default_rng(4).normal(size=(13, 997)).astype(np.float32)
  got = probabilities(sampling.Sampler(top_p=1.0), 3 * logits, None)
  plain = probabilities(sampling.Sampler(), 3 * logits, None)
  # A float32 sum of 997 shares ends within 8 roundings of 1.
  np.testing.assert_allclose(got, plain, rtol=1e-6, atol=8 * 6e-8)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 5)])
def test_any_leading_axes(shape):
  rng = np.random.default_rng(5)
  logits = rng.normal(size=(*shape, V)).astype(np.float32)
  seen = rng.random((*shape, V)) < 0.5
  sampler = sampling.Sampler(0.7, 5, 0.9, 0.05, 1.3)
  got = np.asarray(probabilities(sampler, logits, seen))
  assert got.shape == (*shape, V)
  for place in np.ndindex(shape):
    want, _ = by_hand(logits[place], seen[place], sampler)
    np.testing.assert_allclose(got[place], want, **CLOSE)


def test_half_precision_is_widened_first():
  logits, seen = rows()
  half = logits.astype(jnp.bfloat16)
  sampler = sampling.Sampler(0.7, 5, 0.9, 0.05, 1.3)
  got = probabilities(sampler, half, seen)
  assert got.dtype == jnp.float32
  want = probabilities(sampler, half.astype(np.float32), seen)
  np.testing.assert_array_equal(got, want)


def test_a_changed_number_compiles_nothing():
  fun = jax.jit(lambda s, logits, seen: s.probabilities(logits, seen))
  logits, seen = rows()
  for numbers in [(0.7, 5, 0.9, 0.05, 1.3), (1.3, 2, 0.5, 0.1, 0.9)]:
    fun(sampling.Sampler(*numbers), logits, seen)
    assert fun._cache_size() == 1
  fun(sampling.Sampler(0.7, 5, 0.9), logits, seen)
  assert fun._cache_size() == 2


@pytest.mark.parametrize(
  "numbers, words",
  [
    ({"temperature": 0}, "temperature=0 has to be from 1e-06"),
    ({"temperature": -0.5}, "temperature=-0.5 has to be from 1e-06"),
    ({"temperature": math.nan}, "temperature=nan has to be from 1e-06"),
    ({"top_k": 0}, "top_k=0 has to be at least 1"),
    ({"top_p": 0.0}, "top_p=0.0 has to be above 0, at most 1"),
    ({"top_p": 1.01}, "top_p=1.01 has to be above 0, at most 1"),
    ({"min_p": -0.1}, "min_p=-0.1 has to be from 0 to 1"),
    ({"min_p": 1.5}, "min_p=1.5 has to be from 0 to 1"),
    ({"penalty": 0}, "penalty=0 has to be from 1e-06"),
    ({"temperature": 1e-38}, "temperature=1e-38 has to be .*accept.GREEDY"),
    ({"temperature": math.inf}, "temperature=inf has to be"),
    ({"temperature": "1"}, "temperature='1' is not a number"),
    ({"temperature": True}, "temperature=True is not a number"),
    ({"top_k": 2.5}, "top_k=2.5 is not an integer"),
    ({"top_k": 2**31}, "top_k=2147483648 has to be"),
    ({"top_p": math.nan}, "top_p=nan has to be above 0"),
    ({"penalty": 1e-40}, "penalty=1e-40 has to be"),
    ({"penalty": math.inf}, "penalty=inf has to be from 1e-06"),
  ],
)
def test_numbers_out_of_bounds(numbers, words):
  with pytest.raises(ValueError, match=words):
    sampling.Sampler(**{"temperature": 0.7, **numbers}).check()


BOUNDS = {
  "temperature": (1e-6, 1e6),
  "top_k": (1, 2**31 - 1),
  "top_p": (1e-300, 1e-45, 1.0),
  "min_p": (0.0, 1e-45, 1.0),
  "penalty": (1e-6, 1e6),
}


@pytest.mark.parametrize(
  "numbers",
  [{}, *({name: x} for name, values in BOUNDS.items() for x in values)],
  ids=str,
)
def test_numbers_at_their_bounds(numbers):
  """What `check` lets through is a distribution, whatever the logits."""
  sampler = sampling.Sampler(**numbers)
  sampler.check()
  p = np.asarray(probabilities(sampler, *rows()))
  assert (p >= 0).all()
  np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
  if numbers.get("top_p", 1) < 1:  # the likeliest, and those tied with it
    np.testing.assert_array_equal(p > 0, p == p.max(-1, keepdims=True))


# --- Draws ------------------------------------------------------------------

DRAWS = 100_000
LAWS = np.array(
  [[0.4, 0.05, 0.25, 0.0, 0.3], [0.1, 0.1, 0.5, 0.2, 0.1]], np.float32
)


def keys(seed, count=DRAWS):
  return jax.random.split(jax.random.key(seed), count)


def pvalue(counts, law):
  """Of a chi-square test; what has no chance must not occur."""
  assert counts[law == 0].sum() == 0
  possible = law > 0
  want = law[possible] / law.sum() * counts.sum()
  return stats.chisquare(counts[possible], want).pvalue


def successive(law, count):
  """{tuple: chance} of tokens drawn, removed and drawn again."""
  chances = {}
  for tokens in itertools.permutations(range(len(law)), count):
    left, chance = law.astype(float).copy(), 1.0
    for token in tokens:
      chance *= left[token] / left.sum()
      left[token] = 0
    chances[tokens] = chance
  assert sum(chances.values()) == pytest.approx(1, abs=1e-12)
  return chances


def test_draw():
  tokens = jax.jit(sampling.draw)(jnp.tile(LAWS[0], (DRAWS, 1)), keys(0))
  assert tokens.dtype == jnp.int32 and tokens.shape == (DRAWS,)
  counts = np.bincount(tokens, minlength=5)
  law = LAWS[0].astype(float)
  assert pvalue(counts, law) > 1e-3
  # So many draws tell a law that is one percent off.
  assert pvalue(counts, law + [0.01, 0, -0.01, 0, 0]) < 1e-6


def test_draw_takes_weights_and_each_rows_own_key():
  p = jnp.asarray(LAWS[[0, 1, 0]])
  some = keys(1, 3)
  tokens = np.asarray(sampling.draw(p, some))
  np.testing.assert_array_equal(sampling.draw(p / 8, some), tokens)
  for i in range(3):
    alone = sampling.draw(p[i : i + 1], some[i : i + 1])
    assert alone.tolist() == [tokens[i]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_draw_distinct(count):
  p = jnp.tile(LAWS, (DRAWS, 1, 1))
  fun = jax.jit(sampling.draw_distinct, static_argnums=1)
  tokens = np.asarray(fun(p, count, keys(2)))
  assert tokens.dtype == np.int32 and tokens.shape == (DRAWS, 2, count)
  for d, law in enumerate(LAWS):
    chances = successive(law, count)
    number = {t: i for i, t in enumerate(chances)}
    drawn = [number[tuple(t)] for t in tokens[:, d].tolist()]  # all distinct
    counts = np.bincount(drawn, minlength=len(chances))
    assert pvalue(counts, np.array(list(chances.values()))) > 1e-3
    if count == 1:
      continue
    # Not sets in proportion to their products, as in rejecting whole tuples.
    other = np.array([math.prod(law[list(t)].tolist()) for t in chances])
    assert pvalue(counts, other) < 1e-6
  # Depths draw on their own.
  pairs = np.zeros((5, 5))
  np.add.at(pairs, (tokens[:, 0, 0], tokens[:, 1, 0]), 1)
  law = np.outer(*LAWS.astype(float))
  assert pvalue(pairs.ravel(), law.ravel()) > 1e-3


def test_draw_distinct_goes_on_with_tokens_that_have_no_chance():
  p = jnp.tile(
    jnp.asarray([[0, 0.3, 0, 0.7, 0], [0, 0, 0, 0, 1.0]]), (53, 1, 1)
  )
  tokens = np.asarray(sampling.draw_distinct(p, 4, keys(3, 53)))
  assert (np.sort(tokens[:, 0, :2], -1) == [1, 3]).all()
  assert (tokens[:, 1, 0] == 4).all()
  assert {tuple(t) for t in tokens[:, 0, :2].tolist()} == {(1, 3), (3, 1)}
  assert all(len(set(t)) == 4 for t in tokens.reshape(-1, 4).tolist())


def test_draw_distinct_each_rows_own_key():
  p = jnp.asarray(np.random.default_rng(6).dirichlet(np.ones(11), (3, 2)))
  some = keys(4, 3)
  tokens = sampling.draw_distinct(p, 5, some)
  for i in range(3):
    alone = sampling.draw_distinct(p[i : i + 1], 5, some[i : i + 1])
    np.testing.assert_array_equal(alone[0], tokens[i])
  other = sampling.draw_distinct(p, 5, keys(5, 3))
  assert (other != tokens).any()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_best(count):
  logits = np.random.default_rng(7).integers(-3, 3, (3, 11, 5)) / 2
  got = sampling.best(jnp.asarray(logits, jnp.float32), count)
  assert got.dtype == jnp.int32 and got.shape == (3, 11, count)
  for place in np.ndindex(3, 11):  # of two tied ones the first comes first
    want = sorted(range(5), key=lambda i, p=place: (-logits[p][i], i))
    assert got[place].tolist() == want[:count]
