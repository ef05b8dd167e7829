"""Errors that were planted and passed every other test: what each would have changed, in values."""

from __future__ import annotations

from stars.width import WidthChooser


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
