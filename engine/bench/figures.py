"""A run in figures, under the names that vLLM's benchmark gives them, and further ones of our own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stars.bench.answers import COMPLETED, FAILED, REFUSED, Answer
from stars.bench.load import Run

PERCENTILES = (50, 90, 99)
LATE = 0.01  # seconds after which a request was sent late


def figures(run: Run, goals: Mapping[str, float]) -> dict[str, Any]:
    """Counts, throughput and latencies in milliseconds. What nothing was measured of is None.

    goals: bounds in milliseconds, by ttft, tpot and e2el; a completed request that meets all of them counts as good.
    """
    answers, duration = run.answers, run.duration
    outcomes = Counter(answer.outcome for answer in answers)
    completed = [answer for answer in answers if answer.outcome == COMPLETED]
    read, written = (_total(getattr(answer, name) for answer in completed) for name in ("input_tokens",
                                                                                          "output_tokens"))
    good = sum(is_good(answer, goals) for answer in completed)
    return {
        "duration": duration,
        "completed": outcomes[COMPLETED],
        "refused": outcomes[REFUSED],
        "failed": outcomes[FAILED],
        "sent": sum(answer.sent is not None for answer in answers),
        "statuses": {str(status): count for status, count in sorted(Counter(
            answer.status for answer in answers if answer.status is not None).items())},
        "failures": dict(Counter(answer.error for answer in answers if answer.outcome == FAILED).most_common(20)),
        "refusals_with_retry_after": sum(answer.retry_after for answer in answers if answer.outcome == REFUSED),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "answers_without_usage": sum(answer.output_tokens is None for answer in completed),
        "request_throughput": len(completed) / duration,
        "request_goodput": good / duration if goals else None,
        "goodput_goals_ms": dict(goals),
        "output_throughput": None if written is None else written / duration,
        "total_token_throughput": None if read is None or written is None else (read + written) / duration,
        "max_concurrent_requests": most_at_once(answers),
        **_latencies("ttft", [answer.ttft for answer in completed]),
        **_latencies("tpot", [answer.tpot for answer in completed]),
        **_latencies("itl", [gap for answer in completed for gap in answer.gaps]),
        **_latencies("e2el", [answer.e2el for answer in completed]),
        **_lengths("input", [answer.input_tokens for answer in completed]),
        **_lengths("output", [answer.output_tokens for answer in completed]),
        "finish_reasons": dict(Counter(answer.finish_reason or "none" for answer in completed)),
        **_of_stars(completed),
        **_of_client(run),
    }


def is_good(answer: Answer, goals: Mapping[str, float]) -> bool:
    """Whether a completed request meets every goal; one of less than two tokens meets any of tpot, as vLLM has it."""
    measured = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2el": answer.e2el}
    return all(value is not None and value * 1e3 <= goals[name] for name, value in measured.items() if name in goals)


def most_at_once(answers: Sequence[Answer]) -> int:
    """The largest number of requests that were under way together."""
    moments = sorted(moment for answer in answers if answer.sent is not None and answer.ended is not None
                     for moment in ((answer.sent, 1), (answer.ended, -1)))
    return int(max(np.cumsum([step for _, step in moments]), default=0))


def header(run: Run, *, backend: str, endpoint: str, request_rate: float | None, burstiness: float,
           max_concurrency: int | None) -> dict[str, Any]:
    """What a result file begins with; of a trace the rate is None."""
    last = max((answer.due for answer in run.answers), default=0.0)
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"), "backend": backend, "endpoint_type": backend, "endpoint": endpoint,
        "label": None, "model_id": run.model, "tokenizer_id": None, "num_prompts": len(run.answers),
        "request_rate": "trace" if request_rate is None else "inf" if request_rate == float("inf") else request_rate,
        "burstiness": burstiness, "max_concurrency": max_concurrency,
        "offered_rate": len(run.answers) / last if last > 0.0 else None,
    }


def details(run: Run) -> dict[str, Any]:
    """Request by request, in the order in which they were due; seconds, as vLLM has them."""
    return {
        "input_lens": [answer.input_tokens for answer in run.answers],
        "output_lens": [answer.output_tokens for answer in run.answers],
        "start_times": [answer.sent for answer in run.answers],
        "ttfts": [answer.ttft for answer in run.answers],
        "itls": [answer.gaps for answer in run.answers],
        "latencies": [answer.e2el for answer in run.answers],
        "generated_texts": [answer.text for answer in run.answers],
        "outcomes": [answer.outcome for answer in run.answers],
        "errors": [answer.error or "" for answer in run.answers],
    }


def _latencies(name: str, seconds: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles, in milliseconds."""
    values = np.array([one for one in seconds if one is not None]) * 1e3
    found: dict[str, float | None] = dict.fromkeys(
        [f"{what}_{name}_ms" for what in ("mean", "median", "std", *(f"p{share}" for share in PERCENTILES))])
    if len(values):
        found |= {f"mean_{name}_ms": float(values.mean()), f"median_{name}_ms": float(np.median(values)),
                  f"std_{name}_ms": float(values.std())}
        found |= {f"p{share}_{name}_ms": float(np.percentile(values, share)) for share in PERCENTILES}
    return found


def _lengths(name: str, tokens: Sequence[int | None]) -> dict[str, Any]:
    """How long prompts or answers were."""
    values = [one for one in tokens if one is not None]
    shares = (0, 50, 90, 100)
    found = [int(one) for one in np.percentile(values, shares, method="nearest")] if values else [None] * len(shares)
    return {f"{name}_tokens": dict(zip(("min", "median", "p90", "max"), found, strict=True))}


def _of_stars(completed: Sequence[Answer]) -> dict[str, Any]:
    """What `stars serve` says of its rewards; nothing of others."""
    found = {}
    for name in ("accept_rate", "attempts", "reward"):
        values = [value for answer in completed if isinstance(value := answer.stars.get(name), (int, float))]
        found[f"mean_{name}"] = float(np.mean(values)) if values else None
    return {} if all(value is None for value in found.values()) else found


def _of_client(run: Run) -> dict[str, Any]:
    """Whether the client kept up: its share of a core, how late its event loop was, how late requests were sent."""
    slips = [answer.sent - answer.due for answer in run.answers if answer.sent is not None]
    return {
        "client_cpu_share": run.meter.cpu_share,
        **_latencies("loop_lag", run.meter.lags), "max_loop_lag_ms": 1e3 * max(run.meter.lags, default=0.0),
        **_latencies("slip", slips), "max_slip_ms": 1e3 * max(slips, default=0.0),
        "sent_late": sum(slip > LATE for slip in slips),
    }


def _total(values: Any) -> int | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None
