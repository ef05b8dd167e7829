"""A causal reward model in a cache of its own: only new tokens are scored, rejected ones cost nothing to forget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from stars.arguments import shown
from stars.cache import BlockTable, CommitMove, PagedCache
from stars.determinism import check_row_invariance
from stars.detokenizer import REPLACEMENT
from stars.errors import OutOfPages, RequestError, RewardError
from stars.kernels.types import Draft
from stars.model.config import ModelConfig
from stars.model.loader import load_model
from stars.model.tokenizer import load_tokenizer
from stars.passes import MOST_CLOSING, Passes, Span, Verdict
from stars.prompt import Prompt
from stars.reward.base import Candidate, ContextFull, Limits, Reward, Scored, TrailingCandidate, check_path

RIDGE_ROWS = {"cpu": 32, "cuda": 128}
"""Rows from which on a pass over the weights is bound by arithmetic rather than by reading them. On the CPU measured;
on a GPU computed (an H100 has 295 operations for each byte it reads, a row of bfloat16 weights needs one, and products
reach about half of the first at these sizes), not measured."""
LONG = -1
REENCODE_SLACK = 64  # tokens a re-encoded response may run longer than the LM's, before pages are grown


def slab_length(max_segment_size: int) -> int:
    """Tokens of a reward model's slab: a segment may re-encode to more tokens, and closing tokens come behind it."""
    return 2 * max_segment_size + 32


def longest_text(config: ModelConfig, cache_tokens: int, slab_len: int) -> int:
    """Tokens of the longest text that a reward model is ever run on: its context's, or what cache and slab hold."""
    return min(config.context_length, cache_tokens + slab_len)


class CausalReward(Reward):
    """A sequence-classification model with one label: the raw logit at the last token, head in float32.

    model: HF directory, or a Decoder with a reward head. template: "chat" renders prompt and response with the RM's
    chat template (a plain prompt becomes one user turn), "raw" puts the response right behind the prompt, "auto" is
    "chat" for messages and "raw" for text. close: what is scored behind every response and then dropped: "none",
    "template" (what the chat template puts behind an assistant turn), "eos".

    With the LM's vocabulary token ids are passed through; with another one the response is decoded, the whole text
    is encoded again, and the cache is kept up to the longest common prefix. Ids that spell a stop string are scored
    where ids are passed through and cut off where text is.

    A response that is encoded again may take more tokens than the model's context has. Where segments are scored, one
    that does so behind its first segment ends there with finish_reason "length", as at the end of a context. Elsewhere
    the request ends with an error: in a first segment, and where a finished response is scored, by Sample(score=True)
    and BestOfN.
    """

    exclusive = True

    def __init__(self, model, *, tokenizer=None, template: Literal["auto", "chat", "raw"] = "auto",
                 close: Literal["none", "template", "eos"] = "none", chat_template_kwargs: dict | None = None):
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
        self.decoder = None
        self.cache: PagedCache | None = None
        self.same_vocabulary = True

    def bind(self, tokenizer, vocab_size: int, limits: Limits) -> None:
        """Loads the model, compares vocabularies, allocates the cache."""
        if hasattr(self.model, "forward"):
            self.decoder = self.model
        else:
            self.decoder = load_model(self.model, dtype=limits.dtype, device=limits.device, head="reward",
                                      deterministic=limits.deterministic, max_model_len=1)
            if self.tokenizer is None:
                self.tokenizer = load_tokenizer(self.model)
        self.decoder.check_device(limits.device, "the reward model")
        self.locks = (self.decoder.lock,)
        if limits.deterministic:
            check_row_invariance(self.decoder)
        config = self.decoder.config
        self.lm_tokenizer = tokenizer
        if tokenizer is not None and self.tokenizer is not None:
            self.same_vocabulary = tokenizer.same_vocabulary(self.tokenizer)
        elif tokenizer is None and self.tokenizer is None:
            self.same_vocabulary = True
        else:
            side = "reward model" if self.tokenizer is None else "model"
            raise RewardError(f"the {side} has no tokenizer.json, so its vocabulary cannot be compared with the "
                              "other's: add the tokenizer to both directories or to neither")
        if self.same_vocabulary and config.vocab_size < vocab_size and self.tokenizer is None:
            raise RewardError(f"the reward model's vocabulary of {config.vocab_size} does not match the model's of "
                              f"{vocab_size}: use a reward model of the same vocabulary, or give both a tokenizer")
        if self.close_policy == "template" and (self.tokenizer is None or not self.tokenizer.has_chat_template):
            raise RewardError('close="template" needs a chat template, which the reward model does not have: '
                              'use close="none" or "eos"')
        self._eos = config.eos_token_ids[:1] if config.eos_token_ids else ()
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            self._eos = (self.tokenizer.eos_token_id,)
        if self.close_policy == "eos" and not self._eos:
            raise RewardError('close="eos" needs an EOS token, which the reward model does not name: use close="none"')
        self.needs_text = not self.same_vocabulary
        self._framed: tuple[Prompt, _Frame] | None = None
        self.max_model_len = config.context_length
        self.cache = PagedCache(
            config.num_layers, config.num_kv_heads, config.head_dim, page_size=limits.page_size,
            num_pages=math.ceil(limits.cache_tokens / limits.page_size),
            num_slabs=limits.max_num_lanes + limits.max_num_seqs, slab_len=slab_length(limits.max_segment_size),
            dtype=self.decoder.dtype, device=limits.device)
        longest = longest_text(config, self.cache.num_pages * limits.page_size, self.cache.slab_len)
        with self.decoder.lock:  # another engine may be at work with it
            self._passes = Passes(self.decoder, self.cache, limits.max_num_lanes, longest, limits.padded,
                                  limits.deterministic, limits.prefill_backend)

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Refuses a prompt whose response could not fit the RM's context or its cache."""
        prefix, _, _, closing = self._frame(prompt)
        if not prefix:
            raise RequestError("the prompt is empty for the reward model: give at least one character that is no "
                               "special token")
        outside = self.outside(prefix + closing)
        if outside is not None:
            raise RequestError(outside)
        needed = len(prefix) + max_tokens + len(closing)
        if needed > self.max_model_len:
            raise RequestError(f"prompt and max_tokens make {needed} tokens for the reward model, whose context is "
                               f"{self.max_model_len}: shorten the prompt or lower max_tokens")
        if self._capacity(prefix, max_tokens) > self.cache.num_pages * self.cache.page_size:
            raise RequestError(f"prompt and max_tokens need {self._capacity(prefix, max_tokens)} tokens of the reward "
                               f"model's cache, which has {self.cache.num_pages * self.cache.page_size}: raise "
                               "cache_tokens")

    def can_open(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether the pages for this response are free."""
        prefix = self._frame(prompt).prefix
        return self.cache.can_open(prefix[:-1], self._capacity(prefix, max_tokens))

    def open(self, prompt: Prompt, max_tokens: int) -> _Session:
        """Reserves pages for the whole response."""
        frame = self._frame(prompt)
        # The last prompt token is left to the slab, so that every score has a row to read, r(prompt) too.
        history = frame.prefix[:-1]
        return _Session(self.cache.open(history, self._capacity(frame.prefix, max_tokens)), *frame, history)

    def start(self, sessions: list[_Session]) -> None:
        """Prefills the prompts, all but their last tokens, and offers their pages for sharing."""
        self._passes.prefill([(session.table, session.committed, len(session.committed)) for session in sessions])
        for session in sessions:
            self.cache.publish(session.table, session.committed)

    def resume(self, session: _Session, token_ids: list[int], text: str | None) -> None:
        """Writes the response into the session's pages, all but its last token."""
        ids, content = self._ids(Candidate(session, token_ids, text))
        self._reserve(session, content)
        valid = min(_common(ids, session.committed, session.table.length), content - 1)
        self._advance(session, ids, valid, content - 1)

    def fork(self, session: _Session) -> _Session:
        """Shares the pages of the text so far."""
        table = self.cache.fork(session.table, session.table.capacity)
        return _Session(table, session.prefix, session.text, session.special, session.closing, list(session.committed))

    def reset(self) -> None:
        """Empties the cache."""
        self.cache.reset()

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """As many candidates as fill one pass over the weights."""
        return max(1, math.ceil(RIDGE_ROWS[self.cache.device.type] / max(1, tokens * responses)))

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """One ragged forward over the new tokens of all candidates."""
        results: list[Scored | None] = [None] * len(candidates)
        short: list[tuple[int, _Handle, int]] = []
        for index, candidate in enumerate(candidates):
            session = candidate.session
            ids, content = self._ids(candidate)
            outside = self.outside(ids)
            if outside is not None:
                results[index] = Scored(RewardError(outside))
                continue
            if len(ids) > self.max_model_len:
                results[index] = Scored(ContextFull(f"the response re-encodes to {len(ids)} tokens for the reward "
                                                    f"model, whose context is {self.max_model_len}: lower max_tokens"))
                continue
            try:
                self._reserve(session, content)
            except OutOfPages as error:
                results[index] = Scored(self._no_room(content, error))
                continue
            valid = min(_common(ids, session.committed, session.table.length), len(ids) - 1)
            new = len(ids) - valid
            if candidate.final:
                valid = self._advance(session, ids, valid, content - 1)
            if len(ids) - valid > self.cache.slab_len:
                results[index] = self._score_long(session, ids, content)
            else:
                short.append((index, _Handle(session, self.cache.take_slab(), valid, content, ids), new))
        # Spans of one table are made adjacent, so that its pages are read once for all of them.
        first = {}
        for index, handle, _ in short:
            first.setdefault(id(handle.session), index)
        short.sort(key=lambda entry: first[id(entry[1].session)])
        verdicts = self._passes.score([self._span(handle)
                                       for index, handle, _ in short]) if short else []
        for (index, handle, new), verdict in zip(short, verdicts, strict=True):
            results[index] = _scored(verdict, new, handle)
        return results

    def score_trailing(self, draft: Draft, candidates: Sequence[TrailingCandidate]) -> _Trailing | None:
        """A pass that trails the draft, where the LM's ids are passed through and all fit a slab and a pass."""
        rows = [1 + candidate.max_tokens + len(candidate.session.closing) for candidate in candidates]
        if not self.same_vocabulary or max(rows) > self.cache.slab_len or not self._passes.fits(rows) or any(
                len(candidate.session.closing) > MOST_CLOSING for candidate in candidates):
            return None
        slabs = [self.cache.take_slab() for _ in candidates]
        spans = []
        for candidate, slab, count in zip(candidates, slabs, rows, strict=True):
            session, start = candidate.session, slab * self.cache.slab_len
            # The pages hold all of the response but its last token.
            ids = [(candidate.token_ids or session.prefix)[-1]] + [0] * (count - 1)
            spans.append(Span(session.table, ids, session.table.length, range(start, start + count), start,
                              candidate.lane, session.closing))
        self._passes.score_trailing(draft, spans)
        return _Trailing(self, self._passes, candidates, slabs)

    def commit(self, winners: list[tuple[_Session, _Handle]]) -> None:
        """The winners' slabs go into pages up to the end of the response; the closing tokens are dropped."""
        moves = []
        for session, handle in winners:
            keep = handle.content - 1  # the last content token stays out: the next score starts with it
            if handle.slab == LONG:
                valid = min(_common(handle.ids, session.committed, session.table.length), keep)
                self.cache.truncate(session.table, valid)
                self._advance(session, handle.ids, valid, keep)
            else:
                moves.append((session, handle, max(0, keep - handle.valid)))
            session.committed = handle.ids[:keep]
        if moves:
            slab_len = self.cache.slab_len
            self.cache.commit([CommitMove(session.table, handle.slab * slab_len, count,
                                          min(handle.valid, handle.content - 1))
                               for session, handle, count in moves])
            for _, handle, _ in moves:
                self.cache.return_slab(handle.slab)

    def discard(self, handle: _Handle | None) -> None:
        """Frees the slab."""
        if handle is not None and handle.slab != LONG:
            self.cache.return_slab(handle.slab)

    def close(self, session: _Session) -> None:
        """Drops the response's pages."""
        self.cache.close(session.table)

    def check_integrity(self) -> None:
        """The cache's books."""
        self.cache.check_integrity()

    def _capacity(self, prefix: list[int], max_tokens: int) -> int:
        slack = 0 if self.same_vocabulary else REENCODE_SLACK
        return min(len(prefix) + max_tokens + slack, self.max_model_len)

    def _reserve(self, session: _Session, content: int) -> None:
        """Room for a response that re-encodes to more tokens than were reserved; raises OutOfPages."""
        if content > session.table.capacity:
            self.cache.grow(session.table, min(content + REENCODE_SLACK, self.max_model_len))

    def outside(self, ids: list[int]) -> str | None:
        """Why `ids` cannot be scored: a tokenizer may know more tokens than the model."""
        size = self.decoder.config.vocab_size
        if max(ids) < size:
            return None
        return f"token id {max(ids)} is outside the reward model's vocabulary of {size}: use the tokenizer it came with"

    def _frame(self, prompt: Prompt) -> _Frame:
        """How the RM reads this prompt and what stands around its responses; the newest prompt's is kept.

        A request is checked, asked for room at every step it waits and opened once a sample, always with one prompt.
        """
        if self._framed is None or self._framed[0] is not prompt:
            self._framed = prompt, self._new_frame(prompt)
        return self._framed[1]

    def _new_frame(self, prompt: Prompt) -> _Frame:
        messages = prompt.given if isinstance(prompt.given, list) else None
        chat = self.template == "chat" or (self.template == "auto" and messages is not None)
        closing: list[int] = list(self._eos) if self.close_policy == "eos" else []
        if chat:
            if self.tokenizer is None or not self.tokenizer.has_chat_template:
                raise RequestError("the reward model has no chat template: give the prompt as text, or build "
                                   'CausalReward with template="raw"')
            if messages is None:
                if prompt.text is None:
                    raise RequestError("these prompt ids cannot be decoded for the reward model's chat template: give "
                                       'the prompt as text, or use template="raw"')
                messages = [{"role": "user", "content": prompt.text}]
            prefix_text, closing_text = self.tokenizer.split_template(messages, **self.chat_template_kwargs)
            ids = self.tokenizer.encode(prefix_text, add_special_tokens=False)
            if self.close_policy == "template":
                closing = self.tokenizer.encode(closing_text, add_special_tokens=False)
            return _Frame(ids, prefix_text, False, closing)
        if self.close_policy == "template":
            raise RequestError('close="template" needs a chat prompt: give {"messages": [...]}, or use '
                               'template="chat"')
        if self.same_vocabulary:
            return _Frame(prompt.token_ids, None, False, closing)
        if prompt.text is None:
            raise RequestError("these prompt ids cannot be decoded for the reward model's vocabulary: give the prompt "
                               "as text")
        special = messages is None  # a rendered template holds its special tokens
        return _Frame(self.tokenizer.encode(prompt.text, add_special_tokens=special), prompt.text, special, closing)

    def _ids(self, candidate: Candidate) -> tuple[list[int], int]:
        """(RM ids of prompt, response and closing; how many of them are not closing)."""
        session = candidate.session
        if self.same_vocabulary:
            content = session.prefix + candidate.token_ids
        elif candidate.text:
            # A character cut in two at the segment's end would be scored as a replacement sign: leave it out.
            text = session.text + candidate.text.rstrip(REPLACEMENT)
            content = self.tokenizer.encode(text, add_special_tokens=session.special)
        else:
            content = session.prefix
        return content + session.closing, len(content)

    def _span(self, handle: _Handle) -> Span:
        start = handle.slab * self.cache.slab_len
        new = handle.ids[handle.valid:]
        return Span(handle.session.table, new, handle.valid, range(start, start + len(new)), start)

    def _advance(self, session: _Session, ids: list[int], valid: int, stop: int) -> int:
        """Writes ids[valid:stop] into the session's own pages; the number of valid positions afterwards."""
        if stop <= valid:
            return valid
        self.cache.truncate(session.table, valid)
        self._passes.prefill([(session.table, ids, stop)])
        session.committed = ids[:stop]
        return stop

    def _score_long(self, session: _Session, ids: list[int], content: int) -> Scored:
        """A candidate longer than a slab: pages for as long as it is scored, filled in chunks; shared with the prompt
        where they can be. If it wins it is read again."""
        try:
            table = self.cache.open(ids[:-1], len(ids))
        except OutOfPages as error:
            return Scored(self._no_room(len(ids), error))
        run = len(ids) - table.length
        self._passes.prefill([(table, ids, len(ids) - 1)])
        slab = self.cache.take_slab()
        start = slab * self.cache.slab_len
        [verdict] = self._passes.score([Span(table, ids[-1:], len(ids) - 1, [start], start)])
        self.cache.return_slab(slab)
        self.cache.close(table)
        return _scored(verdict, run, _Handle(session, LONG, 0, content, ids))

    def _no_room(self, tokens: int, error: OutOfPages) -> RewardError:
        """Why a response cannot be scored; raised where others hold pages, so that it is tried again by itself."""
        problem = RewardError(f"the response re-encodes to {tokens} tokens for the reward model and {error}")
        if self.cache.num_tables > 1:
            raise problem from error
        return problem


class _Trailing:
    """Scores that trail their draft: `stars.reward.base.Trailing`."""

    def __init__(self, reward: CausalReward, passes: Passes, candidates: Sequence[TrailingCandidate],
                 slabs: list[int]):
        self._reward, self._passes, self._candidates, self._slabs = reward, passes, candidates, slabs

    def results(self, token_ids: Sequence[list[int]]) -> list[Scored]:
        """Waits for the pass; the same results as `CausalReward.score` gives."""
        results = []
        verdicts = self._passes.verdicts(len(self._candidates))
        for candidate, response, slab, verdict in zip(self._candidates, token_ids, self._slabs, verdicts, strict=True):
            session, valid = candidate.session, candidate.session.table.length
            ids = session.prefix + response + session.closing
            handle = _Handle(session, slab, valid, len(ids) - len(session.closing), ids)
            outside = self._reward.outside(ids)
            if outside is not None:
                verdict = verdict._replace(reward=RewardError(outside))
            results.append(_scored(verdict, len(ids) - valid, handle))
        return results


class _Frame(NamedTuple):
    prefix: list[int]  # RM ids of the prompt
    text: str | None  # the prompt's text where responses are re-encoded
    special: bool  # whether that text is encoded with special tokens around it
    closing: list[int]  # ids behind every response


class _Session:
    """One response: its pages hold `committed`, which is everything but the last token of the text so far."""

    __slots__ = ("table", "prefix", "text", "special", "closing", "committed")

    def __init__(self, table: BlockTable, prefix: list[int], text: str | None, special: bool, closing: list[int],
                 committed: list[int]):
        self.table = table
        self.prefix, self.text, self.special, self.closing = prefix, text, special, closing  # as in _Frame
        self.committed = committed  # ids whose keys and values are in the pages


class _Handle(NamedTuple):
    session: Any
    slab: int  # LONG for a candidate longer than one
    valid: int  # tokens taken from the session's pages
    content: int  # ids without the closing
    ids: list[int]


def _scored(verdict: Verdict, run: int, handle: _Handle) -> Scored:
    return Scored(verdict.reward, run, len(handle.ids), handle)


def _common(ids: list[int], committed: list[int], length: int) -> int:
    """Length of the longest common prefix of ids and committed[:length]."""
    most = min(len(ids), length)
    if ids[:most] == committed[:most]:
        return most
    return next(i for i in range(most) if ids[i] != committed[i])
