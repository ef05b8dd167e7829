"""The whole algorithm on one page: no cache, no batch, one attempt at a time, everything recomputed.

Written from the law alone, so that the engine and this page can only agree by both being right. It knows nothing of
pages, lanes or widths: a width only decides how many attempts are drawn beyond the first accepted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

TOKEN_DRAW, ACCEPT_DRAW, EXHAUST_DRAW = 0, 1, 3  # kinds of draw, bits 24.. of the third counter word


class OracleAttempt(NamedTuple):
    """A candidate segment and what was decided about it."""

    token_ids: list[int]
    reward: float
    threshold: float
    accepted: bool
    logprob: float  # nats under the LM with its penalties


class OracleSegment(NamedTuple):
    """A committed segment and all attempts up to the decision."""

    token_ids: list[int]
    reward: float
    accepted: bool
    attempts: list[OracleAttempt]
    relaxed: int  # times


def philox(seed: int, c0: np.ndarray, c1: int, c2: int, c3: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011) words, uint64 [len(c0), 4], for the counters (c0[i], c1, c2, c3)."""
    mask = np.uint64(0xFFFFFFFF)
    counter = [np.asarray(c0, dtype=np.uint64)] + [np.full(len(c0), word, dtype=np.uint64) for word in (c1, c2, c3)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        product0, product1 = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [product1 >> np.uint64(32) ^ counter[1] ^ np.uint64(key[0]), product1 & mask,
                   product0 >> np.uint64(32) ^ counter[3] ^ np.uint64(key[1]), product0 & mask]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, axis=1)


def uniforms(seed: int, count: int, position: int, attempt: int, kind: int, segment: int, sample: int) -> np.ndarray:
    """`count` uniforms in (0, 1), float64: (k + 0.5) / 2^24 with k the high 24 bits of each Philox word."""
    words = philox(seed, np.arange((count + 3) // 4), position, attempt | kind << 24, segment | sample << 20)
    return ((words.reshape(-1)[:count] >> np.uint64(8)).astype(np.float64) + 0.5) / 2.0**24


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 log-probabilities."""
    shifted = np.asarray(logits, dtype=np.float64) - np.max(logits)
    return shifted - math.log(np.exp(shifted).sum())


def proposal(logits: np.ndarray, params) -> np.ndarray:
    """Log-probabilities of the proposal: temperature, min_p, top_k, top_p in this order; -inf where filtered."""
    z = log_softmax(np.asarray(logits, dtype=np.float64) / params.temperature)
    if params.min_p > 0:
        z = log_softmax(np.where(z >= z.max() + math.log(params.min_p), z, -np.inf))
    if 0 < params.top_k < len(z):
        z = log_softmax(np.where(z >= np.sort(z)[-params.top_k], z, -np.inf))
    if params.top_p < 1:  # the fewest most probable tokens whose mass reaches top_p
        order = np.argsort(-z, kind="stable")
        mass_before = np.cumsum(np.exp(z[order])) - np.exp(z[order])
        z = z.copy()
        z[order[mass_before >= params.top_p]] = -np.inf
    return z


def penalised(logits: np.ndarray, prompt: list[int], response: list[int], params) -> np.ndarray:
    """Logits after the penalties on every token of prompt and response."""
    z = np.asarray(logits, dtype=np.float64).copy()
    for token in set(prompt) | set(response):
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token in set(response):
        z[token] -= params.frequency_penalty * response.count(token) + params.presence_penalty
    return z


def edited(logits: np.ndarray, response: list[int], params, stop_ids: set[int],
           bad_words: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """Logits after biases and bans, before penalties; bad_words: their token ids."""
    z = np.asarray(logits, dtype=np.float64).copy()
    for token, bias in (params.logit_bias or {}).items():
        z[token] += bias
    for token in range(len(z)):
        follows = [*response, token]
        if (params.allowed_token_ids is not None and token not in params.allowed_token_ids
                or token in stop_ids and len(response) < params.min_tokens
                or any(follows[-len(word) :] == list(word) for word in bad_words)):
            z[token] = -np.inf
    return z


def draw_segment(lm: Callable, prompt: list[int], response: list[int], size: int, stop_ids: set[int], params, seed: int,
                 attempt: int, segment: int, sample: int) -> tuple[list[int], float]:
    """One candidate of at most `size` tokens, ended early by a stop id, and its log-probability before filters."""
    ids, logprob = [], 0.0
    while len(ids) < size and not (ids and ids[-1] in stop_ids):
        logits = penalised(lm(prompt + response + ids), prompt, response + ids, params)
        if params.temperature == 0:
            token = int(np.argmax(logits))
        else:
            u = uniforms(seed, len(logits), len(ids), attempt, TOKEN_DRAW, segment, sample)
            token = int(np.argmax(proposal(logits, params) - np.log(-np.log(u))))
        logprob += log_softmax(logits)[token]
        ids.append(token)
    return ids, logprob


def content(response: list[int], stop_ids: set[int]) -> list[int]:
    """What a reward reads of a response: not the EOS or stop id that ended it."""
    return response[:-1] if response and response[-1] in stop_ids else response


def tau(tokens: int, params, policy, prompt_reward: float | None) -> float:
    """The threshold at `tokens` response tokens, the candidate's included."""
    target = policy.reward_threshold
    if math.isinf(target):
        return target
    start = target if policy.alpha == 1 else (1 - policy.alpha) * prompt_reward + policy.alpha * target
    return min(target, start + tokens / params.max_tokens * (target - start))


def accepts(u: float, reward: float, threshold: float, beta: float) -> bool:
    """log u < (reward - threshold) / beta; beta 0 is reward >= threshold; -inf never, and +inf admits nothing."""
    if reward == -math.inf or threshold == math.inf:
        return False
    if threshold == -math.inf:
        return True
    return reward >= threshold if beta == 0 else math.log(u) < (reward - threshold) / beta


def exhausted(given) -> Iterator[tuple[str, object]]:
    """What is tried one after the other where all attempts are rejected, by name: a name, or objects with `then`."""
    names = {"best_seen": "BestSeen", "first": "First", "last": "Last", "refuse": "Refuse"}
    while given is not None:
        yield names[given] if isinstance(given, str) else type(given).__name__, given
        given = getattr(given, "then", None)


def picked(name: str, exhaust, attempts: list[OracleAttempt], noise: np.ndarray) -> OracleAttempt:
    """Of rejected attempts the one that is kept; noise: a uniform of each."""
    if name in ("First", "Last"):
        return attempts[0 if name == "First" else -1]
    keys = [one.reward for one in attempts]
    if name == "Softmax":
        keys = [key / exhaust.temperature - math.log(-math.log(u)) for key, u in zip(keys, noise, strict=True)]
    return attempts[keys.index(max(keys))]  # the earliest of equals


def run(lm: Callable, reward: Callable, prompt: list[int], params, policy, seed: int, sample: int = 0,
        eos_token_ids: tuple[int, ...] = ()) -> list[OracleSegment]:
    """All committed segments of one response; one that was refused ends early.

    lm(ids) -> logits [V]; reward(content ids of the response) -> float.
    """
    stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
    needs_start = policy.alpha != 1 and math.isfinite(policy.reward_threshold)
    prompt_reward = reward([]) if needs_start else None
    most = 1 if params.temperature == 0 else policy.max_attempts
    segments: list[OracleSegment] = []
    redrawn: dict[int, int] = {}  # how often all attempts at a segment were used up
    backups = 0
    while True:
        response = [token for segment in segments for token in segment.token_ids]
        if len(response) >= params.max_tokens or response and response[-1] in stop_ids:
            return segments
        index, size = len(segments), min(policy.segment_size, params.max_tokens - len(response))
        first = most * redrawn.get(index, 0) + 1
        attempts: list[OracleAttempt] = []
        tests = uniforms_of(seed, range(first, first + most), index, sample)
        for attempt, u in zip(range(first, first + most), tests, strict=True):
            ids, logprob = draw_segment(lm, prompt, response, size, stop_ids, params, seed, attempt, index, sample)
            score = reward(content(response + ids, stop_ids))
            threshold = tau(len(response) + len(ids), params, policy, prompt_reward)
            accepted = accepts(u, score, threshold, policy.beta)
            attempts.append(OracleAttempt(ids, score, threshold, accepted, logprob))
            if accepted:
                break
        winner = attempts[-1] if attempts[-1].accepted else None
        relaxed = 0
        for name, exhaust in exhausted(policy.exhaust) if winner is None else ():
            if name == "Relax":
                while winner is None and relaxed < exhaust.times:
                    relaxed += 1
                    attempts = [one._replace(threshold=tau(len(response) + len(one.token_ids), params, policy,
                                                           prompt_reward) - relaxed * exhaust.by) for one in attempts]
                    found = [accepts(u, one.reward, one.threshold, policy.beta)
                             for one, u in zip(attempts, tests, strict=True)]
                    if any(found):
                        place = found.index(True)
                        attempts[place] = winner = attempts[place]._replace(accepted=True)
                if winner is not None:
                    break
            elif name == "BackUp":
                if segments and backups < exhaust.times:
                    backups += 1
                    redrawn |= {place: redrawn.get(place, 0) + 1 for place in (index - 1, index)}
                    segments.pop()
                    break
            elif name == "Refuse":
                return segments
            else:
                noise = uniforms(seed, first + most - 1, 0, 0, EXHAUST_DRAW, index, sample)[first - 1 :]
                winner = picked(name, exhaust, attempts, noise)
        if winner is not None:
            segments.append(OracleSegment(winner.token_ids, winner.reward, winner.accepted, attempts, relaxed))


def draws_of(seed: int, sample: int) -> tuple[Callable, Callable]:
    """What a written-out loop draws by: noise(segment, attempt, position, vocab), standard Gumbel, float64 [vocab], and
    uniform(segment, attempt), of the accept test."""
    def noise(segment: int, attempt: int, position: int, vocab: int) -> np.ndarray:
        return -torch.log(-torch.log(torch.from_numpy(uniforms(
            seed, vocab, position, attempt, TOKEN_DRAW, segment, sample)))).numpy()

    def uniform(segment: int, attempt: int) -> float:
        return uniforms(seed, 1, 0, attempt, ACCEPT_DRAW, segment, sample)[0]

    return noise, uniform


def uniforms_of(seed: int, attempts: range, segment: int, sample: int) -> list[float]:
    """The uniform of each attempt's accept test."""
    return [uniforms(seed, 1, 0, attempt, ACCEPT_DRAW, segment, sample)[0] for attempt in attempts]
