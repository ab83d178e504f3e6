"""Names, shapes, dtypes and checksums of the arrays of a checkpoint."""

import hashlib
import json
import math

import jax
import jax.numpy as jnp


def checksums(arrays: list[jax.Array]) -> list[str]:
  """A checksum per array, equal for every sharding and number of processes.

  An array is read as uint32 words w; 8- and 16-bit values are widened. The
  checksum is a pair of sums Σ f(w[i], i) mod 2^32, with two functions f that
  mix all bits of w[i] with the flat position i. Both are injective in w[i], so
  a change to a single word always changes both sums. Other damage, such as
  swapped words, is missed with a probability of about 2^-64. (The simpler
  Σ w[i]·h(i) with odd h(i) misses two flipped top bits.)

  Each device sums its own shards, in one call for all arrays; no array is
  gathered. Positions repeat beyond 2^32 elements, so a swap of two words at
  equal positions is missed there.

  Args:
    arrays: arrays of any shape and plain dtype, on the devices of one mesh.

  Returns:
    Per array 16 hexadecimal digits.
  """
  sums = jax.device_get(jax.block_until_ready(_sums(arrays)))
  return [f"{int(a):08x}{int(b):08x}" for a, b in sums]


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  return [_sum(x) for x in arrays]


# Jitted, so that it is traced once for all arrays of a shape and dtype: a
# parameter and its moments.
@jax.jit
def _sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
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


def _mix(x: jax.Array) -> jax.Array:
  """Scatters uint32 bits one to one (the finaliser of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def flatten(tree) -> tuple[dict, dict]:
  """Flattens a pytree into dicts by key path.

  Returns:
    (arrays, leaves). They differ at typed random keys, of which `arrays` holds
    the key data.

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
  """The data of a typed random key, abstract if the key is."""
  if isinstance(key, jax.Array):
    return jax.random.key_data(key)
  data = jax.eval_shape(jax.random.key_data, key)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def describe(array, leaf, checksum: str) -> dict:
  """The entry of one array in the record."""
  entry = {"dtype": str(leaf.dtype), "shape": list(array.shape)}
  if _is_key(leaf):
    entry["key"] = str(jax.random.key_impl(leaf))
  return entry | {"checksum": checksum}


def targets(arrays: dict) -> dict:
  """A ShapeDtypeStruct, with a sharding, to restore each array to.

  Arrays without a sharding get one that replicates them over the mesh of the
  others, or over the first device if there is no mesh.
  """
  shardings = [getattr(x, "sharding", None) for x in arrays.values()]
  meshes = [s.mesh for s in shardings if isinstance(s, jax.NamedSharding)]
  if meshes:
    default = jax.NamedSharding(meshes[0], jax.P())
  else:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  targets = {}
  for (name, array), sharding in zip(arrays.items(), shardings, strict=True):
    if sharding is None or not getattr(array, "committed", True):
      sharding = default
    targets[name] = jax.ShapeDtypeStruct(
      array.shape, array.dtype, sharding=sharding
    )
  return targets


def differing_leaves(stored: dict, targets: dict, leaves: dict) -> list[str]:
  """One line per leaf that is missing or has another dtype or shape."""
  have = {n: f"{e['dtype']}{e['shape']}" for n, e in stored.items()}
  want = {n: f"{leaves[n].dtype}{list(x.shape)}" for n, x in targets.items()}
  return [
    f"{name}: {have.get(name, 'nothing')} is stored, "
    f"{want.get(name, 'nothing')} is wanted"
    for name in sorted(have.keys() | want.keys())
    if have.get(name) != want.get(name)
  ]


def seal(record: dict) -> dict:
  """`record` with "seal", a digest of the rest of it."""
  record = {name: value for name, value in record.items() if name != "seal"}
  text = json.dumps(record, sort_keys=True)
  digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
  return json.loads(text) | {"seal": digest}
