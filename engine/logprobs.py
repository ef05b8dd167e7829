"""Log-probabilities of tokens: arrays while a response grows, dictionaries as vLLM has them once they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stars.outputs import Logprob

Name = Callable[[int], "str | None"]
"""The text of a token; None without a tokenizer."""


class Tops(NamedTuple):
    """What stood beside tokens as they were drawn."""

    ranks: np.ndarray  # int32 [at least as many as tokens] of the tokens themselves, from 1
    token_ids: np.ndarray  # int32 [the same, n] the most probable first, -1 where no token was left
    logprobs: np.ndarray  # float32 [the same, n]


class TokenLogprobs:
    """Tokens that became history together, their log-probabilities and what stood beside them."""

    def __init__(self, token_ids: Sequence[int], logprobs: Sequence[float], tops: Tops):
        self._source: tuple[Sequence[int], Sequence[float], Tops] | None = (token_ids, logprobs, tops)
        self._entries: list[dict[int, Logprob]] = []

    def entries(self, name: Name) -> list[dict[int, Logprob]]:
        """One a token, made once: the token itself first, then the most probable ones."""
        if self._source is not None:
            token_ids, logprobs, (ranks, tops, values) = self._source
            self._entries = [_entry(*row, name) for row in zip(
                token_ids, logprobs, ranks.tolist(), tops.tolist(), values.tolist(), strict=False)]
            self._source = None  # not before: whoever is interrupted begins anew
        return self._entries


def forced(token_ids: Sequence[int]) -> TokenLogprobs:
    """Of tokens that a rule has put: nothing was drawn, so that each had all of the probability."""
    count = len(token_ids)
    return TokenLogprobs(token_ids, [0.0] * count, Tops(
        np.ones(count, np.int32), np.empty((count, 0), np.int32), np.empty((count, 0), np.float32)))


def joined(parts: Sequence[TokenLogprobs], name: Name) -> list[dict[int, Logprob]]:
    """The entries of a response, from those of what became history piece by piece."""
    return [entry for part in parts for entry in part.entries(name)]


class PromptLogprobs:
    """What the engine's own model says of a prompt's tokens, each after those before it; filled as the prompt is read,
    whoever reads it and however often."""

    def __init__(self, token_ids: Sequence[int], wanted: int):
        rows = len(token_ids) - 1  # of the first token nothing is known
        self.wanted = wanted
        self.read = 0  # rows that are there
        self._token_ids = token_ids
        self._logprobs = np.zeros(rows, np.float32)
        self._tops = Tops(np.zeros(rows, np.int32), np.full((rows, wanted), -1, np.int32),
                          np.zeros((rows, wanted), np.float32))
        self._entries: list[dict[int, Logprob] | None] | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is to be read any more."""
        return self.read == len(self._logprobs)

    def lacking(self, start: int, stop: int) -> range:
        """Which rows of a pass over positions start .. stop - 1 are wanted: those that nobody has read yet. Row i says
        what is known of token i + 1."""
        return range(max(start, self.read), max(start, self.read, min(stop, len(self._logprobs))))

    def targets(self, rows: range) -> Sequence[int]:
        """The tokens that these rows are asked for."""
        return self._token_ids[rows.start + 1 : rows.stop + 1]

    def take(self, rows: range, logprobs: np.ndarray, tops: Tops) -> None:
        """Puts down what a pass has found of `lacking` rows."""
        part = slice(rows.start, rows.stop)
        self._logprobs[part], self._tops.ranks[part] = logprobs, tops.ranks
        self._tops.token_ids[part, : tops.token_ids.shape[1]] = tops.token_ids  # as many as a small vocabulary has
        self._tops.logprobs[part, : tops.token_ids.shape[1]] = tops.logprobs
        self.read = rows.stop  # last: whoever is interrupted reads them again

    def entries(self, name: Name) -> list[dict[int, Logprob] | None] | None:
        """One a token of the prompt, None of the first; None as long as some of it is unread."""
        if self._entries is None and self.complete:
            rest = TokenLogprobs(self._token_ids[1:], self._logprobs.tolist(), self._tops)
            self._entries = [None, *rest.entries(name)]
        return self._entries


def _entry(token: int, logprob: float, rank: int, tops: Sequence[int], values: Sequence[float], name: Name
           ) -> dict[int, Logprob]:
    """In vLLM's order. Of the token itself the sampler's number is shown."""
    entry = {token: Logprob(logprob, rank, name(token))}
    for place, (other, value) in enumerate(zip(tops, values, strict=True), 1):
        if other >= 0 and other != token:
            entry[other] = Logprob(value, place, name(other))
    return entry
