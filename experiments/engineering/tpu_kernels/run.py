"""Which kernels a TPU step should use: memory, products, correctness.

  pip install tokamax==0.0.12
  python -m experiments.engineering.tpu_kernels.run

Compiles one layer's attention and one head's cross-entropy, value and
gradient, at the 7B shape for single chips: XLA's, ours and, where it is
installed, tokamax's. No time is measured: there is no TPU here. Tokamax's
kernels are called by their private functions, for the public ones ask the
default device, and interpreted on the CPU to compare their loss with float64.
Some minutes: every program is small.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.measure import aot, study
from experiments.startup import options, program
from mtp_jax import config, sharding
from mtp_jax.loss import cross_entropy
from mtp_jax.model import attention

FOLDER = pathlib.Path(__file__).with_name("results")
D, H, T, V = 4096, 32, 4096, 32_000
MIB = 2**20

_CHIPS = flags.DEFINE_list("chips", ["v5e", "v5p", "v6e"], "Kinds of chip.")
_OUTPUT = options.define_output("Folder of the results.", str(FOLDER))


def attention_programs() -> dict:
  """(q, k, v, segments) -> [B, T, H, C], by name."""
  return {"xla": attention.xla, "splash": attention.splash}


def cross_entropy_programs() -> dict:
  """(hidden, unembed, targets, sum) -> (nll, d_hidden, sum + d_unembed)."""

  def formula(hidden, unembed, targets, total):
    def loss(hidden, unembed):
      logits = cross_entropy.project(hidden, unembed.astype(hidden.dtype))
      return cross_entropy.token_nll(logits, targets).sum()

    nll, (dh, du) = jax.value_and_grad(loss, (0, 1))(hidden, unembed)
    return nll, dh, total + du

  def ours(hidden, unembed, targets, total, *, block):
    nll, dh, total = cross_entropy.value_and_grads(
      hidden,
      unembed,
      cross_entropy.Targets(targets, jnp.ones(targets.shape)),
      jnp.ones(()),
      total[None],
      block,
    )
    return nll, dh, total[0]

  def theirs(hidden, unembed, targets, total, *, block):
    nll, dh, du = tokamax_cross_entropy(
      hidden.reshape(-1, hidden.shape[-1]),
      unembed.astype(hidden.dtype),
      targets.ravel(),
      block,
    )
    return nll, dh.astype(hidden.dtype).reshape(hidden.shape), total + du

  programs = {"formula": formula}
  for block in (256, 512, 1024, 2048):
    programs[f"ours, {block} positions"] = functools.partial(ours, block=block)
  if has_tokamax():
    for block in (512, 640, 1280, 2048):
      programs[f"tokamax, {block} words"] = functools.partial(
        theirs, block=block
      )
  return programs


def has_tokamax() -> bool:
  """Whether tokamax, which is no dependency, is installed."""
  return importlib.util.find_spec("tokamax") is not None


def tokamax_cross_entropy(hidden, unembed, targets, block):
  """Loss and gradients of hidden [tokens, D] by tokamax's TPU kernels."""
  from tokamax._src.ops.linear_softmax_cross_entropy_loss import (
    pallas_mosaic_tpu_kernel as kernel,
  )

  shape = dict(
    b_block_size=1024,
    h_block_size=min(512, hidden.shape[1]),
    v_block_size=block,
    reduction="sum",
  )
  nll, lse = kernel.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu(
    hidden, targets, unembed, **shape
  )
  grads = kernel.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu(
    jnp.float32(1), lse, hidden, targets, unembed, **shape
  )
  return nll, *grads


def compiled(chip: str, what: str, name: str, fun, args, **options) -> dict:
  """A line: what a program takes of a chip, or why it does not compile."""
  devices = aot.topology(f"{chip}:1x1" + ("x1" if chip == "v5p" else ""))
  mesh = sharding.make_mesh(config.Mesh(), devices)
  home = jax.NamedSharding(mesh, jax.P())
  args = [jax.ShapeDtypeStruct(s, t, sharding=home) for s, t in args]
  row = {"chip": chip, "what": what, "name": name}
  try:
    with jax.set_mesh(mesh):  # tokamax's kernels ask it for the kind of chip
      lowered = jax.jit(fun, **options).lower(*args)
    found = aot.compile_program(lowered)
  except Exception as error:  # of several types; the line tells
    return row | {"temp_mib": "", "error": " ".join(str(error).split())[:120]}
  temp = found.temporaries if found.fits else float("nan")
  return row | {"temp_mib": round(temp / MIB, 1), "error": ""}


def memory(chip: str) -> list[dict]:
  """All programs on one kind of chip."""
  rows = []
  qkv = [((1, T, H, D // H), jnp.bfloat16)] * 3
  for name, kernel in attention_programs().items():

    def both_ways(q, k, v, segments, g, kernel=kernel):
      out, pull = jax.vjp(lambda *qkv: kernel(*qkv, segments), q, k, v)
      return out, pull(g)

    args = [*qkv, ((1, T), jnp.int32), qkv[0]]
    rows.append(compiled(chip, "attention", name, both_ways, args))
  for name, fun in cross_entropy_programs().items():
    args = [
      ((1, T, D), jnp.bfloat16),
      ((D, V), jnp.float32),
      ((1, T), jnp.int32),
      ((D, V), jnp.float32),
    ]
    rows.append(
      compiled(chip, "cross-entropy", name, fun, args, donate_argnums=3)
    )
  return rows


def tokamax_loss() -> list[dict]:
  """Its loss per token against float64, where blocks divide V or do not."""
  from jax.experimental.pallas import tpu as pltpu

  tokens, width = 1024, 128
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(tokens, width))
  unembed = rng.normal(size=(width, V)) / width**0.5
  targets = rng.integers(0, V, tokens)
  logits = hidden @ unembed
  top = logits.max(-1)
  lse = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
  want = (lse - logits[np.arange(tokens), targets]).mean()
  rows = []
  for block in (512, 640, 2048):
    with pltpu.force_tpu_interpret_mode():
      nll, *_ = tokamax_cross_entropy(
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(unembed, jnp.float32),
        jnp.asarray(targets, jnp.int32),
        block,
      )
    got = float(nll) / tokens
    rows.append({"block": block, "loss": got, "float64": want})
  return rows


def main(_: list[str]) -> None:
  """Compiles all kernels for TPUs and writes the memory that each takes."""
  options.make_room(_OUTPUT.value / "memory.csv")
  jax.config.update("jax_platforms", "cpu")
  stamp = study.stamp("jax", "libtpu", "tokamax")
  output = _OUTPUT.value
  tables = {"memory": [row for chip in _CHIPS.value for row in memory(chip)]}
  if has_tokamax():
    tables["tokamax_loss"] = tokamax_loss()
  for name, rows in tables.items():
    path = output / f"{name}.csv"
    study.write_csv(path, [row | stamp for row in rows])
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
  program.start(main)
