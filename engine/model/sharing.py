"""Weights that are held once, however often one engine loads them: its own model, named ones, those inside of rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import ContextVar, Token
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class SharedWeights:
    """A scope, which may be entered again: what is loaded within it, by the thread that entered, is read once.

    own: the directory of the engine's own model, which adapters are for that name no other base.
    """

    def __init__(self, own: Path | None = None):
        self.own = own
        self.known: dict[Hashable, Any] = {}
        self._entered: list[Token[SharedWeights | None]] = []

    def __enter__(self) -> SharedWeights:
        self._entered.append(_scope.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        _scope.reset(self._entered.pop())


_scope: ContextVar[SharedWeights | None] = ContextVar("shared weights", default=None)


def own_directory() -> Path | None:
    """The directory of the own model of the scope that is entered, None where there is neither."""
    scope = _scope.get()
    return None if scope is None else scope.own


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What was made under `key` in the scope that is entered; made now where it was not, or where there is no scope."""
    scope = _scope.get()
    if scope is None:
        return make()
    if key not in scope.known:
        scope.known[key] = make()
    made: T = scope.known[key]
    return made
