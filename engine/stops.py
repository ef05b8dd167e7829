"""Stop strings: where a text ends at one, what a stream must hold back, and which of them are single tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from stars.errors import RequestError
from stars.model.tokenizer import Detokenizer, finished


def find_stop(text: str, stops: Sequence[str], after: int = 0) -> tuple[int, str] | None:
    """The earliest stop string that ends behind the first `after` characters, as (position in text, stop string); None
    if there is none.

    Of several at one position the shortest, which is the first to complete.
    """
    found = [(position, stop) for stop in stops if (position := text.find(stop, max(0, after - len(stop) + 1))) >= 0]
    return min(found) if found else None


def stop_of(detokenizer: Detokenizer, token_ids: list[int], text: str, stops: Sequence[str], min_tokens: int,
            ) -> tuple[int, str] | None:
    """As `find_stop`, in the `text` of these tokens of a response, the first min_tokens of which end in no stop string.
    """
    return find_stop(text, stops, unstoppable(detokenizer, token_ids, min_tokens))


def unstoppable(detokenizer: Detokenizer, token_ids: list[int], min_tokens: int) -> int:
    """Characters of a response that no stop string ends in: those of its first min_tokens tokens."""
    return len(finished(detokenizer.decode(token_ids[:min_tokens]))) if min_tokens else 0


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
                stops: Sequence[str], min_tokens: int = 0) -> tuple[int, str] | None:
    """Where a stop string completes inside `drafted`: (drafted tokens up to and including it, the stop string).

    None if it does not. Only texts that need the draft to complete count, since the committed text has none; and none
    of the first min_tokens tokens of the response, as in vLLM.
    """
    after = unstoppable(detokenizer, committed + drafted, min_tokens)

    def found(count: int) -> tuple[int, str] | None:
        return find_stop(finished(detokenizer.decode(committed + drafted[:count])), stops, after)

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
