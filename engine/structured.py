"""StructuredOutputsParams: what texts a response may be at all. Names are vLLM's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stars.arguments import flag, known_by_name, shown
from stars.errors import RequestError, text_of
from stars.vllm_names import STRUCTURED

KINDS = ("json", "regex", "choice", "grammar", "json_object")


@known_by_name(STRUCTURED)
@dataclass(frozen=True)
class StructuredOutputsParams:
    """Exactly one of what a response must be; RequestError otherwise.

    json: a JSON schema: a dictionary, its text, or a class of pydantic's. regex: a regular expression without
    look-around and back-references, which the whole response matches. choice: one of these texts. grammar: a
    context-free grammar, in the dialect of Lark that llguidance reads, or in llama.cpp's. json_object: any JSON object.

    Needs llguidance (`pip install 'stars-engine[structured]'`), a tokenizer, and an EOS or stop token, which may be
    drawn where such a text may end. Tokens are drawn from the proposal restricted to those that a text of it may go on
    with, normalised. One that max_tokens or a stop string cuts may end in the middle. What nothing can match, or what
    never ends, is a RequestError where the request is made.
    """

    json: str | Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        if self.json_object is not None:
            wanted = flag("StructuredOutputsParams.json_object", self.json_object)
            object.__setattr__(self, "json_object", wanted or None)
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise RequestError(f"StructuredOutputsParams needs exactly one of {', '.join(KINDS)} and has "
                               f"{', '.join(given) if given else 'none'}")
        schema_of = getattr(self.json, "model_json_schema", None)
        if isinstance(self.json, type) and callable(schema_of):
            try:
                object.__setattr__(self, "json", schema_of())
            except Exception as error:  # pydantic's, of a class with a field that JSON has not
                raise RequestError(f"StructuredOutputsParams.json is {shown(self.json)}, which makes no JSON schema "
                                   f"({text_of(error)}): give one as a dictionary") from error
        if self.json is not None and not isinstance(self.json, (str, Mapping)):
            raise RequestError(f"StructuredOutputsParams.json is {shown(self.json)}, it must be a JSON schema: a "
                               "dictionary or its text")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise RequestError(f"StructuredOutputsParams.{name} is {shown(value)}, it must be a text")
        if self.choice is not None:
            is_list = isinstance(self.choice, Sequence) and not isinstance(self.choice, str)
            texts = tuple(self.choice) if is_list else ()
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise RequestError(f"StructuredOutputsParams.choice is {shown(self.choice)}, it must be a list of "
                                   "texts, none of them empty")
            object.__setattr__(self, "choice", texts)

    @classmethod
    def of(cls, given: Any) -> StructuredOutputsParams | None:
        """What a user gave: one of these, its fields in a dictionary, or None."""
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
            return cls(**given)
        raise RequestError(f"SamplingParams.structured_outputs is {shown(given)}, it must be a StructuredOutputsParams "
                           "or a dictionary of its fields")
