"""Config: what is wrong is refused by name and number; the rest survives."""

import dataclasses
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from mtp_jax import config

SECTIONS = [f.name for f in dataclasses.fields(config.Config)]


def changed(**fields):
  """A Config with 'section__field' set, not checked."""
  cfg = config.Config()
  for path, value in fields.items():
    section, name = path.split("__")
    cfg = cfg.replace(**{section: {name: value}})
  return cfg


def numbers():
  """(path, default) of every int and float field."""
  for section in SECTIONS:
    for field in dataclasses.fields(getattr(config.Config(), section)):
      if field.type in (int, float):
        yield f"{section}.{field.name}", field.default


def test_defaults_are_valid():
  cfg = config.Config()
  assert cfg.check() == cfg
  assert (cfg.model.trunk_layers, cfg.model.head_layers) == (2, 4)


@pytest.mark.parametrize(
  ("fields", "texts"),
  [
    ({"model__vocab": 0}, ["model.vocab is 0", "positive"]),
    ({"model__width": -7}, ["model.width is -7"]),
    ({"model__norm_eps": 0.0}, ["model.norm_eps is 0.0"]),
    ({"model__rope_theta": -3.0}, ["model.rope_theta is -3.0"]),
    ({"model__extra_layers": -2}, ["model.extra_layers is -2", "at least 0"]),
    ({"model__head": "medusa"}, ["model.head", "medusa", "anticausal"]),
    ({"model__dtype": "float16"}, ["model.dtype", "float16", "bfloat16"]),
    ({"model__remat": "some"}, ["model.remat", "some", "none, dots, full"]),
    (
      {"model__width": 34, "model__attn_heads": 5, "model__kv_heads": 5},
      ["model.width 34", "model.attn_heads 5"],
    ),
    (
      {"model__attn_heads": 8, "model__kv_heads": 3},
      ["model.attn_heads 8", "model.kv_heads 3"],
    ),
    (
      {"model__width": 35, "model__attn_heads": 5, "model__kv_heads": 1},
      ["model.width 35", "model.attn_heads 5", "odd"],
    ),
    (
      {"model__layers": 5, "model__n_future": 7},
      ["model.layers 5", "-2 trunk", "7 parallel", "'unembedding'"],
    ),
    ({"model__layers": 4, "model__head": "causal"}, ["0 trunk", "4 causal"]),
    ({"data__source": "web"}, ["data.source", "web", "array_record"]),
    ({"data__source": "jsonl"}, ["data.source 'jsonl'", "data.path"]),
    ({"data__on_error": "log"}, ["data.on_error", "log", "raise, skip"]),
    ({"data__held_out": 1.0}, ["data.held_out 1.0", "between 0 and 1"]),
    ({"data__batch": 0}, ["data.batch is 0"]),
    ({"data__workers": -1}, ["data.workers is -1", "at least 0"]),
    ({"optim__peak": 0.0}, ["optim.peak is 0.0"]),
    ({"optim__adam_ratio": 2.0}, ["optim.adam_ratio is 2.0", "'adamw'"]),
    ({"optim__schedule": "steps"}, ["optim.schedule", "cosine, linear"]),
    ({"optim__newton_schulz": 0}, ["optim.newton_schulz is 0"]),
    ({"optim__newton_schulz": 3}, ["optim.newton_schulz is 3", "'adamw'"]),
    ({"optim__peak": float("nan")}, ["optim.peak is nan", "finite"]),
    ({"optim__clip": float("inf")}, ["optim.clip is inf", "finite"]),
    ({"optim__end": 1.5}, ["optim.end 1.5", "between 0 and 1"]),
    ({"optim__beta2": 1.0}, ["optim.beta2 1.0", "between 0 and 1"]),
    ({"optim__decay": -0.1}, ["optim.decay is -0.1"]),
    ({"mesh__data": -1, "mesh__model": -1}, ["mesh.data", "mesh.model", "-1"]),
    ({"mesh__model": 0}, ["mesh.model is 0"]),
    ({"mesh__data": -2}, ["mesh.data is -2"]),
    ({"train__loss": "fused"}, ["train.loss", "fused", "serial"]),
    ({"train__keep": 0}, ["train.keep is 0"]),
    ({"decode__heads": -1}, ["decode.heads is -1"]),
    ({"decode__heads": 5}, ["decode.heads=5", "model.n_future=4"]),
    (
      {"data__batch": 14, "train__accumulate": 3},
      ["data.batch 14", "train.accumulate 3"],
    ),
    (
      {"train__head_weights": (1.0, 0.5, 0.25)},
      ["3 entries", "model.n_future=4", "--config.train.head_weights=()"],
    ),
    (
      {"optim__warmup": 13, "train__steps": 13},
      ["optim.warmup 13", "train.steps 13"],
    ),
  ],
)
def test_errors_name_field_and_numbers(fields, texts):
  with pytest.raises(ValueError) as error:
    changed(**fields).check()
  for text in texts:
    assert text in str(error.value), str(error.value)


@pytest.mark.parametrize("path", [path for path, _ in numbers()])
def test_every_number_has_a_lower_bound(path):
  with pytest.raises(ValueError, match=path.replace(".", r"\.")):
    changed(**{path.replace(".", "__"): -1_000_003}).check()


@pytest.mark.parametrize(
  ("fields", "texts"),
  [
    ({"model__width": 64.0}, ["model.width is 64.0, a float", "int"]),
    ({"model__width": "64"}, ["model.width is '64', a str", "int"]),
    ({"model__width": True}, ["model.width is True, a bool", "int"]),
    ({"model__mask_documents": 1}, ["mask_documents is 1, an int", "bool"]),
    ({"model__head": None}, ["model.head is None, a NoneType", "str"]),
    ({"optim__peak": "1e-3"}, ["optim.peak is '1e-3', a str", "float"]),
    ({"optim__peak": True}, ["optim.peak is True, a bool", "float"]),
    ({"train__head_weights": [1.0]}, ["head_weights is [1.0], a list"]),
    ({"train__head_weights": 2.0}, ["head_weights is 2.0, a float", "tuple"]),
    (
      {"train__head_weights": (1.0, "a", 1.0, 1.0)},
      ["an entry of train.head_weights is 'a', a str"],
    ),
  ],
)
def test_wrong_types_are_refused(fields, texts):
  with pytest.raises(ValueError) as error:
    changed(**fields).check()
  for text in texts:
    assert text in str(error.value), str(error.value)


@pytest.mark.parametrize(
  ("fields", "texts"),
  [
    ({"train__steps": 2**31}, ["train.steps is 2147483648", "at most 2147483"]),
    ({"model__width": 10**30}, [f"model.width is {10**30}", "at most"]),
    ({"model__vocab": 10**5000}, ["vocab is an integer of 16610 bits"]),
    ({"mesh__data": 2**31}, ["mesh.data is 2147483648", "at most"]),
    # jax.random.key(2**32) is jax.random.key(0), without a word.
    (
      {"train__seed": 2**32},
      ["train.seed is 4294967296", "at most 4294967295"],
    ),
    ({"data__seed": 2**63}, ["data.seed is", f"at most {2**63 - 1}"]),
    ({"data__max_bytes": 2**63}, ["data.max_bytes is", f"at most {2**63 - 1}"]),
    ({"optim__peak": 1e39}, ["optim.peak is 1e+39", "finite in 32 bits"]),
    ({"optim__peak": 10**400}, ["optim.peak is inf", "finite in 32 bits"]),
    ({"train__head_weights": (1, 10**400, 1, 1)}, ["entry of train.head_we"]),
    ({"model__width": -(10**400)}, ["is an integer of 1329 bits", "positive"]),
    ({"train__head_weights": (1, -0.5, 1, 1)}, ["-0.5", "may be negative"]),
    ({"train__head_weights": (0, 0, 0, 0)}, ["every weight 0", "positive"]),
    ({"data__cache": ""}, ["data.cache is empty"]),
    ({"data__tokenizer": ""}, ["data.tokenizer is empty"]),
  ],
)
def test_what_would_overflow_or_mean_nothing_is_refused(fields, texts):
  with pytest.raises(ValueError) as error:
    changed(**fields).check()
  for text in texts:
    assert text in str(error.value), str(error.value)


def test_large_numbers_that_are_right():
  changed(
    data__max_bytes=2**40, data__seed=2**63 - 1, train__seed=2**32 - 1
  ).check()


def test_negative_zero_is_zero():
  cfg = changed(optim__decay=-0.0).check()
  assert str(cfg.optim.decay) == "0.0"


@pytest.mark.parametrize("section", [None, *SECTIONS])
def test_a_config_is_a_value(section):
  """No assignment changes it, and so none its hash."""
  whole = config.Config()
  part = getattr(whole, section) if section else whole
  before = hash(part), hash(whole)
  for name in [f.name for f in dataclasses.fields(part)] + ["misspelt"]:
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
      setattr(part, name, getattr(part, name, 3))
  assert (hash(part), hash(whole)) == before


def test_check_changes_nothing():
  cfg = changed(optim__peak=1, optim__clip=2, train__head_weights=(2, 1, 1, 1))
  checked = cfg.check()
  assert [type(cfg.optim.peak), type(cfg.optim.clip)] == [int, int]
  assert {type(w) for w in cfg.train.head_weights} == {int}
  assert [type(checked.optim.peak), type(checked.optim.clip)] == [float, float]
  assert checked == cfg and checked.check() == checked


def test_replace():
  cfg = config.Config().replace(
    model={"width": 64, "layers": 7}, train={"steps": 9}
  )
  assert cfg == config.Config(
    model=config.Model(width=64, layers=7), train=config.Train(steps=9)
  )
  assert config.Config() == config.Config().replace()
  for changes, text in (
    ({"modle": {}}, "no field 'modle'; did you mean model"),
    ({"model": {"widht": 3}}, "no field 'model.widht'; did you mean model.wid"),
    ({"model": 3}, "config.model is 3, an int; it takes an object of fields"),
  ):
    with pytest.raises(ValueError, match=text):
      cfg.replace(**changes)


def test_a_section_is_what_it_is_called():
  for wrong in ({"width": 64}, None, config.Data()):
    with pytest.raises(ValueError, match=r"config\.model is a .*config\.Model"):
      config.Config(model=wrong).check()


def test_a_section_alone_checks_its_types():
  with pytest.raises(ValueError, match=r"model\.layers is 6\.0, a float"):
    config.Model(layers=6.0).check()


def test_int_becomes_float():
  cfg = changed(optim__peak=1, train__head_weights=(2, 1, 0.5, 0)).check()
  assert (cfg.optim.peak, type(cfg.optim.peak)) == (1.0, float)
  assert cfg.train.head_weights == (2.0, 1.0, 0.5, 0.0)
  assert {type(w) for w in cfg.train.head_weights} == {float}


@pytest.mark.parametrize(
  ("head", "trunk"),
  [
    ("parallel", 8),
    ("causal", 8),
    ("anticausal", 8),
    ("linear", 13),
    ("unembedding", 13),
  ],
)
def test_trunk_layers(head, trunk):
  """Heads that are transformer layers use up layers; extra ones come on top."""
  cfg = config.Model(layers=11, n_future=5, head=head, extra_layers=2)
  cfg.check()
  assert cfg.trunk_layers == trunk


SMALL = st.integers(1, 97)
CONFIGS = st.fixed_dictionaries(
  {
    "model__width": SMALL.map(lambda n: 24 * n),
    "model__kv_heads": st.sampled_from([1, 2, 4]),
    "model__layers": st.integers(5, 97),
    "model__head": st.sampled_from(sorted(config.HEAD_KINDS)),
    "model__mask_documents": st.booleans(),
    "data__path": st.text(max_size=9),
    "data__seed": st.integers(0, 2**63 - 1),
    "optim__peak": st.floats(1e-9, 1e9),
    "mesh__model": SMALL,
    "train__head_weights": st.one_of(
      st.just(()), st.tuples(*[st.floats(0, 10)] * 4).filter(any)
    ),
  }
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(CONFIGS)
def test_json_round_trip(fields):
  cfg = changed(**fields).check()
  again = config.from_json(config.to_json(cfg))
  assert again == cfg
  assert hash(again) == hash(cfg)
  assert type(again.train.head_weights) is tuple


def test_load(tmp_path, monkeypatch):
  cfg = changed(model__n_future=3, train__head_weights=(3.0, 2.0, 1.0)).check()
  (tmp_path / "config.json").write_text(config.to_json(cfg))
  assert config.load(tmp_path / "config.json") == cfg
  assert config.load(str(tmp_path / "config.json")) == cfg
  monkeypatch.setenv("HOME", str(tmp_path))
  assert config.load("~/config.json") == cfg
  assert cfg != config.Config()


def test_a_config_without_a_format_is_of_format_1():
  cfg = changed(model__n_future=2)
  tree = json.loads(config.to_json(cfg))
  assert tree.pop("format") == config.FORMAT == 1
  assert config.from_json(json.dumps(tree)) == cfg
  for number in (2, 0, "1", True, None, 1.0):
    with pytest.raises(ValueError) as error:
      config.from_json(json.dumps(tree | {"format": number}))
    assert str(error.value) == (
      f"the config has format {number!r}, and this version of mtp_jax reads "
      "formats up to 1: install the version that wrote it"
    )


def test_missing_fields_keep_their_defaults():
  cfg = config.from_json('{"model": {"n_future": 2}}')
  assert cfg == changed(model__n_future=2)


@pytest.mark.parametrize(
  ("path", "near"),
  [
    ("model.n_futures", "model.n_future"),
    ("model.headlayers", "model.layers"),
    ("model.head_layers", "model.extra_layers"),  # a property, no field
    ("optim.warm_up", "optim.warmup"),
    ("train.head_weight", "train.head_weights"),
    ("mdel", "model"),
    ("check", ""),  # a method, no section
    ("data.zzzzzzzz", ""),
  ],
)
def test_unknown_fields_get_the_nearest_names(path, near):
  section, _, name = path.partition(".")
  tree = {section: {name: 3} if name else {}}
  with pytest.raises(ValueError) as error:
    config.from_json(json.dumps(tree))
  message = str(error.value)
  assert f"no field '{path}'" in message
  assert ("did you mean" in message) == bool(near)
  assert near in message.partition("did you mean")[2]


def test_values_from_json_are_checked():
  with pytest.raises(ValueError, match=r"model\.width is '64'"):
    config.from_json('{"model": {"width": "64"}}')
  with pytest.raises(ValueError, match=r"model\.width 66 .*attn_heads 4"):
    config.from_json('{"model": {"width": 66}}')


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[]", "the config is a list; it takes an object of sections"),
    ("3", "the config is an int"),
    ("null", "the config is a NoneType"),
    ('{"model": []}', "config.model is [], a list; it takes an object"),
    ('{"model": null}', "config.model is None, a NoneType"),
    ('{"model": {"vocab": "x"}}', "model.vocab is 'x', a str; it takes an int"),
    ('{"model": {"vocab": true}}', "model.vocab is True, a bool"),
    ('{"model": {"vocab": NaN}}', "model.vocab is nan, a float"),
    ('{"optim": {"peak": Infinity}}', "optim.peak is inf"),
    ('{"train": {"head_weights": [[1]]}}', "an entry of train.head_weights"),
    ('{"model": {', "the config is not JSON: "),
    ("", "the config is not JSON: Expecting value: line 1 column 1"),
    ("[" * 100_000, "the config is not JSON: nested too deeply"),
    ('{"model": {"vocab": ' + "1" * 5000 + "}}", "Exceeds the limit"),
    ('{"model": {}, "model": {}}', "the config has the key 'model' twice"),
    ('{"model": {"vocab": 3, "vocab": 4}}', "has the key 'vocab' twice"),
  ],
)
def test_json_of_another_shape_is_one_line(text, message):
  with pytest.raises(ValueError) as error:
    config.from_json(text)
  assert message in str(error.value), str(error.value)
  assert "\n" not in str(error.value)


def test_load_names_the_file(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(ValueError, match="^cannot read .*config.json: No such"):
    config.load(path)
  with pytest.raises(ValueError, match=f"^cannot read {tmp_path}: Is a dir"):
    config.load(tmp_path)
  for raw in (b"\xff\xfe", b"[]"):
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="config.json: .*(utf-8|a list)"):
      config.load(path)


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_hashable_values(section):
  """What a Module stores is part of jit's cache key."""
  kind = type(getattr(config.Config(), section))
  assert kind() == kind() and kind() is not kind()
  assert hash(kind()) == hash(kind())
  for field in dataclasses.fields(kind):
    other = dataclasses.replace(kind(), **{field.name: "another"})
    assert other != kind()
    assert hash(other) != hash(kind())
