"""Every method of the package at three budgets on held-out openings: what reward it reaches, and with how many tokens.

    python benchmarks/methods.py --data IMDB [--out FILE] [--only NAME …] [--openings 100] [--seeds 2] [--tokens 128]
    python benchmarks/methods.py --data IMDB --choices        STARS alone: segment size, beta and threshold, one by one

IMDB is the folder that `train_pair.py` reads. An opening is the first words of a review that both shipped models were
kept from; thresholds, spread and betas are measured on other such openings. The reward model that guides is the one
that judges here: figures say how well a method maximises it at what cost, and nothing about quality. Where a method is
guided by the implicit reward of the shipped guide, the reward model judges what came of it.

Cost is counted in tokens that language models drew, in those of all attempts, by model, in tokens that the reward model
scored, and in seconds. What the first count lacks the seconds have: a blend runs each of its models once a token, and
for MARA the language model reads every token that it enumerates, up to the one that is accepted and the end of a pass.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from common import DEMO_LM, DEMO_RM, describe_machine
from quality import bootstrap
from train_pair import labelled_reviews

import stars
from stars.calibration import BETA_OF_SPREAD, Calibration
from stars.cli.methods import all_methods
from stars.cli.options import SHIPPED_HEADS, SHIPPED_MODELS
from stars.policies import POLICIES

WORDS = 6  # of an opening
DEMO = DEMO_LM.parent
CALIBRATION_OPENINGS, CALIBRATION_SAMPLES = 25, 32


class Row(NamedTuple):
    """A method with one setting."""

    policy: str
    given: dict[str, Any]
    quantile: float | None = None  # of plain samples' rewards, as reward_threshold
    scaled: dict[str, float] = {}  # parameters in the reward's units, as multiples of its spread
    inverse: dict[str, float] = {}  # parameters that multiply rewards, as multiples of one over its spread
    reward: str = "rm"  # what guides: the reward model, or the guide's "implicit" reward

    def label(self) -> str:
        """Short, for the table."""
        parts = [f"{name}={value}" for name, value in self.given.items()]
        parts += [f"q={self.quantile:g}"] if self.quantile is not None else []
        parts += [f"{name}={value:g} spreads" for name, value in self.scaled.items()]
        parts += [f"{name}={value:g} / spread" for name, value in self.inverse.items()]
        parts += [f"reward={self.reward}"] if self.reward != "rm" else []
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
    yield from rows_of_several_models()


def rows_of_several_models() -> Iterator[Row]:
    """Methods with a second model, a second prompt or a head. With the language model as the reference, and weight 1,
    TokenGuidance is plain sampling of the guide: the other weights say what goes beyond it."""
    one = dict(width=1)
    for quantile in (0.75, 0.9, 0.99):
        yield Row("stars", one, quantile, dict(beta=BETA_OF_SPREAD), reward="implicit")
    yield Row("mara", dict(score=True))
    for alternate in (True, False):
        yield Row("persona-judge", dict(draft="What a wonderful film. ", judge="I loved every minute of this film. ",
                                        alternate=alternate, score=True))
    for weight in (0.3, 0.6):
        yield Row("token-guidance", dict(weight=weight, score=True))
    for weight in (1.0, 2.0, 4.0):
        yield Row("token-guidance", dict(reference="lm", weight=weight, score=True))
    for quantile in (0.25, 0.5, 0.75):  # constant: few beginnings of a response reach a higher one
        yield Row("rsd", {}, quantile, dict(beta=BETA_OF_SPREAD))
    for n in (4, 16):
        yield Row("rsd", dict(variant="gsi", n=n), 0.9, inverse=dict(beta=1 / BETA_OF_SPREAD))


def rows_of_choices() -> Iterator[Row]:
    """STARS with one parameter changed at a time; the others are 16 tokens, a tenth of a spread, the 0.9 quantile."""
    for size in (2, 4, 8, 16, 32, 64):
        yield Row("stars", dict(width=1, segment_size=size), 0.9, dict(beta=BETA_OF_SPREAD))
    for beta in (0.0, 0.05, 0.25, 0.5, 1.0):
        yield Row("stars", dict(width=1, segment_size=16), 0.9, dict(beta=beta))
    for quantile in (0.25, 0.5, 0.75, 0.95, 0.99):
        yield Row("stars", dict(width=1, segment_size=16), quantile, dict(beta=BETA_OF_SPREAD))


def main() -> None:
    """Runs the rows, and writes what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=tuple(POLICIES))
    parser.add_argument("--choices", action="store_true", help="STARS alone, one parameter changed at a time")
    parser.add_argument("--openings", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2, help="of every opening")
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    reviews = [text for text, _ in labelled_reviews(options.data)[1]]
    openings = [" ".join(review.split()[:WORDS]) for review in reviews]
    measured = openings[:: len(openings) // options.openings][: options.openings]
    others = [opening for opening in openings[7 :: len(openings) // CALIBRATION_OPENINGS][:CALIBRATION_OPENINGS]
              if opening not in measured]
    wanted = rows_of_choices() if options.choices else rows()
    chosen = [row for row in wanted if options.only is None or row.policy in options.only]
    params = stars.SamplingParams(temperature=0.8, top_k=40, max_tokens=options.tokens, seed=1)
    engines, samples, found = {}, {}, {}
    for name in dict.fromkeys(["rm", *(row.reward for row in chosen)]):
        reward = DEMO_RM if name == "rm" else stars.ImplicitReward(DEMO / "guide", DEMO_LM)
        engines[name] = stars.Engine(
            DEMO_LM, reward, max_num_seqs=64, max_num_lanes=64,
            models={name: DEMO / place for name, place in SHIPPED_MODELS.items()},
            heads={name: DEMO / place for name, place in SHIPPED_HEADS.items()})
        samples[name] = engines[name].plain_samples(others, params, CALIBRATION_SAMPLES)
        found[name] = Calibration.measure(samples[name], 0.9)
    record: dict[str, Any] = {
        "machine": describe_machine(), "openings": len(measured), "tokens": options.tokens,
        "temperature": 0.8, "top_k": 40, "calibration": found["rm"].record(), "rows": []}
    if "implicit" in found:
        record["calibration_of_the_implicit_reward"] = found["implicit"].record()
    missing = {method.name for method in all_methods()} - {row.policy for row in rows()}
    assert not missing, f"no row for {missing}"
    for row in chosen:
        record["rows"].append(measure(engines[row.reward], row, measured, options.seeds, params, samples[row.reward],
                                      found[row.reward].spread))
        print(_line(record["rows"][-1]), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(record, indent=1) + "\n")


def measure(engine: stars.Engine, row: Row, openings: list[str], count: int, params: stars.SamplingParams,
            samples: list, spread: float) -> dict[str, Any]:
    """One row, `count` texts of each opening: rewards of the finished texts, and what one of them took on average."""
    given = row.given | {name: value * spread for name, value in row.scaled.items()}
    given |= {name: value / spread for name, value in row.inverse.items()}
    if row.quantile is not None:
        given["reward_threshold"] = float(Calibration.measure(samples, row.quantile))
    policy = POLICIES[row.policy](**given)
    seeds = [stars.SamplingParams(**{**vars(params), "seed": 1000 + seed}) for seed in range(count)]
    begin = time.perf_counter()
    outputs = engine.generate([opening for opening in openings for _ in seeds], seeds * len(openings), policy,
                              use_tqdm=False)
    seconds = time.perf_counter() - begin
    texts = len(outputs)
    rewards = np.array([output.outputs[0].reward for output in outputs] if row.reward == "rm" else judged(outputs))
    rewards = rewards.reshape(len(openings), count)
    metrics = [output.metrics for output in outputs]
    drawn, scored = (sum(getattr(one, name) for one in metrics) for name in ("lm_tokens_drawn", "rm_tokens_scored"))
    kept = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "policy": row.policy, "setting": row.label(), "seeds": count,
        "parameters": {name: _plain(value) for name, value in given.items()},
        "mean_reward": float(rewards.mean()), "mean_reward_95": bootstrap(rewards),
        "lm_tokens": drawn / texts,
        "lm_tokens_95": bootstrap(np.array([one.lm_tokens_drawn for one in metrics], float).reshape(-1, count)),
        "attempted_tokens_by_model": _by_model(outputs),
        "rm_tokens": scored / texts,
        "kept_tokens": kept / texts,
        "lm_tokens_a_kept_token": drawn / kept, "rm_tokens_a_kept_token": scored / kept,
        "milliseconds_a_kept_token": 1e3 * seconds / kept,
        "fallbacks": sum(one.fallbacks for one in metrics) / max(1, sum(one.segments for one in metrics)),
        "seconds": seconds / texts}


@torch.no_grad()
def judged(outputs: list[stars.RequestOutput]) -> list[float]:
    """What the reward model says of texts that another reward has guided, in transformers."""
    model = transformers.LlamaForSequenceClassification.from_pretrained(DEMO_RM, dtype=torch.float32).eval()
    rewards = []
    for output in outputs:
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        if ids[-1] == model.config.eos_token_id:
            del ids[-1]
        rewards.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits.item())
    return rewards


def _by_model(outputs: list[stars.RequestOutput]) -> dict[str, float]:
    """Tokens of the attempts that the segments of a text still have, kept or not, by the models that drew or enumerated
    them."""
    totals: dict[str, float] = collections.defaultdict(float)
    for output in outputs:
        for segment in output.outputs[0].segments:
            for name, attempt in zip(segment.models or ("lm",) * len(segment.attempts), segment.attempts, strict=True):
                totals[name] += len(attempt.token_ids) / len(outputs)
    return dict(totals)


def _line(found: dict[str, Any]) -> str:
    low, high = found["mean_reward_95"]
    return (f"{found['policy']:<22}{found['setting']:<42}{found['mean_reward']:7.2f} [{low:5.2f}, {high:5.2f}]"
            f"{found['lm_tokens']:9.0f} LM{found['rm_tokens']:9.0f} RM  {1e3 * found['seconds']:7.0f} ms")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
