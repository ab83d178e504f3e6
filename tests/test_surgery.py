"""Head surgery: what stays is equal bit for bit, what is new is as asked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.model import model, surgery, vocabulary
from tests import parameters

KEY = jax.random.key(0)
KINDS = ("parallel", "causal", "unembedding")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 7)))


@functools.cache
def net_of(kind):
  return parameters.random_model(kind)


@jax.jit
def logits(net):
  """[N, B, T, V]. One product per head: a wider one could round otherwise."""
  inputs = net.read(TOKENS, jnp.ones_like(TOKENS), TOKENS.shape[1])
  rows = []
  for i, hidden in enumerate(net.heads(inputs)):
    unembed = net.heads.unembed[...]
    unembed = unembed[i] if net.heads.kind.own_unembed else unembed
    rows.append(jnp.einsum("BTD,DV->BTV", hidden, unembed))
  return jnp.stack(rows)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_stay_keep_their_bits(kind):
  net = net_of(kind)
  want = logits(net)
  one = surgery.drop_heads(net, 1)
  assert one.cfg.trunk_layers == net.cfg.trunk_layers
  assert_equal(logits(one), want[:1])
  for how in surgery.HOW:
    five = surgery.add_heads(net, 5, jax.random.key(3), how)
    assert five.cfg.trunk_layers == net.cfg.trunk_layers
    shapes = jax.eval_shape(lambda k, c=five.cfg: model.Model(c, k), KEY)
    assert jax.tree.structure(five) == jax.tree.structure(shapes)
    found = logits(five)
    assert_equal(found[:3], want)
    if how == "copy" and kind != "causal":  # there a copy reads another state
      assert_equal(found[3:], jnp.repeat(want[2:], 2, 0))
    else:
      for i in (3, 4):
        assert all(abs(found[i] - found[j]).max() > 0.1 for j in range(i))
    assert_equal(surgery.drop_heads(five, 3), net)
    assert_equal(surgery.join(five, surgery.trainable(five)), five)
  assert_equal(net, net_of(kind))


def test_a_next_token_model_loses_no_layer():
  net = parameters.random_model(layers=3, n_future=1, mlp=80, width=48)
  four = surgery.add_heads(net, 4, KEY, "fresh")
  assert (four.cfg.layers, four.cfg.trunk_layers) == (6, 2)
  # As in a new model of 6 layers, and each head with values of its own.
  new = np.asarray(four.heads.layers.w_down[...][1:])
  np.testing.assert_allclose(new.std((1, 2)), (80 * 2 * 6) ** -0.5, rtol=0.05)
  assert len({x.tobytes() for x in new}) == 3


def test_linear_heads_begin_with_the_logits_of_head_1():
  net = parameters.random_model(layers=3, n_future=1)
  four = surgery.linear_heads(net, 4)
  shapes = jax.eval_shape(lambda k: model.Model(four.cfg, k), KEY)
  assert jax.tree.structure(four) == jax.tree.structure(shapes)
  assert [a.shape for a in jax.tree.leaves(four)] == [
    a.shape for a in jax.tree.leaves(shapes)
  ]
  assert (four.cfg.layers, four.cfg.trunk_layers, four.cfg.head) == (
    *(3, 3),
    "linear",
  )
  want = logits(net)
  for found in logits(four):  # a layer compiled inside a scan rounds otherwise
    np.testing.assert_allclose(found, want[0], rtol=1e-5, atol=1e-5)


def test_dropped_layers_are_the_last_of_the_trunk():
  net = parameters.random_model(layers=4, n_future=1)
  less = surgery.drop_layers(net, 2)
  assert (less.cfg.layers, less.cfg.trunk_layers) == (2, 1)
  assert_equal(
    [a[:1] for a in jax.tree.leaves(net.trunk)], jax.tree.leaves(less.trunk)
  )
  assert_equal(jax.tree.leaves(less.heads), jax.tree.leaves(net.heads))
  assert_equal(surgery.drop_layers(net, 0), net)


def test_new_heads_have_the_dtypes_of_the_old():
  net = net_of("parallel")
  small = {"wq": jnp.bfloat16, "norm": jnp.float32}  # as `load` makes them
  cast = jax.tree.map(
    lambda a: a.astype(small["wq" if a.ndim > 2 else "norm"]), net
  )
  for how in surgery.HOW:
    more = surgery.add_heads(cast, 5, KEY, how)
    assert [a.dtype for a in jax.tree.leaves(more)] == [
      a.dtype for a in jax.tree.leaves(cast)
    ]


def test_padding_takes_no_more_than_its_share():
  net = net_of("parallel")
  # Texts point one way and the unembedding the other, so that all logits are
  # far below 0, where zeros would win.
  way = 20 * parameters.normal(1, 24)
  low = net.replace(
    embed=net.embed.replace(net.embed[...] + way),
    heads=net.heads.replace(
      unembed=net.heads.unembed.replace(net.heads.unembed[...] - way[:, None])
    ),
  )
  for net in (low, net_of("unembedding")):
    padded = vocabulary.pad(net, 40)
    assert padded.cfg == dataclasses.replace(net.cfg, vocab=40)
    assert_equal(padded.embed[...][:31], net.embed[...])
    assert_equal(padded.heads.unembed[...][..., :31], net.heads.unembed[...])
    found = logits(padded)
    np.testing.assert_allclose(found[..., :31], logits(net), rtol=1e-5)
    share = jax.nn.softmax(found)[..., 31:].sum(-1)
    assert share.max() < 9 / 40
  tied = low.replace(embed=low.embed.replace(low.heads.unembed[...].T))
  padded = vocabulary.pad(tied, 40)
  assert_equal(padded.embed[...], padded.heads.unembed[...].T)


def test_settings_change_no_array():
  net = net_of("parallel")
  cfg = dataclasses.replace(
    net.cfg, dtype="bfloat16", remat="full", mask_documents=False
  )
  other = surgery.reconfigure(net, cfg)
  assert other.cfg == other.heads.cfg == other.trunk.cfg == cfg
  assert_equal(surgery.reconfigure(other, net.cfg), net)
  line = (
    "model.width 24 in the model, 48 in the config; model.norm_eps 1e-05 in"
  )
  with pytest.raises(ValueError, match=line):
    surgery.reconfigure(
      net, dataclasses.replace(net.cfg, width=48, norm_eps=1e-6)
    )


def test_what_is_refused():
  net, chain = net_of("parallel"), net_of("anticausal")
  assert_equal(surgery.drop_heads(chain, 3), chain)
  for fun, line in (
    (lambda: surgery.drop_heads(net, 0), "cannot keep 0 heads of 3"),
    (lambda: surgery.drop_heads(net, 4), "cannot keep 4 heads of 3"),
    (lambda: surgery.add_heads(net, 3), "has 3 heads already; 3 are not more"),
    (lambda: surgery.add_heads(net, 4, how="new"), "one of copy, fresh"),
    (lambda: surgery.add_heads(net, 4, how="fresh"), "needs a key"),
    (lambda: surgery.linear_heads(net, 4), "this one has 3 parallel heads"),
    (lambda: surgery.drop_layers(net, 3), "drop 3 layers of a trunk of"),
    (lambda: surgery.drop_layers(net, -1), "drop -1 layers of a trunk of"),
    (lambda: vocabulary.pad(net, 30), "30 would cut the model's 31 ids"),
    (lambda: surgery.drop_heads(chain, 1), "dropping heads .* anticausal"),
    (lambda: surgery.add_heads(chain, 4), "adding heads .* anticausal heads"),
    (lambda: surgery.trainable(chain), "freeze='trunk' is not .* anticausal"),
    (
      lambda: surgery.trainable(surgery.drop_heads(net, 1)),
      "model.n_future is 1: set --config.model.n_future=4",
    ),
  ):
    with pytest.raises(ValueError, match=line):
      fun()


@pytest.mark.parametrize("kind", ["parallel", "unembedding"])
def test_a_cut_vocabulary_has_the_same_probabilities_of_what_is_left(kind):
  net, ids = net_of(kind), np.array([0, 2, 3, 11, 29])
  cut = vocabulary.cut(net, ids)
  assert cut.cfg.vocab == len(ids) and cut.embed.shape == (5, net.cfg.width)
  places = np.array([[1, 4, 0, 2, 3]])  # as tokens of the cut model
  want = jax.nn.log_softmax(net(ids[places])[..., ids])
  np.testing.assert_allclose(jax.nn.log_softmax(cut(places)), want, atol=1e-5)


@pytest.mark.parametrize(
  "ids, line",
  [
    ([], "at least one"),
    ([3, 3], "ascending order"),
    ([4, 2], "ascending order"),
    ([-1, 2], "id -1 is none of the model's 31"),
    ([1, 31], "id 31 is none of the model's 31"),
  ],
)
def test_ids_that_cannot_be_kept_are_refused(ids, line):
  with pytest.raises(ValueError, match=line):
    vocabulary.cut(net_of("parallel"), ids)
