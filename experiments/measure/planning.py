"""Plans: memory and FLOPs of one program on one slice, and what to change."""

import collections
import dataclasses
import functools

import jax

from experiments.measure import aot, flops, schedule
from mtp_jax import config, sharding
from mtp_jax.data import batch as batch_lib
from mtp_jax.decode import interface, layout, loop
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import cost, model
from mtp_jax.train import step as step_lib


@dataclasses.dataclass(frozen=True)
class Plan:
  """One program on one slice; bytes per chip, FLOPs on all chips together."""

  what: str  # 'training step' or 'decoding pass'
  topology: str
  chips: int
  mesh: dict[str, int]
  rows: float  # of a chip, in a microbatch or in the decoder's batch
  tokens: int  # of one step, on all chips
  state: dict[str, int]  # bytes by what they hold
  compiled: aot.Compiled
  hbm: int
  flops: int
  peak_flops: float
  collectives: list[schedule.Collective]

  @property
  def needed(self) -> int:
    """Bytes per chip: peak memory of the run and the program itself."""
    return self.compiled.peak + self.compiled.program

  @property
  def fits(self) -> bool:
    """Whether the compiler accepted it and `needed` is within `hbm`."""
    return self.compiled.fits and self.needed <= self.hbm


def training(
  cfg: config.Config, topology: str, options: dict | None = None
) -> Plan:
  """Plans the training step of `cfg`.

  Args:
    cfg: checked settings; `cfg.mesh` is laid over the slice.
    topology: see `aot.topology`.
    options: of the TPU compiler.

  Raises:
    ValueError: no such slice, or settings that do not fit it.
  """
  devices = aot.topology(topology)
  mesh = sharding.make_mesh(cfg.mesh, devices)
  rows = cfg.data.batch / cfg.train.accumulate / mesh.shape["data"]
  if rows != int(rows):
    raise ValueError(
      f"data.batch {cfg.data.batch} in {cfg.train.accumulate} microbatches "
      f"does not divide by {mesh.shape['data']} chips of axis 'data'"
    )
  state = step_lib.abstract_state(cfg, mesh)
  batch = batch_lib.abstract(
    cfg.data.batch,
    cfg.data.seq_len + cfg.model.reach,
    sharding.batch_sharding(mesh),
  )
  compiled = aot.compile_program(
    step_lib.compile_step(cfg, mesh).lower(state, batch), options
  )
  # Counted on XLA's attention: a Pallas kernel does not show its products.
  plain = dataclasses.replace(
    cfg, model=dataclasses.replace(cfg.model, attention="xla")
  )
  step = functools.partial(step_lib.train_step, cfg=plain, mesh=mesh)
  held = {
    "parameters": state.model,
    "optimiser state": state.opt,
    "batch": batch,
  }
  tokens = cfg.data.batch * cfg.data.seq_len
  count = flops.count(step, state, batch)
  return Plan(
    what="training step",
    rows=rows,
    tokens=tokens,
    flops=count,
    **_on_chips(topology, mesh, held, compiled),
  )


def decoding(
  cfg: config.Config,
  topology: str,
  *,
  batch: int,
  cache_len: int,
  tree: tree_lib.Tree | None = None,
  options: dict | None = None,
) -> Plan:
  """Plans one decoding pass over a full cache.

  Parameters are in `model.dtype`, split over 'model' alone; rows over 'data'.

  Args:
    cfg: checked settings.
    topology: see `aot.topology`.
    batch: rows on all chips.
    cache_len: positions of the cache.
    tree: of drafts; None: the chain of `decode.heads` heads.
    options: of the TPU compiler.

  Raises:
    ValueError: no such slice, or settings that do not fit it.
  """
  devices = aot.topology(topology)
  mesh = sharding.make_mesh(cfg.mesh, devices)
  if batch % mesh.shape["data"]:
    raise ValueError(
      f"decode_batch {batch} does not divide by {mesh.shape['data']} chips of "
      "axis 'data'"
    )
  if tree is None:
    tree = tree_lib.chain(cfg.decode.heads or cfg.model.drafting)
  decoder = jax.eval_shape(
    lambda key: layout.lay_out(model.Model(cfg.model, key), on="tpu"),
    jax.random.key(0),
  )
  rules = {k: v for k, v in sharding.RULES.items() if v != "data"}
  where = sharding.shardings(decoder, mesh, rules)
  row = sharding.batch_sharding(mesh)
  kv = jax.NamedSharding(mesh, jax.P("data", "model"))
  settings = interface.check_settings(decoder, heads=tree, max_new=1)
  rule = settings.rule
  state = loop.abstract_state(
    decoder, settings, batch=batch, cache_len=cache_len
  )
  places = dataclasses.replace(
    jax.tree.map(lambda _: row, state),
    cache=jax.tree.map(lambda _: kv, state.cache),
  )
  decoder, state = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    (decoder, state),
    (where, places),
  )
  lowered = jax.jit(loop.advance, donate_argnums=2, out_shardings=places).lower(
    decoder, rule, state
  )
  held = {"parameters": decoder, "cache": state.cache}
  compiled = aot.compile_program(lowered, options)
  return Plan(
    what=f"decoding pass of {tree.heads} heads and {tree.size} tokens",
    rows=batch / mesh.shape["data"],
    tokens=batch * tree.size,
    flops=flops.count(loop.advance, decoder, rule, state),
    **_on_chips(topology, mesh, held, compiled),
  )


def _on_chips(topology, mesh, held, compiled) -> dict:
  """The fields of a `Plan` that the slice and the compiled program give."""
  devices = list(mesh.devices.flat)
  return dict(
    topology=topology,
    chips=len(devices),
    mesh=dict(mesh.shape),
    state={name: aot.bytes_per_chip(tree) for name, tree in held.items()},
    compiled=compiled,
    hbm=int(aot.HBM[devices[0].device_kind] * aot.GIB),
    peak_flops=cost.peak_flops(devices),
    collectives=schedule.collectives(compiled.text) if compiled.fits else [],
  )


def advice(plan: Plan, cfg: config.Config) -> list[str]:
  """What to change where a program does not fit, best first.

  Args:
    plan: of `cfg`.
    cfg: what was planned.
  """
  lines, held = [], sum(plan.state.values())
  if "cache" in plan.state:
    return [
      "--decode_batch and --cache_len lower make the cache smaller",
      "--config.mesh.model higher splits parameters and cache over more chips",
    ]
  # Temporaries are gradients, which stay, and activations, which shrink; the
  # sum over microbatches stands beside the gradients of one.
  copies = 1 + (cfg.train.accumulate > 1)
  fixed = held + copies * plan.state["parameters"]
  if fixed > plan.hbm:
    return [
      f"parameters, optimiser state and gradients alone take "
      f"{fixed / aot.GIB:.1f} GiB: a larger slice, or a smaller model"
    ]
  if cfg.model.remat != "full":
    lines.append("--config.model.remat=full keeps one input per layer only")
  if cfg.train.loss == "formula":
    lines.append("--config.train.loss=serial keeps one block's logits only")
  spare, used = plan.hbm - fixed, plan.needed - fixed
  rows = int(plan.rows * spare / max(used, 1))
  if plan.rows > 1:
    goal = max(rows, 1)
    while plan.rows % goal:
      goal -= 1
    factor = int(plan.rows) // goal * cfg.train.accumulate
    lines.append(
      f"--config.train.accumulate={factor} leaves {goal} rows per chip in a "
      "microbatch"
    )
  elif cfg.model.kv_heads % (2 * plan.mesh["model"]) == 0:
    lines.append(
      f"--config.mesh.data={plan.mesh['data'] // 2} "
      f"--config.mesh.model={2 * plan.mesh['model']} "
      f"--config.train.accumulate={2 * cfg.train.accumulate} shares each row "
      "between two chips"
    )
  lines.append("a larger slice: parameters and gradients are split over it")
  return lines


def describe(plan: Plan) -> list[str]:
  """The plan in lines."""
  c, mesh = plan.compiled, plan.mesh
  lines = [
    f"{plan.what} on {plan.topology}: {plan.chips} chips, mesh data="
    f"{mesh['data']} model={mesh['model']}, {plan.rows:g} rows per chip",
    "memory per chip, GiB",
  ]
  sizes = dict(plan.state)
  if c.fits:
    sizes |= {"temporaries": c.temporaries, "program": c.program}
  lines += [
    f"  {name:<18}{size / aot.GIB:9.3f}" for name, size in sizes.items()
  ]
  verdict = "fits" if plan.fits else "DOES NOT FIT"
  lines.append(
    f"  {'peak and program':<18}{plan.needed / aot.GIB:9.3f} of "
    f"{plan.hbm / aot.GIB:.2f}: {verdict}"
  )
  seconds = plan.flops / plan.peak_flops
  lines.append(
    f"FLOPs of matrix products: {plan.flops:.4g}, "
    f"{plan.flops / plan.chips:.4g} per chip, "
    f"{plan.flops / plan.tokens:.4g} per token; at least "
    f"{seconds:.4g} s at the chips' peak"
  )
  if plan.collectives:
    lines.append("collectives per chip: times, MiB received, share hidden")
  lines += [
    f"  {part:<16}{kind:<20}{times:>6}{received / 2**20:10.1f}{share:7.0%}"
    for part, kind, times, received, share in totals(plan.collectives)
  ]
  lines.append(f"compiled in {c.seconds:.0f} s")
  return lines


def totals(collectives: list[schedule.Collective]) -> list[tuple]:
  """(part, kind, times, bytes received, share of them hidden), sorted."""
  sums = collections.defaultdict(lambda: [0, 0, 0])
  for c in collectives:
    received = c.times * c.received
    total = sums[c.part, c.kind]
    total[0] += c.times
    total[1] += received
    total[2] += received * c.hidden
  return [
    (*key, times, received, hidden / max(received, 1))
    for key, (times, received, hidden) in sorted(sums.items())
  ]


def to_dict(plan: Plan) -> dict:
  """The plan as JSON takes it, without the program's text."""
  values = dataclasses.asdict(plan)
  del values["compiled"]["text"]
  values["collectives"] = totals(plan.collectives)
  return values | {"fits": plan.fits, "needed": plan.needed}
