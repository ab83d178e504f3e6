"""7B on bytes of code, up to 32 at once (paper, tables 1, S3, S13).

  python -m experiments.train --config=configs/paper/bytes_7b.py:7B-n8 \\
    --workdir=runs/bytes-n8 --config.train.accumulate=96

n = 1, 8, 16, 32, each head an unembedding of its own on a trunk of 32 layers.
Bytes: 314.6 billion.
Vocabulary (ours; the paper gives none): the tokenizer has 259 ids, and 288 is
the next number that 32 devices of the mesh's 'model' axis divide. The 32
attention heads divide over no more, so the vocabulary never limits the mesh.
Corpus: the paper names none. ArrayRecord files of source code in data/code.
Expected (table 1): pass@1 on MBPP 19.3, 32.3, 28.6 and 23.0.
Planned slice: v5e:4x4 for any n (experiments/engineering/paper_plans).
"""

from configs.paper import base
from mtp_jax import config

RUNS = tuple(f"7B-n{n}" for n in (1, 8, 16, 32))


def get_config(name: str = "") -> config.Config:
  """The run `name` of `RUNS`; ValueError lists them for another name."""
  _, n, _ = base.choose(name, RUNS)
  cfg = base.run("6.7B", n, "code", batch=12, steps=25_000, seq_len=8192)
  return cfg.replace(
    model={"head": "unembedding", "vocab": 288}, data={"tokenizer": "bytes"}
  )
