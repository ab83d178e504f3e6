"""`mtp_jax.load`: which folders hold a model, and what is wrong with others."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from safetensors import numpy as safetensors_numpy

import mtp_jax
from mtp_jax.checkpoint import checkpoints
from mtp_jax.interchange import extra_heads, folders, hugging_face
from tests import transformers_reference as reference

SINGLE, INDEX = hugging_face.SINGLE, hugging_face.INDEX


@pytest.fixture
def folder(tmp_path):
  """A Hugging Face folder with a tokenizer of 61 ids, the last of them eos."""
  words = {f"{i}": i for i in range(60)} | {"<eos>": 60}
  model = tokenizers.models.BPE(words, [])
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  target = reference.write("llama", tmp_path / "model")
  tokenizer.save(str(target / "tokenizer.json"))
  (target / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
  return target


def refused(path, *texts, kind=ValueError, **settings):
  """Loading fails in one line that holds the texts."""
  with pytest.raises(kind) as error:
    mtp_jax.load(path, **settings)
  line = str(error.value)
  assert "\n" not in line
  for text in texts:
    assert text in line, line
  return line


def changed(folder, change):
  """Saves the folder's tensors after `change(tensors)`."""
  tensors = safetensors_numpy.load_file(folder / SINGLE)
  change(tensors)
  safetensors_numpy.save_file(tensors, folder / SINGLE)


def test_a_hugging_face_folder_loads_and_prints_nothing(folder, capfd):
  net, cfg, codec = mtp_jax.load(str(folder))
  assert capfd.readouterr() == ("", "")
  assert cfg.data.tokenizer == str(folder / "tokenizer.json")
  assert codec.vocab == 61 == cfg.model.vocab
  assert (cfg.model.layers, cfg.model.n_future) == (2, 1)
  assert cfg.check() == cfg and net.cfg == cfg.model
  kept, small, _ = mtp_jax.load(folder, dtype="bfloat16")
  assert small.model.dtype == "bfloat16" == kept.embed.dtype
  assert kept.heads.norm.dtype == np.float32
  assert jax.tree.structure(kept) != jax.tree.structure(net)
  refused(folder, "dtype='float16'", "float32, bfloat16", dtype="float16")
  refused(folder, "step=3", "no workdir", step=3)


def test_folders_without_a_model_say_what_was_looked_for(tmp_path):
  kind = checkpoints.CheckpointError
  texts = "config.json", "model_type", SINGLE, "no run in", "`checkpoints`"
  refused(tmp_path, *texts, kind=kind)
  for path in (tmp_path / "none", "/none", "../none", "tests/none"):
    assert "Hub" not in refused(path, "does not exist", kind=kind)
  texts = "does not exist", "hf download name/model --local-dir"
  refused("name/model", *texts, kind=kind)
  refused(__file__, "is a file", kind=kind)
  (tmp_path / SINGLE).write_bytes(b"")
  refused(tmp_path, "cannot read", "config.json", "No such file")


def test_tensors_that_do_not_fit_are_named_with_both_shapes(folder):
  name = "model.layers.1.mlp.up_proj.weight"
  changed(folder, lambda t: t.update({name: t[name][:-1]}))
  refused(folder, name, "[47, 32]", "[48, 32]")
  changed(folder, lambda t: t.pop(name))
  refused(folder, "no tensor", name, "[48, 32]")
  changed(folder, lambda t: t.update({name: np.zeros((48, 32), np.int32)}))
  refused(folder, name, "I32", "F32, F16, BF16")
  changed(folder, lambda t: t.update({name: np.zeros((48, 32), np.float32)}))
  changed(folder, lambda t: t.update({"score.weight": np.ones(3)[:2]}))
  refused(folder, "score.weight", "F64")
  score = np.ones((2, 32), np.float32)
  changed(folder, lambda t: t.update({"score.weight": score}))
  refused(folder, "score.weight", "[2, 32]", "which its config does not")
  changed(folder, lambda t: t.pop("score.weight"))
  computed = "model.layers.0.self_attn.rotary_emb.inv_freq"
  changed(folder, lambda t: t.update({computed: np.ones(4, np.float32)}))
  folders.load(folder)
  changed(folder, lambda t: t.pop("lm_head.weight"))
  refused(folder, "no tensor 'lm_head.weight'", "[61, 32]")


def test_damaged_files_are_refused_in_a_line(folder):
  file = folder / SINGLE
  whole = file.read_bytes()
  for data in (
    *(b"", whole[:7], whole[:99], whole[:-1], whole + b"0"),
    *(b"\xff" * 8 + whole[8:], (2**40).to_bytes(8, "little") + whole[8:]),
    (len(whole) - 7).to_bytes(8, "little") + whole[8:],
    whole.replace(b'"F32"', b'"F99"', 1),
    whole.replace(b'"shape":[61,32]', b'"shape":[61,33]', 1),
  ):
    file.write_bytes(data)
    refused(folder, str(file), "no whole safetensors file")
  file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:")
  refused(folder, str(file), "a pointer of Git LFS", "git lfs pull")
  file.unlink()
  refused(folder, f"neither {SINGLE} nor {INDEX}")
  part = folder / "model-00001-of-00002.safetensors"
  part.write_bytes(whole)
  refused(folder, f"has {part.name}, but no {INDEX}")
  part.unlink()
  file.symlink_to(folder / "gone")
  refused(folder, f"{file} is a link to nothing")
  file.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"")
  refused(folder, "save the model as safetensors")


def test_a_failed_read_is_not_damage(folder, monkeypatch):
  def fail(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(hugging_face.safetensors, "safe_open", fail)
  refused(folder, f"cannot read {folder / SINGLE}: Input/output error")


def test_an_index_names_files_beside_it(folder):
  names = list(safetensors_numpy.load_file(folder / SINGLE))
  (folder / "part").write_bytes((folder / SINGLE).read_bytes())
  (folder / SINGLE).rename(folder / "other")

  def index(text):
    (folder / INDEX).write_text(text if type(text) is str else json.dumps(text))

  for text in ("{", "[]", "[" * 99_999, {}, {"weight_map": {}}):
    index(text)
    refused(folder, INDEX)
  for name in ("../model/part", "/etc/passwd", "..", "", "missing"):
    index({"weight_map": dict.fromkeys(names, name)})
    refused(folder, INDEX, name)
  index({"weight_map": {name: ["part"] for name in names}})
  refused(folder, INDEX, "weight_map")
  index({"weight_map": dict.fromkeys(names, "part") | {"more": "part"}})
  refused(folder, INDEX, "'more'", "does not hold it")
  index({"weight_map": dict.fromkeys(names, "part") | {"more": "other"}})
  refused(folder, "is in", "other and in", "part")
  index({"weight_map": dict.fromkeys(names, "part")})
  mtp_jax.load(folder)


def test_a_single_file_goes_before_an_index(folder):
  """As in transformers, which then reads no index."""
  (folder / INDEX).write_text("{")
  mtp_jax.load(folder)


def test_more_layers_than_tensors_are_refused_at_once(folder):
  config = reference.config_of("llama") | {"num_hidden_layers": 10**9}
  (folder / "config.json").write_text(json.dumps(config))
  refused(folder, "tensors, too few for the 1000000000 layers")


YARN = {"rope_scaling": {"rope_type": "yarn"}}


@pytest.mark.parametrize(
  "changes, texts",
  [
    ({"model_type": "mixtral"}, ["'mixtral'", "llama, mistral, qwen2, qwen3"]),
    ({"model_type": ["llama"]}, ["model_type ['llama']"]),
    ({"num_local_experts": 8}, ["num_local_experts 8"]),
    ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "'silu'"]),
    ({"attention_bias": True}, ["attention_bias True"]),
    ({"mlp_bias": True}, ["mlp_bias True"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
    (
      {
        **{"model_type": "qwen2", "use_sliding_window": True},
        "max_window_layers": 1,
      },
      ["max_window_layers 1 of 2 layers"],
    ),
    ({"hidden_size": None}, ["hidden_size is missing"]),
    ({"hidden_size": "32"}, ["hidden_size is '32'"]),
    ({"num_attention_heads": 5}, ["config.json", "num_attention_heads 5"]),
    ({"num_attention_heads": 0}, ["num_attention_heads is 0"]),
    ({"num_hidden_layers": 1}, ["num_hidden_layers is 1; at least 2"]),
    ({"head_dim": 7}, ["head_dim 7", "odd"]),
    ({"rope_scaling": [1]}, ["rope_scaling is [1]"]),
    ({"rope_scaling": {"type": "longrope"}}, ["rope_type 'longrope'"]),
    ({"rope_scaling": {"type": "linear"}}, ["'linear' needs factor"]),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor is '2'"]),
    ({"rope_scaling": {"rope_type": "yarn", "beta": 2}}, ["'beta'"]),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}},
      ["truncate False"],
    ),
    ({"rope_theta": 10**400}, ["rope_theta is 1000"]),
    (
      {"rope_scaling": {"type": "linear", "factor": 10**400}},
      ["factor is 1000"],
    ),
    (YARN | {"original_max_position_embeddings": "32"}, ["embeddings is '32'"]),
    (YARN | {"original_max_position_embeddings": 0}, ["embeddings is 0;"]),
    (YARN | {"max_position_embeddings": 10**400}, ["embeddings is 1000"]),
    (
      YARN | {"rope_parameters": {"rope_type": "yarn", "factor": 2}},
      ["rope_scaling {'rope_type': 'yarn'} and rope_parameters", "remove one"],
    ),
    (
      {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
      },
      ["rope_scaling", "rope_parameters", "differ"],
    ),
    ({"vocab_size": 60}, ["61 ids", "60"]),
  ],
)
def test_what_is_not_supported_is_refused_by_name(folder, changes, texts):
  """Before a tensor is read: there is none."""
  (folder / SINGLE).unlink()
  config = reference.config_of("llama") | changes
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError) as error:
    folders.settings(folder)
  for text in texts:
    assert text in str(error.value)


def test_older_spellings_of_rotary_settings(folder):
  config = reference.config_of("llama") | {
    "rope_theta": 5e5,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
      **{"factor": 8.0, "type": "llama3", "rope_type": "llama3"},
      **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
      "original_max_position_embeddings": 8192,
    },
  }
  (folder / "config.json").write_text(json.dumps(config))
  cfg = folders.settings(folder)[0].model
  assert (cfg.rope_scaling, cfg.rope_factor, cfg.rope_theta) == (
    *("llama3", 8.0, 5e5),
  )
  assert (cfg.rope_slow, cfg.rope_fast, cfg.rope_length) == (1.0, 4.0, 8192)
  assert cfg.dtype == "bfloat16"
  tree = config | {"max_position_embeddings": None}  # is then the family's
  (folder / "config.json").write_text(json.dumps(tree))
  assert folders.settings(folder)[0].model == cfg
  both = config | {"rope_parameters": config["rope_scaling"]}
  for tree in (
    both,
    both | {"rope_scaling": {}},
    both | {"rope_parameters": {}},
  ):
    (folder / "config.json").write_text(json.dumps(tree))
    assert folders.settings(folder)[0].model == cfg


def test_which_models_have_a_window(folder):
  """Transformers' defaults; only Mistral has one without being told."""
  windows, on = {}, {"use_sliding_window": True, "max_window_layers": 0}
  for family in ("llama", "mistral", "qwen2", "qwen3"):
    config = reference.config_of("llama") | {"model_type": family}
    for name, extra in {
      "silent": {},
      "null": {"sliding_window": None},
      "null, on": {"sliding_window": None} | on,
      "given": {"sliding_window": 9} | on,
      "on": on,
    }.items():
      (folder / "config.json").write_text(json.dumps(config | extra))
      windows[family, name] = folders.settings(folder)[0].model.sliding_window
  expected = {(f, n): 0 for f, n in windows}
  expected |= {(f, "given"): 9 for f in ("mistral", "qwen2", "qwen3")}
  expected |= {(f, "on"): 4096 for f in ("mistral", "qwen2", "qwen3")}
  assert windows == expected | {("mistral", "silent"): 4096}


PLAN = """
import sys
from absl import flags
from experiments import plan
from experiments.measure import planning

def training(cfg, *_):
  print(cfg.model.vocab, cfg.model.width, cfg.data.batch, cfg.model.n_future)
  raise SystemExit

planning.training = training
sys.argv = ["plan", "--config=configs/quickstart.py", "--topology=v5e:2x2",
            "--config.data.batch=8", f"--model={sys.argv[1]}", *sys.argv[2:]]
flags.FLAGS(sys.argv)
plan.main(["plan"])
"""


def test_the_model_of_a_folder_is_planned(folder, run_with_devices):
  (folder / SINGLE).unlink()  # its weights are not read
  assert run_with_devices(1, PLAN, str(folder)) == "61 32 8 1\n"
  heads = "--config.model.n_future=4"  # as they are to be trained
  assert run_with_devices(1, PLAN, str(folder), heads) == "61 32 8 4\n"


def test_heads_that_are_a_link_to_nothing(folder):
  (folder / extra_heads.NAME).symlink_to(folder / "gone")
  refused(folder, f"cannot read {folder / extra_heads.NAME}")


@pytest.mark.parametrize(
  "name, value", [("num_key_value_heads", "2"), ("rms_norm_eps", 0)]
)
def test_a_fault_of_a_config_has_the_name_that_it_has_there(
  folder, name, value
):
  file = folder / "config.json"
  tree = json.loads(file.read_text())
  file.write_text(json.dumps(tree | {name: value}))
  assert "model." not in refused(folder, f"{file}: {name}")
