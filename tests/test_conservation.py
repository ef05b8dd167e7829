"""Nothing leaks: after any sequence of requests, steps, aborts and failures every page and slab is accounted for."""

from __future__ import annotations

import gc
import math
import tracemalloc
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import stars
from stars.exhaustions import BackUp, Relax
from toy import Digits, ToyModel, facts, ids, table_reward, toy_engine

LM = ToyModel(vocab=5, seed=1, layers=1, positions=96)
RM = ToyModel(vocab=5, seed=3, layers=1, positions=96, head="reward", sharpness=1.5)
REWARD = table_reward(seed=3)
BASES = [ids(30, seed=seed) for seed in range(3)]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def stepped_through_interrupts(engine: stars.Engine) -> stars.RequestOutput:
    """The output of the one request there is, stepped on after every KeyboardInterrupt, with books that balance."""
    while True:
        try:
            finished = [output for output in engine.step() if output.finished]
        except KeyboardInterrupt:
            engine.check_integrity()
            continue
        if finished:
            return finished[0]


def nothing_is_held(engine: stars.Engine) -> None:
    """What must be true once no request is left."""
    engine.check_integrity()
    assert not engine._requests and not engine._scheduler.running and not engine._scheduler.waiting
    assert not engine._changed and not engine._changing and not engine._orphans
    assert engine._scheduler._fairness.plain and not engine._scheduler._fairness._served
    caches = [engine._cache] + ([engine.reward.cache] if isinstance(engine.reward, stars.CausalReward) else [])
    for cache in caches:
        assert cache.num_free_pages == cache.num_pages, "pages are held"
        assert cache.num_free_slabs == cache.num_slabs, "slabs are held"
        assert not cache._tables


class Trouble:
    """A reward function that does what it is told once, and then behaves."""

    def __init__(self):
        self.next: str | None = None

    def __call__(self, prompt, responses):
        trouble, self.next = self.next, None
        rewards = [REWARD(response) for response in responses]
        if trouble == "raise":
            raise RuntimeError("the reward fell over")
        if trouble == "interrupt":
            raise KeyboardInterrupt
        if trouble == "count":
            return rewards + [0.0]
        if trouble == "nan":
            return [math.nan] * len(rewards)
        if trouble == "-inf":
            return [-math.inf] * len(rewards)
        if trouble == "+inf":
            return [math.inf] * len(rewards)
        if trouble == "text":
            return ["good"] * len(rewards)
        return rewards


POLICIES = st.one_of(
    st.builds(stars.STARS, segment_size=st.integers(1, 8), max_attempts=st.integers(1, 7),
              alpha=st.sampled_from([0.0, 0.5, 1.0]), beta=st.sampled_from([0.0, 0.5]),
              reward_threshold=st.sampled_from([-math.inf, 0.5, 2.0, math.inf]),
              width=st.sampled_from([None, 1, 2, 3, 8]),
              exhaust=st.sampled_from(["best_seen", "last", "softmax", Relax(0.4, 2, "refuse"), BackUp(2, "first"),
                                       Relax(0.2, 1, BackUp(3, "refuse"))])),
    st.builds(stars.CARDS, entropy_threshold=st.sampled_from([0.0, 1.2, 1.5]), min_segment=st.integers(1, 3),
              max_segment=st.integers(3, 8), max_attempts=st.integers(1, 5),
              reward_threshold=st.sampled_from([0.5, 2.0]), width=st.sampled_from([None, 1, 3])),
    st.builds(stars.STARS, segment_size=st.integers(1, 8), max_attempts=st.integers(1, 4), beta=st.just(0.5),
              reward_threshold=st.sampled_from([0.5, math.inf]), barrier=st.just(True)),
    st.builds(stars.Sample, score=st.booleans()),
    st.builds(stars.BestOfN, n=st.integers(1, 4), temperature=st.sampled_from([0.0, 0.5])),
    st.builds(stars.BlockwiseBestOfK, k=st.sampled_from([1, 3, 4, (4, 2, 1)]), segment_size=st.integers(1, 8)),
    st.builds(stars.RejectionSampling, st.sampled_from([-math.inf, 0.5, 2.0, math.inf]), st.sampled_from([0.0, 0.5]),
              st.integers(1, 5), st.sampled_from([None, 1, 2, 8]),
              st.sampled_from(["best_seen", "last", "softmax", "relax:0.5", "refuse"])),
    st.builds(stars.SpeculativeRejection, st.integers(1, 4), st.sampled_from([0.0, 0.4, 0.8]), st.integers(1, 8)),
    st.builds(stars.SegmentBeam, st.integers(1, 3), st.integers(1, 3), st.integers(1, 8)),
    st.builds(stars.ParticleFilter, st.integers(1, 4), st.sampled_from([0.1, 1.0]), st.integers(1, 8),
              st.sampled_from(["multinomial", "systematic"]), st.sampled_from(["best", "sample"])),
    st.builds(stars.ARGS, topk=st.integers(1, 14), method=st.sampled_from(["greedy", "stochastic"])),
    st.builds(stars.RAD, topk=st.integers(1, 4)),
    st.builds(stars.PersonaJudge, st.sampled_from(["", "41", "3241"]), st.sampled_from(["", "32414"]),
              st.integers(1, 6), st.booleans(), st.booleans()),
)
PARAMS = st.builds(
    stars.SamplingParams, max_tokens=st.integers(1, 24), n=st.integers(1, 3), seed=st.integers(0, 99),
    temperature=st.sampled_from([0.0, 1.0]), ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([None, [2]]), top_k=st.sampled_from([0, 0, 3]))


BUDGETS = st.one_of(st.none(), st.none(), st.builds(
    stars.Budget, st.sampled_from([None, 1e-4, 0.01, 100.0]), *[st.sampled_from([None, 1, 3, 9, 30])] * 3))
ORDER = dict(priority=st.sampled_from([0, 0, 0, 1, -2]), user=st.sampled_from([None, None, "a", "b"]), budget=BUDGETS)


@contextmanager
def fitting():
    """Populations that the cache cannot hold are refused, and texts that nothing encodes; nothing is changed."""
    try:
        yield
    except stars.RequestError as error:
        assert "do not fit cache_tokens=96" in str(error) or "no tokenizer.json to read it with" in str(error)


class Traffic(RuleBasedStateMachine):
    """Submits, steps, aborts, fails and interrupts in any order. The cache holds three or four requests at a time."""

    @initialize(kind=st.sampled_from(["causal", "function", "blocking"]), rows=st.sampled_from([None, 5]))
    def build(self, kind, rows):
        self.trouble = Trouble()
        self.causal = causal = kind == "causal"
        reward = stars.CausalReward(RM.decoder()) if causal else stars.FunctionReward(
            self.trouble, inputs="ids", blocking=kind == "blocking")
        self.engine = toy_engine(LM, reward, cache_tokens=96, page_size=4, max_num_seqs=8, max_num_lanes=12,
                                 max_segment_size=16, max_num_batched_tokens=rows,
                                 tokenizer=None if causal else Digits())
        self.open: set[str] = set()

    @rule(base=st.sampled_from(BASES), length=st.integers(1, 30), params=PARAMS, policy=POLICIES, **ORDER)
    def submit(self, base, length, params, policy, **order):
        with fitting():
            self.open.add(self.engine.add_request({"prompt_token_ids": base[:length]}, params, policy, **order))

    @rule(length=st.integers(90, 120))
    def submit_too_long(self, length):
        with pytest.raises(stars.RequestError):
            self.engine.add_request({"prompt_token_ids": ids(length)}, stars.SamplingParams(max_tokens=20))

    @rule(count=st.integers(1, 4))
    def step(self, count):
        for _ in range(count):
            self.collect(self.engine.step())

    @rule(trouble=st.sampled_from(["raise", "count", "nan", "-inf", "+inf", "text"]))
    def step_in_trouble(self, trouble):
        self.trouble.next = trouble
        self.collect(self.engine.step())
        self.trouble.next = None

    @rule(where=st.sampled_from(["reward", "draft", "prefill", "commit"]))
    def interrupt(self, where):
        holders = {"reward": None, "draft": (self.engine._round.drafter, "draft"),
                   "prefill": (self.engine._models.own.passes, "prefill"), "commit": (self.engine._cache, "commit")}
        if where == "reward" and self.causal:
            holders["reward"] = (self.engine.reward, "score")
        holder = holders[where]
        if holder is None:
            self.trouble.next = "interrupt"
        else:
            def interrupted(*args):
                raise KeyboardInterrupt
            setattr(holder[0], holder[1], interrupted)
        try:
            self.collect(self.engine.step())
        except KeyboardInterrupt:
            pass
        finally:
            self.trouble.next = None
            if holder is not None:
                delattr(*holder)

    @rule(index=st.integers(0, 99))
    def abort(self, index):
        """What is drawn here must not depend on how far requests are: that is a matter of timings."""
        if not self.open:
            return
        request_id = sorted(self.open)[index % len(self.open)]
        runs = request_id in self.engine._requests
        assert self.engine.abort(request_id) == runs
        assert not self.engine.abort(request_id)

    @rule(base=st.sampled_from(BASES), params=PARAMS, policy=POLICIES, looks=st.integers(0, 2), **ORDER)
    def stream(self, base, params, policy, looks, **order):
        with fitting():
            stream = self.engine.stream({"prompt_token_ids": base[:9]}, params, policy, **order)
            for _, _ in zip(range(looks), stream):
                pass
            stream.close()

    @rule(params=PARAMS, policy=POLICIES, **ORDER)
    def generate(self, params, policy, **order):
        with fitting():
            outputs = self.engine.generate([{"prompt_token_ids": BASES[0][:9]}] * 2, params, policy, use_tqdm=False,
                                           **order)
            assert all(output.finished for output in outputs)
            for output in outputs if order["budget"] is not None else ():
                metrics, budget = output.metrics, order["budget"]
                assert metrics.attempts <= (budget.attempts or math.inf)
                assert metrics.lm_tokens_drawn <= (budget.lm_tokens or math.inf)
                assert metrics.rm_calls <= (budget.rm_calls or math.inf)

    @rule(policy=POLICIES)
    def generate_interrupted(self, policy):
        self.trouble.next = "interrupt"
        try:
            with fitting():
                self.engine.generate({"prompt_token_ids": BASES[1][:9]}, stars.SamplingParams(max_tokens=9), policy,
                                     use_tqdm=False)
        except KeyboardInterrupt:
            pass
        self.trouble.next = None

    @invariant()
    def books_balance(self):
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def collect(self, outputs):
        for output in outputs:
            assert output.request_id in self.open, "an output that nobody asked for"
            if output.finished:
                self.open.discard(output.request_id)
                for completion in output.outputs:
                    assert completion.finish_reason in ("stop", "length", "abort", "error", "refused", "deadline",
                                                        "budget")
                    assert (completion.error is not None) == (completion.finish_reason == "error")

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_unfinished_requests():
                break
            self.collect(self.engine.step())
        assert not self.open, "a request never ended"
        nothing_is_held(self.engine)


TestTraffic = pytest.mark.filterwarnings("ignore:reward_threshold")(Traffic.TestCase)
TestTraffic.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True, database=None,
    phases=(Phase.generate,), suppress_health_check=list(HealthCheck))  # shrinking would take minutes


@pytest.mark.slow
def test_long_traffic():
    """The same machine for much longer, from fresh random choices."""
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Traffic, settings=settings(
        max_examples=400, stateful_step_count=60, deadline=None, derandomize=False, database=None,
        suppress_health_check=list(HealthCheck)))


@pytest.mark.parametrize("where", ["reward", "prompt reward", "final reward", "draft"])
def test_after_an_interrupt_the_text_is_the_same(where):
    """An interrupted step never happened: what follows is what would have come without it."""
    policy = stars.Sample(score=True) if where == "final reward" else stars.STARS(3, 6, 0.5, 0.3, 1.5, 2)
    params = stars.SamplingParams(max_tokens=14, n=3, seed=4)
    calls = []

    def fn(prompt, responses):
        calls.append(1)
        if len(calls) in interrupted:
            raise KeyboardInterrupt
        return [REWARD(response) for response in responses]

    def run(engine):
        engine.add_request({"prompt_token_ids": BASES[0][:9]}, params, policy)
        return stepped_through_interrupts(engine)

    interrupted: set[int] = set()
    engine = toy_engine(LM, stars.FunctionReward(fn, inputs="ids"))
    whole = run(engine)
    calls.clear()
    interrupted = {1} if where in ("prompt reward", "final reward") else {2, 3, 6, 11} if where == "reward" else set()
    engine = toy_engine(LM, stars.FunctionReward(fn, inputs="ids"))
    if where == "draft":
        draft, drafts = engine._round.drafter.draft, []

        def drafting(specs):
            drafts.append(1)
            if len(drafts) in (1, 3, 4):
                raise KeyboardInterrupt
            return draft(specs)

        engine._round.drafter.draft = drafting
    broken = run(engine)
    assert facts(broken) == facts(whole)
    for one, other in zip(whole.outputs, broken.outputs, strict=True):
        assert one.metrics.accept_rate == other.metrics.accept_rate
    assert broken.prompt_reward == whole.prompt_reward
    nothing_is_held(engine)


def test_requests_beyond_the_cache_wait_their_turn():
    """A queue of ten times the cache drains in order, and what is running is never more than fits."""
    engine = toy_engine(LM, stars.CausalReward(RM.decoder()), cache_tokens=96, max_num_seqs=8)
    policy = stars.STARS(4, 3, reward_threshold=1.0)
    order = [engine.add_request({"prompt_token_ids": ids(20, seed=seed)},
                                stars.SamplingParams(max_tokens=20, seed=seed), policy) for seed in range(24)]
    started: list[str] = []
    while engine.has_unfinished_requests():
        engine.step()
        engine.check_integrity()
        running = [unit.request.request_id for unit in engine._scheduler.running]
        assert len(running) <= 4  # 5 of 24 pages for the prompt, and at least one for a segment
        started += [request_id for request_id in running if request_id not in started]
    assert started == [request_id for request_id in order if request_id in started]
    nothing_is_held(engine)


def test_nothing_grows():
    """200 requests leave no memory behind: caches of text, of graphs, of prefixes are bounded."""
    engine = toy_engine(LM, stars.CausalReward(RM.decoder()), cache_tokens=512)

    def traffic(first: int) -> None:
        for seed in range(first, first + 25):
            prompt = {"prompt_token_ids": ids(5 + seed % 20, seed=seed)}
            params = stars.SamplingParams(max_tokens=8, seed=seed)
            engine.generate(prompt, params, stars.STARS(4, 3, reward_threshold=1.0, width=2), use_tqdm=False)

    for index in range(4):
        traffic(25 * index)
    gc.collect()
    tracemalloc.start()
    try:
        traffic(0)
        gc.collect()
        before, objects = tracemalloc.get_traced_memory()[0], len(gc.get_objects())
        for index in range(1, 9):
            traffic(25 * index)
        gc.collect()
        after, objects_after = tracemalloc.get_traced_memory()[0], len(gc.get_objects())
    finally:
        tracemalloc.stop()
    # A request that stayed would be 10 kB and 50 objects or more, 200 of them 2 MB and 10000.
    assert after - before < 400_000, f"{after - before} bytes stayed"
    assert objects_after - objects < 1500, f"{objects_after - objects} objects stayed"
    nothing_is_held(engine)


def test_an_interrupt_in_the_reward_models_passes_leaves_no_slab():
    """Slabs of candidates that were about to be scored, pages of prompts that were about to be read."""
    engine = toy_engine(LM, stars.CausalReward(RM.decoder()))
    [whole] = engine.generate({"prompt_token_ids": BASES[0][:9]}, stars.SamplingParams(max_tokens=14, seed=4),
                              stars.STARS(3, 6, 0.5, 0.3, 1.5, 2), use_tqdm=False)
    for name in ("score", "prefill"):
        for call in range(1, 5):
            passes, calls = engine.reward._passes, []
            right = getattr(passes, name)

            def interrupted(*args, right=right, calls=calls, call=call):
                calls.append(1)
                if len(calls) == call:
                    raise KeyboardInterrupt
                return right(*args)

            setattr(passes, name, interrupted)
            engine.add_request({"prompt_token_ids": BASES[0][:9]}, stars.SamplingParams(max_tokens=14, seed=4),
                               stars.STARS(3, 6, 0.5, 0.3, 1.5, 2))
            outputs = []
            while engine.has_unfinished_requests():
                try:
                    outputs += engine.step()
                except KeyboardInterrupt:
                    engine.check_integrity()
            delattr(passes, name)
            assert outputs[-1].outputs[0].token_ids == whole.outputs[0].token_ids
            nothing_is_held(engine)
