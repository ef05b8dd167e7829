"""What clients may send to the addresses of the reward model: vLLM's shapes, as pydantic's models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict

from stars.arguments import asks_for_nothing, closest, shown
from stars.serve.http.asked import message_of
from stars.serve.http.errors import ApiError
from stars.serve.http.extras import ABSENT
from stars.serve.http.protocol import FIRST_ONLY, MAX_PROMPTS, ChatMessage, are_ids

_TEXT: JsonDict = {"type": "string"}
_IDS: JsonDict = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Texts = Annotated[Any, WithJsonSchema({"anyOf": [
    _TEXT, _IDS, *({"type": "array", "items": of, "minItems": 1, "maxItems": MAX_PROMPTS} for of in (_TEXT, _IDS))]})]
"""A text, several, the token ids of one, or of several."""
Messages = Annotated[list[ChatMessage], FIRST_ONLY, Field(min_length=2)]
WITHOUT_EFFECT = frozenset(("user", "request_id", "priority", "padding", "cache_salt", "embed_dtype", "endianness"))
"""vLLM's parameters that ask for nothing that would change an answer of this server."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "truncate_prompt_tokens": (), "truncation_side": (), "add_generation_prompt": (False,),
    "continue_final_message": (False,), "chat_template": (), "dimensions": (), "instruction": (),
    "mm_processor_kwargs": ({},), "media_io_kwargs": ({},)}
"""Those that this server has not, with the values that ask for nothing."""
ADVICE = {"truncate_prompt_tokens": "send shorter texts", "truncation_side": "send shorter texts",
          "dimensions": "there is one number for a text, leave it out"}
WAYS = {"text_1": "text_2", "queries": "documents", "data_1": "data_2"}
"""How /score may be given what is to be scored, by the names that vLLM has had for it."""


def _one_of(*ways: tuple[str, ...]) -> JsonDict:
    """Which fields must be there."""
    return {"additionalProperties": False, "oneOf": [{"required": list(names)} for names in ways]}


class OfReward(BaseModel):
    """What all of them take."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = Field(None, description="a served name; the default otherwise")
    use_activation: bool | None = Field(None, description="false: the reward as the engine has it; else a probability, "
                                        "the sigmoid of a reward that is none")


class ScoreRequest(OfReward):
    """Responses to be scored: text_2 to text_1, one for all or one for each; or conversations, of which the last
    message, an assistant's, is scored. queries and documents, and data_1 and data_2, are other names of the two."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=_one_of(
        *WAYS.items(), ("queries", "items"), ("messages",)))

    text_1: Texts | None = Field(None, description="the prompt, or one for each response")
    text_2: Texts | None = Field(None, description="the response, or several")
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    messages: Messages | Annotated[list[Messages], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ClassifyRequest(OfReward):
    """Texts that nobody has divided into prompt and response, or one conversation, whose last message is scored."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=_one_of(("input",), ("messages",)))

    input: Texts | None = Field(None, description="a text, or several, or token ids")
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="whether the tokenizer's special tokens are put around "
                                            "texts: true unless there are messages")
    chat_template_kwargs: dict[str, Any] | None = None


class PoolingRequest(ClassifyRequest):
    """The same, with the answer in another shape."""

    task: Literal["classify", "token_classify"] | None = Field(
        None, description='"token_classify": a list for each token that has a reward, which is the last alone')
    encoding_format: Literal["float", "base64"] | None = None


def refuse_unknown(body: BaseModel) -> None:
    """ApiError 400 for the first parameter that the address has not, unless it asks for nothing."""
    for name, value in (body.model_extra or {}).items():
        neutral = NEUTRAL.get(name)
        if value is None or name in WITHOUT_EFFECT or neutral is not None and asks_for_nothing(value, neutral):
            continue
        if neutral is None:
            raise ApiError(400, f"there is no parameter {shown(name)}: {closest(name, type(body).model_fields)}", name)
        advice = ADVICE.get(name) or (ABSENT[name].advice if name in ABSENT else "leave it out")
        raise ApiError(400, f"{name} is {shown(value)}, which is not implemented: {advice}", name)


def texts_of(name: str, given: Any) -> list[Any]:
    """The texts or lists of token ids of a parameter; ApiError for what is none."""
    if isinstance(given, str) or given and are_ids(given):
        return [given]
    if isinstance(given, list) and given:
        if len(given) > MAX_PROMPTS:
            raise ApiError(400, f"{name} has {len(given)} texts, the most is {MAX_PROMPTS}: split the request", name)
        wrong = next((index for index, one in enumerate(given) if not isinstance(one, str) and not are_ids(one)), None)
        if wrong is None:
            return given
        raise ApiError(400, f"{name}[{wrong}] is {shown(given[wrong])}, it must be a text or a list of token ids", name)
    raise ApiError(400, f"{name} is {shown(given)}, it must be a text, a list of token ids, or a list of those", name)


def messages_of(name: str, messages: list[ChatMessage], variables: dict[str, Any] | None) -> dict[str, Any]:
    """A conversation as the engine's `score` takes it."""
    if messages[-1].role != "assistant":
        raise ApiError(400, f"the last of {name} is of the role {shown(messages[-1].role)}, it must be the assistant's "
                       "turn that is to be scored", "messages")
    return {"messages": [message_of(number, message) for number, message in enumerate(messages)],
            "chat_template_kwargs": variables}
