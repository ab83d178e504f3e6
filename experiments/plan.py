"""Says whether a config fits a TPU slice, without a TPU.

  python -m experiments.plan --config=configs/quickstart.py \\
    --topology=v5e:2x2 --config.data.batch=8

Compiles the real training step (or, with --decode, one decoding pass) for the
slice with the TPU compiler, and prints per chip: parameters, optimiser state,
temporaries and peak memory against its HBM; FLOPs over all iterations of loops;
the collectives, their bytes, and how much of them runs behind compute. If it
does not fit, it says what to change. With --model=FOLDER the model is the one
in that folder, with as many heads as a given --config.model.n_future says; its
weights are not read. Takes seconds for a small model and 1 to 3 minutes for one
of the paper's.
"""

import jax
from absl import flags

from experiments.measure import planning, study
from experiments.startup import initial, options, program
from mtp_jax import fields

_CONFIG = options.define_config()
_MODEL = options.define_path(
  "model", None, "Folder of a run, or of a model of others, to plan for."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "TPU slice, as v5p:2x2x2, v5e:16x16 or v6e:4x4."
)
_DECODE = flags.DEFINE_bool("decode", False, "Plan a decoding pass instead.")
_BATCH = flags.DEFINE_integer(
  "decode_batch", 8, "Rows of a decoding pass.", 1, fields.INT32
)
_CACHE = flags.DEFINE_integer(
  "cache_len", 0, "Positions; 0: data.seq_len.", 0, fields.INT32
)
_OPTIONS = flags.DEFINE_list(
  "compiler_options", [], "Of the TPU compiler, as name=value,name=value."
)
_JSON = options.define_path("json", None, "File to write the figures to.")
flags.mark_flag_as_required("topology")


def main(_: list[str]) -> None:
  """Compiles the program, prints its plan and writes it as JSON if asked."""
  if not _DECODE.value:
    options.refuse_idle(["decode_batch", "cache_len"], "without --decode")
  cfg = _CONFIG.value
  if _MODEL.value:
    cfg = initial.planned(cfg, _CONFIG.given, _MODEL.value)
  cfg = cfg.check()
  compiler = _compiler_options(_OPTIONS.value)
  if _JSON.value:
    options.make_room(_JSON.value)
  try:
    plan = _plan(cfg, compiler)
  except jax.errors.JaxRuntimeError as error:
    if not compiler or "INVALID_ARGUMENT" not in str(error):
      raise
    raise ValueError(f"--compiler_options: {error}") from error
  print("\n".join(planning.describe(plan)))
  if not plan.fits:
    print("to make it fit:")
    print("\n".join(f"  {line}" for line in planning.advice(plan, cfg)))
  if _JSON.value:
    result = study.provenance() | planning.to_dict(plan)
    study.write_json(_JSON.value, result)


def _plan(cfg, compiler):
  if not _DECODE.value:
    return planning.training(cfg, _TOPOLOGY.value, compiler)
  return planning.decoding(
    cfg,
    _TOPOLOGY.value,
    batch=_BATCH.value,
    cache_len=_CACHE.value or cfg.data.seq_len,
    options=compiler,
  )


def _compiler_options(pairs: list[str]) -> dict[str, str]:
  for pair in pairs:
    if not all(pair.partition("=")):
      raise ValueError(f"--compiler_options: {pair!r} is not name=value")
  return dict(pair.split("=", 1) for pair in pairs)


if __name__ == "__main__":
  program.start(main)
