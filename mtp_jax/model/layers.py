"""The Llama 2 transformer layer: RMSNorm, rotary attention, SwiGLU."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax import config
from mtp_jax.model import attention, rotary


class Context(NamedTuple):
  """What every layer of one pass shares: rotation, and how it attends."""

  cos: jax.Array  # [B, T, 1, C/2] float32
  sin: jax.Array  # [B, T, 1, C/2] float32
  attend: jax.tree_util.Partial  # (q [B, T, H, C], *kv) -> [B, T, H, C]


def context(
  positions: jax.Array,
  attend: jax.tree_util.Partial,
  cfg: config.Model,
  length: jax.Array | int | None = None,
) -> Context:
  """Rotary angles of positions, beside `attend`.

  Args:
    positions: [B, T] int32.
    attend: see `Context`.
    cfg: the model's settings.
    length: tokens of the text, one number or [B, T]. Dynamic scaling of rotary
      embeddings depends on it, nothing else does.
  """
  frequency = rotary.frequencies(cfg, length)
  if frequency.ndim > 1:
    frequency = frequency[..., None, :]
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if (factor := rotary.attention_factor(cfg)) != 1:
    cos, sin = cos * factor, sin * factor
  return Context(cos, sin, attend)


def training_context(
  segments: jax.Array,
  cfg: config.Model,
  kernel: attention.Kernel = attention.xla,
) -> Context:
  """Causal context of whole windows.

  Args:
    segments: [B, T] int32 tells documents apart; with `cfg.mask_documents` no
      position sees another document.
    cfg: the model's settings.
    kernel: from `attention.choose`, on a mesh within `sharding.local`.
  """
  documents = segments if cfg.mask_documents else None
  if cfg.sliding_window:
    kernel = functools.partial(kernel, window=cfg.sliding_window)
  attend = jax.tree_util.Partial(
    functools.partial(_attend_window, kernel), documents
  )
  T = segments.shape[1]
  positions = jnp.broadcast_to(jnp.arange(T), segments.shape)
  return context(positions, attend, cfg, T)


def _attend_window(kernel, documents, q, k, v):
  return kernel(q, k, v, documents)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis, in float32, cast back."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return (y * scale).astype(x.dtype)


def rotate(x: jax.Array, ctx: Context) -> jax.Array:
  """Rotates neighbouring channel pairs of x [B, T, H, C] by position."""
  a, b = jnp.moveaxis(
    x.reshape(*x.shape[:-1], -1, 2).astype(jnp.float32), -1, 0
  )
  pair = jnp.stack([a * ctx.cos - b * ctx.sin, a * ctx.sin + b * ctx.cos], -1)
  return pair.reshape(x.shape).astype(x.dtype)


def product(
  equation: str, x: jax.Array, w: nnx.Param, dtype: str | None = None
) -> jax.Array:
  """`jnp.einsum(equation, x, w)` of activations and a weight.

  Args:
    equation: such as 'BTD,DHC->BTHC': the last axes of x with the first of w.
    x: activations; w is cast to their dtype.
    w: an array, or what a decoder keeps in its place, in fewer bits
      (`decode.int8.Matrix`) or in an order of its own (`decode.cpu.Matrix`).
    dtype: of the sums and of the result; None: as x.
  """
  w = w.astype(x.dtype)
  if not isinstance(w, jax.Array):
    return w.product(x, dtype)
  return jnp.einsum(equation, x, w, preferred_element_type=dtype)


def add_bias(x: jax.Array, b: nnx.Param) -> jax.Array:
  """x [B, T, H, C] plus a flat bias [H C]."""
  return x + b.astype(x.dtype).reshape(x.shape[2:])


def param(
  key: jax.Array, shape: tuple[int, ...], axes: tuple, fan_in: int, gain=1.0
) -> nnx.Param:
  """Float32 normal parameter of deviation gain / sqrt(fan_in)."""
  value = jax.random.normal(key, shape, jnp.float32) * gain * fan_in**-0.5
  return nnx.Param(value, axes=axes)


def bias(width: int, axis: str) -> nnx.Param:
  """A bias [width] of zeros, float32: flat, so that no optimiser, decoder or
  quantiser takes it for a matrix."""
  return nnx.Param(jnp.zeros((width,), jnp.float32), axes=(axis,))


def ones(width: int) -> nnx.Param:
  """A norm's scale [width], float32."""
  return nnx.Param(jnp.ones((width,), jnp.float32), axes=(None,))


class Block(nnx.Module):
  """One pre-norm transformer layer.

  Calling it runs a whole window. A decoder uses its two halves apart:
  `project_kv` writes keys and values, `mix` asks for one result, so that a
  head can fill its cache on a window and answer at one position of it.
  """

  def __init__(self, cfg: config.Model, key: jax.Array):
    D, F, H, K = cfg.width, cfg.mlp, cfg.attn_heads, cfg.kv_heads
    C = cfg.channels
    keys = iter(jax.random.split(key, 7))
    out_gain = (2 * (cfg.layers + cfg.extra_layers)) ** -0.5
    self.cfg = cfg
    self.attn_norm = ones(D)
    self.wq = param(next(keys), (D, H, C), ("embed", "attn_heads", None), D)
    self.wk = param(next(keys), (D, K, C), ("embed", "kv_heads", None), D)
    self.wv = param(next(keys), (D, K, C), ("embed", "kv_heads", None), D)
    self.wo = param(
      next(keys), (H, C, D), ("attn_heads", None, "embed"), H * C, out_gain
    )
    if cfg.qkv_bias:
      self.bq = bias(H * C, "attn_heads")
      self.bk, self.bv = bias(K * C, "kv_heads"), bias(K * C, "kv_heads")
    if cfg.qk_norm:
      self.q_norm, self.k_norm = ones(C), ones(C)
    self.mlp_norm = ones(D)
    self.w_gate = param(next(keys), (D, F), ("embed", "mlp"), D)
    self.w_up = param(next(keys), (D, F), ("embed", "mlp"), D)
    self.w_down = param(next(keys), (F, D), ("mlp", "embed"), F, out_gain)

  def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
    """x [B, T, D] -> [B, T, D]; the window attends to itself."""
    return self.mix(x, ctx, *self.project_kv(x, ctx))

  def project_kv(
    self, x: jax.Array, ctx: Context
  ) -> tuple[jax.Array, jax.Array]:
    """Keys (rotated) and values of x [B, T, D], each [B, T, K, C]."""
    y = rms_norm(x, self.attn_norm[...], self.cfg.norm_eps)
    k = product("BTD,DKC->BTKC", y, self.wk)
    v = product("BTD,DKC->BTKC", y, self.wv)
    if self.cfg.qkv_bias:
      k, v = add_bias(k, self.bk), add_bias(v, self.bv)
    if self.cfg.qk_norm:
      k = rms_norm(k, self.k_norm[...], self.cfg.norm_eps)
    return rotate(k, ctx), v

  def mix(self, x: jax.Array, ctx: Context, *kv: jax.Array) -> jax.Array:
    """Attention of x [B, T, D] over `kv` as `ctx` takes it, then the MLP."""
    y = rms_norm(x, self.attn_norm[...], self.cfg.norm_eps)
    q = product("BTD,DHC->BTHC", y, self.wq)
    if self.cfg.qkv_bias:
      q = add_bias(q, self.bq)
    if self.cfg.qk_norm:
      q = rms_norm(q, self.q_norm[...], self.cfg.norm_eps)
    y = ctx.attend(rotate(q, ctx), *kv)
    x = x + product("BTHC,HCD->BTD", y, self.wo)
    y = rms_norm(x, self.mlp_norm[...], self.cfg.norm_eps)
    gate = jax.nn.silu(product("BTD,DF->BTF", y, self.w_gate))
    up = gate * product("BTD,DF->BTF", y, self.w_up)
    return x + product("BTF,FD->BTD", up, self.w_down)


def stack(make: Callable, key: jax.Array, size: int):
  """`size` modules made by `make(key)`, their arrays stacked on axis 0."""
  return jax.vmap(make)(jax.random.split(key, size))


def replace(module: nnx.Module, **parts) -> nnx.Module:
  """A copy of a module with other attributes; its arrays are not copied."""
  copy = jax.tree.map(lambda a: a, module)
  for name, part in parts.items():
    if not hasattr(copy, name):
      raise ValueError(f"{type(module).__name__} has no attribute {name!r}")
    setattr(copy, name, part)
  return copy


def rematerialise(
  fun: Callable, policy: str, scanned: bool = False
) -> Callable:
  """`fun` under jax.checkpoint: 'none' keeps all activations, 'dots' keeps
  the results of matrix products, 'full' keeps only the inputs.

  Forward and backward of a `scanned` fun are loops of their own; elsewhere
  barriers keep the compiler from merging the second run with the first.
  """
  if policy == "none":
    return fun
  saved = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
  }
  return jax.checkpoint(fun, policy=saved[policy], prevent_cse=not scanned)
