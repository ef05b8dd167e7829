"""Log-probabilities in the shapes of OpenAI's two addresses, and vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stars.outputs import Logprob
from stars.serve.http.growing_text import GrowingText

LEAST = -9999.0
"""What stands for minus infinity, which JSON has not and clients' models do not take: vLLM's number."""


class TokenPlaces:
    """Where in a growing text each token begins. Of a character of several tokens the first ones add nothing yet."""

    def __init__(self, tokenizer: Any, before: Sequence[int]):
        self._grown = None if tokenizer is None else GrowingText(tokenizer, before)
        self._place = 0

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """The places of the next tokens."""
        places = []
        for token in token_ids:
            places.append(self._place)
            if self._grown is not None:
                self._place += len(self._grown.added([token]))
                self._grown.add([token])
        return places


def completion_logprobs(token_ids: Sequence[int], entries: Sequence[Mapping[int, Logprob] | None],
                        places: list[int]) -> dict[str, Any]:
    """As /v1/completions has them. An entry that is None is of a token that comes first and follows nothing."""
    tops: list[dict[str, float] | None] = []
    tokens, values = [], []
    for token, entry in zip(token_ids, entries, strict=True):
        tokens.append(_name(token, None if entry is None else entry[token]))
        values.append(None if entry is None else _value(entry[token]))
        tops.append(None if entry is None else _by_text(entry))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": places}


def chat_logprobs(token_ids: Sequence[int], entries: Sequence[Mapping[int, Logprob]], top: int) -> dict[str, Any]:
    """As /v1/chat/completions has them."""
    content = []
    for token, entry in zip(token_ids, entries, strict=True):
        ranked = sorted(((found.rank, other) for other, found in entry.items() if found.rank is not None))[:top]
        content.append({**_entry(token, entry[token]),
                        "top_logprobs": [_entry(other, entry[other]) for _, other in ranked]})
    return {"content": content, "refusal": None}


def prompt_logprobs(entries: Sequence[Mapping[int, Logprob] | None] | None) -> list[dict[str, Any] | None] | None:
    """As vLLM has them: by token id, of each token of the prompt."""
    if entries is None:
        return None
    return [None if entry is None else {
        str(token): {"logprob": _value(found), "rank": found.rank, "decoded_token": found.decoded_token}
        for token, found in entry.items()} for entry in entries]


def _entry(token: int, found: Logprob) -> dict[str, Any]:
    name = _name(token, found)
    return {"token": name, "logprob": _value(found), "bytes": list(name.encode())}


def _by_text(entry: Mapping[int, Logprob]) -> dict[str, float]:
    """Of tokens with one text the first, which is the drawn one or the most probable."""
    found: dict[str, float] = {}
    for token, one in entry.items():
        found.setdefault(_name(token, one), _value(one))
    return found


def _name(token: int, found: Logprob | None) -> str:
    text = None if found is None else found.decoded_token
    return f"token_id:{token}" if text is None else text


def _value(found: Logprob) -> float:
    return found.logprob if found.logprob > LEAST else LEAST  # NaN too

