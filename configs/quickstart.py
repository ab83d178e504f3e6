"""A byte-level model that predicts 8 bytes at once, for two CPU cores.

  python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Corpus: the Python files of this machine (standard library and packages).
"""

from mtp_jax import config


def get_config() -> config.Config:
  return config.Config(
    model=config.Model(
      vocab=259,
      width=192,
      mlp=512,
      layers=4,
      attn_heads=4,
      kv_heads=4,
      n_future=8,
      head="unembedding",
    ),
    data=config.Data(seq_len=256, batch=16, max_bytes=30_000_000),
    optim=config.Optim(peak=3e-3, warmup=50),
    train=config.Train(steps=500, log_every=20, eval_every=250, save_every=250),
    decode=config.Decode(),
  )
