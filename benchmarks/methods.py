"""Every method of the package at three budgets on held-out openings: what reward it reaches, and with how many tokens.

    python benchmarks/methods.py --data IMDB [--out FILE] [--only NAME …] [--openings 100] [--seeds 2] [--tokens 128]

IMDB is the folder that `train_pair.py` reads. An opening is the first words of a review that both shipped models were
kept from; thresholds, spread and betas are measured on other such openings. The reward model that guides is the one
that judges here: figures say how well a method maximises it at what cost, and nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from common import DEMO_LM, DEMO_RM, describe_machine
from quality import bootstrap
from train_pair import labelled_reviews

import stars
from stars.calibration import BETA_OF_SPREAD, Calibration
from stars.cli.methods import all_methods
from stars.policies import POLICIES

WORDS = 6  # of an opening
CALIBRATION_OPENINGS, CALIBRATION_SAMPLES = 25, 32


class Row(NamedTuple):
    """A method with one setting."""

    policy: str
    given: dict[str, Any]
    quantile: float | None = None  # of plain samples' rewards, as reward_threshold
    scaled: dict[str, float] = {}  # parameters in the reward's units, as multiples of its spread

    def label(self) -> str:
        """Short, for the table."""
        parts = [f"{name}={value}" for name, value in self.given.items()]
        parts += [f"q={self.quantile:g}"] if self.quantile is not None else []
        parts += [f"{name}={value:g} spreads" for name, value in self.scaled.items()]
        return ", ".join(parts)


def rows() -> Iterator[Row]:
    """Three budgets of every method, and for STARS three betas.

    Where the width may be chosen it is 1: a width that the engine chooses depends on the clock, and more of what is
    drawn is in vain.
    """
    one = dict(width=1)
    yield Row("sample", dict(score=True))
    for beta in (dict(beta=0.7), dict(beta=0.0), None):
        for quantile in (0.75, 0.9, 0.99):
            scaled = {} if beta else dict(beta=BETA_OF_SPREAD)
            yield Row("stars", one | (beta or {}), quantile, scaled)
    for quantile in (0.75, 0.9, 0.99):
        yield Row("cards", one, quantile, dict(beta=BETA_OF_SPREAD))
        yield Row("rejection-sampling", one, quantile, dict(beta=BETA_OF_SPREAD))
    for count in (4, 16, 64):
        yield Row("best-of-n", dict(n=count))
        yield Row("best-of-n", dict(n=count), None, dict(temperature=BETA_OF_SPREAD))
        yield Row("speculative-rejection", dict(n=count))
        yield Row("particle-filter", dict(particles=count), None, dict(beta=0.25))
    for k in (2, 4, 16, (16, 8, 4, 2, 1), (32, 16, 8, 4, 2), (64, 32, 16, 8, 4)):
        yield Row("blockwise", dict(k=k))
    for beams, candidates in ((2, 2), (4, 4), (4, 16)):
        yield Row("segment-beam", dict(beams=beams, candidates=candidates))
    for topk in (5, 10, 20):
        yield Row("args", dict(topk=topk))
        yield Row("rad", dict(topk=topk, beta=1.0, clamp=False))


def main() -> None:
    """Runs the rows, and writes what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=tuple(POLICIES))
    parser.add_argument("--openings", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2, help="of every opening")
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    reviews = [text for text, _ in labelled_reviews(options.data)[1]]
    openings = [" ".join(review.split()[:WORDS]) for review in reviews]
    measured = openings[:: len(openings) // options.openings][: options.openings]
    others = [opening for opening in openings[7 :: len(openings) // CALIBRATION_OPENINGS][:CALIBRATION_OPENINGS]
              if opening not in measured]
    engine = stars.Engine(DEMO_LM, DEMO_RM, max_num_seqs=64, max_num_lanes=64)
    params = stars.SamplingParams(temperature=0.8, top_k=40, max_tokens=options.tokens, seed=1)
    samples = engine.plain_samples(others, params, CALIBRATION_SAMPLES)
    found = Calibration.measure(samples, 0.9)
    record: dict[str, Any] = {
        "machine": describe_machine(), "openings": len(measured), "tokens": options.tokens,
        "temperature": 0.8, "top_k": 40, "calibration": found.record(), "rows": []}
    missing = {method.name for method in all_methods()} - {row.policy for row in rows()}
    assert not missing, f"no row for {missing}"
    for row in rows():
        if options.only is None or row.policy in options.only:
            record["rows"].append(measure(engine, row, measured, options.seeds, params, samples,
                                          found.spread))
            print(_line(record["rows"][-1]), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(record, indent=1) + "\n")


def measure(engine: stars.Engine, row: Row, openings: list[str], count: int, params: stars.SamplingParams,
            samples: list, spread: float) -> dict[str, Any]:
    """One row, `count` texts of each opening: rewards of the finished texts, and what one of them took on average."""
    given = row.given | {name: value * spread for name, value in row.scaled.items()}
    if row.quantile is not None:
        given["reward_threshold"] = float(Calibration.measure(samples, row.quantile))
    policy = POLICIES[row.policy](**given)
    seeds = [stars.SamplingParams(**{**vars(params), "seed": 1000 + seed}) for seed in range(count)]
    begin = time.perf_counter()
    outputs = engine.generate([opening for opening in openings for _ in seeds], seeds * len(openings), policy,
                              use_tqdm=False)
    seconds = time.perf_counter() - begin
    texts = len(outputs)
    rewards = np.array([output.outputs[0].reward for output in outputs]).reshape(len(openings), count)
    metrics = [output.metrics for output in outputs]
    return {
        "policy": row.policy, "setting": row.label(), "seeds": count,
        "parameters": {name: _plain(value) for name, value in given.items()},
        "mean_reward": float(rewards.mean()), "mean_reward_95": bootstrap(rewards),
        "lm_tokens": sum(one.lm_tokens_drawn for one in metrics) / texts,
        "lm_tokens_95": bootstrap(np.array([one.lm_tokens_drawn for one in metrics], float).reshape(-1, count)),
        "rm_tokens": sum(one.rm_tokens_scored for one in metrics) / texts,
        "kept_tokens": sum(len(output.outputs[0].token_ids) for output in outputs) / texts,
        "fallbacks": sum(one.fallbacks for one in metrics) / max(1, sum(one.segments for one in metrics)),
        "seconds": seconds / texts}


def _line(found: dict[str, Any]) -> str:
    low, high = found["mean_reward_95"]
    return (f"{found['policy']:<22}{found['setting']:<42}{found['mean_reward']:7.2f} [{low:5.2f}, {high:5.2f}]"
            f"{found['lm_tokens']:9.0f} LM{found['rm_tokens']:9.0f} RM  {1e3 * found['seconds']:7.0f} ms")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
