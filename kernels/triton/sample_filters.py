"""Filters of a draft step without a sort: the score that a token must reach under top_k, top_p and min_p.

    bracket   min_p's threshold, which follows from the maximum; for top_k and top_p an interval of z that holds the
              threshold, by six standard deviations of an estimate from 4096 evenly spaced logits
    collect   the z inside the interval, listed, and the probability above it
    select    the exact threshold, by bisection over the float32 numbers, among those listed; where the interval did
              not hold it (which shows), among all

Probabilities are added up as multiples of 2^-40 of the largest, in int64, wherever the order of the summands may change
from run to run (tiles, listed values), so a threshold is the same in every run and batch. The launches, and what they
cost, are in `sample_step`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stars.kernels.triton.noise import exp
from stars.kernels.triton.sample_lane import (
    INFINITY,
    KNOWN,
    SEARCH,
    UNFILTERED,
    has_filters,
    is_open,
    row_maximum,
    scaled,
)

SAMPLE = 4096  # logits an interval is estimated from
LIST_BLOCK = 4096  # listed values at a time

_UNIT = tl.constexpr(2.0**40)  # 2^18 tokens of the largest probability are 2^58


@triton.jit
def _from_key(key):
    """The float32 at place `key` (int32) in the order of the float32 numbers."""
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _to_key(value):
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _mass(z, highest):
    """exp(z - highest) in units of 2^-40, int64."""
    return (exp(z - highest) * _UNIT).to(tl.int64)


# -- bracket ----------------------------------------------------------------------------------------------------------


@triton.jit
def bracket_kernel(logits, logits_stride, done, steps, max_steps, temperatures, top_ks, top_ps, min_ps, highest,
                   ceiling, mode, bounds, count, mass, VOCAB: tl.constexpr, TILES: tl.constexpr,
                   TILES_BLOCK: tl.constexpr, SAMPLE: tl.constexpr):
    """One program a lane: mode, and in bounds the largest z, the interval, and min_p's threshold."""
    lane = tl.program_id(0)
    chosen = UNFILTERED
    if is_open(done, tl.load(steps + lane), lane, max_steps):
        temperature = tl.load(temperatures + lane)
        top_k = tl.load(top_ks + lane)
        top_p = tl.load(top_ps + lane)
        min_p = tl.load(min_ps + lane)
        if has_filters(temperature, top_k, top_p, min_p, VOCAB):
            part = tl.arange(0, TILES_BLOCK)
            there = part < TILES
            parts = tl.load(highest + lane * TILES + part, mask=there, other=-INFINITY)
            z_highest = scaled(row_maximum(parts), temperature)
            if tl.abs(z_highest) < INFINITY:
                low = -INFINITY
                high = INFINITY
                threshold = -INFINITY
                if min_p > 0.0:
                    threshold = z_highest + tl.log(min_p.to(tl.float64)).to(tl.float32)
                counted = (top_k > 0) & (top_k < VOCAB)
                if top_p <= 0.0:
                    threshold = tl.maximum(threshold, z_highest)
                    chosen = KNOWN
                elif counted | (top_p < 1.0):
                    chosen = SEARCH
                    if VOCAB > SAMPLE:
                        at = tl.arange(0, SAMPLE)
                        index = ((at.to(tl.int64) * VOCAB) // SAMPLE).to(tl.int32)
                        x = tl.load(logits + lane.to(tl.int64) * logits_stride + index).to(tl.float32)
                        z = scaled(x, temperature)
                        if counted:
                            low = _low_by_count(z, z_highest, top_k.to(tl.float32) * (SAMPLE / VOCAB), SAMPLE)
                        elif min_p == 0.0:
                            parts = scaled(tl.where(parts > -INFINITY, parts, 0.0), temperature)
                            sums = tl.load(ceiling + lane * TILES + part, mask=there, other=0.0)
                            # A part of -inf alone is nothing times exp(0 - z_highest), which may overflow.
                            parts = tl.where(sums > 0.0, sums * exp(parts - z_highest), 0.0)
                            low, high = _by_tail(z, z_highest, (1.0 - top_p) * tl.sum(parts, axis=0), VOCAB / SAMPLE)
                    low = tl.maximum(low, threshold)
                else:
                    chosen = KNOWN
                tl.store(bounds + lane * 4, z_highest)
                tl.store(bounds + lane * 4 + 1, low)
                tl.store(bounds + lane * 4 + 2, high)
                tl.store(bounds + lane * 4 + 3, threshold)
                tl.store(count + lane, 0)
                tl.store(mass + lane * 2, tl.zeros((), tl.int64))
                tl.store(mass + lane * 2 + 1, tl.zeros((), tl.int64))
    tl.store(mode + lane, chosen)


@triton.jit
def _low_by_count(z, z_highest, expected, SAMPLE: tl.constexpr):
    """A value that more of the sample reach than the k largest of all should, by six standard deviations and eight."""
    wanted = expected + 6.0 * tl.sqrt(expected) + 8.0
    low = _to_key(z_highest * 0.0 - INFINITY)
    high = _to_key(z_highest) + 1
    if wanted < SAMPLE:
        for _ in range(20):  # to some 2^12 neighbouring numbers
            middle = low + (high - low) // 2
            reach = tl.sum((z >= _from_key(middle)).to(tl.int32), axis=0).to(tl.float32)
            enough = reach >= wanted
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return _from_key(low)


@triton.jit
def _by_tail(z, z_highest, allowed, ratio):
    """(low, high): the probability below `low` is under `allowed` and that below `high` is over it, by six deviations.

    The sample's sum times `ratio` estimates the tail, with a variance of ratio^2 times the sum of squares.
    """
    part = exp(z - z_highest)
    bottom = _to_key(z_highest * 0.0 - INFINITY)
    top = _to_key(z_highest) + 1
    low = bottom
    high = top
    for _ in range(20):
        middle = low + (high - low) // 2
        below = tl.where(z < _from_key(middle), part, 0.0)
        estimate = ratio * (tl.sum(below, axis=0) + 6.0 * tl.sqrt(tl.sum(below * below, axis=0)))
        under = estimate < allowed
        low = tl.where(under, middle, low)
        high = tl.where(under, high, middle)
    found = low
    low = bottom
    high = top
    for _ in range(20):
        middle = low + (high - low) // 2
        below = tl.where(z < _from_key(middle), part, 0.0)
        estimate = ratio * (tl.sum(below, axis=0) - 6.0 * tl.sqrt(tl.sum(below * below, axis=0)))
        over = estimate > allowed
        high = tl.where(over, middle, high)
        low = tl.where(over, low, middle)
    return _from_key(found), tl.where(high < top, _from_key(high), INFINITY)


# -- collect ----------------------------------------------------------------------------------------------------------


@triton.jit
def collect_kernel(logits, logits_stride, temperatures, top_ks, top_ps, mode, bounds, count, mass, values,
                   VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Grid (tiles, lanes): appends the tile's z inside the interval to `values`, adds up the probability above it."""
    tile = tl.program_id(0)
    lane = tl.program_id(1)
    if tl.load(mode + lane) == SEARCH:
        z_highest = tl.load(bounds + lane * 4)
        low = tl.load(bounds + lane * 4 + 1)
        high = tl.load(bounds + lane * 4 + 2)
        least = tl.load(bounds + lane * 4 + 3)
        tokens = tile * TILE + tl.arange(0, TILE)
        inside = tokens < VOCAB
        x = tl.load(logits + lane.to(tl.int64) * logits_stride + tokens, mask=inside, other=-INFINITY).to(tl.float32)
        z = scaled(x, tl.load(temperatures + lane))
        listed = inside & (z >= low) & (z < high)
        number = tl.sum(listed.to(tl.int32), axis=0)
        if number > 0:
            first = tl.atomic_add(count + lane, number)
            place = first + tl.cumsum(listed.to(tl.int32), axis=0) - 1
            tl.store(values + lane.to(tl.int64) * VOCAB + place, z, mask=listed)
        top_k = tl.load(top_ks + lane)
        if ((top_k <= 0) | (top_k >= VOCAB)) & (tl.load(top_ps + lane) < 1.0):
            # A tile's sum is formed in one order at any number of lanes; the order of tiles must not matter.
            part = exp(z - z_highest)
            above = tl.sum(tl.where(z >= high, part, 0.0), axis=0)
            kept = tl.sum(tl.where(z >= least, part, 0.0), axis=0)
            tl.atomic_add(mass + lane * 2, (above * _UNIT).to(tl.int64))
            tl.atomic_add(mass + lane * 2 + 1, (kept * _UNIT).to(tl.int64))


# -- select -----------------------------------------------------------------------------------------------------------


@triton.jit
def _count_reaching(values, number, bound, BLOCK: tl.constexpr):
    reach = 0
    start = 0
    while start < number:
        at = start + tl.arange(0, BLOCK)
        z = tl.load(values + at, mask=at < number, other=-INFINITY)
        reach += tl.sum(((z >= bound) & (at < number)).to(tl.int32), axis=0)
        start += BLOCK
    return reach


@triton.jit
def _mass_above(values, number, least, bound, z_highest, BLOCK: tl.constexpr):
    """Of those that reach `least` and are above `bound`."""
    above = tl.zeros((), tl.int64)
    start = 0
    while start < number:
        at = start + tl.arange(0, BLOCK)
        z = tl.load(values + at, mask=at < number, other=-INFINITY)
        above += tl.sum(tl.where((z >= least) & (z > bound), _mass(z, z_highest), 0), axis=0)
        start += BLOCK
    return above


@triton.jit
def select_kernel(logits, logits_stride, temperatures, top_ks, top_ps, mode, bounds, count, mass, values,
                  VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """One program a lane: the exact threshold into bounds, from what is listed."""
    lane = tl.program_id(0)
    if tl.load(mode + lane) == SEARCH:
        top_k = tl.load(top_ks + lane)
        top_p = tl.load(top_ps + lane).to(tl.float64)
        counted = (top_k > 0) & (top_k < VOCAB)
        z_highest = tl.load(bounds + lane * 4)
        low = tl.load(bounds + lane * 4 + 1)
        least = tl.load(bounds + lane * 4 + 3)
        number = tl.load(count + lane)
        above = tl.load(mass + lane * 2)  # nothing where top_k counts: the interval has no upper end then
        total = tl.load(mass + lane * 2 + 1)
        listed = values + lane.to(tl.int64) * VOCAB

        # Did the interval hold the threshold? What min_p drops needs no holding.
        missed = False
        if counted:
            missed = (number < top_k) & (low > least)
        else:
            short = top_p * total.to(tl.float64)
            held = above + _mass_above(listed, number, low, -INFINITY, z_highest, BLOCK)
            missed = (above.to(tl.float64) >= short) | ((held.to(tl.float64) < short) & (low > least))
        if missed:
            for start in range(0, VOCAB, BLOCK):
                at = start + tl.arange(0, BLOCK)
                x = tl.load(logits + lane.to(tl.int64) * logits_stride + at, mask=at < VOCAB, other=-INFINITY)
                tl.store(listed + at, scaled(x.to(tl.float32), tl.load(temperatures + lane)), mask=at < VOCAB)
            tl.debug_barrier()  # what one thread wrote, others read
            number = VOCAB
            above = tl.zeros((), tl.int64)

        bottom = _to_key(z_highest * 0.0 - INFINITY)
        threshold = least
        if counted:
            smallest = bottom  # top_k or more reach it
            largest = _to_key(z_highest) + 1  # fewer reach it
            while largest - smallest > 1:
                middle = smallest + (largest - smallest) // 2
                enough = _count_reaching(listed, number, _from_key(middle), BLOCK) >= top_k
                smallest = tl.where(enough, middle, smallest)
                largest = tl.where(enough, largest, middle)
            threshold = tl.maximum(threshold, _from_key(smallest))
            total = _mass_above(listed, number, threshold, -INFINITY, z_highest, BLOCK)
        if top_p < 1.0:
            # The least number that the probability above falls short of top_p at.
            short = top_p * total.to(tl.float64)
            smallest = _to_key(threshold) - 1
            largest = _to_key(z_highest)
            while largest - smallest > 1:
                middle = smallest + (largest - smallest) // 2
                over = above + _mass_above(listed, number, threshold, _from_key(middle), z_highest, BLOCK)
                falls_short = over.to(tl.float64) < short
                largest = tl.where(falls_short, middle, largest)
                smallest = tl.where(falls_short, smallest, middle)
            threshold = tl.maximum(threshold, _from_key(largest))
        tl.store(bounds + lane * 4 + 3, threshold)


def list_block(vocab: int) -> int:
    """Listed values that `select` reads at a time."""
    return min(LIST_BLOCK, triton.next_power_of_2(vocab))
