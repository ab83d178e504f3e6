"""Redraws the plots and tables of every claim from its CSV files.

`python -m experiments.claims`, or `make results`. A claim whose module
`report` has `redraw(results)` takes part: it draws its pictures in the folder
`results`, and returns the Markdown that its README holds between two marks.
"""

import importlib
import pathlib
import types

from experiments.startup import program

ROOT = pathlib.Path(__file__).parent
_BEGIN, _END = "<!-- redrawn from results -->\n", "<!-- end -->\n"


def reports() -> dict[str, types.ModuleType]:
  """The modules that redraw, by the claim's name."""
  found = {}
  for path in sorted(ROOT.glob("*/report.py")):
    name = path.parent.name
    module = importlib.import_module(f"{__package__}.{name}.report")
    if hasattr(module, "redraw"):
      found[name] = module
  return found


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
  return f"{before}{begin}\n{text.strip()}\n\n{end}{after}"


def main(_: list[str]) -> None:
  """Redraws every claim that has results."""
  for name, module in reports().items():
    folder = ROOT / name
    if not any((folder / "results").glob("*.csv")):
      print(f"{name}: no results yet")
      continue
    page = folder / "README.md"
    text = put(page.read_text("utf-8"), module.redraw(folder / "results"))
    page.write_text(text, encoding="utf-8")
    print(f"{name}: redrawn")


if __name__ == "__main__":
  program.start(main)
