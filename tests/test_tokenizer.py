"""Bytes and SentencePiece: exact round trips and clear refusals."""

import dataclasses
import importlib.util
import json
import pathlib

import hypothesis
import numpy as np
import pytest
import sentencepiece
from absl import flags
from absl.testing import flagsaver
from hypothesis import strategies as st

from mtp_jax import tokenizer, tokenizer_training
from mtp_jax.tokenizer import byte_ids, chat, interface, sentence_piece

SOURCE = "".join(
  pathlib.Path(module.__file__).read_text(encoding="utf-8")
  for module in (interface, byte_ids, sentence_piece)
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "inner" / "code.model"
  return tokenizer_training.train([SOURCE, SOURCE.encode()], path, 500)


def test_ten_thousand_random_byte_strings_come_back_exactly():
  codec, rng = tokenizer.Bytes(), np.random.default_rng(0)
  for length in rng.integers(0, 67, 10_000):
    raw = rng.bytes(length)
    ids = codec.encode(raw)
    assert ids.dtype == np.int32 and ids.tolist() == list(raw)
    assert codec.decode_bytes(ids) == raw
    assert codec.decode(ids) == raw.decode("utf-8", errors="replace")


@hypothesis.given(st.text())
def test_bytes_give_back_any_text(text):
  codec = tokenizer.Bytes()
  assert codec.decode(codec.encode(text)) == text


def test_bytes_specials_are_dropped_and_distinct():
  codec = tokenizer.Bytes()
  assert [codec.bos, codec.eos, codec.pad, codec.vocab] == [256, 257, 258, 259]
  assert codec.decode([256, 104, 258, 105, 257]) == "hi"
  assert codec.decode([]) == "" and codec.decode_bytes([]) == b""


def test_decoding_of_broken_utf8_is_replacement():
  assert tokenizer.Bytes().decode([0xFF, 0x61, 0xE6, 0x97]) == "\ufffda\ufffd"


@pytest.mark.parametrize("bad", [-1, 259, 10**6])
def test_bytes_refuse_ids_outside(bad):
  with pytest.raises(ValueError, match=f"id {bad} .* 259"):
    tokenizer.Bytes().decode([1, bad])


def test_lone_surrogate_is_a_value_error(trained):
  for codec in (tokenizer.Bytes(), trained):
    with pytest.raises(ValueError, match="no UTF-8 form"):
      codec.encode("a\ud800b")


HARD = [
  "",
  " leading",
  "trailing  ",
  "\t\n\n  f(x)\r\n",
  "a\u2581b \u2581\u2581 c",  # SentencePiece's own mark for a space
  "<s> </s> <pad> <unk> <0x41>",
  "\ufeffq\x00\x01",
  "\u2047 \u2585",
  "日本語 🎉",
]


@pytest.mark.parametrize("text", HARD)
def test_sentencepiece_gives_back_hard_texts(trained, text):
  ids = trained.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert trained.decode(ids) == text
  assert trained.encode(text.encode()).tolist() == ids.tolist()


@hypothesis.given(st.text())
def test_sentencepiece_gives_back_any_text(trained, text):
  assert trained.decode_bytes(trained.encode(text)) == text.encode()


def test_sentencepiece_gives_back_source_code_in_fewer_tokens(trained):
  for module in (dataclasses, hypothesis, pathlib):
    text = pathlib.Path(module.__file__).read_bytes()
    ids = trained.encode(text)
    assert trained.decode_bytes(ids) == text
    assert len(ids) < 0.9 * len(text)


def test_sentencepiece_decodes_as_the_library_does(trained):
  text = SOURCE[:997]
  library = sentencepiece.SentencePieceProcessor(
    model_proto=trained._processor.serialized_model_proto()
  )
  assert trained.encode(text).tolist() == library.encode(text)
  assert trained.decode(trained.encode(text)) == library.decode(
    library.encode(text)
  )


def test_sentencepiece_drops_specials_and_names_bad_ids(trained):
  specials = {trained.bos, trained.eos, trained.pad}
  assert len(specials) == 3 and trained.vocab == 500
  ids = [trained.bos, *trained.encode("x = 1"), trained.eos, trained.pad]
  assert trained.decode(ids) == "x = 1"
  for bad in (-1, trained.vocab):
    with pytest.raises(ValueError, match=f"id {bad} .* {trained.vocab}"):
      trained.decode([bad])


def test_sentencepiece_refuses_bytes_that_are_not_utf8(trained):
  with pytest.raises(ValueError, match="UTF-8 only.*position 1"):
    trained.encode(b"a\xff")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
  """A model of the shape of Llama's own: no pad, and a dummy prefix."""
  path = tmp_path_factory.mktemp("foreign") / "foreign"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(SOURCE.splitlines()),
    model_prefix=str(path),
    vocab_size=400,
    model_type="bpe",
    byte_fallback=True,
    minloglevel=2,
  )
  return tokenizer.load(f"{path}.model")


def test_foreign_model_without_pad_and_with_dummy_prefix(foreign):
  assert foreign.pad == foreign.eos != foreign.bos
  assert foreign.decode(foreign.encode("return text")) == "return text"


def test_a_continuation_keeps_its_first_space(foreign, trained):
  for codec in (foreign, trained, tokenizer.Bytes()):
    ids = [codec.bos, *codec.encode("return the text")]
    for i in range(len(ids) + 1):
      joined = codec.decode(ids[:i]) + codec.decode(ids[i:], after=ids[:i])
      assert joined == "return the text"
      raw = codec.decode_bytes(ids[:i])
      raw += codec.decode_bytes(ids[i:], after=ids[:i])
      assert raw == b"return the text"
    parts = [ids[i : i + 1] for i in range(len(ids))]
    assert "".join(tokenizer.decode_parts(codec, parts)) == "return the text"
  assert foreign.decode(foreign.encode("a"), after=[foreign.bos]) == "a"


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_character_in_several_parts_comes_whole(foreign, trained, width):
  text = "\u65e5h\xe9 \U0001f600!"
  for codec in (foreign, trained, tokenizer.Bytes()):
    ids = codec.encode(text)
    parts = [ids[i : i + width] for i in range(0, len(ids), width)]
    found = list(tokenizer.decode_parts(codec, parts))
    assert "".join(found) == text and "\ufffd" not in found
    assert len(found) == len(parts) + 1
    # The character that the context begins belongs to what completes it.
    assert codec.decode(ids[-3:], after=ids[:-3]) == "\U0001f600!"
  assert codec.decode([0x61, 0xE2, 0x82]) == "a\ufffd"


TURN, WORD_END = "<|im_end|>", "<|word|>"  # user-defined symbols
MARKED = f"to return <s>user{TURN}\n text</s> of<pad>a"


@pytest.fixture(scope="module")
def symbols(tmp_path_factory):
  """A model with symbols that it finds in a text; beside it, files."""
  folder = tmp_path_factory.mktemp("symbols")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(SOURCE.splitlines()),
    model_prefix=str(folder / "tokenizer"),
    vocab_size=400,
    model_type="bpe",
    byte_fallback=True,
    user_defined_symbols=[TURN, WORD_END],
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  named = {"add_bos_token": False, "chat_template": "{{ eos_token }}"}
  for name, content in {
    "generation_config": {"eos_token_id": [2, 3], "bos_token_id": 1},
    "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"} | named,
    "added_tokens": {"<pad>": 400},
    "special_tokens_map": {"pad_token": "<pad>"},
  }.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


def test_sentencepiece_reads_the_files_beside_it(symbols, tmp_path):
  codec = tokenizer.load(str(symbols))
  assert (codec.bos, codec.eos, codec.pad, codec.vocab) == (1, 2, 400, 401)
  assert codec.ends == (2, 3) and codec.prefix == ()
  assert codec.decode([1, 2, 3, 400]) == "" != codec.decode([4])
  # What it keeps of itself loads alone, and is the same.
  for name, content in codec.files().items():
    (tmp_path / name).write_bytes(content)
  copy = tokenizer.load(str(tmp_path))
  assert copy.special == codec.special and copy.prefix == ()
  assert copy.fingerprint == codec.fingerprint
  (tmp_path / "alone.model").write_bytes(codec.files()["tokenizer.model"])
  for name in set(codec.files()) - {"tokenizer.model"}:
    (tmp_path / name).unlink()
  alone = tokenizer.load(str(tmp_path / "alone.model"))
  assert alone.ends == (2,) and alone.prefix == (1,) and alone.vocab == 400
  assert alone.fingerprint != codec.fingerprint
  assert list(alone.files()) == ["tokenizer.model"]


def test_sentencepiece_makes_no_special_id_from_text(symbols):
  codec = tokenizer.load(str(symbols))
  special = {1, 2, 3, 400}
  for text in (MARKED, TURN, f"a{TURN}{TURN} {WORD_END}"):
    ids = codec.encode(text)
    assert special.isdisjoint(ids.tolist()) and codec.decode(ids) == text
  assert 4 in codec.encode(WORD_END)  # which no file calls special
  ids = codec.encode_marked(MARKED).tolist()
  assert [i for i in ids if i in special] == [1, 3, 2, 400]
  assert codec.decode(ids) == "to return user\n text ofa"
  assert chat.encode(codec, []).tolist() == [2]
  if importlib.util.find_spec("transformers"):
    transformers = importlib.import_module("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(symbols))
    assert theirs.encode(MARKED, add_special_tokens=False) == ids


@pytest.mark.parametrize(
  "file, content, words",
  [
    ("added_tokens", {"x y z": 3}, "added_tokens.json: 'x y z' has no id of"),
    ("generation_config", {"eos_token_id": 500}, "500 is not one of the"),
    (
      "tokenizer_config",
      {"added_tokens_decoder": {"400": {"content": "<n>", "special": False}}},
      "'<n>' is no special token, .*: save the tokenizer as tokenizer.json",
    ),
  ],
)
def test_sentencepiece_refuses_files_that_do_not_fit(
  symbols, tmp_path, file, content, words
):
  model = (symbols / "tokenizer.model").read_bytes()
  (tmp_path / "tokenizer.model").write_bytes(model)
  (tmp_path / f"{file}.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match=words):
    tokenizer.load(str(tmp_path))


def test_fingerprints_tell_tokenizers_apart(trained, tmp_path):
  again = tokenizer_training.train([SOURCE] * 2, tmp_path / "a.model", 500)
  other = tokenizer_training.train([SOURCE], tmp_path / "b.model", 400)
  assert again.fingerprint == trained.fingerprint  # training is deterministic
  prints = {
    trained.fingerprint,
    other.fingerprint,
    tokenizer.Bytes().fingerprint,
  }
  assert len(prints) == 3
  assert tokenizer.load(str(tmp_path / "b.model")).vocab == 400


def test_vocabulary_larger_than_the_text_supports_is_cut(tmp_path):
  assert tokenizer_training.train(["abab"], tmp_path / "m", 9000).vocab < 400


def test_vocabulary_too_small_leaves_no_file(tmp_path):
  with pytest.raises(ValueError, match="cannot learn 100 ids"):
    tokenizer_training.train([SOURCE], tmp_path / "m", 100)
  with pytest.raises(ValueError, match="cannot learn"):
    tokenizer_training.train([], tmp_path / "m", 300)
  assert not list(tmp_path.iterdir())


WORD = "splendid"


@pytest.mark.parametrize(
  "text",
  [
    f"{WORD} " * 9000,  # one line of 81,000 bytes
    WORD * 9000,  # without a space
    f"{WORD}\0\n{WORD}\u2585" * 100,  # characters that the trainer refuses
    f"{WORD}\u65e5" * 9000,
  ],
)
def test_nothing_is_lost_to_the_trainer(tmp_path, text):
  codec = tokenizer_training.train([text], tmp_path / "m", 300)
  pieces = [codec.decode_bytes([i]) for i in range(codec.vocab)]
  assert any(WORD.encode() in piece for piece in pieces)
  assert codec.decode_bytes(codec.encode(text)) == text.encode()
  parts = list(tokenizer_training._sentences([text]))
  assert max(len(part.encode()) for part in parts) <= 4000
  if text.count(" "):
    assert all(part.endswith(WORD) for part in parts[:-1])


def test_the_output_is_looked_at_before_the_training(tmp_path, monkeypatch):
  def never(*args, **kwargs):
    raise AssertionError

  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "file").touch()
  with monkeypatch.context() as patch:
    patch.setattr(sentencepiece.SentencePieceTrainer, "train", never)
    with pytest.raises(ValueError, match="is a folder: name the file"):
      tokenizer_training.train([SOURCE], "~", 300)
    with pytest.raises(OSError, match="file"):
      tokenizer_training.train([SOURCE], "~/file/code.model", 300)
  codec = tokenizer_training.train(["abab"], "~/new/code.model", 300)
  assert tokenizer.SentencePiece("~/new/code.model").vocab == codec.vocab


def test_an_error_while_reading_documents_is_passed_on(tmp_path):
  def documents():
    yield SOURCE
    raise ValueError("d.jsonl:3: not JSON")

  with pytest.raises(ValueError, match="^d.jsonl:3: not JSON$"):
    tokenizer_training.train(documents(), tmp_path / "m", 300)
  assert not list(tmp_path.iterdir())


def test_load_names_what_it_cannot_load(tmp_path, trained):
  assert isinstance(tokenizer.load("bytes"), tokenizer.Bytes)
  with pytest.raises(ValueError, match="'byte' is neither 'bytes' nor"):
    tokenizer.load("byte")
  model = trained._processor.serialized_model_proto()
  for i, content in enumerate((b"", b"no model", model[: len(model) // 2])):
    path = tmp_path / f"{i}.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{i}.model is not a SentencePiece"):
      tokenizer.load(str(path))


def test_the_training_program_proves_its_model_lossless(call, tmp_path):
  for i in range(40):
    (tmp_path / f"{i}.txt").write_text(f"file {i}\n" + SOURCE[i * 50 :])
  arguments = ["--source=text", f"--path={tmp_path}", "--vocab=400"]
  arguments += ["--held_out=0.2", f"--output={tmp_path}/.out/code.model"]
  code, out, err = call(*arguments, module="experiments.train_tokenizer")
  assert code == 0, err
  assert "all come back exactly" in out
  assert tokenizer.load(f"{tmp_path}/.out/code.model").vocab == 400
  (tmp_path / "bad.txt").write_bytes(b"\xff")
  for change, words in {
    f"--path={tmp_path}/absent": "^error: --path '.*' does not exist$",
    "--max_bytes=0": "^error: .*bad.txt:1: not UTF-8: .* --on_error=skip$",
    f"--output={tmp_path}": "^error: .* is a folder; name a file in it",
  }.items():
    extra = ["--on_error=skip"] if "output" in change else []
    with pytest.raises(SystemExit, match=words) as error:
      call_program([*arguments, change, *extra])
    assert "\n" not in str(error.value)


def call_program(arguments):
  """The training program in this process."""
  from experiments import train_tokenizer
  from experiments.startup import program

  values = dict(a.removeprefix("--").split("=", 1) for a in arguments)
  flags.FLAGS.mark_as_parsed()  # parsing asks for other programs' flags too
  with flagsaver.as_parsed(**values):
    return program.mendable(train_tokenizer.main)(["train_tokenizer"])


def test_a_damaged_corpus_can_be_skipped(tmp_path, capsys, caplog):
  """One text file, of which the end is held out, beside a damaged one."""
  (tmp_path / "a.txt").write_text(SOURCE)
  (tmp_path / "b.txt").write_bytes(b"\xff")
  model = tmp_path / ".out" / "a" / "code.model"
  arguments = ["--source=text", f"--path={tmp_path}", "--vocab=400"]
  arguments += [f"--output={model}", "--held_out=0.001"]
  with pytest.raises(SystemExit, match="b.txt:1: not UTF-8"):
    call_program(arguments)
  assert not model.exists()
  call_program([*arguments, "--on_error=skip"])
  out = capsys.readouterr().out
  assert "1 held-out documents (the last " in out and "exactly" in out
  assert "1 not UTF-8; the first" in caplog.text
  assert tokenizer.load(str(model)).vocab == 400
