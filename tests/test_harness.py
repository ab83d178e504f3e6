"""What lm-evaluation-harness is served, and its tasks over local files.

The harness itself is an extra: what needs it is skipped where it is missing.
"""

import copy
import functools
import importlib.util
import json
import os
import pathlib
import re
import types

import numpy as np
import pytest

import mtp_jax
from configs import harness as tasks
from mtp_jax import tokenizer
from mtp_jax.decode import generate, layout
from mtp_jax.evaluate import harness, likelihood, pass_at_k
from mtp_jax.tasks import benchmark_files
from tests import parameters, transformers_reference

needs_lm_eval = pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"
)
FOLDER = pathlib.Path(tasks.__file__).parent


@functools.cache
def model():
  net = parameters.random_model("unembedding", vocab=259, n_future=2, layers=1)
  return layout.lay_out(net), tokenizer.Bytes()


def served(**settings):
  return harness.Served(*model(), **{"length": 64, "rows": 4} | settings)


def request(*args):
  return types.SimpleNamespace(args=args)


def test_likelihoods_are_those_of_the_texts():
  decoder, codec = model()
  texts = [("ab", " c"), ("ab", " cd"), ("", "e")]
  found = served().loglikelihood([request(*pair) for pair in texts])
  items = [likelihood.of_texts(codec, *pair, length=64) for pair in texts]
  assert found == likelihood.score(decoder, items, rows=4)
  assert served().loglikelihood([]) == []
  whole = served(length=7).loglikelihood_rolling([request("ab cd ef gh ij")])
  want = likelihood.rolling(
    decoder, [codec.encode("ab cd ef gh ij")], prefix=256, length=7, rows=4
  )
  assert whole == want and whole[0] < 0


def test_contexts_that_are_cut_are_counted(monkeypatch):
  one = served(length=8)
  one.loglikelihood([request("abcd", " e")])  # and a bos: 7 ids
  assert one.contexts_cut == 0
  one.loglikelihood([request("abcdefgh", " e"), request("abcdefg", " e")])
  assert one.contexts_cut == 2
  one.loglikelihood_rolling([request("abcdefghijk")])
  assert one.contexts_cut == 2

  def generate_all(decoder, prompts, **settings):
    assert max(map(len, prompts)) == 5
    numbers = sum(settings["samples"], [])
    return types.SimpleNamespace(tokens=[[]] * len(numbers))

  monkeypatch.setattr(harness.serve, "generate_all", generate_all)
  texts = ["abcd", "abcde", "abcde"]
  one.generate_until([request(text, {"max_gen_toks": 3}) for text in texts])
  assert one.contexts_cut == 4


@pytest.mark.slow
def test_texts_end_before_a_stop_and_share_contexts():
  decoder, codec = model()
  settings = {"until": [], "max_gen_toks": 20, "do_sample": False}
  requests = [request(text, settings) for text in ("abc", "de", "abc")]
  whole = served(heads=2).generate_until(requests)
  prompts = [[256, *codec.encode(text)] for text in ("abc", "de")]
  plain = generate.generate(
    decoder, prompts, heads=1, max_new=20, stop=codec.ends
  ).tokens
  want = [codec.decode(ids, after=prompts[i]) for i, ids in enumerate(plain)]
  assert whole == [*want, want[0]]
  stop = whole[0][3:5]
  cut = served(heads=2).generate_until(
    [request("abc", settings | {"until": ["\u2603", stop]})]
  )
  assert cut == [whole[0][: whole[0].find(stop)]]
  drawn = settings | {"do_sample": True, "temperature": 1.0, "top_p": 0.95}
  several = served().generate_until([request("abc", drawn)] * 3)
  assert len(set(several)) == 3
  assert several == served().generate_until([request("abc", drawn)] * 3)


@pytest.mark.parametrize(
  "settings, line",
  [
    ({"num_beams": 4, "until": []}, "generation_kwargs name num_beams; supp"),
    ({"max_gen_toks": 64}, "max_gen_toks 64 leaves no room for a context in t"),
  ],
)
def test_settings_that_are_not_served_are_refused(settings, line):
  with pytest.raises(ValueError, match=line):
    served().generate_until([request("a", settings)])


def test_a_missing_package_is_one_line(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "lm_eval.api", None)
  monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
  with pytest.raises(ValueError, match="cannot be imported .*pip install lm_e"):
    harness.adapter(*model())


# A line of each task's file, the prompt that it makes, and its choices.
LINES = {
  "arc_challenge": (
    {
      "question": "What is wet?",
      "choices": {"text": ["fire", "water"], "label": ["A", "B"]},
      "answerKey": "B",
    },
    "Question: What is wet?\nAnswer:",
    ["fire", "water"],
  ),
  "copa": (
    {
      "premise": "It rained.",
      "question": "effect",
      "choice1": "I got wet.",
      "choice2": "The sun shone.",
      "label": 0,
    },
    "It rained therefore",
    ["i got wet.", "the sun shone."],
  ),
  "hellaswag": (
    {
      "activity_label": "Swim",
      "ctx": "He",
      "endings": ["a", "b"],
      "label": "1",
    },
    "Swim: He",
    ["a", "b"],
  ),
  "piqa": (
    {"goal": "Cut bread", "sol1": "with air", "sol2": "a knife", "label": 1},
    "Question: Cut bread\nAnswer:",
    ["with air", "a knife"],
  ),
  "siqa": (
    {
      "context": "Al won.",
      "question": "How is Al?",
      "answerA": "sad",
      "answerB": "glad",
      "answerC": "cold",
      "label": "2",
    },
    "Question: Al won. How is Al?\nAnswer:",
    ["sad", "glad", "cold"],
  ),
  "nq": (
    {"question": "who wrote emma", "answer": ["Jane Austen"]},
    "Question: who wrote emma?\nAnswer:",
    None,
  ),
  "triviaqa": (
    {"question": "Who wrote Emma?", "answer": {"aliases": ["Austen", "J. A."]}},
    "Question: Who wrote Emma?\nAnswer:",
    None,
  ),
  "gsm8k": (
    {"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"},
    "Question: 2 + 2?\nAnswer: 2 + 2 = 4\n#### 4\n\n" * 8
    + "Question: 2 + 2?\nAnswer:",
    None,
  ),
}


def test_every_task_has_a_line_here():
  assert {p.stem for p in FOLDER.glob("*.yaml")} == set(LINES)
  assert set(benchmark_files.CHECKS) == set(LINES)


def fields(name):
  """Each field of a task's line, those inside a field too."""
  line = LINES[name][0]
  inner = [(k, k2) for k, v in line.items() if isinstance(v, dict) for k2 in v]
  return [(k,) for k in line] + inner


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_lacks_a_field_is_named(name, tmp_path):
  file, line = tmp_path / "test.jsonl", LINES[name][0]
  for path in fields(name):
    for change in ("removed", None, " ", 7.5, []):
      bad = copy.deepcopy(line)
      place = bad if len(path) == 1 else bad[path[0]]
      if change == "removed":
        del place[path[-1]]
      else:
        place[path[-1]] = change
      lines = [json.dumps(x) for x in (line, "", bad, line)]
      file.write_text("\n".join(lines).replace('""', ""))
      with pytest.raises(ValueError) as caught:
        tasks.load(name, file, train=file)
      said = str(caught.value)
      assert said.startswith(f"{file}, line 3: "), (path, change, said)
      assert path[-1] in said or "choices" in said, (path, change, said)
      assert said.endswith("; bad lines: 1 of 3. Mend or remove them")
      assert "\n" not in said


@pytest.mark.parametrize(
  "name, change, words",
  [
    ("piqa", {"label": 7}, "the field 'label' is 7, not 0 to 1"),
    ("piqa", {"label": True}, "the field 'label' is True, not 0 to 1"),
    ("copa", {"label": -1}, "the field 'label' is -1, not 0 to 1"),
    ("copa", {"question": "why"}, "is 'why', not 'cause' or 'effect'"),
    ("siqa", {"label": "0"}, "the field 'label' is '0', not 1 to 3"),
    ("hellaswag", {"label": "2"}, "the field 'label' is '2', not 0 to 1"),
    ("hellaswag", {"label": ""}, "the field 'label' is '', not 0 to 1"),
    ("arc_challenge", {"answerKey": "E"}, "'answerKey' is 'E', not one of A"),
    (
      "arc_challenge",
      {"choices": {"text": ["a"], "label": ["A", "B"]}},
      "1 choices have 2 labels",
    ),
    ("nq", {"answer": [""]}, "the field 'answer' is '', not a text"),
    ("gsm8k", {"answer": "4"}, "the field 'answer' has no '#### '"),
    ("gsm8k", {"answer": "#### none"}, "has no '#### ' before a number"),
    ("triviaqa", {"answer": {"aliases": [""]}}, "'answer.aliases' is '', not"),
  ],
)
def test_a_line_without_a_right_answer_is_named(name, change, words, tmp_path):
  file = tmp_path / "test.jsonl"
  file.write_text(json.dumps(LINES[name][0] | change))
  with pytest.raises(ValueError, match=re.escape(words)):
    tasks.load(name, file, train=file)


@pytest.mark.parametrize(
  "text, words",
  [
    ("", "has no line"),
    ("[1]", "entry 1: not an object of JSON; bad lines: 1 of 1"),
    ("[1\n{", "begins as a JSON array, and is cut or damaged .*: get it"),
    ("[1]\n{", "line 1: not an object of JSON; bad lines: 2 of 2"),
    ("\ufeff[1]", "entry 1: not an object of JSON; bad lines: 1 of 1"),
    ("\udcff", "line 1: 'utf-8' codec"),
  ],
)
def test_a_file_of_something_else_is_refused(text, words, tmp_path):
  file = tmp_path / "test.jsonl"
  file.write_bytes(text.encode("utf-8", "surrogateescape"))
  with pytest.raises(ValueError, match=words):
    tasks.load("piqa", file)


# As the data sets of Hugging Face have them, with all of their fields.
EXPORTED = {
  "arc_challenge": {"id": "Mercury_7175875"},
  "copa": {"idx": 0},
  "hellaswag": {
    **{"ind": 24, "ctx_a": "He", "ctx_b": "", "source_id": "x~y"},
    **{"split": "val", "split_type": "indomain"},
  },
  "triviaqa": {
    "question_id": "tc_2",
    "answer": {"aliases": ["Austen", ""], "value": "Austen", "type": "x"},
  },
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_with_all_published_fields_is_sound(name, tmp_path):
  line = LINES[name][0] | EXPORTED.get(name, {})
  lines = [line]
  if "label" in line:  # some data sets have numbers, and some have texts
    lines += [line | {"label": kind(line["label"])} for kind in (int, str)]
  file = tmp_path / "test.jsonl"
  file.write_text("\n".join(map(json.dumps, lines)))
  assert tasks.load(name, file, train=file)["task"] == f"{name}_local"


@needs_lm_eval
@pytest.mark.parametrize("kind", [int, str])
@pytest.mark.parametrize("name", LINES)
def test_a_task_over_a_local_file(name, kind, tmp_path, monkeypatch):
  """The harness's requests, and a score that is known beforehand."""
  import lm_eval
  from lm_eval.api import model as lm_eval_model

  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  line, prompt, choices = LINES[name]
  if "label" in line:
    line = line | {"label": kind(line["label"])}
  file = tmp_path / "test.jsonl"
  file.write_text("\n".join([json.dumps(line)] * 9))
  seen = []

  class Knowing(harness.Served, lm_eval_model.LM):
    """Answers rightly, and keeps what it is asked."""

    def __init__(self):
      lm_eval_model.LM.__init__(self)

    def loglikelihood(self, requests, **unused):
      seen.extend(r.args for r in requests)
      right = line.get("label", 1)
      right = int(right) - (name == "siqa")
      return [
        (-1.0 if r.args[1].strip() == choices[right] else -9.0, False)
        for r in requests
      ]

    def generate_until(self, requests, **unused):
      seen.extend(r.args for r in requests)
      right = {"nq": " jane austen", "triviaqa": " J A"}
      return [right.get(name, " 2 + 2 = 4\n#### 4") for _ in requests]

  task = tasks.load(name, file, train=file)
  found = lm_eval.simple_evaluate(
    model=Knowing(), tasks=[task], limit=1, bootstrap_iters=0
  )
  assert seen[0][0] == prompt
  if choices:
    assert [args[1].strip() for args in seen] == choices
    assert all(args[1][0] == " " for args in seen)
  scores = found["results"][f"{name}_local"]
  metric = [k for k in scores if k.startswith(("acc,", "exact_match,"))]
  assert scores[metric[0]] == 1.0


GSM8K = {
  "task": "gsm8k_local",
  "num_fewshot": 8,
  "metric_list": [{"metric": "exact_match", "ignore_case": True}],
  "generation_kwargs": {"until": ["Q"], "do_sample": False},
  "filter_list": [
    {"name": "a", "filter": [{"function": "regex"}, {"function": "take_first"}]}
  ],
}


def test_answers_that_are_drawn_are_all_scored():
  kept = json.dumps(GSM8K)
  found = tasks.sampled(GSM8K, 5, (1, 4), temperature=0.6, top_p=0.95)
  assert (found["task"], found["repeats"]) == ("gsm8k_local_t0.6", 5)
  drawn = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
  assert found["generation_kwargs"] == {"until": ["Q"]} | drawn
  assert found["filter_list"] == [
    {"name": "a", "filter": [{"function": "regex"}]}
  ]
  assert json.dumps(GSM8K) == kept
  for settings, line in (
    ((GSM8K, 5, (6,), 0.6), "k=6 is not in 1..5, the samples"),
    ((GSM8K, 5, (1,), 0.0), "temperature 0.0 is not above 0"),
    (
      (GSM8K | {"num_fewshot": None}, 5, (1,), 0.6),
      "gsm8k_local has no pass@k",
    ),
  ):
    *positional, temperature = settings
    with pytest.raises(ValueError, match=line):
      tasks.sampled(*positional, temperature=temperature)


@needs_lm_eval
def test_pass_at_k_of_drawn_answers(tmp_path, monkeypatch):
  """Through the harness: of 4 answers each 3, 0 and 1 are correct."""
  import lm_eval
  from lm_eval.api import model as lm_eval_model

  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  correct = [3, 0, 1]
  file = tmp_path / "test.jsonl"
  lines = [
    {"question": f"Q{i}?", "answer": f"So\n#### 1,00{i}"} for i in range(8)
  ]
  file.write_text("\n".join(map(json.dumps, lines)))

  class Knowing(lm_eval_model.LM):
    """Of a question's answers, so many are correct."""

    def generate_until(self, requests, **unused):
      assert {r.args[1]["temperature"] for r in requests} == {0.8}
      texts = [
        f"Thus #### 100{i}." if sample < correct[i] else "Thus 100"
        for i in range(3)
        for sample in range(4)
      ]
      asked = [f"Question: Q{i}?\nAnswer:" for i in range(3) for _ in range(4)]
      for one, want in zip(requests, asked, strict=True):
        assert one.args[0].endswith(want)
      return texts

    def loglikelihood(self, requests):
      raise NotImplementedError

    loglikelihood_rolling = loglikelihood

  task = tasks.sampled(
    tasks.load("gsm8k", file, train=file), 4, (1, 2, 4), temperature=0.8
  )
  found = lm_eval.simple_evaluate(
    model=Knowing(),
    tasks=[task],
    task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    limit=3,
    bootstrap_iters=0,
  )
  (scores,) = found["results"].values()
  for k in (1, 2, 4):
    want = np.mean(pass_at_k.pass_at_k(4, correct, k))
    assert scores[f"pass@{k},number"] == pytest.approx(want)
  (rows,) = found["samples"].values()
  assert [row["correct"] for row in rows] == correct


@needs_lm_eval
def test_the_adapter_is_a_model_of_the_harness(tmp_path, monkeypatch):
  """Accuracy on choices, against the likelihoods of whole texts."""
  import lm_eval

  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  decoder, codec = model()
  draw = np.random.default_rng(0)
  lines = [
    {"goal": f"g{i}", "sol1": f"a{i}", "sol2": f"b{i}", "label": int(x)}
    for i, x in enumerate(draw.integers(0, 2, 6))
  ]
  file = tmp_path / "test.jsonl"
  file.write_text("\n".join(map(json.dumps, lines)))
  right = 0
  for line in lines:
    context = f"Question: {line['goal']}\nAnswer:"
    items = [
      likelihood.of_texts(codec, context, f" {line[sol]}")
      for sol in ("sol1", "sol2")
    ]
    scores = [s.logprob for s in likelihood.score(decoder, items, rows=4)]
    right += int(np.argmax(scores)) == line["label"]
  lm = harness.adapter(decoder, codec, length=64, rows=4)
  found = lm_eval.simple_evaluate(
    model=lm, tasks=[tasks.load("piqa", file)], bootstrap_iters=0
  )
  assert found["results"]["piqa_local"]["acc,none"] == right / 6


SMOLLM2 = os.environ.get("SMOLLM2", "")


@needs_lm_eval
@pytest.mark.skipif(
  not (SMOLLM2 and transformers_reference.has_transformers()),
  reason="needs torch, and SMOLLM2=FOLDER of SmolLM2-135M-Instruct",
)
def test_equals_transformers_own_adapter_on_smollm2():
  """All three kinds of request, in float32, on this repository's own text."""
  from lm_eval.models import huggingface

  net, _, codec = mtp_jax.load(SMOLLM2)
  decoder = layout.lay_out(net, codec.vocab)
  ours = harness.adapter(decoder, codec, length=2048, rows=4)
  theirs = huggingface.HFLM(
    pretrained=SMOLLM2, device="cpu", dtype="float32", batch_size=1
  )
  pages = [
    path.read_text(encoding="utf-8").split()
    for path in sorted(FOLDER.parent.glob("*.py"))[:4]
  ]
  # Cut between words, as tasks are: inside one, each has a way of its own.
  starts = [" ".join(page[:60]) for page in pages]
  parts = [
    (start, f" {' '.join(page[60:68])}")
    for start, page in zip(starts, pages, strict=True)
  ]
  parts += [(start, " and music") for start in starts]
  parts += [("", starts[0][:40]), (f"{starts[0]} ", "text")]
  pairs = list(map(call, parts))
  for got, want in zip(
    ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
  ):
    print(f"{got[0]:.6f} {want[0]:.6f}")
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-4)
    assert got[1] == want[1]
  whole = [call((" ".join(page[:250]),)) for page in pages]
  got = ours.loglikelihood_rolling(whole)
  want = theirs.loglikelihood_rolling(whole)
  print(got, want)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
  until = {"until": ["\n\n"], "max_gen_toks": 32, "do_sample": False}
  texts = [call((start, until)) for start in starts]
  assert ours.generate_until(texts) == theirs.generate_until(texts)


def call(arguments):
  """A request as lm-evaluation-harness makes it."""
  from lm_eval.api import instance

  return instance.Instance("loglikelihood", {}, arguments, 0)
