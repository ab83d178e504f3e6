"""Memory, FLOPs and time of every way to run the heads, for n in 1, 2, 4, 8.

  python -m experiments.engineering.heads_memory.run                # 13 minutes
  python -m experiments.engineering.heads_memory.run --scale=paper  # not run

Times are of two cores; `paper`, the 7B shape, is only compiled. Writes
<scale>.csv, <scale>_step.csv, <scale>.json and <scale>.png to results/, prints
the table of the README and a verdict for each bound.
"""

import dataclasses
import functools
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from experiments.engineering.heads_memory import report, rivals, scales
from experiments.measure import flops, study, timing
from experiments.startup import options, program
from mtp_jax import config, loss
from mtp_jax.data import batch as batch_lib
from mtp_jax.model import model
from mtp_jax.train import optim

FOLDER = pathlib.Path(__file__).with_name("results")
HEADS = (1, 2, 4, 8)
MIB = 2**20

_SCALE = options.define_scale(scales.SCALES, "cpu", "Shape to measure.")
_SEED = options.define_seed("Parameters, tokens, chosen heads.")
_OUTPUT = options.define_output("Folder of the results.", str(FOLDER))


def implementations(scale: scales.Scale) -> dict:
  """Name -> function of (heads, inputs, targets, scale, key) to the total."""

  def ours(name):
    def total(heads, inputs, targets, weights, key):
      del key  # nothing is drawn
      call = loss.IMPLEMENTATIONS[name]
      return call(heads, inputs, targets, weights, block=scale.block)[0]

    return total

  return {
    "serial": ours("serial"),
    "checkpointed": ours("checkpointed"),
    "formula": ours("formula"),
    "optax, checkpoint": rivals.optax_checkpointed,
    "one random head": rivals.one_random_head,
  }


def settings(scale: scales.Scale, n: int, extra_layers=0) -> config.Model:
  """The model of a scale with n heads; `extra_layers` as in `config.Model`."""
  return config.Model(
    vocab=scale.vocab,
    width=scale.width,
    mlp=scale.mlp,
    layers=scale.layers,
    extra_layers=extra_layers,
    attn_heads=scale.attn_heads,
    kv_heads=scale.attn_heads,
    n_future=n,
    dtype=scale.dtype,
    remat=scale.remat,
  )


def gradient(call, net, tokens, key):
  """Loss and gradient of the whole model, nats per token."""
  N = net.cfg.n_future
  T = tokens.shape[1] - N
  batch = batch_lib.of(tokens)
  targets = loss.future_targets(batch, N)
  weights = jnp.full((N,), 1 / (tokens.shape[0] * T))

  def total(net):
    inputs = net.read(batch.tokens, batch.segments)
    return call(net.heads, inputs, targets, weights, key)

  return jax.value_and_grad(total)(net)


def training_step(call, tx, net, opt, tokens, key):
  """One optimiser update; returns (net, optimiser state, loss in nats)."""
  value, grads = gradient(call, net, tokens, key)
  updates, opt = tx.update(grads, opt, net)
  return optax.apply_updates(net, updates), opt, value


def abstract(scale, n, extra_layers=0):
  """Shapes of (net, tokens, key)."""
  cfg = settings(scale, n, extra_layers)
  key = jax.eval_shape(lambda: jax.random.key(0))
  net = jax.eval_shape(functools.partial(model.Model, cfg), key)
  tokens = jax.ShapeDtypeStruct((scale.batch, scale.seq_len + n), "int32")
  return net, tokens, key


def concrete(scale, n, seed):
  """(net, tokens, key): tokens are random, for time does not depend on them."""
  keys = jax.random.split(jax.random.key(seed), 3)
  make = jax.jit(functools.partial(model.Model, settings(scale, n)))
  shape = scale.batch, scale.seq_len + n
  tokens = jax.random.randint(keys[1], shape, 0, scale.vocab)
  return make(keys[0]), tokens, keys[2]


def compiled(fun, args, **options):
  """The program, its temporary MiB, its GFLOP."""
  program = jax.jit(fun, **options).lower(*args).compile()
  temp = program.memory_analysis().temp_size_in_bytes / MIB
  return program, temp, flops.count(fun, *args) / 1e9


def seconds(program, *args):
  """Wall and processor seconds of a call, and its result."""
  wall, cpu = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(program(*args))
  return time.perf_counter() - wall, time.process_time() - cpu, result


def measure_losses(scale: scales.Scale, seed: int) -> list[dict]:
  """A row per implementation and n; time in turns, so that a busy machine
  is busy for all of them."""
  rows, programs = [], []
  for n in HEADS:
    for name, call in implementations(scale).items():
      fun = functools.partial(gradient, call)
      program, temp, gflop = compiled(fun, abstract(scale, n))
      rows.append(
        {"implementation": name, "n": n, "temp_mib": temp, "gflop": gflop}
      )
      programs.append(program if scale.rounds else None)
      print(f"{name}, n={n}: {temp:.0f} MiB, {gflop:.1f} GFLOP", flush=True)
  if not scale.rounds:
    return rows
  inputs = {n: concrete(scale, n, seed) for n in HEADS}

  def taken(i):
    return lambda: seconds(programs[i], *inputs[rows[i]["n"]])[:2]

  calls = {i: taken(i) for i in range(len(rows))}
  for i, times in timing.alternate(calls, scale.rounds).items():
    row, (walls, cpus) = rows[i], zip(*times, strict=True)
    row |= timing.spread(walls)
    row["processor_seconds"] = statistics.median(cpus)
  return rows


def measure_growth(scale: scales.Scale) -> dict[int, float]:
  """Serial's temp MiB with n heads on top of one trunk, that of n=1."""
  fun = functools.partial(gradient, implementations(scale)["serial"])
  return {
    n: compiled(fun, abstract(scale, n, extra_layers=n - 1))[1] for n in HEADS
  }


def measure_steps(scale: scales.Scale, seed: int) -> list[dict]:
  """Times of serial's whole training step, AdamW included, n=1 and 4 in turn;
  the same total layers."""
  call = implementations(scale)["serial"]
  tx = optim.make(config.Optim(), 1000)
  programs, states, gflop = {}, {}, {}
  for n in (1, 4):
    net, tokens, key = concrete(scale, n, seed)
    states[n] = net, jax.jit(tx.init)(net), tokens, key
    fun = functools.partial(training_step, call, tx)
    programs[n], _, gflop[n] = compiled(fun, states[n], donate_argnums=(0, 1))
  rows = []
  for turn in range(scale.pairs + 1):
    for n in (1, 4):
      wall, cpu, result = seconds(programs[n], *states[n])
      states[n] = *result[:2], *states[n][2:]
      rows.append(
        {
          "turn": turn,
          "n": n,
          "seconds": wall,
          "processor_seconds": cpu,
          "gflop": gflop[n],
        }
      )
  return rows[2:]  # the first turn warms up


def verdicts(scale, rows, grown, steps) -> dict[str, study.Bound]:
  """Each figure beside its bound."""
  at = {(row["implementation"], row["n"]): row for row in rows}
  temp = {key: row["temp_mib"] for key, row in at.items()}
  work = {key: row["gflop"] for key, row in at.items()}
  logits = scale.batch * scale.seq_len * scale.vocab * 4 / MIB
  at_most = study.Bound.at_most
  found = {
    "serial temp, n=8 over n=1, same total layers": at_most(
      temp["serial", 8] / temp["serial", 1], 1.05
    ),
    "serial temp, n=8 over n=1, same trunk": at_most(grown[8] / grown[1], 1.05),
    "serial temp growth to n=8, same trunk, in one head's logits": at_most(
      (grown[8] - grown[1]) / logits, 1.0
    ),
    "serial over formula temp, n=4": at_most(
      temp["serial", 4] / temp["formula", 4], 0.20
    ),
    "serial over formula FLOPs, worst n": at_most(
      max(work["serial", n] / work["formula", n] for n in HEADS), 1.02
    ),
  }
  if steps:
    for column in ("seconds", "processor_seconds"):
      taken = {
        n: [row[column] for row in steps if row["n"] == n] for n in (1, 4)
      }
      gflop = {row["n"]: row["gflop"] for row in steps}
      ratio = timing.median_ratio(taken[4], taken[1])
      name = f"step {column}, n=4 over n=1"
      found[f"{name}, as it is"] = study.Bound(ratio)
      found[f"{name}, added FLOPs taken out"] = at_most(
        ratio * gflop[1] / gflop[4], 1.05
      )
  return found


def main(_: list[str]) -> None:
  """Measures a scale, writes CSV and JSON, and prints the verdicts."""
  options.make_room((_OUTPUT.value / _SCALE.value).with_suffix(".csv"))
  scale, start = scales.SCALES[_SCALE.value], time.time()
  rows = measure_losses(scale, _SEED.value)
  grown = measure_growth(scale)
  steps = measure_steps(scale, _SEED.value) if scale.pairs else []
  found = verdicts(scale, rows, grown, steps)
  output = _OUTPUT.value / _SCALE.value
  study.write_csv(output.with_suffix(".csv"), rows)
  if steps:
    study.write_csv(output.with_name(f"{output.name}_step.csv"), steps)
  report.draw(rows, output.with_suffix(".png"))
  record = study.provenance(_SEED.value) | {
    "shape": dataclasses.asdict(scale),
    "load_average": round(os.getloadavg()[1], 1),  # of the last 5 minutes
    "minutes": round((time.time() - start) / 60, 1),
    "serial_temp_mib_same_trunk": grown,
    "bounds": found,
  }
  study.write_json(output.with_suffix(".json"), record)
  print(report.table(rows))
  for name, bound in found.items():
    print(f"{name}: {bound}")


if __name__ == "__main__":
  program.start(main)
