"""The shapes that are measured."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scale:
  """A shape to measure; `layers` counts the heads' own, for every n."""

  width: int
  mlp: int
  layers: int
  attn_heads: int
  batch: int
  seq_len: int
  block: int
  rounds: int  # timed turns of every implementation; 0: compiled only
  pairs: int = 0  # timed turns of the training step at n = 1 and n = 4
  vocab: int = 32_000
  dtype: str = "float32"
  remat: str = "none"


SCALES = {
  "cpu": Scale(
    width=256,
    mlp=768,
    layers=9,
    attn_heads=4,
    batch=8,
    seq_len=256,
    block=16,
    rounds=3,
    pairs=6,
  ),
  "gpu": Scale(
    width=2048,
    mlp=5632,
    layers=16,
    attn_heads=16,
    batch=8,
    seq_len=2048,
    block=256,
    rounds=20,
    pairs=20,
    dtype="bfloat16",
    remat="full",
  ),
  "paper": Scale(
    width=4096,
    mlp=11008,
    layers=32,
    attn_heads=32,
    batch=2,
    seq_len=4096,
    block=256,
    rounds=0,
    dtype="bfloat16",
    remat="full",
  ),
}
