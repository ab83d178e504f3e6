"""The file of heads 2..N, beside a Hugging Face model that has head 1.

The model in config.json and model.safetensors is the trunk with head 1, as any
next-token model. `mtp_heads.safetensors` beside it has what the others have of
their own. Metadata (strings):

  format    'mtp_jax.heads'
  version   '1'
  head      how heads read the trunk, a kind of `model.heads.kinds`: 'parallel',
            'causal' or 'unembedding'
  n_future  N, head 1 included

With kind 'parallel' or 'causal', head 1 is the last layer of the model. Head i
(from 2) is a transformer layer too, of the same shapes, and reads what head 1
reads ('parallel') or what head i-1 wrote ('causal'). All share the model's last
norm and its lm_head. With j = i - 2, letters of README and H, K and C of
attention, its tensors are

  model.extra_heads.j.input_layernorm.weight            [D]
  model.extra_heads.j.self_attn.q_proj.weight           [H C, D]
  model.extra_heads.j.self_attn.k_proj.weight           [K C, D]
  model.extra_heads.j.self_attn.v_proj.weight           [K C, D]
  model.extra_heads.j.self_attn.o_proj.weight           [D, H C]
  model.extra_heads.j.post_attention_layernorm.weight   [D]
  model.extra_heads.j.mlp.gate_proj.weight              [F, D]
  model.extra_heads.j.mlp.up_proj.weight                [F, D]
  model.extra_heads.j.mlp.down_proj.weight              [D, F]

and biases and norms of q, k and v, where the model's layers have them. With
kind 'unembedding', head 1 has no layer: the model's last layer is the trunk's.
Head i has a matrix in place of lm_head:

  model.extra_heads.j.lm_head.weight                    [V, D]
"""

import dataclasses
import pathlib

from mtp_jax import config

NAME = "mtp_heads.safetensors"
PREFIX = "model.extra_heads."
_FORMAT, _VERSION = "mtp_jax.heads", "1"
_KINDS = ("parallel", "causal", "unembedding")


def metadata(cfg: config.Model) -> dict[str, str]:
  """The metadata of a model's file."""
  return {
    "format": _FORMAT,
    "version": _VERSION,
    "head": cfg.head,
    "n_future": str(cfg.n_future),
  }


def with_heads(
  cfg: config.Model, file: pathlib.Path, found: dict[str, str] | None
) -> config.Model:
  """`cfg`, of a model with one head, with the heads of a file.

  Args:
    cfg: from `hugging_face_config.to_model`.
    file: for messages.
    found: its metadata.

  Raises:
    ValueError: the metadata are not those of such a file.
  """
  found = found or {}
  if found.get("format") != _FORMAT:
    raise ValueError(
      f"{file} has no metadata of mtp_jax: its format is "
      f"{found.get('format')!r:.60}, not {_FORMAT!r}"
    )
  if found.get("version") != _VERSION:
    raise ValueError(
      f"{file} has version {found.get('version')!r:.60} of its format; this "
      f"mtp_jax reads version {_VERSION}"
    )
  head, n = found.get("head"), found.get("n_future", "")
  if head not in _KINDS:
    raise ValueError(
      f"{file}: head is {head!r:.60}; it takes one of {', '.join(_KINDS)}"
    )
  if not (n.isascii() and n.isdigit() and 2 <= int(n[:6]) <= 1000):
    raise ValueError(f"{file}: n_future is {n!r:.60}; it takes 2 to 1000")
  layers = cfg.layers + (int(n) - 1) * config.HEAD_KINDS[head]
  return dataclasses.replace(cfg, head=head, n_future=int(n), layers=layers)
