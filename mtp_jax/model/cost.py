"""FLOPs of a model, and of the chips it runs on."""

import jax

from mtp_jax import config
from mtp_jax.model import heads, model

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


def flops_per_token(
  cfg: config.Model, seq_len: int, freeze: str = "none"
) -> float:
  """Model FLOPs of one training token: no recomputation, causal attention.

  Six per matrix parameter, forward and backward, the shared unembedding
  counted once per head that uses it, and 12 H C per attention layer and token
  that a token attends to: T/2 on average, less with a sliding window.

  With `freeze` 'trunk' (`train.freeze`), only heads 2..N run backward, and a
  shared unembedding has no gradient of its own.
  """
  forward = _forward(cfg, seq_len)
  if freeze == "none":
    return 3.0 * forward
  trained = forward - _forward(cfg.with_heads(1), seq_len)
  fixed = 0 if heads.KINDS[cfg.head].own_unembed else cfg.n_future - 1
  return float(forward + 2 * trained - 2 * fixed * cfg.vocab * cfg.width)


def _forward(cfg, seq_len):
  count = model.count_parameters(cfg)
  window = min(cfg.sliding_window or seq_len, seq_len)
  seen = window - window**2 / (2 * seq_len)
  layers = cfg.trunk_layers + cfg.head_layers
  attention = 4 * seen * cfg.attn_heads * cfg.channels * layers
  unembeddings = cfg.n_future * cfg.vocab * cfg.width
  return 2 * (count["layers"] + unembeddings) + attention


def peak_flops(devices: list[jax.Device] | None = None) -> float | None:
  """bfloat16 FLOP/s of all devices together, None where it is not known."""
  devices = jax.devices() if devices is None else devices
  for name in sorted(PEAK_FLOPS, key=len, reverse=True):
    if devices[0].device_kind.startswith(name):
      return PEAK_FLOPS[name] * len(devices)
  return None
