"""Chat templates: transformers' ids, and messages that stay plain text."""

import dataclasses
import importlib.util
import io
import sys

import hypothesis
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import strategies as st

from experiments import generate
from experiments.startup import program
from mtp_jax import config, tokenizer
from mtp_jax.decode import stream
from mtp_jax.interchange import folders
from mtp_jax.tokenizer import chat
from tests import parameters, tokenizer_files

TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
  {% if message.role == "nobody" %}
    {{ raise_exception("no role " + message.role | tojson) }}
  {% endif %}
<|end|>{{ message["role"] }}
{{ message["content"] | trim }}</s>
{% endfor %}
{% if add_generation_prompt %}
<|end|>assistant
{% endif %}"""
TURN = "<|end|>user\n%s</s>\n"


@pytest.fixture(scope="module")
def fields():
  return tokenizer_files.train("byte_level")


@pytest.fixture(scope="module")
def folder(fields, tmp_path_factory):
  names = tokenizer_files.NAMES | {"chat_template": TEMPLATE}
  return tokenizer_files.write(
    tmp_path_factory.mktemp("chat"), fields, tokenizer_config=names
  )


@pytest.fixture(scope="module")
def codec(folder):
  return tokenizer.load(str(folder))


def user(text):
  return {"role": "user", "content": text}


def test_ids_are_those_of_the_text_and_of_transformers(codec, folder):
  """Special tokens in what the template writes; transformers' where at hand."""
  system = {"role": "system", "content": " brief\n"}
  answer = {"role": "assistant", "content": "n\xe9"}
  messages = [system, user("To be, or"), answer, user("not \U0001f389\n to?")]
  text = (
    "<s><|end|>system\nbrief</s>\n" + TURN % "To be, or" + "<|end|>assistant\n"
    "n\xe9</s>\n" + TURN % "not \U0001f389\n to?" + "<|end|>assistant\n"
  )
  ids = chat.encode(codec, messages).tolist()
  assert ids == codec.encode_marked(text).tolist()
  assert [ids.count(i) for i in (codec.bos, codec.eos, 3)] == [1, 4, 5]
  if importlib.util.find_spec("transformers"):
    transformers = importlib.import_module("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    applied = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert applied["input_ids"] == ids


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  st.lists(
    st.sampled_from(["</s>", "<|end|>", "<", "/s>", "\ue000", "user\n", "x "])
  ).map("".join)
)
def test_no_message_makes_a_special_token(codec, message):
  ids = chat.encode(codec, [user(message)])
  places = np.flatnonzero(np.isin(ids, [codec.bos, codec.eos, 3]))
  assert ids[places].tolist() == [codec.bos, 3, codec.eos, 3]
  parts = [codec.decode(part) for part in np.split(ids, places)]
  assert parts[2:] == [f"user\n{message.strip()}", "\n", "assistant\n"]


@pytest.fixture(scope="module")
def snowman_codec(fields, tmp_path_factory):
  """With the special tokens "#" and U+2603; bytes spell the second alone."""
  vocab, added = fields["model"]["vocab"], fields["added_tokens"]
  for name, i in {"#": vocab["#"], "\u2603": len(vocab)}.items():
    added = [*added, added[-1] | {"id": i, "content": name}]
  folder = tokenizer_files.write(
    tmp_path_factory.mktemp("snowman"),
    fields | {"added_tokens": added},
    tokenizer_config=tokenizer_files.NAMES | {"chat_template": TEMPLATE},
  )
  return tokenizer.load(str(folder))


@pytest.mark.parametrize(
  "template, message, text",
  [
    ("\u2603{x}</s>", "a\u2603b", "a\u2603b"),
    ("\u2603{x}</s>", "\u2603", "\u2603"),
    ("<s>{x | trim}/s>", "a< ", "a</s>"),
    ("<s><{x | trim}", " /s>a", "</s>a"),
    ("<s><{x}>", "/s", "</s>"),
    ("<s>{x}{x}</s>", "</s></", "</s></</s></"),
    ("<|end|>{x}</s>", "a <", "a <"),
  ],
)
def test_a_message_completes_no_name(
  snowman_codec, monkeypatch, template, message, text
):
  """Nor one of a single character; what the template writes stays special."""
  codec = snowman_codec
  template = template.replace("{x", "{{ messages[0].content").replace(
    "}", "}}", template.count("{")
  )
  special = dataclasses.replace(codec.special, template=template)
  monkeypatch.setattr(codec, "special", special)
  ids = chat.encode(codec, [user(message)]).tolist()
  marks = codec.bos, codec.eos, 3, *codec.encode_marked("\u2603")

  def marked(ids):
    return [i for i in ids if i in marks]

  assert codec.decode(ids) == text
  assert marked(ids) == marked(chat.encode(codec, [user("a")]).tolist())
  assert marked(ids)
  with pytest.raises(ValueError, match="'#', .* cannot spell"):
    chat.encode(codec, [user("a#b")])


@pytest.mark.parametrize(
  "message, words",
  [
    ({"role": "user"}, "has no 'content'"),
    ({"content": "a"}, "has no 'role'"),
    (user(None), "'content' of a message .* None: give a text"),
    (user([{"type": "text"}]), r"'content' .*\[\{'type': 'text'\}\]: give"),
    (user("a\ud800"), "no UTF-8 form"),
    ({"role": "a</s>", "content": ""}, "'a</s>' is no role .* one of system"),
  ],
)
def test_a_message_of_another_form_is_refused(codec, message, words):
  with pytest.raises(ValueError, match=words):
    chat.encode(codec, [message])


def test_every_character_may_stand_in_a_message(codec):
  """Also those that `chat` uses itself."""
  private = "".join(map(chr, range(0xE000, 0xF900))) + "</s>"
  ids = chat.encode(codec, [user(private)])
  assert private in codec.decode(ids) and list(ids).count(codec.eos) == 1


def test_a_template_has_what_those_of_others_expect():
  def rendered(template, **names):
    return chat.render(template, [user("<\xe9>")], names)

  assert rendered("{{ messages | tojson }}") == (
    '[{"role": "user", "content": "<\xe9>"}]'
  )
  assert rendered("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
  assert rendered("{{ strftime_now('%Y') }}").isdigit()
  no_tools = "{% if tools is none %}{{ eos_token }}{% endif %}"
  assert rendered(no_tools, eos_token="e") == "e"
  loop = "{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}"
  assert rendered(loop) == "1"
  block = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
  assert rendered(block) == "<\xe9>"


@pytest.mark.parametrize(
  "template, words",
  [
    ("{{ raise_exception('roles must\\nalternate') }}", "roles must alternate"),
    ("{% if %}", "Expected an expression"),
    ("{{ messages.append(1) }}", "'append' of 'list' .* unsafe"),
    ("{{ ''.__class__.__mro__ }}", "'__class__' .* unsafe"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ raise_exception('') }}", "ValueError$"),
    ("{{ raise_exception('a\x1b]0;b\x07') }}", r"a\\x1b\]0;b\\x07$"),
    ("{{ raise_exception('x' * 999) }}", "(?<!x)x{200}$"),
  ],
)
def test_a_template_that_fails_is_one_line(template, words):
  line = f"^the chat template of the model fails: .*{words}"
  with pytest.raises(ValueError, match=line) as error:
    chat.render(template, [], {})
  assert "\n" not in str(error.value)


def test_where_a_template_lies(fields, tmp_path):
  several = [
    {"name": "tools", "template": "t"},
    {"name": "default", "template": "d"},
  ]
  names = tokenizer_files.NAMES | {"chat_template": several}
  tokenizer_files.write(tmp_path, fields, tokenizer_config=names)
  assert tokenizer.load(str(tmp_path)).special.template == "d"
  (tmp_path / "chat_template.jinja").write_text("of its own")
  assert tokenizer.load(str(tmp_path)).special.template == "of its own"
  (tmp_path / "chat_template.jinja").unlink()
  nameless = [{"name": ["x"], "template": "t"}]
  for damaged in [[1, 2], nameless, [{"name": "a", "template": 1}], 5]:
    names["chat_template"] = damaged
    tokenizer_files.write(tmp_path, fields, tokenizer_config=names)
    line = "tokenizer_config.json: chat_template is neither a text nor a list"
    with pytest.raises(ValueError, match=line):
      tokenizer.load(str(tmp_path))
  with pytest.raises(ValueError, match="no chat template, which is chat_templ"):
    chat.encode(tokenizer.Bytes(), [user("a")])


@pytest.fixture
def talk(codec, monkeypatch, capsys):
  """Runs the program with a model that answers every prompt with "is"."""
  cfg = config.Config(
    model=parameters.model_config("unembedding", vocab=codec.vocab, layers=1)
  )
  loaded = parameters.model_of(cfg.model), cfg, codec
  monkeypatch.setattr(folders, "kind", lambda path: "workdir")
  monkeypatch.setattr(folders, "settings", lambda path, step: loaded[1:])
  monkeypatch.setattr(
    folders, "load_step", lambda path, step, dtype=None: (*loaded, 7)
  )
  prompts = []

  def answer(decoder, prompt, *, stop, **settings):
    assert stop == [codec.eos]
    prompts.append(list(prompt))
    if codec.decode(prompt).endswith("stop\nassistant\n"):
      raise KeyboardInterrupt
    ids = np.array([*codec.encode("is"), codec.eos])
    yield stream.Pass([ids], np.array([True]), True)

  monkeypatch.setattr(stream, "stream", answer)
  flags.FLAGS.mark_as_parsed()

  def run(text="", **settings):
    prompts.clear()
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    with flagsaver.as_parsed(model="run", **settings):
      program.mendable(generate.main)(["generate"])
    return capsys.readouterr().out, prompts

  return run


def test_the_program_chats(talk, codec):
  out, prompts = talk(prompt="a </s>", chat="true", system="be")
  system = {"role": "system", "content": "be"}
  assert out == "is"
  assert prompts == [chat.encode(codec, [system, user("a </s>")]).tolist()]
  answer = {"role": "assistant", "content": "is"}
  turns = [user("a"), answer, user("b")]
  out, prompts = talk("a\nstop\nb\n", interactive="true", chat="true")
  assert out == "is\nis\n"
  first, _, last = prompts  # a turn that Ctrl-C stops is left out
  assert first == chat.encode(codec, turns[:1]).tolist()
  assert last == chat.encode(codec, turns).tolist()
  out, prompts = talk("a\nb\n", interactive="true")
  assert prompts == [codec.encode(text).tolist() for text in "ab"]
  assert talk(prompt="")[1] == [[codec.bos]]
