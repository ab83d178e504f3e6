"""What guards the arrays of a checkpoint: names, shapes, dtypes, checksums."""

import hashlib
import json
import math

import jax
import jax.numpy as jnp


def checksums(arrays: list[jax.Array]) -> list[str]:
  """A checksum per array, the same for every sharding and process count.

  Each array becomes uint32 words w (8- and 16-bit values widened); its sums
  are Σ f(w[i], i) mod 2^32 for two functions f, each one to one in w: a change
  to a single word, so any flipped bit, always changes both. f mixes all bits
  of w with the flat position i, so that other damage passes about once in
  2^64, flipped signs and swapped words too; Σ w[i]·h(i) with odd h(i) has the
  first property but misses every second flip of a top bit. Computed where the
  shards lie, in one call; no array is gathered. Beyond 2^32 elements positions
  repeat: exchanging two words that share one is not seen.

  Args:
    arrays: arrays of any shape and plain dtype, on the devices of one mesh.

  Returns:
    Per array 16 hexadecimal digits.
  """
  sums = jax.device_get(jax.block_until_ready(_sums(arrays)))
  return [f"{int(a):08x}{int(b):08x}" for a, b in sums]


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  def one(x):
    if x.dtype == jnp.bool_:
      x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      x = jnp.stack([x.real, x.imag], -1)
    bits = min(jax.dtypes.itemsize_bits(x.dtype), 32)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    words = words.astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
      stride = math.prod(words.shape[axis + 1 :]) % 2**32
      index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
      position += index * jnp.uint32(stride)
    place = _mix(position + jnp.uint32(1))
    first = _mix(words ^ place)
    second = _mix(words * jnp.uint32(0x9E3779B1) + (place ^ position))
    # One reduction for both: two would keep `place` as an array in memory.
    zero, axes = jnp.uint32(0), tuple(range(words.ndim))
    return jax.lax.reduce(
      (first, second),
      (zero, zero),
      lambda a, b: (a[0] + b[0], a[1] + b[1]),
      axes,
    )

  return [one(x) for x in arrays]


def _mix(x: jax.Array) -> jax.Array:
  """Scatters uint32 bits one to one (the finaliser of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def flatten(tree) -> tuple[dict, dict]:
  """Plain arrays by key path, and the leaves that they stand for.

  Raises:
    ValueError: two leaves have the same key path.
  """
  arrays, leaves = {}, {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in leaves:
      raise ValueError(f"two leaves share the key path {name!r}")
    leaves[name] = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    arrays[name] = _key_data(leaf) if _is_key(leaf) else leaves[name]
  return arrays, leaves


def _is_key(leaf) -> bool:
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _key_data(key):
  """The numbers of a typed random key, or their abstract form."""
  if isinstance(key, jax.Array):
    return jax.random.key_data(key)
  data = jax.eval_shape(jax.random.key_data, key)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def describe(array, leaf, checksum: str) -> dict:
  """What the record says of one array."""
  entry = {"dtype": str(leaf.dtype), "shape": list(array.shape)}
  if _is_key(leaf):
    entry["key"] = str(jax.random.key_impl(leaf))
  return entry | {"checksum": checksum}


def targets(arrays: dict) -> dict:
  """Shape, dtype and sharding to restore each array with."""
  homes = [getattr(x, "sharding", None) for x in arrays.values()]
  meshes = [h.mesh for h in homes if isinstance(h, jax.NamedSharding)]
  if meshes:
    default = jax.NamedSharding(meshes[0], jax.P())
  else:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  targets = {}
  for (name, array), home in zip(arrays.items(), homes, strict=True):
    if home is None or not getattr(array, "committed", True):
      home = default
    targets[name] = jax.ShapeDtypeStruct(
      array.shape, array.dtype, sharding=home
    )
  return targets


def differing_leaves(stored: dict, targets: dict, leaves: dict) -> list[str]:
  """A line for every leaf that is missing, or of another dtype or shape."""
  have = {n: f"{e['dtype']}{e['shape']}" for n, e in stored.items()}
  want = {n: f"{leaves[n].dtype}{list(x.shape)}" for n, x in targets.items()}
  return [
    f"{name}: {have.get(name, 'nothing')} is stored, "
    f"{want.get(name, 'nothing')} is wanted"
    for name in sorted(have.keys() | want.keys())
    if have.get(name) != want.get(name)
  ]


def seal(record: dict) -> dict:
  """The record with a digest of itself."""
  record = {name: value for name, value in record.items() if name != "seal"}
  text = json.dumps(record, sort_keys=True)
  digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
  return json.loads(text) | {"seal": digest}
