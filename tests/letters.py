"""A tokenizer of a few letters, and languages over them whose texts can be listed: what grammars are held against."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np

from toy import EOS


class Letters:
    """Tokens of one or two letters, so that a text may be drawn in several ways. Token 0 is EOS."""

    bos_token = bos_token_id = None
    has_chat_template = False
    special_tokens = {"</s>": EOS}

    def __init__(self, texts: Sequence[str] = ("a", "b", "ab", "c")):
        self.texts = ("", *texts)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.texts.index(letter) for letter in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.texts[token] for token in token_ids)

    def token_bytes(self, vocab_size: int) -> list[bytes | None]:
        return [text.encode() or None for text in (*self.texts, *[""] * vocab_size)][:vocab_size]


LETTERS = Letters()


class Language:
    """All texts of at most `longest` letters that match a regular expression, by trying each."""

    def __init__(self, regex: str, longest: int, letters: Letters = LETTERS):
        self.regex, self.letters = regex, letters
        self._longest = longest
        self.allowed = cache(self.allowed)

    @cached_property
    def texts(self) -> frozenset[str]:
        single = sorted({letter for text in self.letters.texts for letter in text})
        return frozenset(text for count in range(self._longest + 1)
                         for text in map("".join, itertools.product(single, repeat=count))
                         if re.fullmatch(self.regex, text))

    @cached_property
    def beginnings(self) -> frozenset[str]:
        return frozenset(text[:count] for text in self.texts for count in range(len(text) + 1))

    def allowed(self, response: tuple[int, ...]) -> frozenset[int]:
        """The tokens that may come after a response."""
        text = self.letters.decode(response)
        further = {token for token, more in enumerate(self.letters.texts) if more and text + more in self.beginnings}
        return frozenset(further | ({EOS} if text in self.texts else set()))


class Constrained:
    """A model whose tokens are those that a language allows."""

    def __init__(self, model, language: Language, prompt_tokens: int):
        self._model, self._language, self._prompt_tokens = model, language, prompt_tokens

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        logits = np.asarray(self._model.logits(ids), dtype=np.float64).copy()
        allowed = self._language.allowed(tuple(ids[self._prompt_tokens :]))
        logits[[token not in allowed for token in range(len(logits))]] = -np.inf
        return logits
