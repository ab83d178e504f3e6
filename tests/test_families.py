"""Texts of each supported family, with drafts, are transformers' greedy ones.

Their prompts end within and beyond what the models were trained on.
"""

import numpy as np
import pytest

from mtp_jax.decode import generate, layout
from mtp_jax.decode import tree as tree_lib
from mtp_jax.interchange import hugging_face
from mtp_jax.model import surgery
from tests import transformers_reference as reference

# Wide, so that some drafts of a random model are accepted.
FIRST, SECOND = (
  [[i] for i in range(8)],
  [[i, j] for i in (0, 3) for j in (0, 1)],
)
TREE = tree_lib.from_paths(FIRST + SECOND)


# The plain Llama is the dynamic one's beginning.
@pytest.mark.parametrize(
  "case, drafts",
  [(case, TREE) for case in reference.CASES if case != "llama"]
  + [("mistral, linear, tied", 3)],
  ids=lambda x: "chain" if x == 3 else "tree" if x == TREE else x,
)
def test_drafts_write_transformers_text(case, drafts, tmp_path):
  folder = reference.write(case, tmp_path)
  net = hugging_face.load(folder, hugging_face.settings(folder))
  want, tokens = reference.reference(case), reference.window()
  result = generate.generate(
    layout.lay_out(surgery.add_heads(net, 3)),
    [tokens[:length] for length in reference.PROMPTS],
    heads=drafts,
    max_new=reference.NEW,
  )
  for i, text in enumerate(result.texts):
    assert text.tokens.tolist() == want["tokens"][i]
    np.testing.assert_allclose(text.logprob, want["logprob"][i], atol=1e-4)
  assert drafts == 3 or result.tokens_per_forward > 1
