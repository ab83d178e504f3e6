"""One HTML page with its pictures inside, and the README's figure."""

import base64
import html
import io
import itertools
import json
import pathlib
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from experiments.measure import compare, study
from mtp_jax import tokenizer

matplotlib.use("Agg")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; color: #222; }
pre { background: #f7f7f7; padding: .8rem; overflow-x: auto;
  line-height: 1.45; }
table { border-collapse: collapse; }
td, th { padding: .2rem .9rem; text-align: right;
  border-bottom: 1px solid #ddd; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.pair pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
img { max-width: 100%; } .prompt { color: #888; }
.key span, pre span { border-radius: 2px; }
"""


def write(folder: pathlib.Path, result: dict, codec) -> None:
  """Writes report.html and demo.png into `folder`, from `demo.json`'s data."""
  figure = draw(folder, result)
  figure.savefig(folder / "demo.png", dpi=130)
  picture = io.BytesIO()
  figure.savefig(picture, dpi=130)
  plt.close(figure)
  image = base64.b64encode(picture.getvalue()).decode()
  first, last = result["decoding"][0], result["decoding"][-1]
  machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
  samples = "\n".join(
    '<div class="pair">'
    + "".join(
      f"<pre>{sample(codec, prompt, e['tokens'][i], e['per_pass'][i])}</pre>"
      for e in (first, last)
    )
    + "</div>"
    for i, prompt in enumerate(result["prompts"])
  )
  same = "identical"
  if last["differences"]:
    parts = html.escape(json.dumps(last["differences"]))
    near = max(d["margin"] for d in last["differences"]) <= compare.EPSILON
    kind = (
      "identical but for near-ties of the top two tokens"
      if near
      else "DIFFERENT"
    )
    same = f"{kind}: {parts}"
  page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>mtp_jax: what the demo found</title><style>{_STYLE}</style>
<h1>Multi-token prediction on this machine's Python files</h1>
<p>{html.escape(machine)}; {result["seconds"]} s since the command began.</p>
<img alt="loss, acceptance and speed" src="data:image/png;base64,{image}">
<h2>Heads, on {result["scores"]["tokens"]:,} held-out tokens</h2>
{heads_table(result)}
<h2>Decoding held-out files, one at a time</h2>
{decoding_table(result)}
<p>A forward pass writes its accepted drafts and a bonus token; both count.</p>
<h2>Completions: ordinary, and with {last["heads"]} heads</h2>
<p class="key">Grey: the prompt. A colour is one forward pass, deeper for more
tokens: {key(last["heads"])}. Both are
{kind_of_text(result)}. The texts are {same}.</p>
{samples}
</html>
"""
  (folder / "report.html").write_text(page, encoding="utf-8")


def kind_of_text(result: dict) -> str:
  """How the tokens of the texts were chosen."""
  if not result.get("temperature"):
    return "greedy"
  return f"sampled at temperature {result['temperature']}, with equal noise"


def most_repeats(text: str, words: int = 1) -> int:
  """How often a phrase of so many words stands in a row at most.

  Words are runs of letters and digits that begin with a letter; whatever marks
  are between them does not count.
  """
  found, most = re.findall(r"[^\W\d_][^\W_]*", text), 0
  for first in range(words):
    parts = zip(
      *(found[first + i :: words] for i in range(words)), strict=False
    )
    runs = (len([*same]) for _, same in itertools.groupby(parts))
    most = max(most, *runs, 0)
  return most


def most_repeats_of(texts: list[str]) -> dict[int, int]:
  """`most_repeats` of phrases of 1, 2 and 3 words, over all texts."""
  return {
    words: max(most_repeats(text, words) for text in texts)
    for words in (1, 2, 3)
  }


def draw(folder: pathlib.Path, result: dict) -> plt.Figure:
  """Loss by head, acceptance by head, speed by heads used."""
  rows = study.read_csv(folder / "train.csv")
  steps = [int(r["step"]) for r in rows]
  last = result["decoding"][-1]
  figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(12, 3.6), layout="constrained"
  )
  colours = plt.colormaps["viridis"](np.linspace(0, 0.9, last["heads"]))
  for i, colour in enumerate(colours, 1):
    bits = [float(r[f"bits_per_byte_{i}"]) for r in rows]
    left.plot(steps, bits, color=colour, label=f"head {i}", lw=1.2)
  left.set(xlabel="step", ylabel="bits per byte", title="Training loss")
  left.set_ylim(top=6)
  left.legend(fontsize=7, ncols=2)
  drafts = range(2, last["heads"] + 1)
  middle.bar(drafts, last["accepted"][1:], color=colours[1:])
  middle.set(xlabel="head", title="Share of its drafts accepted", ylim=(0, 1))
  middle.set_xticks(drafts)
  heads = [e["heads"] for e in result["decoding"]]
  speedups = [e["speedup"] for e in result["decoding"]]
  right.bar(heads, speedups, color=colours)
  right.plot(
    heads,
    [e["tokens_per_forward"] for e in result["decoding"]],
    "k.--",
    lw=0.8,
    label="tokens per forward",
  )
  right.set(xlabel="heads used", title="Speed over ordinary decoding")
  right.set_xticks(heads)
  right.legend(fontsize=8)
  return figure


def heads_table(result: dict) -> str:
  """HTML: a row per head."""
  scores, last = result["scores"], result["decoding"][-1]
  rows = zip(
    scores["bits_per_byte"], scores["accuracy"], last["accepted"], strict=True
  )
  return _table(
    ("head", "bits per byte", "accuracy", "drafts accepted"),
    [
      (i, f"{bits:.3f}", f"{acc:.1%}", "" if i == 1 else f"{accepted:.1%}")
      for i, (bits, acc, accepted) in enumerate(rows, 1)
    ],
  )


def decoding_table(result: dict) -> str:
  """HTML: a row per number of heads used."""
  return _table(
    (
      "heads used",
      "tokens per forward",
      "tokens per second",
      "speedup",
      "texts that differ",
    ),
    [
      (
        e["heads"],
        f"{e['tokens_per_forward']:.2f}",
        f"{e['tokens_per_second']:,.0f}",
        f"{e['speedup']:.2f}",
        len(e["differences"]),
      )
      for e in result["decoding"]
    ],
  )


def sample(codec, prompt, tokens, per_pass) -> str:
  """A completion; the tokens that one pass wrote share a background."""
  written = passes(tokens, per_pass)
  given, *new, rest = tokenizer.decode_parts(codec, [prompt, *written])
  parts = [f'<span class="prompt">{html.escape(given)}</span>']
  for ids, text in zip(written, new, strict=True):
    parts.append(f'<span style="{_shade(len(ids))}">{html.escape(text)}</span>')
  return "".join([*parts, html.escape(rest)])


def passes(tokens: list[int], per_pass: list[int]) -> list[list[int]]:
  """The tokens of each pass; the first is of the prompt's own pass."""
  ends = np.cumsum([1, *per_pass])
  return [tokens[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def key(heads: int) -> str:
  """HTML: the colours of 1 to `heads` tokens."""
  return " ".join(
    f'<span style="{_shade(n)}">&nbsp;{n}&nbsp;</span>'
    for n in range(1, heads + 1)
  )


def _shade(tokens: int) -> str:
  red, green, blue = (
    int(255 * c) for c in plt.colormaps["YlGnBu"](0.09 * tokens)[:3]
  )
  edge = "box-shadow: inset 1px 0 #fff"
  ink = "#fff" if tokens > 6 else "#222"
  return f"background: rgb({red},{green},{blue}); color: {ink}; {edge}"


def _table(names, rows) -> str:
  head = "".join(f"<th>{name}</th>" for name in names)
  body = "".join(
    "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    for row in rows
  )
  return f"<table><tr>{head}</tr>{body}</table>"
