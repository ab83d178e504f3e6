"""The generate program: what it prints, and how it refuses."""

import io
import json
import re
import sys

import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from experiments import generate, program
from mtp_jax import checkpoint, config, tokenizer, workdir
from mtp_jax.decode import accept, prepare, sampling
from mtp_jax.decode import generate as decode
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import model


@pytest.fixture(scope="module")
def loaded():
  """A random byte model; it writes bytes, not text."""
  cfg = config.Config(
    model=config.Model(
      width=24, mlp=41, layers=4, attn_heads=2, kv_heads=2, n_future=3
    ),
    decode=config.Decode(heads=2, max_new=19),
  )
  return model.Model(cfg.model, jax.random.key(0)), cfg, tokenizer.Bytes()


@pytest.fixture
def call(loaded, monkeypatch, capsys):
  monkeypatch.setattr(workdir, "load", lambda path: loaded)
  flags.FLAGS.mark_as_parsed()

  def run(**settings):
    given = {k: str(v) for k, v in settings.items() if v is not None}
    with flagsaver.as_parsed(**({"workdir": "run"} | given)):
      program.mendable(generate.main)(["generate"])
    return capsys.readouterr().out

  return run


def expected(loaded, prompt, **settings):
  net, _, codec = loaded
  ids = [codec.bos, *codec.encode(prompt)]
  return decode.generate(
    prepare.decoder(net), [ids], stop=codec.eos, **settings
  )


@pytest.mark.parametrize("heads", [None, 0, 1])
def test_prints_the_text_and_the_figures(call, loaded, heads, tmp_path):
  (tmp_path / "prompt.txt").write_text("def f(x):\n")
  out = call(prompt_file=str(tmp_path / "prompt.txt"), heads=heads)
  k = {None: 2, 0: 3, 1: 1}[heads]
  want = expected(loaded, "def f(x):\n", heads=k, max_new=19)
  text, line = out.rsplit("\n\n", 1)
  assert text == loaded[2].decode(want.tokens[0])
  tokens, passes, per_forward = re.search(
    r"^(\d+) tokens in .* s, .* tokens per second .*; (\d+) passes after the "
    r"prompt's, ([\d.]+) tokens per forward\n$",
    line,
  ).groups()
  assert int(tokens) == len(want.tokens[0]) and int(passes) == want.passes[0]
  assert float(per_forward) == pytest.approx(want.tokens_per_forward, abs=0.01)


def test_draws_by_the_filters_and_the_seed(call, loaded):
  rule = accept.Lossless(
    sampling.Sampler(temperature=1.5, top_k=9, top_p=0.9, penalty=1.1)
  )
  filters = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "penalty": 1.1}
  texts = set()
  for seed in (0, 1):
    want = expected(loaded, "a", heads=2, max_new=19, rule=rule, seed=seed)
    text = call(prompt="a", seed=seed, **filters).rsplit("\n\n", 1)[0]
    assert text == loaded[2].decode(want.tokens[0])
    texts.add(text)
  assert len(texts) == 2


def test_drafts_by_a_tuned_tree(call, loaded, tmp_path):
  paths = [[0], [1], [2], [0, 0], [1, 0]]
  trees = {"trees": {"6": {"paths": paths}}}
  (tmp_path / "tree.json").write_text(json.dumps(trees))
  where = {"workdir": str(tmp_path), "prompt": "def f(x):\n"}
  out = call(tree=6, **where)
  tree = tree_lib.from_paths(paths)
  want = expected(loaded, "def f(x):\n", heads=tree, max_new=19)
  assert f"; {want.passes[0]} passes after" in out
  with pytest.raises(SystemExit, match="no tree of 7 nodes in "):
    call(tree=7, **where)


def test_a_window_writes_on_without_end(call, loaded):
  """Far past what the cache holds."""
  out = call(prompt="a" * 300, sliding_window=5, max_new=400)
  decoder = prepare.decoder(loaded[0], sliding_window=5)
  ids = [loaded[2].bos, *loaded[2].encode("a" * 300)]
  want = decode.generate(
    decoder, [ids], heads=2, max_new=400, stop=loaded[2].eos
  )
  assert out.rsplit("\n\n", 1)[0] == loaded[2].decode(want.tokens[0])


def test_prompt_from_the_command_line_from_stdin_and_empty(call, monkeypatch):
  with_flag = call(prompt="été")
  stdin = io.TextIOWrapper(io.BytesIO("été".encode()))
  monkeypatch.setattr(sys, "stdin", stdin)
  with_stdin = call(prompt_file="-")
  assert with_flag.rsplit("\n\n", 1)[0] == with_stdin.rsplit("\n\n", 1)[0]
  assert "tokens per second" in call(prompt="")  # bos alone is a prompt


def test_one_token_has_no_tokens_per_forward(call):
  assert "the prompt's pass wrote them all" in call(prompt="a", max_new=1)


def test_text_is_streamed_and_characters_stay_whole():
  codec = tokenizer.Bytes()
  prompt, ids = (
    codec.encode("a\xe9"[:1]),
    codec.encode("h\xe9 \u2581 \U0001f600!"),
  )
  for width in (1, 2, 3):
    ends = [*range(1, len(ids), width), len(ids)]
    parts = list(generate.characters(codec, prompt, (ids[:e] for e in ends)))
    assert "".join(parts) == "h\xe9 \u2581 \U0001f600!"
    assert len(parts) == len(ends) + 1 and parts[0] == "h"


def test_a_character_may_begin_in_the_prompt():
  codec = tokenizer.Bytes()
  prompt, rest = codec.encode("\u20ac")[:2], codec.encode("\u20ac")[2:]
  assert "".join(generate.characters(codec, prompt, [rest])) == "\u20ac"


def test_what_is_no_utf8_is_marked_and_not_lost():
  codec = tokenizer.Bytes()
  ids = np.array([0x61, 0xFF, 0x62, 0xE2, 0x82])
  parts = list(generate.characters(codec, codec.encode("x"), [ids]))
  assert "".join(parts) == "a\ufffdb\ufffd"


def test_a_dummy_prefix_is_told_from_a_space():
  """Tokens are decoded behind the prompt: a first space is the text's own."""

  class Prefixed:
    def decode_bytes(self, ids, after=()):
      raw = b"".join(b" w%d" % i for i in ids)
      return raw if len(after) else raw[1:]

  parts = generate.characters(Prefixed(), [1], [[2], [2, 3]])
  assert list(parts) == [" w2", " w3", ""]


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"prompt_file": "no/such.txt"}, "No such file.*no/such.txt"),
    ({"prompt": "a", "heads": 4}, "heads=4 is outside 1..3"),
    ({"prompt": "a", "max_new": 0}, "max_new=0 writes nothing"),
    ({"prompt": "a", "top_p": 0.5}, "--top_p filters what is drawn"),
    ({"prompt": "a", "temperature": -1.0}, "temperature=-1.0 has to be above"),
    (
      {"prompt": "a", "tree": 4},
      "no tree of 4 nodes in run/tree.json: python -m",
    ),
    ({"prompt": "a", "sliding_window": 0}, "sliding_window=0"),
  ],
)
def test_errors_are_one_line(call, settings, words):
  with pytest.raises(SystemExit, match=f"^error: .*{words}") as error:
    call(**settings)
  assert "\n" not in str(error.value)


def test_a_missing_run_is_one_line(call, monkeypatch):
  def fail(path):
    raise checkpoint.CheckpointError(f"{path} holds no checkpoint")

  monkeypatch.setattr(workdir, "load", fail)
  with pytest.raises(SystemExit, match="^error: run holds no checkpoint$"):
    call(prompt="a")


def test_stray_arguments_are_refused():
  with pytest.raises(app.UsageError, match="stray"):
    generate.main(["generate", "stray"])
