"""A load on one endpoint: requests sent when they are due, whatever became of those before."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stars.bench.answers import Answer
from stars.bench.client import Client
from stars.bench.meter import Meter, allow_connections
from stars.bench.workload import COMPLETIONS, Entry, body_of


@dataclass(frozen=True)
class Target:
    """Where requests go and what all of them have in common.

    model: None: the first of /v1/models. timeout: seconds of one request, connecting included.
    max_concurrency: requests under way at once; the others wait in the client, which its slip shows.
    common: further fields of every body. seed: of the first request, the next one has the next; None: none has any.
    """

    base_url: str
    endpoint: str = COMPLETIONS
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    max_concurrency: int | None = None
    common: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


class Run(NamedTuple):
    """A load that was sent."""

    model: str
    answers: list[Answer]  # in the order in which they were due
    duration: float  # seconds from the start to the last answer
    meter: Meter


async def send_load(target: Target, entries: Sequence[Entry], warmups: Sequence[Entry] = (),
                    on_answer: Callable[[], Any] = lambda: None) -> Run:
    """Sends every request at its time and waits for all of them; RequestError where there is no model to be asked.

    warmups: requests that are sent, one after the other, before the clock starts. on_answer: called after each of the
        others.
    """
    allow_connections(target.max_concurrency or len(entries))
    async with Client(target.base_url, target.endpoint, target.timeout, target.api_key) as client:
        model = await client.first_model() if target.model is None else target.model
        bodies = [body_of(entry, target.endpoint, model, target.common if target.seed is None else
                          {"seed": target.seed + index, **target.common}) for index, entry in enumerate(entries)]
        for entry in warmups:
            await client.send(body_of(entry, target.endpoint, model, target.common), Answer(0.0))
        free = contextlib.nullcontext() if target.max_concurrency is None else asyncio.Semaphore(target.max_concurrency)
        answers = [Answer(entry.due) for entry in entries]

        async def one(index: int) -> None:
            async with free:
                await client.send(bodies[index], answers[index])
            on_answer()

        meter = Meter()
        async with meter.measuring():
            client.start = time.perf_counter()
            tasks = []
            for index, entry in enumerate(entries):
                wait = client.start + entry.due - time.perf_counter()
                if wait > 0.0:
                    await asyncio.sleep(wait)
                tasks.append(asyncio.create_task(one(index)))
            await asyncio.gather(*tasks)
            duration = time.perf_counter() - client.start
    return Run(model, answers, duration, meter)
