"""A byte-level model that predicts 8 bytes at once, for two CPU cores.

  make demo
  python -m experiments.train --config=configs/quickstart.py \\
    --workdir=runs/quickstart

Corpus: the Python files of this machine (standard library and packages).
About 9 minutes of training on two cores; 2.00 bits per byte of head 1 and 1.95
predicted tokens per forward pass, on 65,536 held-out bytes. What was tried is
in experiments/demo/README.md.
"""

from mtp_jax import config


def get_config() -> config.Config:
  """An 8-head byte model small enough for two CPU cores."""
  heads = 8  # as many as the paper's byte models have
  return config.Config(
    model=config.Model(
      vocab=259,  # the bytes, and the byte tokenizer's three marks
      # 0.7 million parameters: the run reads five bytes for each. Wide and
      # flat: three layers of width 96 take as long, and learn less.
      width=128,
      mlp=352,
      layers=2,
      attn_heads=4,
      kv_heads=4,
      qk_norm=True,
      n_future=heads,
      head="unembedding",  # no layers of their own: the trunk has both
      rope_theta=500.0,  # for windows of 128 bytes
      remat="dots",  # a step takes 56 ms, and 60 with `full`
    ),
    # Small batches: at this size many small steps learn more than few large
    # ones that cost the same. Short windows: half the attention, and a batch
    # sees twice as many files.
    data=config.Data(
      seq_len=128,
      batch=4,
      max_bytes=30_000_000,  # eight times what is read: no byte is read twice
      held_out=0.1,  # 2 % are some 30 files, too few to measure on
    ),
    optim=config.Optim(
      # With small steps, better in less time than AdamW was with larger ones.
      kind="muon",
      peak=5e-3,  # the best of a few rates, and so are the next two
      adam_ratio=6.0,
      decay=0.3,
      newton_schulz=3,  # as good here as five, and a step takes less time
      warmup=100,  # 1.5 % of the steps
      schedule="linear",
      end=0.0,  # the run ends here
    ),
    train=config.Train(
      steps=8800,  # for 2.0 bits per byte
      loss_block=128,  # all logits of a head at once: they are few
      # Far heads crowd out the first where a model is as small as this.
      head_weights=tuple(0.5**i for i in range(heads)),
      log_every=100,  # one line in a few seconds
      eval_every=4500,  # each reads as many bytes as 128 steps do
      eval_batches=128,  # few bytes vary by more than what is compared
      save_every=1000,  # a minute's work is lost at most
    ),
    decode=config.Decode(max_new=128),  # a window: the model knows no more
  )
