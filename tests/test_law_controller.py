"""The law through libstars' C interface alone: a bigram model, drawn with stars_gumbel, under the segment controller.

The exact law, the chi-square test and its false positives are those of test_law.py: a test fails a correct library once
in 1e6 choices of the seed, and seeds are fixed. A host in this file draws every attempt of a round, and hands in the
results of all of them at once, so that it is the controller that must find the first. Errors planted in the host must
make the same test fail; errors in the library's own source are planted by tests/mutate.
"""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import pytest

from controller_oracle import ACCEPT, RUNNING, UNDECIDED, sized
from law import FALSE_POSITIVE_RATE, MAX_TOKENS, PROMPT, REWARD, Prefix, content, p_value
from stars.bindings import libstars
from stars.bindings.layouts import STRUCTURES
from stars.bindings.library import last_error, loaded
from test_law import Case, case, segment_law
from toy import EOS

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")

SAMPLES = 2048  # responses of a case, with one seed
VOCAB = 5


class Bigram:
    """Logits of the next token by the last one."""

    table = np.random.default_rng(3).normal(size=(VOCAB, VOCAB)).astype(np.float32)

    def logits(self, ids):
        """float32 [vocab]."""
        return self.table[ids[-1]]


class Drawn(NamedTuple):
    """A committed segment."""

    token_ids: tuple[int, ...]
    attempt: int  # 0: the fallback


class Host:
    """Draws responses, one by one. What the planted errors change are methods."""

    def __init__(self, drawn: Case):
        self.policy, self.seed, self.reward = drawn.policy, drawn.params.seed, drawn.reward
        self.width = drawn.policy.width
        self.library = loaded()
        self.noise = np.empty(VOCAB, dtype=np.float32)
        self.attempts, self.scored = ((STRUCTURES[name] * self.width)() for name in ("stars_attempt", "stars_scored"))

    def open(self, sample: int) -> int:
        """A controller."""
        return self.controller(sample, reward_threshold=self.policy.reward_threshold, alpha=self.policy.alpha,
                               prompt_reward=self.reward([]), max_attempts=self.policy.max_attempts)

    def controller(self, sample: int, **given) -> int:
        """A controller of these parameters."""
        handle = self.library.stars_controller_open(ctypes.byref(sized(
            "stars_controller_params", seed=self.seed, beta=self.policy.beta, max_tokens=MAX_TOKENS,
            segment_size=self.policy.segment_size, sample=sample, **given)))
        assert handle, last_error()
        return handle

    def counter(self, attempt: int, stream: int) -> tuple[int, int]:
        """The random numbers of an attempt."""
        return attempt, stream

    def tokens(self, segment: Prefix) -> int:
        """What is said of an attempt's length."""
        return len(segment)

    def rewards(self, response: Prefix, segments: list[Prefix]) -> list[float]:
        """Of the attempts of a round, in order."""
        return [self.reward(content(response + segment)) for segment in segments]

    def winner(self, decision, segments: list[Prefix], rewards: list[float]) -> int:
        """The attempt that is kept."""
        return decision.winner

    def draw(self, response: Prefix, attempt) -> Prefix:
        """The tokens of an attempt."""
        last, tokens = (PROMPT + list(response))[-1], []
        number, stream = self.counter(attempt.attempt, attempt.stream & 0xFFFFFFFF)
        while len(tokens) < attempt.max_tokens:
            assert self.library.stars_gumbel(attempt.seed, len(tokens), number, stream, VOCAB,
                                             self.noise.ctypes.data) == 0
            last = int((Bigram.table[last] + self.noise).argmax())
            tokens.append(last)
            if last == EOS:
                break
        return tuple(tokens)

    def respond(self, sample: int) -> list[Drawn]:
        """The segments of a response."""
        handle = self.open(sample)
        decision, progress = sized("stars_decision"), sized("stars_progress")
        response: Prefix = ()
        kept: list[Drawn] = []
        segments: list[Prefix] = []  # of the segment that is being decided, all attempts
        values: list[float] = []
        while (count := self.library.stars_controller_next(handle, self.attempts, self.width)) > 0:
            drawn = [self.draw(response, attempt) for attempt in self.attempts[:count]]
            rewards = self.rewards(response, drawn)
            for place, (tokens, reward) in enumerate(zip(drawn, rewards, strict=True)):
                self.scored[place] = (reward, len(segments) + place + 1, self.tokens(tokens), tokens[-1] == EOS)
            segments, values = segments + drawn, values + rewards
            assert self.library.stars_controller_feed(handle, self.scored, count, None,
                                                      ctypes.byref(decision)) == 0, last_error()
            if decision.winner:
                winner = self.winner(decision, segments, values)
                kept.append(Drawn(segments[winner - 1], winner if decision.verdict == ACCEPT else 0))
                response += segments[winner - 1]
                assert self.library.stars_controller_commit(handle) == 0
                segments, values = [], []
        assert count == 0, last_error()
        assert self.library.stars_controller_progress(handle, ctypes.byref(progress)) == 0
        assert progress.finish_reason != RUNNING and progress.verdict == UNDECIDED
        self.library.stars_controller_close(handle)
        return kept


def p_values(drawn: Case, host: Host) -> tuple[float, float]:
    """p of the committed segments and p of the winning attempts."""
    segments: dict[Prefix, Counter] = defaultdict(Counter)
    attempts: dict[Prefix, Counter] = defaultdict(Counter)
    for sample in range(SAMPLES):
        prefix: Prefix = ()
        for segment in host.respond(sample):
            segments[prefix][segment.token_ids] += 1
            attempts[prefix][segment.attempt] += 1
            prefix += segment.token_ids
    laws = {prefix: segment_law(prefix, drawn, Bigram()) for prefix in segments}
    return p_value(segments, lambda prefix: laws[prefix][0]), p_value(attempts, lambda prefix: laws[prefix][1])


def follows_the_law(drawn: Case, host: Host) -> bool:
    """The test of this file."""
    return min(p_values(drawn, host)) > FALSE_POSITIVE_RATE / 2


CASES = {
    "soft, width 1": case(width=1, seed=41),
    "soft, width 3": case(width=3, seed=42),
    "soft, width 8": case(width=8, max_attempts=20, seed=43),
    "hard, width 1": case(width=1, beta=0.0, threshold=2.5, seed=44),
    "hard, width 3": case(width=3, beta=0.0, threshold=2.5, seed=45),
    "hard, width 8": case(width=8, beta=0.0, threshold=2.5, seed=46),
    "capped, width 1": case(width=1, max_attempts=2, seed=47),
    "capped, width 3": case(width=3, max_attempts=2, seed=48),
    "capped, width 8": case(width=8, max_attempts=5, seed=49),
    "rewards that tie": case(reward=lambda ids: float(round(REWARD(ids))), beta=0.4, seed=50),
}


@pytest.mark.parametrize("name", CASES)
def test_committed_segments_follow_the_law(name):
    drawn = CASES[name]
    assert follows_the_law(drawn, Host(drawn)), p_values(drawn, Host(drawn))


def test_the_responses_do_not_depend_on_the_width():
    texts = [[Host(CASES["soft, width 1"]).respond(sample) for sample in range(64)]]
    for width in (2, 3, 8):
        host = Host(CASES["soft, width 1"])
        host.width = width
        host.attempts, host.scored = ((STRUCTURES[name] * width)() for name in ("stars_attempt", "stars_scored"))
        texts.append([host.respond(sample) for sample in range(64)])
    assert all(text == texts[0] for text in texts)


# -- planted errors -----------------------------------------------------------------------------------------------


class PromptRewardZero(Host):
    """r(x) is taken to be 0."""

    def open(self, sample):
        return self.controller(sample, reward_threshold=self.policy.reward_threshold, alpha=self.policy.alpha,
                               prompt_reward=0.0, max_attempts=self.policy.max_attempts)


class AlphaSwapped(Host):
    """alpha and 1 - alpha change places."""

    def open(self, sample):
        return self.controller(sample, reward_threshold=self.policy.reward_threshold, alpha=1 - self.policy.alpha,
                               prompt_reward=self.reward([]), max_attempts=self.policy.max_attempts)


class CapPerRound(Host):
    """max_attempts counts rounds instead of attempts."""

    def open(self, sample):
        return self.controller(sample, reward_threshold=self.policy.reward_threshold, alpha=self.policy.alpha,
                               prompt_reward=self.reward([]), max_attempts=self.width * self.policy.max_attempts)


class EosNotCounted(Host):
    """An EOS is no token, unless it is the only one."""

    def tokens(self, segment):
        return max(1, len(content(segment)))


class NoiseOfTheFirst(Host):
    """Attempts beyond the first repeat its noise."""

    def counter(self, attempt, stream):
        return 1, stream


class NoiseOfTheFirstSegment(Host):
    """Later segments repeat the noise of the first."""

    def counter(self, attempt, stream):
        return attempt, stream >> 20 << 20


class SamplesAlike(Host):
    """All responses draw the same."""

    def counter(self, attempt, stream):
        return attempt, stream & 0xFFFFF


class RewardsOfNeighbours(Host):
    """Each attempt gets the reward of the next one of its round."""

    def rewards(self, response, segments):
        found = super().rewards(response, segments)
        return found[1:] + found[:1]


class BestOfTheRound(Host):
    """Where an attempt is accepted, the best of all that were drawn is kept."""

    def winner(self, decision, segments, rewards):
        return int(np.argmax(rewards)) + 1 if decision.verdict == ACCEPT else decision.winner


class LastAttempt(Host):
    """Where none is accepted, the last one is kept."""

    def winner(self, decision, segments, rewards):
        return decision.winner if decision.verdict == ACCEPT else len(segments)


@pytest.mark.parametrize("planted", [PromptRewardZero, AlphaSwapped, CapPerRound, EosNotCounted, NoiseOfTheFirst,
                                     NoiseOfTheFirstSegment, SamplesAlike, RewardsOfNeighbours, BestOfTheRound,
                                     LastAttempt])
def test_a_planted_error_is_seen(planted):
    """The same case and the same seed as "soft, width 3" above, where the library passes."""
    drawn = CASES["soft, width 3"]
    assert not follows_the_law(drawn, planted(drawn)), p_values(drawn, planted(drawn))


def test_the_base_case_has_power():
    """Accepting neither always nor hardly ever, fallbacks among what is kept, EOS inside segments."""
    host = Host(CASES["soft, width 3"])
    kept = [segment for sample in range(512) for segment in host.respond(sample)]
    assert 0.3 < sum(segment.attempt == 1 for segment in kept) / len(kept) < 0.8
    assert sum(segment.attempt == 0 for segment in kept) > 0.03 * len(kept)
    assert sum(segment.token_ids[0] == EOS for segment in kept) > 0.03 * len(kept)
