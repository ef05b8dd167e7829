"""The width that the engine chooses: the cheapest accepted segment under the measured times of a step."""

from __future__ import annotations

import pytest

from stars.width import CANDIDATES, PRIOR_ACCEPTED, PRIOR_COUNTED, WidthChooser


def affine(base: float, per_lane: float):
    """Times of a step, and the counts that were measured."""
    measured = []

    def step_seconds(lanes: int) -> float:
        measured.append(lanes)
        return base + per_lane * lanes

    return step_seconds, measured


@pytest.mark.parametrize("per_lane", [0.0, 0.001, 0.05, 0.3, 5.0])
@pytest.mark.parametrize("accepted, counted", [(0, 0), (1, 50), (15, 50), (50, 50)])
@pytest.mark.parametrize("responses", [1, 3])
def test_it_is_the_width_of_least_expected_time(per_lane, accepted, counted, responses):
    """Affine times are interpolated exactly, so the choice is that of the formula itself."""
    chooser = WidthChooser(affine(1.0, per_lane)[0], 128)
    rate = (accepted + PRIOR_ACCEPTED) / (counted + PRIOR_COUNTED)

    def cost(width: int) -> float:
        return (1.0 + per_lane * width * responses) / (1 - (1 - rate) ** width)

    for most in (1, 5, 20, 40):
        allowed = [width for width in CANDIDATES if width <= most]
        best = min(map(cost, allowed))
        assert cost(chooser.choose(accepted, counted, responses, most)) == pytest.approx(best, rel=1e-12)


def test_free_lanes_are_all_taken_and_dear_ones_are_not():
    free, dear = WidthChooser(affine(1.0, 0.0)[0], 64), WidthChooser(affine(0.0, 1.0)[0], 64)
    assert free.choose(5, 50, 1, 16) == 16 and dear.choose(5, 50, 1, 16) == 1
    # At an accept rate near one the second lane would be drawn for nothing, at any price.
    assert WidthChooser(affine(1.0, 0.01)[0], 64).choose(10**6, 10**6, 1, 16) == 1


def test_each_count_is_measured_once_at_start_up_or_at_first_use():
    step_seconds, measured = affine(1.0, 0.1)
    chooser = WidthChooser(step_seconds, 24)
    assert not measured
    chooser.measure()
    assert measured == [16, 8, 4, 2, 1]
    chooser.choose(1, 4, 2, 12)  # 24 lanes: beyond the grid, in proportion to the last
    assert measured == [16, 8, 4, 2, 1]
