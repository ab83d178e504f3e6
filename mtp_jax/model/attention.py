"""Causal attention over whole windows: one function, a kernel per platform.

  xla     `jax.nn.dot_product_attention`; holds the scores, [B, H, T, T]
  cudnn   cuDNN's flash attention on NVIDIA GPUs; no scores in memory, but
          with documents a mask [B, 1, T, T]
  splash  Pallas splash attention on TPUs; no scores in memory, and blocks
          above the diagonal are not computed

Each takes q [B, T, H, C], k and v [B, T, K, C], and segments [B, T] int32 (or
None: one document), and returns [B, T, H, C] in q's dtype: position t attends
to the positions up to t of its own document, with `window` to the last `window`
of them, its own included. Softmax is taken in float32.
`cudnn` and `splash` cannot be split by XLA: on a mesh each device calls them
on its own rows and attention heads (`sharding.local`).
"""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)

# (q, k, v, segments, *, window=0) -> [B, T, H, C]
Kernel = Callable[..., jax.Array]

_LANES = 128  # a TPU register's width: positions come in multiples of it
# Positions of a splash block, forward and backward. The least memory of those
# tried: experiments/engineering/tpu_kernels/README.md.
_BLOCK = 512


def choose(impl: str, platform: str) -> Kernel:
  """The kernel for `impl` on a platform.

  Args:
    impl: 'auto', 'xla', 'cudnn' or 'splash'. 'auto' is splash on TPUs, cudnn
      on GPUs and xla elsewhere.
    platform: as `jax.Device.platform` names it: 'cpu', 'gpu', 'tpu'.

  Returns:
    A kernel as in the module's docstring. Splash runs off TPUs too, but
    interpreted: only to be checked.

  Raises:
    ValueError: no such implementation.
  """
  if impl == "auto":
    impl = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
  kernels = {"xla": xla, "cudnn": cudnn, "splash": splash}
  if impl not in kernels:
    raise ValueError(
      f"no attention {impl!r}; choose one of {', '.join(kernels)}"
    )
  if impl == "splash" and platform != "tpu":
    return functools.partial(splash, interpret=True)
  return kernels[impl]


def xla(q, k, v, segments=None, *, window: int = 0) -> jax.Array:
  """The formula, as XLA compiles it; arguments as in the module."""
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=_same_document(segments),
    is_causal=True,
    local_window_size=_looks_back(window),
  )


def cudnn(q, k, v, segments=None, *, window: int = 0) -> jax.Array:
  """cuDNN's kernel; where it refuses a shape or a dtype, `xla`, and says so.

  With segments it reads a mask [B, 1, T, T], one for all attention heads.
  """
  try:
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      mask=_same_document(segments),
      is_causal=True,
      local_window_size=_looks_back(window),
      implementation="cudnn",
    )
  except (NotImplementedError, RuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
  warnings.warn(
    f"cuDNN attention does not take q {q.dtype}{list(q.shape)} ({reason}): "
    "XLA's is used, which keeps the scores [B, H, T, T]",
    stacklevel=2,
  )
  return xla(q, k, v, segments, window=window)


def splash(
  q, k, v, segments=None, *, window: int = 0, interpret: bool = False
) -> jax.Array:
  """The Pallas kernel; T is padded to its blocks, K may be fewer than H.

  Args:
    q, k, v, segments, window: as in the module.
    interpret: run it as plain JAX, on any platform.

  Returns:
    [B, T, H, C] in q's dtype.
  """
  B, T, H, C = q.shape
  size = -(-T // _LANES) * _LANES if T <= _BLOCK else -(-T // _BLOCK) * _BLOCK
  block = min(size, _BLOCK)
  mask = splash_mask.CausalMask((size, size))
  if window:
    mask = splash_mask.LocalMask((size, size), _looks_back(window), offset=0)
  kernel = splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([mask] * H),
    block_sizes=splash_kernel.BlockSizes(**dict.fromkeys(_BLOCK_NAMES, block)),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  q = q * jnp.asarray(C**-0.5, q.dtype)  # the kernel does not scale

  def by_head(x):  # [B, T, heads, C] -> [B, heads, size, C]
    x = jnp.pad(x, ((0, 0), (0, size - T), (0, 0), (0, 0)))
    return jnp.moveaxis(x, 2, 1)

  if segments is None:
    segments = jnp.zeros((B, T), jnp.int32)
  # Padding stands behind every position, where the causal mask hides it.
  segments = jnp.pad(segments, ((0, 0), (0, size - T)))
  ids = splash_kernel.SegmentIds(segments, segments)
  y = jax.vmap(kernel)(by_head(q), by_head(k), by_head(v), ids)
  return jnp.moveaxis(y, 1, 2)[:, :T]


_BLOCK_NAMES = (
  "block_q",
  "block_kv",
  "block_kv_compute",
  "block_q_dkv",
  "block_kv_dkv",
  "block_kv_dkv_compute",
  "block_q_dq",
  "block_kv_dq",
)


def _looks_back(window: int) -> tuple[int, int] | None:
  """How far a position attends, (before, after) it; None: without a limit."""
  return (window - 1, 0) if window else None


def _same_document(segments):
  """[B, 1, T, T] bool, or None where all is one document."""
  if segments is None:
    return None
  return (segments[:, :, None] == segments[:, None, :])[:, None]
