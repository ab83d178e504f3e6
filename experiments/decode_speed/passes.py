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

from mtp_jax import config
from mtp_jax.decode import cache, network, prepare
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import model

TURN = 0.3  # seconds of passes that are timed at once
MOST = 64  # of them at most


def main() -> None:
  """Answers each input line 'batch width' with the seconds of a pass."""
  given = json.loads(sys.argv[1])
  length = given.pop("length")
  cfg = config.Model(**given)
  net = jax.jit(lambda key: model.Model(cfg, key))(jax.random.key(0))
  decoder, turns = prepare.decoder(net), {}
  del net
  for line in sys.stdin:
    window = tuple(map(int, line.split()))
    if window not in turns:
      turns = {window: Turn(decoder, *window, length)}
    print(turns[window].seconds(), flush=True)


class Turn:
  """Passes over a window [B, W], a whole chunk being a prompt's."""

  def __init__(self, decoder, batch: int, width: int, length: int):
    self.decoder, self.length = decoder, length
    tree = None if width == network.CHUNK else topology(width)
    self.window = jnp.zeros((batch, width), jnp.int32)
    slots = cache.ladder(length + MOST + width)
    self.cache = decoder.empty_cache(batch, slots, 1)
    run = functools.partial(passes, tree=tree)
    self.run = jax.jit(run, donate_argnums=(1,))
    self.count = 1
    for _ in range(2):  # compiles, and then tells how many a turn has
      seconds = self.seconds()
    self.count = max(1, min(MOST, int(TURN / seconds)))

  def seconds(self) -> float:
    """Of a pass."""
    start = jnp.full((len(self.window),), self.length, jnp.int32)
    begin = time.perf_counter()
    self.cache, self.window = self.run(
      self.decoder, self.cache, self.window, start, self.count
    )
    jax.block_until_ready(self.window)
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

  def one(i, carry):
    cache, window = carry
    memory = decoder.absorb(cache, window, start + i, tree=tree)
    best = decoder.predict(memory, 0, at).argmax(-1).astype(jnp.int32)
    if tree is not None:
      memory = decoder.commit(memory, jnp.zeros_like(start))
    return memory.cache, jnp.broadcast_to(best, window.shape)

  return jax.lax.fori_loop(0, count, one, (cache, window))


if __name__ == "__main__":
  main()
