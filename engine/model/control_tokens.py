"""Control tokens that a user has written as text: encoded as text, while those of the chat template stay tokens.

Where a user's string holds the text of a special token, a mark is put into that text, which no tokenizer knows, before
the template is rendered; whatever the template then makes of the string, a marked text is no special token. A second
tokenizer, equal to the first but for a normaliser that takes marks out, encodes the result: it looks for special tokens
before it normalises, so that it finds the template's own alone, and everything else is split as plain text is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from stars.errors import TokenizerError
from stars.model.tokenizer_limits import ConfinedBackend, bounded, refusing

MARK = "\ufdd0"  # a code point that Unicode keeps for programs: it stands in no text that is interchanged
ESCAPED = json.dumps(MARK)[1:-1]  # as a template's tojson may write it


class ControlTokens:
    """The special tokens of one tokenizer, and how texts are encoded in which they are no tokens."""

    def __init__(self, backend: Backend | ConfinedBackend, where: str):
        tokens = [token for token in backend.get_added_tokens_decoder().values() if token.special and token.content]
        self._where = where
        unknown = getattr(backend.model, "unk_token", None)  # what any text may become
        self._ids = {backend.token_to_id(token.content) for token in tokens if token.content != unknown}
        contents = sorted({token.content for token in tokens}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, contents)) or "(?!)")
        self._begins = {content[:size] for content in contents for size in range(1, len(content))}
        self._ends = {content[-size:] for content in contents for size in range(1, len(content))}
        self._longest = max(map(len, contents), default=1)
        self._backend = backend
        self._marked: Backend | ConfinedBackend | None = None  # encodes marked texts; made when there is one

    def mark(self, text: str) -> str:
        """`text` with a mark in every control token; TokenizerError where it has a mark already."""
        return self._mark(text, False)

    def literally(self, value: Any, render: Callable[[Any], tuple[str, ...]]) -> tuple[tuple[str, ...], bool]:
        """(the texts that `render` makes of `value`, whether they are marked: to be encoded by `encode`).

        value: JSON. Its strings may be put together by a template, so that what might be the beginning or end of a
        control token is marked too, where that changes nothing else. TokenizerError where the template looks at what
        is marked.
        """
        plain = render(value)
        for edges in (True, False):
            marked = self._marked_value(value, edges)
            if marked == value:
                return plain, False
            texts = tuple(text.replace(ESCAPED, MARK) for text in render(marked))
            if tuple(map(without_marks, texts)) == plain:
                # What was dropped, or changed, is no control token without a mark either.
                same = sum(map(self._count, texts)) == sum(map(self._count, plain))
                return (plain, False) if same else (texts, True)
        raise TokenizerError(f"the chat template of {self._where} reads the control tokens in these messages, so that "
                             'they cannot be rendered as text: take them out, or use special_tokens="parse"')

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a marked text. TokenizerError where the tokenizer makes a control token of plain text."""
        if self._marked is None:
            self._marked = self._made()
        with refusing(f"the tokenizer of {self._where} cannot encode this text"):
            encoding = self._marked.encode(text, add_special_tokens=add_special_tokens)
            for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token in self._ids and MARK in text[begin:end]:
                    raise TokenizerError(f"the tokenizer of {self._where} makes its control token "
                                         f"{without_marks(text[begin:end])!r} of plain text, too: take it out, or "
                                         'use special_tokens="parse"')
        return list(encoding.ids)

    def _count(self, text: str) -> int:
        return len(self._pattern.findall(text))

    def _marked_value(self, value: Any, edges: bool) -> Any:
        if isinstance(value, str):
            return self._mark(value, edges)
        if isinstance(value, dict):
            # A role is what templates build control tokens of; a key is looked up.
            return {self._mark(key, False) if isinstance(key, str) else key:
                    self._marked_value(one, edges and key != "role") for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._marked_value(one, edges) for one in value]
        return value

    def _mark(self, text: str, edges: bool) -> str:
        places = set()
        found = self._pattern.search(text)
        while found is not None:  # also those that overlap: a mark behind the first sign breaks all that begin there
            if found.end() - found.start() == 1:
                raise TokenizerError(f"{found.group()!r} is a control token of {self._where} and a single sign, which "
                                     'cannot be written as text: take it out, or use special_tokens="parse"')
            places.add(found.start() + 1)
            found = self._pattern.search(text, found.start() + 1)
        if edges:
            for size in range(1, min(self._longest, len(text) + 1)):
                if text[-size:] in self._begins:
                    places.add(len(text) - size + 1)
                if text[:size] in self._ends:
                    places.add(size - 1)
        if not places:
            return text
        if MARK in text or ESCAPED in text.lower():
            raise TokenizerError(f"a text has control tokens in it and U+{ord(MARK):04X}, which Unicode keeps for "
                                 "programs: take that out")
        cuts = [0, *sorted(places), len(text)]
        return MARK.join(text[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False))

    def _made(self) -> Backend | ConfinedBackend:
        """The tokenizer that takes marks out of what is no special token."""
        where = f"the tokenizer of {self._where}"
        with refusing(f"{where} cannot be changed to encode control tokens as text"):
            state = json.loads(self._backend.to_str())
            own = self._backend.normalizer
            for token in state["added_tokens"]:
                if token["special"] and token["normalized"]:
                    if own is not None and own.normalize_str(token["content"]) != token["content"]:
                        raise TokenizerError(f"{where} normalises its control token {token['content']!r}, which is "
                                             'then like any text: use special_tokens="parse"')
                    token["normalized"] = False  # looked for before marks are taken out
            taken_out = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
            steps: Sequence[Any] = [taken_out] if own is None else [taken_out, state["normalizer"]]
            state["normalizer"] = {"type": "Sequence", "normalizers": steps}
            return bounded(Backend.from_str(json.dumps(state)), where)


def without_marks(text: str) -> str:
    """A marked text as it is meant."""
    return text.replace(MARK, "")
