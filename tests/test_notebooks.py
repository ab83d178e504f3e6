"""The notebooks run from a clean kernel, and are saved with their outputs."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "experiments" / "notebooks"
SMALL = {  # what makes a run take seconds
  '"width": 96': '"width": 16',
  "steps = 1200": "steps = 3",
  '"warmup": 50': '"warmup": 1',
  '"max_bytes": 4_000_000': '"max_bytes": 300_000',
  '"vocab": 8192, "width": 128, "layers": 8': '"vocab": 64, "layers": 5',
  "for n in (1, 2, 4)": "for n in (1, 4)",
}


def text(cell) -> str:
  """What a cell printed, or showed as HTML."""
  parts = [o.get("text", "") for o in cell["outputs"]]
  return "".join(parts) + str([o.get("data", "") for o in cell["outputs"]])


@pytest.fixture(params=sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def notebook(request):
  return nbformat.read(request.param, as_version=4)


def test_it_was_saved_as_it_ran(notebook):
  cells = [c for c in notebook.cells if c["cell_type"] == "code"]
  assert [c["execution_count"] for c in cells] == [*range(1, len(cells) + 1)]
  said = "".join(map(text, cells))
  assert said.count("same text as ordinary decoding: True") == 2
  assert "Traceback" not in said
  assert "tokens per forward" in said and "MiB" in said


@pytest.mark.slow
def test_it_runs_from_a_clean_kernel(notebook, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))  # and the cache
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  cells = [c for c in notebook.cells if c["cell_type"] == "code"]
  for old, new in SMALL.items():
    assert sum(old in c["source"] for c in cells)
    for cell in cells:
      cell["source"] = cell["source"].replace(old, new)
  client = nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(tmp_path)}},
  )
  client.execute()
  said = "".join(map(text, cells))
  assert said.count("same text as ordinary decoding: True") == 2
