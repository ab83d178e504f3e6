"""Meta's folders: in against a forward pass in NumPy, out, and damaged ones."""

import json
import os
import re
import signal

import forked
import jax
import jax.numpy as jnp
import numpy as np
import parameters
import pytest
from absl import logging

import mtp_jax
from mtp_jax import tokenizer
from mtp_jax.interchange import export, meta, streaming, torch_files
from mtp_jax.interchange import folders as lib_folders
from mtp_jax.model import surgery
from tests import meta_reference as reference
from tests import transformers_reference

BYTES = tokenizer.Bytes()


def write(folder, n, dtype="float32", change=None, **params):
  """A folder as Meta releases it, whose tokenizer is in the folder above."""
  folder.mkdir(parents=True)
  tensors = reference.tensors(n, dtype)
  if change:
    change(tensors)
  entries = {
    name: streaming.Entry(x.shape, str(x.dtype), lambda x=x: x)
    for name, x in tensors.items()
  }
  torch_files.write(folder / meta.WEIGHTS, entries)
  tree = json.loads(reference.params(n)) | params
  tree = {k: v for k, v in tree.items() if v != "left out"}
  (folder / meta.PARAMS).write_text(json.dumps(tree))
  for name, content in BYTES.files().items():
    (folder.parent / name).write_bytes(content)
  return folder


def raw(net):
  return [(str(x.dtype), np.asarray(x).tobytes()) for x in jax.tree.leaves(net)]


# Frequencies that some files store: for all layers, or in each.
STRAY = ("rope.freqs", "layers.0.attention.inner_attention.rope.freqs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Folders of one head and of four; the second has stray tensors."""

  def stray(tensors):
    for name in STRAY:
      tensors[name] = np.ones(2, np.float32)

  root = tmp_path_factory.mktemp("meta")
  return {1: write(root / "1", 1), 4: write(root / "4", 4, change=stray)}


@pytest.mark.parametrize("n", [1, 4])
def test_logits_are_those_of_the_format(folders, n):
  net, cfg, codec = mtp_jax.load(folders[n])
  assert (cfg.model.n_future, cfg.model.trunk_layers) == (n, 5 - n)
  assert cfg.model.mlp == reference.FFN and codec.vocab == 259
  tokens = np.random.default_rng(0).integers(0, 259, 40)
  want = reference.logits(reference.tensors(n), n, tokens)
  got = jax.jit(lambda net, tokens: net(tokens))(net, jnp.asarray(tokens[None]))
  np.testing.assert_allclose(got[:, 0], want, atol=1e-4)


def test_stray_tensors_are_named_in_the_log(folders, caplog, capsys):
  logging.use_absl_handler()
  old = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  try:
    with caplog.at_level("INFO", "absl"):
      mtp_jax.load(folders[4])
  finally:
    logging.set_verbosity(old)
  assert f"not used: {', '.join(STRAY)}" in caplog.text


def test_frequencies_count_for_no_dtype(tmp_path):
  def stray(tensors):
    for name in STRAY:
      tensors[name] = np.ones((2, 2), np.float32)

  folder = write(tmp_path / "model", 4, "float16", change=stray)
  assert meta.dtype(folder) == "float16"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(tmp_path, dtype):
  """Weights are the file's, and leave as they came."""
  folder = write(tmp_path / "theirs", 4, dtype)
  held = "bfloat16" if dtype == "bfloat16" else None
  net, *_ = mtp_jax.load(folder, dtype=held)
  x = reference.tensors(4, dtype)["extra_heads.2.feed_forward.w1.weight"]
  assert np.array_equal(np.asarray(net.heads.layers.w_gate[3], x.dtype), x.T)
  given = "float16" if dtype == "float16" else None
  export.save_meta(net, tmp_path / "ours", like=folder, dtype=given)
  compare(tmp_path / "ours", folder)


def compare(ours, theirs):
  """Both hold the same tensors, bit for bit."""
  a, b = (torch_files.read(path / meta.WEIGHTS) for path in (ours, theirs))
  assert a.keys() == b.keys() - set(STRAY)
  for name in a:
    x, y = a[name].read((...,)), b[name].read((...,))
    assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), name


def test_the_dtype_that_changes_no_value():
  matrix, vector = (2, 3), (3,)
  for kinds, want in (
    (("float16", "float16"), "float16"),
    (("float16", "float32"), "float32"),
    (("bfloat16", "bfloat16"), "bfloat16"),
    (("bfloat16", "float32"), "bfloat16"),  # norms are written as they are
    (("float32", "bfloat16"), "float32"),
  ):
    found = zip((matrix, vector), kinds, strict=True)
    assert streaming.exact_dtype(found) == want
  mixed = ((matrix, "float16"), (matrix, "bfloat16"))
  assert streaming.exact_dtype(mixed) == "float32"


@pytest.mark.parametrize("n", [1, 4])
def test_a_folder_comes_out_as_it_was(folders, tmp_path, n):
  net, cfg, codec = mtp_jax.load(folders[n])
  export.save_meta(net, tmp_path / "ours", codec=codec)
  compare(tmp_path / "ours", folders[n])
  again, found, _ = mtp_jax.load(tmp_path / "ours")
  assert found.model == cfg.model and raw(again) == raw(net)


def test_one_format_into_the_other_and_back(folders, tmp_path):
  net, *_ = mtp_jax.load(folders[4])
  mtp_jax.save(net, tmp_path / "hugging_face", like=folders[4])
  again, *_ = mtp_jax.load(tmp_path / "hugging_face")
  assert raw(again) == raw(net)
  file = tmp_path / "hugging_face" / "config.json"
  assert "max_position_embeddings" not in json.loads(file.read_text())
  export.save_meta(again, tmp_path / "meta", like=tmp_path / "hugging_face")
  compare(tmp_path / "meta", folders[4])


@pytest.mark.skipif(
  not transformers_reference.has_transformers(), reason="needs torch"
)
def test_files_that_torch_wrote_itself(folders, tmp_path):
  import torch

  tensors = {
    name: torch.from_numpy(x.astype(np.float32))
    for name, x in reference.tensors(4).items()
  }
  # As a transpose that is not contiguous.
  name = "layers.1.feed_forward.w2.weight"
  tensors[name] = tensors[name].T.contiguous().T
  folder = write(tmp_path / "torch", 4)
  torch.save(tensors, folder / meta.WEIGHTS)
  assert raw(mtp_jax.load(folder)[0]) == raw(mtp_jax.load(folders[4])[0])


@pytest.mark.parametrize("width, mlp", [(24, 64), (24, 83), (24, 1), (40, 256)])
def test_any_feed_forward_width_has_numbers(width, mlp):
  cfg = parameters.model_config(width=width, mlp=mlp, attn_heads=2).check()
  params = json.loads(json.dumps(meta.from_model(cfg)))
  assert meta.to_model(params) == cfg


def test_the_released_shape():
  """params.json of 7B_1T_4, as the paper's notes have it, and its tensors."""
  cfg = meta.to_model(
    {
      "dim": 4096,
      "ffn_dim_multiplier": 1.0,
      "multiple_of": 256,
      "n_future_tokens": 4,
      "n_heads": 32,
      "n_kv_heads": 32,
      "n_layers": 32,
      "norm_eps": 1e-5,
      "rope_theta": 10000.0,
      "vocab_size": 32000,
    }
  )
  found = {t.name: t.shape for t in meta.names.tensors(cfg, meta.names.META)}
  assert len(found) == 291
  assert found["layers.28.feed_forward.w1.weight"] == (11008, 4096)
  assert found["extra_heads.2.feed_forward.w2.weight"] == (4096, 11008)
  assert "layers.29.attention_norm.weight" not in found


def rename(old, new):
  return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def reshape(name, shape):
  return lambda tensors: tensors.__setitem__(name, np.ones(shape, "f4"))


NORM = "layers.1.attention_norm.weight"


@pytest.mark.parametrize(
  "change, params, text",
  [
    (
      rename(NORM, "a"),
      {},
      f"has no tensor '{NORM}', which its config makes [24]",
    ),
    (reshape(NORM, (25,)), {}, f"'{NORM}' is [25]; the config makes it [24]"),
    (
      lambda t: t.__setitem__(NORM, np.ones(24, np.float64)),
      {},
      f"tensor '{NORM}' is float64; supported are float32, float16, bfloat16",
    ),
    (
      None,
      {"dim": 48},
      "'tok_embeddings.weight' is [261, 24]; the config makes it [261, 48]",
    ),
    (
      reshape("layers.2.attention.wk.weight", (8, 24)),
      {},
      "has tensor 'layers.2.attention.wk.weight', [8, 24], which its",
    ),
    (None, {"n_layers": 6}, "has no tensor 'layers.2.attention_norm.weight'"),
    (None, {"n_layers": 10**9}, "too few for the 1000000000 layers"),
    (None, {"n_layers": 4}, "leaves 0 trunk layers under 4 parallel heads"),
    (None, {"n_future_tokens": 3}, "has no tensor 'layers.2."),
    (
      None,
      {"n_kv_heads": "left out"},
      "attention.wk.weight' is [8, 24]; the config makes it [24, 24]",
    ),
    (
      None,
      {"multiple_of": 8},
      "w1.weight' is [84, 24]; the config makes it [88, 24]",
    ),
    (
      None,
      {"ffn_dim_multiplier": None},
      "w1.weight' is [84, 24]; the config makes it [70, 24]",
    ),
    (
      None,
      {"vocab_size": 300},
      "'tok_embeddings.weight' is [261, 24]; the config makes it [300, 24]",
    ),
    (None, {"vocab_size": 100}, "has 259 ids, but the model 100"),
    (
      None,
      {"vocab_size": -2},
      "vocab_size is -2; it takes a whole number above 0",
    ),
    (
      None,
      {"vocab_size": -1},
      "'tok_embeddings.weight' is [261, 24]; the config makes it [259, 24]",
    ),
    (None, {"dim": "24"}, "dim is '24'; it takes a whole number above 0"),
    (None, {"dim": 24.5}, "dim is 24.5; it takes a whole number above 0"),
    (None, {"norm_eps": True}, "norm_eps is True; it takes a number above 0"),
    (None, {"dim": "left out"}, "dim is missing"),
    (None, {"use_scaled_rope": True}, "'use_scaled_rope' is not supported"),
  ],
)
def test_what_disagrees_is_refused_by_name(tmp_path, change, params, text):
  folder = write(tmp_path / "model", 4, change=change, **params)
  with pytest.raises(ValueError, match=re.escape(text)) as caught:
    mtp_jax.load(folder)
  assert str(folder) in str(caught.value) or "tokenizer" in str(caught.value)


def test_missing_and_damaged_files(tmp_path):
  folder = write(tmp_path / "model", 1)
  weights, params = folder / meta.WEIGHTS, folder / meta.PARAMS
  whole = weights.read_bytes()
  weights.write_bytes(whole[:-1000])
  with pytest.raises(ValueError, match="consolidated.pth is no whole file"):
    mtp_jax.load(folder)
  weights.unlink()
  with pytest.raises(ValueError, match="cannot read .*d.pth: No such file"):
    mtp_jax.load(folder)
  weights.write_bytes(whole)
  params.write_text("{")
  with pytest.raises(ValueError, match="params.json is not JSON"):
    mtp_jax.load(folder)
  params.unlink()
  with pytest.raises(ValueError, match="cannot read .*params.json"):
    mtp_jax.load(folder)


@pytest.mark.parametrize(
  "kind, fields, text",
  [
    ("causal", {}, "model.head is 'causal', but Meta's format has parallel"),
    ("parallel", {"qkv_bias": True}, "model.qkv_bias is True, of which Meta's"),
    ("parallel", {"sliding_window": 9}, "model.sliding_window is 9, of which"),
    (
      "parallel",
      {"attn_channels": 8},
      "attn_channels 8 times model.attn_heads",
    ),
  ],
)
def test_what_the_format_lacks_is_refused(kind, fields, text):
  cfg = parameters.model_config(kind, **fields).check()
  with pytest.raises(ValueError, match=re.escape(text)):
    meta.from_model(cfg)


def test_what_is_refused_leaves_nothing(tmp_path):
  net = parameters.random_model("causal")
  with pytest.raises(ValueError, match="parallel heads only"):
    export.save_meta(net, tmp_path / "model", codec=BYTES)
  net = parameters.random_model("parallel", n_future=2)
  with pytest.raises(ValueError, match="has 259 ids, but the model 31: the"):
    export.save_meta(net, tmp_path / "model", codec=BYTES)
  assert not os.listdir(tmp_path)


def test_a_folder_of_llama_2(tmp_path):
  """The tokenizer tells the vocabulary, and the file has a number."""

  def cut(tensors):
    for name in ("tok_embeddings.weight", "output.weight"):
      tensors[name] = tensors[name][:259]

  folder = write(
    tmp_path / "model", 1, change=cut, vocab_size=-1, n_future_tokens="left out"
  )
  want, *_ = mtp_jax.load(folder)
  assert want.cfg.vocab == 259
  (folder / meta.WEIGHTS).rename(folder / meta.FIRST)
  assert raw(mtp_jax.load(folder)[0]) == raw(want)
  (folder / "consolidated.01.pth").touch()
  with pytest.raises(ValueError, match="in parts, up to consolidated.01.pth"):
    mtp_jax.load(folder)


def test_the_length_that_a_model_is_for_goes_with_it(tmp_path):
  folder = write(tmp_path / "theirs", 1, max_seq_len=77)
  net, *_ = mtp_jax.load(folder)
  mtp_jax.save(net, tmp_path / "ours", like=folder)
  tree = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert tree["max_position_embeddings"] == 77


def test_convert(tmp_path, call):
  def convert(*arguments):
    return call(*arguments, module="experiments.convert")

  folder, output = write(tmp_path / "16", 4, "bfloat16"), tmp_path / "ours"
  model = f"--model={folder}"
  code, out, err = convert(model, f"--output={output}", "--heads=2")
  assert code == 0, err
  assert re.fullmatch(
    rf"{output}: 2 heads over 1 layers, Hugging Face's format, "
    r"0.\d MB in bfloat16\n",
    out,
  )
  net, cfg, _ = mtp_jax.load(output)
  assert cfg.model.n_future == 2
  want = surgery.drop_heads(mtp_jax.load(folder)[0], 2)
  assert raw(net) == raw(want)
  found = lib_folders.dtype(folder), lib_folders.dtype(output)
  assert found == ("bfloat16", "bfloat16")  # as it was
  new = f"--output={tmp_path / 'new'}"
  code, _, err = convert(model, new, "--heads=5", "--format=meta")
  assert code == 1 and err == f"error: --heads=5: {folder} has 4\n"


STOPPED = """
import os, signal
from experiments import convert
from experiments.startup import program
from mtp_jax.interchange import export

# All files are written; they are moved to their place next.
export.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
program.start(convert.main)
"""


def test_sigterm_leaves_nothing_half_written(tmp_path):
  folder = write(tmp_path / "model", 1)
  process = forked.Process(
    ["-c", STOPPED, f"--model={folder}", f"--output={tmp_path / 'out' / 'new'}"]
  )
  _, err = process.communicate()
  assert process.returncode == 128 + signal.SIGTERM, err
  assert list((tmp_path / "out").iterdir()) == []


def test_convert_refuses_before_it_reads_the_model(tmp_path, call):
  """There are no weights, of which an error would tell."""
  folder, qwen = write(tmp_path / "model", 1), tmp_path / "qwen"
  net = parameters.random_model("parallel", vocab=261, qkv_bias=True)
  mtp_jax.save(net, qwen, codec=BYTES)
  for weights in (folder / meta.WEIGHTS, qwen / "model.safetensors"):
    weights.unlink()
  (tmp_path / "dangling").symlink_to("nowhere")
  for model, output, text in (
    (folder, "dangling", "dangling exists: name a new folder"),
    (folder, "model/params.json/x", "x cannot be written: Not a directory"),
    (qwen, "new/x", "model.qkv_bias is True, of which Meta's format knows"),
  ):
    code, _, err = call(
      *(f"--model={model}", f"--output={tmp_path / output}"),
      *("--format=meta", "--heads=1"),
      module="experiments.convert",
    )
    assert code == 1 and text in err, err
  assert not (tmp_path / "new").exists()
