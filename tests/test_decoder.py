"""A model laid out: casts, layouts, caches, drafts in few bits, meshes."""

import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.measure import aot
from mtp_jax import config
from mtp_jax.decode import cpu, interface, layout, loop
from mtp_jax.model import heads, layers
from tests import parameters, passes

ATOL, B, S, ZERO = passes.ATOL, passes.B, passes.S, passes.ZERO

KINDS = config.HEAD_KINDS


@pytest.fixture(autouse=True, scope="module")
def weights_are_turned():
  """Small as they are."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cpu, "LARGE", 0)
    yield


@pytest.fixture(scope="module", params=KINDS)
def net(request):
  more = {"qkv_bias": True, "qk_norm": True}
  return parameters.random_model(
    request.param, **(more if request.param == "causal" else {})
  )


@pytest.fixture(scope="module")
def tokens():
  return passes.text()


def test_padding_ids_are_never_written(net, tokens):
  """A padded vocabulary's other columns are cut off, for every head."""
  whole, cut = passes.decoder_of(net), layout.lay_out(net, 19)
  assert (whole.vocab, cut.vocab) == (31, 19)
  window = tokens[:, :7] % 19
  found = [
    passes.read(
      d, d.empty_cache(B, S, 3), window, ZERO, passes.places(7), heads=3
    )[1]
    for d in (whole, cut)
  ]
  cut, whole = found[1][..., :19], found[0][..., :19]
  np.testing.assert_allclose(cut, whole, rtol=0, atol=ATOL)
  assert np.isneginf(found[1][..., 19:]).all()
  with pytest.raises(ValueError, match="vocab 99 exceeds .* 31 ids"):
    layout.lay_out(net, 99)


@pytest.mark.parametrize("kind", ["parallel", "unembedding"])
def test_bfloat16_casts_matrices_and_keeps_norms_and_biases(kind, tokens):
  more = {"qkv_bias": kind == "parallel", "qk_norm": kind == "parallel"}
  half = parameters.random_model(kind, dtype="bfloat16", **more)
  full = parameters.random_model(kind, **more)
  for platform in ("tpu", "cpu"):
    decoder = layout.lay_out(half, on=platform)
    cache = decoder.empty_cache(B, S, 3)
    kinds = {
      ".".join(str(getattr(p, "name", p)) for p in path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path((decoder, cache))
    }
    # A CPU has no fast access to rows of bfloat16.
    full_too = r"|embed\.value|^.1" if platform == "cpu" else ""
    for name, leaf in kinds.items():
      is_full = re.search(r"norm|\.b[qkv]\." + full_too, name)
      assert leaf.dtype == (jnp.float32 if is_full else jnp.bfloat16), name
  assert half.embed[...].dtype == jnp.float32  # the trained model is as it was
  _, got = passes.read(
    decoder, cache, tokens[:, :16], ZERO, passes.places(16), heads=3
  )
  assert got.dtype == jnp.float32
  # A rounding to 8 bits errs by 0.002 of a value; some thirty of them in a
  # row walk to 0.01.
  for want in (passes.uncached(half, tokens), passes.uncached(full, tokens)):
    error = got - want[:, :, :16]
    assert jnp.std(error) < 0.02 * jnp.std(want)


def rounded(x):
  """To bfloat16, as float32."""
  return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


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
  want = np.tensordot(rounded(x), rounded(w), axes)
  np.testing.assert_allclose(rounded(half), want, rtol=2**-8, atol=2**-10)


@pytest.mark.parametrize("queries", [1, 6, cpu.FEW - 1, cpu.FEW])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_of_few_and_many_queries(queries, dtype):
  rng = np.random.default_rng(queries)
  q = jnp.asarray(rng.normal(size=(2, 3, queries, 4)), dtype)
  k = jnp.asarray(rng.normal(size=(2, 3, 11, 4)), dtype)
  got = cpu.scores(q, k)
  assert got.dtype == jnp.float32
  want = np.einsum(
    "BKQC,BKSC->BKQS", *(np.asarray(a, np.float64) for a in (q, k))
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_keys_are_on_the_left_of_few_queries_on_a_cpu_alone(platform):
  """A barrier keeps them there."""

  def text(queries):
    q, k = jnp.zeros((2, 3, queries, 4)), jnp.zeros((2, 3, 11, 4))
    lowered = (
      jax.jit(cpu.scores).trace(q, k).lower(lowering_platforms=(platform,))
    )
    return lowered.as_text()

  keys_first = "(tensor<2x3x11x4xf32>, tensor<2x3x6x4xf32>)" in text(6)
  assert keys_first == (platform == "cpu")
  assert ("optimization_barrier" in text(6)) == (platform == "cpu")
  assert "optimization_barrier" not in text(cpu.FEW)


@pytest.mark.slow
def test_a_tpus_program_has_no_branch(monkeypatch):
  """What is chosen by platform is chosen when it is compiled."""
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # aot removes it
  where = jax.sharding.SingleDeviceSharding(aot.topology("v5e:2x2")[0])
  decoder = jax.eval_shape(
    lambda: layout.lay_out(parameters.random_model("parallel"), on="tpu")
  )
  settings = interface.check_settings(decoder, heads=1, max_new=1)
  state = loop.abstract_state(decoder, settings, batch=2, cache_len=128)
  decoder, state = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
    (decoder, state),
  )
  compiled = loop.run_jit.lower(decoder, settings.rule, state).compile()
  assert "while" in compiled.as_text()
  assert "conditional" not in compiled.as_text()


def test_weights_are_turned_for_a_cpu_alone(net, tokens, monkeypatch):
  """Another platform's weights lie as they were, and say the same; so do small
  ones."""
  seen = []
  for platform in (None, "gpu", "tpu"):
    decoder = layout.lay_out(net, on=platform)
    weight = decoder.trunk[0].wo.get_value()
    assert isinstance(weight, cpu.Matrix) == (platform is None)
    cache = decoder.empty_cache(B, S, 3)
    args = tokens[:, :16], ZERO, passes.places(16)
    seen.append(passes.read(decoder, cache, *args, heads=3)[1])
  for got in seen[1:]:
    np.testing.assert_allclose(got, seen[0], rtol=0, atol=ATOL)
  size = net.trunk.wo[0].size
  for large, turned in ((size, True), (size + 1, False)):
    monkeypatch.setattr(cpu, "LARGE", large)
    weight = layout.lay_out(net).trunk[0].wo.get_value()
    assert isinstance(weight, cpu.Matrix) == turned


def test_smaller_caches(net, tokens):
  """Bytes as promised, and logits near enough: errors in deviations."""
  want, sizes = np.asarray(passes.uncached(net, tokens))[:, :, :16], {}
  errors = {}
  for dtype in ("float32", "bfloat16", "int8"):
    decoder = jax.jit(functools.partial(layout.lay_out, cache_dtype=dtype))(net)
    cache = decoder.empty_cache(B, S, 3)
    sizes[dtype] = sum(a.nbytes for a in jax.tree.leaves(cache))
    _, got = passes.read(
      decoder, cache, tokens[:, :16], ZERO, passes.places(16), heads=3
    )
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
  lower = functools.partial(layout.lay_out, draft_dtype=dtype)
  if net.cfg.head == "anticausal":
    with pytest.raises(ValueError, match="would change the text"):
      lower(net)
    return
  full, low = passes.decoder_of(net), jax.jit(lower)(net)
  args = tokens[:, :16], ZERO, passes.places(16)
  want = passes.read(full, full.empty_cache(B, S, 3), *args, heads=3)[1]
  got = passes.read(low, low.empty_cache(B, S, 3), *args, heads=3)[1]
  np.testing.assert_array_equal(got[0], want[0])
  for i in (1, 2):
    error = float(jnp.std(got[i] - want[i]) / jnp.std(want[i]))
    assert 1e-5 < error < 0.05, (i, error)
  kinds = {str(a.dtype) for a in jax.tree.leaves(low)}
  assert dtype in kinds


IDS = np.array([1, 4, 5, 9, 17, 18, 30])


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_limited_drafts(net, tokens, dtype):
  """The same logits on some ids and -inf on others, of heads 2..N alone."""
  if net.cfg.head == "anticausal":
    dtype = None
  full = layout.lay_out(net, draft_dtype=dtype)
  limited = layout.limit_drafts(full, IDS[::-1])
  args = tokens[:, :16], ZERO, passes.places(16)
  want, got = (
    np.asarray(passes.read(d, d.empty_cache(B, S, 3), *args, heads=3)[1])
    for d in (full, limited)
  )
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_allclose(
    got[1:, ..., IDS], want[1:, ..., IDS], rtol=0, atol=ATOL
  )
  assert np.isneginf(np.delete(got[1:], IDS, -1)).all()
  size = sum(a.nbytes for a in jax.tree.leaves(limited.unembed[1:]))
  assert size <= 2 * 4 * net.cfg.width * len(IDS)


@pytest.mark.parametrize(
  "ids, words",
  [
    ([], "draft ids: none; give some of 0..18"),
    ([3, 19], "draft ids: 19; give"),
    ([-1, 3], "draft ids: -1; give"),
  ],
)
def test_ids_that_there_are_not(ids, words):
  decoder = layout.lay_out(parameters.random_model("parallel"), 19)
  with pytest.raises(ValueError, match=words):
    layout.limit_drafts(decoder, ids)
  limited = layout.limit_drafts(decoder, [3])
  with pytest.raises(ValueError, match="limited already"):
    layout.limit_drafts(limited, [3])


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"sliding_window": 0}, "sliding_window=0 is too small"),
    ({"cache_dtype": "int4"}, "cache_dtype='int4' is none of float32"),
    ({"on": "CPU"}, "on='CPU' is none of None, cpu, gpu"),
    ({"draft_dtype": "float16"}, "draft_dtype='float16' is none of None"),
  ],
)
def test_settings_that_there_are_not(settings, words):
  with pytest.raises(ValueError, match=words):
    layout.lay_out(parameters.random_model("parallel"), **settings)


def test_heads_that_read_tokens_are_refused(monkeypatch):
  """Rather than drafts from heads that miss half of what they read."""
  net = parameters.random_model()
  kind = dataclasses.replace(heads.KINDS["parallel"], reads_tokens=True)
  monkeypatch.setitem(heads.KINDS, "parallel", kind)
  with pytest.raises(ValueError, match="'parallel', whose heads read tokens"):
    layout.lay_out(net)


MESHES = """
import jax, numpy as np
from mtp_jax import config, sharding
from mtp_jax.decode import accept, interface, loop, sampling, serve
from mtp_jax.decode import layout
from mtp_jax.decode import generate as decode
from mtp_jax.decode import tree as tree_lib
from tests import parameters

TREE = tree_lib.from_paths([[0], [1], [0, 0], [0, 1], [1, 0]])
rng = np.random.default_rng(0)
prompts = [rng.integers(0, 31, n).tolist() for n in (1, 5, 3, 11, 2, 7, 13, 2)]
net = parameters.random_model(
  vocab=32, mlp=44, layers=4, attn_heads=12, kv_heads=4, attn_channels=4,
  qkv_bias=True, qk_norm=True)
plain = layout.lay_out(net, 31)
drawn = accept.SpeculativeSampling(sampling.Sampler(temperature=0.8, top_k=7))
want = {
  (heads, rule): decode.generate(
    plain, prompts, heads=heads, max_new=23, rule=rule)
  for heads, rule in ((3, accept.GREEDY), (TREE, accept.GREEDY), (TREE, drawn))
}
for shape in ((4, 2), (2, 4), (8, 1)):
  mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices())
  decoder = layout.lay_out(net, 31, on=mesh)
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
      decoder, prompts[:5], rows=4, heads=TREE, max_new=23, rule=drawn)
    for a, b in zip(served.tokens, want[TREE, drawn].tokens[:5], strict=True):
      np.testing.assert_array_equal(a, b)
    for call, words in (
      (lambda: decode.generate(decoder, prompts[:3], heads=1, max_new=5),
       "3 rows do not divide by the 4 devices"),
      (lambda: serve.generate_all(
        decoder, prompts, rows=6, heads=1, max_new=5),
       "rows=6 do not divide by the 4 devices"),
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
  state = loop.run_jit(decoder, accept.GREEDY, state)
  k = state.cache[0][0]
  part = k.addressable_shards[0].data.shape
  assert part[:2] == (8 // shape[0], 4 // shape[1]), (shape, part)
try:
  layout.lay_out(
    net, on=sharding.make_mesh(config.Mesh(1, 8), jax.devices()))
except ValueError as error:
  assert "kv_heads 4 is not divisible by 8" in str(error), error
print("equal")
"""


@pytest.mark.slow
def test_meshes_write_the_same_texts(run_with_devices):
  assert run_with_devices(8, MESHES) == "equal\n"
