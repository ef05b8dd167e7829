"""Lanes for tests of the sampler, and the comparison of a faster sampler with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stars.kernels import philox
from stars.kernels.sample_step import sample_step_reference
from stars.kernels.types import LaneState

# Two tokens closer than this may win the one here and the other there: z is below 2^5 and the noise below 2^5, so a
# few roundings of each come to some 1e-5.
TIE = 2e-5


def make_lanes(count: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_steps=3, seed=0, sample=1,
               stop_ids=2) -> LaneState:
    """`count` fresh lanes with room for `max_steps` tokens and `stop_ids` stop ids, all of stream (3, sample)."""
    def int32(value=0):
        return torch.full((count,), value, dtype=torch.int32)

    def float32(value):
        return torch.full((count,), value, dtype=torch.float32)

    stream = philox.pack_stream(3, sample)
    return LaneState(
        int32(5), int32(100), int32(200), int32(3), int32(), int32(max_steps), int32(),
        torch.full((count, max_steps), -9, dtype=torch.int32), torch.full((count, max_steps), 9.0),
        torch.arange(count) * 7919 + seed, int32(1), int32(stream - (1 << 32) if stream >> 31 else stream),
        float32(temperature), int32(top_k), float32(top_p), float32(min_p),
        torch.full((count, stop_ids), -1, dtype=torch.int32), float32(float("inf")), int32(),
    )


def copy_of(given):
    """The same values in memory of their own."""
    return type(given)(*(tensor.clone() for tensor in given))


def noise(lanes: LaneState, lane: int, vocab: int, step: int | None = None) -> torch.Tensor:
    """float64 [vocab] noise of a lane's draw at `step`, its next one by default."""
    step = int(lanes.steps[lane]) if step is None else step
    words = philox.token_words(
        int(lanes.seeds[lane]), step, int(lanes.attempts[lane]), int(lanes.streams[lane]), vocab
    )
    return torch.from_numpy(philox.gumbel(words))


def assert_same_step(sample_step: Callable, logits: torch.Tensor, lanes: LaneState, **options) -> int:
    """Steps of `sample_step` and of the reference from equal states; how many lanes were too close to call."""
    ours, expected = copy_of(lanes), copy_of(lanes)
    sample_step(logits, ours, **options)
    wide = logits.float()
    sample_step_reference(wide, expected, options.get("filters", True), cuts=options.get("cuts", True))
    return assert_same_lanes(wide, lanes, ours, expected)


def assert_same_lanes(logits: torch.Tensor, lanes: LaneState, ours: LaneState, expected: LaneState) -> int:
    """`ours` and `expected` are the same step from `lanes`; how many lanes were too close to call."""
    ties = 0
    for lane in range(logits.shape[0]):
        step = int(lanes.steps[lane])
        got, wanted = int(ours.out_tokens[lane, step]), int(expected.out_tokens[lane, step])
        if got != wanted and got >= 0 and wanted >= 0:
            z = logits[lane].double() / float(lanes.temperature[lane]) + noise(lanes, lane, logits.shape[1], step)
            assert abs(float(z[got] - z[wanted])) < TIE, f"lane {lane}: token {got} instead of {wanted}"
            ties += 1
            continue
        for name, a, b in zip(LaneState._fields, ours, expected, strict=True):
            if name == "out_logprobs":
                torch.testing.assert_close(a[lane], b[lane], rtol=1e-6, atol=1e-5, equal_nan=True)
            else:
                assert torch.equal(a[lane], b[lane]), f"lane {lane}: {name} {a[lane]} instead of {b[lane]}"
    return ties


def entropy_within(row: torch.Tensor) -> tuple[float, float]:
    """(entropy in nats of softmax(row), what a float32 sampler may err by), from float64.

    A sampler forms H = log S + T / S, where S adds up e = exp(d) and T e * |d|, d = logit - highest <= 0. In units of
    u = 2^-24: d is rounded by |d|, which is as much of e again, and 1.45 times that where a card takes 2^(d / log 2). e
    itself errs by 4, and a sum by one for each of the at most 48 additions that a term takes part in (32 of a thread, 5
    of a warp, 3 of its tile, 8 of all tiles; libstars adds fewer). With the means a = E|d| and b = E d^2 that is
    54 + 2.5 a of S, and 55 a + 2.5 b of T / S; H errs by the first times (1 + a), the second, and a unit of itself.
    """
    logprobs = row.double().log_softmax(0)
    p = logprobs.exp()
    away = torch.where(p > 0, (row.double().max() - row.double()), torch.zeros_like(p))
    a, b = float((p * away).sum()), float((p * away**2).sum())
    nats = float(torch.special.entr(p).sum())
    return nats, 2.0**-24 * ((54 + 2.5 * a) * (1 + a) + 55 * a + 2.5 * b + nats)


KINDS = ("below", "above", "at least", "too early", "off")
"""Of a lane: its cut is just below the entropy, just above, or there is none; it may be cut, or is too short yet."""


def assert_cuts(step: Callable, logits: torch.Tensor, kinds: Sequence[str] = KINDS, **lane_options) -> int:
    """`step` ends the lanes that the entropy of their logits [rows, vocab] cuts, without a draw, and no others; returns
    how many were cut."""
    rows, lanes_of = logits.shape[0], len(kinds)
    lanes = make_lanes(rows * lanes_of, max_steps=7, **lane_options)
    lanes.steps[:] = torch.arange(rows * lanes_of) % 4 + 1
    lanes.least_tokens[:] = lanes.steps - 1
    expected = []
    for row in range(rows):
        nats, tolerance = entropy_within(logits[row].float())
        assert tolerance < 2e-4, "the tolerance says little"
        for lane, kind in enumerate(kinds, row * lanes_of):
            # The cut is a float32: a unit more on either side.
            away = tolerance + 2.0**-23 * nats
            below, above = max(0.0, nats - away), nats + away + 1e-30
            lanes.entropy_cut[lane] = {"above": above, "off": float("inf")}.get(kind, below)
            lanes.least_tokens[lane] += {"at least": 1, "too early": 2}.get(kind, 0)
            expected.append(kind in ("below", "at least"))
    before, repeated = copy_of(lanes), logits.repeat_interleave(lanes_of, 0)
    step(repeated, lanes)
    without = before._replace(entropy_cut=torch.full_like(before.entropy_cut, float("inf")))
    step(repeated, without := copy_of(without))
    for lane, cut in enumerate(expected):
        for name, now, was, drawn in zip(LaneState._fields, lanes, before, without, strict=True):
            if name == "entropy_cut":
                continue
            wanted = was[lane] if cut else drawn[lane]
            wanted = torch.ones_like(wanted) if cut and name == "done" else wanted
            assert torch.equal(now[lane], wanted), f"lane {lane}, {kinds[lane % lanes_of]}: {name} is {now[lane]}"
    return sum(expected)


def rows_of_entropies(vocab: int, seed: int) -> torch.Tensor:
    """float32 [7, vocab] logits that are certain, uniform, forbidden in part, far from 0, and usual."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, vocab, generator=draw) * 3
    logits[0] = 0.0
    logits[1], logits[1, vocab // 2] = -float("inf"), 2.5  # nothing is uncertain: at least 0 nats all the same
    logits[2, torch.randperm(vocab, generator=draw)[: vocab // 2]] = -float("inf")
    logits[3] -= 1e4
    logits[4] *= 4
    logits[5] = -80.0  # nearly all of the mass on one, and a tail that exp cannot hold
    logits[5, vocab - 1] = 20.0
    return logits


def tied_rows(count: int, vocab: int, tokens: Sequence[int]) -> tuple[torch.Tensor, LaneState]:
    """Logits float32 [count, vocab] and lanes at whose first draw z + g of `tokens` is 1536 to the last bit.

    z is 1536 less the noise, in whole units of float32 there. The sum then rounds to 1536 as long as the noise errs by
    less than what separates it from half a unit, so seeds are taken for which that is 2e-5.
    """
    unit, lanes, seed = 2.0**-13, make_lanes(count), 0
    logits = torch.full((count, vocab), -1.0)
    for lane in range(count):
        while True:
            seed += 1
            drawn = [float(philox.gumbel(philox.philox4x32(
                (token // 4, 0, 1, int(lanes.streams[lane]) & 0xFFFFFFFF), (seed, 0))[token % 4])) / unit
                for token in tokens]
            if all(abs(units % 1 - 0.5) > 2e-5 / unit for units in drawn):
                break
        lanes.seeds[lane] = seed
        logits[lane, list(tokens)] = torch.tensor([1536.0 - round(units) * unit for units in drawn])
    return logits, lanes
