"""The client loop for vLLM: n candidates of each prefix, which both engines find in their caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stars.adapters.loop import Response
from stars.adapters.openai_client import OpenAIProposer
from stars.errors import ServerError
from stars.plan import Policy

PREFIX_TOKENS, LEAST_PREFIX = 2048, 64
"""Tokens of prompts after which a server that finds none in its cache is said to have none, where prompts have so many
in the mean: a cache of blocks finds nothing of those that are shorter than one, nor is it needed for them."""


def vllm_client(base_url: str, model: str | None = None, *, policy: Policy, reward: Any = None, tokenizer: Any = None,
                api_key: str | None = None, headers: Mapping[str, str] | None = None,
                extra_body: Mapping[str, Any] | None = None, priority: bool = False, max_num_seqs: int = 64,
                max_model_len: int = 4096, timeout: float = 120.0, retries: int = 3, total_timeout: float = 600.0,
                device: str = "cpu", cache_tokens: int | None = None) -> VLLMClient:
    """What completes prompts by a vLLM server: as `openai`, by token ids in both directions.

    reward: as the Engine's, or a reward model that another vLLM serves as a pooling engine: stars.RemoteReward(url).
    priority: requests of responses that began first come first, for servers with --scheduling-policy priority: each
        round is a request of its own, which would else wait behind whoever came meanwhile.
    The other arguments are those of `openai`.

    ServerError, besides, where the server tells no token ids, and where it says that it found nothing in its cache
    though it should have: it was started without prefix caching.
    """
    return VLLMClient(
        "stars.adapters.vllm_client", base_url, model, policy=policy, reward=reward, tokenizer=tokenizer,
        api_key=api_key, headers=headers, extra_body=extra_body, parallel=False, max_num_seqs=max_num_seqs,
        max_model_len=max_model_len, timeout=timeout, retries=retries, total_timeout=total_timeout, device=device,
        cache_tokens=cache_tokens, needs_ids=True, priority=priority)


class VLLMClient(OpenAIProposer):
    """See `vllm_client`."""

    def _run(self, requests: Any) -> Iterator[list[Response]]:
        for changed in super()._run(requests):
            traffic = self.traffic
            if traffic.cached_tokens == 0 and traffic.prompt_tokens > max(
                    PREFIX_TOKENS, LEAST_PREFIX * traffic.requests):
                raise ServerError(f"the server at {self.server.address} found none of {traffic.prompt_tokens} prompt "
                                  "tokens in its cache, so that it reads every prompt again in every round: start it "
                                  "with --enable-prefix-caching, and with a --block-size that prompts are longer than")
            yield changed
