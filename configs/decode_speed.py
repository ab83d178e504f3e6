"""Two small models whose decoding is measured, for two CPU cores.

  python -m experiments.train --config=configs/decode_speed.py:bytes \\
    --workdir=runs/bytes

`bytes` predicts 8 bytes at once, each head an unembedding of its own; `pieces`
predicts 4 tokens of a SentencePiece model with a transformer layer per head:

  python -m experiments.train_tokenizer --vocab=2048 --output=runs/code.model
  python -m experiments.train --config=configs/decode_speed.py:pieces \\
    --workdir=runs/pieces --config.data.tokenizer=runs/code.model

About 20 minutes each. Corpus: the Python files of this machine. `smollm2` has
the shape of SmolLM2-135M, with one head, for passes of random weights.
"""

import dataclasses

from mtp_jax import config

RUNS = ("bytes", "pieces", "smollm2")


def get_config(name: str) -> config.Config:
  """The model `name`, 'bytes' or 'pieces', and how it is trained."""
  base = config.Config(
    model=config.Model(
      vocab=259,
      width=256,
      mlp=704,
      layers=5,
      attn_heads=4,
      kv_heads=4,
      n_future=8,
      head="unembedding",
      remat="full",
    ),
    data=config.Data(seq_len=256, batch=8, max_bytes=30_000_000),
    # As in the quickstart, at a lower rate for wider matrices.
    optim=config.Optim(
      kind="muon",
      peak=4e-3,
      adam_ratio=6.0,
      decay=0.3,
      newton_schulz=3,
      warmup=50,
      schedule="linear",
      end=0.0,
    ),
    train=config.Train(
      steps=1200,
      loss_block=128,
      log_every=50,
      eval_every=600,
      eval_batches=32,
      save_every=300,
    ),
    decode=config.Decode(max_new=256),
  )
  if name == "bytes":
    return base
  if name == "pieces":
    return dataclasses.replace(
      base,
      model=dataclasses.replace(
        base.model, vocab=2048, layers=8, n_future=4, head="parallel"
      ),
      train=dataclasses.replace(base.train, steps=500, eval_every=250),
    )
  if name == "smollm2":
    return dataclasses.replace(
      base,
      model=config.Model(
        vocab=49152,
        width=576,
        mlp=1536,
        layers=30,
        attn_heads=9,
        kv_heads=3,
        n_future=1,
      ),
    )
  raise ValueError(f"no run {name!r}; choose one of {', '.join(RUNS)}")
