"""CARDS: committed segments against the exact law, and decision by decision against the published loop.

The law by enumeration: a candidate ends before the token whose distribution is too uncertain, the first accepted of all
attempts but the last wins, else the best of all, the last included. A test of the law compares two p-values with 5e-7
each (see `law`); that the draws are enough to see an error is shown by planting errors.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

import cards_loop
import law
import oracle
import stars
import stars.draft
import stars.proposer
from law import DRAWS, FALSE_POSITIVE_RATE, MAX_TOKENS, MODEL, PROMPT, REWARD, Prefix, p_value
from stars.cli.options import shipped_pair
from stars.kernels.graph import Graphs
from stars.kernels.sample_step import sample_step
from stars.plan import Entropy, Lanes, plan_of
from toy import EOS, ToyModel, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Entropies after one to three tokens of the toy run from 0.9 to 1.58 nats; it halves them, after one token too.
CUT = 1.35


class Case(NamedTuple):
    """What is drawn, and how."""

    policy: stars.CARDS
    params: stars.SamplingParams
    reward: Callable = REWARD


def case(width: int = 3, cut: float = CUT, least: int = 1, most: int = 3, max_attempts: int = 4, threshold: float = 3.5,
         option: str = "soft", reward: Callable = REWARD, seed: int = 51, **params) -> Case:
    """Thresholds that rise by 0.5 a token."""
    policy = stars.CARDS(cut, least, most, max_attempts, 0.2, 0.5, threshold, option, width)
    return Case(policy, stars.SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS // 2, seed=seed, **params), reward)


# -- the exact law ------------------------------------------------------------------------------------------------


def candidates(prefix: Prefix, drawn: Case, at: int = 0) -> Iterator[tuple[Prefix, float]]:
    """Every segment that can follow `prefix`, of which `at` tokens are drawn, with its probability."""
    policy, params = drawn.policy, drawn.params
    if at and (prefix[-1] == EOS or at == policy.max_segment or len(prefix) == MAX_TOKENS):
        yield (), 1.0
        return
    logits = oracle.penalised(MODEL.logits(PROMPT + list(prefix)), PROMPT, list(prefix), params)
    if at >= policy.min_segment:
        nats = cards_loop.entropy(logits)
        assert abs(nats - policy.entropy_threshold) > 1e-4, "the engine's float32 could go the other way"
        if nats >= policy.entropy_threshold:
            yield (), 1.0
            return
    for token, logprob in enumerate(oracle.log_softmax(oracle.proposal(logits, params))):
        if logprob > -math.inf:
            for rest, probability in candidates((*prefix, token), drawn, at + 1):
                yield (token, *rest), math.exp(logprob) * probability


def segment_law(prefix: Prefix, drawn: Case) -> tuple[dict[Prefix, float], dict[int, float]]:
    """(probability of each committed segment, probability of each winning attempt, 0 for the best seen)."""
    policy, target, tested = drawn.policy, drawn.policy.reward_threshold, drawn.policy.max_attempts - 1
    r0 = (1 - policy.alpha) * drawn.reward([]) + policy.alpha * target
    chances, accepted, rejected, rewards = {}, {}, {}, {}
    for segment, probability in candidates(prefix, drawn):
        reward = drawn.reward([token for token in prefix + segment if token != EOS])
        tau = min(target, r0 + (len(prefix) + len(segment)) / MAX_TOKENS * (target - r0))
        hard = policy.option == "hard"
        accept = float(reward >= tau) if hard else min(1.0, math.exp((reward - tau) / policy.beta))
        chances[segment], rewards[segment] = probability, reward
        accepted[segment], rejected[segment] = probability * accept, probability * (1 - accept)
    once, again = sum(accepted.values()), sum(rejected.values())
    attempts = {attempt: once * again ** (attempt - 1) for attempt in range(1, tested + 1)} | {0: again**tested}
    exact = {segment: probability * sum(again**attempt for attempt in range(tested))
             for segment, probability in accepted.items()}
    for segment, reward in rewards.items():
        # The best of `tested` rejected ones and one that is not tested, the earliest of equals: at each place it may
        # have, those before it have less and those after it no more.
        less = sum(rejected[other] for other in rewards if rewards[other] < reward)
        no_more = sum(rejected[other] for other in rewards if rewards[other] <= reward)
        last_no_more = sum(chances[other] for other in rewards if rewards[other] <= reward)
        exact[segment] += less**tested * chances[segment] + sum(
            less**place * rejected[segment] * no_more ** (tested - 1 - place) * last_no_more for place in range(tested))
    return exact, attempts


def p_values(drawn: Case) -> tuple[float, float]:
    """p of the committed segments and p of the winning attempts."""
    outputs = law.draw(drawn.policy, drawn.params, drawn.reward)
    attempts: dict[Prefix, Counter] = defaultdict(Counter)
    for output in outputs:
        prefix: Prefix = ()
        for segment in output.segments:
            attempts[prefix][segment.winner + 1 if segment.accepted else 0] += 1
            prefix += tuple(segment.token_ids)
    known: dict[Prefix, tuple] = {}

    def laws(prefix: Prefix) -> tuple:
        if prefix not in known:
            known[prefix] = segment_law(prefix, drawn)
        return known[prefix]

    return (p_value(law.followers(outputs), lambda prefix: laws(prefix)[0]),
            p_value(attempts, lambda prefix: laws(prefix)[1]))


CASES = {
    "soft, width 1": case(width=1),
    "soft, width 3": case(width=3),
    "hard, width 1": case(width=1, option="hard", threshold=2.5, seed=52),
    "hard, width 3": case(width=3, option="hard", threshold=2.5, seed=53),
    "two at least, filters and temperature": case(least=2, most=4, threshold=2.8, temperature=0.7, top_k=4, seed=54),
    "penalties": case(threshold=2.8, presence_penalty=0.6, repetition_penalty=0.7, seed=55),
    "rewards that tie": case(reward=lambda ids: float(round(REWARD(ids))), max_attempts=3, seed=56),
    "two attempts, one of which is tested": case(max_attempts=2, seed=57),
}


SLOW = ("hard, width 1", "penalties")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_committed_segments_follow_the_law(name):
    """Where a segment ends, which candidate wins, and at which attempt."""
    assert min(found := p_values(CASES[name])) > FALSE_POSITIVE_RATE / 2, found


def test_the_cut_divides_the_prefixes():
    """Segments of every length occur without EOS, and not by chance: some prefixes are cut and some are not."""
    lengths = Counter(len(segment) for segment, _ in candidates((), CASES["soft, width 3"]) if EOS not in segment)
    assert set(lengths) == {1, 2, 3} and all(count >= 2 for count in lengths.values()), lengths


# -- planted errors -----------------------------------------------------------------------------------------------


def sampler(monkeypatch, step: Callable) -> None:
    """Steps are drawn by `step(logits, lanes, nats)` instead, nats float64 [lanes] of the logits; none is recorded."""
    def run(logits, lanes, filters=True, ended=None, cuts=True):
        step(logits, lanes, torch.special.entr(logits.double().softmax(1)).sum(1))

    monkeypatch.setattr(stars.draft, "sample_step", run)
    monkeypatch.setattr(Graphs, "run", lambda self, parts, done, times=1, rare=False: self._run_plainly(
        parts, done, times))


def cut_a_token_late(monkeypatch):
    """The uncertain token is drawn before the segment ends."""
    def step(logits, lanes, nats):
        ends = (lanes.done == 0) & (lanes.steps >= lanes.least_tokens) & (nats >= lanes.entropy_cut)
        sample_step(logits, lanes._replace(entropy_cut=torch.full_like(lanes.entropy_cut, math.inf)))
        lanes.done[ends] = 1

    sampler(monkeypatch, step)


def cut_a_token_early(monkeypatch):
    """The token before the uncertain one is taken back."""
    def step(logits, lanes, nats):
        steps, done = lanes.steps.clone(), lanes.done.clone()
        sample_step(logits, lanes)
        lanes.steps[(done == 0) & (lanes.done == 1) & (lanes.steps == steps) & (steps > 1)] -= 1

    sampler(monkeypatch, step)


def entropy_of_the_proposal(monkeypatch):
    """The entropy is taken at the temperature of the draw."""
    def step(logits, lanes, nats):
        hot = torch.special.entr((logits / lanes.temperature[:, None]).double().softmax(1)).sum(1)
        cut = torch.where(hot >= lanes.entropy_cut, 0.0, math.inf)
        sample_step(logits, lanes._replace(entropy_cut=cut))

    sampler(monkeypatch, step)


def least_ignored(monkeypatch):
    """A segment may be cut after its first token."""
    spec = stars.proposer.LaneSpec
    monkeypatch.setattr(stars.proposer, "LaneSpec",
                        lambda *given, **named: spec(*given, **named)._replace(least_tokens=1))


def last_attempt_tested(monkeypatch):
    """The last attempt is accepted if it passes, though a better one was seen."""
    plan = stars.CARDS.plan

    def tested(self):
        made = plan(self)
        return made._replace(decide=type(made.decide)(made.decide.alpha, made.decide.beta,
                                                      made.decide.reward_threshold))

    monkeypatch.setattr(stars.CARDS, "plan", tested)


PLANTED = {
    cut_a_token_late: "soft, width 3", cut_a_token_early: "soft, width 3", last_attempt_tested: "rewards that tie",
    least_ignored: "two at least, filters and temperature",
    entropy_of_the_proposal: "two at least, filters and temperature",
    law.noise_reused: "soft, width 3", law.lanes_in_wrong_order: "hard, width 3",
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_seen(error, monkeypatch):
    """In the case above of this name, where the engine passes."""
    error(monkeypatch)
    assert min(found := p_values(CASES[PLANTED[error]])) < FALSE_POSITIVE_RATE / 2, found


def test_the_planted_sampler_is_right_without_an_error(monkeypatch):
    """So that what is seen above is the error, and not the way that it is planted."""
    sampler(monkeypatch, lambda logits, lanes, nats: sample_step(logits, lanes))
    assert min(found := p_values(CASES["soft, width 3"])) > FALSE_POSITIVE_RATE / 2, found


# -- the published loop -------------------------------------------------------------------------------------------


def equals_the_published_loop(output: stars.RequestOutput, params: stars.SamplingParams, lm: Callable,
                              reward: Callable, width: int, tolerance: float, **ends) -> Counter:
    """Every decision of every completion; how often each was made. ends: `stop_ids` and `clip` of the loop; without
    them segments are compared as far as no candidate may run past the end."""
    policy, seen = output.policy, Counter()
    for completion in output.outputs:
        assert completion.error is None
        noise, uniform = oracle.draws_of(output.seed, completion.index)
        kept = cards_loop.run(
            lm, reward, output.prompt_token_ids, noise, uniform, option=policy.option,
            entropy_threshold=policy.entropy_threshold, reward_threshold=policy.reward_threshold, alpha=policy.alpha,
            beta=policy.beta, topk=params.top_k or 1 << 20, max_new_token=params.max_tokens,
            shortest=policy.min_segment, longest=policy.max_segment, regenerations=policy.max_attempts - 1, **ends)
        compared, drawn = len(kept), 0
        if not ends:
            for compared, one in enumerate(kept):
                if drawn + policy.max_segment > params.max_tokens:
                    break
                drawn += len(one.token_ids)
        assert compared >= 1 and len(completion.segments) >= compared
        for segment, right in zip(completion.segments[:compared], kept[:compared], strict=True):
            assert segment.token_ids == right.token_ids and segment.accepted == right.accepted
            count = len(right.candidates)
            assert count <= len(segment.attempts) < count + width  # behind the winner, what was drawn with it
            for attempt, wanted in zip(segment.attempts[:count], right.candidates, strict=True):
                assert attempt.token_ids == wanted.token_ids and attempt.accepted == wanted.accepted
                assert attempt.reward == pytest.approx(wanted.reward, abs=tolerance)
                assert attempt.threshold == pytest.approx(wanted.threshold, abs=tolerance)
            assert not any(attempt.accepted for attempt in segment.attempts[count:])
            seen["accepted" if right.accepted else "best seen"] += 1
            seen["rejected"] += sum(not one.accepted for one in right.candidates)
            seen["cut"] += sum(len(one.token_ids) < policy.max_segment for one in right.candidates)
            seen["full"] += sum(len(one.token_ids) == policy.max_segment for one in right.candidates)
        if ends:
            assert completion.token_ids == [token for one in kept for token in one.token_ids]
    return seen


LARGER = ToyModel(vocab=37, seed=2, hidden=24, layers=2, heads=4, kv_heads=2, head_dim=6, sharpness=2.0)
FUNCTION = table_reward(seed=3)


@pytest.mark.parametrize("option, width, target", [
    ("soft", 1, 1.5), ("soft", 3, 2.5), ("hard", 3, 1.5), ("hard", 8, 99.0)])
@pytest.mark.parametrize("ours", [False, True], ids=["published", "with EOS and a clipped end"])
def test_decisions_are_those_of_the_published_loop(option, width, target, ours):
    """Its temperature is beta, too. Draws, rewards and thresholds, in pages and lanes here and from scratch there."""
    policy = stars.CARDS(2.6, 3, 7, 6, 0.5, 0.8, target, option, width)
    params = stars.SamplingParams(max_tokens=26, n=3, seed=8, temperature=0.8, top_k=20, ignore_eos=not ours)
    reward = stars.FunctionReward(lambda prompt, responses: [FUNCTION(one) for one in responses], inputs="ids")
    engine = toy_engine(LARGER, reward)
    prompts = [ids(5, 37, seed=1), ids(9, 37, seed=2)]
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, policy, use_tqdm=False)
    engine.check_integrity()
    seen = Counter()
    for output in outputs:
        length = len(output.prompt_token_ids)
        seen += equals_the_published_loop(
            output, params, LARGER.logits, lambda text, start=length: FUNCTION(text[start:]), width, 1e-9,
            **(dict(stop_ids=(EOS,), clip=True) if ours else {}))
    assert seen["cut"] > 5 and seen["full"] > 5 and seen["rejected"] > 5, seen
    assert seen["best seen" if target == 99.0 else "accepted"] > 5, seen


def test_decisions_on_the_shipped_pair_are_those_of_the_published_loop():
    """Against transformers in float32, every text run from its start; both options begin with the same candidates."""
    transformers = pytest.importorskip("transformers")
    lm, rm = shipped_pair()
    lm_model = transformers.AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32).eval()
    rm_model = transformers.AutoModelForSequenceClassification.from_pretrained(rm, dtype=torch.float32).eval()

    known: dict[tuple[int, ...], np.ndarray] = {}

    @torch.no_grad()
    def logits(text):
        if tuple(text) not in known:
            known[tuple(text)] = lm_model(torch.tensor([text])).logits[0, -1].double().numpy()
        return known[tuple(text)]

    @torch.no_grad()
    def reward(text):
        return float(rm_model(torch.tensor([text])).logits[0, 0])

    engine = stars.Engine(lm, rm, dtype="float32")
    params = stars.SamplingParams(max_tokens=20, seed=8, temperature=0.7, top_k=40, ignore_eos=True)
    seen = Counter()
    for width, target, option in ((1, 4.0, "soft"), (4, 3.5, "hard")):
        policy = stars.CARDS(reward_threshold=target, option=option, width=width, max_segment=6, max_attempts=4)
        [output] = engine.generate(["The plot of this film"], params, policy, use_tqdm=False)
        seen += equals_the_published_loop(output, params, logits, reward, width, 1e-3)
    assert seen["cut"] > 10 and seen["rejected"] > 10 and seen["accepted"] > 2 and seen["best seen"] > 2, seen


# -- beside others, and what cannot be ----------------------------------------------------------------------------


def test_cards_beside_others_and_after_them():
    """One batch with lanes that are cut, earlier, later and not at all; steps recorded without cuts before."""
    reward = stars.FunctionReward(lambda prompt, responses: [FUNCTION(one) for one in responses], inputs="ids")
    prompt = {"prompt_token_ids": ids(5, 37, seed=1)}
    policies = [stars.Sample(), stars.CARDS(2.6, 3, 7, reward_threshold=1.5, width=2),
                stars.STARS(5, 4, reward_threshold=1.5, width=2), stars.CARDS(1.5, 1, 7, reward_threshold=1.5, width=2)]
    params = [stars.SamplingParams(max_tokens=20, seed=seed, top_k=9) for seed in range(len(policies))]

    def tokens(engine, *which):
        outputs = engine.generate([prompt] * len(which), [params[i] for i in which], [policies[i] for i in which],
                                  use_tqdm=False)
        engine.check_integrity()
        return [[segment.token_ids for segment in output.outputs[0].segments] for output in outputs]

    alone = [tokens(toy_engine(LARGER, reward), index)[0] for index in range(len(policies))]
    engine = toy_engine(LARGER, reward)
    for which in ((2, 1), (0, 3, 2, 1), (2, 2), (1, 1), (2,), (3,), (1,)):  # steps of as many lanes, cut and not
        assert tokens(engine, *which) == [alone[index] for index in which], which
    assert len(alone[3]) > len(alone[1]), "both are cut alike: the test shows little"


@pytest.mark.parametrize("segment, message", [
    (Entropy(math.nan, 1, 4), "segment.cut is nan, it must be nats, 0 or above"),
    (Entropy(1.0, 0, 4), "segment.least is 0"), (Entropy(1.0, 5, 4), "segment.most is 4, it must be"),
])
def test_segments_that_cannot_be(segment, message):
    class Own:
        def plan(self):
            return stars.CARDS(reward_threshold=1.0).plan()._replace(segment=segment)

    with pytest.raises(stars.RequestError, match=message):
        plan_of(Own())


def test_an_untested_last_attempt_is_of_one_hypothesis():
    class Own:
        def plan(self):
            return stars.CARDS(reward_threshold=1.0).plan()._replace(lanes=Lanes(1, 3, 2))

    with pytest.raises(stars.RequestError, match="does not test the last attempt, and a population of 2"):
        plan_of(Own())
