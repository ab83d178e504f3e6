"""The paper's runs: every config against the paper's tables, built abstractly.

The figures below are tables S13 and S14 as printed (the counts as derived
from S14), so that a config cannot agree with itself alone.
"""

import dataclasses
import importlib
import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags

from configs.paper import arithmetic, bytes_7b, summarisation
from experiments.startup import options
from mtp_jax import sharding
from mtp_jax.model import model
from mtp_jax.train import optim
from tests.test_sizes import COUNTS, printed

PAPER = pathlib.Path(summarisation.__file__).parent
FAMILIES = {
  path.stem: importlib.import_module(f"configs.paper.{path.stem}")
  for path in sorted(PAPER.glob("*.py"))
  if path.stem not in ("__init__", "base")
}
ALL = [(f, name) for f, module in FAMILIES.items() for name in module.RUNS]

# Family, runs (a pattern): batch in 2^20 tokens, steps, tokens in billions,
# warm-up, peak, context, decay ratio. The order is table S13's.
ROWS = """
scaling       (0.3|0.6|1.3|3)B-n[124]  8  10850   91.0 1000 3e-4 4096 0.03
scaling       6.7B-n[124]              8  25000  209.7 2000 3e-4 4096 0.03
scaling       13B-n[124]               8  25000  209.7 1000 3e-4 4096 0.03
code_7b       200B-n[12468]            8  25000  209.7 2000 3e-4 4096 0.03
code_7b       200B-n4-[a-z3]+          8  25000  209.7 2000 3e-4 4096 0.03
code_7b       500B-n[14]               7  68570  503.3 2000 3e-4 4096 0.03
code_7b       1T-n[14]                 7 136240 1000.0 2000 3e-4 4096 0.03
bytes_7b      7B-n(1|8|16|32)         12  25000  314.6 2000 3e-4 8192 0.03
language_7b   200B-n[124]              8  25000  209.7 2000 3e-4 4096 0.10
language_7b   500B-n[124]              8  60000  503.3 2000 3e-4 4096 0.10
induction     \\d+[MB]-n[12]          .25 100000   26.2 2000 1e-4 2048 0.03
induction     \\d+[MB]-n[12]-books     .5  50000   26.2 2000 1e-4 2048 0.03
arithmetic    30M-n[124]             .25 100000   26.2 2000 1e-4 1024 0.03
arithmetic    100M-n[124]            .25 100000   26.2 2000 1e-4 2048 0.03
summarisation bigpatent-n[124]      .125  76680   10.1  100 3e-5 4096 0.03
summarisation cnn_dm-n[124]         .125   7140    0.9  100 3e-5 4096 0.03
summarisation multi_news-n[124]     .125   3330    0.4  100 3e-5 4096 0.03
summarisation orangesum-n[124]      .125    360    0.0  100 3e-5 4096 0.03
summarisation pn_summary-n[124]     .125   3450    0.5  100 3e-5 4096 0.03
summarisation samsum-n[124]         .125     60    0.0  100 3e-5 4096 0.03
summarisation thaisum-n[124]        .125  23640    3.1  100 3e-5 4096 0.03
summarisation wikisummary-n[124]    .125   2550    0.3  100 3e-5 4096 0.03
summarisation xsum-n[124]           .125   2760    0.4  100 3e-5 4096 0.03
codecontests  7B-n[14](-head1)?      .25  13000    3.6  400 5e-5 4096 0.004
llama2_heads  7B-n[14](-[a-z3]+)?      8  25000  209.7 2000 3e-4 4096 0.03
"""  # The last has no row of its own: that of 200B is ours.
RUNS_OF_ROWS = (3 * 4, 3, 3, 5, 4, 2, 2, 4, 3, 3, 14, 14, 3, 3, *[3] * 9, 3, 4)


def rows():
  found = []
  for line in ROWS.strip().splitlines():
    family, pattern, *numbers = line.split()
    batch, steps, tokens, warmup, peak, context, end = numbers
    row = types.SimpleNamespace(
      batch=float(batch) * 2**20,
      steps=int(steps),
      tokens=tokens,
      warmup=int(warmup),
      peak=float(peak),
      context=int(context),
      end=float(end),
    )
    found.append((family, re.compile(pattern), row))
  return found


def row_of(family, name):
  (row,) = (r for f, p, r in rows() if f == family and p.fullmatch(name))
  return row


def test_every_row_of_the_table_has_its_runs():
  counts = tuple(
    sum(f == family and bool(pattern.fullmatch(name)) for f, name in ALL)
    for family, pattern, _ in rows()
  )
  assert counts == RUNS_OF_ROWS
  assert len(set(ALL)) == len(ALL) == sum(RUNS_OF_ROWS)


@pytest.mark.parametrize("family, name", ALL)
def test_table_s13(family, name):
  row, cfg = row_of(family, name), FAMILIES[family].get_config(name).check()
  assert cfg.data.seq_len == row.context
  assert cfg.data.batch * cfg.data.seq_len == row.batch
  assert cfg.train.steps == row.steps
  total = row.batch * row.steps
  if family == "codecontests":  # the paper's row disagrees with itself
    assert (total, row.tokens) == (3_407_872_000, "3.6")
  else:
    assert f"{total / 1e9:.1f}" == row.tokens

  rate = optim.schedule(cfg.optim, cfg.train.steps)
  middle, last = row.warmup // 2, min(row.warmup, row.steps - 1)
  wanted = {0: 0.0, middle: row.peak / 2, last: row.peak * last / row.warmup}
  if row.steps > row.warmup:
    wanted[row.steps] = row.peak * row.end
  for step, value in wanted.items():
    np.testing.assert_allclose(rate(step), value, rtol=1e-6)  # float32
  assert cfg.optim.clip == (0.1 if family == "codecontests" else 1.0)
  assert (cfg.optim.beta1, cfg.optim.beta2, cfg.optim.decay) == (0.9, 0.95, 0.1)
  assert (cfg.model.dtype, cfg.model.remat) == ("bfloat16", "full")


def test_the_shortest_run_ends_in_warm_up():
  """SAMSum: 60 steps on the slope of 100 to 3e-5."""
  cfg = summarisation.get_config("samsum-n1")
  rates = optim.schedule(cfg.optim, cfg.train.steps)(np.arange(60))
  wanted = 3e-5 * np.arange(60) / 100
  # The schedule subtracts float32 numbers of the peak's size.
  np.testing.assert_allclose(rates, wanted, rtol=0, atol=2**-23 * 3e-5)


@pytest.mark.parametrize("corpus", list(summarisation.STEPS)[1:])
def test_every_epoch_is_kept(corpus):
  cfg = summarisation.get_config(f"{corpus}-n1").train
  assert 3 * cfg.save_every == 3 * cfg.eval_every == cfg.steps
  assert cfg.keep >= 3


def count(cfg):
  found = model.count_parameters(cfg)
  return found["layers"], found["total"] - found["layers"]


@pytest.mark.parametrize("family, name", ALL)
def test_table_s14(family, name):
  """Counts to the printed digits, the same for every n; and what the other
  heads and vocabularies make of them."""
  cfg = FAMILIES[family].get_config(name).model
  n, own = int(re.search(r"-n(\d+)", name)[1]), 1
  layers, ends = count(cfg)
  D, L, variant = cfg.width, 32, name.split("-", 2)[2:]
  per_layer = 4 * D * D + 3 * D * cfg.mlp + 2 * D
  if variant == ["linear"]:  # no layers of the trunk are given for them
    layers -= 4 * D * D
    assert (cfg.head, cfg.trunk_layers) == ("linear", L)
  elif variant == ["plus3"]:
    layers -= 3 * per_layer
    assert (cfg.head, cfg.trunk_layers) == ("parallel", L - 4 + 3)
  elif variant == ["head1"]:  # three heads are dropped
    layers += 3 * per_layer
    assert (cfg.n_future, cfg.trunk_layers) == (1, L - 4)
  elif family == "bytes_7b":
    own = n
    assert (cfg.head, cfg.trunk_layers) == ("unembedding", L)
  elif variant in (["causal"], ["anticausal"]):
    assert (cfg.head, cfg.trunk_layers) == (variant[0], L - 4)
  else:
    assert cfg.head == "parallel"
    assert cfg.trunk_layers == cfg.layers - n
  if variant != ["head1"]:
    assert cfg.n_future == n
  wanted = COUNTS.get(name.split("-")[0], COUNTS["6.7B"])
  assert printed(layers, wanted[0]) == wanted[0]
  vocab = {"bytes_7b": 288, "arithmetic": 259}.get(family, 32_000)
  assert ends == (1 + own) * vocab * D
  if vocab == 32_000:
    assert printed(layers + ends, wanted[1]) == wanted[1]


@pytest.mark.parametrize("name", bytes_7b.RUNS)
def test_the_byte_vocabulary_splits_as_far_as_the_heads_do(name):
  cfg = bytes_7b.get_config(name).model
  mesh = jax.sharding.AbstractMesh((8, 32), ("data", "model"))

  def shard(cfg):
    tree = jax.eval_shape(lambda k: model.Model(cfg, k), jax.random.key(0))
    return sharding.shardings(tree, mesh)

  shard(cfg)
  for vocab in (259, 264, 272):
    with pytest.raises(ValueError, match=f"vocab {vocab} is not divisible"):
      shard(dataclasses.replace(cfg, vocab=vocab))
  assert 259 < cfg.vocab == 32 * 9 < 259 + 32


@pytest.mark.parametrize("family", FAMILIES)
def test_docstring_and_unknown_run(family):
  module = FAMILIES[family]
  said = module.__doc__
  (run,) = re.findall(rf"--config=configs/paper/{family}\.py:(\S+)", said)
  assert run in module.RUNS
  assert "S13" in said and "Corpus:" in said and "Planned slice" in said
  for name in ("13C-n4", ""):
    with pytest.raises(ValueError) as error:
      module.get_config(name)
    line = f"no run {name!r}; choose one of {', '.join(module.RUNS)}"
    assert str(error.value) == line


@pytest.mark.parametrize(
  "family", ["codecontests", "summarisation", "llama2_heads"]
)
def test_finetuning_starts_from_a_model(family):
  """The command names it, and the data has the fields of the docstring."""
  module = FAMILIES[family]
  (command,) = re.findall(r"python -m (?:.*\\\n)+.*", module.__doc__)
  assert "--init=" in command and "random" not in module.__doc__
  for name in module.RUNS:
    cfg = module.get_config(name).check()
    assert cfg.train.finetune  # `fit` refuses it without a model
    data = cfg.data
    if family == "llama2_heads":
      assert (data.source, data.prompt) == ("array_record", "")
    else:
      assert (data.prompt, data.field) == ("prompt", "answer")
      learnt = "answer" if family == "summarisation" else "all"
      assert data.loss_on == learnt


@pytest.mark.parametrize("family", FAMILIES)
def test_flags(family, monkeypatch):
  module = FAMILIES[family]
  name = module.RUNS[-1]
  argv = [
    "program",
    f"--config=configs/paper/{family}.py:{name}",
    "--config.data.path=elsewhere",
    "--config.mesh.model=4",
  ]
  monkeypatch.setattr(sys, "argv", argv)  # config_flags reads it
  values = flags.FlagValues()
  holder = options.define_config(values)
  values(argv)
  wanted = module.get_config(name)
  assert holder.value == wanted.replace(
    data={"path": "elsewhere"}, mesh={"model": 4}
  )


@pytest.mark.parametrize(
  "name, line",
  [
    # Loaded, checked, on the mesh: the corpus is what the user has to bring.
    ("30M-n4", "data.path 'data/arithmetic' does not exist"),
    ("30M-n8", f"no run '30M-n8'; choose one of {', '.join(arithmetic.RUNS)}"),
  ],
)
def test_from_the_command_line(call, name, line, tmp_path):
  code, _, err = call(
    f"--config=configs/paper/arithmetic.py:{name}",
    f"--workdir={tmp_path / 'w'}",
    f"--config.data.cache={tmp_path}",
  )
  assert code == 1
  last = err.splitlines()[-1]
  assert last.startswith("error: ") and last.endswith(line)
  assert "Traceback" not in err
