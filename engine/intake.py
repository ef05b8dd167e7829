"""What a user asked for becomes a request, or one sentence says why it never can."""

from __future__ import annotations

import dataclasses
import secrets
import time
from typing import Any, NamedTuple

from stars.arguments import integer, refuse_bare_prompt, shown
from stars.budget import Budget
from stars.cache import OWN_STORE
from stars.config import EngineConfig
from stars.draft import MAX_STOP_IDS
from stars.edits import NOTHING_LEFT, TokenEdits, edits_of, names_of
from stars.errors import RequestError
from stars.filtered_ratio import check_prompted
from stars.grammar import Grammar, Grammars
from stars.kernels.philox import MAX_SAMPLE, MAX_SEGMENT
from stars.model.config import ModelConfig
from stars.models import Models
from stars.plan import Plan, Policy, Prompted, Ratio, plan_of
from stars.policies import Sample
from stars.prompt import Prompt, after, last_tokens, parse_prompt
from stars.readers import Readers
from stars.request import Drafts, Reader, Request
from stars.reward.base import Reward
from stars.sampling import SamplingParams
from stars.scheduler import Scheduler
from stars.score_call import PairParser
from stars.stops import stop_tokens
from stars.structured import StructuredOutputsParams

MAX_PRIORITY = (1 << 31) - 1
MAX_USER = 256  # characters


class Asked(NamedTuple):
    """One prompt and all that was said of it, as it was typed."""

    prompt: Any
    params: SamplingParams | None = None
    policy: Policy | None = None
    budget: Budget | None = None
    priority: int = 0
    user: str | None = None
    trace_context: Any = None  # of the span that its own belongs to
    arrived: float | None = None  # by the monotonic clock; None: now
    grammar: Grammar | None = None  # of the parameters' structured_outputs, once it is compiled


class Needs(NamedTuple):
    """What a plan is run with, of what an engine has."""

    proposal: Drafts
    stores: tuple[int, ...]  # of all models that responses are read by
    redrafts: Drafts
    reader: Reader | None


class Intake:
    """Checks what is asked of one engine, before anything is queued."""

    def __init__(self, config: EngineConfig, shape: ModelConfig, tokenizer: Any, reward: Reward | None, models: Models,
                 readers: Readers, scheduler: Scheduler):
        self._config = config
        self._tokenizer = tokenizer
        self._vocab_size = shape.vocab_size
        self._eos_token_ids = _all_eos(shape, tokenizer)
        self._reward = reward
        self._models = models
        self._readers = readers
        self._scheduler = scheduler
        self._names: dict[int, str] = {}  # of tokens, as log-probabilities have them: no more than the vocabulary
        self._grammars = Grammars(tokenizer, shape.vocab_size, self._eos_token_ids)

    def parse(self, asked: Asked, request_id: str) -> Request:
        """A checked request that is not queued yet; RequestError or RewardError if it can never run as it stands."""
        arrived = time.monotonic() if asked.arrived is None else asked.arrived
        given, params, policy = asked.prompt, asked.params, asked.policy
        params = params if params is not None else SamplingParams()
        policy = policy if policy is not None else Sample()
        if not isinstance(params, SamplingParams):
            raise RequestError(no_params(params))
        budget, priority = Budget.of(asked.budget), integer("priority", asked.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if asked.user is not None and not (isinstance(asked.user, str) and len(asked.user) <= MAX_USER):
            raise RequestError(f"user is {shown(asked.user)}, it must be a text of at most {MAX_USER} characters")
        refuse_bare_prompt(given)
        plan = plan_of(policy)
        proposal, stores, redrafts, reader = self.needs_of(policy, plan)
        if params.prompt_logprobs is not None:  # the engine's own model reads the prompt, whoever drafts
            stores = tuple(sorted({*stores, *OWN_STORE}))
        reads = plan.score.reads
        if isinstance(plan.propose, Prompted):
            check_prompted(type(policy).__name__, plan, params, self._config)
        shaping = names_of(params) if isinstance(reads, Ratio) and not reads.filtered else ()
        if shaping:
            raise RequestError(f"{type(policy).__name__} compares the probabilities of two models, and penalties, "
                               f"biases and bans would be in one of them: leave {', '.join(shaping)} out")
        population = plan.lanes.population
        if params.n * population > MAX_SAMPLE + 1:
            raise RequestError(f"n times the policy's candidates is {params.n * population}, the most is "
                               f"{MAX_SAMPLE + 1}: split the request")
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer, which the model lacks: use stop_token_ids")
        eos = () if params.ignore_eos else self._eos_token_ids
        named = stop_tokens(self._tokenizer, params.stop or (), self._vocab_size)
        stop_ids = tuple(dict.fromkeys((*eos, *(params.stop_token_ids or ()), *named)))
        if len(stop_ids) > MAX_STOP_IDS:
            raise RequestError(f"there are {len(stop_ids)} EOS and stop token ids, the most is {MAX_STOP_IDS}: "
                               "give fewer")
        vocab_size = self._vocab_size
        prompt = parse_prompt(given, self._tokenizer, vocab_size)
        if params.truncate_prompt_tokens is not None:
            prompt = self._cut(plan, prompt, params.truncate_prompt_tokens, params)
        contexts = self._contexts(plan, prompt)
        longest = max(contexts, key=lambda name: len(contexts[name]))
        length = len(contexts[longest])
        params = params.settle(length, self._config.max_model_len, vocab_size)
        max_tokens = params.max_tokens
        assert max_tokens is not None  # `settle` made it a number
        needed = length + max_tokens
        if needed > self._config.max_model_len:
            raise RequestError(f"the {longest} of {length} tokens and max_tokens="
                               f"{shown(max_tokens)} make {shown(needed)}, the limit is "
                               f"{self._config.max_model_len} ({self._config.max_model_len_from}): "
                               "shorten the prompt or lower max_tokens")
        least = 1 if plan.drawn_after else plan.segment.least
        if max_tokens > least * (MAX_SEGMENT + 1):
            raise RequestError(f"max_tokens={max_tokens} makes more than {MAX_SEGMENT + 1} segments of "
                               f"{least} tokens: use longer segments or fewer tokens")
        if self._reward is not None and plan.score.when != "never":
            self._reward.check(prompt, max_tokens)
        self._scheduler.check(type(policy).__name__, plan, prompt, max_tokens, list(contexts.values()))
        for drafts in (proposal, redrafts):
            self._models.drafter(drafts.stores, drafts.blends)  # which there may be no memory for
        edits = edits_of(params, self._tokenizer, (*stop_ids, *self._eos_token_ids), vocab_size)
        grammar = self._grammar_of(asked, params, stop_ids, edits)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return Request(request_id, prompt, params, policy, plan, seed, stop_ids, tuple(eos), self._tokenizer, named,
                       proposal=proposal, redrafts=redrafts, stores=stores, reader=reader,
                       contexts=tuple(contexts.values()), budget=budget, priority=priority, user=asked.user,
                       arrived=arrived, edits=edits, trace_context=asked.trace_context, names=self._names,
                       grammar=grammar)

    def needs_of(self, policy: Policy, plan: Plan) -> Needs:
        """What requests of a policy are run with; RequestError where this engine lacks it. Nothing is run or allocated:
        any thread may ask, in anybody's turn."""
        if plan.score.when != "never" and self._reward is None:
            raise RequestError(f"{type(policy).__name__} needs a reward: build the engine with Engine(model, "
                               "reward=...)")
        proposal, stores = self._models.proposal_of(plan), self._models.stores_of(plan)
        redrafts = self._models.drafts_of(((plan.redrafts_with, 1.0),))
        reader = self._readers.reader_of(plan)
        if plan.segment.draft > self._config.max_segment_size:
            raise RequestError(f"a segment may have {plan.segment.draft} tokens and the engine's slabs hold "
                               f"{self._config.max_segment_size}: ask for fewer, or build it with a larger "
                               "max_segment_size")
        return Needs(proposal, stores, redrafts, reader)

    def pair_parser(self, reward: Reward) -> PairParser:
        """What reads responses that `reward` is to score by themselves."""
        return PairParser(self._tokenizer, self._vocab_size, self._eos_token_ids, reward)

    def compiled(self, asked: Asked) -> Asked:
        """`asked` with its grammar, if it has one: RequestError where that is none. It may take seconds, which nobody
        else is to wait for: it is called before the turn, by any thread."""
        wanted = _wanted(asked)
        if wanted is None:
            return asked
        arrived = time.monotonic() if asked.arrived is None else asked.arrived
        return asked._replace(grammar=self._grammars.of(wanted), arrived=arrived)

    def without_grammar(self, asked: Asked) -> Asked | None:
        """`asked` as it is but for its grammar, if `compiled` has something to compile; else None."""
        wanted = _wanted(asked)
        if wanted is None or self._grammars.known(wanted) is not None:
            return None
        assert asked.params is not None
        return asked._replace(params=dataclasses.replace(asked.params, structured_outputs=None))

    def _contexts(self, plan: Plan, prompt: Prompt) -> dict[str, list[int]]:
        """What the language model reads responses after, by what it is called."""
        if not isinstance(plan.propose, Prompted):
            return {"prompt": prompt.token_ids}
        return {f"prompt with the {name} text before it": after(text, prompt, self._tokenizer, self._vocab_size)
                for name, text in (("draft", plan.propose.draft), ("judge", plan.propose.judge))}

    def _cut(self, plan: Plan, prompt: Prompt, most: int, params: SamplingParams) -> Prompt:
        """`prompt` with its last `most` tokens, or, where that is -1, as many as fit beside max_tokens."""
        limit = self._config.max_model_len
        if most > limit:
            raise RequestError(f"SamplingParams.truncate_prompt_tokens is {shown(most)} and the limit of prompt and "
                               f"response {limit}: give fewer, or -1 for as many as fit")
        if most > 0:
            return last_tokens(prompt, most, self._tokenizer)
        room = limit - (params.max_tokens if params.max_tokens is not None else max(1, params.min_tokens))
        if room < 1:
            raise RequestError(f"max_tokens={shown(params.max_tokens or params.min_tokens)} leaves no token of the "
                               f"prompt, the limit is {limit}: lower it")
        prompt = last_tokens(prompt, room, self._tokenizer)
        over = max(map(len, self._contexts(plan, prompt).values())) - room  # by texts that are put before it
        return last_tokens(prompt, max(1, len(prompt.token_ids) - over), self._tokenizer) if over > 0 else prompt

    def _grammar_of(self, asked: Asked, params: SamplingParams, stop_ids: tuple[int, ...], edits: TokenEdits | None,
                    ) -> Grammar | None:
        """What `params` say that responses must be; RequestError where none can be so, or end."""
        wanted = params.structured_outputs
        if wanted is None:
            return None
        assert isinstance(wanted, StructuredOutputsParams)  # `SamplingParams` made it one
        grammar = asked.grammar if asked.grammar is not None else self._grammars.of(wanted)
        if not stop_ids:
            raise RequestError("structured_outputs needs a token that ends the response, and ignore_eos leaves none: "
                               "leave ignore_eos out, or give stop_token_ids")
        allowed = grammar.first(stop_ids)
        if edits is not None and edits.mask is not None and not (allowed & edits.mask).any():
            raise RequestError(f"at the first token {NOTHING_LEFT}")
        return grammar


def _wanted(asked: Asked) -> StructuredOutputsParams | None:
    """What a grammar is to be compiled of, before anything of `asked` was checked."""
    wanted = asked.params.structured_outputs if isinstance(asked.params, SamplingParams) else None
    return wanted if isinstance(wanted, StructuredOutputsParams) and asked.grammar is None else None


def _all_eos(config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The EOS ids that the model's files name and the tokenizer's own, as far as the model has them: configurations
    copied from a larger one name ids that can never be drawn."""
    own = getattr(tokenizer, "eos_token_id", None)
    named = config.eos_token_ids if own is None else (*config.eos_token_ids, own)
    return tuple(dict.fromkeys(token for token in named if token < config.vocab_size))


def no_params(given: Any) -> str:
    """What is said of what should be a SamplingParams."""
    return f"sampling_params is {type(given).__name__}, it must be a stars.SamplingParams"
