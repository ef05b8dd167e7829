"""The rows that a run is for: what is aimed at, and what was predicted before anything was measured.

The figures of the stages name the row they stand for. A row without a figure is "not measured". How the predictions are
computed stands in benchmarks/NOTES.md, those of earlier runs too: what was compared with an outcome stays there.
"""

from __future__ import annotations

from typing import NamedTuple


class Aim(NamedTuple):
    """One row. `bound` is on a figure's ratio: "<= 1.1" or ">= 5"; an empty one asks for the number alone."""

    key: str
    row: str
    bound: str
    h100: str  # predicted ratio
    h200: str

    def met(self, ratio: float | None) -> bool | None:
        """None where there is nothing to compare."""
        if ratio is None or not self.bound:
            return None
        sign, bound = self.bound.split()
        return ratio <= float(bound) if sign == "<=" else ratio >= float(bound)


AIMS = (
    Aim("step", "8B step, one lane, 1k keys: share of read bandwidth", ">= 0.9", "0.89", "0.86"),
    Aim("step-16", "8B step, 16 lanes over shared 1k keys, over one lane", "<= 1.08", "1.04", "1.05"),
    Aim("chain", "8B forward and head in a graph, 1 row, fused, over its weights at read bandwidth", "<= 1.11", "1.12",
        "1.16"),
    Aim("chain-16", "the same at 16 rows", "", "1.17", "1.22"),
    Aim("aligned-0.3", "aligned over plain token, 8B + 8B, B = 32, accept 0.3, width free", "<= 1.1", "1.09", "1.09"),
    Aim("aligned-0.1", "the same at accept 0.1", "", "1.38", "1.37"),
    Aim("aligned-0.7", "the same at accept 0.7", "", "1.07", "1.07"),
    Aim("step-fp8", "8B in fp8: steps a second over those in bf16, one lane", ">= 1.7", "1.74", "1.65"),
    Aim("step-fp8-16", "the same, 16 lanes", ">= 1.7", "1.68", "1.6"),
    Aim("step-int8", "8B in int8: steps a second over those in bf16, one lane", ">= 1.7", "1.74", "1.65"),
    Aim("step-int8-16", "the same, 16 lanes", ">= 1.7", "1.68", "1.6"),
    Aim("aligned-fp8", "aligned over plain token in fp8, accept 0.3, width free", "<= 1.1", "1.15", "1.15"),
    Aim("aligned-int8", "the same in int8", "<= 1.1", "1.15", "1.15"),
    Aim("over-eager", "aligned over generate's unaligned tokens, eager", ">= 5", "11", "15"),
    Aim("over-static", "aligned over unaligned tokens, static cache captured by hand", ">= 1.3", "1.5", "1.6"),
    Aim("over-loop", "STARS over the loop with caches, eager, equal width", ">= 5", "18", "24"),
    Aim("over-captured-loop", "STARS over the loop with caches, captured, equal width", "", "1.9", "2.0"),
    Aim("over-loop-1", "STARS, width free, over the loop at width 1, eager", ">= 10", "38", "52"),
    Aim("early-stop", "a draft whose lanes end after 4 of 32 steps, over a whole one", "<= 0.25", "0.17", "0.17"),
    Aim("rm-4k", "RM pass of 4 x 32 rows after 4k keys over after 1k", "<= 1.25", "1.15", "1.18"),
    Aim("rm-16k", "RM pass of 4 x 32 rows after 16k keys over after 1k", "<= 2.1", "1.8", "1.9"),
    Aim("sampler", "sample_step, 64 lanes, 128k, temperature, over one read of the logits", "<= 2", "2.25", "3"),
    Aim("sampler-filters", "sample_step, top-k and top-p, over one read of the logits", "<= 4", "11", "15"),
    Aim("sampler-cuts", "sample_step, temperature and entropy cuts, over one read of the logits", "<= 3", "3.2", "4.3"),
    Aim("ranking", "top_tokens, 64 lanes, 128k, 10 of each, over 500 us", "<= 1", "1.3", "1.1"),
    Aim("score", "score_and_decide, 64 lanes of 4096, over 10 us", "<= 1", "0.3", "0.3"),
    Aim("commit", "commit of 32 tokens, 32 layers, over 10 us", "<= 1", "0.54", "0.5"),
    Aim("rounds", "rounds with a capture or a compile under random arrivals, of all", "<= 0", "0", "0"),
    Aim("long-prompt", "a round while a prompt of 8,000 tokens is read, over one without", "<= 2.5", "2", "2"),
    Aim("together", "32 prompts at once over one by one", ">= 8", "28", "28"),
)
BY_KEY = {aim.key: aim for aim in AIMS}
