"""The paper's sizes: parameter counts to the printed digits, for every n."""

import dataclasses

import pytest

from configs import sizes
from mtp_jax.model import model

# Counts in millions that follow from the paper's table S14 for Llama 2
# shapes, as printed: without embedding and unembedding, and in all.
COUNTS = {
  "1M": ("1.31", "9.5"),
  "3M": ("3.41", "19.8"),
  "10M": ("10.6", "35.2"),
  "30M": ("34.1", "66.9"),
  "100M": ("99.1", "148"),
  "300M": ("321", "387"),
  "1B": ("1019", "1118"),
  "0.3B": ("231", "297"),
  "0.6B": ("549", "631"),
  "1.3B": ("1233", "1364"),
  "3B": ("2855", "3019"),
  "6.7B": ("6476", "6738"),
  "13B": ("12688", "13016"),
}
FEED_FORWARD = {
  "1M": 512,
  "3M": 768,
  "10M": 1024,
  "30M": 1536,
  "100M": 2048,
  "300M": 2816,
  "1B": 4096,
  "0.3B": 2816,
  "0.6B": 3584,
  "1.3B": 5632,
  "3B": 6912,
  "6.7B": 11008,
  "13B": 13824,
}


def printed(count, like):
  """`count` in millions with as many decimals as `like`."""
  decimals = len(like.partition(".")[2])
  return f"{count / 1e6:.{decimals}f}"


def test_all_thirteen():
  assert set(sizes.SIZES) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
  """The same for n = 1, 2, 4: the heads' layers are taken from the trunk."""
  cfg = sizes.model(name)
  cfg.check()
  assert cfg.mlp == FEED_FORWARD[name]
  one = model.count_parameters(cfg)
  layers, total = COUNTS[name]
  assert printed(one["layers"], layers) == layers
  assert printed(one["total"], total) == total
  for n in (2, 4):
    cfg = sizes.model(name, n_future=n)
    if cfg.layers == n:  # 3M has four layers: four heads leave no trunk
      with pytest.raises(ValueError, match="layers 4 leaves 0 trunk layers"):
        model.count_parameters(cfg)
      continue
    assert cfg.trunk_layers == cfg.layers - n
    assert model.count_parameters(cfg) == one


def test_seven_billion():
  """28 trunk layers under four heads; table S4's '+3' puts three back."""
  cfg = sizes.model("6.7B", n_future=4)
  assert cfg.trunk_layers == 28
  count = model.count_parameters(cfg)["layers"]
  more = model.count_parameters(dataclasses.replace(cfg, extra_layers=3))
  assert (more["layers"] - count) * 32 == 3 * (count - cfg.width)


def test_vocabulary():
  cfg = sizes.model("1M", vocab=257)
  count = model.count_parameters(cfg)
  assert count["total"] - count["layers"] == 2 * 257 * cfg.width


def test_unknown_size():
  with pytest.raises(ValueError, match="no size '7B'; .* 6.7B, 13B"):
    sizes.model("7B")
