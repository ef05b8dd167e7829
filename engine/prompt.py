"""What a user may give as a prompt, brought into one form and checked before any work."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from stars.arguments import MAX_SHOWN, flag, shown
from stars.chat import CHAT_KEYS, Chat, continued, control_tokens, parse_chat, parse_special_tokens, rendered
from stars.errors import RequestError
from stars.model.control_tokens import without_marks
from stars.model.tokenizer import finished

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
OTHER_KEYS = {"prompt": ("special_tokens", "add_special_tokens"), "prompt_token_ids": (),
              "messages": (*CHAT_KEYS, "special_tokens")}
"""What a prompt dictionary may have besides each of PROMPT_KEYS."""


class Prompt(NamedTuple):
    """One prompt: as given, and as the language model reads it."""

    given: str | list[dict[str, Any]] | None  # text, messages, or None where token ids were given or a text was cut
    token_ids: list[int]  # what the LM is fed
    # Of token_ids, without unfinished characters; special tokens are in it where messages were rendered to it alone.
    text: str | None  # None where nothing decodes them
    rendering: Chat | None = None  # of messages, how they are; its final message as the LM reads it
    literal: bool = False  # whether control tokens in what was given are text
    marked: str | None = None  # `text` with marks, where control tokens in it are text (`ControlTokens.encode`)
    cut: bool = False  # whether token_ids have lost their beginning
    shown: str | list[dict[str, Any]] | None = None  # what was given, where it was cut
    special: bool = True  # whether a text is read with the special tokens that a tokenizer puts around it

    @property
    def chat(self) -> Chat | None:
        """The messages as templates render them; None where none were given."""
        return self.rendering or (Chat(self.given) if isinstance(self.given, list) else None)

    @property
    def asked(self) -> str | list[dict[str, Any]] | None:
        """Text or messages as the user gave them; None where token ids were given."""
        return self.shown if self.cut else self.given


def parse_prompt(prompt: Any, tokenizer: Any, vocab_size: int) -> Prompt:
    """Accepts text, {"prompt": text}, {"prompt_token_ids": [...]} or {"messages": [...]}; RequestError otherwise.

    Keys whose value is None count as absent; ids may have their text with them. Messages, each with "content" (text,
    or a list of text parts) or "tool_calls", are rendered with the LM's chat template and encoded without special
    tokens, since the template holds them; beside them may stand what `chat.CHAT_KEYS` names. "special_tokens" beside a
    text or messages says whether control tokens in what is given are tokens ("parse") or text ("text"), and
    "add_special_tokens": False beside a text that it has those already which a tokenizer puts around one.
    """
    parsed = _parse(prompt, tokenizer, vocab_size)
    _check_ids(parsed.token_ids, vocab_size)
    return parsed


def last_tokens(prompt: Prompt, count: int, tokenizer: Any) -> Prompt:
    """`prompt` with at most its last `count` tokens, whatever they are.

    Of a text that was cut only these tokens are left, for rewards too. Messages stay whole for what renders them anew.
    """
    if len(prompt.token_ids) <= count:
        return prompt
    token_ids = prompt.token_ids[-count:]
    messages = isinstance(prompt.given, list)
    text = None
    if tokenizer is not None:  # of rendered messages with special tokens, which belong to their text
        text = finished(tokenizer.decode(token_ids, skip_special_tokens=not messages))
    return prompt._replace(given=prompt.given if messages else None, token_ids=token_ids, text=text, marked=None,
                           cut=True, shown=prompt.asked)


def after(text: str, prompt: Prompt, tokenizer: Any, vocab_size: int) -> list[int]:
    """Token ids of the prompt with `text` put before it, with one BOS where the prompt had one.

    Before messages it is rendered as a user's turn of its own, with a generation prompt, and the messages follow as
    they are rendered by themselves. Before a text it is put as it stands, and before token ids its own. An empty text
    puts nothing there. RequestError, as `parse_prompt`.
    """
    if not text:
        return prompt.token_ids
    if tokenizer is None:
        raise RequestError("a text is put before the prompt, and the model has no tokenizer.json to read it "
                           "with: build the engine with Engine(model, tokenizer=DIR)")
    bos = getattr(tokenizer, "bos_token", None) or ""
    if isinstance(prompt.given, list):
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    if prompt.given is None or prompt.cut:
        bos_id = getattr(tokenizer, "bos_token_id", None)
        begins = int(prompt.token_ids[0] == bos_id)
        own = tokenizer.encode(text, add_special_tokens=False)
        if isinstance(prompt.given, list):  # the turn has its own BOS, if it has one
            token_ids = [*own, *prompt.token_ids[begins * text.startswith(bos) if bos else 0 :]]
        else:
            token_ids = [*prompt.token_ids[:begins], *own, *prompt.token_ids[begins:]]
    elif isinstance(prompt.given, str):
        begins = len(bos) * prompt.given.startswith(bos) * (not prompt.literal)
        rest = prompt.marked if prompt.marked is not None else prompt.given
        token_ids = _encoded(tokenizer, rest[:begins] + text + rest[begins:], prompt.special,
                             prompt.marked is not None)
    else:
        rest = prompt.marked or prompt.text or ""
        rest = rest.removeprefix(bos) if text.startswith(bos) else rest
        token_ids = _encoded(tokenizer, text + rest, False, prompt.marked is not None)
    _check_ids(token_ids, vocab_size)
    return token_ids


def prompt_kind(given: dict[str, Any], what: str) -> str:
    """Which of PROMPT_KEYS holds the prompt of `given`; RequestError, about `what`, where none or several do.

    None is no value: a table has all columns in every row. Ids may have their text with them, as in vLLM's
    TokensPrompt, and are what is read.
    """
    kinds = [key for key in PROMPT_KEYS if given.get(key) is not None]
    if kinds == ["prompt", "prompt_token_ids"]:
        return "prompt_token_ids"
    if len(kinds) != 1:
        raise RequestError(f'{what} needs exactly one of "prompt", "prompt_token_ids" and "messages"')
    return kinds[0]


def _check_ids(token_ids: list[int], vocab_size: int) -> None:
    wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"prompt token id {shown(wrong)} is outside the model's vocabulary of {vocab_size}: use the "
                           "tokenizer that belongs to the model")


def _encoded(tokenizer: Any, text: str, add_special_tokens: bool, marked: bool) -> list[int]:
    if marked:
        return control_tokens(tokenizer).encode(text, add_special_tokens)
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return token_ids


def _parse(prompt: Any, tokenizer: Any, vocab_size: int) -> Prompt:
    literal, special = False, True
    if isinstance(prompt, dict):
        known = {*PROMPT_KEYS, *(key for keys in OTHER_KEYS.values() for key in keys)}
        unknown = [key if isinstance(key, str) else shown(key) for key in prompt if key not in known]
        if unknown:
            raise RequestError('a prompt dictionary needs exactly one of "prompt", "prompt_token_ids" and "messages" '
                               f'and does not take "{min(unknown)[:MAX_SHOWN]}"')
        kind = prompt_kind(prompt, "a prompt dictionary")
        beside = next((key for key in prompt if key not in PROMPT_KEYS and key not in OTHER_KEYS[kind]
                       and prompt[key] is not None), None)
        if beside is not None:
            raise RequestError(f'a prompt dictionary with "{kind}" does not take "{beside}": leave it out')
        literal = parse_special_tokens(prompt.get("special_tokens"))
        if kind == "prompt_token_ids":
            return _from_ids(prompt["prompt_token_ids"], tokenizer, vocab_size)
        if kind == "messages":
            return _from_chat(parse_chat(prompt, tokenizer), tokenizer, literal, prompt["messages"])
        if prompt.get("add_special_tokens") is not None:
            special = flag("add_special_tokens", prompt["add_special_tokens"])
        prompt = prompt["prompt"]
    if not isinstance(prompt, str):
        raise RequestError(f"a prompt is a string or a dictionary, not {type(prompt).__name__}")
    if not prompt:
        raise RequestError("the prompt is empty: give at least one character or token")
    if tokenizer is None:
        raise RequestError('the model has no tokenizer.json: give {"prompt_token_ids": [...]} instead of '
                           "text")
    marked = control_tokens(tokenizer).mark(prompt) if literal else prompt
    token_ids = _encoded(tokenizer, marked, special, marked != prompt)
    if not token_ids:
        raise RequestError("the tokenizer makes nothing of this prompt: give at least one character that it knows")
    return Prompt(prompt, token_ids, prompt, literal=literal, marked=marked if marked != prompt else None,
                  special=special)


def _from_ids(token_ids: Any, tokenizer: Any, vocab_size: int) -> Prompt:
    try:
        if any(isinstance(token, bool) for token in token_ids):
            raise TypeError
        token_ids = [operator.index(token) for token in token_ids]
    except Exception:  # no list, or a list of whatever
        raise RequestError("prompt_token_ids must be a list of integers") from None
    if not token_ids:
        raise RequestError("the prompt is empty: give at least one character or token")
    _check_ids(token_ids, vocab_size)  # before they are decoded, which some tokenizers cannot do with any number
    text = finished(tokenizer.decode(token_ids, skip_special_tokens=True)) if tokenizer is not None else None
    return Prompt(None, token_ids, text)


def _from_chat(chat: Chat, tokenizer: Any, literal: bool, given: Sequence[dict[str, Any]]) -> Prompt:
    text, marked = rendered(chat, tokenizer, control_tokens(tokenizer) if literal else None)
    token_ids = _encoded(tokenizer, text, False, marked)
    if not token_ids:
        raise RequestError("the chat template renders these messages to an empty prompt: change the messages to what "
                           "it expects, or give the prompt as text")
    plain = without_marks(text) if marked else text
    return Prompt(list(given), token_ids, plain, continued(chat, plain), literal, text if marked else None)


def message_text(message: dict[str, Any]) -> str:
    """A message's text: its content, or the texts of its content's parts; nothing where there is none (a tool call).

    RequestError where it has more than text.
    """
    content = message.get("content")
    parts = [content] if content is None or isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise RequestError(f"a message's content is {type(content).__name__} where the reward model reads text: give "
                           "text")
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            part = part["text"]
        if part is not None and not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(f"a message's content has a part of type {kind!r} and the reward model reads text: give "
                               '{"type": "text", "text": ...}')
        texts.append(part or "")
    return "".join(texts)
