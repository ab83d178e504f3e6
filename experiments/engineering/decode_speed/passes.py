"""The worker of `checkouts`: times passes over a window on request.

Imports nothing but the library's decoder, so that it runs on other versions
of it. Reads lines of a batch size and a window, and answers each with the
seconds of a pass.
"""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import config
from mtp_jax.decode import cache
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import model

try:
  from mtp_jax.decode import layout
  from mtp_jax.decode import window as window_lib

  lay_out, CHUNK = layout.lay_out, window_lib.CHUNK
except ImportError:  # a checkout before these modules had their names
  try:
    from mtp_jax.decode import decoder as decoder_lib
    from mtp_jax.decode import window as window_lib

    lay_out, CHUNK = decoder_lib.lay_out, window_lib.CHUNK
  except ImportError:
    from mtp_jax.decode import network, prepare

    lay_out, CHUNK = prepare.decoder, network.CHUNK

TURN = 0.3  # seconds of passes that are timed at once
MOST = 64  # of them at most


def main() -> None:
  """Answers each input line 'batch width' with the seconds of a pass."""
  given = json.loads(sys.argv[1])
  length = given.pop("length")
  cfg = config.Model(**given)
  rng = np.random.default_rng(0)

  def fill(a):  # the initialiser takes long to compile
    return jnp.asarray(rng.standard_normal(a.shape, np.float32) * 0.02)

  net = jax.eval_shape(lambda: model.Model(cfg, jax.random.key(0)))
  net = jax.tree.map(fill, net)
  decoder, turns, caches = lay_out(net), {}, {}
  del net
  for line in sys.stdin:
    window = tuple(map(int, line.split()))
    if window not in turns:
      turns[window] = Turn(decoder, *window, length, caches)
    print(turns[window].seconds(), flush=True)


class Turn:
  """Passes over a window [B, W], a whole chunk being a prompt's.

  Windows share `caches` by their shape.
  """

  def __init__(
    self, decoder, batch: int, width: int, length: int, caches: dict
  ):
    self.decoder, self.length, self.caches = decoder, length, caches
    tree = None if width == CHUNK else topology(width)
    self.window = jnp.zeros((batch, width), jnp.int32)
    self.key = batch, cache.ladder(length + MOST + width)
    if self.key not in caches:
      caches[self.key] = decoder.empty_cache(*self.key, 1)
    run = functools.partial(passes, tree=tree)
    self.run = jax.jit(run, donate_argnums=(1,))
    self.count = 1
    for _ in range(2):  # compiles, and then tells how many a turn has
      seconds = self.seconds()
    self.count = max(1, min(MOST, int(TURN / seconds)))

  def seconds(self) -> float:
    """Of a pass."""
    start = jnp.full((len(self.window),), self.length, jnp.int32)
    held = self.caches[self.key]
    begin = time.perf_counter()
    held, self.window = self.run(
      self.decoder, held, self.window, start, self.count
    )
    jax.block_until_ready(self.window)
    self.caches[self.key] = held
    return (time.perf_counter() - begin) / self.count


def topology(size: int) -> tree_lib.Tree:
  """A chain of up to 8 tokens, or a tree of more that branches in two."""
  if size <= 8:
    return tree_lib.chain(size)
  paths = (list(map(int, f"{node:b}"[1:])) for node in range(2, size + 1))
  return tree_lib.from_paths(sorted(paths, key=len))


def passes(decoder, cache, window, start, count, tree):
  """`count` passes, each behind the last one's first token."""
  at = jnp.arange(window.shape[1])[-1:] if tree is None else None
  at = jnp.arange(tree.size) if at is None else at
  at = jnp.broadcast_to(at, (len(window), len(at)))
  names = "forward", "logits", "keep_path"
  if not hasattr(decoder, "forward"):  # an older checkout's
    names = "absorb", "predict", "commit"
  forward, logits, keep_path = (getattr(decoder, name) for name in names)

  def one(i, carry):
    cache, window = carry
    memory = forward(cache, window, start + i, tree=tree)
    best = logits(memory, 0, at).argmax(-1).astype(jnp.int32)
    if tree is not None:
      memory = keep_path(memory, jnp.zeros_like(start))
    return memory.cache, jnp.broadcast_to(best, window.shape)

  return jax.lax.fori_loop(0, count, one, (cache, window))


if __name__ == "__main__":
  main()
