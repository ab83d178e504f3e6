"""Hugging Face's config.json as a `config.Model`, and back."""

import dataclasses
import math
import re
from typing import Any, Literal

from mtp_jax import config


@dataclasses.dataclass(frozen=True)
class _Family:
  """What distinguishes one family of models from another.

  Attributes:
    defaults: what transformers takes where a config.json says nothing.
    qkv_bias, qk_norm: as of `config.Model`; all models of the family agree.
    window: how a config.json says that attention has a sliding window:
      'number', by `sliding_window` alone; 'layers', also by
      `use_sliding_window` and the kinds of the layers; None: it never has one.
    heads_must_divide_width: the number of attention heads divides the width,
      even where a head has a width of its own.
  """

  defaults: dict[str, int]
  qkv_bias: bool = False
  qk_norm: bool = False
  window: Literal["number", "layers"] | None = None
  heads_must_divide_width: bool = False

  def fits(self, cfg: config.Model) -> bool:
    """Whether a model can be written as one of the family."""
    return (
      (cfg.qkv_bias, cfg.qk_norm) == (self.qkv_bias, self.qk_norm)
      and not (cfg.sliding_window and self.window is None)
      and not (cfg.width % cfg.attn_heads and self.heads_must_divide_width)
    )


_QWEN = {
  "max_position_embeddings": 32_768,
  "max_window_layers": 28,
  "num_key_value_heads": 32,
  "sliding_window": 4096,
}
# By model type, the simplest first: a model is written as the first that fits.
_FAMILIES = {
  "llama": _Family(
    {"max_position_embeddings": 2048}, heads_must_divide_width=True
  ),
  "mistral": _Family(
    {
      "max_position_embeddings": 131_072,
      "num_key_value_heads": 8,
      "sliding_window": 4096,
    },
    window="number",
  ),
  "qwen2": _Family(_QWEN, qkv_bias=True, window="layers"),
  "qwen3": _Family(_QWEN | {"head_dim": 128}, qk_norm=True, window="layers"),
}
# Of these a null has a meaning; others are then as if left out.
_NULLS = ("sliding_window", "head_dim", "num_key_value_heads")
# What would change the model beyond `config.Model`; supported is this value.
_FIXED = {
  "quantization_config": None,
  "num_local_experts": None,
  "num_experts": None,
  "hidden_act": "silu",
  "attention_bias": False,  # it puts one on the output projection too
  "mlp_bias": False,
  "partial_rotary_factor": 1.0,
}
_ROPE_FIXED = {"partial_rotary_factor": 1.0, "truncate": True}
_ROPE_NUMBERS = (
  "rope_theta",
  "factor",
  "original_max_position_embeddings",
  "low_freq_factor",
  "high_freq_factor",
  "beta_slow",
  "beta_fast",
  "attention_factor",
  "mscale",
  "mscale_all_dim",
)


def to_model(tree: dict[str, Any]) -> config.Model:
  """The content of a config.json as settings of a model with one head.

  Raises:
    ValueError: a setting is missing, wrong or not supported; names it.
  """
  model_type = tree.get("model_type")
  if not isinstance(model_type, str) or model_type not in _FAMILIES:
    raise ValueError(
      f"model_type {model_type!r:.60} is not supported; supported are "
      f"{', '.join(_FAMILIES)}"
    )
  given = {k: v for k, v in tree.items() if v is not None or k in _NULLS}
  family = _FAMILIES[model_type]
  tree = family.defaults | given
  tree = {name: value for name, value in tree.items() if value is not None}
  for name in (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "num_attention_heads",
  ):
    if name not in tree:
      raise ValueError(f"{name} is missing")
    _check_integer(tree, name)
  if tree["num_hidden_layers"] < 2:
    raise ValueError(
      f"num_hidden_layers is {tree['num_hidden_layers']}; at least 2 are "
      "needed: the last layer becomes head 1, the others the trunk"
    )
  _check_fixed(tree, _FIXED)
  heads = tree["num_attention_heads"]
  model = config.Model(
    vocab=tree["vocab_size"],
    width=tree["hidden_size"],
    mlp=tree["intermediate_size"],
    layers=tree["num_hidden_layers"],
    attn_heads=heads,
    kv_heads=tree.get("num_key_value_heads", heads),
    attn_channels=tree.get("head_dim", 0),
    n_future=1,
    head="parallel",
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
    sliding_window=_sliding_window(family, tree),
    norm_eps=tree.get("rms_norm_eps", 1e-6),
    dtype=_dtype(tree),
    **_rope(tree),
  ).check()
  if model.attn_channels * heads == model.width:
    return dataclasses.replace(model, attn_channels=0)
  return model


def their_names(text: str) -> str:
  """A message on fields of `config.Model` with the names of a config.json."""

  def name(match):
    return _NAMES.get(match[1], match[0])

  return re.sub(r"(?<![.\w])model\.(\w+)", name, text)


_NAMES = {
  "vocab": "vocab_size",
  "width": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "num_hidden_layers",
  "attn_heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "attn_channels": "head_dim",
  "norm_eps": "rms_norm_eps",
  "sliding_window": "sliding_window",
  "rope_length": "max_position_embeddings",
  "rope_theta": "rope_theta",
  "rope_scaling": "rope_type",
  "rope_factor": "factor",
}


def from_model(cfg: config.Model) -> dict[str, Any]:
  """The content of a config.json, from which `to_model` makes the same.

  Heads 2..N have no part in it, and neither has the dtype.

  Raises:
    ValueError: no family of models has this combination of settings.
  """
  name = _family(cfg)
  count = cfg.trunk_layers + config.HEAD_KINDS[cfg.head]
  tree = {
    "architectures": [f"{name.title()}ForCausalLM"],
    "model_type": name,
    "vocab_size": cfg.vocab,
    "hidden_size": cfg.width,
    "intermediate_size": cfg.mlp,
    "num_hidden_layers": count,
    "num_attention_heads": cfg.attn_heads,
    "num_key_value_heads": cfg.kv_heads,
    "head_dim": cfg.channels,
    "hidden_act": "silu",
    "rms_norm_eps": cfg.norm_eps,
    "rope_theta": cfg.rope_theta,
  }
  if cfg.rope_length:
    tree["max_position_embeddings"] = cfg.rope_length
  if _FAMILIES[name].window == "number":
    tree["sliding_window"] = cfg.sliding_window or None
  elif cfg.sliding_window:
    tree |= {
      "use_sliding_window": True,
      "sliding_window": cfg.sliding_window,
      "max_window_layers": 0,
      "layer_types": ["sliding_attention"] * count,
    }
  if cfg.rope_scaling == "none":
    return tree
  rope = {"rope_type": cfg.rope_scaling, "factor": cfg.rope_factor}
  if cfg.rope_scaling in ("llama3", "yarn"):
    rope["original_max_position_embeddings"] = cfg.rope_length
    tree["max_position_embeddings"] = int(cfg.rope_length * cfg.rope_factor)
  slow, fast = "low_freq_factor", "high_freq_factor"
  if cfg.rope_scaling == "yarn":
    slow, fast = "beta_slow", "beta_fast"
    if cfg.rope_attention:
      rope["attention_factor"] = cfg.rope_attention
  if cfg.rope_scaling in ("llama3", "yarn"):
    rope |= {slow: cfg.rope_slow, fast: cfg.rope_fast}
  # Not `rope_parameters`, which versions of transformers before 5 pass over.
  return tree | {"rope_scaling": rope}


def _family(cfg) -> str:
  """The name of the simplest family that has all that a model has."""
  if cfg.qkv_bias and cfg.qk_norm:
    raise ValueError(
      "no family of Hugging Face models has both model.qkv_bias (Qwen2) and "
      "model.qk_norm (Qwen3): this model cannot be written"
    )
  return next(name for name, family in _FAMILIES.items() if family.fits(cfg))


def _dtype(tree) -> str:
  stored = tree.get("dtype", tree.get("torch_dtype"))
  return "bfloat16" if stored == "bfloat16" else "float32"


def _sliding_window(family, tree) -> int:
  """Tokens that all layers attend to; 0: the whole text."""
  kinds = tree.get("layer_types", [])
  if not isinstance(kinds, list) or len(set(map(str, kinds))) > 1:
    raise ValueError(
      f"layer_types {kinds!r:.60} is not supported; supported are layers of "
      "one kind"
    )
  if family.window == "number":
    return tree.get("sliding_window", 0)
  if family.window is None or not tree.get("use_sliding_window"):
    return 0
  if not kinds:  # the first `max_window_layers` attend to the whole text
    _check_integer(tree, "max_window_layers")
    full = tree["max_window_layers"]
    if 0 < full < tree["num_hidden_layers"]:
      raise ValueError(
        f"max_window_layers {full} of {tree['num_hidden_layers']} layers is "
        "not supported; supported are layers of one kind"
      )
    kinds = ["full_attention" if full else "sliding_attention"]
  return tree.get("sliding_window", 0) if "sliding" in str(kinds[0]) else 0


def _rope(tree) -> dict[str, Any]:
  """The fields of `config.Model` for rotary embeddings."""
  kind, rope = _rope_scaling(tree)
  length = tree["max_position_embeddings"]
  fields = {"rope_theta": rope["rope_theta"], "rope_length": length}
  if kind == "default":
    return fields
  fields |= {"rope_scaling": kind}
  if kind in ("llama3", "yarn"):
    before = tree.get("original_max_position_embeddings", length)
    before = rope.get("original_max_position_embeddings", before)
    _check_positive("original_max_position_embeddings", before)
    fields |= {"rope_length": before}
  if kind == "yarn" and "factor" not in rope:
    _check_integer(tree, "max_position_embeddings")
    rope["factor"] = length / fields["rope_length"]
  needed = ("factor",)
  if kind == "llama3":
    needed += "low_freq_factor", "high_freq_factor"
  for name in needed:
    if name not in rope:
      raise ValueError(f"rope_type {kind!r} needs {name}")
  fields |= {"rope_factor": rope["factor"]}
  if kind == "llama3":
    fields |= {
      "rope_slow": rope["low_freq_factor"],
      "rope_fast": rope["high_freq_factor"],
    }
  elif kind == "yarn":
    fields |= {
      "rope_slow": rope.get("beta_slow", 1.0),
      "rope_fast": rope.get("beta_fast", 32.0),
      "rope_attention": _attention_factor(rope),
    }
  return fields


def _rope_scaling(tree) -> tuple[str, dict[str, Any]]:
  """The kind of scaling and its numbers, each known and of the right type."""
  found = [
    _rope_settings(tree, name)
    for name in ("rope_scaling", "rope_parameters")
    if tree.get(name)
  ] or [_rope_settings(tree, "rope_scaling")]
  if found[0] != found[-1]:
    raise ValueError(
      f"rope_scaling {tree['rope_scaling']!r:.60} and rope_parameters "
      f"{tree['rope_parameters']!r:.60} differ: remove one of them"
    )
  kind, rope = found[0]
  known = ("default", *config.ROPE_SCALING[1:])
  if kind not in known:
    raise ValueError(
      f"rope_type {kind!r:.60} is not supported; supported are "
      f"{', '.join(known)}"
    )
  _check_fixed(rope, _ROPE_FIXED)
  for name, value in rope.items():
    if name in _ROPE_FIXED:
      continue
    if name not in _ROPE_NUMBERS:
      raise ValueError(f"{name!r:.60} of rope_parameters is not supported")
    _check_positive(name, value)
  return kind, rope


def _rope_settings(tree, name) -> tuple[Any, dict[str, Any]]:
  """The kind of scaling and its numbers, from one of the two spellings."""
  rope = tree.get(name, {})
  if not isinstance(rope, dict):
    raise ValueError(f"{name} is {rope!r:.60}; it takes an object")
  rope = {key: value for key, value in rope.items() if value is not None}
  kind = rope.pop("rope_type", rope.pop("type", "default"))
  rope.pop("type", None)  # both in some files
  return kind, {"rope_theta": tree.get("rope_theta", 10_000.0)} | rope


def _attention_factor(rope) -> float:
  """Yarn's factor of cos and sin; 0 where it follows from `rope_factor`."""

  def grown(by):
    return 1 + 0.1 * by * math.log(max(rope["factor"], 1))

  if "attention_factor" in rope:
    return rope["attention_factor"]
  if "mscale" in rope and "mscale_all_dim" in rope:
    return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
  return 0.0


def _check_fixed(tree, fixed) -> None:
  """Raises ValueError for a setting that has another value than supported."""
  for name, value in fixed.items():
    if tree.get(name, value) != value:
      raise ValueError(
        f"{name} {tree[name]!r:.60} is not supported; supported is {value!r}"
      )


def _check_integer(tree, name) -> None:
  if type(tree[name]) is not int or not 0 <= tree[name] < 2**31:
    raise ValueError(f"{name} is {tree[name]!r:.60}; it takes an integer")


def _check_positive(name, value) -> None:
  # Numbers of JSON may be larger than any float.
  if type(value) not in (int, float) or not 0 < value < 1e38:
    raise ValueError(f"{name} is {value!r:.60}; it takes a positive number")
