"""Pretrained on n tokens, finetuned on n': (1, 1), (4, 4) and (4, 1).

Models are small byte models, whose heads are unembeddings: those of the paper
are so too, and head 1 keeps its depth when the others are dropped. Every way
has the same trunk, corpora, steps and seeds; a pretrained model is trained
once for all that begin with it.
"""

import pathlib

from experiments.measure import sweep
from mtp_jax import config
from mtp_jax.model import model, surgery

WAYS = {"(1, 1)": (1, 1), "(4, 4)": (4, 4), "(4, 1)": (4, 1)}


def pretrain(
  *, width: int, layers: int, batch: int, steps: int, max_bytes: int
) -> config.Config:
  """The config of a byte model on this machine's Python files, for any n."""
  return config.Config(
    model=config.Model(
      width=width,
      mlp=8 * width // 3,
      layers=layers,
      attn_heads=max(2, width // 64),
      kv_heads=max(2, width // 64),
      head="unembedding",
      rope_theta=1000.0,
      remat="full",
    ),
    data=config.Data(
      seq_len=256, batch=batch, max_bytes=max_bytes, held_out=0.1
    ),
    optim=config.Optim(
      kind="muon", peak=5e-3, adam_ratio=6.0, decay=0.3, warmup=100
    ),
    train=config.Train(
      steps=steps,
      loss_block=128,
      log_every=100,
      eval_every=steps,
      eval_batches=32,
      sample_tokens=0,
      save_every=max(1, steps // 2),
      keep=1,
    ),
  )


def seeded(cfg: config.Config, n: int, seed: int) -> config.Config:
  """`cfg` with n heads and a seed of weights and batches."""
  return cfg.replace(
    model={"n_future": n}, train={"seed": seed}, data={"seed": seed}
  )


def pretrained(
  cfg: config.Config, n: int, seed: int, folder: pathlib.Path
) -> model.Model:
  """The model pretrained with n heads, in a folder inside `folder`."""
  place = folder / f"pretrained-n{n}-seed{seed}"
  return sweep.train(seeded(cfg, n, seed), place / "model")


def finetuned(
  way: str,
  before: config.Config,
  after: config.Config,
  seed: int,
  models: pathlib.Path,
  place: pathlib.Path,
) -> model.Model:
  """The model of a way.

  Args:
    way: a key of WAYS.
    before: the config of pretraining.
    after: of finetuning; both for any n.
    seed: of both.
    models: takes the pretrained models.
    place: takes this one.
  """
  first, second = WAYS[way]

  def init():
    net = pretrained(before, first, seed, models)
    return surgery.drop_heads(net, second), {}

  return sweep.train(seeded(after, second, seed), place / "model", init)
