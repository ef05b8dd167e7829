"""What the metrics count, of one completion and of several, against values worked out by hand; and what the width
chooser is told. Rewards are scripted: a call is one response's candidates of one round."""

from __future__ import annotations

import math

import pytest

import stars
from stars.outputs import Metrics
from toy import ids, toy_engine, toy_pair

LM, RM = toy_pair(11, (1, 2), sharpness=1.0)
PROMPT = {"prompt_token_ids": ids(9, 11)}


class Script:
    """A reward function that returns what is written, call by call, and is asked for exactly that."""

    def __init__(self, *calls: list[float]):
        self.calls = list(calls)
        self.candidates = sum(map(len, calls))

    def __call__(self, prompt, responses):
        rewards = self.calls.pop(0)
        assert len(responses) == len(rewards), f"asked for {len(responses)} rewards instead of {rewards}"
        return rewards


def hard(segment_size: int, max_attempts: int, width: int | None, threshold: float = 1.0) -> stars.STARS:
    """A reward of `threshold` or more is accepted, whatever the length."""
    return stars.STARS(segment_size, max_attempts, alpha=1.0, beta=0.0, reward_threshold=threshold, width=width)


def run(script: Script, params: stars.SamplingParams, policy, **options) -> stars.RequestOutput:
    engine = toy_engine(LM, stars.FunctionReward(script, inputs="ids"), **options)
    [output] = engine.generate(PROMPT, params, policy, use_tqdm=False)
    engine.check_integrity()
    assert not script.calls and all(completion.error is None for completion in output.outputs)
    assert output.metrics.rm_calls == script.candidates
    return output


def params(max_tokens: int, n: int = 1) -> stars.SamplingParams:
    return stars.SamplingParams(max_tokens=max_tokens, n=n, seed=3, ignore_eos=True)


def counts(metrics: Metrics) -> dict[str, int]:
    """All counts that are not 0, but for the rewards that were asked for: `run` has counted those."""
    return {name: value for name, value in vars(metrics).items()
            if value and name != "rm_calls" and not name.endswith("seconds")}


# -- attempts ---------------------------------------------------------------------------------------------------------


def test_counts_of_a_threshold():
    """Segments of 3, 3 and 2 tokens, two lanes a round: accepted at the third attempt, exhausted, at the first."""
    script = Script([0.1, 0.2], [1.5, 9.0], [0.3, 0.2], [0.1, 0.5], [0.4], [1.0, 0.0])
    output = run(script, params(8), hard(3, 5, 2))
    wanted = dict(width=2, segments=3, attempts=4 + 5 + 2, attempts_counted=3 + 5 + 1, accepted=2, fallbacks=1,
                  lm_tokens_drawn=4 * 3 + 5 * 3 + 2 * 2, lm_tokens_kept=8)
    assert counts(output.outputs[0].metrics) == counts(output.metrics) == wanted
    assert output.metrics.accept_rate == 2 / 9
    assert [segment.winner for segment in output.outputs[0].segments] == [2, 3, 0]
    assert [segment.reward for segment in output.outputs[0].segments] == [1.5, 0.5, 1.0]
    assert output.outputs[0].reward == 1.0


def test_counts_of_two_completions():
    """One is accepted at once, the other exhausted a round later; the request has their sums, and the larger width."""
    output = run(Script([1.2, 0.0], [0.1, 0.2], [0.15]), params(4, n=2), hard(4, 3, 2))
    first, second = output.outputs
    assert counts(first.metrics) == dict(width=2, segments=1, attempts=2, attempts_counted=1, accepted=1,
                                         lm_tokens_drawn=8, lm_tokens_kept=4)
    assert counts(second.metrics) == dict(width=2, segments=1, attempts=3, attempts_counted=3, fallbacks=1,
                                          lm_tokens_drawn=12, lm_tokens_kept=4, prompt_tokens_cached=8)
    assert counts(output.metrics) == dict(width=2, segments=2, attempts=5, attempts_counted=4, accepted=1, fallbacks=1,
                                          lm_tokens_drawn=20, lm_tokens_kept=8, prompt_tokens_cached=8)
    assert output.metrics.accept_rate == 1 / 4
    assert (first.reward, second.reward) == (1.2, 0.2)


def test_counts_of_plain_samples():
    """Drafts of 16 tokens, each kept; one reward of the finished response where it is asked for."""
    for policy, script in ((stars.Sample(), Script()), (stars.Sample(score=True), Script([0.5], [0.25]))):
        output = run(script, params(20, n=2), policy)
        each = dict(width=1, segments=2, attempts=2, attempts_counted=2, accepted=2, lm_tokens_drawn=20,
                    lm_tokens_kept=20)
        assert [counts(completion.metrics) for completion in output.outputs] == [
            each, each | dict(prompt_tokens_cached=8)]
        assert output.metrics.attempts == 4 and output.metrics.width == 1
    assert [completion.reward for completion in output.outputs] == [0.5, 0.25]


def test_counts_of_the_best_of_whole_responses():
    """Three responses in two pieces each are three attempts at one segment, of which the earliest best is accepted."""
    output = run(Script([0.1], [0.5], [0.5], [3.0], [1.0], [2.0]), params(20, n=2), stars.BestOfN(3))
    each = dict(width=1, segments=1, attempts=3, attempts_counted=3, accepted=1, lm_tokens_drawn=60, lm_tokens_kept=20)
    assert counts(output.outputs[0].metrics) == each | dict(prompt_tokens_cached=16)
    assert counts(output.outputs[1].metrics) == each | dict(prompt_tokens_cached=24)
    assert counts(output.metrics) == dict(width=1, segments=2, attempts=6, attempts_counted=6, accepted=2,
                                          lm_tokens_drawn=120, lm_tokens_kept=40, prompt_tokens_cached=40)
    for completion, winner, reward in zip(output.outputs, (1, 0), (0.5, 3.0), strict=True):
        [segment] = completion.segments
        assert (segment.winner, segment.reward, completion.reward) == (winner, reward, reward)
        assert segment.attempts[winner].token_ids == completion.token_ids
        assert segment.attempts[winner].logprob == completion.cumulative_logprob


@pytest.mark.parametrize("lanes, width", [(64, 3), (4, 2)])
def test_counts_of_the_best_of_every_block(lanes, width):
    """All three attempts count, in one round or, where two responses share four lanes, in two."""
    blocks = [[0.1, 0.3, 0.2], [0.7, 0.6, 0.7], [0.2, 0.1, 0.3], [1.0, 2.0, 3.0]]  # of both, then of both again
    calls = blocks if width == 3 else [block[part] for pair in (blocks[:2], blocks[2:])
                                       for part in (slice(2), slice(2, 3)) for block in pair]
    output = run(Script(*calls), params(8, n=2), stars.BlockwiseBestOfK(k=3, segment_size=4), max_num_lanes=lanes)
    for index, (completion, winners, rewards) in enumerate(zip(
            output.outputs, ([1, 2], [0, 2]), ([0.3, 0.3], [0.7, 3.0]), strict=True)):
        assert counts(completion.metrics) == dict(width=width, segments=2, attempts=6, attempts_counted=6, accepted=2,
                                                  lm_tokens_drawn=24, lm_tokens_kept=8) | (
            dict(prompt_tokens_cached=8) if index else {})
        assert [segment.winner for segment in completion.segments] == winners
        assert [segment.reward for segment in completion.segments] == rewards
    assert output.metrics.attempts_counted == 12 and output.metrics.width == width


def test_one_attempt_at_temperature_zero():
    output = run(Script([0.0], [0.0]), stars.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
                 hard(3, 5, 2))
    assert counts(output.metrics) == dict(width=1, segments=2, attempts=2, attempts_counted=2, fallbacks=2,
                                          lm_tokens_drawn=6, lm_tokens_kept=6)


# -- the reward model's tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("close, closing", [("none", 0), ("eos", 1)])
def test_tokens_scored_of_a_threshold(close, closing):
    """Each candidate of three tokens runs them, the token before them, and what closes the response; from scratch it
    would be the prompt of 9 and all of the response. r(prompt) is scored once, for the first completion."""
    engine = toy_engine(LM, stars.CausalReward(RM.decoder(), close=close))
    policy = stars.STARS(3, 4, alpha=0.5, beta=0.0, reward_threshold=-1e9, width=2)  # the first attempt always wins
    [output] = engine.generate(PROMPT, params(6, n=2), policy, use_tqdm=False)
    run, full = 2 * 2 * (3 + 1 + closing), 2 * (12 + closing) + 2 * (15 + closing)
    for completion, more_run, more_full in zip(output.outputs, (1 + closing, 0), (9 + closing, 0), strict=True):
        metrics = completion.metrics
        assert (metrics.rm_tokens_scored, metrics.rm_tokens_full_rescore) == (run + more_run, full + more_full)
        assert (metrics.attempts, metrics.attempts_counted, metrics.accepted) == (4, 2, 2)
    assert output.metrics.rm_tokens_scored == 2 * run + 1 + closing
    assert output.metrics.rm_tokens_full_rescore == 2 * full + 9 + closing
    assert output.prompt_reward == pytest.approx(RM.reward(PROMPT["prompt_token_ids"] + [0] * closing), abs=1e-4)


def test_tokens_scored_of_whole_responses():
    engine = toy_engine(LM, RM)
    [output] = engine.generate(PROMPT, params(20, n=2), stars.BestOfN(3), use_tqdm=False)
    for completion in output.outputs:
        assert completion.metrics.rm_tokens_scored == 3 * (20 + 1)
        assert completion.metrics.rm_tokens_full_rescore == 3 * (9 + 20)
    assert output.metrics.rm_tokens_scored == 126 and output.metrics.rm_tokens_full_rescore == 174


def test_a_function_scores_no_tokens():
    output = run(Script([1.0]), params(4), hard(4, 3, 1))
    assert output.metrics.rm_tokens_scored == output.metrics.rm_tokens_full_rescore == 0


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompt_tokens_that_were_cached():
    """Full pages of four of all but the prompt's last token, which others, or an earlier sample, had computed: of their
    prompts and of what they had committed."""
    engine, prompt = toy_engine(LM, page_size=4), ids(13, 11)

    def cached(length: int, n: int = 1, policy=None, tokens=prompt) -> list[int]:
        [output] = engine.generate({"prompt_token_ids": tokens[:length]}, params(3, n), policy, use_tqdm=False)
        assert output.metrics.prompt_tokens_cached == sum(one.metrics.prompt_tokens_cached for one in output.outputs)
        return [one.metrics.prompt_tokens_cached for one in output.outputs]

    assert cached(4) == [0]  # no full page before its last token
    assert cached(11, n=3) == [4, 8, 8]  # once the first one has drawn, its last token's keys are there
    assert cached(11, n=2) == [8, 8]
    assert [cached(length) for length in (3, 4, 5, 8, 9, 12)] == [[0], [0], [4], [4], [8], [8]]
    assert cached(13, n=2) == [12, 12]
    assert cached(13) == [12]
    assert cached(13, tokens=prompt[:5] + ids(8, 11, 77)) == [4]
    assert cached(13, tokens=ids(13, 11, 78)) == [0]


# -- the width chooser ------------------------------------------------------------------------------------------------


class Chooser:
    """Notes what it is asked and answers as written."""

    def __init__(self, *answers: int):
        self.answers, self.asked = list(answers), []

    def choose(self, accepted: int, counted: int, responses: int, most: int) -> int:
        self.asked.append((accepted, counted, responses, most))
        return self.answers.pop(0)


def test_what_the_width_chooser_is_told():
    """Two completions of two segments each, up to six attempts a segment, eight lanes.

    (accepted, counted) are those of the committed segments of the whole request; the most lanes are a response's share,
    or what is left of its attempts. Where that is one lane it is not asked.
    """
    script = Script([0.0] * 3, [0.0, 1.5], [0.0], [0.0] * 4, [0.5, 0.4], [2.0, 0.0], [0.0] * 5, [3.0])
    engine = toy_engine(LM, stars.FunctionReward(script, inputs="ids"), max_num_lanes=8)
    engine._round.proposer.chooser = chooser = Chooser(3, 2, 1, 4, 2, 2, 5)
    [output] = engine.generate(PROMPT, params(4, n=2), hard(2, 6, None), use_tqdm=False)
    assert chooser.asked == [(0, 0, 2, 4), (0, 0, 2, 4),  # of 3 and 2 attempts, the second one's second is accepted
                             (1, 2, 2, 3), (1, 2, 2, 4),  # nothing is
                             (1, 2, 2, 2), (1, 2, 2, 2),  # the first is exhausted, the other's fifth is accepted: ended
                             (2, 13, 1, 6)]  # nothing is accepted of five, and one is left
    assert not script.calls and not chooser.answers
    first, second = (completion.metrics for completion in output.outputs)
    assert counts(first) == dict(width=5, segments=2, attempts=12, attempts_counted=12, accepted=1, fallbacks=1,
                                 lm_tokens_drawn=24, lm_tokens_kept=4)
    assert counts(second) == dict(width=4, segments=2, attempts=8, attempts_counted=7, accepted=2,
                                  lm_tokens_drawn=16, lm_tokens_kept=4, prompt_tokens_cached=8)
    assert output.metrics.width == 5


def test_requests_do_not_share_what_the_width_chooser_is_told():
    script = Script([1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0], [1.0])
    engine = toy_engine(LM, stars.FunctionReward(script, inputs="ids"), max_num_lanes=7)
    engine._round.proposer.chooser = chooser = Chooser(3, 3, 1, 1)
    policy = hard(2, 9, None)
    for max_tokens in (4, 2):
        engine.add_request(PROMPT, params(max_tokens), policy)
    while engine.has_unfinished_requests():
        engine.step()
    assert chooser.asked == [(0, 0, 2, 3), (0, 0, 2, 3), (1, 1, 2, 3), (0, 0, 2, 3)] and not script.calls


def test_a_given_width_is_kept_to_what_there_is():
    """The chooser is not asked; the share of three responses of eight lanes is two."""
    script = Script(*[[0.0, 0.0]] * 3, *[[0.0, 0.0]] * 3, *[[0.0]] * 3)
    engine = toy_engine(LM, stars.FunctionReward(script, inputs="ids"), max_num_lanes=8)
    engine._round.proposer.chooser = chooser = Chooser()
    [output] = engine.generate(PROMPT, params(2, n=3), hard(2, 5, 4), use_tqdm=False)
    assert not chooser.asked and not script.calls
    assert [completion.metrics.width for completion in output.outputs] == [2, 2, 2]
    assert math.isclose(output.metrics.accept_rate, 0.0)
