"""What a budget ends: nothing beyond it is drawn or scored, what was committed comes back, and no later than a segment
after a deadline."""

from __future__ import annotations

import dataclasses
import math
import random
import time

import pytest
from safetensors.torch import save_file

import stars
import stars.engine
from mara_loop import head_tensors
from stars.budget import NO_BUDGET
from stars.policies import POLICIES
from test_bad_input import refused
from test_conservation import nothing_is_held
from test_faults import IGNORED, Interrupts
from test_methods_outside import Breed
from test_scheduler import JOBS, LARGE, function_reward
from test_scheduler import engine as queue
from test_waiting import LateFunction, rewards
from toy import Digits, ToyModel, facts, ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LM = ToyModel(vocab=5, seed=1, layers=1, positions=96)
SMALL = ToyModel(vocab=5, seed=2, layers=1, positions=96)
RM = ToyModel(vocab=5, seed=3, layers=1, positions=96, head="reward", sharpness=1.5)
PROMPT = {"prompt_token_ids": ids(7, seed=2)}
ONE = [  # methods of one response with segments, at a width that is left out
    lambda width: stars.STARS(4, 6, 0.5, 0.3, 1.0, width=width),
    lambda width: stars.STARS(3, 3, 1.0, 0.0, 4.0, width=width),
    lambda width: stars.STARS(4, 2, 0.5, 0.0, 3.0, width=width, exhaust="back_up:2"),
    lambda width: stars.STARS(3, 3, 0.5, 0.1, 3.0, width=width, exhaust="refuse"),
    lambda width: stars.STARS(3, 3, 0.5, 0.1, 3.0, width=width, exhaust="redraft:small"),
    lambda width: stars.CARDS(1.2, 2, 8, max_attempts=5, reward_threshold=1.0, width=width),
    lambda width: stars.BlockwiseBestOfK((4, 2), segment_size=5),
    lambda width: stars.Sample(), lambda width: stars.Sample(score=True), lambda width: stars.ARGS(topk=3),
    lambda width: stars.PersonaJudge("32", "41", 4),
    lambda width: stars.RewardGuidedSpeculation("small", reward_threshold=2.0, segment_size=4),
    lambda width: stars.TokenGuidance("small", score=True), lambda width: stars.RAD(topk=3),
    lambda width: stars.RewardGuidedSpeculation("small", reward_threshold=2.0, beta=0.5, segment_size=4, variant="gsi"),
    lambda width: stars.MARA(topk=4, width=width), lambda width: stars.MARA(topk=4, width=width, score=True),
]
MANY = [stars.BestOfN(4), stars.BestOfN(3, temperature=0.5), stars.RejectionSampling(2.0, 0.3, 5, width=3),
        stars.RejectionSampling(9.0, 0.0, 4, width=2, exhaust="refuse"), stars.SpeculativeRejection(4, 0.4, 4),
        stars.SegmentBeam(2, 2, 4), stars.ParticleFilter(3, 0.5, 4), stars.ParticleFilter(3, 0.5, 4, final="sample"),
        Breed()]


@pytest.fixture(scope="module", autouse=True)
def agent(tmp_path_factory):
    """The head that MARA asks."""
    HEADS["agent"] = str(tmp_path_factory.mktemp("head") / "agent.safetensors")
    save_file(head_tensors(LM.config.hidden_size, 24, seed=6, bias=-1.0), HEADS["agent"])


HEADS: dict[str, str] = {}


def engine(reward=None, **options) -> stars.Engine:
    reward = reward if reward is not None else stars.FunctionReward(rewards, inputs="ids")
    return toy_engine(LM, reward, tokenizer=Digits(), models={"small": SMALL.decoder()}, heads=HEADS, **options)


def some_budget(chance: random.Random) -> stars.Budget:
    def maybe(most):
        return chance.randint(1, most) if chance.random() < 0.6 else None

    return stars.Budget(attempts=maybe(14), lm_tokens=maybe(80), rm_calls=maybe(14))


def keeps(budget: stars.Budget, metrics: stars.Metrics) -> bool:
    return all(bound is None or spent <= bound for bound, spent in (
        (budget.attempts, metrics.attempts), (budget.lm_tokens, metrics.lm_tokens_drawn),
        (budget.rm_calls, metrics.rm_calls)))


def run(made: stars.Engine, policy, params, budget=NO_BUDGET, **more) -> stars.RequestOutput:
    [output] = made.generate(PROMPT, params, policy, use_tqdm=False, budget=budget, **more)
    nothing_is_held(made)
    return output


@pytest.mark.parametrize("number", range(len(ONE)))
@pytest.mark.parametrize("width", [None, 1, 3, 8])
def test_a_text_of_a_budget_is_a_beginning_of_the_whole(number, width):
    policy, chance, made = ONE[number](width), random.Random(number), engine()
    params = stars.SamplingParams(max_tokens=22, seed=number, ignore_eos=True, n=2)
    whole = run(made, policy, params)
    short = 0
    for _ in range(9):
        budget = some_budget(chance)
        part = run(made, policy, params, budget)
        assert keeps(budget, part.metrics)
        for one, other in zip(part.outputs, whole.outputs, strict=True):
            if "back_up" not in str(policy):  # what would be taken back later is final here
                assert one.token_ids == other.token_ids[: len(one.token_ids)]
            assert one.finish_reason in ("budget", other.finish_reason)
            assert one.finish_reason == "budget" or one.token_ids == other.token_ids
            assert sum(len(segment.token_ids) for segment in one.segments) == len(one.token_ids)
            short += one.finish_reason == "budget" and 0 < len(one.token_ids) < len(other.token_ids)
    assert short or "refuse" in str(policy), "budgets that end a text in the middle"
    enough = stars.Budget(60.0, *(max(1, count) for count in (
        whole.metrics.attempts, whole.metrics.lm_tokens_drawn + 44, whole.metrics.rm_calls)))
    same = run(made, policy, params, enough)
    assert [one.token_ids for one in same.outputs] == [one.token_ids for one in whole.outputs]
    assert all(one.finish_reason != "budget" for one in same.outputs)


@pytest.mark.parametrize("policy", MANY, ids=lambda policy: type(policy).__name__)
def test_methods_of_several_responses_keep_within_a_budget(policy):
    chance, made, cut = random.Random(3), engine(), 0
    for index in range(24):
        params = stars.SamplingParams(max_tokens=20, seed=index, n=1 + index % 2, ignore_eos=index % 3 > 0)
        whole, budget = run(made, policy, params), some_budget(chance)
        part = run(made, policy, params, budget)
        assert keeps(budget, part.metrics) and len(part.outputs) == params.n
        assert all(one.finish_reason in ("budget", "stop", "length", "refused") for one in part.outputs)
        if all(one.finish_reason != "budget" for one in part.outputs):
            assert [one.token_ids for one in part.outputs] == [one.token_ids for one in whole.outputs]
        cut += any(one.finish_reason == "budget" and one.token_ids for one in part.outputs)
    assert cut > 2 or getattr(policy, "exhaust", "") == "refuse"


def test_every_method_is_among_these():
    assert {type(policy) for policy in [method(1) for method in ONE] + MANY} >= {*POLICIES.values()}


def test_the_reward_is_asked_no_more_often_than_the_metrics_say():
    """Every candidate that reaches the function is counted, that of the prompt too."""
    asked = []

    def fn(prompt, responses):
        asked.extend(responses)
        return rewards(prompt, responses)

    made = engine(stars.FunctionReward(fn, inputs="ids"))
    for policy in [method(3) for method in ONE] + MANY:
        for calls in (1, 2, 5, 11):
            asked.clear()
            output = run(made, policy, stars.SamplingParams(max_tokens=18, seed=calls, n=2),
                         stars.Budget(rm_calls=calls))
            assert output.metrics.rm_calls == len(asked) <= calls, policy


def test_what_is_drawn_counts():
    """Tokens as they leave the model, of every lane: the metrics are what a budget is held against."""
    made, drawn = engine(), []
    for drafter in (made._round.drafter, made._models.drafter((1,))):
        launch = drafter.drafted
        drafter.drafted = lambda count, launch=launch: [drawn.append(one) or one for one in launch(count)]
    for policy in (ONE[0](8), ONE[4](3), ONE[7](None), MANY[0], MANY[5]):
        for tokens in (3, 16, 40):
            drawn.clear()
            output = run(made, policy, stars.SamplingParams(max_tokens=18, seed=1, n=2, ignore_eos=True),
                         stars.Budget(lm_tokens=tokens))
            assert sum(len(one.token_ids) for one in drawn) == output.metrics.lm_tokens_drawn <= tokens


def test_plain_text_ends_with_the_last_token_there_is():
    """A segment of it needs no other one's verdict, so a draft is cut; two completions share the tokens."""
    output = run(engine(), stars.Sample(), stars.SamplingParams(max_tokens=40, seed=1, ignore_eos=True),
                 stars.Budget(lm_tokens=21))
    assert len(output.outputs[0].token_ids) == 21 and output.outputs[0].finish_reason == "budget"
    output = run(engine(), stars.Sample(), stars.SamplingParams(max_tokens=40, seed=1, ignore_eos=True, n=2),
                 stars.Budget(lm_tokens=43))
    assert [len(one.token_ids) for one in output.outputs] == [27, 16]


def test_best_of_n_is_chosen_among_those_that_ended():
    """Three attempts of six: the text of BestOfN(3). Tokens for two and a half: of two. For less than one: what there
    is of the first."""
    made, params = engine(), stars.SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    for budget, count in ((stars.Budget(attempts=3), 3), (stars.Budget(rm_calls=4), 4),
                          (stars.Budget(lm_tokens=50), 2)):
        output = run(made, stars.BestOfN(6), params, budget)
        same = run(made, stars.BestOfN(count), params)
        assert output.outputs[0].token_ids == same.outputs[0].token_ids
        assert output.outputs[0].finish_reason == "budget"
        assert output.outputs[0].reward == same.outputs[0].reward
    [first] = run(made, stars.Sample(), params).outputs
    [short] = run(made, stars.BestOfN(6), params, stars.Budget(lm_tokens=13)).outputs
    assert short.token_ids == first.token_ids[:13] and short.finish_reason == "budget" and short.reward is None
    assert len(short.segments) == 1


def test_a_plan_that_refuses_gives_nothing_that_it_has_not_accepted():
    made, params = engine(), stars.SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    for budget in (stars.Budget(attempts=2), stars.Budget(lm_tokens=13), stars.Budget(lm_tokens=50)):
        [one] = run(made, stars.RejectionSampling(99.0, 0.0, 4, exhaust="refuse"), params, budget).outputs
        assert (one.token_ids, one.text, one.finish_reason) == ([], "", "budget")


def test_a_population_is_chosen_from_by_its_own_rule():
    """A filter's last draw is among the particles that there are; a beam gives the best of them."""
    params = stars.SamplingParams(max_tokens=20, seed=5, ignore_eos=True)
    [one] = run(engine(), stars.SegmentBeam(2, 2, 4), params, stars.Budget(lm_tokens=60)).outputs
    assert len(one.token_ids) in (8, 12) and one.finish_reason == "budget"
    calls = []
    rule = stars.ParticleFilter(3, 0.5, 4).plan().decide
    final = type(rule).final
    try:
        type(rule).final = lambda self, judged, state: calls.append(judged) or final(self, judged, state)
        [one] = run(engine(), stars.ParticleFilter(3, 0.5, 4), params, stars.Budget(lm_tokens=30)).outputs
    finally:
        type(rule).final = final
    assert len(calls) == 1 and len(calls[0]) == 3 and len(one.token_ids) == 8


def test_who_gave_way_has_the_budget_that_it_had():
    """What is drawn a second time is not counted twice: the texts are those of a large cache."""
    jobs = [(prompt, dataclasses.replace(params, n=1), policy) for prompt, params, policy in (*JOBS, *JOBS[::-1])
            if policy != stars.Sample()]  # several completions share a budget as they come
    chance = random.Random(4)
    budgets = [stars.Budget(attempts=chance.randint(5, 40), lm_tokens=chance.randint(60, 300),
                            rm_calls=chance.randint(5, 40)) for _ in jobs]
    outputs = []
    for size in (LARGE, 105):
        made, done = queue(function_reward(), size), {}
        for index, (job, budget) in enumerate(zip(jobs, budgets, strict=True)):
            made.add_request(*job, request_id=str(index), budget=budget)
        while made.has_unfinished_requests():
            done |= {output.request_id: output for output in made.step()}
        nothing_is_held(made)
        outputs.append([done[str(index)] for index in range(len(jobs))])
    large, small = outputs
    assert sum(output.metrics.num_preemptions for output in small) > 2
    assert all(keeps(budget, output.metrics) for budget, output in zip(budgets, small, strict=True))
    assert [facts(one) for one in small] == [facts(one) for one in large]
    assert sum(one.finish_reason == "budget" for output in small for one in output.outputs) > 4


# -- deadlines --------------------------------------------------------------------------------------------------------


def pass_by(made: stars.Engine, request_id: str) -> None:
    """The deadline of a request has come."""
    made._requests[request_id].deadline = 0.0


@pytest.mark.parametrize("policy", [method(2) for method in ONE] + MANY, ids=lambda policy: type(policy).__name__)
def test_a_deadline_at_any_segment_gives_what_was_committed(policy):
    params = stars.SamplingParams(max_tokens=18, seed=2, ignore_eos=True, n=2)
    made = engine()
    [whole] = made.generate(PROMPT, params, policy, use_tqdm=False)
    one_response = policy.plan().lanes.population == 1
    for steps in range(7):
        name = made.add_request(PROMPT, params, policy, budget=stars.Budget(seconds=1000.0))
        last = None
        for _ in range(steps):
            for output in made.step():
                last = output
        if name not in made._requests:
            break
        committed = [list(h.token_ids) for h in made._requests[name].hypotheses]
        pass_by(made, name)
        [output] = made.step()
        assert output.finished and not made.has_unfinished_requests()
        nothing_is_held(made)
        for one, other in zip(output.outputs, whole.outputs, strict=True):
            assert one.finish_reason == "deadline" or one.token_ids == other.token_ids
            assert one.token_ids in committed or one.token_ids == []
            if one_response and "back_up" not in str(policy):
                assert one.token_ids == other.token_ids[: len(one.token_ids)]
        if last is not None:  # a stream takes nothing back
            for before, after in zip(last.outputs, output.outputs, strict=True):
                assert after.token_ids[: len(before.token_ids)] == before.token_ids


def test_a_deadline_reaches_who_waits_in_the_queue_and_who_is_read():
    made = engine(cache_tokens=64, max_num_seqs=2, max_num_lanes=2, max_num_batched_tokens=4)
    long = {"prompt_token_ids": ids(30, seed=4)}
    params = stars.SamplingParams(max_tokens=18, seed=2, ignore_eos=True)
    first = made.add_request(PROMPT, params, ONE[0](1))
    made.step()
    read = made.add_request(long, params, ONE[0](1), budget=stars.Budget(seconds=1000.0))
    queued = made.add_request(long, params, ONE[0](1), budget=stars.Budget(seconds=1000.0))
    made.step()
    [unit] = [unit for unit in made._scheduler.running if unit.request.request_id == read]
    assert not unit.ready and queued in [unit.request.request_id for unit in made._scheduler.waiting]
    for name in (read, queued):
        pass_by(made, name)
    outputs = {output.request_id: output for output in made.step()}
    assert {outputs[name].outputs[0].finish_reason for name in (read, queued)} == {"deadline"}
    assert [outputs[name].outputs[0].text for name in (read, queued)] == ["", ""]
    made.check_integrity()
    while made.has_unfinished_requests():
        made.step()
    assert first
    nothing_is_held(made)


@pytest.mark.parametrize("policy", [stars.STARS(4, 3, 0.5, 0.3, 1.0), stars.STARS(4, 3, 1.0, 0.3, 1.0, width=1),
                                    stars.Sample(score=True), stars.BestOfN(3), stars.SegmentBeam(2, 2, 4)],
                         ids=lambda policy: type(policy).__name__)
def test_a_deadline_wakes_who_waits_for_rewards(monkeypatch, policy):
    """Rewards that never come: generate returns at the deadline, not a patience later, and nobody waits any more."""
    reward = LateFunction(rewards, "ids")
    made = engine(reward)
    monkeypatch.setattr("stars.waiting.PATIENCE", 60.0)
    begin = time.monotonic()
    [output] = made.generate(PROMPT, stars.SamplingParams(max_tokens=8, seed=1, ignore_eos=True), policy,
                             use_tqdm=False, budget=stars.Budget(seconds=0.4))
    assert 0.4 <= time.monotonic() - begin < 30.0
    assert output.outputs[0].finish_reason == "deadline"
    assert all(future.cancelled() for future, _ in reward.pending)
    nothing_is_held(made)
    made.add_request(PROMPT, stars.SamplingParams(max_tokens=8, seed=1, ignore_eos=True), policy,
                     budget=stars.Budget(seconds=0.3))
    begin = time.monotonic()
    while made.has_unfinished_requests():
        made.step()
    assert time.monotonic() - begin < 30.0
    [*_, last] = made.stream(PROMPT, stars.SamplingParams(max_tokens=8, seed=1, ignore_eos=True), policy,
                             budget=stars.Budget(seconds=0.3))
    assert last.finished and last.outputs[0].finish_reason == "deadline"
    nothing_is_held(made)


def test_a_budget_waits_for_rewards_that_may_decide():
    """Where the last attempts of a budget are asked about, it ends once their rewards are there, and not before."""
    reward = LateFunction(rewards, "ids")
    made = engine(reward)
    policy = stars.STARS(4, 8, 1.0, 0.0, -99.0, width=2)
    made.add_request(PROMPT, stars.SamplingParams(max_tokens=12, seed=1, ignore_eos=True), policy,
                     budget=stars.Budget(attempts=2))
    for _ in range(3):
        assert made.step() == []
    reward.settle(), reward.settle()
    outputs = []
    while made.has_unfinished_requests():
        outputs += made.step()
    assert outputs[-1].outputs[0].finish_reason == "budget" and len(outputs[-1].outputs[0].token_ids) == 4
    nothing_is_held(made)


def test_no_budget_costs_no_more_than_a_look():
    """All of None is no budget: the request is not even listed."""
    made = engine()
    name = made.add_request(PROMPT, stars.SamplingParams(max_tokens=4), budget=stars.Budget())
    assert made._scheduler._budgeted == [] and not made._requests[name].bounded
    made.abort(name)
    with pytest.raises(stars.RequestError, match="a deadline lies ahead"):
        stars.Budget(seconds=0.0)
    with pytest.raises(stars.RequestError, match="it must be a stars.Budget"):
        made.add_request(PROMPT, budget=3.0)


def test_an_interrupt_while_a_request_is_cut_short_changes_nothing(monkeypatch):
    """The books balance, and the next step ends it with the same text."""
    params = stars.SamplingParams(max_tokens=40, seed=2, ignore_eos=True)
    for policy in (MANY[5], MANY[0], ONE[0](2)):
        texts = []
        for interrupted in (False, True):
            made = engine()
            name = made.add_request(PROMPT, params, policy, budget=stars.Budget(seconds=1000.0))
            made.step()
            made.step()
            pass_by(made, name)
            if interrupted:
                finish, calls = made._round.finish, []

                def stopped(*given, finish=finish, calls=calls):
                    finish(*given)
                    calls.append(1)
                    if len(calls) == 1:
                        raise KeyboardInterrupt

                made._round.finish = stopped
                with pytest.raises(KeyboardInterrupt):
                    made.step()
                made.check_integrity()
            [output] = made.step()
            texts.append(facts(output))
            nothing_is_held(made)
        assert texts[0] == texts[1]


def bounded_traffic(made: stars.Engine) -> list:
    """Requests of several users and priorities, all of which their budgets end; interrupts are survived."""
    params = stars.SamplingParams(max_tokens=12, seed=2, ignore_eos=True)
    given = [(MANY[0], stars.Budget(lm_tokens=30), "a", 0), (MANY[5], stars.Budget(attempts=9), "b", 0),
             (ONE[0](2), stars.Budget(rm_calls=4), None, 1), (MANY[2], stars.Budget(attempts=3), "a", -1)]
    for index, (policy, budget, user, priority) in enumerate(given):
        while str(index) not in made._requests:
            try:
                made.add_request(PROMPT, params, policy, request_id=str(index), budget=budget, user=user,
                                 priority=priority)
            except KeyboardInterrupt:
                made.check_integrity()
    requests, left = dict(made._requests), True
    while left:
        try:
            made.step()
            left = made.has_unfinished_requests()
        except KeyboardInterrupt:
            made.check_integrity()
    outputs = [requests[str(index)].output() for index in range(len(given))]
    return [([(one.token_ids, one.finish_reason, one.reward) for one in output.outputs], output.metrics.attempts,
             output.metrics.rm_calls) for output in outputs]


def interrupt_every(step: int) -> None:
    made = engine(cache_tokens=120, max_num_seqs=5, max_num_lanes=8)
    made._round.proposer.chooser._measure = lambda lanes: 1.0 + 0.1 * lanes
    wanted = bounded_traffic(made)
    assert [output[0][0][1] for output in wanted] == ["budget"] * 4
    with Interrupts() as seen:
        bounded_traffic(made)
    functions = ("conclude", "_cut_short", "_choose", "_conclude", "_begin", "due", "_within_budgets", "_make_room",
                 "spent", "let_go", "seat", "prompt_rewards", "keep_whole")
    places = sorted(place for place in seen.seen if place[0].endswith((
        "spending.py", "fairness.py", "seating.py", "unit.py")) or place[2] in functions)
    assert {place[2] for place in places} >= {*functions[:6], "seat", "take_together", "_share", "_charge", "remove"}
    for number, place in enumerate(places[step // 2 :: step]):
        with Interrupts(place, 1 if number % 2 else seen.seen[place]):
            got = bounded_traffic(made)
        nothing_is_held(made)
        assert got == wanted, f"after an interrupt at {place}"


@IGNORED
def test_an_interrupt_loses_nothing_of_a_budget():
    """Before every 31st bytecode of budgets, of fairness and of what ends requests."""
    interrupt_every(31)


@pytest.mark.slow
@IGNORED
def test_an_interrupt_anywhere_loses_nothing_of_a_budget():
    interrupt_every(1)


def test_a_budget_is_one_of_numbers():
    assert dataclasses.astuple(stars.Budget(1, 2, 3, 4)) == (1.0, 2, 3, 4)


@pytest.mark.parametrize("options, message", [
    *((dict(seconds=value), f"Budget.seconds is {shown}, it must be a finite number above 0: a deadline lies ahead")
      for value, shown in ((0, "0"), (-1.0, "-1.0"), (math.nan, "nan"), (math.inf, "inf"), (True, "True"),
                           ("1", "'1'"))),
    *((dict([(name, value)]), f"Budget.{name} is {value!r}, it must be an integer of at least 1")
      for name in ("attempts", "lm_tokens", "rm_calls") for value in (0, -1, 1.5, True)),
    (dict(second=1.0), "Budget has no parameter 'second': did you mean seconds?"),
])
def test_what_is_no_budget_is_refused(options, message):
    refused(stars.RequestError, message, stars.Budget, **options)


@pytest.mark.parametrize("options, message", [
    (dict(budget={"seconds": 1.0}), "budget is {'seconds': 1.0}, it must be a stars.Budget"),
    (dict(priority=1 << 31), "priority is 2147483648, it must be an integer from -2147483647 to 2147483647"),
    (dict(priority=0.5), "priority is 0.5"), (dict(user=3), "user is 3, it must be a text of at most 256 characters"),
    (dict(user="x" * 257), "it must be a text of at most 256 characters"),
])
def test_what_is_said_of_a_request_is_checked_at_every_door(options, message):
    made = engine()
    for call in (made.add_request, made.stream, made.generate):
        refused(stars.RequestError, message, call, PROMPT, **options)
    for name, value in options.items():
        refused(stars.RequestError, f"{name} has 1 entries for 2 prompts", made.generate, [PROMPT] * 2,
                **{name: [value]})
    assert not made.has_unfinished_requests()
