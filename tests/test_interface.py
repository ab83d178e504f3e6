"""What stands in for a decoder or a rule, and settings as arrays."""

import ast
import pathlib

import numpy as np
import pytest

import mtp_jax.decode
from mtp_jax.decode import accept, interface, layout
from mtp_jax.decode import tree as tree_lib
from tests import parameters
from tests.mocks import Mock

RULES = [
  accept.GREEDY,
  accept.TopK(2),
  accept.Typical(),
  accept.SpeculativeSampling(),
  accept.Forced(1),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_every_rule_is_a_rule(rule):
  assert isinstance(rule, interface.Rule)
  interface.check_rule(rule, tree_lib.chain(3))


def test_a_model_and_a_mock_are_decoders():
  model = layout.lay_out(parameters.random_model("unembedding"))
  for decoder in (model, Mock(np.ones((1, 9), int), 13, 5)):
    assert isinstance(decoder, interface.Decoder)


@pytest.mark.parametrize("method", ["forward", "logits", "keep_path", "draft"])
def test_what_lacks_a_method_is_no_decoder(method):
  names = [n for n in dir(Mock) if not n.startswith("_") and n != method]
  Lacking = type("Lacking", (), {n: getattr(Mock, n) for n in names})
  lacking = Lacking()
  lacking.vocab, lacking.n_future = 13, 5
  with pytest.raises(ValueError, match="not an object of type Lacking"):
    interface.check_settings(lacking, heads=2, max_new=7)


def test_settings_are_arrays():
  """So that other numbers compile nothing, with 64 bits on or off."""
  mock = Mock(np.ones((1, 9), int), 13, 5)
  got = interface.check_settings(mock, heads=2, max_new=7, stop=3, seed=2**31)
  assert got.tree == tree_lib.chain(2) and got.rule is accept.GREEDY
  assert (got.max_new, got.max_new.dtype) == (7, np.int32)
  assert (got.seed, got.seed.dtype) == (2**31, np.uint32)
  assert got.stop.tolist() == [3, -1, -1, -1] and got.stop.dtype == np.int32


def test_no_signature_has_more_than_six_arguments():
  for path in pathlib.Path(mtp_jax.decode.__file__).parent.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef | ast.Lambda):
        a = node.args
        every = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
        names = [x.arg for x in every if x and x.arg != "self"]
        assert len(names) <= 6, (path.name, node.lineno, names)
