"""Two models' prompts on two streams of a device: whatever order the device takes them in, the results are the same."""

from __future__ import annotations

import pytest

import recorded_gpu
import stars
from building import work_as
from stars.bindings import libstars
from stars.streams import SideStream
from stars.target import CPU
from test_scheduler import text
from toy import ToyModel, ids, toy_engine

needs_libstars = pytest.mark.skipif(not libstars.available(), reason="libstars is not built")
LM = ToyModel(vocab=29, seed=1, positions=192)
RM = ToyModel(vocab=29, seed=3, positions=192, head="reward", sharpness=1.5)
SIZES = dict(cache_tokens=2048, page_size=4, max_num_seqs=7, max_num_lanes=21, max_segment_size=8)
# Captured at their second run, and longer ones that are launched one by one; two that share their beginning.
LENGTHS = (20, 150, 20, 150, 60, 90)
PROMPTS = [{"prompt_token_ids": [*ids(length - 8, 29, length), *ids(8, 29, index)]}
           for index, length in enumerate(LENGTHS)]


def decode(engine: stars.Engine) -> list:
    """One that decodes, and the others beside it: tokens, and rewards up to their last bits."""
    policy = stars.STARS(8, 4, 0.5, 0.4, 1.0, width=2)
    params = [stars.SamplingParams(max_tokens=24, seed=seed, ignore_eos=True) for seed in range(len(PROMPTS))]
    names = [engine.add_request(PROMPTS[0], params[0], policy)]
    done = {output.request_id: output for output in engine.step()}
    names += [engine.add_request(prompt, own, policy) for prompt, own in zip(PROMPTS[1:], params[1:], strict=True)]
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    return [[(ids, reason, pytest.approx(reward, abs=1e-4)) for ids, reason, _, reward, *_ in text(done[name])]
            for name in names]


@needs_libstars
@pytest.mark.parametrize("quick", [lambda works: 0, lambda works: works - 1, None], ids=["slow", "quick", "any"])
def test_in_any_order_of_the_device(monkeypatch, quick):
    wanted = decode(toy_engine(LM, RM, **SIZES))
    gpu = recorded_gpu.install(monkeypatch)
    if quick is not None:
        gpu.stream.quick = quick
    engine = recorded_gpu.build(gpu, LM.decoder(), stars.CausalReward(RM.decoder()), max_num_batched_tokens=64, **SIZES)
    side, own = engine._scheduler._prefiller._side._stream, []
    assert side in gpu.streams.all and side is not gpu.stream
    give = side.give
    monkeypatch.setattr(side, "give", lambda work: (own.append(1), give(work))[1])
    before = gpu.replays
    for _ in range(3):
        assert decode(engine) == wanted
    assert gpu.replays > before and len(own) > 30


def test_two_streams_wait_for_one_another(monkeypatch):
    """The second piece sees what came before the first and nothing of the first; what comes after sees both."""
    gpu = recorded_gpu.install(monkeypatch)
    side, done = SideStream(recorded_gpu.TARGET), []

    def give(name: str):
        return lambda: gpu.streams.give(lambda: done.append(name))

    for slow in (gpu.stream, side._stream):
        for stream in gpu.streams.all:
            stream.quick = (lambda works: 0) if stream is slow else (lambda works: works - 1)
        done.clear()
        give("before")()
        side.side_by_side(give("first"), give("second"))
        give("after")()
        gpu.streams.synchronize()
        assert done[0] == "before" and done[3] == "after" and {*done[1:3]} == {"first", "second"}
        if slow is side._stream:
            assert done[1:3] == ["first", "second"]
    with pytest.raises(KeyError):
        side.side_by_side(give("first"), lambda: {}["second"])
    give("after")()
    assert gpu.streams.current is gpu.stream


def test_a_device_with_one_order_has_one(monkeypatch):
    done = []
    SideStream(CPU).side_by_side(lambda: done.append(1), lambda: done.append(2))
    assert done == [1, 2]


def test_one_decoder_that_is_both_models_is_not_run_beside_itself(monkeypatch):
    """Its buffers are there once. Callables say nothing of what they run, and take the usual stream."""
    work_as(monkeypatch, CPU)
    both = ToyModel(vocab=29, seed=1, positions=192).decoder()
    both.score_head = RM.decoder().score_head
    rewards = {"apart": stars.CausalReward(RM.decoder()), "one": stars.CausalReward(both),
               "a callable": stars.FunctionReward(lambda prompt, responses: [0.0 for _ in responses], inputs="ids")}
    sides = {name: stars.Engine(both, reward, **SIZES)._scheduler._prefiller._side for name, reward in rewards.items()}
    assert [name for name, side in sides.items() if side is not None] == ["apart"]
