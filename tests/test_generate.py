"""The generate program: what it prints, and how it refuses."""

import io
import json
import re
import signal
import socket
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import generate
from experiments.startup import interrupts, program, terminal
from mtp_jax import config, tokenizer
from mtp_jax.checkpoint import checkpoints
from mtp_jax.decode import accept, layout, loop, sampling, stream
from mtp_jax.decode import generate as decode
from mtp_jax.decode import tree as tree_lib
from mtp_jax.interchange import folders
from tests import parameters


@pytest.fixture(scope="module")
def loaded():
  """A random byte model; it writes bytes, not text."""
  cfg = config.Config(
    model=parameters.model_config("unembedding", vocab=259, layers=1),
    decode=config.Decode(heads=2, max_new=19),
  )
  return parameters.model_of(cfg.model), cfg, tokenizer.Bytes()


@pytest.fixture
def call(loaded, monkeypatch, capsys):
  """Runs the program; returns its standard output and error."""
  monkeypatch.setattr(folders, "kind", lambda path: "workdir")
  monkeypatch.setattr(folders, "settings", lambda path, step: loaded[1:])
  monkeypatch.setattr(
    folders, "load_step", lambda path, step, dtype=None: (*loaded, 7)
  )
  flags.FLAGS.mark_as_parsed()

  def run(**settings):
    given = {
      k: [str(x) for x in v] if isinstance(v, list) else str(v)
      for k, v in settings.items()
      if v is not None
    }
    with flagsaver.as_parsed(**({"workdir": "run"} | given)):
      program.mendable(generate.main)(["generate"])
    return capsys.readouterr()

  return run


def expected(loaded, prompt, **settings):
  net, _, codec = loaded
  ids = [codec.bos, *codec.encode(prompt)]
  return decode.generate(layout.lay_out(net), [ids], stop=codec.eos, **settings)


@pytest.mark.parametrize("heads", [None, 0, 1])
def test_prints_the_text_and_the_figures(call, loaded, heads, tmp_path):
  (tmp_path / "prompt.txt").write_text("def f(x):\n")
  out = call(prompt_file=str(tmp_path / "prompt.txt"), heads=heads)
  k = {None: 2, 0: 3, 1: 1}[heads]
  want = expected(loaded, "def f(x):\n", heads=k, max_new=19)
  assert out.out == loaded[2].decode(want.tokens[0])
  size = sum(leaf.size for leaf in jax.tree.leaves(loaded[0]))
  first, tokens, per_forward = re.search(
    rf"^(run at step 7: {size:,} parameters on .*)\ncompiling.*\n"
    r"(\d+) tokens, ([\d.]+) tokens per forward pass; [\d.]+ tokens per "
    r"second, the first pass of each program left out; [\d.]+ s in all\n$",
    out.err,
  ).groups()
  assert first.endswith(f"; drafts: chain of {k}")
  assert int(tokens) == len(want.tokens[0])
  assert float(per_forward) == pytest.approx(want.tokens_per_forward, abs=0.01)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_holds_the_model_in_the_dtype_asked_for(
  call, loaded, dtype, monkeypatch
):
  held = []

  def load_step(path, step, dtype=None):
    held.append(dtype)
    return *loaded, 7

  monkeypatch.setattr(folders, "load_step", load_step)
  call(prompt="a", dtype=dtype)
  assert held == [dtype or loaded[1].model.dtype]


def test_draws_by_the_filters_and_the_seed(call, loaded):
  rule = accept.SpeculativeSampling(
    sampling.Sampler(temperature=1.5, top_k=9, top_p=0.9, penalty=1.1)
  )
  filters = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "penalty": 1.1}
  texts = set()
  for seed in (0, 1):
    want = expected(loaded, "a", heads=2, max_new=19, rule=rule, seed=seed)
    text = call(prompt="a", seed=seed, **filters).out
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
  assert "; drafts: tree of 6\n" in out.err
  assert f" {want.tokens_per_forward:.2f} tokens per forward pass" in out.err
  with pytest.raises(SystemExit, match="no tree of 7 nodes in "):
    call(tree=7, **where)
  (tmp_path / "tree.json").write_text("{")
  with pytest.raises(SystemExit, match="tree.json is damaged .*: python -m"):
    call(tree=6, **where)


def test_a_window_writes_on_without_end(call, loaded):
  """Far past what the cache holds."""
  out = call(prompt="a" * 300, sliding_window=5, max_new=400)
  decoder = layout.lay_out(loaded[0], sliding_window=5)
  ids = [loaded[2].bos, *loaded[2].encode("a" * 300)]
  want = decode.generate(
    decoder, [ids], heads=2, max_new=400, stop=loaded[2].eos
  )
  assert out.out == loaded[2].decode(want.tokens[0])


@pytest.fixture
def type_in(monkeypatch):
  def give(text, terminal=False):
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)

  return give


def test_prompt_from_the_command_line_from_stdin_and_empty(call, type_in):
  want = call(prompt="\xe9t\xe9").out
  for settings in ({"prompt_file": "-"}, {}):
    type_in("\xe9t\xe9")
    assert call(**settings).out == want
  assert "tokens per second" in call(prompt="").err  # bos alone is a prompt


def test_no_prompt_and_no_input_is_a_line(call, monkeypatch):
  monkeypatch.setattr(sys, "stdin", None)
  with pytest.raises(SystemExit, match="^error: no prompt, and standard input"):
    call()


def test_line_after_line_is_continued(call, type_in):
  """In a terminal without a prompt, until the input ends."""
  want = [call(prompt=text).out for text in ("abc", "d")]
  type_in("abc\nd\n", terminal=True)
  assert call().out == "".join(f"{text}\n" for text in want)
  type_in("abc\n")
  assert call(interactive=True).out == f"{want[0]}\n"


def test_ctrl_c_stops_a_text_and_then_the_program(call, type_in, monkeypatch):
  advance = loop.advance_jit

  def interrupted(*arguments):
    monkeypatch.setattr(loop, "advance_jit", advance)
    raise KeyboardInterrupt

  want = call(prompt="b").out
  monkeypatch.setattr(loop, "advance_jit", interrupted)
  type_in("a\nb\n", terminal=True)
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  signal.set_wakeup_fd(writer.fileno())
  out = call()
  assert out.out == f"{want}\n" and "(stopped)" in out.err
  # Whoever watches Ctrl-C beside Python still hears of it.
  assert signal.set_wakeup_fd(-1) == writer.fileno()
  assert signal.getsignal(signal.SIGINT) is interrupts.stop_text
  monkeypatch.setattr(terminal, "read_line", interrupted)
  assert call(interactive=True).out == ""


def test_one_token_is_not_timed(call):
  assert "1 tokens; too few passes to time" in call(prompt="a", max_new=1).err


def test_a_text_ends_before_a_string_and_behind_an_id(call, loaded):
  text, codec = call(prompt="a", heads=3).out, loaded[2]
  ids = expected(loaded, "a", heads=3, max_new=19).tokens[0]
  stop = text[4:6]
  short = call(prompt=f"a{stop}", heads=3, stop=["never", stop]).out
  whole = call(prompt=f"a{stop}", heads=3).out
  assert short == whole.split(stop)[0]  # the prompt's own does not count
  assert call(prompt="a", heads=3, stop=[stop]).out == text.split(stop)[0]
  end = list(ids).index(ids[7]) + 1
  out = call(prompt="a", heads=3, stop_id=[int(ids[7])]).out
  assert out == codec.decode(ids[:end])


def test_several_samples_are_the_servers(call, loaded):
  rule = accept.SpeculativeSampling(sampling.Sampler(temperature=1.5))
  net, _, codec = loaded
  ids = [codec.bos, *codec.encode("ab")]
  settings = {"heads": 2, "max_new": 19, "stop": codec.eos, "rule": rule}
  want = decode.generate(layout.lay_out(net), [ids] * 3, seed=4, **settings)
  out = call(prompt="ab", temperature=1.5, seed=4, num_samples=3)
  texts = [codec.decode(t) for t in want.tokens]
  assert out.out == "".join(f"{text}\0" for text in texts)
  assert re.findall("--- sample (.) of 3 ---\n", out.err) == ["1", "2", "3"]


def test_control_characters_are_shown(call, monkeypatch):
  """In a terminal; a file takes the text as it is."""
  text = "a\x1b[31m\tb\r\x07\n\u202e\x9b\xe9"
  monkeypatch.setattr(stream, "until", lambda *_: iter([text]))
  assert call(prompt="a", max_new=1).out == text
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  want = r"a\x1b[31m" + "\tb" + r"\r\x07" + "\n" + r"\u202e\x9b" + "\xe9\n"
  assert call(prompt="a", max_new=1).out == want


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"prompt_file": "no/such.txt"}, "--prompt_file=no/such.txt: No such f"),
    ({"prompt": "a", "heads": 4}, "--heads=4 is outside 1..3"),
    ({"prompt": "a", "max_new": 0}, "--max_new=0 writes nothing"),
    ({"prompt": "a", "top_p": 0.5}, "--top_p filters what is drawn"),
    ({"prompt": "a", "temperature": -1.0}, "--temperature=-1.0 has to be from"),
    (
      {"prompt": "a", "tree": 4},
      "no tree of 4 nodes in run/tree.json: python -m",
    ),
    ({"prompt": "a", "sliding_window": 0}, "--sliding_window=0"),
    ({"prompt": "a", "heads": 99}, "--heads=99 is outside 1..3"),
    ({"prompt": "a", "temperature": "nan"}, "--temperature=nan has to be"),
    ({"prompt": "a", "temperature": "1", "top_p": 0}, "--top_p=0.0 has to be"),
    ({"prompt": "a", "seed": -1, "temperature": 1}, "--seed=-1 is outside"),
    ({"prompt": "a", "seed": 1}, "--seed does nothing at temperature 0"),
    ({"prompt": "a", "stop_id": [259]}, "--stop_id=259 is outside the vocab"),
    ({"prompt": "a", "stop": ["x", ""]}, "--stop is empty"),
    ({"prompt": "a", "num_samples": 2}, "--num_samples=2: greedy decoding"),
    ({"prompt": "a", "num_samples": 0}, "--num_samples=0 is too small"),
    ({"prompt": "a", "chat": True}, "the model has no chat template"),
    ({"prompt": "a", "system": "b"}, "--system is the system message of a ch"),
  ],
)
def test_errors_are_one_line(call, settings, words, monkeypatch):
  """Before the model is read."""
  monkeypatch.setattr(folders, "load_step", None)
  with pytest.raises(SystemExit, match=f"^error: {words}") as error:
    call(**settings)
  assert "\n" not in str(error.value)


def test_a_text_beyond_the_trained_length_is_told(call, loaded, monkeypatch):
  _, cfg, codec = loaded

  def change(**sections):
    changed = cfg.replace(**sections)
    monkeypatch.setattr(folders, "settings", lambda *_: (changed, codec))

  line = "--max_new reach 7 tokens, more than the 6 that the model is made for"
  change(data={"seq_len": 6})  # of its own run
  assert line in call(prompt="ab", max_new=4).err
  change(model={"rope_length": 3, "rope_scaling": "linear", "rope_factor": 2.0})
  assert line in call(prompt="ab", max_new=4).err
  # Its length is not in its config.
  change(model={"rope_length": 3, "rope_scaling": "llama3", "rope_factor": 2.0})
  assert "made for" not in call(prompt="ab", max_new=4).err
  change(model={"rope_length": 6}, data={"seq_len": 5})
  assert line in call(prompt="ab", max_new=4).err  # bos is the first
  assert "made for" not in call(prompt="ab", max_new=3).err
  windowed = call(prompt="ab", max_new=4, sliding_window=5)
  assert "made for" not in windowed.err


def test_a_missing_run_is_one_line(call, monkeypatch):
  def fail(path, step):
    raise checkpoints.CheckpointError(f"{path} holds no checkpoint")

  monkeypatch.setattr(folders, "settings", fail)
  with pytest.raises(SystemExit, match="^error: run holds no checkpoint$"):
    call(prompt="a")


@pytest.mark.parametrize("width", [1, 2, 3, 99])
def test_a_string_ends_the_text_however_it_is_cut(width):
  for text, stops, want in (
    ("abcabd", ["abd"], "abc"),
    ("abcabd", ["abx", "z"], "abcabd"),
    ("aaab", ["aab"], "a"),
    ("xabz", ["xabz", "ab"], "x"),  # ends first
    ("abc", [], "abc"),
    ("ab", ["abc"], "ab"),  # its beginning at the end of the text
  ):
    parts = [text[i : i + width] for i in range(0, len(text), width)]
    got = list(stream.until(iter(parts), stops))
    assert "".join(got) == want
    assert stops or len(got) == len(parts) + 1  # nothing waits
