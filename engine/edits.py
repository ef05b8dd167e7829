"""What a request asks of single tokens before they are drawn: biases, bans, the ids that are allowed, a grammar's mask.

`TokenEdits` is of the whole request and made once; `Edited` is that and where a response stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from stars.arguments import shown
from stars.errors import RequestError
from stars.sampling import SamplingParams
from stars.sizes import MAX_EDITED, MAX_WORD, MAX_WORDS, mask_words

NOTHING_LEFT = ("the constraints leave no token that could be drawn next: give bad_words, allowed_token_ids, "
                "min_tokens and structured_outputs that a response can meet together")


SHAPING = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens", "bad_words",
           "allowed_token_ids", "structured_outputs")


class Matcher(Protocol):
    """Says which tokens a response may go on with; one of each lane, which knows the committed response."""

    def fill(self, row: np.ndarray) -> None:
        """Writes the tokens that are allowed next into int32 words: bit t % 32 of word t // 32 is token t."""

    def accept(self, token: int) -> None:
        """Takes the token that was drawn."""


class TokenEdits(NamedTuple):
    """Of a request, in the layout of `stars.kernels.types.Edits`."""

    entries: np.ndarray  # int32 [n, 3]
    words: np.ndarray  # int32 [n, MAX_WORD]
    mask: np.ndarray | None = None  # int32 [mask words]; None: all are allowed
    min_tokens: int = 0  # where a matcher has a say: tokens of the response before which `stops` are left out ...
    stops: np.ndarray | None = None  # ... of its mask, int32 [mask words], as long as anything else is allowed


class Edited(NamedTuple):
    """What a lane is told of its response."""

    edits: TokenEdits
    base: int  # tokens that are committed
    tail: Sequence[int]  # the last of them, at most MAX_WORD - 1


def edits_of(params: SamplingParams, tokenizer: Any, stop_ids: Iterable[int], vocab_size: int) -> TokenEdits | None:
    """What the parameters ask of single tokens; None where that is nothing.

    stop_ids: what may not be drawn before min_tokens. RequestError for bad words that cannot be looked for.
    """
    matched = params.structured_outputs is not None
    sequences = bad_word_ids(params.bad_words or (), tokenizer, vocab_size)
    banned = [ids[0] for ids in sequences if len(ids) == 1]
    longer = [ids for ids in sequences if len(ids) > 1]
    stops = list(stop_ids) if params.min_tokens else []
    if not (matched or params.logit_bias or stops or sequences or params.allowed_token_ids is not None):
        return None
    if len(longer) > MAX_WORDS:
        raise RequestError(f"SamplingParams.bad_words make {len(longer)} words of several tokens, with and without a "
                           f"space before, and the most is {MAX_WORDS}: give fewer")
    mask = None
    if params.allowed_token_ids is not None:
        mask = mask_of(params.allowed_token_ids, vocab_size)
    if banned:
        mask = (mask_of(slice(vocab_size), vocab_size) if mask is None else mask) & ~mask_of(banned, vocab_size)
    bias = params.logit_bias or {}
    until = {} if matched else dict.fromkeys(stops, params.min_tokens)
    _check_left(params, mask, stops if not matched else [], vocab_size)
    if len(bias.keys() | until.keys()) > MAX_EDITED:
        raise RequestError(f"SamplingParams.logit_bias has {len(bias)} tokens, the most is {MAX_EDITED}, the ids that "
                           "min_tokens bans included: give fewer")
    token_ids = sorted(bias.keys() | until.keys())
    entries = np.zeros((len(token_ids), 3), np.int32)
    entries[:, 0] = token_ids
    entries[:, 1] = [until.get(token, 0) for token in token_ids]
    entries[:, 2] = np.array([bias.get(token, 0.0) for token in token_ids], np.float32).view(np.int32)
    words = np.full((len(longer), MAX_WORD), -1, np.int32)
    for row, ids in zip(words, longer, strict=True):
        row[MAX_WORD - len(ids) :] = ids
    if matched and stops:
        return TokenEdits(entries, words, mask, params.min_tokens, mask_of(stops, vocab_size))
    return TokenEdits(entries, words, mask)


def names_of(params: SamplingParams) -> list[str]:
    """The parameters in use that make the distribution which is drawn from another one than the model's, filters and
    temperature left out."""
    off = SamplingParams()
    return [name for name in SHAPING if getattr(params, name) != getattr(off, name)]


def _check_left(params: SamplingParams, mask: np.ndarray | None, stops: Sequence[int], vocab_size: int) -> None:
    """RequestError where nothing could ever be drawn, whatever the response."""
    if mask is None:
        return
    if not mask.any():
        raise RequestError("SamplingParams.bad_words ban all that could be drawn, of allowed_token_ids or of the "
                           "vocabulary: leave some of it")
    if not (mask & ~mask_of(stops, vocab_size)).any():
        raise RequestError(f"SamplingParams.min_tokens is {params.min_tokens} and nothing but EOS and stop token ids "
                           "may be drawn: allow other ids, or leave min_tokens out")


def bad_word_ids(bad_words: Iterable[str], tokenizer: Any, vocab_size: int) -> list[tuple[int, ...]]:
    """The token ids of texts that are banned, as vLLM takes them: as they begin a text, and as they are within one,
    where a space before them makes another first token and not one more."""
    found: dict[tuple[int, ...], None] = {}
    for word in bad_words:
        if tokenizer is None:
            raise RequestError("bad_words need a tokenizer, which the model lacks: use logit_bias or allowed_token_ids")
        text = word.lstrip()
        ids, spaced = (tuple(tokenizer.encode(prefix + text, add_special_tokens=False)) if text else ()
                       for prefix in ("", " "))
        if not ids:
            raise RequestError(f"SamplingParams.bad_words has {shown(word)}, which is no token: leave it out")
        if len(ids) > MAX_WORD:
            raise RequestError(f"SamplingParams.bad_words has {shown(word)}, which is {len(ids)} tokens, the most is "
                               f"{MAX_WORD}: give a shorter part of it")
        outside = next((token for token in (*ids, *spaced) if token >= vocab_size), None)
        if outside is not None:
            raise RequestError(f"SamplingParams.bad_words has {shown(word)}, whose token {outside} is outside the "
                               f"model's vocabulary of {vocab_size}: leave it out")
        found[ids] = None
        if len(spaced) == len(ids) and spaced[0] != ids[0]:
            found[spaced] = None
    return list(found)


def mask_of(token_ids: Sequence[int] | slice, vocab_size: int) -> np.ndarray:
    """int32 words [ceil(vocab_size / 32)] with the bits of these tokens."""
    bits = np.zeros(32 * mask_words(vocab_size), np.uint8)
    bits[token_ids if isinstance(token_ids, slice) else list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.dtype("<i4")).astype(np.int32)
