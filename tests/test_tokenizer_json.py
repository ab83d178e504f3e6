"""tokenizer.json: round trips, special tokens, refusals, transformers' ids."""

import importlib.util
import json
import pathlib

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from mtp_jax import tokenizer
from mtp_jax.interchange import tokenizer_files as exports
from tests import tokenizer_files

KINDS, NAMES = tokenizer_files.KINDS, tokenizer_files.NAMES
write = tokenizer_files.write


@pytest.fixture(scope="session")
def trained():
  return {kind: tokenizer_files.train(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def codecs(trained, tmp_path_factory):
  top = tmp_path_factory.mktemp("tokenizers")
  for kind, fields in trained.items():
    write(top / kind, fields, tokenizer_config=NAMES)
  return {kind: tokenizer.load(str(top / kind)) for kind in KINDS}


HARD = [
  "",
  "a",
  "  two, and one at the end ",
  "\t\n\n  f(x)\r\n",
  "<s> </s> <unk> <|end|> <0x41>",
  "\ufeffq\x00\x01",
  "日本語 🎉 né",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(codecs, kind, text):
  codec = codecs[kind]
  ids = codec.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert codec.encode(text.encode()).tolist() == ids.tolist()
  assert not {codec.bos, codec.eos} & set(ids.tolist())
  if kind == "metaspace":  # it adds no second space before a first one
    text = text.removeprefix(" ")
  assert codec.decode_bytes(ids) == text.encode()
  assert codec.decode([codec.bos, *ids, codec.eos]) == text


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.text(), st.integers(0, 9))
def test_any_text_comes_back_in_any_parts(codecs, text, cut):
  """And what follows a context is the tail of both together."""
  for kind, codec in codecs.items():
    if kind != "byte_level":
      text = text.replace("\u2581", "")  # a space, to these models
    ids = codec.encode(text)
    want = text.removeprefix(" ") if kind == "metaspace" else text
    assert codec.decode(ids) == want
    before, after = ids[:cut], ids[cut:]
    raw = codec.decode_bytes(before) + codec.decode_bytes(after, after=before)
    assert raw == want.encode()
    parts = list(tokenizer.decode_parts(codec, [[i] for i in ids]))
    assert "".join(parts) == want
    assert "\ufffd" in want or not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_keeps_its_first_space(codecs, kind, tmp_path):
  codec = codecs[kind]
  ids = codec.encode("that is the question")
  cut = next(i for i in range(9) if codec.decode(ids[:i]) == "that")
  assert codec.decode(ids[cut:], after=ids[:cut]) == " is the question"
  if kind == "metaspace":  # the same, said in another way
    fields = json.loads(codec.files()["tokenizer.json"])
    fields["decoder"] = {"type": "Metaspace", "replacement": "\u2581"}
    codec = tokenizer.load(
      str(write(tmp_path, fields, config={"eos_token_id": 2}))
    )
    assert codec.decode(ids[cut:], after=ids[:cut]) == " is the question"
  begin = [codec.bos, *codec.prefix]  # no text: the dummy prefix is removed
  assert codec.decode(ids, after=begin) == "that is the question"


def test_what_is_no_text_is_refused(codecs):
  codec = codecs["byte_level"]
  with pytest.raises(ValueError, match="UTF-8 only.*position 1"):
    codec.encode(b"a\xff")
  with pytest.raises(ValueError, match="no UTF-8 form"):
    codec.encode("a\ud800b")
  for bad in (-1, codec.vocab):
    with pytest.raises(ValueError, match=f"id {bad} .* {codec.vocab}"):
      codec.decode([bad])
  broken = [codec.encode("\xe9")[0], *codec.encode("a")]  # half a character
  assert codec.decode(broken) == "\ufffda"


def test_an_unknown_character_and_an_end_of_the_same_id(trained, tmp_path):
  """Models without byte pieces have a token for it; others name their end."""
  fields = json.loads(json.dumps(trained["llama"]))
  fields["model"]["byte_fallback"] = False
  codec = tokenizer.load(str(write(tmp_path, fields, tokenizer_config=NAMES)))
  assert codec.decode(codec.encode("to \U0001f389")) == "to \ufffd"
  pad = NAMES | {"pad_token": "<unk>"}
  codec = tokenizer.load(str(write(tmp_path, fields, tokenizer_config=pad)))
  assert codec.encode("\U0001f389")[-1] == codec.pad
  fields = json.loads(json.dumps(trained["byte_level"]))
  fields["model"]["unk_token"] = "</s>"
  codec = tokenizer.load(str(write(tmp_path, fields, tokenizer_config=NAMES)))
  assert codec.decode([codec.eos, *codec.encode("</s>")]) == "</s>"


def test_special_ids_are_not_made_by_merges(trained, tmp_path):
  """Where "</s>" is a word of the vocabulary that merges lead to."""
  fields = json.loads(json.dumps(trained["byte_level"]))
  vocab = fields["model"]["vocab"]
  vocab |= {"</": len(vocab), "s>": len(vocab) + 1}
  fields["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
  fields["pre_tokenizer"]["use_regex"] = False
  codec = tokenizer.load(
    str(write(tmp_path, fields, tokenizer_config=NAMES) / "tokenizer.json")
  )
  text = "a</s>b"
  library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  library.encode_special_tokens = True
  assert codec.eos in library.encode(text).ids
  ids = codec.encode(text)
  assert codec.eos not in ids and codec.decode(ids) == text
  assert codec.eos in codec.encode_marked(text)


def test_where_special_ids_come_from(trained, tmp_path):
  llama = trained["llama"]
  post = {"type": "TemplateProcessing", "special_tokens": {}, "pair": []}
  post["single"] = [
    {"SpecialToken": {"id": "<s>", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
  ]
  post["special_tokens"]["<s>"] = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
  ends = {"eos_token_id": [2, 3], "bos_token_id": 1, "pad_token_id": -1}
  cases = [
    ({"tokenizer_config": NAMES}, (1, 2, 2, (2,), ())),
    ({"special_tokens_map": NAMES}, (1, 2, 2, (2,), ())),
    # An id that is not needed, since the token has a name, may be wrong.
    (
      {
        "tokenizer_config": NAMES | {"pad_token": "a"},
        "config": {"pad_token_id": 10**6},
      },
      (1, 2, llama["model"]["vocab"]["a"], (2,), ()),
    ),
    ({"config": {"eos_token_id": 3}}, (3, 3, 3, (3,), ())),
    ({"generation_config": ends}, (1, 2, 2, (2, 3), ())),
    (
      {"tokenizer_config": NAMES | {"eos_token": "<|end|>"}, "config": ends},
      (1, 3, 3, (3, 2), ()),
    ),
    (
      {"tokenizer_config": NAMES | {"add_bos_token": True, "pad_token": "a"}},
      (1, 2, llama["model"]["vocab"]["a"], (2,), (1,)),
    ),
    ({"tokenizer": llama | {"post_processor": post}, "config": ends}, (1,)),
  ]
  for i, (files, want) in enumerate(cases):
    codec = tokenizer.load(str(write(tmp_path / f"{i}", llama, **files)))
    found = codec.bos, codec.eos, codec.pad, codec.ends, codec.prefix
    assert want in (found, found[-1]), files
    assert codec.decode([codec.bos, codec.eos, codec.pad, *codec.ends]) == ""
    # What it keeps of itself loads alone, and is the same.
    for name, content in codec.files().items():
      (tmp_path / f"copy{i}").mkdir(exist_ok=True)
      (tmp_path / f"copy{i}" / name).write_bytes(content)
    copy = tokenizer.load(str(tmp_path / f"copy{i}"))
    assert copy.special == codec.special and copy.prefix == codec.prefix
    assert copy.fingerprint == codec.fingerprint


def test_settings_of_other_programs_are_kept(trained, tmp_path):
  """A run keeps its tokenizer, and an export of the run has them again."""
  kept = {"model_max_length": 99, "padding_side": "left"}
  # With these transformers would not read tokenizer.json as it is.
  harmful = {
    "tokenizer_class": "LlamaTokenizer",
    "add_eos_token": False,
    "auto_map": {"AutoTokenizer": "x.Y"},
  }
  files = {
    "tokenizer_config": NAMES | kept | harmful,
    "generation_config": {"temperature": 0.6, "eos_token_id": [2, 3]},
  }
  codec = tokenizer.load(str(write(tmp_path / "a", trained["llama"], **files)))
  (tmp_path / "kept").mkdir()
  for name, content in codec.files().items():
    (tmp_path / "kept" / name).write_bytes(content)
  copy = tokenizer.load(str(tmp_path / "kept"))
  for model_is_new in (True, False):
    exported = exports.of(copy, model_is_new)
    named = json.loads(exported["tokenizer_config.json"])
    assert kept.items() <= named.items() and named.keys() >= NAMES.keys()
    assert named.pop("tokenizer_class") == "PreTrainedTokenizerFast"
    assert named.keys().isdisjoint(harmful)
    numbered = json.loads(exported["generation_config.json"])
    assert numbered["eos_token_id"] == [2, 3]
    assert ("temperature" in numbered) == (not model_is_new)


def test_what_cannot_be_loaded_is_named(trained, tmp_path):
  fields = trained["byte_level"]

  def refused(words, content=fields, **files):
    folder = write(tmp_path, content, **{"tokenizer_config": NAMES} | files)
    with pytest.raises(ValueError, match=words) as error:
      tokenizer.load(str(folder))
    assert "\n" not in str(error.value)

  for decoder, words in {
    '{"type": "WordPiece", "prefix": "##", "cleanup": true}': "'WordPiece'",
    "null": "'none'",
    '{"type": "Strip", "content": "_", "start": 1, "stop": 1}': "'Strip'",
  }.items():
    refused(
      f"tokenizer.json: its decoder {words} is not supported",
      fields | {"decoder": json.loads(decoder)},
    )
  refused(
    "drops merges", fields | {"model": fields["model"] | {"dropout": 0.5}}
  )
  refused("tokenizer.json cannot be read as a tokenizer.json: ", {"model": 1})
  refused(
    "no id that ends a document: name an `eos_token`", tokenizer_config={}
  )
  refused(
    r"config.json: eos_token_id 999 is not one of the tokenizer's \d+ ids",
    config={"eos_token_id": [2, 999]},
  )
  refused(
    "tokenizer_config.json does not hold a JSON object", tokenizer_config=[]
  )
  (tmp_path / "config.json").write_text('{"a"')
  refused("config.json is not JSON: Expecting")
  (tmp_path / "tokenizer.json").write_text(json.dumps(fields)[:999])
  with pytest.raises(ValueError, match="cannot be read as a tokenizer.json: "):
    tokenizer.load(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer.json").unlink()
  with pytest.raises(
    ValueError, match="holds no tokenizer.json or tokenizer.m"
  ):
    tokenizer.load(str(tmp_path))


# Ids of a text below, by transformers 5.24.
RECORDED = {
  "byte_level": (
    "265 262 224 31 86 33 224 81 131 106 202 224 176 257 240 235 224"
  ),
  "llama": ("315 282 64 278 66 282 274 199 173 289 244 163 146 141 282"),
  "metaspace": (
    "308 285 282 64 278 66 282 274 199 173 260 282 244 163 146 141 282"
  ),
}


def test_ids_and_texts_are_transformers(codecs, trained, tmp_path):
  """Those recorded; where transformers is at hand, those of a page as well."""
  text = "To be <s> n\xe9\n \U0001f389 "
  for kind, ids in RECORDED.items():
    assert codecs[kind].encode(text).tolist() == list(map(int, ids.split()))
  if not importlib.util.find_spec("transformers"):
    return
  transformers = importlib.import_module("transformers")
  page = (
    tokenizer_files.TEXT
    + text
    + "\n".join(HARD)
    + pathlib.Path(__file__).read_text("utf-8")
  )
  for kind, codec in codecs.items():
    folder = write(tmp_path / kind, trained[kind], tokenizer_config=NAMES)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(
      str(folder), split_special_tokens=True
    )
    for each in (text, page):
      ids = codec.encode(each)
      assert theirs.encode(each, add_special_tokens=False) == ids.tolist()
      assert codec.decode(ids) == theirs.decode(ids)
