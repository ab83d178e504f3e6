"""The loss on a mesh: what its devices exchange, and how often."""

import pytest

# Prints for each head kind and mesh the distance to one device's gradient,
# then the collectives of the compiled loss and gradient that touch a [D, V] or
# a block of logits: whether a loop repeats it, its name, its shapes.
FSDP = """
import re
import jax, jax.numpy as jnp, numpy as np
from mtp_jax import config, loss, sharding
from mtp_jax.data import batch
from mtp_jax.model import model

N, B, T, D, V = 3, 8, 20, 16, 712
cases = ("parallel", 8, 1), ("causal", 4, 2), ("unembedding", 8, 1)
for kind, data, width in cases:
  cfg = config.Model(vocab=V, width=D, mlp=24, layers=5, attn_heads=2,
                     kv_heads=2, n_future=N, head=kind)
  mesh = sharding.make_mesh(config.Mesh(data=data, model=width))
  net = jax.jit(model.Model, static_argnums=0)(cfg, jax.random.key(0))
  where, rows = sharding.shardings(net, mesh), sharding.batch_sharding(mesh)
  tokens = jax.random.randint(jax.random.key(1), (B, T + N), 0, V)

  def step(net, tokens, shards=1, rows=None):
    def total(net):
      if rows is not None and kind != "unembedding":
        unembed = sharding.gathered(net.heads.unembed, mesh)
        net = net.replace(heads=net.heads.replace(unembed=unembed))
      windows = batch.of(tokens)
      return loss.token_loss(
        net, windows, loss.future_targets(windows, N), jnp.ones(N),
        loss.Settings(block=4, shards=shards, rows=rows))
    return jax.value_and_grad(total, has_aux=True)(net)

  fast = {"xla_backend_optimization_level": 0}
  sharded = jax.jit(
    lambda net, tokens: step(net, tokens, data, rows),
    in_shardings=(where, rows), out_shardings=((None, None), where),
    compiler_options=fast,
  ).lower(net, tokens).compile()
  on_one = jax.jit(step, compiler_options=fast)(net, tokens)
  on_mesh = sharded(jax.device_put(net, where), jax.device_put(tokens, rows))
  a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(result)])
          for result in (on_mesh, on_one))
  print("distance", kind, np.linalg.norm(a - b) / np.linalg.norm(b))

  loop = None
  for line in sharded.as_text().splitlines():
    if line.endswith("{") and not line.startswith(" "):
      loop = "once" if line.startswith("ENTRY") else "loop"
    found = re.search(
      r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)[(-]", line)
    if found and str(V // width) in found[1]:
      print("collective", kind, loop, found[2], found[1].replace(" ", ""))
"""


@pytest.mark.slow
def test_fsdp_gathers_the_unembedding_once(run_with_devices):
  lines = [line.split() for line in run_with_devices(8, FSDP).splitlines()]
  distances = [float(x[2]) for x in lines if x[0] == "distance"]
  # sums over devices come in another order
  assert len(distances) == 3 and max(distances) < 1e-6
  for kind in ("parallel", "causal"):
    found = [x[2:] for x in lines if x[:2] == ["collective", kind]]
    # Collected once, for all heads and blocks; d(unembed) summed over the
    # devices once; logits never.
    assert [x[0] for x in found] == ["once", "once"], found
    assert sorted(x[1] for x in found)[0] == "all-gather", found
  # Own unembeddings: each head's collected and summed in its turn.
  found = [x[2:] for x in lines if x[:2] == ["collective", "unembedding"]]
  assert sorted(x[1] for x in found) == ["all-gather", "all-reduce"], found
