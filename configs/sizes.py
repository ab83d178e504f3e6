"""The paper's model sizes (table S14), with untied 32,000-word vocabularies.

`layers` counts the heads' layers for every n. Feed-forward width is Llama 2's:
two thirds of 4D, rounded up to a multiple of 256.
"""

from mtp_jax import config

# name: (width D, layers L, attention heads H)
SIZES = {
  "1M": (128, 5, 4),
  "3M": (256, 4, 8),
  "10M": (384, 6, 8),
  "30M": (512, 10, 8),
  "100M": (768, 14, 12),
  "300M": (1024, 25, 16),
  "1B": (1536, 36, 24),
  "0.3B": (1024, 18, 16),
  "0.6B": (1280, 27, 20),
  "1.3B": (2048, 24, 16),
  "3B": (2560, 36, 20),
  "6.7B": (4096, 32, 32),
  "13B": (5120, 40, 40),
}


def model(name: str, n_future: int = 1, vocab: int = 32_000) -> config.Model:
  """The Model section of a size of table S14; ValueError if there is none."""
  if name not in SIZES:
    raise ValueError(f"no size {name!r}; the table has {', '.join(SIZES)}")
  width, layers, heads = SIZES[name]
  return config.Model(
    vocab=vocab,
    width=width,
    mlp=-(-8 * width // 3 // 256) * 256,
    layers=layers,
    attn_heads=heads,
    kv_heads=heads,
    n_future=n_future,
  )
