"""The rows that a run is for: what is aimed at, and what was predicted before anything was measured.

The figures of the stages name the row they stand for. A row without a figure is "not measured". How the predictions are
computed stands in benchmarks/NOTES.md; none is changed after it was compared with an outcome.
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
    Aim("step", "8B step, one lane, 1k keys: share of read bandwidth", ">= 0.9", "0.83", "0.80"),
    Aim("step-16", "8B step, 16 lanes over shared 1k keys, over one lane", "<= 1.08", "1.05", "1.05"),
    Aim("aligned-0.3", "aligned over plain token, 8B + 8B, B = 32, accept 0.3, width free", "<= 1.1", "1.11", "1.11"),
    Aim("aligned-0.1", "the same at accept 0.1", "", "1.32", "1.31"),
    Aim("aligned-0.7", "the same at accept 0.7", "", "1.06", "1.06"),
    Aim("over-eager", "aligned over generate's unaligned tokens, eager", ">= 5", "3.9", "5.3"),
    Aim("over-static", "aligned over unaligned tokens, static cache captured by hand", ">= 1.3", "1.07", "1.12"),
    Aim("over-loop", "STARS over the loop with caches, eager, equal width", ">= 5", "4.1", "5.7"),
    Aim("over-captured-loop", "STARS over the loop with caches, captured, equal width", "", "1.17", "1.23"),
    Aim("over-loop-1", "STARS, width free, over the loop at width 1, eager", ">= 10", "13", "18"),
    Aim("rm-4k", "RM pass after 4k keys over after 1k", "<= 1.25", "1.11", "1.15"),
    Aim("rm-16k", "RM pass after 16k keys over after 1k", "<= 2.1", "1.57", "1.73"),
    Aim("sampler", "sample_step, 64 lanes, 128k, temperature, over one read of the logits", "<= 2",
        "1.4 (float32), 2.7 (bf16)", "2 (float32), 4 (bf16)"),
    Aim("sampler-filters", "sample_step, top-k and top-p, over one read of the logits", "<= 4",
        "7 (float32), 14 (bf16)", "10 (float32), 20 (bf16)"),
    Aim("score", "score_and_decide, 64 lanes of 4096, over 10 us", "<= 1", "0.3", "0.3"),
    Aim("commit", "commit of 32 tokens, 32 layers, over 10 us", "<= 1", "0.6", "0.5"),
    Aim("together", "32 prompts at once over one by one", ">= 8", "20", "20"),
)
BY_KEY = {aim.key: aim for aim in AIMS}
