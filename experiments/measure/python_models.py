"""Small byte models of Python files, and what the claims measure of them.

The claims that compare models which are trained alike share these sizes: a
run of one is a size, changed in a few fields. The corpus is the Python files
of the machine that runs it, so figures of two machines are not to be compared.
"""

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.measure import study, sweep
from mtp_jax import config, sharding, tokenizer
from mtp_jax.data import batch as batch_lib
from mtp_jax.data import pipeline
from mtp_jax.evaluate import heads as head_measures
from mtp_jax.model import attention
from mtp_jax.train import batches, processes, step

Changes = Mapping[str, Mapping[str, Any]]  # section -> field -> value

SIZES: dict[str, Changes] = {
  "test": {
    "model": {"width": 16, "mlp": 24, "attn_heads": 2, "kv_heads": 2},
    "data": {"seq_len": 32, "batch": 2, "max_bytes": 300_000, "held_out": 0.3},
    "train": {"steps": 4, "eval_batches": 2},
    "optim": {"peak": 5e-3, "adam_ratio": 6.0, "warmup": 1},
  },
  "cpu": {
    "model": {"width": 96, "mlp": 256, "attn_heads": 2, "kv_heads": 2},
    "data": {
      "seq_len": 128,
      "batch": 4,
      "max_bytes": 30_000_000,
      "held_out": 0.1,
    },
    "train": {"steps": 400, "eval_batches": 32},
    "optim": {"peak": 5e-3, "adam_ratio": 6.0, "warmup": 100},
  },
  "gpu": {
    "model": {
      "width": 512,
      "mlp": 1536,
      "attn_heads": 8,
      "kv_heads": 8,
      "dtype": "bfloat16",
    },
    "data": {
      "seq_len": 512,
      "batch": 64,
      "max_bytes": 60_000_000,
      "held_out": 0.1,
    },
    "train": {"steps": 1500, "eval_batches": 16},
    "optim": {"peak": 3e-3, "adam_ratio": 6.0, "warmup": 100},
  },
}
_SHARED: Changes = {
  "model": {"vocab": 259, "rope_theta": 500.0, "remat": "full"},
  "optim": {"kind": "muon", "decay": 0.3},
  "train": {"loss_block": 128, "sample_tokens": 0, "log_every": 100, "keep": 1},
}


def make(size: str, *changes: Changes, seed: int = 0) -> config.Config:
  """The checked config of a size with some changes, later ones last.

  `make("cpu", {"model": {"n_future": 2, "layers": 4}}, seed=1)`

  Args:
    size: a key of `SIZES`.
    *changes: of its fields.
    seed: of the parameters and of the order of windows.
  """
  cfg = config.Config()
  seeds = {"train": {"seed": seed}, "data": {"seed": seed}}
  for part in (_SHARED, SIZES[size], *changes, seeds):
    cfg = cfg.replace(**part)
  steps = cfg.train.steps
  every = {"eval_every": -(-steps // 3), "save_every": steps}
  return cfg.replace(train=every).check()


def run(
  claim: str,
  name: str,
  size: str,
  *changes: Changes,
  seed: int = 0,
  heads: tuple[int, ...] = (),
) -> sweep.Run:
  """A run of `sweep` that trains `make(size, *changes, seed=seed)`.

  Args:
    claim, name, seed: of the run.
    size, changes: of `make`.
    heads: numbers k of heads, for the tokens per forward with the first k.
  """
  cfg = make(size, *changes, seed=seed)
  overrides = {"size": size} | {
    f"{section}.{field}": value
    for part in changes
    for section, values in part.items()
    for field, value in values.items()
  }
  return sweep.Run(
    claim,
    name,
    overrides,
    seed,
    lambda folder: figures(cfg, folder, heads),
    check=functools.partial(_check_devices, cfg),
  )


def _check_devices(cfg: config.Config) -> None:
  """Raises ValueError if the devices do not divide a batch."""
  try:
    batches.check(cfg, sharding.make_mesh(cfg.mesh))
  except ValueError as error:
    raise ValueError(
      f"{error}. Show the program fewer devices, as with CUDA_VISIBLE_DEVICES=0"
    ) from error


def figures(
  cfg: config.Config, folder: pathlib.Path, heads: tuple[int, ...] = ()
) -> Iterator[sweep.Figure]:
  """Trains a model in `folder`, or resumes there; its held-out figures.

  Args:
    cfg: the run's settings.
    folder: of the run.
    heads: see `run`.

  Yields:
    At each evaluation, of the held-out files: `bits_per_byte_1`, ...,
    `accuracy_1`, ... of heads, and `tokens_per_forward_greedy`, as
    `evaluate.heads` defines them. In the end `tokens per forward k=...`.

  Raises:
    RuntimeError: the run has no evaluation.
    sweep.Stopped: a signal stopped the training, which is saved.
  """
  net = sweep.train(cfg, folder)
  is_first = jax.process_index() == 0  # writes the logs
  rows = study.read_csv(folder / "held_out.csv") if is_first else []
  if not processes.gather("some" * bool(rows))[0]:
    raise RuntimeError(f"{folder} has no evaluation: see its log.txt")
  wanted = "bits_per_byte_", "accuracy_", "tokens_per_forward_greedy"
  for row in rows:
    for metric, value in row.items():
      if metric.startswith(wanted):
        yield sweep.Figure(int(row["step"]), metric, float(value))
  if not heads:
    return
  rows, kernel = held_out(cfg)
  speeds = head_measures.tokens_per_forward(net, rows, heads, kernel=kernel)
  for k, speed in speeds.items():
    yield sweep.Figure(cfg.train.steps, f"tokens per forward k={k}", speed)


def held_out(
  cfg: config.Config,
) -> tuple[Iterator[batch_lib.Batch], attention.Kernel]:
  """What a run's evaluations read, on its mesh, and their attention."""
  mesh = sharding.make_mesh(cfg.mesh)
  splits = pipeline.pack(cfg.data, tokenizer.load(cfg.data.tokenizer))
  read = batches.Batches(cfg, mesh, splits).held_out
  count = cfg.train.eval_batches * cfg.train.accumulate
  return map(read, range(count)), step.attention_kernel(cfg.model, mesh)
