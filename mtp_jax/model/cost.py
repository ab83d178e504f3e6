"""FLOPs of a model, and of the chips it runs on."""

import jax

from mtp_jax import config
from mtp_jax.model import model

# Dense bfloat16 FLOP/s of a device, from its maker's data sheet.
PEAK_FLOPS = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}


def flops_per_token(cfg: config.Model, seq_len: int) -> float:
  """Model FLOPs of one training token: no recomputation, causal attention.

  Six per matrix parameter, forward and backward, the shared unembedding
  counted once per head that uses it, and 6 T D per attention layer: half of
  the scores and of the sums over values are masked away.
  """
  count = model.count_parameters(cfg)
  attention = 6 * seq_len * cfg.width * (cfg.trunk_layers + cfg.head_layers)
  unembeddings = cfg.n_future * cfg.vocab * cfg.width
  return 6.0 * (count["layers"] + unembeddings) + attention


def peak_flops(devices: list[jax.Device] | None = None) -> float | None:
  """bfloat16 FLOP/s of all devices together, None where it is not known."""
  devices = jax.devices() if devices is None else devices
  for name in sorted(PEAK_FLOPS, key=len, reverse=True):
    if devices[0].device_kind.startswith(name):
      return PEAK_FLOPS[name] * len(devices)
  return None
