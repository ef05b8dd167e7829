"""The bytes that each token stands for: what a grammar of texts says of tokens rests on them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from stars.errors import TokenizerError
from stars.model.tokenizer_limits import part_state

SAMPLES = 64  # tokens whose bytes are compared with what the tokenizer decodes them to


def token_bytes(backend: Any, hidden: Collection[int], decode: Callable[[list[int]], str], vocab_size: int, where: str,
                ) -> list[bytes | None]:
    """What the ids below `vocab_size` add to a text, each by itself; None for those that texts leave out: `hidden` ones
    and ids that the tokenizer lacks. decode: the text of some ids, to compare with.

    Raises TokenizerError where a token's text depends on its neighbours, as WordPiece's does.
    """
    steps = _steps(part_state(backend.decoder), where)
    bytewise = any(step["type"] == "ByteLevel" for step in steps)
    fallback = any(step["type"] == "ByteFallback" for step in steps)
    found: list[bytes | None] = [None] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index >= vocab_size or index in hidden:
            continue
        if bytewise:
            found[index] = _from_letters(token)
        elif fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[index] = bytes.fromhex(token[3:5])
        else:
            for step in steps:
                token = _replaced(token, step)
            found[index] = token.encode()
    _check(decode, found, where)
    return found


def _steps(state: dict[str, Any] | None, where: str) -> list[dict[str, Any]]:
    """The steps of a decoder, one after the other; TokenizerError for those that look at more than one token."""
    if state is not None and state["type"] == "Sequence":
        return [step for child in state["decoders"] for step in _steps(child, where)]
    kind = "none" if state is None else state["type"]
    plain = state is not None and (kind in ("ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace")
                                   or kind == "Replace" and "String" in state["pattern"])
    if not plain:
        raise TokenizerError(f"the tokenizer of {where} has tokens whose text depends on their neighbours (its decoder "
                             f"is {kind}), so that no grammar can be held against them: use a model with another one")
    assert state is not None
    return [state]


def _replaced(token: str, step: dict[str, Any]) -> str:
    """What a step of a decoder makes of a token in the middle of a text."""
    if step["type"] == "Replace":
        return token.replace(step["pattern"]["String"], step["content"])
    return token.replace(step["replacement"], " ") if step["type"] == "Metaspace" else token


def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: those that show stand for themselves, the others are counted from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {**{chr(byte): byte for byte in own}, **{chr(256 + index): byte for index, byte in enumerate(others)}}


_BYTES = _letters()


def _from_letters(token: str) -> bytes:
    """The bytes of a byte-level token; one with other letters, such as an added one, is its own text."""
    try:
        return bytes([_BYTES[letter] for letter in token])
    except KeyError:
        return token.encode()


def _check(decode: Callable[[list[int]], str], found: list[bytes | None], where: str) -> None:
    """TokenizerError where some of the tokens are decoded to something else, after a token that shows."""
    shown = [(index, text) for index, text in enumerate(found) if text and _is_text(text)]
    anchor = next((index for index, text in shown if text.isalnum()), None)
    if anchor is None:
        return
    before = decode([anchor])
    for index, text in shown[:: max(1, len(shown) // SAMPLES)]:
        if decode([anchor, index]) != before + text.decode():
            raise TokenizerError(f"the tokenizer of {where} decodes token {index} to something else than its own text, "
                                 "so that no grammar can be held against its tokens: use a model with another one")


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
