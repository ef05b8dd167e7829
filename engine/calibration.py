"""What plain samples say of a reward: a threshold to aim at, how far rewards spread, whether prefixes foretell the end.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stars.arguments import as_float, shown
from stars.errors import RequestError
from stars.outputs import CompletionOutput
from stars.plan import Fixed, Lanes, Plan, Sampled, Score
from stars.rules import Always

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the quantiles that are kept
BETA_OF_SPREAD = 0.1
"""beta = "auto" is this share of the spread: a candidate one spread below the threshold is accepted once in 22,000
times, one a tenth of a spread below in 37 of 100."""
LEAST_CORRELATION = 0.3  # of rewards of the longest prefixes with those at the end
MOST_DRIFT = 1.0  # spreads between the mean reward of prefixes and that of finished texts
MOST_ONE_WAY, LEAST_CHANGED = 0.9, 8  # of the samples whose reward changes after a prefix; a sign test of 8 errs in 1 %
LEAST_SAMPLES = 16  # of which prefixes are said to differ from finished texts
FORMAT = "stars-calibration"


@dataclass(frozen=True)
class PlainSegments:
    """Plain sampling whose every prefix of `size`, 2 `size`, … tokens is scored, the finished response too."""

    size: int

    def plan(self) -> Plan:
        """Every draft is kept, whatever its reward."""
        return Plan(Sampled(), Fixed(self.size), Lanes(1), Score("segment"), Always())


class PlainSample(NamedTuple):
    """The rewards of one plain sample."""

    reward: float  # of the finished response
    prefixes: Mapping[int, float]  # by tokens; the finished response is none of them

    @classmethod
    def of(cls, completion: CompletionOutput) -> PlainSample | None:
        """Of a finished completion; None where it has no reward."""
        if completion.reward is None:
            return None
        tokens, prefixes = 0, {}
        for segment in completion.segments[:-1]:
            tokens += len(segment.token_ids)
            if segment.reward is not None:
                prefixes[tokens] = segment.reward
        return cls(completion.reward, prefixes)


class Calibration(float):
    """A reward_threshold that was measured, and what else was seen: a float, which every policy takes.

    `STARS(reward_threshold=calibration, beta="auto")` takes its `beta` too. As a float it is the `quantile` of the
    rewards of finished plain samples.
    """

    quantile: float
    spread: float  # standard deviation of the rewards of one prompt's samples: root of the mean variance over prompts
    beta: float  # BETA_OF_SPREAD times the spread
    correlations: dict[int, float]  # of rewards of prefixes with those at the end, by tokens; NaN where one is constant
    drifts: dict[int, float]  # mean reward of prefixes less that at the end, in spreads, by tokens
    rises: dict[int, float]  # samples whose reward rises after a prefix less those where it falls, of both; 0: too few
    quantiles: dict[float, float]  # of the rewards of finished samples, by level
    mean: float
    samples: int
    prompts: int

    def __new__(cls, reward_threshold: float, **measured: Any) -> Calibration:
        """Made by `measure` and `load`."""
        calibration = super().__new__(cls, reward_threshold)
        for name in cls.__annotations__:
            object.__setattr__(calibration, name, measured[name])
        return calibration

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a Calibration cannot be changed: measure a new one")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (float(self), {name: getattr(self, name) for name in type(self).__annotations__})

    def __repr__(self) -> str:
        return (f"Calibration(reward_threshold={float(self):.4g}, quantile={self.quantile:g}, spread={self.spread:.3g}"
                f", beta={self.beta:.3g}, {self.samples} samples, {self.prompts} prompt{'s' * (self.prompts != 1)})")

    __str__ = __repr__

    @property
    def reward_threshold(self) -> float:
        """The threshold as a plain float."""
        return float(self)

    @property
    def warning(self) -> str | None:
        """Why thresholds for prefixes mean little with this reward, as one sentence; None where nothing says so."""
        if not self.correlations or self.samples < LEAST_SAMPLES:
            return None
        tokens, drift = max(self.drifts.items(), key=lambda item: abs(item[1]))
        if abs(drift) > MOST_DRIFT:
            return (f"the rewards of the first {tokens} tokens lie {abs(drift):.1f} spreads "
                    f"{'below' if drift < 0 else 'above'} those of finished texts, as of a reward that counts or adds "
                    "up: one threshold does not fit both, so use alpha=0, or a reward that is comparable")
        tokens, rise = max(self.rises.items(), key=lambda item: abs(item[1]))
        if abs(rise) > MOST_ONE_WAY:
            return (f"rewards after the first {tokens} tokens nearly always {'rise' if rise > 0 else 'fall'}, as of a "
                    "reward that counts or adds up: one threshold does not fit prefixes and finished texts, so use "
                    "alpha=0, or a reward that is comparable")
        tokens, correlation = max(self.correlations.items())
        if not correlation >= LEAST_CORRELATION:  # NaN too
            return (f"the rewards of the first {tokens} tokens hardly foretell those of finished texts (correlation "
                    f"{correlation:.2f}): use longer segments, or a reward that reads unfinished texts")
        return None

    @classmethod
    def measure(cls, samples: Sequence[Sequence[PlainSample]], quantile: float) -> Calibration:
        """samples: of each prompt. RequestError where there are none."""
        import numpy as np  # the command line makes policies, and says what is wrong with them, without it

        of_prompts = [[sample.reward for sample in own] for own in samples if own]
        rewards = [reward for own in of_prompts for reward in own]
        if not rewards:
            raise RequestError("there are no prompts to calibrate on: give at least one")
        spread = _spread(of_prompts)
        correlations, drifts, rises = _prefixes([sample for own in samples for sample in own], spread)

        def at(level: float) -> float:
            with np.errstate(invalid="ignore"):
                value = float(np.quantile(rewards, level))
            return -math.inf if math.isnan(value) else value  # between -inf and a number

        return cls(at(quantile), quantile=quantile, spread=spread, beta=BETA_OF_SPREAD * spread,
                   correlations=correlations, drifts=drifts, rises=rises,
                   quantiles={level: at(level) for level in LEVELS}, mean=float(np.mean(rewards)),
                   samples=len(rewards), prompts=len(of_prompts))

    def save(self, path: str) -> None:
        """Writes it as JSON. OSError where that fails."""
        with open(path, "w", encoding="utf8") as file:
            file.write(json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        """As `save` writes it; None for NaN."""
        facts = {name: getattr(self, name) for name in type(self).__annotations__}
        return {"format": FORMAT, "reward_threshold": float(self)} | {
            name: {f"{key:g}": _finite(item) for key, item in value.items()} if isinstance(value, dict) else value
            for name, value in facts.items()}

    @classmethod
    def load(cls, path: str) -> Calibration:
        """What `save` wrote. RequestError for a file that holds something else, OSError where it cannot be read."""
        try:
            with open(path, encoding="utf8") as file:
                record = json.load(file)
            if record["format"] != FORMAT:
                raise ValueError
            numbers = {name: _number(record[name])
                       for name in ("reward_threshold", "quantile", "spread", "beta", "mean")}
            tables: dict[str, dict[Any, float]] = {
                name: {kind(key): math.nan if item is None else _number(item) for key, item in record[name].items()}
                for name, kind in (("correlations", int), ("drifts", int), ("rises", int), ("quantiles", float))}
            if not tables["correlations"].keys() == tables["drifts"].keys() == tables["rises"].keys():
                raise ValueError
            return cls(numbers.pop("reward_threshold"), **numbers, **tables, samples=int(record["samples"]),
                       prompts=int(record["prompts"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise RequestError(f"{path} is no calibration: write one with `stars calibrate --save {path}`") from None


def threshold_and_beta(policy: str, reward_threshold: Any, beta: Any) -> tuple[float, float]:
    """The two as floats of `policy`'s parameters, checked; beta="auto" is a calibration's. RequestError."""
    threshold = as_float(reward_threshold)
    if threshold is None and reward_threshold is not None:
        raise RequestError(f"{policy}.reward_threshold is {shown(reward_threshold)}, it must be a number that a float "
                           "can hold")
    if threshold is None or math.isnan(threshold):
        raise RequestError(f"{policy} needs a reward_threshold, which depends on the reward model: "
                           "measure one with engine.calibrate(prompts)")
    if isinstance(beta, str) and beta == "auto":
        if not isinstance(reward_threshold, Calibration):
            raise RequestError(f'{policy}.beta="auto" needs a calibration: give '
                               "reward_threshold=engine.calibrate(prompts), or a number for beta")
        beta = reward_threshold.beta
    number = as_float(beta)
    if number is None or not 0.0 <= number < math.inf:
        raise RequestError(f"{policy}.beta is {shown(beta)}, it must be a finite number, 0 (the hard rule) or above")
    return float(threshold), number


def _restored(reward_threshold: float, measured: dict[str, Any]) -> Calibration:
    return Calibration(reward_threshold, **measured)


def _spread(of_prompts: Sequence[Sequence[float]]) -> float:
    """Within prompts, where some have several samples; else over all."""
    finite = [[reward for reward in own if math.isfinite(reward)] for own in of_prompts]
    several = [statistics.variance(own) for own in finite if len(own) > 1]
    if several:
        return math.sqrt(statistics.fmean(several))
    together = [reward for own in finite for reward in own]
    return statistics.stdev(together) if len(together) > 1 else 0.0


def _prefixes(samples: Sequence[PlainSample],
              spread: float) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """Correlations, drifts and rises at B, 2B, 4B, … tokens, over the samples that go on beyond."""
    correlations: dict[int, float] = {}
    drifts: dict[int, float] = {}
    rises: dict[int, float] = {}
    tokens = min((min(sample.prefixes) for sample in samples if sample.prefixes), default=0)
    while tokens:
        pairs = [(sample.prefixes[tokens], sample.reward) for sample in samples if tokens in sample.prefixes
                 and math.isfinite(sample.prefixes[tokens]) and math.isfinite(sample.reward)]
        if len(pairs) < 3:
            break
        early, late = zip(*pairs, strict=True)
        constant = min(early) == max(early) or min(late) == max(late)
        correlations[tokens] = math.nan if constant else statistics.correlation(early, late)
        change = statistics.fmean(early) - statistics.fmean(late)
        drifts[tokens] = change / spread if spread else math.copysign(math.inf, change) if change else 0.0
        up, down = sum(one < end for one, end in pairs), sum(one > end for one, end in pairs)
        rises[tokens] = (up - down) / (up + down) if up + down >= LEAST_CHANGED else 0.0
        tokens *= 2
    return correlations, drifts, rises


def _finite(value: float) -> float | None:
    """JSON has no NaN; an infinite drift is as good as a very large one."""
    return None if math.isnan(value) else max(-1e9, min(1e9, value))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError
    return float(value)
