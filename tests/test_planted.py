"""Errors that were planted and passed every other test: what each would have changed, in values."""

from __future__ import annotations

import math

import pytest
import torch

import stars
from stars.bindings import libstars
from stars.cache import CommitMove, PagedCache
from stars.errors import IntegrityError
from stars.width import WidthChooser
from toy import ToyModel, toy_engine


def test_lanes_beyond_the_measured_counts_cost_in_proportion():
    """Of 12 lanes at most, 8 are the most that was measured: 12 and 24 lanes take 1.5 and 3 times as long."""
    chooser = WidthChooser(lambda lanes: 1.0 * lanes, 12)
    # Every lane costs the same, so a second one never pays at an accept rate of a quarter.
    assert [chooser.choose(0, 0, responses, 12) for responses in (1, 3, 12, 24)] == [1, 1, 1, 1]
    # A step that mostly reads weights: 4 lanes of 3 responses take 1 + 0.02 * 8 seconds, times 1.5.
    nearly_free = WidthChooser(lambda lanes: 1.0 + 0.02 * lanes, 12)
    costs = {width: (1.0 + 0.02 * min(3 * width, 8)) * max(1.0, 3 * width / 8) / (1.0 - 0.75**width)
             for width in (1, 2, 3, 4)}
    assert min(costs, key=costs.get) == 3 and nearly_free.choose(0, 0, 3, 4) == 3


def test_a_commit_leaves_no_gap_behind_a_rewind_of_its_own():
    """6 positions, rewound to 3 by the first move: the second may begin at 3 and not at 5."""
    cache = PagedCache(1, 1, 2, page_size=4, num_pages=4, num_slabs=1, slab_len=4)
    table = cache.open([], 8)
    cache.commit([CommitMove(table, 0, 4, 0), CommitMove(table, 0, 2, 4)])
    assert table.length == 6
    with pytest.raises(IntegrityError, match="a commit at 5 leaves a gap after 3 positions"):
        cache.commit([CommitMove(table, 0, 1, 2), CommitMove(table, 0, 1, 5)])
    assert table.length == 6
    cache.commit([CommitMove(table, 0, 1, 2), CommitMove(table, 0, 1, 3)])
    assert table.length == 4


@pytest.mark.parametrize("threshold", [-math.inf, math.inf])
def test_an_infinite_threshold_does_not_ask_for_the_prompts_reward(threshold):
    """r(prompt) cannot change such a threshold: it is neither computed nor reported, and need not be finite."""
    asked = []

    def reward(prompt, responses):
        asked.extend(responses)
        return [math.nan if not response else 1.0 for response in responses]

    engine = toy_engine(ToyModel(seed=3), stars.FunctionReward(reward, inputs="ids"))
    policy = stars.STARS(segment_size=2, max_attempts=2, alpha=0.5, beta=0.5, reward_threshold=threshold, width=1)
    [output] = engine.generate({"prompt_token_ids": [1, 2]}, stars.SamplingParams(max_tokens=4, seed=1, ignore_eos=True),
                               policy, use_tqdm=False)
    assert output.outputs[0].error is None and output.prompt_reward is None
    assert asked and all(asked)
    assert [segment.accepted for segment in output.outputs[0].segments] == [threshold < 0] * 2


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
@pytest.mark.parametrize("dtype, arithmetic", [(torch.float32, "float32"), (torch.bfloat16, "float32"),
                                               (torch.bfloat16, "bfloat16")])
def test_what_pads_a_packed_matrix_is_zero(monkeypatch, dtype, arithmetic):
    """33 columns are one panel and one column, 3 inputs a pair and a half: whatever lay in the memory is gone."""
    empty = torch.empty
    matrix = torch.ones(33, 3, dtype=dtype)
    packed = []
    for filling in (0, 255):
        monkeypatch.setattr(torch, "empty", lambda *shape, filling=filling, **kind: empty(*shape, **kind).fill_(filling))
        packed.append(libstars.pack(matrix, arithmetic).view(dtype))
    assert packed[0].equal(packed[1])
    assert packed[1].count_nonzero() == matrix.numel() < packed[1].numel()
