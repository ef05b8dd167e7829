"""What a language model says of a response: the log-probability of each of its tokens, read in a cache of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from stars.arguments import shown
from stars.cache import BlockTable, CommitMove, PagedCache
from stars.config import EngineConfig
from stars.determinism import check_row_invariance
from stars.errors import OutOfPages, RewardError
from stars.kernels.quant import Rounded
from stars.kernels.types import Draft
from stars.logit_reads import read_bytes
from stars.model.config import ModelConfig, load_config
from stars.model.decoder import Decoder
from stars.model.loaded import LoadedModel, own_tokenizer
from stars.model.loader import load_model
from stars.model.tokenizer import Tokenizer
from stars.passes import Passes, Span
from stars.prompt import Prompt
from stars.reward.base import Candidate, Held, Progress, Scored, rounding_of
from stars.reward.framing import Frame, Framing
from stars.reward.scoring import SlabReward
from stars.reward.session import Session, outside
from stars.sizes import padded_rows, reward_model, slab_length

LAG = 1
"""The last token of a text lies in no page, whatever the target says: its row is the one that the next token is read
at, and is run with it."""


class TextSession(Session):
    """As `Session`; `ids` are the text, `committed` all of it but the last token, `logprobs` of its response tokens."""

    __slots__ = ("ids", "logprobs")

    def __init__(self, table: BlockTable, frame: Frame, ids: list[int], logprobs: list[float]):
        super().__init__(table, frame, ids[:-1])
        self.ids = ids  # never changed, only replaced; so is the other
        self.logprobs = logprobs

    def become(self, ids: list[int], logprobs: list[float]) -> None:
        """The text is this one now, whose pages are written."""
        self.ids, self.committed, self.logprobs = ids, ids[:-1], logprobs


class TextHandle(NamedTuple):
    """A scored candidate: `ids` from `first` on, but the last, lie in a slab. Where it has none and there are any, it
    was too long, and is read again."""

    ids: list[int]
    logprobs: list[float]  # of all response tokens among them
    first: int
    slab: int | None


class TextPlan(NamedTuple):
    """What is run of a candidate: the rows of `ids` from `first` on, at each of which a token of `targets` is read."""

    session: TextSession
    ids: list[int]
    first: int
    targets: list[int]  # the tokens behind those rows, and what ended the response


class LogprobReward(SlabReward):
    """log p(response | prompt) of a language model, raw: at temperature 1, without filters, without penalties.

    model: a directory, or a Decoder with a language model head, of the engine's vocabulary; it reads the same ids.
    name: what it is called in errors. `Scored.per_token` has the log-probabilities of a candidate's new tokens. The EOS
    or stop token that ended a response counts.

    At the row of each token the one after it is read. Rows of the response so far lie in pages, but for its last
    token's, by which a candidate's first one is read; a candidate's last token need not be run. What a slab does not
    hold is run into pages, in chunks: a finished response's into its session's, a candidate's into a fork of those.
    """

    exclusive = True
    whole_text = None

    def __init__(self, model: Any, name: str, quantization: str | None = "auto"):
        self.model, self.name, self.quantization = model, name, quantization

    def holds(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> Held:
        """The model, a slab for a segment, and what logits are read with."""
        shape = self.model.config if hasattr(self.model, "forward") else load_config(self.model)
        self._check_vocabulary(tokenizer, vocab_size, shape)
        slab_len = slab_length(config, False, LAG)
        rows = padded_rows(config, reward_model(shape, config, slab_len))
        return Held(self.model, slab_len, read_bytes(shape, rows), head="lm", quantization=self._rounding(config))

    def _rounding(self, config: EngineConfig) -> Rounded | None:
        return rounding_of(self.model, self.quantization, "lm", "auto", config)

    def bind(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> None:
        """Loads the model, compares vocabularies, allocates the cache."""
        if hasattr(self.model, "forward"):
            self.decoder: Decoder = self.model
        else:
            self._check_vocabulary(tokenizer, vocab_size, load_config(self.model))
            self.decoder = load_model(self.model, dtype=config.dtype, device=config.device, head="lm",
                                      deterministic=config.deterministic, max_rows=1, max_model_len=1,
                                      quantization=self._rounding(config))
            if isinstance(self.model, LoadedModel):
                self.model = self.decoder  # what was copied of the one given is not kept alive twice
        shape = self.decoder.config
        self._check_vocabulary(tokenizer, vocab_size, shape)
        if self.decoder.head is None:
            raise RewardError(f"the {self.name} is a Decoder without a language model head: load it with head='lm'")
        self.decoder.check_device(config.device, f"the {self.name}")
        self.locks = (self.decoder.lock,)
        if config.deterministic:
            check_row_invariance(self.decoder, config.target)
        self.target = config.target._replace(reward_lag=LAG)
        self.deterministic = config.deterministic
        self.framing = Framing(None, True, shape, "raw", "none", {})
        self.max_model_len, self.vocab_size, self.slack = shape.context_length, shape.vocab_size, 0
        sizes = reward_model(shape, config, slab_length(config, False, LAG))
        self.cache = PagedCache(shape, config, sizes, self.decoder.dtype)
        with self.decoder.lock:  # another engine may be at work with it
            self._passes = Passes(self.decoder, self.cache, config, sizes)
            self._passes.logit_reads()

    def warm_up(self, draft: Draft) -> None:
        """Captures every shape of a pass."""
        with self.decoder.lock:
            self._passes.warm_up(logprobs=True)

    def _check_vocabulary(self, tokenizer: Tokenizer | None, vocab_size: int, shape: ModelConfig) -> None:
        """RewardError for a model of other tokens than the engine's; without both tokenizers their number says it."""
        own = own_tokenizer(self.model)
        if own is not None and tokenizer is not None:
            if not tokenizer.same_vocabulary(own):
                raise RewardError(f"the {self.name}, {shown(str(self.model))}, has another vocabulary than the model "
                                  "whose tokens it is to read: use one that was trained from the same base")
            if shape.vocab_size < min(vocab_size, tokenizer.vocab_size):  # more are but padding
                raise RewardError(f"the {self.name}, {shown(str(self.model))}, has {shape.vocab_size} rows of logits "
                                  f"and its tokenizer {tokenizer.vocab_size} tokens: save the model again with a row "
                                  "for each")
        elif shape.vocab_size != vocab_size:
            raise RewardError(f"the {self.name} has a vocabulary of {shape.vocab_size} and the model one of "
                              f"{vocab_size}: use models of one vocabulary")

    def open(self, prompt: Prompt, max_tokens: int) -> TextSession:
        """Takes the prompt's pages; raises OutOfPages."""
        frame = self.framing.frame(prompt)
        return TextSession(self.cache.open(self._history(frame)), frame, list(frame.prefix), [])

    def fork(self, session: Session) -> TextSession:
        """A second session with the same history, in the same pages as long as neither writes."""
        assert isinstance(session, TextSession)
        return TextSession(self.cache.fork(session.table), session.frame, session.ids, session.logprobs)

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """All candidates of a token, which one row reads; otherwise as many as fill a pass."""
        return 1 << 30 if tokens <= 1 and not self.target.padded else super().lanes_per_pass(tokens, responses)

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """One ragged forward over the new tokens of all candidates, but for those that no slab holds."""
        results: list[Scored | None] = [None] * len(candidates)
        plans: dict[int, TextPlan] = {}
        places: dict[int, int] = {}  # of the sessions among them
        for index, candidate in enumerate(candidates):
            plan = _plan(candidate)
            most = max(plan.targets, default=0)
            if most >= self.vocab_size:
                results[index] = Scored(RewardError(outside([most], self.vocab_size)))
            elif not plan.targets:
                results[index] = _scored(plan, [], None)
            elif len(plan.targets) > self.cache.slab_len:
                results[index] = self._score_long(plan, candidate.final)
            else:
                plans[index] = plan
                places.setdefault(id(plan.session), index)
        if plans:
            # What is read at one row, the last token's, is read at it together: all that is enumerated for a response.
            together: dict[tuple[int, int, int], list[int]] = {}
            for index, plan in plans.items():
                alone = len(plan.targets) > 1 or self.target.padded  # where idle rows cost as much
                together.setdefault((id(plan.session), plan.first, index if alone else -1), []).append(index)
            # Spans of one table are made adjacent, so that its pages are read once for all of them.
            groups = sorted(together.values(), key=lambda group: places[id(plans[group[0]].session)])
            slabs = [self.cache.take_slab(len(group)) for group in groups]
            spans = [self._span(plans[group[0]].session.table, plans[group[0]], slab)
                     for group, slab in zip(groups, slabs, strict=True)]
            found = self._passes.logprobs(spans, [[token for index in group for token in plans[index].targets]
                                                  for group in groups])
            for group, slab, logprobs in zip(groups, slabs, found, strict=True):
                size = len(logprobs) // len(group)
                for place, index in enumerate(group):
                    scored = _scored(plans[index], logprobs[place * size : (place + 1) * size], slab)
                    results[index] = scored._replace(tokens_run=0) if place else scored
        return [result for result in results if result is not None]

    def _score_long(self, plan: TextPlan, final: bool) -> Scored:
        """By way of pages: the session's own where nothing else continues it, else those of a fork."""
        session = plan.session
        holder = session if final else self.fork(session)
        slab = None
        try:
            self._take_up(holder, plan.ids)
            logprobs = holder.logprobs[plan.first + LAG - len(session.frame.prefix) :]
            if len(logprobs) < len(plan.targets):  # what ended the response is read at its last token
                slab, last = self.cache.take_slab(), len(plan.ids) - 1
                end = plan._replace(first=last, targets=plan.targets[-1:])
                logprobs = logprobs + self._passes.logprobs([self._span(holder.table, end, slab)], [end.targets])[0]
        except OutOfPages as error:
            if holder is not session:
                self.close(holder)
                holder = session
            return Scored(self._no_room(len(plan.ids), error))
        finally:
            if slab is not None:
                self.cache.return_slab(slab)
            if holder is not session:
                self.close(holder)
        return _scored(plan, logprobs, None)

    def resume(self, session: Session, token_ids: list[int], text: str | None) -> None:
        """Writes the response into the session's pages; in deterministic mode as it was scored and committed, so that
        every key has the bits that it had."""
        self.resume_in_chunks(session, token_ids, text, None)

    def resume_in_chunks(self, session: Session, token_ids: list[int], text: str | None,
                         max_rows: int | None) -> Progress:
        """As `resume`, in whole chunks; in deterministic mode all of what is missing, or nothing."""
        assert isinstance(session, TextSession)
        plan = _plan(Candidate(session, token_ids, None))
        if self.deterministic and plan.targets:
            if max_rows is not None and len(plan.targets) > max_rows:
                return Progress(0, 0)
            [scored] = self.score([Candidate(session, token_ids, None)])
            if isinstance(scored.reward, RewardError):
                raise scored.reward
            self.commit([(session, scored.handle)])
            return Progress(1, len(plan.targets))
        rows = self._take_up(session, plan.ids, max_rows)
        return Progress(int(len(session.ids) == len(plan.ids)), rows)

    def commit(self, winners: list[tuple[Session, Any]]) -> None:
        """The winners' slabs go into pages, up to the last token. Raises OutOfPages for a fork that nothing was
        reserved for."""
        for session, handle in winners:
            self._make_room(session, len(handle.ids) - LAG)
        moves, slabs = [], []
        for session, (ids, logprobs, first, slab) in winners:
            assert isinstance(session, TextSession)
            if slab is None:  # nothing new, or too long
                self._take_up(session, ids)
                continue
            moves.append(CommitMove(session.table, slab * self.cache.slab_len, len(ids) - LAG - first, first))
            slabs.append(slab)
            session.become(ids, logprobs)
        if moves:
            self.cache.commit(moves)
            for slab in slabs:
                self.cache.return_slab(slab)

    def _span_of(self, handle: TextHandle) -> tuple[int, int]:
        return handle.first, len(handle.ids) - LAG

    def _take_up(self, session: TextSession, ids: list[int], max_rows: int | None = None) -> int:
        """ids into the session's pages, which then end before the last of them, or, after at most `max_rows` rows,
        before; returns the rows run."""
        first = _common(session, ids) - LAG
        self.cache.truncate(session.table, first)
        self._make_room(session, len(ids) - LAG)
        rows, logprobs = self._passes.read_logprobs(session.table, ids, len(ids) - LAG, max_rows)
        known = session.logprobs[: first + LAG - len(session.frame.prefix)]
        session.become(ids[: session.table.length + LAG], known + logprobs)
        return rows

    def _span(self, table: BlockTable, plan: TextPlan, slab: int) -> Span:
        begin, rows = slab * self.cache.slab_len, len(plan.targets)
        return Span(table, plan.ids[plan.first : plan.first + rows], plan.first, range(begin, begin + rows))


def _common(session: TextSession, ids: list[int]) -> int:
    """How many tokens of `ids` are those of the session, from the first on: the prompt's at least."""
    known, least = session.ids, len(session.frame.prefix)
    stop = min(len(ids), len(known))
    if ids[least:stop] == known[least:stop]:
        return stop
    return next(place for place in range(least, stop) if ids[place] != known[place])


def _plan(candidate: Candidate) -> TextPlan:
    """What is run for a candidate."""
    session: TextSession = candidate.session
    ids = session.frame.prefix + candidate.token_ids
    common = _common(session, ids)
    ending = [] if candidate.stopped is None else [candidate.stopped]
    return TextPlan(session, ids, common - LAG, ids[common:] + ending)


def _scored(plan: TextPlan, logprobs: Sequence[float], slab: int | None) -> Scored:
    """logprobs: of the plan's targets."""
    session, prefix = plan.session, len(plan.session.frame.prefix)
    known = session.logprobs[: plan.first + LAG - prefix]
    total = math.fsum([*known, *logprobs])
    # What ended the response is no part of it.
    handle = TextHandle(plan.ids, [*known, *logprobs][: len(plan.ids) - prefix], plan.first, slab)
    run = len(plan.targets)
    return Scored(total, run, plan.first + run, handle, logprobs)
