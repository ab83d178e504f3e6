"""Heads 2 to 4 for a trained model, on a frozen trunk.

  python -m experiments.train --init=PATH --config=configs/added_heads.py \\
    --config.model.n_future=4 --workdir=runs/heads

PATH is any folder that `mtp_jax.load` reads, such as a Llama from Hugging Face;
the model's shape and its tokenizer come from there. The corpus is this
machine's Python files. Every text of the model stays the same.
A step of SmolLM2-135M has 1,024 tokens and 0.7 TFLOPs: hours on two CPU cores,
for which `experiments.claims.heads_for_a_model` is faster. Four short steps
have been run, no more, so no number is expected.
"""

from mtp_jax import config


def get_config() -> config.Config:
  """AdamW for heads 2 to N alone; the section `model` is that of --init."""
  return config.Config(
    data=config.Data(seq_len=256, batch=4, max_bytes=100_000_000),
    optim=config.Optim(peak=1e-3, warmup=100, decay=0.01),
    train=config.Train(
      steps=5000,
      freeze="trunk",
      log_every=50,
      eval_every=1000,
      save_every=500,
    ),
  )
