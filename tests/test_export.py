"""Models out as Hugging Face folders, and what comes back."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import parameters
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy

import mtp_jax
from mtp_jax import config, tokenizer
from mtp_jax.checkpoint import checkpoints
from mtp_jax.interchange import (
  export,
  extra_heads,
  hugging_face,
  hugging_face_config,
  model_card,
  streaming,
  tokenizer_files,
)
from tests import transformers_reference as reference

BYTES = tokenizer.Bytes()
SINGLE, INDEX = hugging_face.SINGLE, hugging_face.INDEX
# One kind of head each, and a family of models each.
MODELS = {
  "parallel": {"qkv_bias": True},
  "causal": {"qk_norm": True, "attn_channels": 10},
  "unembedding": {"sliding_window": 9, "extra_layers": 1},
}


class Wide(tokenizer.Bytes):
  vocab = 262


@pytest.fixture(scope="module")
def nets():
  return {
    kind: parameters.random_model(kind, vocab=261, **fields)
    for kind, fields in MODELS.items()
  }


@pytest.fixture(scope="module")
def written(nets, tmp_path_factory):
  """A folder of each model."""
  root = tmp_path_factory.mktemp("written")
  for kind, net in nets.items():
    mtp_jax.save(net, root / kind, codec=BYTES, notes="Drawn at random.")
  return root


def raw(net):
  """Name, dtype and bytes of every array."""
  return {
    jax.tree_util.keystr(path): (str(x.dtype), np.asarray(x).tobytes())
    for path, x in jax.tree_util.tree_leaves_with_path(net)
  }


def tensors(file):
  read = safetensors_numpy.load_file(file)
  return {name: (x.dtype, x.shape, x.tobytes()) for name, x in read.items()}


def copy(folder, target):
  target.mkdir()
  for file in folder.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
  return target


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_written_is_read_again(nets, written, kind):
  net, cfg, codec = mtp_jax.load(written / kind)
  assert raw(net) == raw(nets[kind])
  assert (cfg.model.head, cfg.model.n_future) == (kind, 3)
  assert codec.encode("né").tolist() == BYTES.encode("né").tolist()
  assert {p.name for p in written.iterdir()} == {*MODELS}


@pytest.mark.parametrize("kind", MODELS)
def test_the_folder_is_what_transformers_expects(written, kind):
  """Names and shapes of tensors; head 1 alone is in the model's file."""
  tree = json.loads((written / kind / "config.json").read_text())
  found = safetensors_numpy.load_file(written / kind / SINGLE)
  assert {k: x.shape for k, x in found.items()} == reference.shapes(tree)
  with safetensors.safe_open(written / kind / SINGLE, "np") as file:
    assert file.metadata() == {"format": "pt"}


@pytest.mark.skipif(
  not reference.has_transformers(), reason="needs torch and transformers"
)
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_the_same(nets, written, kind):
  import torch
  import transformers

  net = transformers.AutoModelForCausalLM.from_pretrained(
    written / kind, dtype=torch.float32, attn_implementation="eager"
  )
  ids = np.random.default_rng(0).integers(0, 256, (1, 50))
  with torch.no_grad():
    want = net(torch.tensor(ids)).logits.numpy()
  got = jax.jit(lambda net, ids: net(ids))(nets[kind], jnp.asarray(ids))
  np.testing.assert_allclose(got[0], want, atol=1e-4)
  codec = transformers.AutoTokenizer.from_pretrained(written / kind)
  assert codec("né")["input_ids"] == [BYTES.bos, *BYTES.encode("né")]


LONG = {"rope_length": 16, "rope_factor": 4.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
  "fields",
  [
    {"width": 25, "attn_heads": 4, "attn_channels": 6, "kv_heads": 2},
    {"qkv_bias": True, "sliding_window": 9},
    {"qk_norm": True, "attn_channels": 8, "sliding_window": 9},
    {"rope_scaling": "linear", "rope_factor": 2.5, "rope_length": 16},
    {"rope_scaling": "dynamic", **LONG},
    {"rope_scaling": "llama3", "rope_slow": 1.5, "rope_fast": 5.0, **LONG},
    {"rope_scaling": "yarn", "rope_attention": 1.3, "rope_fast": 9.0, **LONG},
  ],
)
def test_a_config_is_read_again(fields):
  cfg = parameters.model_config(n_future=1, **{"rope_length": 9} | fields)
  tree = json.loads(json.dumps(hugging_face_config.from_model(cfg.check())))
  assert hugging_face_config.to_model(tree) == cfg.check()


def theirs(folder, dtype):
  """A folder of others: a tied model, a tokenizer, a licence and a card."""
  folder.mkdir()
  tree = reference.config_of("mistral, linear, tied") | {"vocab_size": 261}
  rounded = {
    k: x.astype(jnp.dtype(dtype)) for k, x in reference.tensors(tree).items()
  }
  safetensors_numpy.save_file(rounded, folder / SINGLE)
  tree |= {"dtype": dtype, "initializer_range": 0.03}
  (folder / "config.json").write_text(json.dumps(tree))
  for name, content in tokenizer_files.of(BYTES).items():
    (folder / name).write_bytes(content)
  (folder / "README.md").write_text("---\nlicense: mit\n---\nTheir card.\n")
  (folder / "LICENSE.txt").write_text("MIT")
  return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_of_others_comes_out_as_it_was(tmp_path, monkeypatch, dtype):
  monkeypatch.setattr(hugging_face, "PART_BYTES", 9000)
  folder, ours = theirs(tmp_path / "theirs", dtype), tmp_path / "ours"
  net, *_ = mtp_jax.load(folder, dtype=dtype)
  mtp_jax.save(net, ours, like=folder)
  got, listed = {}, json.loads((ours / INDEX).read_text())["weight_map"]
  assert len(set(listed.values())) > 3
  for name in set(listed.values()):
    part = tensors(ours / name)
    assert all(listed[tensor] == name for tensor in part)
    got |= part
  assert got == tensors(folder / SINGLE)
  for name in ("tokenizer.json", "generation_config.json", "LICENSE.txt"):
    assert (ours / name).read_bytes() == (folder / name).read_bytes()
  # With what this library does not read.
  assert json.loads((ours / "config.json").read_text()) == json.loads(
    (folder / "config.json").read_text()
  )
  card = (ours / "README.md").read_text()
  assert "license: mit\n" in card and "the folder `theirs`" in card
  assert "Their card." in (ours / model_card.PREVIOUS).read_text()
  assert raw(mtp_jax.load(ours, dtype=dtype)[0]) == raw(net)


def test_settings_of_generation_stay_with_their_model(tmp_path):
  folder = theirs(tmp_path / "theirs", "float32")
  file = folder / "generation_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": 7}))
  net, _, codec = mtp_jax.load(folder)
  for i, (like, has) in enumerate(((folder, True), (None, False))):
    mtp_jax.save(net, tmp_path / f"{i}", like=like, codec=codec)
    found = json.loads((tmp_path / f"{i}" / file.name).read_text())
    assert (found.get("top_k") == 7) == has
  for record, is_new in (({"init": {"path": "theirs"}}, False), ({}, True)):
    run = model_card.Source("workdir", codec=codec, record=record)
    assert export._is_new(codec, run) == is_new
    assert export._is_new(BYTES, run)  # made for yet another


def test_a_tied_model_that_is_so_no_more_is_written_untied(tmp_path):
  folder = theirs(tmp_path / "theirs", "float32")
  net, *_ = mtp_jax.load(folder)
  net.heads.unembed = net.heads.unembed.replace(
    net.heads.unembed[...].at[0, 0].multiply(-1)
  )
  mtp_jax.save(net, tmp_path / "ours", like=folder)
  tree = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert tree["tie_word_embeddings"] is False
  assert raw(mtp_jax.load(tmp_path / "ours")[0]) == raw(net)


def test_a_model_of_another_shape_still_names_its_end_tokens(tmp_path):
  """Where config.json is made anew."""
  folder = theirs(tmp_path / "theirs", "float32")
  net = parameters.random_model("parallel", n_future=1, vocab=264)
  mtp_jax.save(net, tmp_path / "ours", like=folder)
  tree = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert "initializer_range" not in tree
  assert tree["eos_token_id"] == BYTES.eos
  assert tree["bos_token_id"] == BYTES.bos


def test_norms_that_16_bits_do_not_have_stay(nets, tmp_path):
  def rounded(path, x):
    if "norm" in jax.tree_util.keystr(path):
      return x
    return jnp.asarray(np.asarray(x).astype(jnp.bfloat16))

  net = jax.tree_util.tree_map_with_path(rounded, nets["causal"])
  mtp_jax.save(net, tmp_path / "ours", codec=BYTES)
  for name, (kind, *_) in tensors(tmp_path / "ours" / SINGLE).items():
    assert kind == ("float32" if "norm" in name else "bfloat16"), name


@pytest.mark.parametrize(
  "kind, fields, arguments, text",
  [
    ("linear", {}, {}, "'linear' .* head 1 is not a transformer layer"),
    ("anticausal", {}, {}, "'anticausal' .* head 1 reads the other heads"),
    (
      "parallel",
      {"qkv_bias": True, "qk_norm": True},
      {},
      "both model.qkv_bias .* and model.qk_norm",
    ),
    ("parallel", {}, {"codec": None}, "give `codec`, or the folder"),
    (
      "parallel",
      {},
      {"codec": Wide()},
      "tokenizer has 262 ids, but the model 261",
    ),
    ("parallel", {}, {"dtype": "int8"}, "dtype='int8': choose float32"),
    (
      "parallel",
      {"deviation": 1e6},
      {"dtype": "float16"},
      "which float16 cannot",
    ),
    ("parallel", {}, {"path": "."}, "exists: name a new folder"),
    ("parallel", {}, {"path": "file/x"}, "file/x cannot be written: "),
    ("parallel", {}, {"path": "new/a\udcff"}, "udcff' is not valid UTF-8"),
    ("parallel", {}, {"path": "new/a\0"}, "null character"),
  ],
)
def test_what_cannot_be_written_leaves_nothing(
  nets, tmp_path, monkeypatch, kind, fields, arguments, text
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").touch()
  net = nets["parallel"]
  if fields or kind != "parallel":
    net = parameters.random_model(kind, **{"vocab": 261} | fields)
  arguments = {"path": "model", "codec": BYTES} | arguments
  with pytest.raises(ValueError, match=text):
    mtp_jax.save(net, **arguments)
  assert os.listdir() == ["file"]


def test_a_number_that_float16_lacks_is_refused_from_bfloat16_too(
  nets, tmp_path
):
  net = nets["parallel"]
  net = streaming.cast(net, net.cfg, "bfloat16")
  net.embed = net.embed.replace(net.embed[...].at[0, 0].set(1e30))
  with pytest.raises(ValueError, match="holds 1e.30, which float16 cannot"):
    mtp_jax.save(net, tmp_path / "model", codec=BYTES, dtype="float16")


def test_of_two_that_write_one_folder_the_first_wins(
  nets, tmp_path, monkeypatch
):
  rename, model = os.rename, tmp_path / "model"

  def late(source, target):
    monkeypatch.setattr(os, "rename", rename)
    mtp_jax.save(nets["parallel"], model, codec=BYTES)
    rename(source, target)

  monkeypatch.setattr(os, "rename", late)
  with pytest.raises(ValueError, match="exists by now, made by another"):
    mtp_jax.save(nets["causal"], model, codec=BYTES)
  assert os.listdir(tmp_path) == ["model"]
  assert mtp_jax.load(model)[1].model.head == "parallel"


def test_a_full_disk_leaves_nothing(nets, tmp_path, monkeypatch):
  def full(number):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(ValueError, match="model cannot be written: No space"):
    mtp_jax.save(nets["parallel"], tmp_path / "model", codec=BYTES)
  assert not os.listdir(tmp_path)


def test_what_lies_beside_is_no_hindrance_and_stays(nets, tmp_path):
  """A user's folders, and those of a program that was killed or still runs."""
  others = {"model.partial", ".model.killed"}
  for name in others:
    (tmp_path / name).mkdir()
    (tmp_path / name / SINGLE).write_bytes(b"half")
  mtp_jax.save(nets["parallel"], tmp_path / "model", codec=BYTES)
  assert {*os.listdir(tmp_path)} == {"model", *others}
  for name in others:
    assert (tmp_path / name / SINGLE).read_bytes() == b"half"
    assert (tmp_path / name).stat().st_mode == (
      tmp_path / "model"
    ).stat().st_mode


def cut(file):
  file.write_bytes(file.read_bytes()[:-1])


def lengthen(file):
  """Has the header say that it is of 2**60 bytes."""
  file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def without(name, metadata=None):
  """Writes the file of heads again: without a tensor, with other metadata."""

  def change(file):
    with safetensors.safe_open(file, "np") as opened:
      found = opened.metadata() | (metadata or {})
    read = safetensors_numpy.load_file(file)
    read.pop(name, None)
    safetensors_numpy.save_file(read, file, metadata and found)

  return change


KEY = "model.extra_heads.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
  "damage, text",
  [
    (cut, "no whole safetensors file"),
    (lengthen, "no whole safetensors file"),
    (without(None), "format is None, not 'mtp_jax.heads'"),
    (without(None, {"version": "2"}), "version '2' of its format; this"),
    (without(None, {"head": "linear"}), "head is 'linear'; it takes one of"),
    (without(None, {"n_future": "1"}), "n_future is '1'; it takes 2 to 1000"),
    (without(None, {"n_future": "-2"}), "n_future is '-2'; it takes 2"),
    (without(KEY, {"a": "b"}), f"has no tensor '{KEY}'"),
    (without(None, {"n_future": "4"}), "no tensor 'model.extra_heads.2.input"),
    (without(None, {"n_future": "2"}), "has tensor 'model.extra_heads.1.input"),
    (without(None, {"head": "unembedding"}), "extra_heads.0.lm_head.weight"),
  ],
)
def test_damaged_heads_are_refused_by_name(written, tmp_path, damage, text):
  folder = copy(written / "parallel", tmp_path / "copy")
  damage(folder / extra_heads.NAME)
  with pytest.raises(ValueError, match=re.escape(text)):
    mtp_jax.load(folder)


def test_without_their_file_there_is_one_head(nets, written, tmp_path):
  folder = copy(written / "parallel", tmp_path / "copy")
  (folder / extra_heads.NAME).unlink()
  net, cfg, _ = mtp_jax.load(folder)
  assert cfg.model.n_future == 1
  assert np.array_equal(net.trunk.wq, nets["parallel"].trunk.wq)
  assert np.array_equal(
    net.heads.layers.wq, nets["parallel"].heads.layers.wq[:1]
  )


def test_the_card_says_what_is_known_of_the_training(written, tmp_path):
  record = {
    "config": {
      "data": {"source": "text", "path": "~/books", "batch": 3, "seq_len": 32},
      "train": {"steps": 70, "freeze": "trunk"},
    },
    "data": {"train": "abc"},
    "init": {
      "path": "models/small",
      "fingerprint": "123",
      "heads": "head 2 is new, copied from head 1",
    },
  }
  source = model_card.Source("workdir", tmp_path / "run", step=5, record=record)
  text = source.origin()
  for part in (
    "run of mtp_jax, `run`",
    "step 5 of 70, each of 3 sequences of 32 tokens, on text of `books`",
    "did not change the trunk",
    "the weights of `small` (fingerprint 123); head 2 is new",
  ):
    assert part in text
  assert "Drawn at random." in (written / "causal" / "README.md").read_text()


def test_the_card_names_the_step_of_the_checkpoint(tmp_path):
  cfg = config.Config(train=config.Train(steps=900)).check()
  record = {
    "config": dataclasses.asdict(cfg),
    "tokenizer": BYTES.fingerprint,
    "data": {"train": "abc"},
  }
  with checkpoints.Checkpoints(tmp_path / "checkpoints") as saved:
    for step in (2, 5):
      saved.save(step, {"w": jnp.ones(3)}, record)
  for given, step in ((2, 2), (None, 5)):
    source = model_card.Source.of(tmp_path, given)
    assert f"step {step} of 900, each of 16 sequences" in source.origin()
    assert model_card.Source.of(source) is source


def test_byte_ids_as_tokenizer_json(written):
  codec = tokenizer.load(str(written / "causal"))
  text = "".join(map(chr, [*range(300), 0x20AC, 0x1F600, 0x2581]))
  assert np.array_equal(codec.encode(text), BYTES.encode(text))
  ids = np.random.default_rng(0).integers(0, 259, 500)
  assert codec.decode_bytes(ids) == BYTES.decode_bytes(ids)
  for name in ("bos", "eos", "pad", "vocab", "ends", "prefix"):
    assert getattr(codec, name) == getattr(BYTES, name)
