"""What a user may give as a prompt, brought into one form and checked before any work."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from stars.arguments import MAX_SHOWN, shown
from stars.errors import RequestError
from stars.model.tokenizer import finished

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")


class Prompt(NamedTuple):
    """One prompt: as given, and as the language model reads it."""

    given: str | list[dict[str, Any]] | None  # text, messages, or None where token ids were given
    token_ids: list[int]  # what the LM is fed
    text: str | None  # of token_ids, without special tokens and unfinished characters; None where nothing decodes them


def parse_prompt(prompt: Any, tokenizer: Any, vocab_size: int) -> Prompt:
    """Accepts text, {"prompt": text}, {"prompt_token_ids": [...]} or {"messages": [...]}; RequestError otherwise.

    Keys whose value is None count as absent; ids may have their text with them. Messages, each with "content" (text,
    or a list of text parts) or "tool_calls", are rendered with the LM's chat template and encoded without special
    tokens, since the template holds them.
    """
    parsed = _parse(prompt, tokenizer, vocab_size)
    _check_ids(parsed.token_ids, vocab_size)
    return parsed


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
    if prompt.given is None:
        bos_id = getattr(tokenizer, "bos_token_id", None)
        begins = int(prompt.token_ids[0] == bos_id)
        own = tokenizer.encode(text, add_special_tokens=False)
        token_ids = [*prompt.token_ids[:begins], *own, *prompt.token_ids[begins:]]
    elif isinstance(prompt.given, str):
        begins = len(bos) * prompt.given.startswith(bos)
        token_ids = tokenizer.encode(prompt.given[:begins] + text + prompt.given[begins:], add_special_tokens=True)
    else:
        turn = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        rest = prompt.text or ""
        rest = rest.removeprefix(bos) if turn.startswith(bos) else rest
        token_ids = tokenizer.encode(turn + rest, add_special_tokens=False)
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


def _parse(prompt: Any, tokenizer: Any, vocab_size: int) -> Prompt:
    if isinstance(prompt, dict):
        unknown = [key if isinstance(key, str) else shown(key) for key in prompt if key not in PROMPT_KEYS]
        if unknown:
            raise RequestError('a prompt dictionary needs exactly one of "prompt", "prompt_token_ids" and "messages" '
                               f'and does not take "{min(unknown)[:MAX_SHOWN]}"')
        kind = prompt_kind(prompt, "a prompt dictionary")
        if kind == "prompt_token_ids":
            return _from_ids(prompt["prompt_token_ids"], tokenizer, vocab_size)
        if kind == "messages":
            return _from_messages(prompt["messages"], tokenizer)
        prompt = prompt["prompt"]
    if not isinstance(prompt, str):
        raise RequestError(f"a prompt is a string or a dictionary, not {type(prompt).__name__}")
    if not prompt:
        raise RequestError("the prompt is empty: give at least one character or token")
    if tokenizer is None:
        raise RequestError('the model has no tokenizer.json: give {"prompt_token_ids": [...]} instead of '
                           "text")
    token_ids = tokenizer.encode(prompt, add_special_tokens=True)
    if not token_ids:
        raise RequestError("the tokenizer makes nothing of this prompt: give at least one character that it knows")
    return Prompt(prompt, token_ids, prompt)


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


def _from_messages(messages: Any, tokenizer: Any) -> Prompt:
    if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RequestError('messages must be a non-empty list of {"role": ..., "content": ...}')
    for number, message in enumerate(messages):
        if message.get("content") is None and "tool_calls" not in message:
            raise RequestError(f'messages[{number}] has no "content": give its text, or "tool_calls"')
    if tokenizer is None or not tokenizer.has_chat_template:
        raise RequestError("the model has no chat template: give the prompt as text")
    rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
    token_ids = tokenizer.encode(rendered, add_special_tokens=False)
    if not token_ids:
        raise RequestError("the chat template renders these messages to an empty prompt")
    return Prompt(list(messages), token_ids, rendered)


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
