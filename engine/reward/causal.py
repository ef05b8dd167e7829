"""A causal reward model in a cache of its own: only new tokens are scored, rejected ones cost nothing to forget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from stars.arguments import shown
from stars.cache import PagedCache
from stars.config import EngineConfig
from stars.determinism import check_row_invariance
from stars.errors import RequestError, RewardError
from stars.kernels.types import Draft
from stars.model.decoder import Decoder
from stars.model.loader import load_model
from stars.model.tokenizer import Tokenizer, load_tokenizer
from stars.passes import Passes
from stars.prompt import Prompt
from stars.reward.base import Candidate, Reward, Scored, TrailingCandidate, check_path
from stars.reward.framing import Framing
from stars.reward.scoring import Scoring, TrailingScores
from stars.reward.session import Handle, Session, Sessions
from stars.sizes import reward_model

REENCODE_SLACK = 64  # tokens a re-encoded response may run longer than the LM's, before pages are taken for it


class CausalReward(Reward):
    """A sequence-classification model with one label: the raw logit at the last token, head in float32.

    model: HF directory, or a Decoder with a reward head. template: "chat" renders prompt and response with the RM's
    chat template (a plain prompt becomes one user turn), "raw" puts the response right after the prompt, "auto" is
    "chat" for messages and "raw" for text. close: what is scored after every response and then dropped: "none",
    "template" (what the chat template puts after an assistant turn), "eos".

    With the LM's vocabulary token ids are passed through; with another one the response is decoded, the whole text
    is encoded again, and the cache is kept up to the longest common prefix. Ids that spell a stop string are scored
    where ids are passed through and cut off where text is.

    A response that is encoded again may take more tokens than the model's context has. Where segments are scored, one
    that does so after its first segment ends there with finish_reason "length", as at the end of a context. Elsewhere
    the request ends with an error: in a first segment, and where a finished response is scored, by Sample(score=True)
    and BestOfN.
    """

    exclusive = True

    def __init__(self, model: Any, *, tokenizer: Any = None, template: Literal["auto", "chat", "raw"] = "auto",
                 close: Literal["none", "template", "eos"] = "none",
                 chat_template_kwargs: dict[str, Any] | None = None):
        if not hasattr(model, "forward"):
            check_path("CausalReward", model)
        if tokenizer is not None and not callable(getattr(tokenizer, "encode", None)):
            raise RewardError(f"CausalReward.tokenizer is {shown(tokenizer)}, it must be a stars tokenizer, as of "
                              "stars.model.tokenizer.load_tokenizer(DIR)")
        if template not in ("auto", "chat", "raw"):
            raise RewardError(f'CausalReward.template is {template!r}, it must be "auto", "chat" or "raw"')
        if close not in ("none", "template", "eos"):
            raise RewardError(f'CausalReward.close is {close!r}, it must be "none", "template" or "eos"')
        self.model = model
        self.template = template
        self.close_policy = close
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.tokenizer = tokenizer

    def bind(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> None:
        """Loads the model, compares vocabularies, allocates the cache."""
        if hasattr(self.model, "forward"):
            self.decoder: Decoder = self.model
        else:
            self.decoder = load_model(self.model, dtype=config.dtype, device=config.device, head="reward",
                                      deterministic=config.deterministic, max_model_len=1)
            if self.tokenizer is None:
                self.tokenizer = load_tokenizer(self.model)
        self.decoder.check_device(config.device, "the reward model")
        self.locks = (self.decoder.lock,)
        if config.deterministic:
            check_row_invariance(self.decoder, config.target)
        self.target = config.target
        shape = self.decoder.config
        self.deterministic = config.deterministic
        if tokenizer is not None and self.tokenizer is not None:
            self.same_vocabulary = tokenizer.same_vocabulary(self.tokenizer)
        elif tokenizer is None and self.tokenizer is None:
            self.same_vocabulary = True  # as far as anybody knows
        else:
            side = "reward model" if self.tokenizer is None else "model"
            raise RewardError(f"the {side} has no tokenizer.json, so its vocabulary cannot be compared with the "
                              "other's: add the tokenizer to both directories or to neither")
        if self.same_vocabulary and shape.vocab_size < vocab_size and self.tokenizer is None:
            raise RewardError(f"the reward model's vocabulary of {shape.vocab_size} does not match the model's of "
                              f"{vocab_size}: use a reward model of the same vocabulary, or give both a tokenizer")
        self.framing = Framing(self.tokenizer, self.same_vocabulary, shape, self.template, self.close_policy,
                               self.chat_template_kwargs)
        self.needs_text = not self.same_vocabulary
        self.max_model_len = shape.context_length
        sizes = reward_model(shape, config)
        self.cache = PagedCache(shape, config, sizes, self.decoder.dtype)
        with self.decoder.lock:  # another engine may be at work with it
            self._passes = Passes(self.decoder, self.cache, config, sizes)
        self._sessions = Sessions(self.cache, self._passes, self.max_model_len,
                                  0 if self.same_vocabulary else REENCODE_SLACK)
        self._scoring = Scoring(self.framing, self._sessions, self.cache, self._passes, self.max_model_len)

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Refuses a prompt whose response could not fit the RM's context or its cache."""
        frame = self.framing.frame(prompt)
        if not frame.prefix:
            raise RequestError("the prompt is empty for the reward model: give at least one character that is no "
                               "special token")
        outside = self.framing.outside(frame.prefix + frame.closing)
        if outside is not None:
            raise RequestError(outside)
        needed = len(frame.prefix) + max_tokens + len(frame.closing)
        if needed > self.max_model_len:
            raise RequestError(f"prompt and max_tokens make {needed} tokens for the reward model, whose context is "
                               f"{self.max_model_len}: shorten the prompt or lower max_tokens")
        capacity, tokens = self._sessions.capacity(frame, max_tokens), self.cache.num_pages * self.cache.page_size
        if capacity > tokens:
            raise RequestError(f"prompt and max_tokens need {capacity} tokens of the reward model's cache, which has "
                               f"{tokens}: raise cache_tokens")

    def can_open(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether the prompt's pages are free."""
        return self._sessions.can_open(self.framing.frame(prompt))

    def open(self, prompt: Prompt, max_tokens: int) -> Session:
        """Reserves pages for the prompt."""
        return self._sessions.open(self.framing.frame(prompt))

    def fork(self, session: Session) -> Session:
        """The same history, in the same pages as long as neither writes."""
        return self._sessions.fork(session)

    def reserve(self, session: Session, tokens: int) -> bool:
        """Pages for so many tokens more, and some for a response that re-encodes to more."""
        return self._sessions.reserve(session, tokens)

    def start(self, sessions: list[Session]) -> None:
        """Prefills the prompts, all but their last tokens, and offers their pages for sharing."""
        self._sessions.start(sessions)

    def resume(self, session: Session, token_ids: list[int], text: str | None) -> None:
        """Writes the response into the session's pages, all but its last token; in deterministic mode as it was scored
        and committed, so that every key has the bits that it had."""
        if self.deterministic:
            [scored] = self.score([Candidate(session, token_ids, text)])
            if isinstance(scored.reward, RewardError):
                raise scored.reward
            self.commit([(session, scored.handle)])
            return
        ids, content = self.framing.ids(session.frame, token_ids, text)
        self._sessions.make_room(session, content - 1)
        self._sessions.write(session, ids, content - 1)

    def reset(self) -> None:
        """Empties the cache."""
        self.cache.reset()

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """As many candidates as fill one pass over the weights."""
        return max(1, math.ceil(self.target.ridge_rows / max(1, tokens * responses)))

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """One ragged forward over the new tokens of all candidates."""
        return self._scoring.score(candidates)

    def score_trailing(self, draft: Draft, candidates: Sequence[TrailingCandidate]) -> TrailingScores | None:
        """A pass that trails the draft, where the LM's ids are passed through and all fit a slab and a pass."""
        return self._scoring.score_trailing(draft, candidates)

    def commit(self, winners: list[tuple[Session, Handle]]) -> None:
        """The winners' slabs go into pages, up to the end of the response."""
        self._sessions.commit(winners)

    def discard(self, handle: Handle | None) -> None:
        """Frees the slab."""
        self._sessions.discard(handle)

    def close(self, session: Session) -> None:
        """Drops the response's pages."""
        self._sessions.close(session)

    def check_integrity(self) -> None:
        """The cache's books."""
        self.cache.check_integrity()
