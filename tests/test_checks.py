"""Settings of decoding: of any integer type, or refused by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.decode import accept, autotune, checks, layout, serve
from mtp_jax.decode import generate as decode
from mtp_jax.decode import tree as tree_lib
from tests import parameters
from tests.mocks import Mock

NO_INTEGERS = [2.0, 2.5, True, np.bool_(True), "2", None, [2], np.float32(2)]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused(value):
  with pytest.raises(ValueError, match="^heads=.* is not an integer$"):
    checks.integer("heads", value)


@pytest.mark.parametrize(
  "value", [2, np.int64(2), np.uint8(2), np.array(2), jnp.int32(2)], ids=repr
)
def test_integers_of_any_kind_serve(value):
  for found in (checks.integer("heads", value), int(checks.seed(value))):
    assert found == 2 and type(found) is int
  assert checks.stop_ids(value, 3).tolist() == [2, -1, -1, -1]
  assert checks.number("top_p", value) == 2.0


@pytest.mark.parametrize("value", ["0.5", True, None, [1.0], 10**400, 1j])
def test_what_is_no_number_is_refused(value):
  with pytest.raises(ValueError, match="^top_p=.* is not a number$"):
    checks.number("top_p", value)


@pytest.mark.parametrize(
  "stop, ids",
  [
    (None, []),
    ([], []),
    (0, [0]),
    ([3, 12], [3, 12]),
    ((np.int64(3),), [3]),
    (np.array([3, 5], np.uint16), [3, 5]),
    (range(5), [0, 1, 2, 3, 4]),
  ],
  ids=repr,
)
def test_end_tokens(stop, ids):
  got = checks.stop_ids(stop, 13)
  assert got.dtype == np.int32 and got.size == (8 if len(ids) > 4 else 4)
  assert got[: len(ids)].tolist() == ids and (got[len(ids) :] == -1).all()


class Untouched(Mock):
  """Whoever reads or writes a cache has begun to work."""

  def empty_cache(self, batch, cache_len, heads):
    raise AssertionError("work was begun")


STOPS = [
  (13, "stop=13 is outside the vocabulary 0..12"),
  (-1, "stop=-1 is outside"),
  ([3, 99], "stop=99 is outside"),
  (True, "stop=True is not an integer"),
  (3.0, "stop=3.0 is not an integer"),
  ("end", "stop='end' is not an id"),
  ([[3], [4]], "is not an id or a list of ids"),
]
CALLS = [
  *({"stop": stop, "words": words} for stop, words in STOPS),
  {"seed": -1, "words": "seed=-1 is outside 0..4294967295"},
  {"seed": 2**63, "words": "seed=9223372036854775808 is outside"},
  {"seed": 0.5, "words": "seed=0.5 is not an integer"},
  {"heads": 2.0, "words": "heads=2.0 is not an integer"},
  {"heads": True, "words": "heads=True is not an integer"},
  {"rule": "greedy", "words": "rule='greedy' is not a rule; give one of"},
  {"rule": None, "words": "rule=None is not a rule"},
  {"rule": accept.Greedy, "words": "rule=<class .*> is not a rule"},
  {"rule": accept.Forced(0, "no"), "words": "rule='no' is not a rule"},
  {
    "rule": accept.SpeculativeSampling(0.8),
    "words": "sampler=0.8 is not a sampler",
  },
  {"heads": "2", "words": "heads='2'"},
  {"heads": None, "words": "heads=None is not an integer"},
  {"max_new": 2.5, "words": "max_new=2.5 is not an integer"},
  {"max_new": 2**31, "words": "max_new=2147483648 is too many"},
  {"cache_len": 99.0, "words": "cache_len=99.0 is not an integer"},
  {"rows": 2.0, "words": "rows=2.0 is not an integer"},
  {"rows": 0, "words": "rows=0 is too small; give at least 1"},
  {"samples": True, "words": "samples=True is not an integer"},
]


@pytest.mark.parametrize("settings", CALLS, ids=lambda s: s["words"])
def test_settings_are_refused_before_any_work(settings):
  mock = Untouched(np.ones((1, 79), int), 13, 5)
  settings = {"heads": 2, "max_new": 7} | settings
  words = settings.pop("words")
  own = {"rows", "samples"} & settings.keys()
  if not own:
    with pytest.raises(ValueError, match=words):
      decode.generate(mock, [[1]], **settings)
  if "cache_len" not in settings:
    with pytest.raises(ValueError, match=words):
      serve.generate_all(mock, [[1]], **({"rows": 2} | settings))


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: tree_lib.chain(2.0), "heads=2.0 is not an integer"),
    (lambda: tree_lib.from_paths([[0.5]]), "rank=0.5 is not an integer"),
    (lambda: tree_lib.build([[0.5]], 2.0), "size=2.0 is not an integer"),
    (lambda: tree_lib.build([0.5], 2), "these are not chances"),
    (
      lambda: autotune.choose(None, [[1]], batch=0, max_new=3),
      "batch=0 is too",
    ),
    (
      lambda: decode.generate(object(), [[1]], heads=2, max_new=3),
      "decoder that mtp_jax.lay_out.* not an object of type object",
    ),
    (
      lambda: autotune.seconds_per_pass(None, [], autotune.Load(1, 0)),
      "length=0 is too small",
    ),
  ],
)
def test_other_functions_refuse_alike(call, words):
  with pytest.raises(ValueError, match=words):
    call()


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"vocab": 0}, "vocab=0 is too small"),
    ({"vocab": 19.0}, "vocab=19.0 is not an integer"),
    ({"sliding_window": 2.5}, "sliding_window=2.5 is not an integer"),
    ({"sliding_window": True}, "sliding_window=True is not an integer"),
  ],
)
def test_a_decoder_refuses_alike(settings, words):
  with pytest.raises(ValueError, match=words):
    layout.lay_out(parameters.random_model("linear"), **settings)


X64 = """
import jax
import numpy as np
from mtp_jax.decode import accept, sampling, serve
from mtp_jax.decode import layout
from mtp_jax.decode import generate as decode
from mtp_jax.decode import tree as tree_lib
from tests import parameters

net = parameters.random_model(
  width=8, mlp=8, layers=3, attn_heads=2, kv_heads=1, n_future=2
)
decoder = layout.lay_out(net)
TREE = tree_lib.from_paths([[0], [1]])
sampler = sampling.Sampler(np.float64(0.9), 9, 0.9, 0.01, 1.1)
drawn = accept.SpeculativeSampling(sampler)
prompts = [[1, 2, 3], [4]]
both = {"max_new": 9, "seed": 3, "stop": [5, 6]}

def texts():
  found = (
    decode.generate(decoder, prompts, heads=2, **both),
    serve.generate_all(decoder, prompts, rows=2, heads=TREE, rule=drawn,
                       samples=2, **both),
  )
  return [t for f in found for t in f.texts]

assert jax.config.jax_enable_x64
got = texts()
with jax.enable_x64(False):
  want = texts()
for a, b in zip(got, want, strict=True):
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-5)
  assert a.logprob.dtype == np.float32
print("equal")
"""


@pytest.mark.slow
def test_64_bits_change_no_text(run_with_devices):
  """A greedy chain and a served, sampled tree, with and without 64 bits."""
  assert run_with_devices(1, X64, JAX_ENABLE_X64="1") == "equal\n"
