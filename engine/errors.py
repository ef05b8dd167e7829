"""The exceptions of the engine: every message is one sentence that names the culprit and says what to do."""

from __future__ import annotations

import contextlib
import logging
import warnings

logger = logging.getLogger(__name__)


class StarsError(Exception):
    """Base of all errors raised by this package."""


class ModelError(StarsError):
    """A model cannot be loaded as asked: missing or unexpected tensors, an unsupported architecture."""


class TokenizerError(StarsError):
    """A tokenizer or chat template is missing or cannot do what was asked."""


class RewardError(StarsError):
    """A reward model or callable cannot score: wrong vocabulary, wrong count, NaN, an exception of its own."""


class RequestError(StarsError, ValueError):
    """A request is not acceptable as it stands: empty or over-long prompt, bad sampling or policy parameters."""


class QueueFullError(RequestError):
    """As many requests wait as may: later there is room again."""


class EngineDeadError(StarsError):
    """The loop of an AsyncEngine has ended, by a fault that the message names, or since it was shut down."""


class ServerError(StarsError):
    """A server that drafts for us cannot be reached, refuses what it was asked, or cannot do what is needed."""


class TraceError(StarsError):
    """A trace file cannot be read: another format, a damaged or missing line. The message names the line."""


class OutOfPages(StarsError):
    """The cache has too few free pages for what was asked; nothing was changed."""

    def __init__(self, needed: int, free: int, advice: str = "wait for a request to finish or raise cache_tokens"):
        super().__init__(f"the KV cache needs {needed} pages and has {free} free: {advice}")
        self.needed = needed
        self.free = free


class IntegrityError(StarsError):
    """The cache's books do not balance; this is a defect of the engine."""


def text_of(error: BaseException) -> str:
    """What `error` says, on one line; empty where it says nothing, or its text cannot be had."""
    try:
        return " ".join(str(error).split())
    except Exception:  # a user's exception may do anything
        return ""


def describe(error: BaseException) -> str:
    """`error` for a message: its type, and its text where it has one that can be read."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def sentence(error: BaseException) -> str:
    """The text of an error of this package, which says all; others with their type."""
    return isinstance(error, StarsError) and text_of(error) or describe(error)


def log(message: str, error: BaseException) -> None:
    """A line about an error that was dealt with, and where it came from; a handler that raises changes nothing."""
    with contextlib.suppress(Exception):
        logger.warning("%s", message, exc_info=error)


def warn(message: str, stacklevel: int) -> None:
    """A warning that never raises: what is warned of has happened, and whoever made warnings errors must not lose the
    results of everybody for it. It is logged then. stacklevel: as of `warnings.warn`, called in place of this."""
    try:
        warnings.warn(message, stacklevel=stacklevel + 1)
    except Warning as error:
        log(message, error)
