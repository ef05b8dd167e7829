"""What a kernel is compiled for ahead of time: the list that every op's `variants()` returns."""

from __future__ import annotations

from typing import NamedTuple

from triton.runtime import JITFunction

ARCHES = (80, 90, 100)
"""Compute capabilities that kernels are compiled for ahead of time: sm_80 and so on."""


class Variant(NamedTuple):
    """One specialisation of a kernel. Every pointer is 16-byte aligned, as torch's allocations are (`attributes`)."""

    name: str
    kernel: JITFunction
    signature: dict[str, str]  # every argument in order: a type such as "*bf16", "i32", "fp32", or "constexpr"
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    arches: tuple[int, ...] = ARCHES  # those it is chosen on
    fp_fusion: bool = True  # the launch's enable_fp_fusion: whether a product and a sum may round once
    max_registers: int | None = None  # the launch's maxnreg: None leaves it to the assembler


def attributes(variant: Variant) -> dict[tuple[int], list[list]]:
    """ASTSource's `attrs`: pointers divisible by 16, without which loads are not vectorised as they are at run time."""
    return {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(variant.signature.values()) if kind.startswith("*")
    }
