"""What is done where a rule decides nothing: the engine against the oracle, and what a segment taken back leaves.

The oracle (oracle.py) keeps no cache and draws one attempt at a time. A wrong row in the pages of either model after an
attempt without a slab was kept, or after a segment was taken back, would move log-probabilities and rewards by far more
than the rounding (2e-4, as in test_oracle.py); soon the tokens would differ too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

import stars
from building import PADDED, work_as
from stars.exhaustions import BackUp, BestSeen, Exhaustion, First, Last, Refuse, Relax, Softmax
from stars.plan import Fixed, Lanes, Plan, Sampled, Score, Whole
from stars.rules import Decision, Judged, State
from test_conservation import nothing_is_held, stepped_through_interrupts
from test_oracle import FUNCTION, LM, RM, TOLERANCE, equals_oracle, rejecting
from toy import facts, ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT = {"prompt_token_ids": ids(6, seed=2)}
CASES = {
    "first": dict(segment_size=3, max_attempts=5, beta=0.1, reward_threshold=3.0, exhaust="first"),
    "last": dict(segment_size=3, max_attempts=5, beta=0.1, reward_threshold=3.0, exhaust="last"),
    "softmax": dict(segment_size=3, max_attempts=5, beta=0.1, reward_threshold=3.0, exhaust=Softmax(0.6)),
    "relax": dict(segment_size=2, max_attempts=6, beta=1.0, reward_threshold=6.0, exhaust=Relax(1.0, 3, "last")),
    "back up": dict(segment_size=2, max_attempts=2, beta=0.3, reward_threshold=2.5, exhaust=BackUp(2)),
    "back up again and again": dict(segment_size=1, max_attempts=2, alpha=0.0, beta=0.1, reward_threshold=4.0,
                                    exhaust=BackUp(9, Softmax(0.5))),
    "relax, back up, refuse": dict(segment_size=2, max_attempts=2, beta=0.2, reward_threshold=2.5,
                                   exhaust=Relax(0.3, 2, BackUp(3, Refuse()))),
    "back up, relax": dict(segment_size=2, max_attempts=3, beta=0.1, reward_threshold=2.5,
                           exhaust=BackUp(3, Relax(0.3, 2, "last"))),
    "refuse": dict(segment_size=2, max_attempts=4, beta=0.3, reward_threshold=2.0, exhaust="refuse"),
}
OTHERS = {  # SamplingParams of a case
    "back up": dict(ignore_eos=True), "back up again and again": dict(ignore_eos=True, repetition_penalty=1.3),
    "relax, back up, refuse": dict(ignore_eos=True), "refuse": dict(stop_token_ids=[2]),
}


class Counted:
    """What an engine did besides: segments that were taken back, rows of winners that had no slab."""

    def __init__(self, monkeypatch):
        self.taken_back: list[int] = []
        self.read_again = 0
        take_back, append = stars.request.Hypothesis.take_back, stars.request.Hypothesis.append

        def counting(hypothesis):
            self.taken_back.append(len(hypothesis.segments))
            take_back(hypothesis)

        def looking(hypothesis, winner):
            self.read_again += winner.finish_reason is None and not winner.rows
            append(hypothesis, winner)

        monkeypatch.setattr(stars.request.Hypothesis, "take_back", counting)
        monkeypatch.setattr(stars.request.Hypothesis, "append", looking)


def run_cases(reward, width: int | None, of: Callable[[str], Callable], **options) -> dict[str, stars.RequestOutput]:
    """All cases in one batch, compared with the oracle; `of` gives the reward of a case's responses."""
    engine = toy_engine(LM, reward, max_num_seqs=64, max_num_lanes=256, **options)
    policies = [stars.STARS(**case, width=width) for case in CASES.values()]
    params = [stars.SamplingParams(**dict(max_tokens=12, n=3, seed=50 + index) | OTHERS.get(name, {}))
              for index, name in enumerate(CASES)]
    prompts = [{"prompt_token_ids": ids(6 + index, seed=index)} for index in range(len(CASES))]
    outputs = engine.generate(prompts, params, policies, use_tqdm=False)
    for name, output, policy, sampling in zip(CASES, outputs, policies, params, strict=True):
        equals_oracle(output, LM, of(name, output.prompt_token_ids), policy, sampling)
    nothing_is_held(engine)
    return dict(zip(CASES, outputs, strict=True))


@pytest.mark.parametrize("width", [1, 3])
def test_a_function(width, monkeypatch):
    """All of the loop: which attempt is kept, at which threshold, which numbers a segment is drawn anew with."""
    counted = Counted(monkeypatch)
    rewards = {tuple(ids(6 + index, seed=index)): rejecting if name == "softmax" else FUNCTION
               for index, name in enumerate(CASES)}
    reached = run_cases(stars.FunctionReward(
        lambda prompt, responses: [rewards[tuple(prompt)](response) for response in responses], inputs="ids"), width,
        lambda name, prompt: rewards[tuple(prompt)])
    assert len(counted.taken_back) > 20 and max(counted.taken_back) > 3, counted.taken_back
    ends = {name: [one.finish_reason for one in output.outputs] for name, output in reached.items()}
    assert "refused" in ends["refuse"] and "refused" in ends["relax, back up, refuse"], ends
    segments = {name: [segment for one in output.outputs for segment in one.segments]
                for name, output in reached.items()}
    assert {segment.relaxed for segment in segments["relax"]} > {0, 1}
    assert any(segment.winner not in (0, 4) and not segment.accepted for segment in segments["softmax"])


@pytest.mark.parametrize("target", [None, PADDED], ids=["CPU", "as a GPU works"])
@pytest.mark.parametrize("width", [1, 4])
def test_a_reward_model(width, target, monkeypatch):
    """Its pages, too: of attempts that had given their slabs back, and of segments that were taken back."""
    if target is not None:
        work_as(monkeypatch, target)
    counted = Counted(monkeypatch)
    run_cases(stars.CausalReward(RM.decoder()), width,
              lambda name, prompt: lambda response: RM.reward(prompt + response))
    assert len(counted.taken_back) > 10, counted.taken_back
    assert counted.read_again > 0 or width > 1


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("other", [False, True], ids=["same tokenizer", "another tokenizer"])
def test_models_from_files(other, deterministic, tiny_model, monkeypatch):
    """The text is the same at any width and in pages that are scarce, the reward that of the text that is left."""
    counted = Counted(monkeypatch)
    lm = tiny_model(family="llama", tokenizer=True, chat_template=True)
    rm = tiny_model(tokenizer=True, chat_template=True, head="reward", tokenizer_seed=int(other))
    params = [stars.SamplingParams(max_tokens=14, n=2, seed=seed, ignore_eos=True) for seed in (1, 2)]
    prompts = ["The dog sleeps", "A quick brown fox jumps over"]

    def run(width: int, cache_tokens: int, threshold: float):
        engine = stars.Engine(str(lm), stars.CausalReward(str(rm)), cache_tokens=cache_tokens, page_size=4,
                              deterministic=deterministic, max_model_len=64, max_num_lanes=8, max_num_seqs=4)
        policies = [stars.STARS(3, 3, 1.0, 0.05, threshold, width, exhaust) for exhaust in (
            BackUp(4, Softmax(0.1)), BackUp(2, Relax(0.1, 2, "first")))]
        outputs = engine.generate(prompts, params, policies, use_tqdm=False)
        nothing_is_held(engine)
        plain = engine.generate(prompts, params, stars.Sample(score=True), use_tqdm=False)
        return outputs, sorted(one.reward for output in plain for one in output.outputs)[-1]

    _, threshold = run(2, 1024, 0.0)
    roomy, _ = run(1, 1024, threshold)
    assert len(counted.taken_back) > 4
    scarce, _ = run(3, 256 if other else 96, threshold)
    for one, same in zip(roomy, scarce, strict=True):
        for first, second in zip(one.outputs, same.outputs, strict=True):
            assert (first.text, first.finish_reason, first.error) == (second.text, second.finish_reason, None)
            assert first.reward == (second.reward if deterministic else pytest.approx(second.reward, abs=TOLERANCE))
    engine = stars.Engine(str(lm), stars.CausalReward(str(rm)), cache_tokens=1024, page_size=4, max_model_len=64)
    for prompt, output in zip(prompts, roomy, strict=True):
        for completion in output.outputs:  # scored from scratch: a response of its own, one segment, which is kept
            again = rescored(engine, prompt, completion.token_ids)
            assert completion.reward == pytest.approx(again, abs=TOLERANCE)


def rescored(engine: stars.Engine, prompt: str, token_ids: Sequence[int]) -> float:
    """The reward of a response, in a session of its own."""
    reward, text = engine.reward, engine.tokenizer.decode(list(token_ids))
    parsed = stars.prompt.parse_prompt(prompt, engine.tokenizer, 1 << 20)
    session = reward.open(parsed, 32)
    reward.start([session])
    [scored] = reward.score([stars.reward.base.Candidate(session, list(token_ids), text)])
    reward.discard(scored.handle)
    reward.close(session)
    return scored.reward


# -- what is taken back, and what stops it ------------------------------------------------------------------------

BACKING = stars.STARS(2, 2, 1.0, 0.3, 0.6, 2, BackUp(6, Softmax(0.5)))


def backing_params(seed: int = 7) -> stars.SamplingParams:
    return stars.SamplingParams(max_tokens=16, n=3, seed=seed, ignore_eos=True)


def told(output: stars.RequestOutput) -> list:
    """What two runs must agree on, but for last bits; metrics without times."""
    apart = ("num_preemptions", "prompt_tokens_cached", "rm_tokens_cached")
    metrics = [{name: value for name, value in vars(one.metrics).items() if not name.endswith("seconds")
                and name not in apart} for one in output.outputs]
    return [[(one.token_ids, one.finish_reason, [(s.winner, s.accepted, [a.token_ids for a in s.attempts])
                                                 for s in one.segments]) for one in output.outputs], metrics]


@pytest.mark.parametrize("place", ["resume", "truncate", "score", "commit", "take_back"])
def test_a_segment_taken_back_in_a_round_that_was_stopped_is_there_again(place, monkeypatch):
    """Interrupts before, within and after the step; the text is that of an undisturbed run, and so are the counts."""
    def run(interrupts: Sequence[int]) -> stars.RequestOutput:
        engine = toy_engine(LM, RM)
        holder = {"resume": engine.reward, "score": engine.reward, "truncate": engine._cache, "commit": engine._cache,
                  "take_back": engine._round._committer}[place]
        right, calls = getattr(holder, place), []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) in interrupts:
                if len(calls) % 2:  # before it has done anything, or after
                    right(*arguments)
                raise KeyboardInterrupt
            return right(*arguments)

        setattr(holder, place, interrupted)
        engine.add_request(PROMPT, backing_params(), BACKING)
        done = stepped_through_interrupts(engine)
        assert len(calls) > max(interrupts, default=0)
        nothing_is_held(engine)
        return done

    counted = Counted(monkeypatch)
    undisturbed = run([])
    assert len(counted.taken_back) > 6
    broken = run([2, 3, 5, 8])
    assert told(broken) == told(undisturbed)
    for one, other in zip(broken.outputs, undisturbed.outputs, strict=True):
        assert one.reward == pytest.approx(other.reward, abs=TOLERANCE)
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False], ids=["reward model", "function"])
def test_who_gives_way_goes_on_to_the_same_text(causal, monkeypatch):
    counted = Counted(monkeypatch)
    policy = dataclasses.replace(BACKING, width=1) if causal else dataclasses.replace(
        BACKING, alpha=0.0, reward_threshold=3.0, width=1)

    def run(cache_tokens: int) -> list[stars.RequestOutput]:
        reward = stars.CausalReward(RM.decoder()) if causal else stars.FunctionReward(
            lambda prompt, responses: [FUNCTION(response) for response in responses], inputs="ids")
        engine = toy_engine(LM, reward, cache_tokens=cache_tokens, page_size=4)
        outputs = engine.generate([PROMPT] * 4, [backing_params(seed) for seed in range(4)], policy, use_tqdm=False)
        nothing_is_held(engine)
        return outputs

    roomy, scarce = run(4096), run(72)
    assert len(counted.taken_back) > 12
    assert sum(output.metrics.num_preemptions for output in scarce) >= 2
    assert list(map(told, scarce)) == list(map(told, roomy))


def test_a_stream_never_takes_text_back(monkeypatch):
    """What is shown while it runs withholds as many segments as may be taken back yet; its reward and counts belong to
    what is shown."""
    counted = Counted(monkeypatch)
    engine = toy_engine(LM, stars.FunctionReward(
        lambda prompt, responses: [FUNCTION(response) for response in responses], inputs="ids"))
    withheld = 0
    for seed in range(6):
        shown: list[list[int]] = [[]] * 3
        engine.add_request(PROMPT, backing_params(seed), dataclasses.replace(
            BACKING, alpha=0.0, reward_threshold=4.0, exhaust=BackUp(2)))
        while engine.has_unfinished_requests():
            for output in engine.step():
                for one in output.outputs:
                    assert one.token_ids[: len(shown[one.index])] == shown[one.index], "text was taken back"
                    shown[one.index] = one.token_ids
                    assert one.token_ids == [token for segment in one.segments for token in segment.token_ids]
                    assert one.metrics.lm_tokens_kept == len(one.token_ids)
                    assert one.metrics.accepted + one.metrics.fallbacks == one.metrics.segments == len(one.segments)
                    assert one.reward == (FUNCTION(one.token_ids) if one.token_ids else None)
                    assert one.cumulative_logprob == pytest.approx(sum(s.logprob for s in one.segments), abs=1e-12)
            for request in engine._requests.values():
                for group in request.groups:
                    withheld += bool(group.hypotheses[0].segments) and not group.shared()
        assert all(len(tokens) == 16 for tokens in shown)
    assert len(counted.taken_back) > 10 and withheld > 10


def test_an_aborted_response_keeps_what_is_committed():
    engine = toy_engine(LM, stars.FunctionReward(
        lambda prompt, responses: [float(len(response)) for response in responses], inputs="ids"))
    policy = stars.STARS(2, 2, 1.0, 0.0, 0.0, 2, BackUp(50))
    request_id = engine.add_request(PROMPT, backing_params(), policy)
    for _ in range(3):
        engine.step()
    engine.abort(request_id)
    [output] = engine.step()
    assert [len(one.token_ids) for one in output.outputs] == [6] * 3 and output.outputs[0].finish_reason == "abort"
    assert [one.metrics.lm_tokens_kept for one in output.outputs] == [6] * 3 and output.outputs[0].reward == 6.0
    nothing_is_held(engine)


# -- plans of others ----------------------------------------------------------------------------------------------


class Planned:
    """A policy of a plan that is given."""

    def __init__(self, plan: Plan):
        self.made = plan

    def plan(self) -> Plan:
        return self.made


class Never:
    """A rule that decides nothing, and notes how often it was relaxed when it was asked."""

    in_order, uniforms, group_uniforms = False, 1, 2

    def __init__(self):
        self.relaxed: list[tuple] = []
        self.numbers: list[float] = []

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        self.relaxed.append((len(judged), state.relaxed, state.lowered, state.left))
        self.numbers += [*state.uniforms, *(one.uniforms[0] for one in judged)] if not state.relaxed else []
        return None


def planned(exhaust: Exhaustion | str, population: int = 1, attempts: int = 2, max_tokens: int = 4, **others):
    """What became of a request whose rule decides nothing."""
    engine = toy_engine(LM, RM)
    rule = Never()
    params = stars.SamplingParams(**dict(max_tokens=max_tokens, seed=3, ignore_eos=True) | others)
    plan = Plan(Sampled(), Fixed(2), Lanes(1, attempts, population), Score("segment"), rule, exhaust)
    [output] = engine.generate(PROMPT, params, Planned(plan), use_tqdm=False)
    nothing_is_held(engine)
    assert output.outputs[0].error is None
    return output.outputs[0], rule


def test_a_rule_of_others_is_told_that_it_is_relaxed():
    """All attempts are shown again, those that it had seen rejected, too."""
    completion, rule = planned(Relax(0.25, 2, "last"), max_tokens=2)
    assert rule.relaxed == [(1, 0, 0.0, 1), (2, 0, 0.0, 0), (2, 1, 0.25, 0), (2, 2, 0.5, 0)]
    [segment] = completion.segments
    assert segment.winner == 1 and not segment.accepted and segment.relaxed == 2


def test_no_random_number_of_a_rule_comes_again_in_a_segment_that_is_drawn_anew():
    """Of four visits to two segments: attempts' numbers and those of the group."""
    completion, rule = planned(BackUp(2, First()))
    fresh = [numbers for numbers in rule.numbers]
    # Each visit asks after each of two attempts: two numbers of the group and those of the attempts so far.
    of_visit = [fresh[7 * index : 7 * index + 7] for index in range(len(fresh) // 7)]
    assert len(of_visit) == 6 and len(fresh) == 42  # both segments three times
    assert len({number for visit in of_visit for number in visit}) == 6 * 6  # of seven one is an attempt's shown twice
    assert completion.metrics.attempts == 12 and completion.metrics.attempts_counted == 4


@pytest.mark.parametrize("exhaust", [BestSeen(), First(), Last(), Softmax(0.5)])
def test_each_hypothesis_of_a_population_keeps_its_own(exhaust):
    completion, _ = planned(exhaust, population=3, attempts=3)
    assert completion.finish_reason == "length" and len(completion.segments) == 2
    for segment in completion.segments:
        rewards = [attempt.reward for attempt in segment.attempts]
        assert len(rewards) == 3 and segment.winner == {
            First: 0, Last: 2, BestSeen: rewards.index(max(rewards))}.get(type(exhaust), segment.winner)


def test_a_population_refuses_together():
    completion, _ = planned("refuse", population=3)
    assert (completion.finish_reason, completion.token_ids, completion.reward) == ("refused", [], None)
    assert completion.metrics.attempts == 6 and completion.metrics.segments == 0


def test_an_attempt_that_holds_nothing_any_more_is_read_again_in_a_slab_of_its_segment():
    """A lowered threshold accepts one whose slabs were given back, where attempts hold all there are."""
    params = stars.SamplingParams(max_tokens=8, seed=3, ignore_eos=True, n=6)
    policy = stars.STARS(2, 4, 1.0, 0.5, 3.0, width=1, exhaust=Relax(1.0, 4, "last"))
    outputs = []
    for lanes, seqs in ((1, 1), (16, 8)):
        engine = toy_engine(LM, RM, deterministic=True, max_num_lanes=lanes, max_num_seqs=seqs)
        [output] = engine.generate(PROMPT, params, policy, use_tqdm=False)
        nothing_is_held(engine)
        outputs.append(output)
    assert facts(outputs[0]) == facts(outputs[1])
    assert any(segment.relaxed and segment.winner < 2 for one in outputs[0].outputs for segment in one.segments)


def test_greedy_attempts_are_one_and_then_the_exhaustion_applies():
    completion, rule = planned("last", attempts=5, temperature=0.0)
    assert [len(segment.attempts) for segment in completion.segments] == [1, 1]
    completion, _ = planned(BackUp(1, "first"), attempts=5, temperature=0.0)
    assert completion.finish_reason == "length" and completion.metrics.attempts == 4  # both segments twice


def test_greedy_responses_are_refused_as_often_as_the_rule_says():
    """Equal attempts are tested with random numbers of their own: all of them, where the response may be refused."""
    reward = stars.FunctionReward(lambda _, responses: [0.0] * len(responses), inputs="ids")
    policy = stars.STARS(2, 5, 1.0, 1.0, 2.0, exhaust="refuse")
    alike = dict(max_tokens=4, seed=3, ignore_eos=True, n=40)
    outputs = toy_engine(LM, reward).generate(
        [PROMPT] * 2, [stars.SamplingParams(temperature=0.0, **alike), stars.SamplingParams(top_k=1, **alike)], policy,
        use_tqdm=False)
    greedy, drawn = ([(one.finish_reason, one.token_ids, one.metrics.attempts_counted) for one in output.outputs]
                     for output in outputs)
    assert greedy == drawn and {reason for reason, *_ in greedy} == {"length", "refused"}


@pytest.mark.parametrize("exhaust", ["best_seen", "refuse"])
def test_a_greedy_attempt_is_accepted_though_the_last_one_is_not_tested(exhaust):
    policy = stars.CARDS(0.0, 2, 2, 5, 1.0, 0.0, -100.0, exhaust=exhaust)
    params = stars.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    [completion] = toy_engine(LM, RM).generate(PROMPT, params, policy, use_tqdm=False)[0].outputs
    assert completion.finish_reason == "length" and [segment.accepted for segment in completion.segments] == [True] * 2


@pytest.mark.parametrize("exhaust, reason", [("last", "length"), (Relax(1.0, 2, "refuse"), "refused")])
def test_whole_responses(exhaust, reason):
    rule = Never()
    plan = Plan(Sampled(), Whole(3), Lanes(1, 1, 3), Score("end"), rule, exhaust)
    engine = toy_engine(LM, RM)
    [output] = engine.generate(PROMPT, stars.SamplingParams(max_tokens=7, seed=3, ignore_eos=True), Planned(plan),
                               use_tqdm=False)
    [completion] = output.outputs
    assert completion.finish_reason == reason and output.finished
    assert [asked[1:] for asked in rule.relaxed] == ([(0, 0.0, 0)] if reason == "length" else [
        (0, 0.0, 0), (1, 1.0, 0), (2, 2.0, 0)])
    if reason == "refused":
        assert (completion.token_ids, completion.segments, completion.reward) == ([], [], None)
        assert completion.cumulative_logprob == 0.0 and completion.metrics.lm_tokens_kept == 0
    else:
        assert completion.segments[0].winner == 2 and len(completion.token_ids) == 7
    nothing_is_held(engine)
