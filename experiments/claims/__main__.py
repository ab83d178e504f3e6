"""Redraws the plots and tables of the claims that have CSV files.

`python -m experiments.claims`, or `make results`. A claim's folder `results`
has a CSV file for each scale, cpu.csv or gpu.csv: a copy of the sweep.csv that
its program wrote. Its README has a section for each file, between two marks. A
claim takes part whose module `report` has `section(rows, path)`. It is given
the rows of finished runs and the file's path, draws pictures beside that file,
cpu.png or cpu_loss.png, and returns tables as Markdown.
"""

import importlib
import pathlib
import textwrap
import types

from experiments.measure import tidy
from experiments.startup import program

ROOT = pathlib.Path(__file__).parent
_BEGIN, _END = "<!-- redrawn from results -->\n", "<!-- end -->\n"


def reports() -> dict[str, types.ModuleType]:
  """The modules that draw a section, by the claim's name."""
  found = {}
  for path in sorted(ROOT.glob("*/report.py")):
    name = path.parent.name
    module = importlib.import_module(f"{__package__}.{name}.report")
    if hasattr(module, "section"):
      found[name] = module
  return found


def redraw(claim: str, report: types.ModuleType, results: pathlib.Path) -> str:
  """Draws the pictures of a claim; returns the Markdown of its README.

  A section begins with its scale and pictures, and ends with hardware, date,
  versions and commit. A file without a finished run has none.

  Args:
    claim: whose rows are shown.
    report: its module, see `reports`.
    results: the folder of its CSV files, which takes the pictures.
  """
  sections = []
  for path in sorted(results.glob("*.csv")):
    if rows := tidy.finished(tidy.read(path), claim):
      text = report.section(rows, path).strip()
      pictures = [
        f"![{claim}, {picture.stem}](results/{picture.name})"
        for picture in sorted(results.glob(f"{path.stem}[._]*png"))
      ]
      origin = textwrap.fill(
        f"{tidy.origin(rows)}.", 100, break_on_hyphens=False
      )
      sections += [f"`{path.stem}`", *pictures, text, origin]
  return "\n\n".join(sections)


def put(page: str, text: str) -> str:
  """`page` with `text` between its marks, in place of what is there.

  Raises:
    ValueError: it does not have each mark once, in order.
  """
  before, begin, rest = page.partition(_BEGIN)
  _, end, after = rest.partition(_END)
  if not (begin and end) or _BEGIN in after or _END in before + after:
    raise ValueError(
      f"a README needs the lines {_BEGIN.strip()} and {_END.strip()} once each"
    )
  text = f"\n{text}\n\n" if text else ""
  return f"{before}{begin}{text}{end}{after}"


def main(_: list[str]) -> None:
  """Redraws every claim whose report has `section`."""
  # All are read first: a damaged file leaves every README as it is.
  texts = {
    name: redraw(name, module, ROOT / name / "results")
    for name, module in reports().items()
  }
  for name, text in texts.items():
    page = ROOT / name / "README.md"
    page.write_text(put(page.read_text("utf-8"), text), encoding="utf-8")
    print(f"{name}: {'redrawn' if text else 'no results yet'}")


if __name__ == "__main__":
  program.start(main)
