"""The benchmark of decoding: its limits, its comparisons, one small run."""

import dataclasses
import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import ROOT

from experiments.engineering.decode_speed import run
from experiments.measure import compare, limits
from mtp_jax import config, tokenizer
from mtp_jax.data import pipeline
from mtp_jax.decode import autotune, generate, layout
from mtp_jax.decode import tree as tree_lib
from mtp_jax.train import workdir
from tests import parameters

D, F, H, K, V, N = 24, 41, 6, 2, 259, 3
BLOCK = 4 * (2 * D + D * D * 2 + 2 * D * D // 3 + 3 * D * F)  # bytes
CACHED = 4 * 2 * D // 3  # bytes per token and layer


def make(head, **more):
  sizes = {"vocab": V, "width": D, "mlp": F, "attn_heads": H, "kv_heads": K}
  return parameters.random_model(head, n_future=N, **sizes, **more)


@pytest.mark.parametrize(
  "head, heads, blocks, unembeddings, caches",
  [
    ("parallel", 1, 3, 1, 3),
    ("parallel", 3, 5, 2, 5),  # the shared one twice: to judge and to draft
    ("unembedding", 1, 2, 1, 2),
    ("unembedding", 3, 2, 3, 2),
  ],
)
def test_bytes_of_a_pass(head, heads, blocks, unembeddings, caches):
  decoder = layout.lay_out(make(head))
  got = limits.bytes_per_pass(decoder, tree_lib.chain(heads), 7, 100)
  weights = blocks * BLOCK + unembeddings * 4 * D * V + 4 * D
  assert got == weights + 7 * 100 * caches * CACHED


def test_bandwidth_is_of_this_machine():
  assert 1e8 < limits.bandwidth(64, 3) < 1e13  # bytes per second


def test_flop_rate_is_of_this_machine():
  assert 1e8 < limits.flop_rate(256, 3) < 1e16


def test_texts_are_compared_with_the_margin_where_they_part():
  def text(tokens):
    zero = np.zeros(len(tokens))
    margin = np.arange(len(tokens)) / 8
    return generate.Text(np.array(tokens), zero, zero, margin, zero, zero)

  def result(*rows):
    return generate.Result([text(r) for r in rows], tree_lib.Tree())

  ordinary = [result([1, 2, 3], [4, 5, 6])]
  assert compare.same([result([1, 2, 3], [4, 5, 6])], ordinary) == {
    "of": 2,
    "same": 2,
    "margins": [],
  }
  peer = [[np.array([1, 2, 3]), np.array([4, 5, 7])]]
  assert compare.same(peer, ordinary)["margins"] == [0.25]


@pytest.fixture
def trained(monkeypatch, tmp_path):
  """A random byte model, with documents of its own."""
  net = make("unembedding", layers=1)  # a decoder compiles each layer anew
  cfg = config.Config(model=net.cfg, data=config.Data(seq_len=32))
  rng = np.random.default_rng(0)
  packed = pipeline.Packed(
    rng.integers(0, 256, 1600), np.arange(0, 1600, 80), 1.0, "", 20, {}
  )
  loaded = net, cfg, tokenizer.Bytes()
  monkeypatch.setattr(workdir, "load", lambda path: loaded)
  monkeypatch.setattr(pipeline, "pack", lambda data, codec: (None, packed))
  # A random model's drafts are never right, and no tree would be built.
  chances = np.array([[0.4, 0.2, 0.1], [0.3, 0.1, 0.1]])
  monkeypatch.setattr(
    autotune, "measure_acceptance", lambda *args, **kwargs: chances
  )
  monkeypatch.setattr(autotune, "SIZES", (5,))
  monkeypatch.setattr(autotune, "CALL", 0.0)
  monkeypatch.setattr(limits, "bandwidth", lambda: 1e9)
  flags.FLAGS.mark_as_parsed()
  return tmp_path


@pytest.mark.slow
def test_one_small_run(trained, capsys):
  with flagsaver.flagsaver(
    workdirs=["runs/small"],
    output=trained,
    batches=["3"],
    prompts=6,
    fewest=2,
    prompt_len=9,
    repeats=1,
    served=9,
  ):
    run.main(["run"])
  found = json.loads((trained / "results.json").read_text())["models"]["small"]
  assert (trained / "small.png").stat().st_size > 10_000
  names = ["ordinary", "chain 2", "chain 3", "tree 5"]
  for rows in found["batches"].values():
    assert list(rows) == names
    for row in rows.values():
      same = row["same_texts"]
      assert same["of"] == 3
      assert max(same["margins"], default=0) < compare.EPSILON
      assert row["efficiency"] == pytest.approx(
        row["speedup"] / row["tokens_per_forward"]
      )
    assert rows["ordinary"]["speedup"] == rows["ordinary"]["limit"] == 1
    assert rows["chain 3"]["limit"] < 1
  assert (
    found["caches"]["int8"]["bytes_per_token"]
    < (found["caches"]["float32"]["bytes_per_token"])
  )
  assert all(row["same_texts"] for row in found["drafts"].values())
  assert found["served"]["3"]["prompts"] == 9
  for served in found["served"].values():
    rows = served["rows"]
    assert list(rows) == names
    assert sum(row["auto"] for row in rows.values()) == 1
    assert rows["ordinary"]["speedup"] == 1
    assert rows["ordinary"]["predicted_tokens_per_forward"] == 1
  lines = capsys.readouterr().out.splitlines()
  assert sum(line.startswith("| 3 | tree 5 |") for line in lines) == 1
  assert sum(line.startswith("| 3 | 9 | tree 5 |") for line in lines) == 1


@pytest.mark.slow
def test_costs(call, tmp_path):
  path = tmp_path / "costs.json"
  sizes = "width=24 mlp=32 layers=1 attn_heads=2 kv_heads=2 n_future=2".split()
  code, _, err = call(
    "--config=configs/decode_speed.py:pieces",
    *(f"--config.model.{size}" for size in (*sizes, "head=unembedding")),
    *("--batches=3", "--length=20", "--cache_len=800", "--repeats=1"),
    *("--dtypes=int8", f"--output={path}"),
    module="experiments.engineering.decode_speed.costs",
  )
  assert code == 0, err
  found = json.loads(path.read_text())
  assert [(r["batch"], r["heads"]) for r in found["width"]] == [
    (3, 1), (3, 2),
  ]  # fmt: skip
  assert [(r["tokens"], r["grown"]) for r in found["cache"]] == [
    (n, grown) for n in (34, 334, 734) for grown in (True, False)
  ]
  assert all(r["seconds"] > 0 for r in found["width"] + found["cache"])


@pytest.mark.slow
def test_checkouts_take_turns(call, tmp_path):
  """This one, and one whose clock runs 10,000 times as fast."""
  path, other = tmp_path / "out.json", tmp_path / "other"
  other.mkdir()
  (other / "sitecustomize.py").write_text(
    "import time\nreal = time.perf_counter\n"
    "time.perf_counter = lambda: 1e4 * real()\n"
  )
  (other / "mtp_jax").symlink_to(ROOT / "mtp_jax")
  code, out, err = call(
    "--config=configs/decode_speed.py:smollm2",
    *("--config.model.width=36", "--config.model.layers=2"),
    *("--config.model.vocab=31", "--config.model.mlp=8"),
    *("--batches=2", "--widths=1,9", "--length=5", "--rounds=2"),
    *(f"--before={other}", f"--output={path}"),
    module="experiments.engineering.decode_speed.checkouts",
  )
  assert code == 0, err
  rows = json.loads(path.read_text())["rows"]
  windows = [(r["batch"], r["width"]) for r in rows]
  assert windows == [(2, 1), (2, 9), (1, 256)]
  for row in rows:
    before, after = row["seconds"]["before"], row["seconds"]["after"]
    assert len(before) == len(after) == 2
    assert min(before) > max(after) > 0
  assert out.splitlines()[-1].startswith("| 1 | 256 |")


@pytest.mark.parametrize("head", ["parallel", "unembedding"])
def test_a_llama_says_what_head_1_says(head):
  """Where torch and transformers are installed; make does not."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from experiments.measure import peer

  codec = tokenizer.Bytes()
  net = parameters.random_model(head, vocab=codec.vocab + 5, n_future=N)
  llama = peer.of(net, codec)
  tokens = np.random.default_rng(0).integers(0, codec.vocab, (2, 11))
  with torch.no_grad():
    got = llama(torch.tensor(tokens)).logits.numpy()
  want = np.asarray(net(tokens)[0, ..., : codec.vocab])
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_names():
  tree = tree_lib.from_paths([[0], [1]])
  chain = tree_lib.chain(4)
  assert [compare.name(t) for t in (tree_lib.Tree(), chain, tree)] == [
    "ordinary",
    "chain 4",
    "tree 3",
  ]
  wide = dataclasses.replace(chain, candidates=9)
  assert compare.name(wide) == "chain 4"
