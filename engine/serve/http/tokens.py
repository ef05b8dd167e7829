"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictInt, StrictStr
from pydantic.config import JsonDict

from stars.arguments import shown
from stars.engine import Engine
from stars.errors import RequestError, TokenizerError
from stars.prompt import parse_prompt
from stars.serve.http.asked import message_of
from stars.serve.http.bodies import JsonRoute
from stars.serve.http.errors import ApiError
from stars.serve.http.extras import refuse_unknown
from stars.serve.http.models import check_name
from stars.serve.http.protocol import FIRST_ONLY, ChatMessage
from stars.serve.http.service import Service, service_of

router = APIRouter(tags=["tokens"], route_class=JsonRoute)
MOST = 1 << 20
"""Characters of a text, or ids, of one request: what any context holds, and a second of one core."""
OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools", "special_tokens")


class Asked(BaseModel):
    """What both have."""

    model: StrictStr | None = Field(None, description="A name of /v1/models; all have the same tokenizer")


def _either() -> JsonDict:
    """A text, or messages with what belongs to them; each null is as good as absent."""
    def absent(*names: str) -> dict[str, JsonValue]:
        return {name: {"type": "null"} for name in names}

    return {"additionalProperties": False, "oneOf": [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, **absent("messages", *OF_MESSAGES)}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, **absent("prompt")}}]}


class TokenizeRequest(Asked):
    """A text, or messages as the chat template renders them."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_either())  # `_engine` refuses others by name

    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], FIRST_ONLY, Field(min_length=1)] | None = None
    add_special_tokens: StrictBool | None = Field(
        None, description="Whether what the tokenizer puts around a text is there: true for a prompt unless told "
                          "otherwise, false for messages, whose template holds it")
    return_token_strs: StrictBool | None = False
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    special_tokens: Literal["parse", "text"] | None = Field(
        None, description='"text": control tokens in messages are the texts they are')


class TokenizeResponse(BaseModel):
    """The tokens."""

    count: int
    max_model_len: int = Field(description="Most tokens of a prompt and its response together")
    tokens: list[int]
    token_strs: list[str] | None = Field(None, description="As tokenizer.json writes them, where asked for")


class DetokenizeRequest(Asked):
    """Token ids."""

    model_config = ConfigDict(extra="allow")  # of names that nobody knows null is as good as absent

    tokens: Annotated[list[Annotated[StrictInt, Field(ge=0)]], FIRST_ONLY]


class DetokenizeResponse(BaseModel):
    """Their text, special tokens in it."""

    prompt: str


@router.post("/tokenize", response_model=TokenizeResponse)
async def tokenize(asked: TokenizeRequest, request: Request) -> TokenizeResponse:
    """The tokens of a text, or of messages. The engine is not asked, so that nobody waits for its rounds."""
    engine = _engine(asked, service_of(request))
    kinds = [name for name in ("prompt", "messages") if getattr(asked, name) is not None]
    if len(kinds) != 1:
        raise ApiError(400, 'give either "prompt", a text, or "messages"', param=kinds[0] if kinds else "prompt")
    [kind] = kinds
    _refuse_without_tokenizer(engine, kind)
    if kind == "prompt":
        beside = next((name for name in OF_MESSAGES if getattr(asked, name) is not None), None)
        if beside is not None:
            raise ApiError(400, f"{beside} belongs to messages: leave it out", param=beside)
    try:
        return await asyncio.to_thread(_tokens, engine, asked)
    except (RequestError, TokenizerError) as error:
        raise ApiError(400, str(error), param=kind) from error


@router.post("/detokenize", response_model=DetokenizeResponse)
async def detokenize(asked: DetokenizeRequest, request: Request) -> DetokenizeResponse:
    """The text of token ids."""
    engine = _engine(asked, service_of(request))
    _refuse_without_tokenizer(engine, "tokens")
    if len(asked.tokens) > MOST:
        raise ApiError(400, f"there are {len(asked.tokens)} tokens, the most is {MOST}: split them", param="tokens")
    vocabulary = engine.model_config.vocab_size
    wrong = next((token for token in asked.tokens if token >= vocabulary), None)
    if wrong is not None:
        raise ApiError(400, f"token id {shown(wrong)} is outside the model's vocabulary of {vocabulary}: use those of "
                       "/tokenize", param="tokens")
    try:
        return DetokenizeResponse(prompt=await asyncio.to_thread(
            engine.tokenizer.decode, asked.tokens, skip_special_tokens=False))
    except TokenizerError as error:
        raise ApiError(400, str(error), param="tokens") from error


def _engine(asked: Asked, service: Service) -> Engine:
    """The engine whose tokenizer reads what is asked; ApiError for names that nobody knows."""
    refuse_unknown(asked)
    if asked.model is not None:
        check_name(service, asked.model)
    return service.engine.engine


def _refuse_without_tokenizer(engine: Engine, param: str) -> None:
    if engine.tokenizer is None:
        raise ApiError(400, "the model has no tokenizer.json: start the server with one that has", param=param)


def _tokens(engine: Engine, asked: TokenizeRequest) -> TokenizeResponse:
    """In another thread: it may take a second."""
    tokenizer, special = engine.tokenizer, asked.add_special_tokens
    text = asked.prompt
    if text is not None:
        _refuse_long(len(text))
        token_ids = tokenizer.encode(text, add_special_tokens=special is not False)
    else:
        given = {name: getattr(asked, name) for name in OF_MESSAGES}
        given["messages"] = [message_of(number, message) for number, message in enumerate(asked.messages or ())]
        prompt = parse_prompt(given, tokenizer, engine.model_config.vocab_size)
        token_ids = prompt.token_ids
        if special:
            assert prompt.text is not None
            token_ids = tokenizer.encode(prompt.text)
    strings = [text or "" for text in tokenizer.tokens(token_ids)] if asked.return_token_strs else None
    return TokenizeResponse(count=len(token_ids), max_model_len=engine.config.max_model_len, tokens=token_ids,
                            token_strs=strings)


def _refuse_long(characters: int) -> None:
    if characters > MOST:
        raise RequestError(f"the text has {characters} characters, the most is {MOST}: split it")
