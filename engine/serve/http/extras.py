"""What clients send that changes nothing here, what the engine has not, and what nobody knows: refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from stars.arguments import Absent, asks_for_nothing, closest, shown
from stars.policies import POLICIES, parameters_of
from stars.serve.http.errors import ApiError
from stars.serve.http.protocol import ChatCompletionRequest, CompletionRequest, Guidance, Sampled
from stars.vllm_names import SAMPLING

_TEXT_ONLY = "models here read and write text only, leave it out"
_SEVERAL = 'give "stars": {"policy": "best-of-n", "n": …}, which returns the response of the highest reward'
_IN_TEMPLATE = "give it in chat_template_kwargs"

WITHOUT_EFFECT = frozenset(("metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
                            "parallel_tool_calls", "include_reasoning", "spaces_between_special_tokens"))
"""OpenAI's and vLLM's parameters that ask for nothing that would change an answer of this engine."""

ABSENT: dict[str, Absent] = {
    **SAMPLING,
    "best_of": Absent((1,), _SEVERAL),
    "use_beam_search": Absent((False,), 'leave it out, or give "stars": {"policy": "segment-beam"}'),
    "num_beams": Absent((1,), 'leave it out, or give "stars": {"policy": "segment-beam"}'),
    "logits_processors": Absent(([],), "leave it out, or judge whole segments with a reward"),
    "stream_interval": Absent((1,), "there is one event for each segment, whose size is the policy's"),
    "store": Absent((False,), "nothing is stored, leave it out"),
    "service_tier": Absent(("auto", "default"), "all requests are served alike, leave it out or give priority"),
    "modalities": Absent((["text"],), _TEXT_ONLY),
    "audio": Absent((), _TEXT_ONLY),
    "mm_processor_kwargs": Absent(({},), _TEXT_ONLY),
    "prediction": Absent((), "nothing is predicted, leave it out"),
    "web_search_options": Absent((), "there is no search, leave it out"),
    "functions": Absent(([],), "give tools"),
    "function_call": Absent(("none", "auto"), "give tools"),
    "reasoning_effort": Absent(("none",), _IN_TEMPLATE),
    "verbosity": Absent(("medium",), "say it in a message"),
    "documents": Absent(([],), _IN_TEMPLATE),
    "chat_template": Absent((), "the template is read from the model directory, put it there"),
    "suffix": Absent(("",), "texts are gone on with at their end only, leave it out"),
    "prompt_embeds": Absent((), "give prompt, a text or token ids"),
    "prompt_token_ids": Absent((), "give the token ids as prompt"),
    "request_id": Absent((), "send it as the header X-Request-Id"),
    "lora_request": Absent((), "an adapter is a model of its own, start a server with it"),
    "timeout": Absent((), 'give "stars": {"budget": {"seconds": …}}'),
    "attempt_logprobs": Absent((False,), 'give "stars": {"return_segments": true}, which has the log-probability of '
                               "each candidate"),
    "add_special_tokens": Absent((False,), "a chat template has them, leave it out"),
    "cache_salt": Absent((), "all requests share one prefix cache, start a server for each who must not see what "
                         "others ask"),
    "return_tokens_as_token_ids": Absent((False,), "give return_token_ids, which puts them beside the texts"),
    "detokenize": Absent((True,), "give return_token_ids"),
    "output_kind": Absent((), "give stream"),
    "kv_transfer_params": Absent(({},), "leave it out"),
    "vllm_xargs": Absent(({},), "leave it out"),
}
"""Parameters that others have and this server has not."""

GUIDANCE = frozenset((*Guidance.model_fields, *(name for policy in POLICIES for name in parameters_of(policy))))
"""What belongs into `stars`."""


def refuse(body: Sampled) -> None:
    """ApiError 400 for the first parameter that `body` has and its address has not, unless it asks for nothing."""
    known = type(body).model_fields
    for name, value in (body.model_extra or {}).items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        absent = ABSENT.get(name)
        if absent is None:
            raise ApiError(400, f"there is no parameter {shown(name)}: {_advice(name, known, body)}", name)
        if not asks_for_nothing(value, absent.neutral):
            raise ApiError(400, f"{name} is {shown(value)}, which is not implemented: {absent.advice}", name)


def refuse_unknown(body: BaseModel) -> None:
    """ApiError 400 for the first parameter of `body` that nobody knows, at addresses that have no others."""
    for name, value in (body.model_extra or {}).items():
        if value is not None:
            raise ApiError(400, f"there is no parameter {shown(name)}: {closest(name, type(body).model_fields)}", name)


def refuse_within(name: str, extra: Mapping[str, Any] | None, known: Iterable[str]) -> None:
    """The same of an object that is the parameter `name`."""
    for key, value in (extra or {}).items():
        if value is not None:
            raise ApiError(400, f"{name} has no {shown(key)}: {closest(key, known)}", f"{name}.{key}")


def _advice(name: str, known: Iterable[str], body: Sampled) -> str:
    if name in GUIDANCE and name not in [one.replace("_", "") for one in known]:  # `topk` is some policy's
        return f'give "stars": {{"{name}": …}}'
    other, address = ((CompletionRequest, "/v1/completions") if isinstance(body, ChatCompletionRequest)
                      else (ChatCompletionRequest, "/v1/chat/completions"))
    if name in other.model_fields:
        return f"{address} has it"
    return closest(name, known)
