"""Compiles programs ahead of time for an absent TPU slice."""

import dataclasses
import math
import os
import pathlib
import re
import tempfile
import time

import jax
from jax.experimental import topologies

GIB = 2**30

# What a program may use of a chip's HBM, as the compiler (libtpu 0.0.52) says
# when it is too little; by `jax.Device.device_kind`.
HBM = {
  "TPU v4": 30.75,
  "TPU v5": 95.73,
  "TPU v5 lite": 15.75,
  "TPU v6 lite": 31.24,
}  # GiB


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Memory of a compiled program on each chip, in bytes.

  If it does not fit, the compiler gives up. Then `peak` is the memory that it
  asked for, the others are 0 and `text` is empty.
  """

  fits: bool
  seconds: float  # to compile
  arguments: int  # parameters, optimiser state, batch or cache
  temporaries: int
  peak: int  # the most that is alive at once, arguments included
  program: int  # instructions
  text: str  # the scheduled program, for `schedule.collectives`


_FORMS = "Known forms: v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4, axes even"


def topology(name: str) -> list:
  """The devices of a slice like 'v5p:2x2x2' or 'v5e:16x16', in order.

  Needs libtpu, and no TPU. On a TPU machine call it before JAX is first used,
  or JAX takes the chips. Takes XLA_FLAGS out of the environment.

  Raises:
    ValueError: no such slice, one that libtpu cannot describe, or no libtpu.
  """
  if not re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*)*", name):  # libtpu dies of 0
    raise ValueError(f"no TPU slice {name!r}: {_FORMS}")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ["TPU_ACCELERATOR_TYPE"] = name.replace(":", "-")
  # It reads this too, and ends the process at a flag that it does not know;
  # those of its own are in LIBTPU_INIT_ARGS.
  os.environ.pop("XLA_FLAGS", None)
  jax.config.update("jax_platforms", "cpu")
  # One device per chip, as v4 runs, not one per core, as libtpu lists it.
  options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    ).devices
  except Exception as error:  # of several types, with a usable message
    raise ValueError(
      f"no TPU slice {name!r}: {str(error).splitlines()[0]}. {_FORMS}; libtpu "
      "has to be installed"
    ) from error
  if devices[0].device_kind not in HBM:
    raise ValueError(
      f"slice {name!r} has devices of kind {devices[0].device_kind!r}, whose "
      f"memory is not known here; {', '.join(HBM)} can be planned"
    )
  return list(devices)


def compile_program(lowered, options: dict | None = None) -> Compiled:
  """Compiles for the slice that `lowered` was made for.

  Args:
    lowered: from `jax.jit(...).lower(...)` with shardings on the slice.
    options: of the TPU compiler, by name.

  Raises:
    jax.errors.JaxRuntimeError: what the compiler refuses for another reason
      than memory.
  """
  with tempfile.TemporaryDirectory() as folder:
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    begin = time.perf_counter()
    try:
      compiled = lowered.compile(compiler_options=dump | (options or {}))
    except jax.errors.JaxRuntimeError as error:
      wanted = _wanted(str(error))
      if wanted is None:
        raise
      seconds = time.perf_counter() - begin
      return Compiled(False, seconds, 0, 0, wanted, 0, "")
    seconds = time.perf_counter() - begin
    # jaxlib cannot print every program of a newer libtpu; libtpu can.
    [path] = pathlib.Path(folder).glob("*.after_optimizations.txt")
    text = path.read_text(encoding="utf-8")
  stats = compiled.memory_analysis()
  return Compiled(
    fits=True,
    seconds=seconds,
    arguments=stats.argument_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    peak=stats.peak_memory_in_bytes,
    program=stats.generated_code_size_in_bytes,
    text=text,
  )


def bytes_per_chip(tree) -> int:
  """Bytes of a chip's shards of abstract arrays with shardings."""
  return sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )


def _wanted(message: str) -> int | None:
  """Bytes that a program wanted, in the compiler's words; None: it did not
  fail for want of memory."""
  found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
  if "RESOURCE_EXHAUSTED" not in message or not found:
    return None
  return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))
