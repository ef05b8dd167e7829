"""Response ids to text: stop strings, and what a stream must hold back."""

from __future__ import annotations

from collections.abc import Sequence

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete UTF-8 sequence to


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """The earliest stop string in text[start:], as (position in text, stop string); None if there is none."""
    found = [(position, stop) for stop in stops if (position := text.find(stop, start)) >= 0]
    return min(found) if found else None


def hold_back(text: str, stops: Sequence[str]) -> str:
    """`text` less what may still change: an incomplete character at its end, a possible start of a stop string."""
    text = text.rstrip(REPLACEMENT)
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return text[: len(text) - longest]


def cut_at_stop(tokenizer, committed: list[int], drafted: list[int], stops: Sequence[str]) -> tuple[int, str] | None:
    """Where a stop string completes inside `drafted`: (drafted tokens up to and including it, the stop string).

    None if it does not. Only texts that need the draft to complete count, since the committed text has none.
    """
    if find_stop(tokenizer.decode(committed + drafted), stops) is None:
        return None
    for count in range(1, len(drafted) + 1):
        found = find_stop(tokenizer.decode(committed + drafted[:count]), stops)
        if found is not None:
            return count, found[1]
    return None
