"""Reward-guided speculation and what is redrawn: decision by decision against the written-out loops, what the large
model is spared, and what rounds that end otherwise leave."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch

import oracle
import rsd_loop
import stars
import stars.proposer
import test_law_rsd
from building import PADDED, work_as
from stars.bindings import libstars
from stars.draft import Drafted
from stars.exhaustions import BackUp, Redraft, Refuse, Relax
from stars.plan import Enumerate, Fixed, Lanes, Model, Plan, Prompted, Ratio, Sampled, Score, Whole, plan_of
from stars.rules import Argmax, Decision, SoftArgmax, Threshold
from test_conservation import nothing_is_held, stepped_through_interrupts
from test_exhaust import told
from test_waiting import called
from toy import EOS, ToyModel, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LM = ToyModel(vocab=37, seed=2, hidden=24, layers=2, heads=4, kv_heads=2, head_dim=6, sharpness=2.0)
SMALL = ToyModel(vocab=37, seed=8, hidden=12, layers=1, heads=2, kv_heads=1, head_dim=6, sharpness=2.0)
RM = ToyModel(vocab=37, seed=4, hidden=24, heads=3, kv_heads=3, layers=1, head="reward", sharpness=1.5)
FUNCTION = table_reward(seed=3)
PROMPTS = [ids(5, 37, seed=1), ids(9, 37, seed=2)]
GIVEN = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
RSD = stars.RewardGuidedSpeculation
POLICIES = {
    "hard": RSD(reward_threshold=0.9, segment_size=4), "soft": RSD(reward_threshold=1.5, beta=0.8, segment_size=3),
    "gsi": RSD(reward_threshold=0.9, beta=2.0, segment_size=4, variant="gsi", n=3),
}


def engine(reward=FUNCTION, **options) -> stars.Engine:
    if not isinstance(reward, stars.Reward):
        reward = called(lambda prompt, responses: [FUNCTION(one) for one in responses])
    return toy_engine(LM, reward, models={"small": SMALL.decoder()}, **options)


def params(**options) -> stars.SamplingParams:
    return stars.SamplingParams(**dict(max_tokens=18, n=3, seed=8, ignore_eos=True) | options)


# -- the written-out loops ----------------------------------------------------------------------------------------


def equals_the_loop(output: stars.RequestOutput, sampling: stars.SamplingParams, reward, tolerance: float) -> Counter:
    """Every decision of every completion; how often each was made. reward: of a text."""
    policy, seen = output.policy, Counter()
    for completion in output.outputs:
        assert completion.error is None
        noise, uniform = oracle.draws_of(output.seed, completion.index)
        kept = rsd_loop.run(
            SMALL.logits, LM.logits, reward, output.prompt_token_ids, noise, uniform, variant=policy.variant,
            threshold=policy.reward_threshold, beta=policy.beta, n=policy.n, size=policy.segment_size,
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
            stop_ids=() if sampling.ignore_eos else (EOS,))
        assert completion.token_ids == [token for one in kept for token in one.token_ids]
        for segment, right in zip(completion.segments, kept, strict=True):
            assert (segment.token_ids, segment.accepted, segment.winner) == (
                right.token_ids, right.drafted, right.winner)
            assert segment.model == ("small" if right.drafted else "lm")
            count = len(right.candidates)
            drafts = count if right.drafted else count // 2
            assert (segment.redrawn, segment.models) == (
                count - drafts, ("small",) * drafts + ("lm",) * (count - drafts))
            ends = segment is completion.segments[-1]
            for place, (attempt, wanted) in enumerate(zip(segment.attempts, right.candidates, strict=True)):
                assert attempt.token_ids == wanted.token_ids
                assert attempt.accepted == (right.drafted and place == right.winner)
                if wanted.reward is not None:
                    assert attempt.reward == pytest.approx(wanted.reward, abs=tolerance)
                else:
                    assert (attempt.reward is None) == (not ends)
                if wanted.tilted is not None:  # the threshold is what the reward must reach
                    assert attempt.reward - attempt.threshold == pytest.approx(
                        wanted.tilted - policy.reward_threshold, abs=20 * tolerance + 1e-4)
            seen["kept" if right.drafted else "redrawn"] += 1
        assert completion.reward == pytest.approx(reward(
            output.prompt_token_ids + [token for token in completion.token_ids if token != EOS or sampling.ignore_eos]
        ), abs=tolerance)
    return seen


OF_A_CASE = {"hard": dict(temperature=0.8, top_k=12), "soft": dict(ignore_eos=False), "gsi": {}}


def against_the_loops(made: stars.Engine, of) -> Counter:
    """All cases beside plain requests, in one batch; of(prompt): the reward of a text."""
    policies = [*POLICIES.values()] * 2 + [stars.STARS(4, 4, 1.0, 0.5, 1.0, 2)]
    prompts = [GIVEN[index // 3 % 2] for index in range(6)] + [GIVEN[0]]
    sampling = [params(seed=20 + index, **OF_A_CASE[name]) for index, name in enumerate([*POLICIES] * 2)] + [params()]
    outputs = made.generate(prompts, sampling, policies, use_tqdm=False)
    nothing_is_held(made)
    seen = Counter()
    for output, one in zip(outputs[:6], sampling, strict=False):
        seen += equals_the_loop(output, one, of(output.prompt_token_ids), 2e-4)
    plain = made.generate(GIVEN[0], params(), policies[-1], use_tqdm=False)
    for one, alone in zip(outputs[-1].outputs, plain[0].outputs, strict=True):  # whoever decodes beside it
        assert [(s.token_ids, s.accepted, s.models) for s in one.segments] == [
            (s.token_ids, s.accepted, ()) for s in alone.segments]
    return seen


@pytest.mark.parametrize("lanes", [64, 5], ids=["room for all", "few lanes"])
@pytest.mark.parametrize("causal", [False, True], ids=["function", "reward model"])
def test_decisions_are_those_of_the_loops(causal, lanes):
    """With few lanes GSI's attempts come in several rounds, and the one that is kept may have given its slab back."""
    reward = stars.CausalReward(RM.decoder()) if causal else None
    seen = against_the_loops(engine(reward, max_num_lanes=lanes, max_num_seqs=min(lanes, 16)), lambda prompt: (
        RM.reward if causal else lambda text: FUNCTION(text[len(prompt) :])))
    assert seen["kept"] > 15 and seen["redrawn"] > 20, seen


def test_decisions_are_those_of_the_loops_as_a_gpu_works(monkeypatch):
    work_as(monkeypatch, PADDED)
    seen = against_the_loops(engine(), lambda prompt: lambda text: FUNCTION(text[len(prompt) :]))
    assert seen["kept"] > 15 and seen["redrawn"] > 20, seen


@pytest.mark.parametrize("error", [test_law_rsd.large_never_caught_up, test_law_rsd.small_never_caught_up])
def test_the_loops_see_a_model_that_has_not_caught_up(error, monkeypatch):
    error(monkeypatch)
    [output] = engine().generate(GIVEN[0], params(n=6), POLICIES["hard"], use_tqdm=False)
    with pytest.raises(AssertionError):
        equals_the_loop(output, params(n=6), lambda text: FUNCTION(text[len(PROMPTS[0]) :]), 1e-6)


# -- what the models run ------------------------------------------------------------------------------------------


def counting(made: stars.Engine) -> Counter:
    """Tokens that each model drafts, and rows of passes that it catches up with, from now on."""
    rows: Counter = Counter()
    for member in made._models.members:
        def prefill(tables, max_rows=None, advance=True, right=member.passes.prefill, store=member.store):
            done = right(tables, max_rows, advance)
            rows["passes", store] += done
            return done

        member.passes.prefill = prefill
        drafter = made._models.drafter((member.store,))

        def launch(lanes, right=drafter.launch, store=member.store):
            rows["lanes", store] += len(lanes)
            right(lanes)

        drafter.launch = launch
    return rows


def test_the_large_model_runs_nothing_while_drafts_are_kept():
    made = engine()
    rows = counting(made)
    [output] = made.generate(GIVEN[0], params(n=1), RSD(reward_threshold=-math.inf, segment_size=6), use_tqdm=False)
    assert rows == {("passes", 0): 4, ("passes", 1): 4, ("lanes", 1): 3} and output.metrics.accepted == 3
    rows.clear()
    [output] = made.generate(GIVEN[1], params(n=1), RSD(reward_threshold=math.inf, segment_size=6), use_tqdm=False)
    assert rows == {("passes", 0): 8, ("passes", 1): 8 + 6 + 6, ("lanes", 0): 3, ("lanes", 1): 3}
    assert output.metrics.fallbacks == 3 and output.metrics.attempts_counted == 3 and output.metrics.accept_rate == 0.0


def test_the_large_model_catches_up_in_one_pass_with_all_that_was_kept():
    """Four tokens a segment: the third is redrawn, of several responses at once."""
    made = engine(called(lambda prompt, responses: [float(len(one) != 12) for one in responses]))
    rows, passes = counting(made), []
    run = made._models.members[0].passes._run
    made._models.members[0].passes._run = lambda batch, *given, **named: (passes.append(len(batch)), run(
        batch, *given, **named))
    policy = RSD(reward_threshold=1.0, segment_size=4)
    outputs = made.generate(GIVEN, params(n=2, max_tokens=16), policy, use_tqdm=False)
    assert [[segment.model for segment in one.segments] for output in outputs for one in output.outputs] == [
        ["small", "small", "lm", "small"]] * 4
    assert passes == [2, 4] or passes[-1] == 4, passes  # the prompts, then all four
    assert rows["lanes", 0] == 4 and rows["lanes", 1] == 16
    assert rows["passes", 0] == 4 + 8 + 4 * 8 and rows["passes", 1] == 4 + 8 + 4 * 4


def test_what_gsi_keeps_the_large_model_need_not_read_again():
    made = engine()
    rows = counting(made)
    [output] = made.generate(GIVEN[0], params(n=2), RSD(reward_threshold=-math.inf, beta=1.0, segment_size=6,
                                                        variant="gsi", n=4), use_tqdm=False)
    assert output.metrics.accepted == 6 and rows["passes", 0] == 4 and rows["lanes", 0] == 0


def test_the_engines_own_model_may_be_the_small_one():
    """The same weights draft and redraw: nothing is behind."""
    made = toy_engine(LM, called(), models={"small": LM.decoder()})
    same = toy_engine(LM, called())
    [output] = made.generate(GIVEN[0], params(), dataclasses.replace(POLICIES["hard"]), use_tqdm=False)
    [own] = same.generate(GIVEN[0], params(), dataclasses.replace(POLICIES["hard"], small="lm"), use_tqdm=False)
    assert [one.token_ids for one in output.outputs] == [one.token_ids for one in own.outputs]
    assert all(not segment.models for one in own.outputs for segment in one.segments)


# -- rounds that end otherwise ------------------------------------------------------------------------------------

LOWER = [dataclasses.replace(policy, reward_threshold=-1.0) for policy in POLICIES.values()]  # for RM
BACKING = stars.STARS(2, 2, 1.0, 0.3, 0.6, 2, BackUp(4, Redraft("small", 3, SoftArgmax(0.5))))


@pytest.mark.parametrize("policy", [*POLICIES.values(), BACKING], ids=[*POLICIES, "back up"])
@pytest.mark.parametrize("place", ["catch_up", "commit", "score"])
def test_a_round_that_was_stopped_is_drawn_again(policy, place):
    def run(interrupts) -> stars.RequestOutput:
        made = engine(stars.CausalReward(RM.decoder()))
        holder = {"catch_up": made._models, "commit": made._cache, "score": made.reward}[place]
        right, calls = getattr(holder, place), []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) in interrupts:
                if len(calls) % 2:
                    right(*arguments)
                raise KeyboardInterrupt
            return right(*arguments)

        setattr(holder, place, interrupted)
        made.add_request(GIVEN[0], params(), policy)
        done = stepped_through_interrupts(made)
        assert len(calls) > max(interrupts, default=0) or policy is POLICIES["gsi"]
        nothing_is_held(made)
        return done

    assert told(run([1, 2, 3])) == told(run([]))


@pytest.mark.parametrize("policy", [*POLICIES.values(), BACKING], ids=[*POLICIES, "back up"])
def test_who_gives_way_goes_on_to_the_same_text(policy):
    def run(cache_tokens: int) -> list[stars.RequestOutput]:
        made = engine(cache_tokens=cache_tokens, page_size=4)
        outputs = made.generate([GIVEN[0]] * 4, [params(seed=seed) for seed in range(4)], policy, use_tqdm=False)
        nothing_is_held(made)
        return outputs

    roomy, scarce = run(4096), run(72)
    assert sum(output.metrics.num_preemptions for output in scarce) >= 2
    for one, other in zip(scarce, roomy, strict=True):
        if policy is BACKING:  # its width is bounded by the room
            assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]
        else:
            assert told(one) == told(other)


def test_an_abort_between_the_stages_gives_everything_back():
    made = engine()
    made.add_request(GIVEN[0], params(n=2), RSD(reward_threshold=math.inf, segment_size=4), request_id="a")
    made.step()
    group = made._requests["a"].groups[0]
    assert group.redraft == Redraft("lm") and group.hypotheses[0].preferred is None and group.undecided
    made.check_integrity()
    assert made.abort("a")
    [output] = made.step()
    assert output.outputs[0].finish_reason == "abort" and not output.outputs[0].token_ids
    nothing_is_held(made)


def test_no_random_number_comes_twice(monkeypatch):
    """Of all that is drawn for a response, whatever is taken back and redrawn."""
    drawn: Counter = Counter()
    spec = stars.proposer.LaneSpec

    def noting(*given, **named):
        made = spec(*given, **named)
        drawn[made.seed, made.stream, made.attempt] += 1
        return made

    monkeypatch.setattr(stars.proposer, "LaneSpec", noting)
    [output] = engine().generate(GIVEN[0], params(n=6), BACKING, use_tqdm=False)
    assert max(drawn.values()) == 1 and max(attempt for _, _, attempt in drawn) > 5
    assert sum(segment.redrawn for one in output.outputs for segment in one.segments) > 3


def test_rewards_that_come_later_change_nothing():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        class Slow(stars.FunctionReward):
            def score(self, candidates):
                return [one._replace(reward=pool.submit(float, one.reward)) for one in super().score(candidates)]

        for policy in POLICIES.values():
            late = engine(Slow(lambda prompt, responses: [FUNCTION(one) for one in responses], inputs="ids"))
            assert list(map(told, late.generate(GIVEN, params(), policy, use_tqdm=False))) == list(
                map(told, engine().generate(GIVEN, params(), policy, use_tqdm=False)))
            nothing_is_held(late)


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
def test_the_same_text_to_the_bit_in_every_schedule():
    """deterministic=True: what a model that is behind catches up with has the bits of what is read again."""
    def run(chosen, **options):
        made = engine(stars.CausalReward(RM.decoder()), deterministic=True, **dict(page_size=16) | options)
        outputs = made.generate(*(list(column) for column in zip(*chosen, strict=True)), use_tqdm=False)
        preempted.append(sum(output.metrics.num_preemptions for output in outputs))
        return [[(c.token_ids, c.reward, c.cumulative_logprob, c.segments) for c in output.outputs]
                for output in outputs]

    preempted: list[int] = []
    chosen = [(GIVEN[index % 2], params(max_tokens=33, n=2, seed=40 + index), policy)
              for index, policy in enumerate([*LOWER, dataclasses.replace(BACKING, width=1)])]
    alone = [run([one])[0] for one in chosen]
    for of in alone[:3]:
        models = Counter(segment.model for one in of for segment in one[3])
        assert min(models["small"], models["lm"]) > 1, models
    assert run(chosen) == alone and run(chosen[::-1]) == alone[::-1]
    assert run(chosen, max_num_seqs=3, max_num_lanes=3) == alone, "few lanes"
    assert run(chosen, cache_tokens=144) == alone, "a small cache"
    assert preempted[-1] > 2


# -- what is shown ------------------------------------------------------------------------------------------------


def test_counts_and_traces_of_a_redrawn_segment(tmp_path):
    """Two attempts of the plan's own and three that are redrawn, of which the highest reward is kept."""
    made = engine(called(lambda prompt, responses: [float(sum(one)) for one in responses]))
    policy = stars.STARS(4, 2, 1.0, 0.0, math.inf, 2, Redraft("small", 3, Argmax()))
    [output] = made.generate(GIVEN[0], params(n=1, max_tokens=8), policy, use_tqdm=False)
    [one] = output.outputs
    for segment in one.segments:
        assert segment.models == ("lm", "lm", "small", "small", "small") and segment.redrawn == 3
        assert segment.winner >= 2 and segment.model == "small" and not segment.accepted
        assert segment.reward == max(attempt.reward for attempt in segment.attempts[2:])
        assert [attempt.threshold for attempt in segment.attempts] == [math.inf] * 2 + [None] * 3
    metrics = output.metrics
    assert (metrics.attempts, metrics.attempts_counted, metrics.accepted, metrics.fallbacks, metrics.width) == (
        10, 4, 0, 2, 3)
    assert metrics.lm_tokens_drawn == 40 and metrics.lm_tokens_kept == 8
    path = tmp_path / "trace.jsonl"
    stars.write_trace(path, output, None)
    [request] = stars.read_trace(path)
    traced = request.completions[0].segments
    assert [segment.committed.attempt - 1 for segment in traced] == [segment.winner for segment in one.segments]


def test_a_rule_that_decides_nothing_leaves_the_highest_reward():
    class Silent:
        in_order, uniforms = False, 0

        def __call__(self, judged, state):
            seen.append(([attempt.attempt for attempt in judged], state.left, state.memory, state.relaxed))
            return Decision([], [], memory="mine")

    seen: list = []
    made = engine(called(lambda prompt, responses: [float(sum(one)) for one in responses]))
    policy = stars.STARS(4, 2, 1.0, 0.0, math.inf, 2, Relax(0.5, 1, Redraft("small", 3, Silent())))
    [output] = made.generate(GIVEN[0], params(n=1, max_tokens=8), policy, use_tqdm=False)
    for segment in output.outputs[0].segments:
        assert segment.reward == max(attempt.reward for attempt in segment.attempts[2:]) and segment.relaxed == 0
    assert seen == [([3, 4, 5], 0, None, 0)] * 2


def test_equal_greedy_attempts_are_drawn_once():
    made = engine()
    for policy in (POLICIES["gsi"], dataclasses.replace(BACKING, exhaust=Redraft("small", 5, Argmax()))):
        [output] = made.generate(GIVEN[0], params(n=1, temperature=0.0), policy, use_tqdm=False)
        assert {len(segment.attempts) for segment in output.outputs[0].segments} <= {1, 2}
        assert {segment.redrawn for segment in output.outputs[0].segments} <= {0, 1}


def test_an_exhaustion_by_its_name():
    assert stars.exhaustions.exhaustion("redraft:small") == Redraft("small")
    with pytest.raises(stars.RequestError, match='must say by which model, as "redraft:small" does'):
        stars.STARS(reward_threshold=1.0, exhaust="redraft")
    made = engine()
    [output] = made.generate(GIVEN[0], params(n=1), stars.STARS(4, 2, 1.0, 0.1, 3.0, exhaust="redraft:small"),
                             use_tqdm=False)
    assert "small" in {segment.model for segment in output.outputs[0].segments}


# -- bad input ----------------------------------------------------------------------------------------------------


def test_no_memory_for_what_is_redrawn_is_said_at_the_door(monkeypatch):
    def full(*given) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = engine()
    monkeypatch.setattr("stars.models.Drafter", full)
    with pytest.raises(stars.RequestError, match="no memory to draft from 'small': lower max_num_lanes"):
        made.generate(GIVEN[0], params(n=1), stars.STARS(4, 2, 1.0, 0.1, 3.0, exhaust="redraft:small"), use_tqdm=False)


class Given:
    def __init__(self, **choices):
        self.choices = dict(propose=Sampled(), segment=Fixed(4), lanes=Lanes(1, 2), score=Score("segment"),
                            decide=Threshold(1.0, 0.0, 1.0), exhaust=Redraft("small")) | choices

    def plan(self):
        return Plan(**self.choices)


@pytest.mark.parametrize(("choices", "word"), [
    (dict(lanes=Lanes(1, 2, 3)), "redraws a segment of one hypothesis, which whole responses and a population"),
    (dict(segment=Whole(), lanes=Lanes(1, 1, 2), score=Score("end")), "redraws a segment of one hypothesis"),
    (dict(propose=Enumerate(4), segment=Fixed(1)), "redraws what was Enumerate"),
    (dict(propose=Prompted("a", "b"), score=Score("segment", reads=Ratio(True))), "redraws what was Prompted"),
    (dict(decide=Argmax(), exhaust=Redraft("small", 2, Threshold(0.5, 0.0, 1.0))), "set score.prompt to True"),
    (dict(exhaust=Redraft("small", 2, Threshold(2.0, 0.0, 1.0))), "exhaust.decide.alpha is 2"),
    (dict(exhaust=Redraft("small", 2, print)), "must be a rule"),
    (dict(exhaust=Redraft("")), "must have the name of the model"), (dict(exhaust=Redraft("small", 0)), "from 1 to"),
    (dict(exhaust=BackUp(1 << 20, Redraft("small", 1 << 15))), "random numbers are enough for"),
    (dict(lanes=Lanes(1, (1 << 24) - 1), exhaust=Redraft("small")), "random numbers are enough for"),
])
def test_plans_that_do_not_go_together(choices, word):
    with pytest.raises(stars.RequestError, match=word):
        plan_of(Given(**choices))


def test_a_rule_of_rewards_needs_them_in_time():
    plan = Given(score=Score("end"), decide=stars.rules.Always(), exhaust=Redraft("small", 2, Argmax()))
    with pytest.raises(stars.RequestError, match=r'exhaust.decide decides by rewards and has score.when=.end.'):
        plan_of(plan)
    assert plan_of(Given(exhaust=Relax(0.5, 1, BackUp(1, Redraft("small"))))).exhaust.then.then == Redraft("small")
    assert plan_of(Given(exhaust=Refuse())).redrafts_with == "lm"


@pytest.mark.parametrize(("given", "word"), [
    (dict(), "RewardGuidedSpeculation needs a reward_threshold"),
    (dict(reward_threshold=1.0, variant="gsi"), r"beta is 0.* multiplies rewards by it: give a number from 1e-06"),
    (dict(reward_threshold=1.0, variant="gsi", beta="auto"), "needs a calibration"),
    (dict(reward_threshold=1.0, variant="best"), "variant is 'best'"), (dict(reward_threshold=1.0, n=0), "n is 0"),
    (dict(reward_threshold=1.0, beta=-1.0), "beta is -1"), (dict(reward_threshold=1.0, segment_size=0), "segment_size"),
    (dict(reward_threshold=1.0, small=3), "must be the name of a model"),
])
def test_policies_that_cannot_be(given, word):
    with pytest.raises(stars.RequestError, match=word):
        plan_of(RSD(**given))


def test_logits_that_are_no_numbers_are_said_to_be_those_of_who_drafted(monkeypatch):
    made = engine()
    monkeypatch.setattr(made._models.drafter((1,)), "draft", lambda specs: [Drafted([-1], [0.0]) for _ in specs])
    of_small, plain = made.generate([{"prompt_token_ids": PROMPTS[0]}] * 2, params(max_tokens=4),
                                    [POLICIES["hard"], stars.Sample()], use_tqdm=False)
    assert of_small.outputs[0].error.startswith("the logits of 'small' are NaN or infinite: check its weights")
    assert plain.outputs[0].finish_reason in ("length", "stop")
    made.check_integrity()


def test_requests_that_are_refused_at_the_door():
    made = engine()
    for policy, sampling, word in (
            (dataclasses.replace(POLICIES["hard"], small="tiny"), params(), "there is no model named 'tiny' .*'small'"),
            (stars.STARS(reward_threshold=1.0, exhaust="redraft:tiny"), params(), "there is no model named 'tiny'"),
            (POLICIES["gsi"], params(presence_penalty=0.5), "would be in one of them: leave presence_penalty out"),
            (Given(score=Score("segment", reads=Ratio(True)), propose=Model("small")), params(), "go together")):
        with pytest.raises(stars.RequestError, match=word):
            made.generate(GIVEN[0], sampling, policy, use_tqdm=False)
    with pytest.raises(stars.RequestError, match="needs a reward"):
        toy_engine(LM, models={"small": SMALL.decoder()}).generate(GIVEN[0], params(), POLICIES["hard"], use_tqdm=False)
    nothing_is_held(made)
