"""Rewards that come later: what is made of several of them, and what several wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeAlias

from stars.errors import RewardError, describe
from stars.reward.base import Later, settled

Ready: TypeAlias = float | RewardError
"""A reward that is there, or why there is none."""


def settle(future: Later, reward: Ready) -> None:
    """Hands `reward` to whoever waits for it; nothing where nobody does any more."""
    try:
        future.set_result(reward)
    except InvalidStateError:  # cancelled
        pass


def when_all(rewards: Sequence[Ready | Later], combine: Callable[[list[Ready]], Ready]) -> Ready | Later:
    """What `combine` makes of the rewards: at once where all are there, else a Future. To cancel it cancels theirs."""
    waiting = [reward for reward in rewards if isinstance(reward, Future)]
    if not waiting:
        return combine([settled(reward) for reward in rewards])
    result: Later = Future()
    lock, left = threading.Lock(), len(waiting)

    def count(_: Any) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = not left
        if last:
            try:
                reward = combine([settled(reward) for reward in rewards])
            except Exception as error:  # of a Future that was settled with whatever
                reward = RewardError(f"the reward's Future was settled with what is no reward ({describe(error)})")
            settle(result, reward)

    def pass_on(_: Any) -> None:
        if result.cancelled():
            for future in waiting:
                future.cancel()

    result.add_done_callback(pass_on)
    for future in waiting:
        future.add_done_callback(count)
    return result


def shared(future: Later, count: int) -> list[Later]:
    """So many Futures that are settled as `future` is, which is cancelled once all of them are."""
    results: list[Later] = [Future() for _ in range(count)]

    def pass_on(_: Any) -> None:
        if all([result.cancelled() for result in results]):
            future.cancel()

    def hand_on(_: Any) -> None:
        reward = settled(future)
        for result in results:
            settle(result, reward)

    for result in results:
        result.add_done_callback(pass_on)
    future.add_done_callback(hand_on)
    return results
