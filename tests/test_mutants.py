"""The planted bugs still have a place to be planted in; they run apart."""

import pytest
from conftest import ROOT

from tests import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.bug)
def test_there_is_one_place_for_it(mutant):
  assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
  assert mutant.new != mutant.old


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.bug)
def test_the_tests_that_kill_it_exist(mutant):
  for name in mutant.tests.split():
    file, _, test = name.partition("::")
    text = (ROOT / "tests" / file).read_text()
    assert f"def {test.partition('[')[0]}(" in text or not test
