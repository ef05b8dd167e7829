"""The contract between the loop and whatever scores candidates."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Literal, NamedTuple, Protocol, get_args

from stars.arguments import integer, shown
from stars.config import EngineConfig
from stars.errors import RequestError, RewardError, describe
from stars.kernels.quant import Rounded
from stars.kernels.types import Draft
from stars.model.loaded import READABLE
from stars.model.loader import check_rounding, followed
from stars.model.tokenizer import Tokenizer
from stars.prompt import Prompt

Later = Future[float | RewardError]
"""A reward that another thread settles, by a float or by a RewardError, and never by an exception."""


class ContextFull(RewardError):
    """A candidate that is too long for the reward model to read: its response ends before it, as at max_tokens."""


class Candidate(NamedTuple):
    """What is scored: always the whole response so far, never a single segment."""

    session: Any
    token_ids: list[int]  # response with this candidate, without the EOS that ended it
    text: str | None  # its text without a stop string; None unless the reward set `needs_text`
    final: bool = False  # the finished response, which nothing competes with: its session may be written at once
    ended: bool = False  # whether the response ends with it; said where its text is
    stopped: int | None = None  # the EOS or stop token that ended it, which token_ids lack


class Scored(NamedTuple):
    """The score of one candidate, in the order asked."""

    reward: float | RewardError | Later  # an error ends that candidate's request only
    tokens_run: int = 0  # tokens the reward model processed for it
    tokens_full: int = 0  # tokens a score from scratch would process
    handle: Any = None  # kept until commit or discard
    per_token: Sequence[float] = ()  # scores of the candidate's new tokens, where the reward has them


class Progress(NamedTuple):
    """How far a reward has come with what it was asked to read."""

    done: int  # of what was asked, the first ones
    rows: int  # that its model ran for it


class TrailingCandidate(NamedTuple):
    """A candidate that is still being drafted."""

    session: Any
    token_ids: list[int]  # the response without it
    lane: int  # of the draft
    max_tokens: int  # it will have no more


class Trailing(Protocol):
    """The scoring of trailing candidates, prepared."""

    def launch(self) -> None:
        """Starts it, once, when the whole draft was launched."""

    def results(self, token_ids: Sequence[list[int]]) -> list[Scored]:
        """The scores, once they are there; token_ids are each candidate's as in `Candidate`."""


class Ahead(Protocol):
    """The scoring of candidates that the host knows, prepared."""

    def launch(self) -> None:
        """Starts it, once, behind what was started before, whose results may still be to be taken: of one lot at most.
        """

    def results(self) -> list[Scored]:
        """The scores, once they are there: what `score` would have returned."""

    def drop(self) -> None:
        """Its results will not be taken: gives back what it took. It may have been launched."""


class Held(NamedTuple):
    """What a reward holds of a GPU's memory."""

    model: Any = None  # that it runs over pages and slabs of its own: a directory, or a Decoder
    slab_len: int = 0  # tokens of such a slab
    other_bytes: int = 0  # of whatever else
    reward_head: Any = "auto"  # of that directory, as `load_model`'s
    head: Literal["lm", "reward"] = "reward"  # of that directory
    quantization: Rounded | None = None  # that its matrices are rounded to


class Reward(ABC):
    """Scores responses. The engine opens a session per response, starts it, scores candidates, commits the winners.

    A handle that `score` or `score_trailing` returned is valid until `commit` or `discard` takes it; both come before
    its session's close. It may be committed to the session it was scored under, or to a fork made of that since: of two
    winners of one session, one goes to the session and the other to its fork. Forks come before any of these commits.

    What was scored need not be what becomes the response: it may go on with a part of a candidate, and with tokens that
    nobody scored. The handle is then discarded, and nothing else need be said: the session's history stays as it was,
    and the next score of the session runs what is missing. `resume` may bring the history up to the response before.
    """

    needs_text = False  # whether `Candidate.text` must be filled
    locks: Sequence[Any] = ()  # of models that other engines may share, known once it is bound
    exclusive = False  # whether it has a state that two engines cannot share
    activated = False  # whether rewards are probabilities already, as of a sigmoid; known once it is bound
    # What a text that nobody has divided is to it: a prompt without a response, a response without a prompt, or, where
    # it reads responses alone, nothing.
    whole_text: Literal["prompt", "response"] | None = "prompt"
    parts: Sequence[Reward] = ()  # rewards that it asks: the engine makes them its own, and asks them what they hold
    engine: weakref.ref[Any] | None = None  # whose it is, if it is exclusive; the engine sets it

    def holds(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> Held:
        """What `bind` will take of a GPU's memory, so that caches leave room for it.

        Asked there before any weight is read, with what `bind` will be given (its config may have fewer cache_tokens):
        what is refused then may be refused here already. Nothing changes.
        """
        return Held()

    def bind(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> None:
        """Called once, when the engine is built: load, allocate, check that it fits the LM (RewardError if not).

        tokenizer, vocab_size: the language model's. config: the engine's, and of the same sizes for a reward model.
        """

    def warm_up(self, draft: Draft) -> None:
        """Called after `bind` on a GPU: compiles and captures what will be run, lest it be in the midst of requests.

        draft: what `score_trailing` will be given.
        """

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Raises RequestError or RewardError if this prompt could never be scored."""

    def could_hold(self, prompt: Prompt, max_tokens: int, responses: int) -> bool:
        """Whether so many responses to a prompt that `check` accepts could be open together, with nothing besides."""
        return True

    def can_open(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether a session can be opened now; False means later."""
        return True

    def reserve(self, session: Any, tokens: int) -> bool:
        """Takes what a response needs to grow by so many of the language model's tokens.

        Asked after `open`, before `start`, before each segment, and for a fork before its first commit; tokens: since
        the last commit or resume. False, and nothing changed, where there is no room now: the response waits until
        others end. Must be True for a response that is alone, if `check` let its prompt pass.
        """
        return True

    @abstractmethod
    def open(self, prompt: Prompt, max_tokens: int) -> Any:
        """A session for one response to this prompt, with what the prompt needs; no work yet.

        RewardError, and nothing kept, where it could not be scored: its request ends so, before a token is drawn.
        """

    def fork(self, session: Any) -> Any:
        """A second session with the same history, of a started session: from here on each goes its own way.

        For a rule that keeps one response twice. Takes nothing that could be lacking: room comes with `reserve`.
        """
        raise RewardError(f"{type(self).__name__} cannot keep a response twice: give it a method fork(session)")

    def start(self, sessions: list[Any]) -> None:
        """Runs the prompts of newly opened sessions, all together. No two of them begin with the same page."""

    def start_in_chunks(self, sessions: list[Any], max_rows: int | None) -> Progress:
        """As `start`, of whose work as much is done now as takes at most `max_rows` rows (None: all of it), the first
        sessions first; returns how many of them have started.

        The engine asks this. Where others decode, it asks once a round, until all have started; between, any of these
        sessions may be closed, others may be opened, and their order may change. A reward that runs no prompts, or
        cannot stop in between, starts all.
        """
        self.start(sessions)
        return Progress(len(sessions), 0)

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """Candidates of one response worth scoring at once, each of `tokens` new tokens, besides others' candidates."""
        return 1 << 30

    @abstractmethod
    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """One score per candidate, in order.

        A candidate that cannot be scored gets a RewardError as its reward. What is raised makes the engine run each
        request by itself: who raises then, too, ends with an error.

        A reward may be a Future, which another thread settles: with a float, or with a RewardError, and never by an
        exception. The response waits for it, with what it holds, the handle included; all others go on. Where a
        response ends meanwhile, or is begun anew, its Futures are cancelled and its handles discarded: what is settled
        afterwards reaches nobody. `Engine.score`, whose responses do not go on, discards and closes at once. Who
        returns Futures offers neither `score_trailing` nor `score_ahead`.
        """

    def score_trailing(self, draft: Draft, candidates: Sequence[TrailingCandidate]) -> Trailing | None:
        """Prepares to score candidates after the draft that is under way, without waiting for it.

        Nothing else but `score_ahead` is asked of the reward before that was launched and its results are taken. None,
        and nothing done, where the reward needs the host to see the drafts first (which is what a reward that is a
        function does).
        """
        return None

    def score_ahead(self, candidates: list[Candidate]) -> Ahead | None:
        """Prepares `score`, while scores that were launched before are still being computed.

        Asked where the device works beside the host, of one lot at a time: it is launched or dropped before anything
        else is asked but the results that are under way, and the next comes after those. None, and nothing done, where
        there is nothing to prepare.
        """
        return None

    def resume(self, session: Any, token_ids: list[int], text: str | None) -> None:
        """Takes a response (as in `Candidate`) that was committed to an earlier session, before an interrupt or while
        others needed its pages; after `start`. With `deterministic`, segment after segment, as they were committed.
        A session that holds more goes back: the last segment is to be drawn anew. `token_ids` may be empty then.

        Needed where a session keeps what was committed.
        """

    def resume_in_chunks(self, session: Any, token_ids: list[int], text: str | None,
                         max_rows: int | None) -> Progress:
        """As `resume`, in at most `max_rows` rows now (None: all of them); done is 1 once all of the response is taken
        up. The engine asks this, with the same response until it is."""
        self.resume(session, token_ids, text)
        return Progress(1, 0)

    def reset(self) -> None:
        """Forgets every session and handle: the engine was interrupted, and opens anew what it still needs.

        May be called at any moment of another call that was interrupted, and again after an interrupt of its own.
        """

    def commit(self, winners: list[tuple[Any, Any]]) -> None:
        """(session, handle) pairs: the scored candidate becomes the session's history; handles are consumed.

        No session and no handle comes twice.
        """

    def discard(self, handle: Any) -> None:
        """The scored candidate is gone."""

    def cached(self, session: Any) -> int:
        """Tokens of the prompt that a session which was just opened need not run: what earlier ones have left."""
        return 0

    def recall(self, session: Any, token_ids: list[int], text: str | None) -> None:
        """Asked right after `open` of a response that `resume` will be asked for later, with the same: what is left of
        it where it was remembered may be found again, before others take the room. No text is run for this."""

    def remember(self, responses: Sequence[tuple[Any, Any]]) -> None:
        """(session, handle) pairs, of responses that are closed next and that later prompts may go on from: what is
        held of them may stay until room is needed. handle: of the scored candidate that ended the response, which is
        consumed; None where there is none, or none any more. No text is run for this, and nothing is taken that others
        lack.

        Not asked in deterministic mode, where what was scored has other bits than what a prompt's passes make of it.
        """
        for _, handle in responses:
            if handle is not None:
                self.discard(handle)

    def forget(self, session: Any) -> None:
        """A session that was closed, and perhaps remembered before, is of a response that lost against others: nobody
        comes back to it."""

    def close(self, session: Any) -> None:
        """The response is finished."""

    def check_integrity(self) -> None:
        """Raises IntegrityError if the reward's books do not balance."""


def settled(reward: float | RewardError | Later) -> float | RewardError:
    """A reward, waited for where it comes later. What its Future must not do, raise or be cancelled, is a RewardError.
    """
    if not isinstance(reward, Future):
        return reward
    try:
        error = reward.exception()
    except CancelledError as cancelled:
        error = cancelled
    if error is None:
        return reward.result()
    return RewardError("the reward's Future must be settled by a float or a RewardError, and it raised "
                       f"{describe(error)}")


def by_session(candidates: Sequence[Candidate]) -> list[list[int]]:
    """The places of candidates that continue one response together, response by response in the order they come."""
    places: dict[int, list[int]] = {}
    for place, candidate in enumerate(candidates):
        places.setdefault(id(candidate.session), []).append(place)
    return list(places.values())


def reward_problem(reward: float | RewardError) -> str | None:
    """Why a reward cannot be used: an error, NaN or +inf (-inf is allowed and rejects); None if it can."""
    if isinstance(reward, RewardError):
        return str(reward)
    if math.isnan(reward):
        return "the reward is NaN: the reward model or function must return a number"
    if reward == math.inf:
        return "the reward is +inf: the reward model or function must return a finite number or -inf"
    return None


def checked_batch_size(owner: str, value: Any) -> int:
    """`value` as a batch size of `owner`; RewardError for anything but an integer of at least 1."""
    return checked_integer(f"{owner}.batch_size", value, 1)


def checked_integer(name: str, value: Any, least: int) -> int:
    """`value` as int of at least `least`; RewardError, which names it, for anything else."""
    try:
        return integer(name, value, least)
    except RequestError as error:
        raise RewardError(str(error)) from None


def check_path(owner: str, model: Any) -> None:
    """RewardError unless `model` may be a directory; objects of transformers get their own sentence from the engine."""
    if not isinstance(model, READABLE) and not hasattr(model, "save_pretrained"):
        raise RewardError(f"{owner}.model is {shown(model)}, it must be a model directory")


def checked_rounding(owner: str, value: Any, model: Any) -> str | None:
    """`value` as a reward's `quantization`: "auto", the engine's reward_quantization, or what that may be; RewardError.
    """
    if value not in (None, "auto", *get_args(Rounded)):
        names = ", ".join(f'"{name}"' for name in get_args(Rounded))
        raise RewardError(f'{owner}.quantization is {shown(value)}, it must be "auto", None, {names}')
    if value not in (None, "auto") and not isinstance(model, READABLE):
        raise RewardError(f"{owner}.quantization belongs to a directory, and model is a Decoder, whose weights are "
                          "read already: give load_model(DIR, quantization=...) that")
    chosen: str | None = value
    return chosen


def rounding_of(model: Any, value: str | None, head: Literal["lm", "reward"], reward_head: Any,
                config: EngineConfig) -> Rounded | None:
    """What a reward's model is rounded to: `value`, or with "auto" what the engine says of rewards, unless the model is
    quantised already. ModelError where it cannot be; no weight is read."""
    if not isinstance(model, READABLE):
        return None
    rounded = followed(model, config.reward_quantization) if value == "auto" else value
    return check_rounding(model, head, reward_head, rounded, config.device)


def with_parts(reward: Reward) -> list[Reward]:
    """A reward and all that it is made of, itself first."""
    return [reward, *(one for part in reward.parts for one in with_parts(part))]
