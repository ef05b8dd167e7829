"""The law of section "accept": committed segments against the exact distribution, by enumeration.

A toy model of five tokens makes every segment countable: the probability of each candidate under the proposal, its
reward, its threshold, and from those the exact law of the committed segment with the cap and the best-seen fallback.
A chi-square test compares, for every prefix that occurred (so for first, middle, and clipped last segments), the
segments that followed it, and a second one the attempt that won.

False positives: a test compares two p-values with 5e-7, so that it fails a correct engine once in 1e6 choices of the
seed (to the accuracy of the chi-square approximation at cells of 8 expected counts and more). Seeds are fixed: a test
that passes always passes. Draws a test: 2048 responses with libstars and 768 without it, where a draw costs 30 times
as much. That these are enough to see an error is shown by planting errors: with each, the same test must fail.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import pytest

import law
import stars
import stars.judge
import stars.policies
import stars.proposer
import stars.request
import stars.rules
from law import DRAWS, FALSE_POSITIVE_RATE, MAX_TOKENS, MODEL, PROMPT, REWARD, Prefix, candidates, p_value
from stars.rules import Decision, Threshold
from toy import EOS, toy_engine

# MAX_TOKENS makes segments of 2, 2 and 1 tokens.
pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Case(NamedTuple):
    """What is drawn, and how."""

    policy: stars.STARS
    params: stars.SamplingParams
    reward: Callable = REWARD


def case(width: int = 3, beta: float = 0.5, alpha: float = 0.2, max_attempts: int = 4, threshold: float = 3.5,
         segment_size: int = 2, reward: Callable = REWARD, seed: int = 11, **params) -> Case:
    """Accept rates of 0.25 to 0.6 and thresholds that rise by 0.5 a token, unless told otherwise."""
    policy = stars.STARS(segment_size, max_attempts, alpha, beta, threshold, width)
    return Case(policy, stars.SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS, seed=seed, **params), reward)


def draw(drawn: Case) -> list[stars.CompletionOutput]:
    """All responses of a case, in one call."""
    return law.draw(drawn.policy, drawn.params, drawn.reward)


# -- the exact law ------------------------------------------------------------------------------------------------


def segment_law(prefix: Prefix, drawn: Case, model=MODEL) -> tuple[dict[Prefix, float], dict[int, float]]:
    """(probability of each committed segment, probability of each winning attempt, 0 for the fallback)."""
    policy, params = drawn.policy, drawn.params
    target, most = policy.reward_threshold, policy.max_attempts
    r0 = (1 - policy.alpha) * drawn.reward([]) + policy.alpha * target
    accepted, rejected, rewards = {}, {}, {}
    for segment, probability in candidates(prefix, min(policy.segment_size, MAX_TOKENS - len(prefix)), params, model):
        reward = drawn.reward([token for token in prefix + segment if token != EOS])
        tau = min(target, r0 + (len(prefix) + len(segment)) / MAX_TOKENS * (target - r0))
        if policy.beta == 0:
            accept = float(reward >= tau)
        else:
            accept = min(1.0, math.exp((reward - tau) / policy.beta))
        accepted[segment], rejected[segment] = probability * accept, probability * (1 - accept)
        rewards[segment] = reward
    once, again = sum(accepted.values()), sum(rejected.values())
    attempts = {attempt: once * again ** (attempt - 1) for attempt in range(1, most + 1)} | {0: again**most}
    tries = sum(again**attempt for attempt in range(most))
    law = {segment: probability * tries for segment, probability in accepted.items()}
    for segment, probability in rejected.items():
        # All `most` attempts were rejected with rewards of at most this one's, and not all of them with less. Among
        # those of equal reward the earliest wins, which is each of them in proportion to its probability.
        equal = sum(p for other, p in rejected.items() if rewards[other] == rewards[segment])
        below = sum(p for other, p in rejected.items() if rewards[other] < rewards[segment])
        if probability > 0:
            law[segment] += ((below + equal) ** most - below**most) * probability / equal
    return law, attempts


def p_values(drawn: Case, outputs: list[stars.CompletionOutput]) -> tuple[float, float]:
    """p of the committed segments and p of the winning attempts."""
    segments: dict[Prefix, Counter] = defaultdict(Counter)
    attempts: dict[Prefix, Counter] = defaultdict(Counter)
    for output in outputs:
        prefix: Prefix = ()
        for segment in output.segments:
            segments[prefix][tuple(segment.token_ids)] += 1
            attempts[prefix][segment.winner + 1 if segment.accepted else 0] += 1
            prefix += tuple(segment.token_ids)
        assert list(prefix) == output.token_ids
    return (p_value(segments, lambda prefix: segment_law(prefix, drawn)[0]),
            p_value(attempts, lambda prefix: segment_law(prefix, drawn)[1]))


def follows_the_law(drawn: Case, outputs: list[stars.CompletionOutput]) -> bool:
    """The test of this file."""
    return min(p_values(drawn, outputs)) > FALSE_POSITIVE_RATE / 2


CASES = {
    "soft, width 1": case(width=1),
    "soft, width 3": case(width=3),
    "soft, width 8": case(width=8, max_attempts=20, seed=12),
    "soft, a round beyond the cap": case(width=8, max_attempts=5, seed=13),
    "hard, width 1": case(width=1, beta=0.0, threshold=2.5, seed=14),
    "hard, width 3": case(width=3, beta=0.0, threshold=2.5, seed=15),
    "alpha 0": case(alpha=0.0, threshold=4.0, seed=16),
    "alpha 0.5": case(alpha=0.5, threshold=3.0, seed=17),
    "alpha 1": case(alpha=1.0, threshold=2.0, seed=18),
    "a threshold that would fall": case(
        alpha=0.0, threshold=2.5, seed=19, reward=lambda ids: REWARD(ids) + 5.0 * (not ids)),
    "one attempt": case(max_attempts=1, seed=20),
    "segments of 3, filtered proposal": case(
        segment_size=3, threshold=2.8, temperature=0.8, top_k=4, top_p=0.95, seed=21),
    "penalties": case(
        segment_size=3, threshold=2.8, presence_penalty=0.6, frequency_penalty=0.5, repetition_penalty=0.7, seed=23),
    "rewards that tie": case(reward=lambda ids: float(round(REWARD(ids))), beta=0.4, seed=22),
    "a barrier": case(seed=24)._replace(policy=stars.STARS(2, 4, 0.2, 0.5, 3.5, barrier=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_committed_segments_follow_the_law(name):
    """Any deviation of the sampler: a wrong threshold, order, cap or fallback, a biased draw, an EOS miscounted."""
    drawn = CASES[name]
    outputs = draw(drawn)
    assert follows_the_law(drawn, outputs), p_values(drawn, outputs)


def test_the_base_case_has_power():
    """Accepting neither always nor hardly ever, EOS inside segments, thresholds that differ from reward_threshold."""
    drawn = CASES["soft, width 3"]
    outputs = draw(drawn)
    metrics = [output.metrics for output in outputs]
    rate = sum(m.accepted for m in metrics) / sum(m.attempts_counted for m in metrics)
    assert 0.25 <= rate <= 0.6, rate
    segments = [segment for output in outputs for segment in output.segments]
    within = [s for s in segments if EOS in s.token_ids[:1]]
    assert len(within) > 0.05 * len(segments)
    below = [s for s in segments if s.threshold < drawn.policy.reward_threshold - 0.25]
    assert len(below) > 0.5 * len(segments)
    assert sum(not s.accepted for s in segments) > 0.05 * len(segments)


# -- planted errors -----------------------------------------------------------------------------------------------


def best_accepted(monkeypatch):
    """The best of the accepted lanes of a round wins, instead of the first."""
    call = Threshold.__call__

    def best_instead(self, judged, state):
        decision = call(self, judged, state)
        if not decision.keep:
            return decision
        start = stars.rules.threshold_start(state.prompt_reward, self.alpha, self.reward_threshold)
        accepted = [one for one in judged if stars.rules.accepts(one.uniforms[0], one.reward, stars.rules.threshold(
            one.tokens, state.max_tokens, start, self.reward_threshold), self.beta)]
        best = max(accepted, key=lambda one: one.reward)
        notes = {key: note._replace(accepted=key == (0, best.attempt)) for key, note in decision.notes.items()}
        return Decision([stars.rules.whole(best)], [], notes)

    monkeypatch.setattr(Threshold, "__call__", best_instead)


def prompt_reward_zero(monkeypatch):
    """r(x) is taken to be 0."""
    start = stars.rules.threshold_start
    monkeypatch.setattr(stars.rules, "threshold_start", lambda prompt_reward, alpha, target: start(0.0, alpha, target))


def prompt_reward_of_first_candidate(monkeypatch):
    """r(x) is the reward of the first candidate that was ever drawn, instead of the empty response's."""
    shown, first = stars.judge.shown, {}

    def shown_with_first(group, *given):
        judged, state = shown(group, *given)
        if judged:
            first.setdefault(group, judged[0].reward)
        return judged, state._replace(prompt_reward=first[group])

    monkeypatch.setattr(stars.judge, "shown", shown_with_first)


def alpha_swapped(monkeypatch):
    """alpha and 1 - alpha change places."""
    start = stars.rules.threshold_start
    monkeypatch.setattr(stars.rules, "threshold_start",
                        lambda prompt_reward, alpha, target: start(prompt_reward, 1 - alpha, target))


def cap_per_round(monkeypatch):
    """max_attempts counts rounds instead of attempts."""
    settle = stars.request.Request.__post_init__

    def settle_more(self):
        settle(self)
        self.attempts = tuple(count * self.plan.lanes.width for count in self.attempts)

    monkeypatch.setattr(stars.request.Request, "__post_init__", settle_more)


def _shift_length(monkeypatch, less: Callable) -> None:
    """The threshold is taken at `less(lane)` tokens fewer."""
    judge = stars.judge.may_judge

    def judge_shorter(lane):
        judge(lane)
        lane.judged = lane.judged._replace(tokens=lane.judged.tokens - less(lane))

    monkeypatch.setattr(stars.judge, "may_judge", judge_shorter)


def threshold_without_candidate(monkeypatch):
    """tau at the length of the committed response, without the candidate."""
    _shift_length(monkeypatch, lambda lane: len(lane.token_ids))


def eos_not_counted(monkeypatch):
    """tau at a length that leaves EOS out."""
    _shift_length(monkeypatch, lambda lane: lane.token_ids[-1] == EOS)


def uniform_reused(monkeypatch):
    """All attempts of a segment are tested with one uniform."""
    uniform = stars.judge.accept_uniform
    monkeypatch.setattr(stars.judge, "accept_uniform",
                        lambda seed, attempt, segment, sample: uniform(seed, 1, segment, sample))


def noise_reused(monkeypatch):
    """Attempts of later segments repeat the noise of the first."""
    monkeypatch.setattr(stars.proposer, "pack_stream", lambda segment, sample: sample << 20)


@pytest.mark.parametrize("error", [
    best_accepted, prompt_reward_zero, prompt_reward_of_first_candidate, alpha_swapped, cap_per_round,
    threshold_without_candidate, eos_not_counted, uniform_reused, noise_reused, law.noise_reused,
    law.lanes_in_wrong_order,
])
def test_a_planted_error_is_seen(error, monkeypatch):
    """The same case and the same seed as "soft, width 3" above, where the engine passes."""
    drawn = CASES["soft, width 3"]
    error(monkeypatch)
    outputs = draw(drawn)
    assert not follows_the_law(drawn, outputs), p_values(drawn, outputs)


# -- plain sampling and the edges ---------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [
    {}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.25},
    {"temperature": 1.5, "min_p": 0.1, "top_k": 4, "top_p": 0.85},
    {"presence_penalty": 1.0, "frequency_penalty": -0.8, "repetition_penalty": 1.5, "temperature": 0.8},
], ids=str)
def test_plain_sampling_follows_the_proposal(filters):
    """Token by token, given what came before: the order of the filters, their edges, and the noise of each place."""
    params = stars.SamplingParams(max_tokens=3, n=DRAWS, seed=31, **filters)
    engine = toy_engine(MODEL, max_num_seqs=512, max_num_lanes=512, max_segment_size=16, cache_tokens=1 << 14)
    [output] = engine.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    followers: dict[Prefix, Counter] = defaultdict(Counter)
    for completion in output.outputs:
        for place, token in enumerate(completion.token_ids):
            followers[tuple(completion.token_ids[:place])][(token,)] += 1
    p = p_value(followers, lambda prefix: dict(candidates(prefix, 1, params)))
    assert p > FALSE_POSITIVE_RATE, p


def completions_alike(monkeypatch):
    """All completions of a request draw the same."""
    monkeypatch.setattr(stars.proposer, "pack_stream", lambda segment, sample: segment)


@pytest.mark.parametrize("error", [None, noise_reused, completions_alike])
def test_plain_sampling_in_several_segments(error, monkeypatch):
    """Of two tokens each; with an error of the noise the same test must fail."""
    monkeypatch.setattr(stars.policies, "DRAFT_SIZE", 2)
    if error is not None:
        error(monkeypatch)
    params = stars.SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS, seed=32)
    p = p_value(law.followers(law.draw(stars.Sample(), params)),
                lambda prefix: dict(candidates(prefix, min(2, MAX_TOKENS - len(prefix)), params)))
    assert (p > FALSE_POSITIVE_RATE) == (error is None), p


def test_threshold_of_minus_infinity_is_plain_sampling():
    """Token for token, with the same seed, in segments of the plain draft's size."""
    params = stars.SamplingParams(max_tokens=40, n=24, seed=5)
    fn = stars.FunctionReward(lambda prompt, responses: [REWARD(ids) for ids in responses], inputs="ids")
    engine = toy_engine(MODEL, fn)
    prompt = {"prompt_token_ids": PROMPT}
    [plain] = engine.generate(prompt, params, stars.Sample(), use_tqdm=False)
    for width in (1, 4):
        policy = stars.STARS(segment_size=16, reward_threshold=-math.inf, width=width)
        [steered] = engine.generate(prompt, params, policy, use_tqdm=False)
        assert [o.token_ids for o in steered.outputs] == [o.token_ids for o in plain.outputs]
        assert all(segment.accepted for o in steered.outputs for segment in o.segments)
    assert len({len(o.token_ids) for o in plain.outputs}) > 3, "EOS never came: the test shows little"


def test_threshold_of_plus_infinity_is_blockwise_best_of_k():
    """Token for token: every attempt is rejected, and the best seen wins."""
    params = stars.SamplingParams(max_tokens=11, n=24, seed=6)
    fn = stars.FunctionReward(lambda prompt, responses: [REWARD(ids) for ids in responses], inputs="ids")
    engine = toy_engine(MODEL, fn)
    prompt = {"prompt_token_ids": PROMPT}
    [blockwise] = engine.generate(prompt, params, stars.BlockwiseBestOfK(k=5, segment_size=3), use_tqdm=False)
    for width in (1, 2, 5, 8):
        policy = stars.STARS(segment_size=3, max_attempts=5, reward_threshold=math.inf, width=width)
        [steered] = engine.generate(prompt, params, policy, use_tqdm=False)
        assert [o.token_ids for o in steered.outputs] == [o.token_ids for o in blockwise.outputs]
        assert not any(segment.accepted for o in steered.outputs for segment in o.segments)
