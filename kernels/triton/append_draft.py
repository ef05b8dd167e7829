"""Drafted segments as rows of a scoring pass; what is written is said in `stars.kernels.append_draft`.

One program a sequence, which waits for its lane, for what that lane drew, and for the stores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stars.kernels.triton.variant import Variant
from stars.kernels.types import Draft, TrailingRows


@triton.jit
def append_draft_kernel(out_tokens, steps, stop_ids, lanes, row_start, closing, token_ids, last, vocab_size,
                        STEPS: tl.constexpr, STEPS_BLOCK: tl.constexpr, STOPS: tl.constexpr, STOPS_BLOCK: tl.constexpr,
                        CLOSING: tl.constexpr, CLOSING_BLOCK: tl.constexpr):
    """One program a sequence: its lane's tokens without a stop token, and its closing tokens after them."""
    sequence = tl.program_id(0)
    lane = tl.load(lanes + sequence)
    if lane >= 0:
        drawn = tl.load(steps + lane)
        at = tl.arange(0, STEPS_BLOCK)
        ids = tl.load(out_tokens + lane * STEPS + at, mask=at < STEPS, other=0)  # no need to wait for `drawn`
        stop = tl.arange(0, STOPS_BLOCK)
        stops = tl.load(stop_ids + lane * STOPS + stop, mask=stop < STOPS, other=0)
        first = tl.load(row_start + sequence) + 1

        final = tl.sum(tl.where(at == drawn - 1, ids, 0), axis=0)
        stopped = tl.max(((stops == final) & (stop < STOPS)).to(tl.int32), axis=0)
        count = drawn - tl.where(drawn > 0, stopped, 0)
        tl.store(token_ids + first + at, tl.where((ids >= 0) & (ids < vocab_size), ids, 0), mask=at < count)

        after = tl.arange(0, CLOSING_BLOCK)
        ids = tl.load(closing + sequence * CLOSING + after, mask=after < CLOSING, other=-1)
        given = (ids >= 0).to(tl.int32)
        tl.store(token_ids + first + count + tl.cumsum(given, axis=0) - 1, ids, mask=ids >= 0)
        tl.store(last + sequence, tl.maximum(first + count + tl.sum(given, axis=0) - 1, 0))


def append_draft(draft: Draft, trailing: TrailingRows, vocab_size: int) -> None:
    """As `stars.kernels.append_draft`."""
    sequences = trailing.lanes.shape[0]
    for name, tensor in (draft._asdict() | trailing._asdict()).items():
        if not tensor.is_contiguous():
            raise ValueError(f"append_draft: {name} is {list(tensor.shape)} with strides {tensor.stride()}, expected "
                             "contiguous")
    if trailing.row_start.shape != (sequences + 1,) or trailing.closing.shape[0] != sequences:
        raise ValueError(f"append_draft: {sequences} sequences with row_start {list(trailing.row_start.shape)} and "
                         f"closing {list(trailing.closing.shape)}")
    if sequences:
        sizes = _sizes(draft.out_tokens.shape[1], draft.stop_ids.shape[1], trailing.closing.shape[1])
        append_draft_kernel[(sequences,)](*draft, *trailing, vocab_size, **sizes,
                                          num_warps=_warps(sizes["STEPS_BLOCK"]))


def _sizes(steps: int, stops: int, closing: int) -> dict[str, int]:
    """The constants of a launch: widths, and the powers of two that hold them."""
    sizes = {"STEPS": steps, "STOPS": stops, "CLOSING": closing}
    return sizes | {f"{name}_BLOCK": triton.next_power_of_2(max(1, size)) for name, size in sizes.items()}


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


def variants() -> list[Variant]:
    """Short and long segments."""
    found = []
    for steps in (32, 4096):
        sizes = _sizes(steps, 16, 4)
        kinds = {"vocab_size": "i32"} | dict.fromkeys(sizes, "constexpr")
        found.append(Variant(f"append_draft {steps}", append_draft_kernel,
                             {name: kinds.get(name, "*i32") for name in append_draft_kernel.arg_names}, sizes,
                             _warps(sizes["STEPS_BLOCK"]), 1))
    return found
