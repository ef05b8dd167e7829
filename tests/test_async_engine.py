"""AsyncEngine: an engine for the tasks of any event loops. Whatever becomes of a caller, others get what they would
have got alone, every caller gets an end, and nothing is held."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import stars
from letters import LETTERS
from stars.serve import loop as loop_module
from test_conservation import nothing_is_held
from test_invariance import decided
from test_turns import LM, RM, alone, asked, run_all
from toy import ToyModel, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

KIND = stars.RequestOutputKind
LIMIT = 60  # seconds; what takes longer hangs


def run(coroutine: Awaitable) -> Any:
    """asyncio.run, with an end."""
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT))


class Gate:
    """A reward that stops rounds, once it is shut, until it is opened, or lets one pass."""

    def __init__(self):
        self.calls = 0  # that have come to the gate
        self.inside = threading.Event()  # set where one has come
        self._shut, self._passes = False, 0
        self._changed = threading.Condition()

    def __call__(self, prompt, responses):
        with self._changed:
            self.calls += 1
            self.inside.set()
            assert self._changed.wait_for(lambda: not self._shut or self._passes, LIMIT), "nobody opened the gate"
            self._passes = 0
        return list(map(table_reward(3), responses))

    def shut(self) -> None:
        """The next round stops inside."""
        with self._changed:
            self._shut = True
            self.inside.clear()

    def open(self) -> None:
        """Whoever stands at the gate goes on, and so does whoever comes."""
        with self._changed:
            self._shut = False
            self._changed.notify()

    async def reached(self) -> None:
        """Returns once a round stands at the gate."""
        assert await asyncio.to_thread(self.inside.wait, LIMIT)

    async def one_round(self) -> None:
        """The round at the gate goes on; returns once the next one stands there."""
        with self._changed:
            self.inside.clear()
            self._passes = 1
            self._changed.notify()
        await self.reached()


def gated(**options) -> tuple[stars.Engine, Gate]:
    gate = Gate()
    return toy_engine(LM, stars.FunctionReward(gate, inputs="ids"), **options), gate


async def collect(stream) -> list[stars.RequestOutput]:
    return [output async for output in stream]


async def text_of(engine: stars.AsyncEngine, seed: int, **options) -> list:
    outputs = await collect(engine.generate(*asked(seed), **options))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return decided(outputs[-1])


def ends(output: stars.RequestOutput) -> set[str | None]:
    return {completion.finish_reason for completion in output.outputs}


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline, "it never became true"
        await asyncio.sleep(0.002)


def endless(seed: int = 0) -> tuple:
    """A request of many rounds."""
    params = stars.SamplingParams(max_tokens=80, seed=seed, ignore_eos=True)
    return {"prompt_token_ids": ids(6, 23, seed)}, params, stars.STARS(1, 1, 1.0, reward_threshold=0.0)


def long_engine(**options) -> stars.Engine:
    """One whose requests, `LONG`, take seconds."""
    reward = stars.FunctionReward(lambda prompt, responses: [1.0] * len(responses), "ids")
    return toy_engine(ToyModel(23, seed=1, positions=3000), reward, **options)


LONG = ({"prompt_token_ids": [1, 2, 3]}, stars.SamplingParams(max_tokens=2900, seed=1, ignore_eos=True),
        stars.STARS(1, 1, 1.0, reward_threshold=0.0))


# -- the same texts ---------------------------------------------------------------------------------------------------


def test_texts_are_those_of_generate():
    async def serve():
        async with stars.AsyncEngine(toy_engine(LM, RM)) as engine:
            texts = await asyncio.gather(*(text_of(engine, seed) for seed in range(24)))
        nothing_is_held(engine.engine)
        return texts

    assert run(serve()) == alone(range(24))


def test_it_builds_its_engine():
    async def serve():
        async with stars.AsyncEngine(LM.decoder(), stars.CausalReward(RM.decoder()), cache_tokens=4096, page_size=4,
                                     max_num_seqs=16, max_segment_size=16, max_waiting=3) as engine:
            assert engine.is_running and "AsyncEngine(running; Engine(" in repr(engine)
            return [await text_of(engine, 1)]

    assert run(serve()) == alone([1])


def test_several_event_loops_in_several_threads_and_the_engine_itself():
    engine = stars.AsyncEngine(toy_engine(LM, RM))
    shares = [range(4 * index, 4 * index + 4) for index in range(3)]

    def serve(share):
        async def both():
            streams = [await engine.add(*asked(seed)) for seed in share]
            return [decided((await collect(stream))[-1]) for stream in streams]

        return run(both())

    def generate(seeds):
        outputs = engine.engine.generate(*map(list, zip(*map(asked, seeds), strict=True)), use_tqdm=False)
        return [decided(output) for output in outputs]

    results = run_all(*(lambda share=share: serve(share) for share in shares), lambda: generate([30, 31]))
    assert results == [*map(alone, shares), alone([30, 31])]
    run(engine.shutdown())
    nothing_is_held(engine.engine)


def test_a_stream_may_be_read_in_another_event_loop():
    engine = stars.AsyncEngine(toy_engine(LM, RM))
    stream = run(engine.add(*asked(3)))
    assert [decided(run(collect(stream))[-1])] == alone([3])
    run(engine.shutdown())


# -- at the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, options, message", [
    ("text", {}, "the model has no tokenizer.json"),
    ({"prompt_token_ids": [99]}, {}, "prompt token id 99 is outside"),
    ({"prompt_token_ids": [1]}, {"sampling_params": {"seed": 1}}, "sampling_params is dict"),
    ({"prompt_token_ids": [1]}, {"policy": 3}, "policy"),
    ({"prompt_token_ids": [1]}, {"budget": 3}, "budget is 3, it must be a stars.Budget"),
    ({"prompt_token_ids": [1]}, {"user": 3}, "user is 3"),
    ({"prompt_token_ids": [1]}, {"request_id": 0.5}, "request_id is float"),
    ([1, 2], {}, "the prompt is a bare list of token ids"),
])
@pytest.mark.parametrize("call", ["generate", "add", "add_nowait"])
def test_bad_input_raises_where_it_is_asked(call, prompt, options, message):
    async def serve():
        async with stars.AsyncEngine(toy_engine(LM, RM), max_waiting=1) as engine:
            with pytest.raises(stars.RequestError, match=message):
                if call == "generate":
                    await collect(engine.generate(prompt, **options))
                else:
                    await getattr(engine, call)(prompt, **options)
            assert not engine.engine._requests
            assert (await text_of(engine, 0, request_id="good"))  # it took nobody's place
        nothing_is_held(engine.engine)

    run(serve())


def test_a_grammar_that_takes_long_to_compile_holds_up_nobody(monkeypatch):
    """Neither those without one, nor one that is known; its own deadline counts from the call, and who is cancelled
    meanwhile leaves nothing."""
    pytest.importorskip("llguidance")
    compiler, gate, entered = stars.grammar._Compiler.compile, threading.Event(), threading.Event()

    def slow(self, kind, text):
        if "c" in text:
            entered.set()
            assert gate.wait(LIMIT)
        return compiler(self, kind, text)

    def shaped(regex: str) -> stars.SamplingParams:
        return stars.SamplingParams(max_tokens=6, seed=3, structured_outputs={"regex": regex})

    async def serve():
        monkeypatch.setattr("stars.grammar._Compiler.compile", slow)
        prompt = {"prompt_token_ids": [1, 2, 3]}
        async with stars.AsyncEngine(toy_engine(ToyModel(5, seed=2), tokenizer=LETTERS)) as engine:
            assert (await collect(engine.generate(prompt, shaped("[ab]{2}"))))[-1].outputs[0].text in SHAPES
            tasks = [asyncio.create_task(collect(engine.generate(prompt, shaped("c[ab]"))))]
            await until(entered.is_set)
            tasks += [asyncio.create_task(collect(engine.generate(prompt, shaped("c[ab]"), **given))) for given in (
                dict(budget=stars.Budget(seconds=0.01)), {})]
            tasks.append(asyncio.create_task(engine.add(prompt, shaped("c("))))
            closed, read_twice = engine.generate(prompt, shaped("c[ab]")), engine.generate(prompt, shaped("c[ab]"))
            readers = [asyncio.create_task(collect(stream)) for stream in (closed, read_twice)]
            await asyncio.sleep(0.02)
            await closed.aclose()
            with pytest.raises(RuntimeError, match="another task awaits request '.' already"):
                await anext(read_twice)
            late = await asyncio.wait_for(tasks[1], LIMIT)  # though its grammar is not there
            assert ends(late[-1]) == {"deadline"} and not late[-1].outputs[0].token_ids
            assert await readers[0] == [] and not readers[1].done()
            for params in (stars.SamplingParams(max_tokens=4), shaped("[ab]{2}")):
                assert (await collect(engine.generate(prompt, params)))[-1].finished
            tasks[2].cancel()
            gate.set()
            whole, _, gone, wrong = await asyncio.gather(*tasks, return_exceptions=True)
            assert whole[-1].outputs[0].text in ("ca", "cb")
            assert isinstance(gone, asyncio.CancelledError)
            assert isinstance(wrong, stars.RequestError) and "is no regular expression" in str(wrong)
            assert (await readers[1])[-1].outputs[0].text in ("ca", "cb")
            await until(lambda: not engine.engine.has_unfinished_requests())
            nothing_is_held(engine.engine)

    run(serve())


@pytest.mark.parametrize("max_waiting", [None, 2])
def test_who_waits_for_its_grammar_is_known(monkeypatch, max_waiting):
    """It has an id that can be aborted and is in use, takes a place, is drained by a shutdown, and ends with one that
    aborts."""
    pytest.importorskip("llguidance")
    compiler, gate, entered = stars.grammar._Compiler.compile, threading.Event(), threading.Event()

    def slow(self, kind, text):
        entered.set()
        assert gate.wait(LIMIT)
        return compiler(self, kind, text)

    def shaped(regex: str) -> stars.SamplingParams:
        return stars.SamplingParams(max_tokens=6, seed=3, structured_outputs={"regex": regex})

    async def serve(drain: bool):
        prompt = {"prompt_token_ids": [1, 2, 3]}
        gate.clear(), entered.clear()
        core = toy_engine(ToyModel(5, seed=2), tokenizer=LETTERS, max_num_seqs=1)
        engine = stars.AsyncEngine(core, max_waiting=max_waiting)
        first, second = (asyncio.create_task(collect(engine.generate(prompt, shaped(text), request_id=text)))
                         for text in ("c[ab]", "b[ab]"))
        await until(entered.is_set)
        assert await engine.abort("c[ab]")
        assert ends((await first)[-1]) == {"abort"}
        with pytest.raises(stars.RequestError, match="request id 'b.ab.' is in use"):
            await engine.add(prompt, request_id="b[ab]")
        late = collect(engine.generate(prompt, shaped("a[ab]"), budget=stars.Budget(seconds=0.02)))
        assert ends((await asyncio.wait_for(late, 10))[-1]) == {"deadline"}  # though nothing else happens
        if max_waiting is not None:  # a seat and two places, of which one is taken
            tasks = [asyncio.create_task(engine.add_nowait(prompt, shaped("a" * count))) for count in (1, 2)]
            await asyncio.sleep(0)
            with pytest.raises(stars.QueueFullError):
                await engine.add_nowait(prompt, shaped("a("))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not await engine.abort("c[ab]")
            nowait = asyncio.create_task(engine.add_nowait(prompt, shaped("b[ab]"), request_id="third"))
            await asyncio.sleep(0.02)
            assert await engine.abort("third") and ends((await collect(await nowait))[-1]) == {"abort"}
        ending = asyncio.create_task(engine.shutdown(drain))
        await asyncio.sleep(0.02)
        assert drain is not ending.done()
        gate.set()
        await ending
        [*_, last] = await second
        assert last.outputs[0].text in ("ba", "bb") if drain else ends(last) == {"abort"}
        nothing_is_held(core)

    monkeypatch.setattr("stars.grammar._Compiler.compile", slow)
    for drain in (True, False):
        run(serve(drain))


def test_a_stream_that_is_closed_tells_its_reader():
    """Before it has a place, and while it decodes: whoever awaits an output gets no more of them, at once."""
    async def serve():
        core = long_engine(max_num_seqs=1)
        async with stars.AsyncEngine(core, max_waiting=1) as engine:
            streams = [engine.generate(*LONG) for _ in range(3)]
            readers = [asyncio.create_task(collect(stream)) for stream in streams]
            await until(lambda: bool(core._scheduler.running))
            for stream, reader in zip(streams[::-1], readers[::-1], strict=True):
                await stream.aclose()
                await asyncio.wait_for(reader, LIMIT)
            await until(lambda: not core.has_unfinished_requests())
            nothing_is_held(core)

    run(serve())


@pytest.mark.parametrize("queued", [False, True])
def test_a_reader_that_is_cancelled_at_something_else_ends_its_request(queued):
    """Though the error is kept, and with it the frame that holds the stream; one that has handed its stream on ends
    nothing."""
    async def serve():
        core = long_engine()
        async with stars.AsyncEngine(core) as engine:
            have_read = []

            async def reads(stream):
                async for _ in stream:
                    have_read.append(stream)
                    await asyncio.sleep(LIMIT)

            def made():
                return engine.add(*LONG) if queued else engine.generate(*LONG)

            stream, other = made(), made()
            if queued:
                stream, other = await stream, await other
            task, handed = (asyncio.create_task(reads(one)) for one in (stream, other))
            await until(lambda: len(have_read) == 2)
            rest = asyncio.create_task(collect(other))
            await until(lambda: other._reader() is rest)
            requests = [*core._requests.values()]
            task.cancel(), handed.cancel()
            kept = await asyncio.gather(task, handed, return_exceptions=True)
            await until(lambda: len(core._requests) == 1)
            assert isinstance(kept[0], asyncio.CancelledError) and not rest.done()
            assert {one.hypotheses[0].finish_reason for one in requests} == {"abort", None}
            rest.cancel()
            await until(lambda: not core._requests)
            nothing_is_held(core)

    run(serve())


def test_a_task_that_reads_many_streams_keeps_nothing_of_them():
    async def serve():
        async with stars.AsyncEngine(toy_engine(LM, RM)) as engine:
            task = asyncio.current_task()
            before = len(task._callbacks or ())
            for seed in range(5):
                assert (await collect(engine.generate(*asked(seed))))[-1].finished
            with pytest.raises(stars.RequestError):
                await collect(engine.generate({"prompt_token_ids": [99]}))
            assert len(task._callbacks or ()) == before

    run(serve())


def test_who_waits_for_a_common_beginning_takes_no_place():
    """While it is read, chunk after chunk, seats are free: nobody is refused."""
    async def serve():
        core = toy_engine(LM, None, max_num_seqs=16, max_num_batched_tokens=4)
        async with stars.AsyncEngine(core, max_waiting=2) as engine:
            params = stars.SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
            streams = []
            for last in range(8):
                prompt = {"prompt_token_ids": [*ids(80, 23, 1), 1 + last]}
                streams.append(await engine.add_nowait(prompt, params))
            for stream in streams:
                assert (await collect(stream))[-1].finished
        nothing_is_held(core)

    run(serve())


def test_several_are_aborted_at_once_and_ids_are_strings():
    async def serve():
        core = long_engine()
        async with stars.AsyncEngine(core) as engine:
            streams = [await engine.add(*LONG, request_id=name) for name in "abc"]
            for wrong in (["a", ["b"]], 1.5, {1.5}, None):
                with pytest.raises(stars.RequestError, match="a request id is a string, and .* is none: give one"):
                    await engine.abort(wrong)
            assert await engine.abort(["a", "b", "other"]) and not await engine.abort(("a", "b", "other"))
            assert [ends((await collect(stream))[-1]) for stream in streams[:2]] == [{"abort"}] * 2
            assert core.abort(["c"]) and not core.abort([])
            with pytest.raises(stars.RequestError, match="a request id is a string"):
                core.abort([None])
            assert ends((await collect(streams[2]))[-1]) == {"abort"}
            assert engine.metrics is core.metrics and engine.is_running

    run(serve())


SHAPES = ("aa", "ab", "ba", "bb")


def test_unknown_keywords_raise_at_the_call():
    async def serve():
        async with stars.AsyncEngine(toy_engine(LM)) as engine:
            with pytest.raises(stars.RequestError, match=r"generate has no parameter 'temperature': give SamplingP"):
                engine.generate("x", temperature=1.0)
            with pytest.raises(stars.RequestError, match="add has no parameter 'polcy': did you mean policy"):
                await engine.add("x", polcy=1)

    run(serve())
    with pytest.raises(stars.RequestError, match="takes over an Engine as it is: give reward, cache_tokens to Engine"):
        stars.AsyncEngine(toy_engine(LM), RM, cache_tokens=100)
    with pytest.raises(stars.RequestError, match="max_waiting is 0, it must be an integer of at least 1"):
        stars.AsyncEngine(toy_engine(LM), max_waiting=0)


def test_ids_are_one_requests_own():
    async def serve():
        engine, gate = gated(max_num_seqs=1, max_num_lanes=4)
        async with stars.AsyncEngine(engine, max_waiting=1) as served:
            gate.shut()
            first = asyncio.create_task(collect(served.generate(*endless(), request_id="a")))
            await gate.reached()
            others = [asyncio.create_task(collect(served.generate(*endless(seed), request_id=name)))
                      for seed, name in enumerate("bc")]  # one waits, one stands in line
            await asyncio.sleep(0)
            taken = [asyncio.create_task(served.add(*endless(), request_id=name)) for name in "abc"]
            await asyncio.sleep(0.01)
            gate.open()
            for task in taken:
                with pytest.raises(stars.RequestError, match="request id '.' is in use: choose another"):
                    await task
            outputs = await asyncio.gather(first, *others)
            assert [output[-1].request_id for output in outputs] == ["a", "b", "c"]
            again = await served.add_nowait(*asked(1), request_id="a")  # it is free again, and nobody stands in line
            assert (await collect(again))[-1].finished

    run(serve())


def test_the_event_loop_goes_on_while_a_round_runs():
    """Adding, aborting and waiting in line are for the loop thread, which is in a round: the tasks wait, nobody else.
    """
    async def serve():
        engine, gate = gated()
        async with stars.AsyncEngine(engine) as served:
            gate.shut()
            first = asyncio.create_task(collect(served.generate(*endless(), request_id="a")))
            await gate.reached()
            tasks = [asyncio.create_task(served.add(*asked(1))), asyncio.create_task(served.abort("a"))]
            begin = time.perf_counter()
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert time.perf_counter() - begin < LIMIT / 2
            assert not any(task.done() for task in (first, *tasks))
            gate.open()
            stream, found = await asyncio.gather(*tasks)
            assert found and ends((await first)[-1]) == {"abort"}
            assert (await collect(stream))[-1].finished

    run(serve())


# -- who goes away ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "close", "drop"])
def test_who_goes_away_frees_its_pages_before_the_next_round(how):
    async def serve():
        engine, gate = gated()
        async with stars.AsyncEngine(engine) as served:
            stream = served.generate(*endless())
            await anext(stream)
            gate.shut()
            await gate.reached()  # in a round of it
            calls = gate.calls
            if how == "cancel":
                task = asyncio.create_task(anext(stream))
                while stream._feed._waiter is None:  # it takes the output that is there first
                    await asyncio.sleep(0.001)
                    if task.done():
                        task = asyncio.create_task(anext(stream))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "close":
                await stream.aclose()
            else:
                del stream
            gate.open()
            await until(lambda: not engine._requests)
            assert gate.calls <= calls + 1
            assert engine._cache.num_free_pages == engine._cache.num_pages
            if how != "drop":
                assert await collect(stream) == []
        nothing_is_held(engine)

    run(serve())


def test_a_stream_that_was_never_begun_costs_nothing():
    async def serve():
        async with stars.AsyncEngine(toy_engine(LM)) as engine:
            stream = engine.generate(*asked(0))
            assert stream.request_id is None
            await stream.aclose()
            assert await collect(stream) == []
            del stream
            assert not engine.engine._requests

    run(serve())


@pytest.mark.parametrize("seed", range(4))
def test_cancels_at_random_points(seed):
    """Whoever is not cancelled gets the text of a run alone; every page is free in the end."""
    random_ = random.Random(seed)
    wanted = alone(range(16))

    async def caller(engine, number, fate):
        stream = engine.generate(*asked(number))
        if fate == "whole":
            return decided((await collect(stream))[-1])
        async for output in stream:
            if output.finished or random_.random() < 0.4:
                break  # and the stream is dropped
        return None

    async def serve():
        engine = toy_engine(LM, RM, max_num_seqs=6, max_num_lanes=24, cache_tokens=300)
        async with stars.AsyncEngine(engine, max_waiting=random_.choice([None, 1, 4])) as served:
            tasks = {}
            for number in range(16):
                fate = random_.choice(["whole", "leave", "cancel"])
                task = asyncio.create_task(caller(served, number, fate.replace("cancel", "whole")))
                tasks[number] = task, fate
                if fate == "cancel":
                    asyncio.get_running_loop().call_later(random_.random() * 0.2, task.cancel)
                if random_.random() < 0.3:
                    await asyncio.sleep(random_.random() * 0.02)
            results = await asyncio.gather(*(task for task, _ in tasks.values()), return_exceptions=True)
            for (number, (_, fate)), result in zip(tasks.items(), results, strict=True):
                if isinstance(result, asyncio.CancelledError):
                    assert fate == "cancel"
                else:
                    assert result is None if fate == "leave" else result == wanted[number]
            await until(lambda: not engine._requests)
            engine.check_integrity()
        nothing_is_held(engine)

    run(serve())


def test_streams_that_are_collected_anywhere():
    """In cycles, so that the collector finds them, in whatever thread and whatever round."""
    def junk():
        class Knot:
            pass

        knot = Knot()
        knot.own = knot
        return knot

    async def serve():
        def reward(prompt, responses):
            if next(calls) % 20 == 0:
                gc.collect()
            return list(map(table_reward(3), responses))

        calls = itertools.count()
        engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids"))
        async with stars.AsyncEngine(engine) as served:
            for seed in range(6):
                knot = junk()
                knot.stream = served.generate(*endless(seed))
                await anext(knot.stream)
                del knot
            assert (await collect(served.generate(*asked(1))))[-1].finished
            gc.collect()
            await until(lambda: not engine._requests)
        nothing_is_held(engine)

    run(serve())


def test_abort_gives_a_last_output():
    async def serve():
        engine, gate = gated()
        async with stars.AsyncEngine(engine) as served:
            stream = await served.add(*endless(), request_id="mine")
            await anext(stream)
            assert await served.abort("mine") is True
            assert await served.abort("mine") is False and await served.abort("other") is False
            [last] = await collect(stream)  # in the place of what was not fetched
            assert ends(last) == {"abort"} and last.request_id == "mine" and last.outputs[0].token_ids
            own = engine.add_request(*endless())  # by somebody who calls the engine itself
            assert await served.abort(own) is True
            assert ends(engine.step()[0]) == {"abort"}
        nothing_is_held(engine)

    run(serve())


def test_an_event_loop_that_is_closed_while_its_requests_run():
    engine, gate = gated()
    served = stars.AsyncEngine(engine)
    gate.shut()
    loop = asyncio.new_event_loop()
    task = loop.create_task(collect(served.generate(*endless())))
    loop.run_until_complete(gate.reached())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.open()
    assert run(text_of(served, 2))
    run(until(lambda: not engine._requests))
    assert gate.calls < 60  # it was not run to its end
    run(served.shutdown())
    nothing_is_held(engine)
    task._log_destroy_pending = False
    del task


def test_what_ends_before_a_round_is_told_before_it():
    """Here by a reward that refuses to open it; a deadline ends a request at the same place."""
    def refused(prompt, max_tokens):
        if prompt.token_ids[0] == 7:
            raise stars.RewardError("not this one")
        return opened(prompt, max_tokens)

    async def serve():
        async with stars.AsyncEngine(engine) as served:
            first = asyncio.create_task(collect(served.generate(*endless())))
            await gate.reached()
            gate.shut()
            await gate.reached()
            other = asyncio.create_task(collect(served.generate({"prompt_token_ids": [7]}, *endless()[1:])))
            await asyncio.sleep(0.01)
            await gate.one_round()
            assert ends((await other)[-1]) == {"error"}
            gate.open()
            await first

    engine, gate = gated()
    opened = engine.reward.open
    engine.reward.open = refused
    run(serve())


# -- back-pressure ----------------------------------------------------------------------------------------------------


def crowd() -> tuple[stars.Engine, Gate]:
    """An engine with one seat."""
    return gated(max_num_seqs=1, max_num_lanes=4)


def test_max_waiting_refuses_at_once_or_has_them_stand_in_line():
    async def serve():
        engine, gate = crowd()
        async with stars.AsyncEngine(engine, max_waiting=2) as served:
            gate.shut()
            streams = [await served.add_nowait(*endless(0))]
            await gate.reached()
            adding = [asyncio.create_task(served.add_nowait(*endless(seed))) for seed in (1, 2)]
            await asyncio.sleep(0)
            begin = time.perf_counter()
            with pytest.raises(stars.QueueFullError, match="2 requests wait already, as many as max_waiting allows"):
                await served.add_nowait(*endless(3))
            assert time.perf_counter() - begin < LIMIT / 2  # while the round stands
            tasks = [asyncio.create_task(served.add(*endless(seed))) for seed in (4, 5, 6)]
            await asyncio.sleep(0.01)
            gate.open()
            streams += await asyncio.gather(*adding)
            assert not any(task.done() for task in tasks)
            assert len(engine._requests) == 3
            assert await served.abort(streams[0].request_id)
            streams.append(await tasks[0])  # the first in line
            assert not tasks[1].done() and not tasks[2].done()
            with pytest.raises(stars.QueueFullError):  # nobody overtakes the line
                await served.add_nowait(*endless(7))
            for stream in streams:
                await stream.aclose()
            for task in tasks[1:]:
                await (await task).aclose()
            await until(lambda: not engine._requests)
            # All of it is there again: a seat and two places.
            again = [await served.add_nowait(*asked(seed)) for seed in range(3)]
            assert all([(await collect(stream))[-1].finished for stream in again])
        nothing_is_held(engine)

    run(serve())


def test_the_line_is_first_come_first_served():
    async def serve():
        engine, gate = crowd()
        order: list[int] = []

        async def caller(seed):
            await collect(await served.add(*asked(seed)))
            order.append(seed)

        async with stars.AsyncEngine(engine, max_waiting=1) as served:
            gate.shut()
            tasks = [asyncio.create_task(caller(seed)) for seed in range(12)]
            await gate.reached()
            tasks[5].cancel()
            gate.open()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [seed for seed in range(12) if seed != 5]
        nothing_is_held(engine)

    run(serve())


@pytest.mark.parametrize("call", ["generate", "add"])
def test_one_who_leaves_the_line_leaves_no_trace(call):
    async def serve():
        engine, gate = crowd()
        async with stars.AsyncEngine(engine, max_waiting=1) as served:
            gate.shut()
            first = asyncio.create_task(collect(served.generate(*asked(0))))
            await gate.reached()
            second = asyncio.create_task(collect(served.generate(*asked(1))))
            await asyncio.sleep(0)
            waiting = [asyncio.create_task(collect(served.generate(*asked(9))) if call == "generate" else
                                           served.add(*asked(9))) for _ in range(5)]
            await asyncio.sleep(0.01)
            for task in waiting:
                task.cancel()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            gate.open()
            await asyncio.gather(first, second)
            assert served._loop._in_line == 0 and not served._loop._line and not served._loop._queued
            assert [await text_of(served, seed) for seed in (2, 3)] == alone_with_table([2, 3])
        nothing_is_held(engine)

    run(serve())


def alone_with_table(seeds) -> list:
    engine, _ = gated()
    outputs = engine.generate(*map(list, zip(*map(asked, seeds), strict=True)), use_tqdm=False)
    return [decided(output) for output in outputs]


def test_abort_of_one_in_line():
    async def serve():
        engine, gate = crowd()
        async with stars.AsyncEngine(engine, max_waiting=1) as served:
            gate.shut()
            tasks = [asyncio.create_task(collect(served.generate(*endless(), request_id=name))) for name in "abc"]
            await gate.reached()
            aborted = asyncio.create_task(served.abort("c"))
            gate.open()
            assert await aborted
            [output] = await tasks[2]
            assert ends(output) == {"abort"} and not output.outputs[0].token_ids
            assert await served.abort("a") and await served.abort("b")
            await asyncio.gather(*tasks)

    run(serve())


def test_a_deadline_is_kept_in_line_too():
    """The engine is given it then, whoever waits: it ends it as any other whose time is up."""
    async def serve():
        engine, gate = crowd()
        async with stars.AsyncEngine(engine, max_waiting=1) as served:
            tasks = [asyncio.create_task(collect(served.generate(*endless(), request_id=name))) for name in "ab"]
            await until(lambda: len(engine._requests) == 2)
            gate.shut()
            other = asyncio.create_task(served.add(*endless(), request_id="other"))
            late = asyncio.create_task(collect(served.generate(*endless(), budget=stars.Budget(seconds=0.02))))
            await gate.reached()
            await asyncio.sleep(0.03)
            gate.open()
            [output] = await late
            assert ends(output) == {"deadline"} and not other.done()  # who stands before it
            other.cancel()
            for name in "ab":
                await served.abort(name)
            await asyncio.gather(*tasks)

    run(serve())


# -- slow consumers ---------------------------------------------------------------------------------------------------


def counted(engine: stars.Engine) -> Counter:
    """How many outputs were built, by request."""
    built: Counter = Counter()
    output = engine._output

    def build(request):
        built[request.request_id] += 1
        return output(request)

    engine._output = build
    return built


def test_who_is_slow_gets_few_outputs_and_holds_up_nobody():
    async def serve():
        engine = long_engine()
        built = counted(engine)
        async with stars.AsyncEngine(engine) as served:
            prompt, params, policy = LONG
            asked = prompt, dataclasses.replace(params, max_tokens=600), policy
            stream = await served.add(*asked, request_id="slow")
            quick = await collect(served.generate(*asked, request_id="quick"))
            await until(lambda: not engine._requests)
            slow = await collect(stream)
            assert len(slow) == 1 and decided(slow[-1]) == decided(quick[-1])
            assert built["slow"] == 2 and built["quick"] - len(quick) in (0, 1) and len(quick) > 1
            assert len(quick[-1].outputs[0].segments) >= len(quick)

    run(serve())


def test_what_changed_while_an_output_waited_is_built_once_that_is_fetched():
    """Also where no round follows: all that runs waits for rewards."""
    async def serve():
        stuck, go = threading.Event(), threading.Event()
        late = Gate()

        def reward(prompt, responses):
            if len(responses[0]) >= 6:
                stuck.set()
                go.wait(LIMIT)
            return late(prompt, responses)

        engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids", blocking=True))
        async with stars.AsyncEngine(engine) as served:
            stream = await served.add(*endless())
            await until(lambda: stuck.is_set() and stream._feed.stale and served._loop._awaited)
            first = await anext(stream)
            assert len(first.outputs[0].token_ids) < 5
            second = await anext(stream)
            assert len(second.outputs[0].token_ids) == 5
            go.set()
            await stream.aclose()

    run(serve())


def test_deltas_are_merged_and_none_is_lost():
    """Who reads late gets the first, and in one output what came since."""
    async def serve(late):
        engine = toy_engine(LM, RM)
        prompt, params, policy = endless()
        wanted = engine.generate(prompt, params, policy, use_tqdm=False)[0].outputs[0].token_ids
        params = dataclasses.replace(params, output_kind=KIND.DELTA)
        async with stars.AsyncEngine(engine) as served:
            stream = await served.add(prompt, params, policy)
            if late:
                await until(lambda: stream._feed.complete)
            outputs = await collect(stream)
        assert [token for output in outputs for token in output.outputs[0].token_ids] == wanted
        return len(outputs)

    assert run(serve(late=True)) == 2 <= run(serve(late=False))


def test_final_only_builds_nothing_before_the_end():
    async def serve():
        engine = toy_engine(LM, RM)
        built = counted(engine)
        prompt, params, policy = asked(3)
        params = dataclasses.replace(params, output_kind=KIND.FINAL_ONLY)
        async with stars.AsyncEngine(engine) as served:
            [output] = await collect(served.generate(prompt, params, policy))
            assert output.finished and sum(built.values()) == 1
            return [decided(output)]

    assert run(serve()) == alone([3])


def test_one_call_a_round_wakes_an_event_loop():
    async def serve():
        engine, gate = gated()
        loop = asyncio.get_running_loop()
        calls, call = [], loop.call_soon_threadsafe
        async with stars.AsyncEngine(engine) as served:
            gate.shut()
            tasks = [asyncio.create_task(collect(served.generate(*endless(seed)))) for seed in range(8)]
            await gate.reached()
            await asyncio.sleep(0.02)
            steps, advance = [], engine._advance
            engine._advance = lambda *given: steps.append(1) or advance(*given)
            loop.call_soon_threadsafe = lambda *given, **options: calls.append(1) or call(*given, **options)
            gate.open()
            outputs = await asyncio.gather(*tasks)
            assert len(calls) <= len(steps) + 2 < sum(map(len, outputs)) / 3

    run(serve())


def test_one_task_at_a_time_may_await_a_stream():
    async def serve():
        engine, gate = gated()
        async with stars.AsyncEngine(engine) as served:
            gate.shut()
            stream = await served.add(*endless())
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task awaits request '0' already"):
                await stream._feed.next()
            gate.open()
            assert await task
            await stream.aclose()

    run(serve())


# -- waiting costs nothing --------------------------------------------------------------------------------------------


def cpu_seconds(thread: threading.Thread) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clocks of threads here")
@pytest.mark.parametrize("late", [False, True], ids=["idle", "rewards to come"])
def test_waiting_takes_no_cpu_and_ends_at_once(late):
    """Where all that runs waits for rewards, a message or a reward wakes the thread, and nothing else does."""
    async def serve():
        go = threading.Event()

        def reward(prompt, responses):
            assert go.wait(LIMIT)
            return [0.0] * len(responses)

        engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids", blocking=True))
        async with stars.AsyncEngine(engine) as served:
            thread = served._loop.thread
            assert (await collect(served.generate(*asked(1)[:2])))[-1].finished
            if late:
                stream = await served.add(*endless())
                await until(lambda: served._loop._awaited)
            passes, advance = [], engine._advance
            engine._advance = lambda *given: passes.append(1) or advance(*given)
            await asyncio.sleep(0.05)
            begin, looked = cpu_seconds(thread), len(passes)
            await asyncio.sleep(0.4)
            assert cpu_seconds(thread) - begin < 0.01 and len(passes) == looked
            begin = time.perf_counter()
            other = await served.add(*asked(2)[:2])  # plain sampling
            assert (await collect(other))[-1].finished
            if late:
                assert await asyncio.to_thread(engine.abort, stream.request_id)  # by another thread's turn
                assert ends((await collect(stream))[-1]) == {"abort"}
                more = await served.add(*endless(5))
                await until(lambda: served._loop._awaited)
                go.set()
                assert (await collect(more))[-1].finished
            assert time.perf_counter() - begin < LIMIT / 2
            go.set()
        nothing_is_held(engine)

    run(serve())


def test_what_another_thread_does_wakes_a_loop_that_waits_for_rewards():
    async def serve():
        go = threading.Event()
        engine = toy_engine(LM, stars.FunctionReward(
            lambda prompt, responses: go.wait(LIMIT) and [0.0] * len(responses), inputs="ids", blocking=True),
            max_num_seqs=1, max_num_lanes=1)
        async with stars.AsyncEngine(engine) as served:
            first = await served.add(*endless())
            await until(lambda: served._loop._awaited)
            other = asyncio.create_task(collect(served.generate(*endless(), request_id="other")))
            await until(lambda: "other" in engine._requests and served._loop._awaited)
            assert await asyncio.to_thread(engine.abort, "other")
            assert ends((await asyncio.wait_for(other, 10))[-1]) == {"abort"}
            go.set()
            await first.aclose()

    run(serve())


def test_a_deadline_wakes_a_loop_that_waits_for_rewards():
    async def serve():
        go = threading.Event()
        engine = toy_engine(LM, stars.FunctionReward(
            lambda prompt, responses: go.wait(LIMIT) and [0.0] * len(responses), inputs="ids", blocking=True))
        async with stars.AsyncEngine(engine) as served:
            begin = time.monotonic()
            stream = await served.add(*endless(), budget=stars.Budget(seconds=0.3))
            await until(lambda: served._loop._awaited)
            [*_, last] = await collect(stream)
            assert ends(last) == {"deadline"} and 0.3 <= time.monotonic() - begin < LIMIT / 2
            go.set()

    run(serve())


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [stars.IntegrityError("the books are wrong"), MemoryError("no memory"),
                                   SystemExit(3)], ids=lambda fault: type(fault).__name__)
def test_a_fault_reaches_everybody_and_the_engine_is_free(fault, caplog):
    async def serve():
        engine, gate = crowd()
        served = stars.AsyncEngine(engine, max_waiting=1)
        gate.shut()
        tasks = [asyncio.create_task(collect(served.generate(*endless(seed)))) for seed in range(3)]
        await gate.reached()
        tasks += [asyncio.create_task(served.add(*asked(5))), asyncio.create_task(served.abort("nobody"))]
        await asyncio.sleep(0.01)
        plan = engine._scheduler.plan

        def broken(only=None):
            raise fault

        # What is raised where nothing is admitted is nobody's own.
        engine._scheduler.plan = engine._one_by_one = broken
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results.pop() is False
        assert {type(result) for result in results} == {stars.EngineDeadError}
        assert len(set(map(id, results))) == 4
        message = f"the engine's loop ended by {type(fault).__name__}: {fault}: make another one"
        assert all(str(result).startswith(message) and result.__cause__ is fault for result in results)
        assert not served.is_running and "AsyncEngine(ended" in repr(served)
        for call in (served.add, served.add_nowait):
            with pytest.raises(stars.EngineDeadError, match=type(fault).__name__):
                await call(*asked(0))
        with pytest.raises(stars.EngineDeadError, match=type(fault).__name__):
            await collect(served.generate(*asked(0)))
        with pytest.raises(stars.EngineDeadError, match=type(fault).__name__):
            await served.abort("0")
        await served.shutdown()
        assert "the engine's loop ended by" in caplog.text
        engine._scheduler.plan = plan
        del engine._one_by_one
        await until(lambda: not engine._requests)
        async with stars.AsyncEngine(engine) as second:
            assert [await text_of(second, 4)] == alone_with_table([4])
        nothing_is_held(engine)

    run(serve())


@pytest.mark.parametrize("at", ["a message", "the outputs"])
def test_a_fault_between_rounds_leaves_no_message_unanswered(at):
    """Of those that were taken together with the one that it befell."""
    async def serve():
        def broken(*given):
            raise stars.IntegrityError("the books are wrong")

        engine, gate = gated()
        served = stars.AsyncEngine(engine)
        gate.shut()
        first = asyncio.create_task(collect(served.generate(*endless(), request_id="first")))
        await gate.reached()
        tasks = [asyncio.create_task(served.abort("nobody")), asyncio.create_task(served.add(*asked(1))),
                 asyncio.create_task(served.add(*asked(2))), asyncio.create_task(served.abort("first"))]
        await asyncio.sleep(0.01)
        if at == "a message":
            engine._parse = broken
        else:
            built = engine._output
            engine._output = lambda request: broken() if request.request_id == "first" and request.finished else \
                built(request)
        gate.open()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        if at == "the outputs":  # those that were taken were told so, if a round came before
            results = [result for result in results if not hasattr(result, "request_id")] + [
                await asyncio.gather(collect(result), return_exceptions=True)
                for result in results if hasattr(result, "request_id")]
            results = [result[0] if isinstance(result, list) else result for result in results]
        assert {type(result) for result in results} == {stars.EngineDeadError}

    run(serve())


def test_rewards_that_raise_end_one_request_each():
    def reward(prompt, responses):
        if prompt[0] == 7:
            raise ValueError("not this one")
        if prompt[0] == 8:
            raise SystemExit
        return list(map(table_reward(3), responses))

    async def serve():
        engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids"))
        async with stars.AsyncEngine(engine) as served:
            prompts = [[7, 2], [8, 3], *(asked(seed)[0]["prompt_token_ids"] for seed in (0, 1))]
            outputs = await asyncio.gather(*(collect(served.generate({"prompt_token_ids": prompt}, *asked(seed)[1:]))
                                             for seed, prompt in zip((5, 6, 0, 1), prompts, strict=True)))
            assert [ends(output[-1]) == {"error"} for output in outputs] == [True, True, False, False]
            assert "ValueError: not this one" in outputs[0][-1].outputs[0].error
            assert [decided(output[-1]) for output in outputs[2:]] == alone_with_table([0, 1])
            assert served.is_running
        nothing_is_held(engine)

    run(serve())


@pytest.mark.parametrize("call", ["generate", "add", "abort", "shutdown"])
def test_a_reward_that_calls_its_engine_is_refused(call):
    refusals: list[str] = []

    def reward(prompt, responses):
        if not refusals:
            calls = {"generate": lambda: collect(served.generate(*asked(1))), "add": lambda: served.add(*asked(1)),
                     "abort": lambda: served.abort("0"), "shutdown": lambda: served.shutdown()}
            with pytest.raises(stars.RequestError) as raised:
                asyncio.run(calls[call]())
            refusals.append(str(raised.value))
        return list(map(table_reward(3), responses))

    async def serve():
        async with served:
            return [await text_of(served, 0)]

    served = stars.AsyncEngine(toy_engine(LM, stars.FunctionReward(reward, inputs="ids")))
    assert run(serve()) == alone_with_table([0])
    assert refusals == ["the engine is at work in this thread: a reward cannot call the engine that asked it, give it "
                        "an engine of its own"]
    nothing_is_held(served.engine)


# -- shutting down ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("state", ["new", "idle", "running", "in line", "between outputs", "waiting for rewards"])
def test_shutdown_in_every_state(state, drain):
    async def serve():
        go = threading.Event()
        gate = Gate()
        late = state == "waiting for rewards"
        reward = (lambda prompt, responses: go.wait(LIMIT) and gate(prompt, responses)) if late else gate
        engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids", blocking=late), max_num_seqs=1,
                            max_num_lanes=4)
        served = stars.AsyncEngine(engine, max_waiting=1)
        tasks = []
        if state == "idle":
            await text_of(served, 0)
        elif state == "between outputs":
            stream = await served.add(*endless())
            await anext(stream)
        elif late:
            tasks = [asyncio.create_task(collect(served.generate(*asked(0))))]
            await until(lambda: served._loop._awaited)
        elif state != "new":
            gate.shut()
            tasks = [asyncio.create_task(collect(served.generate(*asked(seed))))
                     for seed in range(1 if state == "running" else 4)]
            await gate.reached()
            await asyncio.sleep(0.01)
        stops = [asyncio.create_task(served.shutdown(drain)) for _ in range(2)]
        await asyncio.sleep(0)
        assert not served.is_running
        with pytest.raises(stars.EngineDeadError, match="this AsyncEngine was shut down: make another one"):
            await served.add(*asked(1))
        if late and drain:
            await asyncio.sleep(0.05)
            assert not stops[0].done()
            go.set()
        gate.open()
        await asyncio.gather(*stops)
        served._loop.thread.join(10)
        assert not served._loop.thread.is_alive()
        if state == "between outputs":
            outputs = [await collect(stream)]
            assert outputs[0][-1].finished
        else:
            outputs = await asyncio.gather(*tasks)
        for output in outputs:
            assert ("abort" in ends(output[-1])) == (not drain)
        assert await served.abort("0") is False
        await served.shutdown()
        go.set()
        nothing_is_held(engine)

    run(serve())


def test_a_second_shutdown_may_abort_what_the_first_drains():
    async def serve():
        engine, gate = gated()
        served = stars.AsyncEngine(engine)
        gate.shut()
        task = asyncio.create_task(collect(served.generate(*endless())))
        await gate.reached()
        first = asyncio.create_task(served.shutdown())
        await asyncio.sleep(0)
        first.cancel()  # which is told to nobody
        second = asyncio.create_task(served.shutdown(drain=False))
        await asyncio.sleep(0)
        gate.open()
        await second
        assert ends((await task)[-1]) == {"abort"}
        nothing_is_held(engine)

    run(serve())


def test_an_exception_in_the_block_aborts():
    async def serve():
        engine, gate = gated()
        with pytest.raises(ZeroDivisionError):
            async with stars.AsyncEngine(engine) as served:
                task = asyncio.create_task(collect(served.generate(*endless())))
                await gate.reached()
                raise ZeroDivisionError
        assert ends((await task)[-1]) == {"abort"}
        nothing_is_held(engine)

    run(serve())


def test_one_that_nobody_holds_ends():
    async def serve():
        served = stars.AsyncEngine(toy_engine(LM, RM))
        stream = served.generate(*asked(0))
        thread, gone = served._loop.thread, weakref.ref(served)
        del served
        gc.collect()
        assert gone() is not None and [decided((await collect(stream))[-1])] == alone([0])  # the stream holds it
        del stream
        gc.collect()
        assert gone() is None
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()

    run(serve())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_is_told_after_a_fork():
    """Its thread is its parent's; the engine itself goes on in both."""
    engine, gate = gated()
    served = stars.AsyncEngine(engine)
    gate.shut()

    async def begin():
        stream = await served.add(*endless())
        await gate.reached()
        return stream

    stream = run(begin())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            gate.open()
            told = 0
            for call in (lambda: served.add(*asked(0)), lambda: collect(stream)):
                try:
                    asyncio.run(call())
                except stars.EngineDeadError as error:
                    told += "the process was forked" in str(error)
            [output] = engine.generate(*asked(1), use_tqdm=False)
            engine.check_integrity()
            code = 0 if told == 2 and output.finished and not engine._requests else 2
        finally:
            os._exit(code)
    gate.open()
    deadline = time.monotonic() + 30
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if status == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status[1] == 0, "the child hangs or failed"
    assert run(collect(stream))[-1].finished
    run(served.shutdown())


SCRIPT = """
    import asyncio, os, signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are begun without
    sys.path.insert(0, {tests!r})
    import stars
    from toy import ToyModel, toy_engine

    def reward(prompt, responses):
        time.sleep(0.01)
        return [0.0] * len(responses)

    served = stars.AsyncEngine(toy_engine(ToyModel(23, 1), stars.FunctionReward(reward, inputs="ids")))

    async def main():
        stream = await served.add({{"prompt_token_ids": [1, 2]}}, stars.SamplingParams(max_tokens=80, ignore_eos=True),
                                  stars.STARS(1, 1, 1.0, reward_threshold=0.0))
        await anext(stream)
        {last}

    try:
        {run}
    except KeyboardInterrupt:
        print("interrupted")
"""


ENDS = {  # what is done last, how, and the exit code
    "exit": ("sys.exit(5)", "asyncio.run(main())", 5),
    "end": ("return stream", "kept = asyncio.run(main())", 0),
    "interrupt": ("os.kill(os.getpid(), signal.SIGINT); [output async for output in stream]", "asyncio.run(main())", 0),
}


def test_processes_end_with_requests_that_run():
    """Promptly, with their own exit codes, and no word of a thread that was killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STARS_NUM_THREADS": "1"}
    processes = {}
    for name, (last, run_it, _) in ENDS.items():
        source = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), last=last, run=run_it)
        processes[name] = subprocess.Popen([sys.executable, "-c", source], text=True, env=environment,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for name, process in processes.items():
        printed, errors = process.communicate(timeout=2 * LIMIT)
        assert process.returncode == ENDS[name][2] and not errors, (name, errors)
        assert printed.strip() == ("interrupted" if name == "interrupt" else "")


BESIDE = """
    import sys, threading, time
    sys.path.insert(0, {tests!r})
    import stars, torch
    from toy import ToyModel, toy_engine

    called = threading.Event()

    def reward(prompt, responses):
        called.set()
        until = time.monotonic() + 0.5
        while time.monotonic() < until:  # each gives the interpreter's lock away, and asks for it
            torch.zeros(1 << 16).add_(1)
        return [0.0] * len(responses)

    engine = toy_engine(ToyModel(5, 1), stars.FunctionReward(reward, inputs="ids", blocking=True))
    params = stars.SamplingParams(max_tokens=4)
    engine.add_request({{"prompt_token_ids": [1, 2]}}, params, stars.STARS(reward_threshold=1.0))
    while not called.is_set():
        engine.step()
"""


def test_a_process_ends_while_a_reward_is_inside_torch():
    """A thread that asks for the interpreter's lock too late is ended there, and with it the process, by code 134."""
    source = textwrap.dedent(BESIDE).format(tests=str(Path(__file__).parent))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STARS_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", source], text=True, env=environment, capture_output=True,
                           timeout=2 * LIMIT)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr


def test_an_engine_whose_rewards_came_late_is_collected():
    """The threads of those rewards, which wait for further ones, do not hold the last."""
    def serve_one() -> weakref.ref:
        engine = toy_engine(LM, stars.FunctionReward(lambda prompt, responses: table_reward_of(responses), inputs="ids",
                                                     blocking=True))
        served = stars.AsyncEngine(engine)
        assert run(collect(served.generate(*asked(0))))[-1].finished
        return weakref.ref(engine)

    gone, deadline = serve_one(), time.monotonic() + LIMIT
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None


def table_reward_of(responses):
    time.sleep(0.01)  # so that the engine waits
    return list(map(table_reward(3), responses))


def test_an_exit_does_not_wait_for_ever(monkeypatch):
    """For a round that does not end it waits so long and no longer."""
    monkeypatch.setattr(loop_module, "EXIT_SECONDS", 0.2)
    engine, gate = gated()
    served = stars.AsyncEngine(engine)
    gate.shut()
    stream = run(served.add(*endless()))
    assert gate.inside.wait(LIMIT)
    begin = time.monotonic()
    loop_module._end_all()
    assert 0.2 <= time.monotonic() - begin < LIMIT / 2 and served._loop.thread.is_alive()
    gate.open()
    loop_module._end_all()
    assert not served._loop.thread.is_alive()
    with contextlib.suppress(stars.EngineDeadError):
        assert ends(run(collect(stream))[-1]) == {"abort"}
    nothing_is_held(engine)
