"""What the paper's runs share (table S13), and where the paper is silent.

The paper's: AdamW's betas, decay and clip, which are the library's defaults;
warm-up, then cosine to a share of the peak; batches in units of 2^20 tokens.
Ours, since the paper states none of it: bfloat16 activations, whole layers
rematerialised, 100 saves and 50 evaluations a run, where corpora lie, and
losses over blocks of 1024 positions: at one row per chip a smaller block makes
reading the unembedding, not multiplying by it, take the time.
"""

import dataclasses
import math

from configs import sizes
from mtp_jax import config

# Data of the runs that finetune: a prompt and an answer are fields of a line.
PAIRS = {"source": "jsonl", "prompt": "prompt", "field": "answer"}
MIB = 2**20  # tokens; the unit of table S13's batches


def choose(name: str, runs: tuple[str, ...]) -> tuple[str, int, str]:
  """The parts of a run's name: '200B-n4-causal' -> ('200B', 4, 'causal').

  Args:
    name: what stands after the colon of `--config=file.py:name`.
    runs: the family's names.

  Returns:
    (size, budget or task; n; variant, or '' where the name has none).

  Raises:
    ValueError: no such run; the message lists those that there are.
  """
  if name not in runs:
    raise ValueError(f"no run {name!r}; choose one of {', '.join(runs)}")
  what, n, *variant = name.split("-")
  return what, int(n.removeprefix("n")), "".join(variant)


def run(
  size: str,
  n_future: int,
  corpus: str,
  *,
  batch: float,
  steps: int,
  warmup: int = 2000,
  peak: float = 3e-4,
  seq_len: int = 4096,
  end: float = 0.03,
) -> config.Config:
  """A row of table S13 at a size of table S14; families change the rest.

  Args:
    size: a key of `sizes.SIZES`.
    n_future: N, of parallel transformer heads.
    corpus: ArrayRecord file or folder, under `data/` in the current folder.
    batch: in units of 2^20 tokens.
    steps: updates.
    warmup: steps.
    peak: learning rate after warm-up.
    seq_len: T, the table's context.
    end: the table's decay ratio.
  """
  return config.Config(
    model=dataclasses.replace(
      sizes.model(size, n_future), dtype="bfloat16", remat="full"
    ),
    data=config.Data(
      source="array_record",
      path=f"data/{corpus}",
      tokenizer="data/tokenizer.model",
      seq_len=seq_len,
      batch=round(batch * MIB / seq_len),
    ),
    optim=config.Optim(peak=peak, warmup=warmup, end=end),
    train=config.Train(
      steps=steps,
      loss_block=1024,
      eval_every=steps // 50,
      eval_batches=math.ceil(2 / batch),  # two million tokens, or one batch
      save_every=steps // 100,
    ),
  )


def one_row_per_chip(cfg: config.Config, chips: int) -> config.Config:
  """`cfg` with as many microbatches as leave each chip a single row.

  Each run was planned this way.

  Raises:
    ValueError: the rows do not divide by the chips.
  """
  if cfg.data.batch % chips:
    raise ValueError(f"{cfg.data.batch} rows do not divide by {chips} chips")
  return cfg.replace(
    mesh={"data": chips, "model": 1},
    train={"accumulate": cfg.data.batch // chips},
  ).check()
