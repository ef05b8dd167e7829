"""A GGUF file's vocabulary as llama.cpp reads it, as a tokenizer of ours: for files that ours cannot read."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from stars.model.tokenizer import Tokenizer

CONTROL = 1 << 3  # LLAMA_TOKEN_ATTR_CONTROL
NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE
TEMPLATE = b"tokenizer.chat_template"


class VocabularyTokenizer(Tokenizer):
    """Text to ids and back by llama.cpp. Its vocabulary equals no other as far as is known, so that reward models read
    the text anew; and control tokens in a user's text are tokens."""

    control_tokens = None  # type: ignore[assignment]

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """False but for itself."""
        return self is other


def vocabulary_of(api: Any, model: Any, where: str) -> VocabularyTokenizer | None:
    """The tokenizer of a llama_model_p; None where its file has none. It must not outlive the model."""
    backend = _Backend(api, model)
    if api.llama_vocab_type(backend.vocab) == NO_VOCABULARY:
        return None
    ids = {"bos_token": api.llama_vocab_bos(backend.vocab), "eos_token": api.llama_vocab_eos(backend.vocab)}
    special = {name: backend.id_to_token(token) or "" for name, token in ids.items() if token >= 0}
    template = _template(api, model)
    tokenizer = VocabularyTokenizer(backend, special, {"default": template} if template else {}, where)  # type: ignore[arg-type]
    # Not by their texts, which other tokens may have too.
    tokenizer.bos_token_id, tokenizer.eos_token_id = (
        token if token >= 0 else None for token in (ids["bos_token"], ids["eos_token"]))
    return tokenizer


def ending_tokens(api: Any, model: Any) -> tuple[int, ...]:
    """Every token that llama.cpp takes for an end of generation."""
    vocab = api.llama_model_get_vocab(model)
    return tuple(token for token in range(api.llama_vocab_n_tokens(vocab)) if api.llama_vocab_is_eog(vocab, token))


def equal_tokens(api: Any, model: Any, tokenizer: Any) -> float:
    """The share of the model's tokens that `tokenizer` writes in the same way."""
    vocab = api.llama_model_get_vocab(model)
    count: int = api.llama_vocab_n_tokens(vocab)
    written = tokenizer.tokens(range(count))
    texts = [api.llama_vocab_get_text(vocab, token) for token in range(count)]
    same = [token is not None and token.encode() == text for token, text in zip(written, texts, strict=True)]
    return same.count(True) / count


class _Encoding(NamedTuple):
    ids: list[int]


class _AddedToken(NamedTuple):
    content: str
    special: bool = True


class _Backend:
    """What `Tokenizer` asks of a tokenizers.Tokenizer."""

    decoder = None

    def __init__(self, api: Any, model: Any):
        self._api = api
        self.vocab = api.llama_model_get_vocab(model)
        self._count: int = api.llama_vocab_n_tokens(self.vocab)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return self._count

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:
        data = text.encode()
        room = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._api.llama_tokenize(self.vocab, data, len(data), ids, room, add_special_tokens, True)
            if count >= 0:
                return _Encoding(ids[:count])
            room = -count

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        given = (ctypes.c_int32 * len(ids))(*ids)
        room = 16 * len(ids) + 64
        while True:
            text = ctypes.create_string_buffer(room)
            count = self._api.llama_detokenize(self.vocab, given, len(ids), text, room, False, not skip_special_tokens)
            if count >= 0:
                return text.raw[:count].decode(errors="replace")
            room = -count

    def id_to_token(self, token: int) -> str | None:
        if not 0 <= token < self._count:
            return None
        text: bytes = self._api.llama_vocab_get_text(self.vocab, token)
        return text.decode(errors="replace")

    def token_to_id(self, text: str) -> int | None:
        return self._ids.get(text)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        return self._ids

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {self.id_to_token(token) or "": token for token in range(self._count)}

    def get_added_tokens_decoder(self) -> dict[int, _AddedToken]:
        return {token: _AddedToken(self.id_to_token(token) or "") for token in range(self._count)
                if self._api.llama_vocab_get_attr(self.vocab, token) & CONTROL}

    def to_str(self) -> str:
        return json.dumps({"model": "llama.cpp", "at": id(self)})


def _template(api: Any, model: Any) -> str | None:
    """The chat template in the file's metadata."""
    size = api.llama_model_meta_val_str(model, TEMPLATE, None, 0)
    if size <= 0:
        return None
    text = ctypes.create_string_buffer(size + 1)
    api.llama_model_meta_val_str(model, TEMPLATE, text, size + 1)
    return text.value.decode(errors="replace")
