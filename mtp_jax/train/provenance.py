"""Where the weights of a run came from, if it did not begin at random."""

import hashlib

from mtp_jax.checkpoint import integrity
from mtp_jax.model import model


def fingerprint(net: model.Model) -> str:
  """16 hexadecimal digits of a model's arrays, their names and shapes.

  Equal for every sharding, and for other settings of the same arrays.
  """
  arrays, _ = integrity.flatten(net)
  sums = integrity.checksums(list(arrays.values()))
  text = repr(
    [
      (name, str(array.dtype), array.shape, checksum)
      for (name, array), checksum in zip(arrays.items(), sums, strict=True)
    ]
  )
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def sentence(origin: dict) -> str:
  """What the start of a run says of `origin`; see `loop.fit`."""
  text = f"weights: {origin.get('path', 'of a model given to fit')}"
  if origin.get("step") is not None:
    text += f", step {origin['step']}"
  text += f", fingerprint {origin['fingerprint']}"
  return "; ".join(
    [text, *(origin[key] for key in ("heads", "settings") if key in origin)]
  )
