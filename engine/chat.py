"""Conversations as prompts: what may be said of one, and its text by a model's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from stars.arguments import flag, shown
from stars.errors import RequestError
from stars.model.control_tokens import ControlTokens

CHAT_KEYS = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
"""What a prompt dictionary may have besides "messages", and besides "special_tokens"."""
SpecialTokens = Literal["parse", "text"]
"""How control tokens in a user's texts are read: as tokens, like the template's, or as the texts they are."""
OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize",
                 "self")
"""Names that are no variables of a template for a user to set."""
SHARED_VARIABLES = ("documents",)
"""Variables of the language model's template that are a part of the prompt, and so a reward model's too."""


class Chat(NamedTuple):
    """A conversation, as every template renders it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None  # JSON schemas
    variables: dict[str, Any] = {}  # of the language model's template
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def parse_chat(given: Mapping[str, Any], tokenizer: Any) -> Chat:
    """The conversation in a prompt dictionary with "messages"; RequestError. Keys whose value is None count as absent.
    """
    messages = given["messages"]
    if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RequestError('messages must be a non-empty list of {"role": ..., "content": ...}')
    for number, message in enumerate(messages):
        if message.get("content") is None and "tool_calls" not in message:
            raise RequestError(f'messages[{number}] has no "content": give its text, or "tool_calls"')
    if tokenizer is None or not tokenizer.has_chat_template:
        raise RequestError("the model has no chat template: give the prompt as text")
    continues = flag("continue_final_message", _or(given.get("continue_final_message"), False))
    generates = flag("add_generation_prompt", _or(given.get("add_generation_prompt"), not continues))
    if continues and generates:
        raise RequestError("continue_final_message and add_generation_prompt are both True: the first continues the "
                           "final message, the second begins another one, so leave one out")
    if continues and not isinstance(messages[-1].get("content"), str):
        raise RequestError("continue_final_message needs a final message whose content is a text, and it is "
                           f"{shown(messages[-1].get('content'))}")
    return Chat([_as_read(number, message) for number, message in enumerate(messages)], _tools(given.get("tools")),
                _variables(given.get("chat_template_kwargs"), getattr(tokenizer, "named_tokens", ())), generates,
                continues)


def parse_special_tokens(given: Any) -> bool:
    """Whether control tokens in a user's texts are text; RequestError for what is neither "parse" nor "text"."""
    if given is None or isinstance(given, str) and given in ("parse", "text"):
        return bool(given == "text")
    raise RequestError(f'special_tokens is {shown(given)}, it must be "parse", where control tokens in a text are '
                       'tokens, or "text"')


def rendered(chat: Chat, tokenizer: Any, control: ControlTokens | None) -> tuple[str, bool]:
    """(`chat` by the tokenizer's chat template, whether it is marked).

    control: whose control tokens in it are text, marked for its `encode`; None: nobody's.
    """
    def render(value: Any) -> tuple[str, ...]:
        options = dict(value["variables"])
        if value["tools"] is not None:
            options["tools"] = value["tools"]
        if chat.continue_final_message:
            options["continue_final_message"] = True
        return (tokenizer.apply_chat_template(value["messages"], add_generation_prompt=chat.add_generation_prompt,
                                              **options),)

    value = {"messages": chat.messages, "tools": chat.tools, "variables": chat.variables}
    if control is None:
        [text] = render(value)
        return text, False
    [text], marked = control.literally(value, render)
    return text, marked


def split(chat: Chat, tokenizer: Any, variables: Mapping[str, Any],
          control: ControlTokens | None) -> tuple[str, str, bool]:
    """(what the tokenizer's template has before an answer to `chat`, or before what continues its final message; what
    it has after; whether both are marked). variables: of this template, besides what is a part of the prompt."""
    def render(value: Any) -> tuple[str, ...]:
        options = {**variables, **value["variables"]}
        if value["tools"] is not None:
            options["tools"] = value["tools"]
        if chat.continue_final_message:
            options["continue_final_message"] = True
        before, after = tokenizer.split_template(value["messages"], **options)
        return before, after

    shared = {name: chat.variables[name] for name in SHARED_VARIABLES if name in chat.variables}
    value = {"messages": chat.messages, "tools": chat.tools, "variables": shared}
    if control is None:
        before, after = render(value)
        return before, after, False
    (before, after), marked = control.literally(value, render)
    return before, after, marked


def continued(chat: Chat, text: str) -> Chat:
    """`chat` with the final message as it was rendered to `text`, where that is continued: a template may trim it."""
    if not chat.continue_final_message:
        return chat
    content = chat.messages[-1]["content"]
    if not text.endswith(content):
        content = content.rstrip()
    return chat._replace(messages=[*chat.messages[:-1], {**chat.messages[-1], "content": content}])


def control_tokens(tokenizer: Any) -> ControlTokens:
    """Those of a tokenizer; RequestError for one that is not ours and cannot tell."""
    control = getattr(tokenizer, "control_tokens", None)
    if not isinstance(control, ControlTokens):
        raise RequestError('special_tokens="text" needs a stars tokenizer, built from a directory: leave it out')
    return control


def _or(value: Any, default: bool) -> Any:
    return default if value is None else value


def _as_read(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """`message` as templates expect it, and as vLLM renders it: arguments of tool calls are objects, where OpenAI's API
    has their JSON text, and an empty list of calls is left out."""
    calls = message.get("tool_calls")
    if message.get("role") != "assistant" or not isinstance(calls, (list, tuple)):
        return message
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    return {**message, "tool_calls": [_with_arguments(number, call) for call in calls]}


def _with_arguments(number: int, call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            pass
        if not isinstance(arguments, dict):
            raise RequestError(f"messages[{number}] has a tool call whose arguments are "
                               f"{shown(function['arguments'])}, which is no JSON object: give one, or its text")
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(given: Any) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    if not isinstance(given, (list, tuple)):
        raise RequestError(f"tools is {shown(given)}, it must be a list of JSON schemas, a dictionary each")
    for number, tool in enumerate(given):
        if callable(tool):
            raise RequestError(f"tools[{number}] is a function: give its JSON schema, as "
                               "transformers.utils.get_json_schema makes it of one")
        if not isinstance(tool, dict):
            raise RequestError(f"tools[{number}] is {shown(tool)}, it must be a JSON schema, a dictionary")
    return list(given) or None


def _variables(given: Any, named_tokens: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise RequestError(f"chat_template_kwargs is {shown(given)}, it must be a dictionary of the template's "
                           "variables by name")
    own = next((name for name in given if name in OWN_VARIABLES or name in named_tokens), None)
    if own is not None:
        raise RequestError(f"chat_template_kwargs has {own!r}, which is no variable of a template to be set: leave it "
                           "out")
    return dict(given)
