"""Attempts that are enumerated: one step of the language model for all of them, one slab, in rounds of any width,
beside requests that draw; forks; and the shipped pair beside a loop on transformers that recomputes everything.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
import stars
from stars.draft import Drafter
from stars.plan import Enumerate, Fixed, Lanes, Plan, Sampled, Score, Whole, plan_of
from stars.proposer import NAN_LOGITS
from stars.rules import Always, Decision, Judged, RewardGuided, State, Threshold, whole
from test_conservation import nothing_is_held
from toy import EOS, facts, ids, toy_engine, toy_pair

MODELS = Path(stars.__file__).parent / "demo_models"
TOLERANCE = 2e-4  # of log-probabilities and rewards, as in test_oracle.py
LM, RM = toy_pair(23, (6, 7))

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def plan(topk: int, width: int | None, rule=None, population: int = 1) -> stars.plan.Policy:
    @dataclass(frozen=True)
    class Enumerated:
        def plan(self) -> Plan:
            return Plan(Enumerate(topk), Fixed(1), Lanes(width, topk, population), Score("segment"),
                        rule or RewardGuided(1.0))

    return Enumerated()


# -- rounds, slabs and neighbours ---------------------------------------------------------------------------------


def test_every_lane_that_waits_holds_its_share_of_the_slab():
    answer = threading.Event()

    def reward(_, responses):
        answer.wait(10.0)
        return [0.1 * sum(response) for response in responses]

    engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids", blocking=True))
    engine.add_request({"prompt_token_ids": ids(7, 23)}, stars.SamplingParams(max_tokens=3, ignore_eos=True),
                       stars.ARGS(topk=5))
    engine.step()
    assert engine._round.awaited()
    engine.check_integrity()
    answer.set()
    while engine.has_unfinished_requests():
        engine.step()
    nothing_is_held(engine)


def test_one_step_finds_all_ranks_of_a_place(monkeypatch):
    """Whatever the width: later rounds go on where the one before ended, in the slab that its best attempt keeps."""
    rows = []
    launch = Drafter.launch
    monkeypatch.setattr(Drafter, "launch", lambda self, lanes: (rows.append(len(lanes)), launch(self, lanes))[1])
    params, seen = stars.SamplingParams(max_tokens=9, seed=4, ignore_eos=True), []
    for width in (None, 1, 2, 5, 7):
        engine = toy_engine(LM, RM)
        rows.clear()
        engine.add_request({"prompt_token_ids": ids(7, 23)}, params, plan(7, width, RewardGuided(0.8, 0.6)))
        rounds = 0
        while engine.has_unfinished_requests():
            output = next(iter(engine.step()), None)
            engine.check_integrity()
            rounds += 1
        assert rows == [1] * 9 and rounds == 9 * math.ceil(7 / (width or 7))
        assert [len(segment.attempts) for segment in output.outputs[0].segments] == [7] * 9
        assert output.metrics.lm_tokens_drawn == 9 and output.metrics.attempts == 63
        assert output.metrics.width == min(width or 7, 7)
        seen.append([[attempt.token_ids for attempt in segment.attempts] + [segment.winner]
                     for segment in output.outputs[0].segments])
        nothing_is_held(engine)
    assert all(one == seen[0] for one in seen)


def test_few_lanes_for_many_requests():
    """Five requests share seven lanes: one token a round each, and the texts of a wide engine."""
    params = [stars.SamplingParams(max_tokens=6, seed=seed, top_p=0.5) for seed in range(5)]
    prompts = [{"prompt_token_ids": ids(5 + seed, 23, seed)} for seed in range(5)]
    policy = stars.ARGS(6, 0.7, "stochastic")
    narrow = toy_engine(LM, RM, max_num_lanes=7, max_num_seqs=5)
    texts = [facts(output) for output in narrow.generate(prompts, params, policy, use_tqdm=False)]
    nothing_is_held(narrow)
    wide = toy_engine(LM, RM).generate(prompts, params, policy, use_tqdm=False)
    for got, wanted in zip(texts, map(facts, wide), strict=True):
        assert [one[0] for one in got] == [one[0] for one in wanted]
    assert len({len(segment.attempts) for output in wide for segment in output.outputs[0].segments}) > 3


def test_beside_requests_that_draw():
    """Ranked and drawn lanes in one draft, with penalties, filters and temperatures of their own: as each alone."""
    asked = [
        (stars.ARGS(5, 1.0), stars.SamplingParams(max_tokens=11, temperature=0.0)),
        (stars.STARS(4, 5, 1.0, 0.4, 1.0, 3), stars.SamplingParams(max_tokens=14, seed=1, top_k=9)),
        (stars.RAD(6, 3.0), stars.SamplingParams(max_tokens=9, seed=2, presence_penalty=0.7, top_p=0.9)),
        (stars.Sample(score=True), stars.SamplingParams(max_tokens=20, seed=3, frequency_penalty=0.5)),
        (stars.BestOfN(3), stars.SamplingParams(max_tokens=17, seed=4, min_p=0.05, temperature=0.8)),
        (stars.ARGS(4, 2.0, "stochastic"), stars.SamplingParams(max_tokens=8, seed=5, n=2))]
    prompts = [{"prompt_token_ids": ids(4 + 3 * place, 23, place)} for place in range(len(asked))]
    together = toy_engine(LM, RM)
    names = [together.add_request(prompt, params, policy)
             for prompt, (policy, params) in zip(prompts, asked, strict=True)]
    done = {}
    while together.has_unfinished_requests():
        done |= {output.request_id: output for output in together.step() if output.finished}
        together.check_integrity()
    nothing_is_held(together)
    for name, prompt, (policy, params) in zip(names, prompts, asked, strict=True):
        [alone] = toy_engine(LM, RM).generate(prompt, params, policy, use_tqdm=False)
        for got, wanted in zip(done[name].outputs, alone.outputs, strict=True):
            assert got.error is None and got.token_ids == wanted.token_ids
            assert got.reward == pytest.approx(wanted.reward, abs=TOLERANCE)
            assert got.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, abs=TOLERANCE)


def test_logits_that_are_no_numbers_end_that_request_alone():
    engine = toy_engine(LM, RM)
    prompts = [{"prompt_token_ids": ids(9, 23, 1)}, {"prompt_token_ids": ids(5, 23, 2)}]
    engine.generate(prompts, stars.SamplingParams(max_tokens=2), stars.ARGS(4), use_tqdm=False)
    decoder, draft_logits = engine._round.drafter.decoder, engine._round.drafter.decoder.draft_logits

    def broken(batch, cache, out):
        draft_logits(batch, cache, out)
        out[batch.positions >= 8] = math.nan

    decoder.draft_logits = broken
    engine._round.drafter._graphs._programs.clear()
    engine._round.drafter._graphs.run = lambda parts, done, times=1: [part.call() for part in parts]
    with pytest.warns(UserWarning, match="ended with an error"):
        bad, good = engine.generate(prompts, stars.SamplingParams(max_tokens=3), stars.ARGS(4), use_tqdm=False)
    assert bad.outputs[0].error == NAN_LOGITS and good.outputs[0].error is None
    nothing_is_held(engine)


# -- two ranks of one hypothesis ----------------------------------------------------------------------------------


def twins(judged: Sequence[Judged], state: State) -> Decision | None:
    """The two attempts of the highest score of all: a beam of two, by reward and the newest token's probability."""
    if state.left:
        return None
    order = sorted(judged, key=lambda one: -(one.reward + one.raw_logprobs[0]))[:2]
    kept = {one.hypothesis for one in order}
    return Decision([whole(one) for one in order], [slot for slot in state.live if slot not in kept])


twins.in_order, twins.uniforms = False, 0


def beam(prompt: list[int], tokens: int, topk: int,
         params: stars.SamplingParams) -> list[list[tuple[float, list[int], float]]]:
    """(score of the newest token, response, reward) of the two that are kept of each place, everything recomputed."""
    beams, places = [[], []], []
    for _ in range(tokens):
        found = []
        for response in beams:
            logprobs = oracle.log_softmax(LM.logits(prompt + response))
            kept = oracle.proposal(logprobs, params)
            for token in [token for token in np.argsort(-logprobs).tolist() if kept[token] > -math.inf][:topk]:
                reward = RM.reward(prompt + response + [token])
                found.append((reward + float(logprobs[token]), response + [token], reward))
        found.sort(key=lambda one: -one[0])
        beams = [response for _, response, _ in found[:2]]
        places.append(found[:2])
    return places


@pytest.mark.parametrize(("width", "top_p"), [(None, 1.0), (1, 1.0), (3, 1.0), (1, 0.4), (None, 0.4)])
def test_a_rule_that_keeps_two_ranks_of_one_response(width, top_p):
    """Both are committed from one slab into pages of their own, in either model: what follows is the oracle's. Where
    filters keep fewer tokens of one than of the other, it waits for that."""
    prompt, tokens = ids(6, 23, 3), 8
    engine = toy_engine(LM, RM, page_size=4)
    params = stars.SamplingParams(max_tokens=tokens, seed=1, ignore_eos=True, top_p=top_p)
    engine.add_request({"prompt_token_ids": prompt}, params, plan(4, width, twins, population=2))
    forks, seen = 0, []
    while engine.has_unfinished_requests():
        output = next(iter(engine.step()), None)
        engine.check_integrity()
        group = next(iter(engine._scheduler.groups), None)
        if group is not None and not group.undecided:
            seen.append({tuple(one.token_ids): one.reward for one in group.hypotheses})
            forks += len({tuple(one.token_ids[:-1]) for one in group.hypotheses}) == 1
    places = beam(prompt, tokens, 4, params)
    for got, place in zip(seen, places, strict=False):
        wanted = {tuple(response): reward for _, response, reward in place}
        assert got == pytest.approx(wanted, abs=TOLERANCE)
    assert len(seen) >= tokens - 1 and forks >= 2
    best = max(places[-1], key=lambda one: one[2])
    assert output.outputs[0].token_ids == best[1] and output.outputs[0].error is None
    nothing_is_held(engine)


# -- what a plan may ask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "message"), [
    (dict(propose=Enumerate(0)), "propose.k is 0, it must be an integer of at least 1"),
    (dict(propose=Enumerate(257)), "propose.k is 257"),
    (dict(propose=Enumerate("4")), "propose.k is '4'"),
    (dict(propose=4), "propose is 4, it must be a stars.plan.Sampled, Enumerate, Blend, Model or Prompted"),
    (dict(segment=Fixed(2)), "enumerates single tokens and has segments of Fixed(size=2): set segment to Fixed(1)"),
    (dict(segment=Whole(1), score=Score("end"), lanes=Lanes(1, 1)), "set segment to Fixed(1)"),
    (dict(lanes=Lanes(4, 5)), "has 5 attempts of 4 tokens that are enumerated"),
    (dict(score=Score("never")), "decides by rewards and has score.when='never'"),
])
def test_plans_that_cannot_be_enumerated(given, message):
    class Wrong:
        def plan(self) -> Plan:
            return Plan(Enumerate(4), Fixed(1), Lanes(4, 4), Score("segment"), RewardGuided(1.0))._replace(**given)

    with pytest.raises(stars.RequestError) as caught:
        plan_of(Wrong())
    assert message in str(caught.value), caught.value


def test_fewer_attempts_than_ranks_and_rules_in_order():
    """Three of eight ranks: the threshold takes the first that is good enough, in the order of probability."""
    class First:
        def plan(self) -> Plan:
            return Plan(Enumerate(8), Fixed(1), Lanes(2, 3), Score("segment"), Threshold(1.0, 0.0, 0.5))

    class MostProbable:
        def plan(self) -> Plan:
            return Plan(Enumerate(8), Fixed(1), Lanes(1, 8), Score("never"), Always())

    prompt = {"prompt_token_ids": ids(6, 23, 5)}
    params = stars.SamplingParams(max_tokens=16, seed=1, ignore_eos=True)
    engine = toy_engine(LM, RM)
    [output] = engine.generate(prompt, params, First(), use_tqdm=False)
    response: list[int] = []
    tried = []
    for segment in output.outputs[0].segments:
        order = np.argsort(-LM.logits(prompt["prompt_token_ids"] + response)).tolist()
        rewards = [RM.reward(prompt["prompt_token_ids"] + response + [token]) for token in order[:3]]
        accepted = next((place for place, reward in enumerate(rewards) if reward >= 0.5), None)
        winner = int(np.argmax(rewards)) if accepted is None else accepted
        assert (segment.winner, segment.accepted) == (winner, accepted is not None)
        assert segment.token_ids == [order[winner]]
        response += segment.token_ids
        tried.append((winner, segment.accepted))
    assert {(0, True), (1, True)} <= set(tried) and any(not accepted for _, accepted in tried)
    greedy = [engine.generate(prompt, stars.SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True), policy,
                              use_tqdm=False)[0].outputs[0].token_ids for policy in (MostProbable(), stars.Sample())]
    assert greedy[0] == greedy[1]
    nothing_is_held(engine)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: stars.ARGS(0), "ARGS.topk is 0"), (lambda: stars.ARGS(257), "ARGS.topk is 257"),
    (lambda: stars.ARGS(weight=math.inf), "ARGS.weight is inf, it must be a finite number"),
    (lambda: stars.ARGS(method="topk"), "ARGS.method is 'topk', it must be one of greedy, stochastic"),
    (lambda: stars.ARGS(temperature=0.0), "ARGS.temperature is 0.0, it must be a finite number of at least 1e-06"),
    (lambda: stars.RAD(beta=math.nan), "RAD.beta is nan"), (lambda: stars.RAD(inverse=1.5), "RAD.inverse is 1.5"),
    (lambda: stars.RAD(clamp="no"), "RAD.clamp is 'no'"), (lambda: stars.RAD(temperature=-1), "RAD.temperature is -1"),
])
def test_parameters_that_are_refused(call, message):
    with pytest.raises(stars.RequestError) as caught:
        call()
    assert message in str(caught.value), caught.value


def test_numbers_of_numpy_are_kept_as_pythons():
    policy = stars.RAD(np.int64(3), np.float32(2), np.bool_(True), temperature=np.float64(0.5))
    assert policy == stars.RAD(3, 2.0, True, temperature=0.5) and type(policy.topk) is int
    assert policy.plan() == Plan(
        Enumerate(3), Fixed(1), Lanes(3, 3), Score("segment"), RewardGuided(-2.0, 0.5, 0.0, 1.0))
    assert stars.ARGS().plan() == Plan(
        Enumerate(10), Fixed(1), Lanes(10, 10), Score("segment"), RewardGuided(1.0, 0.0))
    assert isinstance(stars.Sample().plan().propose, Sampled)


# -- the shipped pair beside transformers -------------------------------------------------------------------------


def test_the_greedy_text_is_that_of_a_loop_on_transformers():
    """Everything recomputed in float32. Scores of the two differ by rounding, some 1e-5: a text could only differ where
    the best two are closer than 1e-3, of which there is none."""
    transformers = pytest.importorskip("transformers")
    engine = stars.Engine(MODELS / "lm", MODELS / "rm", dtype="float32")
    lm = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "lm", dtype=torch.float32).eval()
    rm = transformers.AutoModelForSequenceClassification.from_pretrained(MODELS / "rm", dtype=torch.float32).eval()
    eos = set(engine._intake._eos_token_ids)
    for text, topk, weight in (("This film was", 10, 1.0), ("After twenty minutes I", 7, 3.0)):
        [output] = engine.generate(text, stars.SamplingParams(max_tokens=12), stars.ARGS(topk, weight), use_tqdm=False)
        prompt, response, smallest = output.prompt_token_ids, [], math.inf
        with torch.inference_mode():
            for segment in output.outputs[0].segments:
                logits = lm(torch.tensor([prompt + response])).logits[0, -1]
                values, tokens = logits.topk(topk)
                assert [attempt.token_ids[0] for attempt in segment.attempts] == tokens.tolist()
                hidden = rm.model(torch.tensor([prompt + response + [token] for token in tokens.tolist()]))[0]
                # EOS is not read: the row before it is the end.
                last = torch.tensor([-2 if token in eos else -1 for token in tokens.tolist()])
                rewards = rm.score(hidden[torch.arange(topk), last])[:, 0]
                scores = values + weight * rewards
                best, second = scores.topk(2).values.tolist()
                smallest = min(smallest, best - second)
                assert [attempt.reward for attempt in segment.attempts] == pytest.approx(rewards.tolist(), abs=1e-3)
                response.append(int(tokens[scores.argmax()]))
                assert segment.token_ids == response[-1:]
        assert output.outputs[0].token_ids == response and smallest > 1e-3, smallest
        assert len(response) == 12 or response[-1] in eos


def test_a_stop_string_and_eos():
    """A token that completes a stop string ends the response, as does EOS: both are candidates like any other."""
    engine = stars.Engine(MODELS / "lm", MODELS / "rm")
    params = stars.SamplingParams(max_tokens=24)
    [whole_text] = engine.generate("This film was", params, stars.ARGS(6), use_tqdm=False)
    words = whole_text.outputs[0].text.split()
    stopped = stars.SamplingParams(max_tokens=24, stop=[words[4]])
    [output] = engine.generate("This film was", stopped, stars.ARGS(6), use_tqdm=False)
    [completion] = output.outputs
    assert completion.finish_reason == "stop" and completion.stop_reason == words[4]
    assert whole_text.outputs[0].text.startswith(completion.text) and words[4] not in completion.text
    nothing_is_held(engine)
    toy = toy_engine(LM, stars.FunctionReward(
        lambda prompt, responses: [10.0 * (len(one) == 2) for one in responses], inputs="ids"))
    [output] = toy.generate({"prompt_token_ids": ids(4, 23)}, stars.SamplingParams(max_tokens=9, seed=1),
                            stars.ARGS(23, 5.0), use_tqdm=False)
    assert output.outputs[0].token_ids[2:] == [EOS] and output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].reward == 10.0
