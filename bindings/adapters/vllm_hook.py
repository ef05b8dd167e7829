"""Whether this vLLM, and what was configured of it, is one that the scheduler was tried with; and its reward."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from stars.adapters.scoring import Scoring
from stars.arguments import integer, known_keywords
from stars.errors import StarsError, describe
from stars.model.location import located
from stars.model.tokenizer import load_tokenizer

TRIED = ("0.32.0",)
ANY_VERSION = "STARS_VLLM_ANY_VERSION"
REWARD = "STARS_VLLM_REWARD"
_ATTRIBUTE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def check_version(version: str) -> None:
    """Raises StarsError where this vLLM was not tried and STARS_VLLM_ANY_VERSION=1 is not set.

    The scheduler rests on insides of vLLM that are nobody's promise; another version may rewind to other tokens.
    """
    if version.partition("+")[0] not in TRIED and os.environ.get(ANY_VERSION) != "1":
        raise StarsError(f"stars.adapters.vllm_scheduler was tried with vLLM {' and '.join(TRIED)} and this is "
                         f"{version}: install one of those, or set {ANY_VERSION}=1 to try it at your own risk")


def check_setting(scheduler: Any) -> None:
    """Raises StarsError, which says what to change, where this engine is set up in a way that cannot rewind.

    scheduler: vLLM's, whose own constructor has run.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config = scheduler.vllm_config
    groups = scheduler.kv_cache_config.kv_cache_groups
    faults = {
        "asynchronous scheduling draws tokens ahead of the verdict: start vLLM with --no-async-scheduling":
            config.scheduler_config.async_scheduling,
        "model runner V2 has no way to take tokens back: set VLLM_USE_V2_MODEL_RUNNER=0":
            scheduler.use_v2_model_runner,
        "speculative decoding has rewinds of its own: start vLLM without --speculative-config":
            config.speculative_config is not None,
        "pipeline parallelism runs several steps at once: start vLLM with --pipeline-parallel-size 1": scheduler.use_pp,
        "KV and encoder connectors may send away what is taken back later: start vLLM without them":
            scheduler.connector is not None or scheduler.ec_connector is not None,
        "sampling masks and auxiliary outputs of withheld tokens cannot be taken back: start vLLM without them":
            scheduler.return_sampling_mask or scheduler.aux_output_connector is not None,
        "this model keeps a window or a state instead of all keys and values, which cannot be rewound: serve one with "
        "full attention": len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec),
        "this model does not decode token by token: serve a decoder":
            scheduler.is_encoder_decoder or scheduler.num_sampled_tokens_per_step != 1,
    }
    for sentence, holds in faults.items():
        if holds:
            raise StarsError(f"stars.adapters.vllm_scheduler cannot work here, as {sentence}")


def unsupported(request: Any) -> str | None:
    """Why vLLM's `request` cannot be aligned, in a sentence; None where it can."""
    params = request.sampling_params
    if params is None:
        return "a pooling request has no response that could be aligned"
    faults = {
        "prompt_logprobs come with a token that is withheld: leave them out":
            params.prompt_logprobs is not None or getattr(params, "prompt_token_id_logprobs", None) is not None,
        "min_tokens is counted by a worker that knows no rewind: leave it out": bool(params.min_tokens),
        "thinking_token_budget is counted by a worker that knows no rewind: leave it out":
            getattr(params, "thinking_token_budget", None) is not None,
        "the state of a grammar cannot be taken back: leave structured outputs out":
            request.structured_output_request is not None,
        "a session whose prompt goes on cannot be rewound: send whole prompts": request.resumable,
        "the reward reads token ids: give a prompt of text or ids alone":
            bool(request.mm_features) or request.prompt_token_ids is None or request.prompt_is_token_ids is not None,
    }
    return next((sentence for sentence, holds in faults.items() if holds), None)


class Judge(NamedTuple):
    """The reward of this process, and the most tokens of an attempt that it has room for."""

    scoring: Scoring
    max_segment_size: int


def open_judge(vllm_config: Any) -> Judge:
    """The reward that vLLM's --additional-config names, or else STARS_VLLM_REWARD; on the CPU unless told otherwise.

    Of --additional-config the keys that begin with "stars_": reward, a model directory or a name of the hub, as
    `stars.Engine(reward=…)` takes it, or "module:attribute" of a Reward or of a callable fn(prompt, responses) in
    texts; max_segment_size and cache_tokens, of its caches; device. StarsError where there is none, or what it raises.
    """
    additional = vllm_config.additional_config
    given = {name.removeprefix("stars_"): value for name, value in additional.items() if name.startswith("stars_")
             } if isinstance(additional, dict) else {}
    return _judge(vllm_config, **known_keywords("--additional-config stars_…", given, _judge, {}))


def _judge(vllm_config: Any, reward: str | None = None, max_segment_size: int = 64, cache_tokens: int | None = None,
           device: str = "cpu") -> Judge:
    max_segment_size = integer("stars_max_segment_size", max_segment_size, 1)
    named = reward or os.environ.get(REWARD)
    if not isinstance(named, str) or not named:
        raise StarsError("stars.adapters.vllm_scheduler has no reward: start vLLM with --additional-config "
                         f'\'{{"stars_reward": "DIRECTORY or module:attribute"}}\', or set {REWARD}')
    found = _imported(named)
    model, sequences = vllm_config.model_config, vllm_config.scheduler_config.max_num_seqs
    directory = None if model.skip_tokenizer_init else located(model.tokenizer)
    # A response has at most its latest attempt in the reward's slabs, and the best of those before.
    tokenizer = None if directory is None else load_tokenizer(directory)
    scoring = Scoring(found, tokenizer, model.get_vocab_size(), max_model_len=model.max_model_len,
                      segment_size=max_segment_size, max_num_seqs=sequences, max_num_lanes=2 * sequences, device=device,
                      cache_tokens=cache_tokens)
    return Judge(scoring, max_segment_size)


def _imported(named: str) -> Any:
    if _ATTRIBUTE.fullmatch(named) is None or Path(named).exists():
        return named
    module, _, attribute = named.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise StarsError(f"the reward {named} cannot be imported ({describe(error)}): give module:attribute of a "
                         "module that vLLM's process can import") from error
    return found
