"""What transformers computes for tiny models of each supported family.

`write` makes a model's Hugging Face folder, with weights that NumPy draws by
the names of the tensors. `reference` runs transformers on it where that is
installed, and else gives what it computed when

  python -m tests.transformers_reference

last wrote `transformers_reference.json`.
"""

import functools
import importlib.util
import json
import pathlib
import tempfile
import zlib

import numpy as np
from safetensors import numpy as safetensors_numpy

RECORD = pathlib.Path(__file__).with_suffix(".json")
LENGTH = 64  # tokens that the scaled models were trained on
T = 300  # tokens of a window
PROMPTS, NEW = (20, 100), 60  # greedy texts that end beyond LENGTH
PLACES = (0, 1, 40, LENGTH - 1, LENGTH, 2 * LENGTH + 3, T - 1)

_SIZES = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": LENGTH,
  "bos_token_id": 1,
  "eos_token_id": None,
  "tie_word_embeddings": False,
}


def _rope(kind, **numbers):
  return {"rope_theta": 500.0, "rope_type": kind} | numbers


# config.json by what it is there to show.
CASES = {
  "llama": {"model_type": "llama"},
  "dynamic": {
    "model_type": "llama",
    "rope_parameters": _rope("dynamic", factor=3.0),
  },
  "mistral, linear, tied": {
    "model_type": "mistral",
    "sliding_window": 24,
    "tie_word_embeddings": True,
    "rope_parameters": _rope("linear", factor=2.5),
  },
  "qwen2, yarn": {
    "model_type": "qwen2",
    "max_position_embeddings": 4 * LENGTH,
    "rope_parameters": _rope(
      "yarn", factor=4.0, original_max_position_embeddings=LENGTH, beta_fast=9.0
    ),
  },
  "qwen3, llama3": {
    "model_type": "qwen3",
    "head_dim": 12,
    "max_position_embeddings": 8 * LENGTH,
    "rope_parameters": _rope(
      "llama3",
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=LENGTH,
    ),
  },
}


def config_of(case: str) -> dict:
  """A case's config.json."""
  return _SIZES | CASES[case]


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
  """Name and shape of each tensor, as transformers saves a causal model."""
  D, F, V = (config[f"{n}_size"] for n in ("hidden", "intermediate", "vocab"))
  H, K = config["num_attention_heads"], config["num_key_value_heads"]
  C = config.get("head_dim", D // H)
  layer = {
    "input_layernorm.weight": (D,),
    "self_attn.q_proj.weight": (H * C, D),
    "self_attn.k_proj.weight": (K * C, D),
    "self_attn.v_proj.weight": (K * C, D),
    "self_attn.o_proj.weight": (D, H * C),
    "post_attention_layernorm.weight": (D,),
    "mlp.gate_proj.weight": (F, D),
    "mlp.up_proj.weight": (F, D),
    "mlp.down_proj.weight": (D, F),
  }
  if config["model_type"] == "qwen2":
    for name, size in (("q", H), ("k", K), ("v", K)):
      layer[f"self_attn.{name}_proj.bias"] = (size * C,)
  if config["model_type"] == "qwen3":
    layer |= {f"self_attn.{name}_norm.weight": (C,) for name in "qk"}
  found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
  for i in range(config["num_hidden_layers"]):
    found |= {f"model.layers.{i}.{name}": s for name, s in layer.items()}
  if not config["tie_word_embeddings"]:
    found["lm_head.weight"] = V, D
  return found


def tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
  """Random weights, none of them special: norms about 1, biases about 0."""
  drawn = {}
  for name, shape in shapes(config).items():
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    x = draw.standard_normal(shape)
    if "norm" in name:
      x = 1 + 0.2 * x
    elif name.endswith("bias"):
      x *= 0.3
    elif "embed" not in name:
      x *= 1.5 * shape[-1] ** -0.5
    elif config["tie_word_embeddings"]:
      x *= 0.3  # else the text repeats one token
    drawn[name] = x.astype(np.float32)
  return drawn


def write(case: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes a case's folder, without a tokenizer; returns it."""
  config = config_of(case)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  safetensors_numpy.save_file(
    tensors(config), folder / "model.safetensors", {"format": "pt"}
  )
  return folder


def window() -> np.ndarray:
  """The tokens [T] that every model reads."""
  return np.random.default_rng(7).integers(0, _SIZES["vocab_size"], T)


def reference(case: str) -> dict:
  """What transformers computes, live where it is installed.

  Returns:
    {"logits": [PLACES, V] of the window in one pass, "tokens": [PROMPTS, NEW]
    greedy texts after its first tokens, "logprob": [PROMPTS, NEW] of these}.
  """
  return live(case) if has_transformers() else recorded(case)


def recorded(case: str) -> dict:
  """As `reference`, from the file."""
  return json.loads(RECORD.read_text())[case]


@functools.cache
def has_transformers() -> bool:
  """Whether torch and transformers can be imported."""
  return all(importlib.util.find_spec(m) for m in ("torch", "transformers"))


@functools.cache
def live(case: str) -> dict:
  """As `reference`, by transformers."""
  import torch
  import transformers

  torch.set_num_threads(1)
  with tempfile.TemporaryDirectory() as folder:
    write(case, pathlib.Path(folder))
    net = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager"
    )
  saved = {name: tuple(p.shape) for name, p in net.named_parameters()}
  assert saved == shapes(config_of(case)), "shapes() is not transformers'"
  ids = torch.tensor(window()[None])
  with torch.no_grad():
    logits = net(ids).logits[0, list(PLACES)]
    texts = [_greedy(net, ids[:, :length]) for length in PROMPTS]
  tokens, logprob = zip(*texts, strict=True)
  return {
    "logits": logits.numpy().astype(float).round(6).tolist(),
    "tokens": list(tokens),
    "logprob": list(logprob),
  }


def _greedy(net, prompt) -> tuple[list[int], list[float]]:
  """A text and its log-probabilities, one token at a time through the cache."""
  tokens, logprob, cache = [], [], None
  for _ in range(NEW):
    out = net(prompt, past_key_values=cache, use_cache=True)
    cache, scores = out.past_key_values, out.logits[0, -1].log_softmax(-1)
    prompt = scores.argmax()[None, None]
    tokens.append(int(prompt))
    logprob.append(round(float(scores.max()), 6))
  return tokens, logprob


def main() -> None:
  """Records every case."""
  lines = [f'"{case}": {json.dumps(live(case))}' for case in CASES]
  RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  main()
