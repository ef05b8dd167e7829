"""Chat templates: Jinja in a sandbox, since a template is code that came with a download."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from stars.errors import TokenizerError, text_of
from stars.model.template_limits import LimitedEnvironment, LimitExceeded

LONGEST_DATE = 256
"""Characters of a form of a date: a field of it may be as wide as it says."""
MAX_REASON = 300
"""Characters that an error repeats of what a template said."""

REASONING = ("reasoning_content", "thinking", "reasoning")  # what a message calls it; the first is given to templates


class ChatTemplate:
    """One template of the model in `where`; compiled at the first use."""

    def __init__(self, source: str, where: str):
        self._source = source
        self._where = where
        self._compiled: jinja2.Template | None = None
        self._takes_parts: bool | None = None  # whether it goes through the parts of a content by itself

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The text of `messages`.

        Raises TokenizerError for whatever goes wrong in it, forbidden code and more work than `template_limits` allows
        included.
        """
        try:
            # Only plain values reach the template: it cannot call methods of objects, nor change the caller's messages.
            plain = json.loads(json.dumps([_keys_as_read(message) for message in messages]))
            variables = json.loads(json.dumps(variables))
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise TokenizerError(f"messages and template variables must be plain JSON values ({error})") from error
        try:
            if self._compiled is None:
                self._compiled = _environment().compile_limited(self._source)
            if any(isinstance(message.get("content"), list) for message in plain):
                if self._takes_parts is None:
                    self._takes_parts = _iterates_content(_environment().parse(self._source))
                if not self._takes_parts:
                    plain = [self._with_text(number, message) for number, message in enumerate(plain)]
            return self._compiled.render(messages=plain, **variables)
        except TokenizerError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template of {self._where} is not valid ({_reason(error)}): repair it"
            ) from error
        except Exception as error:  # templates raise what they like: their own errors, type errors, forbidden access
            raise TokenizerError(
                f"the chat template of {self._where} does not render these messages ({_reason(error)}): change the "
                "messages to what it expects, or give the prompt as text"
            ) from error

    def _with_text(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose content, where it is a list of text parts, is their texts, a line each (as in vLLM)."""
        content = message.get("content")
        if not isinstance(content, list):
            return message
        texts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
                 for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise TokenizerError(f"messages[{number}] has a part that is no text, and the chat template of "
                                 f'{self._where} takes text only: give parts as {{"type": "text", "text": ...}}')
        return {**message, "content": "\n".join(map(str, texts))}


def _iterates_content(template: nodes.Template) -> bool:
    """Whether a loop of `template` goes through a message's content, or through a name that was given it."""
    names = {"content"}
    for node in template.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name) and _is_content(node.node, names):
            names.add(node.target.name)
    return any(_is_content(node.iter, names) for node in template.find_all(nodes.For))


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    while isinstance(node, nodes.Filter):  # content | selectattr("type", "equalto", "text")
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _keys_as_read(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the keys that templates read, as in transformers.

    None is left out, since templates test for a key and would write "None"; reasoning goes by three names.
    """
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _reason(error: Exception) -> str:
    """What `error` says, on one line: a template may raise a text of its own."""
    text = text_of(error) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + "…"


class _Generation(Extension):
    """{% generation %} marks the assistant's text for training: its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that begin with an underscore: those reach into Python."""

    def __init__(*args: Any, **attributes: Any) -> None:  # a variable of the template may be called self
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(*args, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], filters={"tojson": _to_json}
    )
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > LONGEST_DATE:
        raise LimitExceeded(f"it asks for a date of more than {LONGEST_DATE} characters")
    return datetime.now().strftime(form)
