"""Weights of heads in stages, heads that leap, heads that are held back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import config, loss, sharding
from mtp_jax.data import batch as batch_lib
from mtp_jax.decode import generate, layout
from mtp_jax.evaluate import heads as head_measures
from mtp_jax.interchange import names
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import layers, surgery
from mtp_jax.train import head_weights
from mtp_jax.train import step as step_lib
from tests import parameters

INDEPENDENT = "parallel", "linear", "unembedding"


def at(step, **settings):
  cfg = config.Train(steps=100, **settings).check()
  return np.asarray(head_weights.at(cfg, 2, jnp.int32(step))).tolist()


def test_weights_without_stages_are_constant():
  assert at(7) == [1, 1]
  assert at(7, head_weights=(1, 0.5)) == [1, 0.5]


def test_stages_begin_where_they_say():
  forward = {"head_weights": (1, 0, 1, 0.5, 1, 1), "head_stages": (0.3, 0.6)}
  for step, far in ((0, 0), (29, 0), (30, 0.5), (59, 0.5), (60, 1), (400, 1)):
    assert at(step, **forward) == [1, far]


def test_linear_weights_against_interpolation():
  stages = {"head_weights": (1, 1, 1, 0.2, 0.5, 0), "head_stages": (0.25, 1)}
  for step in (0, 1, 24, 25, 40, 99, 100, 150):
    wanted = [
      np.interp(step, (0, 25, 100), row) for row in ((1, 1, 0.5), (1, 0.2, 0))
    ]
    found = at(step, head_change="linear", **stages)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def settings(**changes):
  cfg = config.Config(
    model=parameters.model_config("unembedding", n_future=2, layers=1),
    data=config.Data(seq_len=7, batch=2),
    optim=config.Optim(warmup=1),
    train=config.Train(steps=4),
    mesh=config.Mesh(1, 1),
  )
  return cfg.replace(**changes).check()


def test_one_program_trains_all_stages():
  """Each step is that of the constant weights of its stage."""
  weights = (1.0, 0.25), (0.5, 1.0)
  staged = {"head_weights": sum(weights, ()), "head_stages": (0.5,)}
  tokens = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)
  cfg = settings(train=staged)
  mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
  step = step_lib.compile_step(cfg, mesh)
  constant = [
    step_lib.compile_step(settings(train={"head_weights": w}), mesh)
    for w in weights
  ]
  state = step_lib.init_state(cfg, mesh)
  for number in range(4):
    same = jax.tree.map(jnp.copy, state)
    wanted, _ = constant[number // 2](same, batch_lib.of(tokens))
    other = jax.tree.map(jnp.copy, state)
    different, _ = constant[1 - number // 2](other, batch_lib.of(tokens))
    state, _ = step(state, batch_lib.of(tokens))
    for a, b in zip(
      jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
    u = "heads", "unembed"
    gap = functools.reduce(getattr, u, state.model)[...]
    gap = gap - functools.reduce(getattr, u, different.model)[...]
    assert number == 0 or jnp.abs(gap).max() > 1e-5  # warm-up begins at 0
  assert step._cache_size() == 1


@pytest.mark.parametrize("kind", INDEPENDENT)
@pytest.mark.parametrize("name", loss.IMPLEMENTATIONS)
def test_heads_that_are_held_back_teach_the_trunk_nothing(name, kind):
  """z gets the gradient of head 1 alone; the heads get all of theirs."""
  net = parameters.random_model(kind)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 31, (2, 9)), jnp.int32)
  batch = batch_lib.of(tokens)
  inputs = net.read(tokens, batch.segments)
  targets = loss.future_targets(batch, 3)
  call = functools.partial(loss.IMPLEMENTATIONS[name], block=3)

  @jax.jit
  def gradients(scale, sends):
    def total(heads, z):
      read = inputs._replace(z=z, sends=sends)
      return call(heads, read, targets, scale)

    return jax.value_and_grad(total, (0, 1), has_aux=True)(net.heads, inputs.z)

  scale = jnp.array([0.7, 0.2, 0.4])
  everything = jnp.array([True] * 3)
  (total, nll), (d_heads, d_z) = gradients(scale, jnp.arange(3) < 1)
  (same, same_nll), (d_heads_all, d_z_all) = gradients(scale, everything)
  _, (_, d_z_first) = gradients(scale.at[1:].set(0), everything)
  assert total == same and (nll == same_nll).all()
  for a, b in zip(*map(jax.tree.leaves, (d_heads, d_heads_all)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(d_z, d_z_first, rtol=1e-4, atol=1e-6)
  assert jnp.abs(d_z_all - d_z).max() > 1e-2


def test_microbatches_know_how_far_heads_leap():
  tokens = np.random.default_rng(0).integers(0, 31, (2, 10)).astype(np.int32)
  found = []
  for parts in (1, 2):
    cfg = settings(model={"offsets": (1, 3)}, train={"accumulate": parts})
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    state = step_lib.init_state(cfg, mesh)
    train = step_lib.compile_step(cfg, mesh)
    found.append(train(state, batch_lib.of(tokens))[1])
  for name in found[0]:
    # The same terms added in another order.
    np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)


def test_the_step_holds_heads_back():
  """Its trunk learns as if the far heads weighed nothing; its heads do not."""
  tokens = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)
  calm = {"optim": {"clip": 1e9}}
  cfgs = [
    settings(train=train, **calm)
    for train in ({"detach": 2}, {"head_weights": (1, 0)}, {})
  ]
  mesh = sharding.make_mesh(cfgs[0].mesh, jax.devices()[:1])
  found = []
  for cfg in cfgs:
    state, step = (
      step_lib.init_state(cfg, mesh),
      step_lib.compile_step(cfg, mesh),
    )
    for _ in range(2):
      state, _ = step(state, batch_lib.of(tokens))
    found.append(state.model)
  held_back, without, together = found

  def gap(a, b):
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)

  assert gap(held_back.trunk, without.trunk) < 1e-6
  assert gap(together.trunk, without.trunk) > 1e-5
  assert gap(held_back.heads, without.heads) > 1e-5


def test_heads_of_a_chain_are_not_held_back():
  cfg = config.Config().replace(model={"head": "causal"}, train={"detach": 2})
  mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
  with pytest.raises(ValueError, match="but causal heads read each other"):
    step_lib.abstract_state(cfg.check(), mesh)
  net = parameters.random_model("causal")
  batch = batch_lib.of(np.ones((1, 9), np.int32))
  with pytest.raises(ValueError, match="detach=2 with causal heads"):
    loss.token_loss(
      net, batch, loss.future_targets(batch, 3), jnp.ones(3),
      loss.Settings(detach=2),
    )  # fmt: skip


def test_targets_of_leaps_against_loops():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 31, (2, 14))
  segments = 1 + (rng.random((2, 14)) < 0.2).cumsum(1)
  found = loss.future_targets(batch_lib.of(tokens, segments), 3, (1, 3, 6))
  assert found.tokens.shape == (3, 2, 8)
  for i, distance in enumerate((1, 3, 6)):
    for b in range(2):
      for t in range(8):
        same = segments[b, t] == segments[b, t + distance]
        wanted = tokens[b, t + distance] if same else -1
        assert found.tokens[i, b, t] == wanted


@pytest.fixture(scope="module")
def leaping():
  """(a model of heads 1, 2 and 4, the same with a head 3 that is another's)."""
  full = parameters.random_model("unembedding", n_future=4)
  cfg = parameters.model_config("unembedding", n_future=3, offsets=(1, 2, 4))
  own = jax.tree.map(lambda a: a[jnp.array([0, 1, 3])], full.heads.own())
  net = parameters.model_of(cfg)
  net = net.replace(
    embed=full.embed,
    trunk=full.trunk,
    heads=net.heads.replace(unembed=own.unembed, norm=full.heads.norm),
  )
  return net, full


def test_leaps_are_measured_as_the_heads_they_are(leaping):
  net, full = leaping
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 31, (3, 24)).astype(np.int32)
  segments = 1 + (rng.random((3, 24)) < 0.1).cumsum(1).astype(np.int32)
  batch = batch_lib.of(tokens, segments)
  found = head_measures.measure(net, [batch], block=7)
  wanted = head_measures.measure(full, [batch], block=7)
  kept = [0, 1, 3]
  for name in ("nats", "accuracy"):
    np.testing.assert_allclose(found[name], wanted[name][kept], rtol=1e-6)
  # Heads 1 and 2 draft, and head 4 does not: behind a gap nothing can.
  two = surgery.drop_heads(full, 2)
  shorter = batch_lib.of(tokens[:, :-2], segments[:, :-2])
  drafted = head_measures.measure(two, [shorter], block=7)
  assert drafted["sampled"] > 1.05
  for name in ("greedy", "sampled"):
    np.testing.assert_allclose(found[name], drafted[name], rtol=1e-5)
  targets = loss.future_targets(batch, 3, net.cfg.offsets)
  all_targets = loss.future_targets(batch, 4)
  assert np.array_equal(targets.tokens, all_targets.tokens[jnp.array(kept)])
  inputs = net.read(tokens, segments)
  assert inputs.z.shape[1] == 20
  _, nll = loss.serial(net.heads, inputs, targets, jnp.ones(3), block=5)
  np.testing.assert_allclose(
    nll / targets.weight_sums(), found["nats"], rtol=1e-5
  )


def test_heads_behind_a_gap_do_not_decode(leaping):
  net, _ = leaping
  decoder = layout.lay_out(net)
  assert decoder.n_future == net.cfg.drafting == 2
  prompts = [np.array([1, 2, 3])]
  found = generate.generate(decoder, prompts, heads=2, max_new=6)
  alone = layout.lay_out(surgery.drop_heads(net, 1))
  wanted = generate.generate(alone, prompts, heads=1, max_new=6)
  assert np.array_equal(found.tokens[0], wanted.tokens[0])
  with pytest.raises(ValueError, match=r"heads=3 is outside 1\.\.2"):
    generate.generate(decoder, prompts, heads=3, max_new=6)
  with pytest.raises(ValueError, match="its heads leap"):
    names.check_kind(net.cfg)


def test_offsets_of_a_config():
  shape = functools.partial(parameters.model_config, "linear")
  assert shape(offsets=(1, 2, 3)).check() == shape().check()
  leaps = shape(offsets=(1, 3, 5))
  assert leaps.check() == leaps
  assert (leaps.distances, leaps.reach, leaps.drafting) == ((1, 3, 5), 5, 1)
  assert shape().distances == (1, 2, 3) and shape().drafting == 3
  assert leaps.with_heads(2).offsets == (1, 3)
  cfg = config.Config().replace(model={"offsets": (1, 2, 4, 8)})
  assert config.from_json(config.to_json(cfg)) == cfg.check()


@pytest.mark.parametrize(
  "changes, line",
  [
    ({"model": {"offsets": (1, 2)}}, "model.offsets has 2 entries for model.n"),
    ({"model": {"offsets": (2, 3, 4, 5)}}, "has to ascend from 1"),
    ({"model": {"offsets": (1, 3, 3, 5)}}, "has to ascend from 1"),
    (
      {"model": {"offsets": (1, 3, 5, 7)}, "decode": {"heads": 2}},
      "only the 1 before its first gap can draft",
    ),
    ({"train": {"head_change": "cubic"}}, "choose one of step, linear"),
    ({"train": {"head_change": "linear"}}, "names no stage to change at"),
    (
      {"train": {"head_weights": (1,) * 8, "head_stages": (0.5, 0.4)}},
      r"head_weights has 8|head_stages is \(0.5, 0.4\)",
    ),
    (
      {"train": {"head_weights": (1,) * 8, "head_stages": (1.5,)}},
      "ascend bet",
    ),
    (
      {"train": {"head_weights": (1,) * 6, "head_stages": (0.5,)}},
      "and 2 stag",
    ),
    ({"train": {"head_stages": (0.5,)}}, "0 entries for 2 stages"),
    (
      {"train": {"head_weights": (1,) * 4 + (0,) * 4, "head_stages": (0.5,)}},
      "in every stage",
    ),
    ({"train": {"detach": 1}}, "no head would teach the trunk anything"),
    ({"train": {"detach": 5}}, "train.detach=5 but model.n_future=4"),
    ({"train": {"detach": 2, "freeze": "trunk"}}, "leave one of them out"),
  ],
)
def test_settings_that_no_run_has(changes, line):
  with pytest.raises(ValueError, match=line):
    config.Config().replace(**changes).check()


def test_heads_that_read_tokens_do_not_leap(monkeypatch):
  kind = heads_lib.kinds.Kind(layers.Block, reads_tokens=True)
  monkeypatch.setitem(heads_lib.KINDS, "parallel", kind)
  with pytest.raises(ValueError, match="heads read the tokens before their"):
    parameters.random_model("parallel", n_future=2, offsets=(1, 3))
