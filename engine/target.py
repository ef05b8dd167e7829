"""What differs between devices, chosen once where an engine is built: no other room asks which device it runs on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from stars.kernels.triton.tiles import Kind

ROWS: dict[Kind, tuple[int, ...]] = {
    "draft": (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256),
    "score": (16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    "prefill": (32, 64, 128, 192, 256),
}
"""Rows that a pass of a kind is padded to where shapes are captured: few, as each is captured at start-up.

Up to 128 rows a pass is bound by its weights, and an idle row costs little: of drafts every step is one, and one of a
single stream gets no idle row at all; scores begin at a candidate of a short segment, prompts at what is left of a
chunk. Beyond that an idle row costs what any other does: steps of a third to a half of what is there."""

STEP = 128  # beyond the last of these


class Target(NamedTuple):
    """How an engine works on its device."""

    device: str
    dtypes: tuple[str, ...]  # that a model may have
    quantizations: tuple[str, ...]  # that matrices may be rounded to as they are read
    float32: bool  # activations, keys and values are float32 whatever the dtype, which is then that of stored matrices
    triton: bool  # operations are Triton's kernels, in CUDA graphs, and serve some shapes only; libraries may prefill
    own_memory: bool  # apart from the host's: what passes between them is sent and waited for
    padded: bool  # passes are filled up with idle rows to few captured shapes, and attention gets its tiles
    chunk: int  # rows of a prefill pass
    batched_tokens: int | None  # rows of prompts in a round beside decoding responses, by default; None: no bound
    captured_prefill: int  # rows up to which a prefill pass is captured
    captured_score: int  # rows up to which a scoring pass is; more candidates than that are scored in several
    ridge_rows: int  # rows of a scoring pass
    reward_lag: int  # last tokens of a text that its reward's pages lack: each candidate's first rows
    trailing: bool  # a draft's scoring is launched while it runs, as the host would only wait for it
    captured_at_start: bool  # every shape is captured, and widths are measured, where an engine is built
    one_order: str  # what to do where the bits of a row depend on how many rows there are

    def rows(self, count: int, kind: Kind) -> int:
        """The rows of a pass of `count` rows, idle ones included."""
        if not self.padded:
            return count
        return next((size for size in ROWS[kind] if size >= count), -(-count // STEP) * STEP)

    def captured(self, kind: Kind) -> int:
        """Rows of the longest pass of a kind that is captured; a draft always is."""
        return {"draft": 1 << 30, "score": self.captured_score, "prefill": self.captured_prefill}[kind]

    def shapes(self, kind: Kind, most: int) -> list[int]:
        """The rows that passes of up to `most` rows are padded to, as far as they are captured; the most first."""
        most = min(self.rows(most, kind), self.captured(kind))
        return [*range(most // STEP * STEP, ROWS[kind][-1], -STEP), *(
            size for size in reversed(ROWS[kind]) if size <= most)]

    def synchronise(self) -> None:
        """Waits for whatever the device still has to do."""
        if self.own_memory:
            torch.cuda.synchronize()


# Chunks: enough rows to be bound by arithmetic, few enough to keep activations in a processor's caches. A GPU's
# products need more rows to be bound by it.
#
# Batched tokens: what a round may run of prompts while others decode. On a GPU a row costs two models of P parameters
# 4 P floating point operations, and a step of a draft reads 2 P bytes: at 600 TFLOP/s, which is an estimate, and at
# 3 TB/s, 2,048 rows take two thirds of the time of drafting a segment of 32 tokens, whatever P is. By that reckoning,
# which no card has confirmed, no round is twice as long for them. On the CPU the bound is the user's to set: who joins
# later than it could decodes in rounds of fewer lanes, which cost as much as those of many.
#
# Captured prefill: prompts of a few hundred tokens, whose passes would otherwise, by estimate, take the host longer to
# launch than the GPU to run. Longer ones are launched one by one, and may use a library.
#
# Captured scores: four times the ridge. Passes of so many rows are bound by arithmetic, so that more candidates cost
# the same in two of them; longer ones, of one long candidate or behind a draft of many, outlast their launches:
# all of that by estimate.
#
# Ridge rows: from which on a pass over the weights is bound by arithmetic rather than by reading them.
#
# Reward lag: a last token whose keys wait for the next score is a row more of every candidate, and four candidates of
# 32 tokens would not be the 128 rows that a pass is made for. On the CPU, where no pass is padded, it is one row in 33,
# and there a reward's bits are those of a score that starts with that token: attention adds up pages and slab apart.
#
# At start-up: compiling and capturing in the midst of requests would hold all of them up. On the CPU nothing is
# compiled, a step of a large model can take seconds, and widths are measured where a policy first leaves its width to
# the engine.

CPU = Target(
    device="cpu",
    dtypes=("float32", "bfloat16"),
    quantizations=("int8", "int4"),
    float32=True,
    triton=False,
    own_memory=False,
    padded=False,
    chunk=256,
    batched_tokens=None,
    captured_prefill=256,
    captured_score=1 << 30,
    ridge_rows=32,
    reward_lag=1,
    trailing=False,
    captured_at_start=False,
    one_order="install with a C++ compiler, so that libstars is built",
)

CUDA = Target(
    device="cuda",
    dtypes=("float32", "bfloat16", "float16"),
    quantizations=("fp8", "int8", "int4"),
    float32=False,
    triton=True,
    own_memory=True,
    padded=True,
    chunk=2048,
    batched_tokens=2048,
    captured_prefill=256,
    captured_score=512,
    ridge_rows=128,
    reward_lag=0,
    trailing=True,
    captured_at_start=True,
    one_order="load the model with deterministic=True too",
)


def target_of(device: str) -> Target:
    """The target of a kind of device, by torch's name of it. What is not the CPU is worked as a GPU is."""
    return CPU if device == "cpu" else CUDA


def device_of(kind: str) -> str:
    """What an engine's `device` is called where tensors are of this kind of torch device."""
    return "cuda" if kind == "cuda" else "cpu"
