"""The text of a response as it grows, decoded piece by piece: what a piece costs does not grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stars.model.tokenizer import REPLACEMENT, Detokenizer

TAIL = 64
"""Tokens before a piece that it may be decoded after: `Detokenizer` takes as few of them as show anything."""
MAX_HELD = 8
"""Tokens that may belong to one character, with those of an emoji's four bytes in two tokens each."""


class GrowingText:
    """What tokens add to the text of a response. The first tokens of a character add it with the last of them.

    before: what the response follows. skip_special_tokens: as of SamplingParams.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int], skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tail = list(before[-TAIL:])
        self._held: list[int] = []  # tokens at the end whose character lacks some
        self._decoder = Detokenizer(tokenizer, self._tail, skip_special_tokens)

    def added(self, token_ids: Sequence[int], ends: bool = False) -> str:
        """The text that these tokens would add. ends: whether none follow, so that what is unfinished stays so."""
        text = self._decoder.decode([*self._held, *token_ids])
        return text if ends else text.rstrip(REPLACEMENT)

    def add(self, token_ids: Sequence[int]) -> None:
        """These tokens are a part of the response now."""
        tokens = [*self._held, *token_ids]
        whole = len(tokens)
        while whole and self._decoder.decode(tokens[:whole]).endswith(REPLACEMENT):
            whole -= 1
            if len(tokens) - whole > MAX_HELD:  # it is no character, and none that is to be finished
                whole = len(tokens)
                break
        self._held = tokens[whole:]
        if whole:
            self._tail = [*self._tail, *tokens[:whole]][-TAIL:]
            self._decoder = Detokenizer(self._tokenizer, self._tail, self._skip)
