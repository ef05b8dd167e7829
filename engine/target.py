"""What differs between devices, chosen once where an engine is built: no other room asks which device it runs on."""

from __future__ import annotations

from typing import NamedTuple

import torch

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 144, 160, 192, 256)


def bucket(count: int) -> int:
    """The number of rows a pass of `count` rows is padded to where shapes are captured: few shapes serve all counts."""
    return next((size for size in BUCKETS if size >= count), -(-count // 128) * 128)


class Target(NamedTuple):
    """How an engine works on its device."""

    device: str
    dtypes: tuple[str, ...]  # that a model may have
    dtype: str | None  # where "auto" is asked; None takes the checkpoint's
    float32: bool  # activations, keys and values are float32 whatever the dtype, which is then that of stored matrices
    triton: bool  # operations are Triton's kernels, in CUDA graphs, and serve some shapes only; libraries may prefill
    own_memory: bool  # apart from the host's: what passes between them is sent and waited for
    padded: bool  # passes are filled up with idle rows to few captured shapes, and attention gets its tiles
    padded_moves: bool  # commits are, too: Triton's copy passes over a row -1, which libstars' has not
    chunk: int  # rows of a prefill pass
    captured_prefill: int  # rows up to which a prefill pass is captured
    ridge_rows: int  # rows of a scoring pass
    reward_lag: int  # last tokens of a text that its reward's pages lack: each candidate's first rows
    trailing: bool  # a draft's scoring is launched while it runs, as the host would only wait for it
    measures_widths: bool  # at start-up; else where a policy first leaves its width to the engine
    one_order: str  # what to do where the bits of a row depend on how many rows there are

    def rows(self, count: int) -> int:
        """The rows of a pass of `count` rows, idle ones included."""
        return bucket(count) if self.padded else count

    def synchronise(self) -> None:
        """Waits for whatever the device still has to do."""
        if self.own_memory:
            torch.cuda.synchronize()


# Chunks: enough rows to be bound by arithmetic, few enough to keep activations in a processor's caches. A GPU's
# products need more rows to be bound by it.
#
# Captured prefill: prompts of a few hundred tokens, whose passes would otherwise take the host longer to launch than
# the GPU to run. Longer ones are launched one by one, and may use a library.
#
# Ridge rows: from which on a pass over the weights is bound by arithmetic rather than by reading them.
#
# Reward lag: a last token whose keys wait for the next score is a row more of every candidate, and four candidates of 32
# tokens would no longer be the 128 rows that a pass is made for. On the CPU, where no pass is filled up, it is one row in
# 33, and there the bits of a reward stay those of a score that starts with that token: attention adds up what lies in
# pages and what lies in a slab apart.
#
# Widths: measuring them compiles and captures steps on a GPU. On the CPU a step of a large model can take seconds.

CPU = Target(
    device="cpu",
    dtypes=("float32", "bfloat16"),
    dtype="float32",
    float32=True,
    triton=False,
    own_memory=False,
    padded=False,
    padded_moves=False,
    chunk=256,
    captured_prefill=256,
    ridge_rows=32,
    reward_lag=1,
    trailing=False,
    measures_widths=False,
    one_order="install with a C++ compiler, so that libstars is built",
)

CUDA = Target(
    device="cuda",
    dtypes=("float32", "bfloat16", "float16"),
    dtype=None,
    float32=False,
    triton=True,
    own_memory=True,
    padded=True,
    padded_moves=True,
    chunk=2048,
    captured_prefill=256,
    ridge_rows=128,
    reward_lag=0,
    trailing=True,
    measures_widths=True,
    one_order="load the model with deterministic=True too",
)


def target_of(device: str) -> Target:
    """The target of a kind of device, by torch's name of it. What is not the CPU is worked as a GPU is."""
    return CPU if device == "cpu" else CUDA
