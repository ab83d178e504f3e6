"""The shapes of each stage: for an accelerator, and for a look on a CPU."""

import dataclasses

import numpy as np

from configs import decode_speed, sizes
from experiments.measure import steps
from mtp_jax import config
from mtp_jax.decode import tree as tree_lib


@dataclasses.dataclass(frozen=True)
class Attention:
  """Shape of an attention kernel's arguments."""

  batch: int
  tokens: int
  heads: int
  channels: int


@dataclasses.dataclass(frozen=True)
class Decoding:
  """A model with random weights whose passes are timed."""

  model: config.Model
  batches: tuple[int, ...]
  # What is compiled and timed together, ordinary decoding in each.
  groups: tuple[tuple[tree_lib.Tree, ...], ...]
  length: int  # tokens in each row's cache, before the passes
  passes: int  # of a turn
  repeats: int  # turns of each tree
  megabytes: int  # read to measure the bandwidth
  product: int  # rows of the matrices that measure FLOP/s


@dataclasses.dataclass(frozen=True)
class Training:
  """A size of the paper whose steps are timed."""

  size: str
  programs: tuple[tuple[int, str], ...]  # (n, loss), equal n side by side
  largest: tuple[tuple[int, str], ...]  # of which the largest batch is sought
  first: tuple[int, ...]  # rows per device of the search's first programs
  setup: steps.Setup


@dataclasses.dataclass(frozen=True)
class Scale:
  """All that the stages do."""

  attention: tuple[Attention, ...]
  checked: config.Model  # whose gradients and texts are compared
  precisions: tuple[str, ...]  # of its texts, from exactness.MARGINS
  rows: int  # of its batch, and prompts
  tokens: int  # of a row, and of a text
  decoding: Decoding
  training: tuple[Training, ...]
  memory: float | None  # GiB; None: what the device says
  # Stage 4: candidates from small to large, and what a run of one is.
  byte_models: tuple[config.Model, ...]
  byte_run: config.Config
  most_steps: int
  batches: tuple[int, ...]
  reserve: float  # seconds for decoding, at most two thirds of what is left


# A made-up acceptance, the same for all heads: it shapes trees as trained
# models' do, and is no claim about any.
_CHANCES = np.array([[0.6 * 0.25**rank for rank in range(10)]] * 7)
_TREES = {k: tree_lib.chain(k) for k in (1, 2, 4, 8)} | {
  size: tree_lib.build(_CHANCES, size) for size in (16, 64)
}


def _byte_model(width: int, layers: int, heads: int = 8) -> config.Model:
  return dataclasses.replace(
    decode_speed.get_config("bytes").model,
    width=width,
    mlp=-(-8 * width // 3 // 128) * 128,
    layers=layers,
    attn_heads=max(width // 128, 1),
    kv_heads=max(width // 128, 1),
    n_future=heads,
    dtype="bfloat16",
  )


def _byte_run(**data) -> config.Config:
  return dataclasses.replace(
    decode_speed.get_config("bytes"),
    optim=config.Optim(peak=2e-3),  # AdamW, as measured
  ).replace(data=data, train={"sample_tokens": 0, "eval_batches": 8})


_GPU = Scale(
  attention=(Attention(2, 1024, 16, 128), Attention(2, 4096, 16, 64)),
  checked=config.Model(
    vocab=512,
    width=512,
    mlp=1408,
    layers=6,
    attn_heads=4,
    kv_heads=4,
    n_future=4,
  ),
  precisions=("float32", "bfloat16", "float32, JAX's default precision"),
  rows=8,
  tokens=128,
  decoding=Decoding(
    model=dataclasses.replace(sizes.model("1.3B", 8), dtype="bfloat16"),
    batches=(1, 8, 32, 42),
    groups=tuple(
      tuple(_TREES[size] for size in sizes)
      for sizes in ((1, 4, 16), (1, 2, 8, 64))
    ),
    length=512,
    passes=32,
    repeats=5,
    megabytes=4096,
    product=8192,
  ),
  training=(
    Training(
      size="0.3B",
      programs=tuple(
        (n, loss) for n in (1, 4, 2) for loss in ("serial", "formula")
      ),
      largest=(),
      first=(),
      setup=steps.Setup(rows=4, rounds=3),
    ),
    Training(
      size="1.3B",
      programs=((1, "serial"), (4, "serial"), (4, "formula")),
      largest=((4, "serial"), (4, "formula"), (1, "serial")),
      first=(1, 2, 8, 32, 128),
      setup=steps.Setup(rows=2, rounds=2),
    ),
  ),
  memory=None,
  byte_models=tuple(
    _byte_model(*shape)
    for shape in ((256, 5), (384, 6), (512, 8), (768, 12), (1024, 16))
  ),
  byte_run=_byte_run(seq_len=512, batch=64, max_bytes=20_000_000),
  most_steps=100_000,
  batches=(1, 8, 32),
  reserve=80,
)

_TINY = config.Model(
  vocab=67,
  width=16,
  mlp=24,
  layers=1,
  attn_heads=2,
  kv_heads=2,
  n_future=2,
  head="unembedding",
)

_CPU = Scale(
  attention=(Attention(1, 64, 2, 8),),
  checked=_TINY,
  precisions=("bfloat16",),
  rows=2,
  tokens=16,
  decoding=Decoding(
    model=dataclasses.replace(_TINY, dtype="bfloat16"),
    batches=(3,),
    groups=((tree_lib.chain(1), tree_lib.from_paths([(0,), (1,)])),),
    length=16,
    passes=4,
    repeats=2,
    megabytes=64,
    product=256,
  ),
  training=(
    Training(
      size="1M",
      programs=((4, "serial"),),
      largest=((4, "serial"),),
      first=(1, 2),
      setup=steps.Setup(rows=1, seq_len=64, vocab=67, rounds=1, steps=1),
    ),
  ),
  memory=0.0268,
  byte_models=(_byte_model(32, 1, heads=2),),
  byte_run=_byte_run(seq_len=32, batch=2, max_bytes=300_000, held_out=0.3),
  most_steps=3,
  batches=(2,),
  reserve=0,
)

SCALES = {"gpu": _GPU, "cpu": _CPU}
