"""A conversation as ids, by the chat template of a model.

A template is written in Jinja2, and is run in its sandbox: it comes from
whoever made the model.
"""

import datetime
import json
import re
from collections.abc import Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from mtp_jax.tokenizer import interface

Messages = Sequence[dict[str, str]]


def encode(codec: interface.Tokenizer, messages: Messages) -> np.ndarray:
  """The conversation's ids [length], int32, up to where the answer begins.

  The names of special tokens are special in what the template writes. In the
  messages they are plain text: no message can end its own turn. One limit: a
  template that deletes characters inside a message may make a name of what is
  left.

  Args:
    codec: the tokenizer of a folder that has a chat template.
    messages: of the roles 'system', 'user' and 'assistant', each with its
      content.

  Raises:
    ValueError: there is no template, it is damaged, or it refuses these
      messages, such as a system message; says why.
  """
  if not codec.special or not (template := codec.special.template):
    raise ValueError(
      "the model has no chat template, which is chat_template.jinja or in "
      "tokenizer_config.json: have it continue a text instead"
    )
  # A name in a message gets `mask` between its characters, so that only the
  # template's own are found in what it writes.
  mask = _unused("".join([template, *(m["content"] for m in messages)]))
  names = re.compile(f"({'|'.join(map(re.escape, codec.special_names))})")
  text = render(
    template,
    [
      m | {"content": names.sub(lambda name: mask.join(name[0]), m["content"])}
      for m in messages
    ],
    codec.special.names,
  )
  if mask not in text:
    return codec.encode_marked(text)
  plain, marked = codec.encode, codec.encode_marked
  parts = enumerate(names.split(text))  # every other one is a name
  return np.concatenate(
    [
      marked(part) if i % 2 else plain(part.replace(mask, ""))
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
    line = " ".join(str(error).split())
    raise ValueError(f"the chat template of the model fails: {line}") from error


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


def _unused(text: str) -> str:
  """A character of Unicode's private use that `text` lacks."""
  return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
