"""Any thread may call an engine, one at a time; a reward may not call the engine that asks it; a child may after a
fork."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time

import pytest

import stars
from test_invariance import decided
from toy import ids, table_reward, toy_engine, toy_pair

LM, RM = toy_pair(23, (1, 3))
POLICY = stars.STARS(4, 4, 0.5, 0.3, 1.0, 2)


def asked(seed: int) -> tuple:
    return ({"prompt_token_ids": ids(7 + seed % 5, 23, seed)}, stars.SamplingParams(max_tokens=20, seed=seed, n=2),
            POLICY)


def run_all(*calls) -> list:
    """The results of the calls, each made in a thread of its own; what one raised is raised here."""
    results: list = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread waits for ever"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def generate(engine: stars.Engine, seeds) -> list:
    outputs = engine.generate(*map(list, zip(*map(asked, seeds), strict=True)), use_tqdm=False)
    return [decided(output) for output in outputs]


def alone(seeds) -> list:
    return generate(toy_engine(LM, RM), seeds)


def test_threads_that_generate_get_their_own_texts():
    engine = toy_engine(LM, RM)
    shares = [range(4 * index, 4 * index + 4) for index in range(4)]
    for _ in range(3):
        results = run_all(*(lambda share=share: generate(engine, share) for share in shares))
        assert results == [alone(share) for share in shares]
    engine.check_integrity()
    assert not engine.has_unfinished_requests()


def test_every_call_is_safe_beside_the_others():
    engine = toy_engine(LM, RM)
    wanted = alone(range(3))
    stepped: dict[str, list] = {}
    stop = threading.Event()

    def stream():
        prompt, params, policy = asked(2)
        for output in engine.stream(prompt, params, policy):
            pass
        return [decided(output)]

    def step():
        mine = engine.add_request(*asked(1))
        while mine not in stepped:
            stepped.update({output.request_id: decided(output) for output in engine.step() if output.finished})
        return [stepped[mine]]

    def abort():
        count = 0
        while not stop.is_set():
            request_id = engine.add_request(*asked(50))
            count += engine.abort(request_id)  # False where the rounds of others have ended it by now
            engine.check_integrity()
            time.sleep(0.001)
        return count

    def calibrate():
        return engine.calibrate([asked(0)[0]], stars.SamplingParams(max_tokens=8, seed=5), num_samples=4)

    def work():
        try:
            return run_all(lambda: generate(engine, [0]), step, stream, calibrate)
        finally:
            stop.set()

    (first, second, third, threshold), aborted = run_all(work, abort)
    assert [*first, *second, *third] == wanted
    other = toy_engine(LM, RM)
    assert threshold == other.calibrate([asked(0)[0]], stars.SamplingParams(max_tokens=8, seed=5), num_samples=4)
    assert aborted > 0
    while engine.has_unfinished_requests():
        engine.step()
    engine.check_integrity()


def test_a_short_call_does_not_wait_for_a_long_one():
    """Threads take turns round by round: an added request joins the batch, and its caller is served in between."""
    engine = toy_engine(LM, stars.FunctionReward(lambda prompt, responses: [time.sleep(0.002) or 0.0] * len(responses),
                                                 inputs="ids"))
    ends: list[str] = []

    def call(name: str, tokens: int):
        engine.generate({"prompt_token_ids": ids(5, 23)}, stars.SamplingParams(max_tokens=tokens, ignore_eos=True),
                        stars.STARS(1, 1, 1.0, reward_threshold=0.0), use_tqdm=False)
        ends.append(name)

    def later():
        time.sleep(0.02)
        call("short", 2)

    run_all(lambda: call("long", 80), later)
    assert ends == ["short", "long"]


def test_asyncio_to_thread():
    engine = toy_engine(LM, RM)

    async def both():
        return await asyncio.gather(asyncio.to_thread(generate, engine, [0, 1]),
                                    asyncio.to_thread(generate, engine, [2]))

    assert asyncio.run(both()) == [alone([0, 1]), alone([2])]


@pytest.mark.parametrize("share", ["nothing", "the model", "the reward model"])
def test_two_engines_in_two_threads(share):
    """Each records programs of its own; those that share a model, and with it its workspace, take turns."""
    lm, rm = LM.decoder(), RM.decoder()
    engines = [toy_engine(LM, stars.CausalReward(rm if share == "the reward model" else RM.decoder()))
               for _ in range(2)]
    if share == "the model":
        engines = [stars.Engine(lm, stars.CausalReward(RM.decoder()), cache_tokens=4096, page_size=4,
                                max_num_seqs=16, max_num_lanes=64, max_segment_size=16) for _ in range(2)]
    wanted = [alone([0, 1]), alone([2, 3])]
    for _ in range(3):
        assert run_all(lambda: generate(engines[0], [0, 1]), lambda: generate(engines[1], [2, 3])) == wanted


@pytest.mark.parametrize("call", ["generate", "stream", "calibrate", "add_request", "step", "abort"])
def test_a_reward_cannot_call_its_engine(call):
    prompt, params, _ = asked(0)
    calls = {"generate": lambda: engine.generate(prompt, params, use_tqdm=False),
             "stream": lambda: list(engine.stream(prompt, params)),
             "calibrate": lambda: engine.calibrate([prompt], params),
             "add_request": lambda: engine.add_request(prompt, params),
             "step": lambda: engine.step(), "abort": lambda: engine.abort("0")}
    refusals: list[str] = []

    def reward(prompt, responses):
        if not refusals:
            try:
                calls[call]()
            except stars.RequestError as error:
                refusals.append(str(error))
        return list(map(table_reward(3), responses))

    engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids"))
    got = generate(engine, [0, 1])
    assert refusals == ["the engine is at work in this thread: a reward cannot call the engine that asked it, give it "
                        "an engine of its own"]
    quiet = toy_engine(LM, stars.FunctionReward(
        lambda prompt, responses: list(map(table_reward(3), responses)), inputs="ids"))
    assert got == generate(quiet, [0, 1])
    engine.check_integrity()


def test_a_reward_may_call_another_engine():
    judge = toy_engine(LM, RM)

    def reward(prompt, responses):
        return [judge.generate({"prompt_token_ids": [*prompt, *response]}, stars.SamplingParams(max_tokens=1, seed=1),
                               stars.Sample(score=True), use_tqdm=False)[0].outputs[0].reward
                for response in responses]

    engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids"))
    assert [output.outputs[0].error for output in engine.generate(*asked(0), use_tqdm=False)] == [None]


def test_streams_of_many_threads_end_with_their_whole_text():
    """An output is a snapshot: no round of another thread falls into it."""
    engine = toy_engine(LM, RM)
    wanted = {seed: alone([seed])[0] for seed in range(4)}

    def stream(seed: int) -> list:
        prompt, params, policy = asked(seed)
        outputs = []
        for _ in range(12):
            outputs.append(list(engine.stream(prompt, params, policy))[-1])
        return outputs

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        results = run_all(*(lambda seed=seed: stream(seed) for seed in wanted))
    finally:
        sys.setswitchinterval(interval)
    for seed, outputs in zip(wanted, results, strict=True):
        assert all(output.finished and decided(output) == wanted[seed] for output in outputs)


def test_a_stream_that_is_collected_during_a_turn_waits_for_nobody():
    """Its finaliser runs wherever memory is allocated: in the engine's own thread, or where that one waits for it."""
    engine = toy_engine(LM, stars.FunctionReward(lambda prompt, responses: forget(responses), inputs="ids"))
    left: list = []

    def forget(responses):
        left.clear()  # the last reference to a stream of this engine
        return [0.0] * len(responses)

    stream = engine.stream(*asked(0))
    next(stream)
    left.append(stream)
    del stream
    engine.generate({"prompt_token_ids": ids(5, 23)}, stars.SamplingParams(max_tokens=6, seed=1),
                    stars.STARS(2, 2, 1.0, reward_threshold=0.0), use_tqdm=False)
    assert not left
    while engine.has_unfinished_requests():
        engine.step()
    engine.check_integrity()
    assert engine._cache.num_free_pages == engine._cache.num_pages

    other = engine.stream(*asked(1))
    next(other)
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with engine._turns._locks[0]:
            inside.set()
            go_on.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    other.close()  # while it is another thread's turn
    go_on.set()
    thread.join(30)
    engine.step()
    assert not engine.has_unfinished_requests()
    engine.check_integrity()


def test_a_stream_gets_another_id_if_its_own_was_taken_meanwhile():
    engine = toy_engine(LM)
    prompt, params, _ = asked(0)
    stream = engine.stream(prompt, params)
    taken = engine.add_request(prompt, params, request_id="0")
    outputs = list(stream)
    assert outputs[-1].finished and outputs[-1].request_id != taken == "0"


def test_a_reward_model_belongs_to_one_engine():
    reward = stars.CausalReward(RM.decoder())
    engine = toy_engine(LM, reward)
    with pytest.raises(stars.RewardError, match="this CausalReward belongs to another engine"):
        toy_engine(LM, reward)
    first = generate(engine, [0])
    del engine
    assert generate(toy_engine(LM, reward), [0]) == first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_goes_on_after_a_fork():
    """Also where another thread was in a round when it was made: that round never happened in the child."""
    inside, go_on = threading.Event(), threading.Event()

    def reward(prompt, responses):
        inside.set()
        go_on.wait(30)
        return list(map(table_reward(3), responses))

    engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids"))
    thread = threading.Thread(target=lambda: generate(engine, [0]), daemon=True)
    thread.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            go_on.set()
            [output] = engine.generate(*asked(1), use_tqdm=False)
            engine.check_integrity()
            code = 0 if output.outputs[0].error is None and output.finished else 2
        finally:
            os._exit(code)
    go_on.set()
    thread.join(30)
    deadline = time.monotonic() + 30
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if status == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status[1] == 0, "the child hangs or failed"
