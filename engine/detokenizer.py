"""Response ids to text: after the prompt they answer, up to a stop string, and what a stream must hold back."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from stars.errors import RequestError

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete UTF-8 sequence to
CONTEXT = 8
"""Prompt tokens decoded in front of a response: enough for a character of four byte tokens and one whole one before."""


class Detokenizer:
    """Text of the responses to one prompt, as it stands after that prompt.

    Many decoders treat the first token of a text in their own way: those of Llama 2's kind take its space off. So a
    response is decoded after the prompt's last tokens, whose text is then cut off. A character that the prompt leaves
    unfinished belongs to the response that completes it.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        count = CONTEXT
        while True:
            self._context = list(prompt_token_ids[-count:])
            self._text: str = tokenizer.decode(self._context)
            # Special tokens decode to nothing and a lone space may be taken off. After a character that shows, the
            # rest is decoded as it is in the whole text.
            if count >= len(prompt_token_ids) or self._text.strip(" " + REPLACEMENT):
                break
            count *= 2

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response or of its beginning; special tokens are left out."""
        text: str = self._tokenizer.decode([*self._context, *token_ids])
        if text.startswith(self._text):
            return text[len(self._text) :]
        return text[len(os.path.commonprefix([self._text, text])) :]


def finished(text: str) -> str:
    """`text` without the character at its end that lacks bytes: the sign for it may change with the next token."""
    return text.removesuffix(REPLACEMENT)


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """The earliest stop string in text[start:], as (position in text, stop string); None if there is none.

    Of several at one position the shortest, which is the first to complete.
    """
    found = [(position, stop) for stop in stops if (position := text.find(stop, start)) >= 0]
    return min(found) if found else None


def hold_back(text: str, stops: Sequence[str]) -> str:
    """`text` less what may still change: an unfinished character at its end, a possible start of a stop string."""
    text = finished(text)
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return text[: len(text) - longest]


def cut_at_stop(detokenizer: Detokenizer, committed: list[int], drafted: list[int],
                stops: Sequence[str]) -> tuple[int, str] | None:
    """Where a stop string completes inside `drafted`: (drafted tokens up to and including it, the stop string).

    None if it does not. Only texts that need the draft to complete count, since the committed text has none.
    """
    def found(count: int) -> tuple[int, str] | None:
        return find_stop(finished(detokenizer.decode(committed + drafted[:count])), stops)

    if found(len(drafted)) is None:
        return None
    # Finished text does not change: from the token that completes a stop string on, every longer draft has one.
    count = 1 + bisect_left(range(1, len(drafted)), True, key=lambda count: found(count) is not None)
    stop = found(count)
    return None if stop is None else (count, stop[1])


def stop_tokens(tokenizer: Any, stops: Sequence[str], vocab_size: int) -> dict[int, str]:
    """Stop strings that are special tokens, by id: a text leaves those out, so only their ids can be found.

    Raises RequestError for a stop string that has a special token and other text in it, which nothing could match.
    """
    special = getattr(tokenizer, "special_tokens", None) or {}
    ids = {special[stop]: stop for stop in stops if stop in special and special[stop] < vocab_size}
    for stop in stops:
        inside = None if stop in special else next((token for token in special if token in stop), None)
        if inside is not None:
            raise RequestError(f"the stop string {stop!r} contains the special token {inside!r}, which is no part of "
                               f"a response's text: give {inside!r} alone, or its id in stop_token_ids")
    return ids
