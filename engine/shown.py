"""What a user is shown of a response: its text as `SamplingParams` asks for it. What rewards read is not changed by it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from stars.model.tokenizer import Detokenizer, finished
from stars.sampling import SamplingParams
from stars.stops import hold_back, stop_of


class ShownText:
    """Texts of the responses to one prompt, and of their beginnings.

    detokenizer: gives the one that decodes them without special tokens, in whose texts stop strings are found.
    """

    def __init__(self, detokenizer: Callable[[], Detokenizer], tokenizer: Any, prompt_token_ids: Sequence[int],
                 params: SamplingParams, stop_ids: Sequence[int]):
        self._detokenizer = detokenizer
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids
        self._detokenize, self._skip = params.detokenize, params.skip_special_tokens
        self._includes = params.include_stop_str_in_output
        self._stop: Sequence[str] = params.stop or ()
        self._min_tokens = params.min_tokens
        self._stop_ids = stop_ids

    def of(self, token_ids: list[int], stop_reason: int | str | None, ended: bool) -> str:
        """The text of a response, or with `ended` False of its beginning: less what may still change.

        stop_reason: as in the output, where it has ended.
        """
        if not self._detokenize:
            return ""
        ends = bool(token_ids) and token_ids[-1] in self._stop_ids  # with a token that the text leaves out
        content = token_ids[:-1] if ends else token_ids
        text = self._detokenizer().decode(content)
        found = None
        if isinstance(stop_reason, str):
            found = stop_of(self._detokenizer(), content, text, self._stop, self._min_tokens)
        if found is not None:
            place, stop = found
            return self._until(content, text, place + len(stop) * self._includes)
        if not ended:
            settled = finished(text) if self._includes else hold_back(text, self._stop)
            return self._until(content, text, len(settled))
        if not ends or not self._includes:
            return self._until(content, text, len(text))
        if isinstance(stop_reason, str) and self._skip:  # a special token, which is no part of the text otherwise
            return text + stop_reason
        return (self._detokenizer() if self._skip else self._showing).decode(token_ids)

    @cached_property
    def _showing(self) -> Detokenizer:
        """Decodes with special tokens."""
        return Detokenizer(self._tokenizer, self._prompt_token_ids, skip_special_tokens=False)

    def _until(self, token_ids: list[int], text: str, length: int) -> str:
        """The first `length` characters of `text`, that of `token_ids`; with the special tokens before its end, if they
        are shown."""
        if self._skip:
            return text[:length]
        if length == len(text):
            return self._showing.decode(token_ids)
        # The shortest beginning whose text is longer, or all: finished texts only grow. What is too much of it is the
        # end of its last token, which is no special one.
        count = bisect_right(range(len(token_ids)), length, key=lambda count: len(self._plain(token_ids[:count])))
        begin = token_ids[:count]
        shown = finished(self._showing.decode(begin))
        return shown[: len(shown) - max(0, len(self._plain(begin)) - length)]

    def _plain(self, token_ids: list[int]) -> str:
        return finished(self._detokenizer().decode(token_ids))
