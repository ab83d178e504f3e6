"""The pages are true: the map is the tree, the commands and the code run."""

import json
import pathlib
import re
import shlex

import forked
import pytest

import mtp_jax
from experiments.demo import report
from mtp_jax import tokenizer
from tests import parameters

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
EXPERIMENTS = (ROOT / "experiments" / "README.md").read_text("utf-8")
PROGRAMS = EXPERIMENTS.partition("## Claims")[0]
PAGES = [
  path.relative_to(ROOT).as_posix()
  for pages in ("*.md", "tests/*.md", "configs/**/*.md", "experiments/**/*.md")
  for path in ROOT.glob(pages)
]
SMALL = [  # what makes a run of the pages' commands take seconds
  f"--config.{setting}"
  for setting in (
    "model.width=16 model.mlp=24 model.layers=1 model.n_future=4 "
    "train.head_weights=() train.steps=3 optim.warmup=1 "
    "train.eval_batches=1 train.sample_tokens=0 data.batch=2 data.seq_len=32 "
    "data.max_bytes=300000 data.held_out=0.3"
  ).split()
]


def slug(title):
  """The anchor that GitHub gives a heading."""
  return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def blocks(language, page=README):
  found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)
  return [text for name, text in found if name == language]


def commands():
  text = "\n".join(blocks("", README + PROGRAMS)).replace("\\\n", " ")
  lines = [s for s in text.splitlines() if s.startswith("python -m ")]
  return [shlex.split(line, comments=True) for line in lines]


def mapped():
  """Paths that the README's map names; folders end in a slash."""
  (text,) = (b for b in blocks("") if b.startswith("configs/"))
  above, found = {}, set()  # the folder that each indentation lies in
  for line in text.splitlines():
    names = re.split(r"\s{2,}", line.strip())[0].split()
    indent = len(line) - len(line.lstrip())
    paths = [above.get(indent, "") + name for name in names]
    above[indent + 2] = paths[-1]
    found |= set(paths)
  return found


def test_the_map_is_the_tree():
  """The README's map has the folders, but for those of single experiments."""
  tree = set()
  for top in ("configs", "experiments", "mtp_jax", "tests"):
    for path in (ROOT / top).rglob("*.*"):
      folder = path.relative_to(ROOT).parent
      inside = folder.parent.name in ("claims", "engineering")
      if path.suffix in (".py", ".sh", ".ipynb") and not inside:
        tree.add(f"{folder.as_posix()}/")
  assert mapped() == tree


def test_the_page_of_experiments_has_programs_and_measurements():
  """`test_every_claim_is_in_the_table` looks for the claims."""
  here = ROOT / "experiments"
  files = {f.stem for f in here.glob("*.py")} - {"__init__"}
  assert set(re.findall(r"^\| `(\w+)` \|", PROGRAMS, re.M)) == files
  linked = set(re.findall(r"\]\(([\w/]+/README\.md)", EXPERIMENTS))
  pages = {f.relative_to(here).as_posix() for f in here.glob("*/*/README.md")}
  assert pages <= linked
  for link in linked:
    assert (here / link).exists(), link


def test_pages_are_short():
  """A long list belongs beside what it lists."""
  for name, lines in (("README.md", 160), ("BUILD.md", 250)):
    text = (ROOT / name).read_text("utf-8").splitlines()
    assert len(text) <= lines and max(map(len, text)) <= 100, name


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("readme")
  (folder / "configs").symlink_to(ROOT / "configs")
  (folder / "start.txt").write_text("import os\n")
  (folder / "books").mkdir()
  for i in range(40):
    text = f"Chapter {i}. It was a {'very ' * i}dark night.\n" * 9
    (folder / "books" / f"{i}.txt").write_text(text)
  net = parameters.random_model(vocab=259, n_future=1)
  mtp_jax.save(net, folder / "llama", codec=tokenizer.Bytes())
  return folder


def run(home, arguments):
  arguments = [a.replace("~", str(home)) for a in arguments]
  # HOME: ~/books, and the cache.
  process = forked.Process(arguments, cwd=home, HOME=str(home))
  out, err = process.communicate()
  assert process.returncode == 0, (arguments, out, err[-3000:])
  return err + out


@pytest.mark.slow
def test_every_command_runs(home):
  found = commands()
  assert [c[2] for c in found] == [
    "experiments.generate",
    "experiments.train",
    "experiments.generate",
    "experiments.convert",
    "experiments.train",
    "experiments.tune_tree",
    "experiments.generate",
    "experiments.evaluate",
    "experiments.train_tokenizer",
    "experiments.train",
    "experiments.plan",
  ]
  for _, *arguments in found:
    if "--init=llama" in arguments:
      arguments += [s for s in SMALL if ".model." not in s]
    elif arguments[1] == "experiments.train":
      arguments += SMALL
    elif arguments[1] == "experiments.train_tokenizer":
      arguments += ["--max_bytes=300000", "--held_out=0.3"]
    elif arguments[1] == "experiments.tune_tree":
      arguments += ["--prompts=4", "--prompt_len=8"]
    elif arguments[1] == "experiments.plan":
      arguments += ["--json=plan.json"]
    elif arguments[1] == "experiments.evaluate":
      arguments += ["--max_new=16"]
    out = run(home, arguments)
    if arguments[1] == "experiments.plan":
      assert "training step on v5e:2x2: 4 chips" in out
      assert "of 15.75: fits" in out
      plan = json.loads((home / "plan.json").read_text())
      assert plan["fits"] and plan["chips"] == 4 and plan["flops"] > 1e9
      assert "text" not in plan["compiled"]
    if arguments[1] == "experiments.generate":
      assert " s in all" in out


@pytest.mark.slow
def test_the_demo_and_the_notebook(home):
  """`make demo`, made small, and the README's lines on what it left."""
  makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
  (line,) = re.findall(
    r"\$\(BIN\)/python (-m experiments\.demo\.run.*)", makefile
  )
  small = "--prompts=2 --prompt_len=8 --repeats=1 --batches=1"
  out = run(home, shlex.split(line) + SMALL + small.split())
  for text in ("bits per byte", "tokens per forward", "speedup", "identical"):
    assert text in re.sub(r"\s*\n[│┃ ]*", " ", out) or text in out, out
  page = (home / "runs/demo/report.html").read_text()
  assert "data:image/png;base64," in page and page.count("<pre>") == 4
  assert (home / "runs/demo/demo.json").exists()
  (code,) = blocks("python")
  out = run(home, ["-c", code])
  assert re.search(r"[\d.]+$", out.strip())


@pytest.mark.parametrize(
  "text, words, times",
  [
    ("", 1, 0),
    ("1 1 1", 1, 0),
    ("a b a b", 1, 1),
    ("x = the, the\n the the2", 1, 3),
    ("_state_state", 1, 2),
    ("x the string the string the", 2, 2),
    ("a b c x a b c a b c", 3, 2),
  ],
)
def test_the_demo_counts_what_is_repeated(text, words, times):
  assert report.most_repeats(text, words) == times


def test_promises_name_tests_that_exist():
  text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
  files = [*(ROOT / "tests").glob("test_*.py")]
  known = {f.name for f in files}
  for file in files:
    known |= set(re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.M))
  named = set(re.findall(r"`(test_\w+(?:\.py)?)`", text))
  assert len(named) > 30 and named <= known, named - known


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
  text = (ROOT / name).read_text(encoding="utf-8")
  for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
    there = (ROOT / name).parent / link if link else ROOT / name
    assert there.exists(), link
    if anchor:
      titles = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.M)
      assert anchor in [slug(title) for title in titles], (link, anchor)
