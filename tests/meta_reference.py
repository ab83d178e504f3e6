"""Tiny models in Meta's format, and what they compute, in NumPy.

Written from the description of the format, without the library. A file of real
`torch.save` lies beside it, written where torch is installed by

  python -m tests.meta_reference
"""

import json
import pathlib
import zlib

import ml_dtypes
import numpy as np

RECORD = pathlib.Path(__file__).with_name("torch_saved.pth")
PARAMS = {
  "dim": 24,
  "n_layers": 5,
  "n_heads": 6,
  "n_kv_heads": 2,
  "vocab_size": 261,
  "multiple_of": 7,
  "ffn_dim_multiplier": 1.3,
  "norm_eps": 1e-5,
  "rope_theta": 500.0,
}
FFN = 84  # int(int(8 * 24 / 3) * 1.3) = 83, to the next multiple of 7


def shapes(n: int) -> dict[str, tuple[int, ...]]:
  """Shape of each tensor by name, of a model with n heads."""
  D, H, K, V = (
    PARAMS[k] for k in ("dim", "n_heads", "n_kv_heads", "vocab_size")
  )
  C = D // H
  layer = {
    "attention.wq.weight": (H * C, D),
    "attention.wk.weight": (K * C, D),
    "attention.wv.weight": (K * C, D),
    "attention.wo.weight": (D, H * C),
    "feed_forward.w1.weight": (FFN, D),
    "feed_forward.w3.weight": (FFN, D),
    "feed_forward.w2.weight": (D, FFN),
    "attention_norm.weight": (D,),
    "ffn_norm.weight": (D,),
  }
  found = {"tok_embeddings.weight": (V, D)}
  for i in range(PARAMS["n_layers"] - n + 1):  # head 1 is the last of them
    found |= {f"layers.{i}.{name}": s for name, s in layer.items()}
  for i in range(n - 1):
    found |= {f"extra_heads.{i}.{name}": s for name, s in layer.items()}
  return found | {"norm.weight": (D,), "output.weight": (V, D)}


def tensors(n: int, dtype: str = "float32") -> dict[str, np.ndarray]:
  """Random weights, none of them special."""
  kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
  drawn = {}
  for name, shape in shapes(n).items():
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    x = 1 + 0.2 * x if "norm" in name else 1.5 * shape[-1] ** -0.5 * x
    drawn[name] = x.astype(kind)
  return drawn


def params(n: int) -> str:
  """params.json of a model with n heads."""
  return json.dumps(PARAMS | {"n_future_tokens": n})


def logits(weights: dict[str, np.ndarray], n: int, tokens: list[int]):
  """Logits [n, T, V] of every head, in float64."""
  w = {name: x.astype(np.float64) for name, x in weights.items()}
  trunk = PARAMS["n_layers"] - n
  x = w["tok_embeddings.weight"][tokens]
  for i in range(trunk):
    x = _layer(w, f"layers.{i}.", x)
  names = [f"layers.{trunk}.", *(f"extra_heads.{i}." for i in range(n - 1))]
  states = np.stack([_layer(w, name, x) for name in names])
  return _norm(states, w["norm.weight"]) @ w["output.weight"].T


def _norm(x, scale):
  mean = (x * x).mean(-1, keepdims=True)
  return x / np.sqrt(mean + PARAMS["norm_eps"]) * scale


def _rotate(x):
  """x [T, heads, C]: neighbours as complex numbers, turned by position."""
  T, _, C = x.shape
  pairs = x[..., 0::2] + 1j * x[..., 1::2]
  speed = PARAMS["rope_theta"] ** (-np.arange(0, C, 2) / C)
  pairs = pairs * np.exp(1j * np.arange(T)[:, None, None] * speed)
  return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def _layer(w, name, x):
  T, H, K = len(x), PARAMS["n_heads"], PARAMS["n_kv_heads"]

  def project(what, y, heads):
    return (y @ w[f"{name}attention.{what}.weight"].T).reshape(T, heads, -1)

  y = _norm(x, w[f"{name}attention_norm.weight"])
  q, k = _rotate(project("wq", y, H)), _rotate(project("wk", y, K))
  v = project("wv", y, K)
  k, v = np.repeat(k, H // K, 1), np.repeat(v, H // K, 1)
  scores = np.einsum("thc,shc->hts", q, k) / np.sqrt(q.shape[-1])
  scores += np.triu(np.full((T, T), -np.inf), 1)
  scores = np.exp(scores - scores.max(-1, keepdims=True))
  scores /= scores.sum(-1, keepdims=True)
  y = np.einsum("hts,shc->thc", scores, v).reshape(T, -1)
  x = x + y @ w[f"{name}attention.wo.weight"].T
  y = _norm(x, w[f"{name}ffn_norm.weight"])
  gate, up, down = (
    w[f"{name}feed_forward.{i}.weight"].T for i in ("w1", "w3", "w2")
  )
  gate = y @ gate
  return x + (gate / (1 + np.exp(-gate)) * (y @ up)) @ down


def saved() -> dict[str, np.ndarray]:
  """What the file of torch holds: views, dtypes, and what is no model's."""
  x = np.arange(30, dtype=np.float32).reshape(5, 6)
  return {
    "whole": x,
    "transposed": x.T,
    "part": x[1:4, 2:5],
    "every other": x[:, ::2],
    "repeated": np.broadcast_to(x[:1], (3, 6)),
    "one": x[2, 3],
    "empty": x[:, :0],
    "half": (x / 8).astype(np.float16),
    "brain": (x / 8).astype(ml_dtypes.bfloat16),
    "counts": np.arange(3),
  }


def main() -> None:
  """Writes `RECORD` with torch."""
  import torch

  x = torch.arange(30, dtype=torch.float32).reshape(5, 6)
  found = torch.nn.Module().state_dict()  # with versions as an attribute
  found |= {
    "whole": x,
    "transposed": x.T,
    "part": x[1:4, 2:5],
    "every other": x[:, ::2],
    "repeated": x[:1].expand(3, 6),
    "one": x[2, 3],
    "empty": x[:, :0],
    "half": (x / 8).half(),
    "brain": (x / 8).bfloat16(),
    "counts": torch.arange(3),
  }
  torch.save(found, RECORD)


if __name__ == "__main__":
  main()
