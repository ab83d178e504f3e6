"""Hugging Face folders in: each family equals transformers; bad folders."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from mtp_jax.interchange import hugging_face, hugging_face_config, names
from tests import transformers_reference as reference

SINGLE, INDEX = hugging_face.SINGLE, hugging_face.INDEX


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """The folder of each case."""
  root = tmp_path_factory.mktemp("models")
  return {
    case: reference.write(case, root / str(i))
    for i, case in enumerate(reference.CASES)
  }


def load(folder, **settings):
  return hugging_face.load(folder, hugging_face.settings(folder), **settings)


def read(folder):
  return safetensors_numpy.load_file(folder / SINGLE)


def leaves(net):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(net)
  }


@pytest.mark.parametrize("case", reference.CASES)
def test_logits_are_those_of_transformers(folders, case):
  want = reference.reference(case)["logits"]
  tokens = jnp.asarray(reference.window()[None])
  got = jax.jit(lambda net, tokens: net(tokens))(load(folders[case]), tokens)
  got = got[0, 0, jnp.asarray(reference.PLACES)]
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.skipif(
  not reference.has_transformers(), reason="needs torch and transformers"
)
@pytest.mark.parametrize("case", reference.CASES)
def test_the_record_is_what_transformers_computes(case):
  recorded, live = reference.recorded(case), reference.live(case)
  assert recorded["tokens"] == live["tokens"]
  for name in ("logits", "logprob"):
    np.testing.assert_allclose(recorded[name], live[name], atol=2e-5)


@pytest.mark.parametrize(
  ("family", "heads"),
  [("mistral, linear, tied", 8), ("qwen2, yarn", 32), ("qwen3, llama3", 32)],
)
def test_key_heads_that_a_config_does_not_name(family, heads):
  """As transformers: a null is the number of attention heads."""
  tree = reference.config_of(family) | {
    "num_attention_heads": 64,
    "hidden_size": 512,
    "num_key_value_heads": None,
  }
  assert hugging_face_config.to_model(tree).kv_heads == 64
  del tree["num_key_value_heads"]
  assert hugging_face_config.to_model(tree).kv_heads == heads


@pytest.mark.parametrize("case", reference.CASES)
def test_the_table_reads_both_ways(folders, case):
  cfg, file = hugging_face.settings(folders[case]), read(folders[case])
  for tensor in names.tensors(cfg, names.HUGGING_FACE):
    if tensor.name in file:
      x = file[tensor.name]
      assert np.array_equal(tensor.to_file(tensor.to_ours(x)), x), tensor.name


def test_metas_channels_lie_as_ours(folders):
  """The two formats differ in the order of a query's and a key's channels."""
  cfg, file = hugging_face.settings(folders["llama"]), read(folders["llama"])
  ours = names.tensors(cfg, names.HUGGING_FACE)
  for a, b in zip(ours, names.tensors(cfg, names.META), strict=True):
    written = b.to_file(a.to_ours(file[a.name]))
    same = np.array_equal(written, file[a.name])
    assert same == (a.entry.ours not in ("wq", "wk")), b.name
  assert written.shape == b.shape and b.name == "output.weight"


def in_parts(folder, target, parts=3):
  """A copy of the folder with the weights in several files."""
  target.mkdir()
  (target / "config.json").write_bytes((folder / "config.json").read_bytes())
  tensors, listed = read(folder), {}
  for i in range(parts):
    name = f"model-{i + 1:05}-of-{parts:05}.safetensors"
    own = {k: tensors[k] for k in sorted(tensors)[i::parts]}
    safetensors_numpy.save_file(own, target / name)
    listed |= dict.fromkeys(own, name)
  (target / INDEX).write_text(json.dumps({"weight_map": listed}))
  return target


def test_weights_in_several_files(folders, tmp_path):
  want = leaves(load(folders["qwen2, yarn"]))
  got = leaves(load(in_parts(folders["qwen2, yarn"], tmp_path / "parts")))
  assert want.keys() == got.keys()
  assert all(np.array_equal(got[k], want[k]) for k in want)


def test_weights_in_16_bits(folders, tmp_path):
  """float16 and bfloat16 in one file, as float32 and kept in bfloat16."""
  folder = folders["mistral, linear, tied"]
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  file = read(folder)
  dtypes = {k: np.float16 if "proj" in k else ml_dtypes.bfloat16 for k in file}
  rounded = {k: x.astype(dtypes[k]) for k, x in file.items()}
  safetensors_numpy.save_file(rounded, tmp_path / SINGLE)
  cfg = hugging_face.settings(folder)
  exact, got = leaves(load(folder)), leaves(load(tmp_path))
  kept = leaves(load(tmp_path, dtype="bfloat16"))
  for tensor in names.tensors(cfg, names.HUGGING_FACE)[:-1]:
    key = f".{tensor.parameter}.value"
    want, x, small = exact[key], got[key], kept[key]
    assert x.dtype == np.float32
    assert np.array_equal(x, want.astype(dtypes[tensor.name])), key
    if "norm" in key:
      assert small.dtype == np.float32 and np.array_equal(small, x)
    else:
      assert small.dtype == jnp.bfloat16
      assert np.array_equal(small, x.astype(jnp.bfloat16))


def test_tied_embeddings_are_two_arrays(folders):
  net = load(folders["mistral, linear, tied"])
  assert np.array_equal(net.heads.unembed[...].T, net.embed[...])


SHARDED = """
import pathlib, sys
import jax, numpy as np
from mtp_jax import config, sharding
from mtp_jax.interchange import hugging_face
folder = pathlib.Path(sys.argv[1])
cfg = hugging_face.settings(folder)
mesh = sharding.make_mesh(config.Mesh(data=2, model=2))
whole = hugging_face.load(folder, cfg)
net = hugging_face.load(folder, cfg, mesh=mesh)
for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(net), strict=True):
  assert np.array_equal(a, b)
want = jax.tree.leaves(sharding.shardings(net, mesh))
for a, b in zip(jax.tree.leaves(net), want, strict=True):
  assert a.sharding.is_equivalent_to(b, a.ndim)
print(net.trunk.wq.sharding.shard_shape(net.trunk.wq.shape))
try:
  hugging_face.load(folder, cfg, mesh=sharding.make_mesh(
    config.Mesh(data=1, model=4)))
except ValueError as error:
  print(error)
"""


def test_weights_go_straight_onto_a_mesh(folders, tmp_path, run_with_devices):
  config = reference.config_of("qwen2, yarn") | {"vocab_size": 64}
  (tmp_path / "config.json").write_text(json.dumps(config))
  safetensors_numpy.save_file(reference.tensors(config), tmp_path / SINGLE)
  out = run_with_devices(4, SHARDED, str(tmp_path)).splitlines()
  assert out[0] == "(1, 16, 2, 8)"
  assert out[1].startswith("kv_heads 2 is not divisible by 4 devices")


PEAK = """
import pathlib, sys
import jax
from mtp_jax.interchange import hugging_face

def memory(name):
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(x.split()[1]) for x in lines if x.startswith(name)) << 10

small, folder = map(pathlib.Path, sys.argv[1:])
hugging_face.load(small, hugging_face.settings(small))
cfg = hugging_face.settings(folder)
before = memory("VmRSS")
net = hugging_face.load(folder, cfg)
jax.block_until_ready(net)
print(memory("VmHWM") - before, sum(a.nbytes for a in jax.tree.leaves(net)))
"""


@pytest.mark.parametrize(
  ("scale", "layers", "spare"),
  [
    # Compiling takes some 40 MB, and the largest tensor 8; a copy of the
    # stacked layers would take 117.
    (1, 8, 80e6),
    # A file of 2.6 GB. The largest tensor takes 134 MB here.
    pytest.param(4, 18, 400e6, marks=pytest.mark.slow),
  ],
)
def test_one_tensor_at_a_time_is_in_memory(
  folders, tmp_path, run_with_devices, scale, layers, spare
):
  sizes = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048}
  sizes = {name: scale * size for name, size in sizes.items()}
  config = reference.config_of("llama") | sizes | {"num_hidden_layers": layers}
  config |= {"num_attention_heads": 8, "num_key_value_heads": 8}
  (tmp_path / "config.json").write_text(json.dumps(config))
  shapes = reference.shapes(config)
  ones = {k: np.ones(shape, ml_dtypes.bfloat16) for k, shape in shapes.items()}
  safetensors_numpy.save_file(ones, tmp_path / SINGLE)
  out = run_with_devices(1, PEAK, str(folders["llama"]), str(tmp_path))
  peak, held = map(int, out.split())
  assert held == 4 * sum(map(np.prod, shapes.values()))
  assert peak < held + spare
