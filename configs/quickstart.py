"""A byte-level model that predicts 8 bytes at once, for two CPU cores.

  make demo
  python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Corpus: the Python files of this machine (standard library and packages).
"""

from mtp_jax import config


def get_config() -> config.Config:
  return config.Config(
    model=config.Model(
      vocab=259,
      width=128,
      mlp=384,
      layers=4,
      attn_heads=4,
      kv_heads=4,
      n_future=8,
      head="unembedding",
      remat="full",  # faster here too: less to write down
    ),
    data=config.Data(seq_len=192, batch=8, max_bytes=30_000_000),
    optim=config.Optim(peak=4e-3, warmup=100),
    train=config.Train(
      steps=1800,
      loss_block=96,
      log_every=50,
      eval_every=600,
      eval_batches=32,
      save_every=600,
    ),
    decode=config.Decode(max_new=128),
  )
