"""How much is trained and decoded at each scale."""

import dataclasses

from configs.paper import code_7b
from mtp_jax import config


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one run of the claim.

  The config is that of the pretrained model, of all steps. The next-token
  model has the same trunk and head 1.
  """

  cfg: config.Config
  added: int  # of the steps, those in which added heads are trained
  added_peak: float  # learning rate of these
  seeds: int
  prompts: int  # beginnings of held-out files
  prompt_len: int  # tokens of each
  new: int  # tokens to write after each
  paper: bool = False  # one row of a microbatch on each chip


def _bytes(width, layers, batch, steps, max_bytes=30_000_000) -> config.Config:
  """A byte model with 4 heads on Python files, trained by Muon."""
  return config.Config(
    model=config.Model(
      width=width,
      mlp=8 * width // 3,
      layers=layers,
      attn_heads=max(2, width // 64),
      kv_heads=max(2, width // 64),
      n_future=4,
      rope_theta=500.0,
    ),
    data=config.Data(
      seq_len=128, batch=batch, max_bytes=max_bytes, held_out=0.1
    ),
    optim=config.Optim(
      kind="muon", peak=5e-3, adam_ratio=6.0, decay=0.3, warmup=50
    ),
    train=config.Train(
      steps=steps,
      loss_block=128,
      log_every=100,
      eval_every=steps,
      eval_batches=64,
      sample_tokens=0,
      save_every=max(1, steps // 4),
      keep=1,
    ),
  )


SCALES = {
  "test": Scale(
    cfg=_bytes(16, 5, 2, 4, 200_000).replace(
      data={"seq_len": 32, "held_out": 0.3},
      optim={"warmup": 1},
      train={"eval_batches": 1},
    ),
    added=2,
    added_peak=5e-3,
    seeds=1,
    prompts=2,
    prompt_len=8,
    new=8,
  ),
  "cpu": Scale(
    cfg=_bytes(96, 6, 8, 1500),
    added=500,
    added_peak=5e-3,
    seeds=3,
    prompts=64,
    prompt_len=64,
    new=128,
  ),
  "gpu": Scale(
    cfg=_bytes(512, 11, 64, 3000, 200_000_000).replace(
      data={"seq_len": 512},
      model={"dtype": "bfloat16", "rope_theta": 10_000.0},
      optim={"peak": 3e-3},
    ),
    added=1000,
    added_peak=3e-3,
    seeds=2,
    prompts=64,
    prompt_len=256,
    new=256,
  ),
  # Table S4's "+3", whose trunk is that of the next-token model. Prompts of
  # table S2. One process, which decodes, has to see all chips.
  "paper": Scale(
    cfg=code_7b.get_config("200B-n4-plus3"),
    paper=True,
    added=8_333,
    added_peak=3e-4,
    seeds=1,
    prompts=4200,
    prompt_len=512,
    new=512,
  ),
}
