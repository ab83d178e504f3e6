"""A conversation as ids, by the chat template of a model.

A template is written in Jinja2, and is run in its sandbox: it comes from
whoever made the model. The sandbox limits neither time nor memory: a template
that loops without end does not stop.
"""

import datetime
import itertools
import json
import re
from collections.abc import Iterator, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from mtp_jax.tokenizer import interface

Messages = Sequence[dict[str, str]]
_ROLES = "system", "developer", "user", "assistant", "tool"


def encode(codec: interface.Tokenizer, messages: Messages) -> np.ndarray:
  """The conversation's ids [length], int32, up to where the answer begins.

  The names of special tokens are special in what the template writes. In the
  messages they are plain text: no message can end its own turn. One limit: a
  template that changes characters inside a message may make a name of them.

  Args:
    codec: the tokenizer of a folder that has a chat template.
    messages: each with its role ('system', 'developer', 'user', 'assistant' or
      'tool') and its content.

  Raises:
    ValueError: there is no template, it is damaged, or it refuses these
      messages, such as a system message; or a message is not of this form.
      Says why.
  """
  if not codec.special or not (template := codec.special.template):
    raise ValueError(
      "the model has no chat template, which is chat_template.jinja or in "
      "tokenizer_config.json: have it continue a text instead"
    )
  for message in messages:
    _check(message)
  values = [value for message in messages for value in message.values()]
  names = codec.special_names
  mask = _Mask(names, used="".join([template, *values]))
  text = render(
    template,
    [
      {k: v if k == "role" else mask.hide(v) for k, v in message.items()}
      for message in messages
    ],
    codec.special.names,
  )
  plain = interface.utf8(mask.reveal(text)).decode("utf-8")
  own, found = mask.spans(text), mask.spans(plain)
  if own == found:  # no message adds a name
    return codec.encode_marked(plain)
  for begin, end in set(found) - set(own):
    _check_spelled(codec, plain[begin:end])
  parts = enumerate(mask.names.split(text))  # every other one is a name
  return np.concatenate(
    [
      codec.encode_marked(part) if i % 2 else codec.encode(mask.reveal(part))
      for i, part in parts
      if part
    ]
  )


def render(template: str, messages: Messages, names: dict[str, str]) -> str:
  """The conversation's text, up to where the answer begins.

  Args:
    template: in Jinja2.
    messages: see `encode`.
    names: of special tokens, such as {"bos_token": "<s>"}.

  Raises:
    ValueError: the template is damaged, or refuses these messages.
  """
  try:
    compiled = _environment().from_string(template)
    return compiled.render(
      messages=messages,
      add_generation_prompt=True,
      tools=None,
      documents=None,
      **names,
    )
  except Exception as error:  # a template may raise anything
    line = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(
      f"the chat template of the model fails: {_printable(line[:200])}"
    ) from error


class _Mask:
  """Hides the names of special tokens in messages from a search for them.

  Each character of a name there is replaced by a character of its own that
  nothing else uses, so every place in the text stays where it is.

  Args:
    names: of the special tokens, the longest first.
    used: all text whose characters cannot stand for others.

  Raises:
    ValueError: no characters are left that could stand for others.
  """

  def __init__(self, names: Sequence[str], used: str):
    self.names = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
    self._all = names
    # Of a name that begins or ends in a message, the template has the rest.
    self._begin = {name[:i] for name in names for i in range(1, len(name))}
    self._end = {name[i:] for name in names for i in range(1, len(name))}
    self._longest = max(map(len, names), default=0)
    hidden = sorted(set("".join(names)))
    unused = _unused({*used, *hidden})
    free = list(itertools.islice(unused, len(hidden)))
    if len(free) < len(hidden):
      raise ValueError("the messages use every character of private use")
    self._hide = str.maketrans(dict(zip(hidden, free, strict=True)))
    self._reveal = str.maketrans(dict(zip(free, hidden, strict=True)))

  def hide(self, text: str) -> str:
    """Hides names, and what the template could complete to one."""
    text = self.names.sub(lambda name: name[0].translate(self._hide), text)
    if not (core := text.strip()):  # templates do so
      return text
    before, core, after = text.partition(core)
    sizes = range(1, self._longest)
    if any(core in name for name in self._all) or any(
      core[:size] in self._end for size in sizes
    ):
      core = core[0].translate(self._hide) + core[1:]
    if any(core[-size:] in self._begin for size in sizes):
      core = core[:-1] + core[-1].translate(self._hide)
    return before + core + after

  def reveal(self, text: str) -> str:
    """The text as it was before `hide`."""
    return text.translate(self._reveal)

  def spans(self, text: str) -> list[tuple[int, int]]:
    """Where the names in the text begin and end."""
    return [name.span() for name in self.names.finditer(text)]


def _check(message: dict[str, str]) -> None:
  for key in ("role", "content"):
    if key not in message:
      raise ValueError(f"a message of the chat has no {key!r}")
  for key, value in message.items():
    if not isinstance(value, str):
      raise ValueError(
        f"{key!r} of a message of the chat is {value!r:.60}: give a text"
      )
    interface.utf8(value)
  if message["role"] not in _ROLES:
    raise ValueError(
      f"{message['role']!r:.60} is no role of a message of the chat: give one "
      f"of {', '.join(_ROLES)}"
    )


class _Generation(jinja2.ext.Extension):
  """The block `generation`, which marks an answer: what is in it."""

  tags = {"generation"}

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _environment() -> jinja2.Environment:
  """What templates of Hugging Face folders expect."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols", _Generation],
  )
  environment.filters["tojson"] = _json
  environment.globals |= {"raise_exception": _fail, "strftime_now": _now}
  return environment


def _json(value, indent=None, ensure_ascii=False, **settings) -> str:
  """JSON as it is; Jinja2's own filter escapes it for HTML."""
  return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **settings)


def _fail(reason: str):
  raise ValueError(reason)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _check_spelled(codec: interface.Tokenizer, name: str) -> None:
  """Refuses a name of one character that has no other id than its special."""
  if len(name) > 1:
    return
  special = set(codec.encode_marked(name)) - ({codec.pad} - {*codec.ends})
  if special & set(codec.encode(name)):
    raise ValueError(
      f"a message has {name!r}, which is a special token of the model: the "
      "vocabulary cannot spell it as plain text"
    )


def _unused(used: set[str]) -> Iterator[str]:
  """Characters of Unicode's private use that are not in `used`."""
  ranges = (0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE)
  codes = itertools.chain.from_iterable(itertools.starmap(range, ranges))
  return (c for c in map(chr, codes) if c not in used)


def _printable(text: str) -> str:
  """The text with escapes for what could take over a terminal."""
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
  )
