"""Stage 2: a decoding pass, against bandwidth and FLOP/s of the device."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.engineering.accelerator import record, scales
from experiments.measure import compare, flops, limits, timing
from mtp_jax.decode import accept, interface, layout, loop
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import model


def run(stage: record.Stage, scale: scales.Scale) -> None:
  """The device's rates, then all topologies at one batch size after another."""
  work = scale.decoding
  stage.attempt(
    "device",
    lambda: {
      "bytes_per_second": limits.bandwidth(work.megabytes),
      "flops_per_second": limits.flop_rate(work.product),
    },
    kind="device",
    estimate=5,
  )
  made = []

  def make():
    like = jax.eval_shape(
      lambda key: layout.lay_out(model.Model(work.model, key)),
      jax.random.key(0),
    )
    # Not by the model's own constructor: all its draws in one program take a
    # GPU's compiler minutes.
    made.append(jax.block_until_ready(random_like(like, scale=0.02)))
    size = sum(a.size for a in jax.tree.leaves(made))
    return {"parameters": size, "config": dataclasses.asdict(work.model)}

  stage.attempt("model", make, kind="model", estimate=10)
  device = stage.recorded("decoding", "device")
  for decoder in made:
    for trees in work.groups:
      names, programs = ", ".join(map(compare.name, trees)), {}
      stage.attempt(
        f"programs: {names}",
        functools.partial(build, decoder, work, trees, programs),
        kind="programs",
        estimate=40,
      )
      for batch in work.batches if programs else ():
        stage.attempt(
          f"batch {batch}: {names}",
          functools.partial(
            passes, decoder, work, trees, batch, programs, device
          ),
          kind="passes",
          estimate=5,
        )


@dataclasses.dataclass
class Program:
  """Compiled decoding with one topology and one number of rows."""

  run: Callable
  rule: accept.Forced
  state: loop.State  # shapes
  row: dict  # of the results


def build(
  decoder: decoder_lib.Transformer,
  work: scales.Decoding,
  trees: Sequence[tree_lib.Tree],
  programs: dict[tuple[tree_lib.Tree, int], Program],
) -> dict:
  """Compiles a group for all batch sizes, side by side, into `programs`.

  Every first choice is accepted (`accept.Forced`), so that a pass over a chain
  of k writes k tokens, whatever the random weights say.
  """
  every = [t for group in work.groups for t in group]
  most = work.passes * max(t.heads for t in every)
  cache_len = work.length + most + max(t.size for t in every)
  cache_len = -(-cache_len // 128) * 128

  def one(tree, batch):
    rule = accept.Forced(len(tree.greedy_path) - 1)
    settings = interface.check_settings(
      decoder, heads=tree, max_new=1, rule=rule
    )
    state = loop.abstract_state(
      decoder, settings, batch=batch, cache_len=cache_len
    )
    run = loop.run_jit.lower(decoder, rule, state).compile()
    temporary = run.memory_analysis().temp_size_in_bytes
    row = {
      "size": tree.size,
      "heads": tree.heads,
      "tokens_per_pass": len(tree.greedy_path),
      "temporary_mib": temporary / 2**20,
      # A pass reads the whole cache, what is not written yet included.
      "bytes": limits.bytes_per_pass(decoder, tree, batch, cache_len),
      "flops": flops.count(
        lambda d, s: loop.advance(d, rule, s), decoder, state
      ),
    }
    return Program(run, rule, state, row)

  found = record.together(
    {
      key: functools.partial(one, *key)
      for key in itertools.product(trees, work.batches)
    }
  )
  failed = {}
  for (tree, batch), each in found.items():
    if isinstance(each, Exception):
      failed[f"batch {batch}, {compare.name(tree)}"] = record.reason(each)
    else:
      programs[tree, batch] = each
  if not programs:
    raise ValueError(f"no program compiles: {failed}")
  return {"compiled": len(programs), "failed_to_compile": failed}


def passes(
  decoder: decoder_lib.Transformer,
  work: scales.Decoding,
  trees: Sequence[tree_lib.Tree],
  batch: int,
  programs: dict[tuple[tree_lib.Tree, int], Program],
  device: dict,
) -> Iterator[dict]:
  """Rows of one batch size, by the topology's name; once after each turn.

  Args:
    decoder: the model.
    work: how often passes are timed, in alternating turns.
    trees: topologies, ordinary decoding among them.
    batch: rows B.
    programs: from `build`; what does not compile is not among them.
    device: bytes and FLOPs per second; may be empty.
  """
  here = {t: programs[t, batch] for t in trees if (t, batch) in programs}
  rows = {compare.name(t): p.row for t, p in here.items()}
  seconds = {t: [] for t in here}
  for turn in range(work.repeats + 1):
    for tree, program in here.items():
      if "failed" in program.row:
        continue
      try:
        taken = timed(program, decoder, work)
      except jax.errors.JaxRuntimeError as error:
        program.row["failed"] = record.reason(error)
        continue
      if turn:  # the first one is a warm-up
        seconds[tree].append(taken)
        program.row |= rates(program.row, seconds[tree], batch, device)
    base = rows.get("ordinary", {}).get("seconds")
    for row in rows.values():
      if base and "seconds" in row:
        row["over_ordinary"] = row["seconds"] / base
    yield rows


def rates(row: dict, seconds: list[float], batch: int, device: dict) -> dict:
  """Seconds of a pass, and the shares of what the device could do."""
  median = statistics.median(seconds)
  found = timing.spread(seconds) | {
    "tokens_per_second": batch * row["tokens_per_pass"] / median,
  }
  if device:
    reading = row["bytes"] / device["bytes_per_second"]
    computing = row["flops"] / device["flops_per_second"]
    found |= {
      "of_bandwidth": reading / median,
      "of_flops": computing / median,
      "limited_by": "bandwidth" if reading > computing else "FLOP/s",
    }
  return found


def timed(
  program: Program, decoder: decoder_lib.Transformer, work: scales.Decoding
) -> float:
  """Seconds of a pass of one turn that starts at `work.length` tokens.

  The cache holds random numbers: some processors are faster on zeros.
  """
  like = program.state
  new = work.passes * len(like.tree.greedy_path)
  # The cache apart: it would be made on the host.
  state = jax.tree.map(
    lambda a: np.zeros(a.shape, a.dtype), dataclasses.replace(like, cache=())
  )
  state = dataclasses.replace(
    state,
    length=np.full_like(state.length, work.length),
    end=np.full_like(state.end, work.length + new),
    stop=np.full_like(state.stop, -1),
    cache=random_like(like.cache),
  )
  state = jax.block_until_ready(jax.device_put(state))
  taken, state = timing.timed(
    functools.partial(program.run, decoder, program.rule, state)
  )
  passes = np.asarray(state.statistics.passes)
  if set(passes) != {work.passes}:
    raise ValueError(f"{passes} passes instead of {work.passes}")
  return taken / work.passes


def random_like(like, scale: float = 1.0):
  """Random numbers, drawn once per shape and copied, since runs donate them."""
  drawn = {}

  def one(a):
    kind = a.shape, a.dtype
    if kind not in drawn:
      drawn[kind] = scale * jax.random.normal(jax.random.key(0), *kind)
    return jnp.copy(drawn[kind])

  return jax.tree.map(one, like)
