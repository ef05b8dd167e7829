"""When requests are sent."""

from __future__ import annotations

import math

import numpy as np


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests are sent, `rate` a second on average, in order.

    Gaps have the gamma distribution of shape `burstiness`: 1 is a Poisson process, less comes in bursts, more is more
    even, infinity is a clock. They are scaled so that the last request comes at count / rate, as vLLM scales them: the
    law of a process of which it is known that its last arrival is there. An infinite rate sends all at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.ones(count) if math.isinf(burstiness) else np.random.default_rng(seed).gamma(burstiness, size=count)
    times = np.cumsum(gaps)
    return [float(time) for time in times * (count / rate / times[-1])] if times[-1] > 0.0 else [0.0] * count
