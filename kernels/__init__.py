"""The operations of the engine, one a file: a torch reference beside each faster version."""

from stars.kernels.append_draft import append_draft
from stars.kernels.apply_penalties import apply_penalties
from stars.kernels.attention import attention
from stars.kernels.copy_rows import copy_rows
from stars.kernels.embedding import embedding
from stars.kernels.linear import Weight, linear, pack
from stars.kernels.rms_norm import rms_norm
from stars.kernels.rope_write import rope_write
from stars.kernels.sample_step import sample_step
from stars.kernels.score import score
from stars.kernels.swiglu import swiglu
from stars.kernels.take_rows import take_rows

__all__ = ["Weight", "append_draft", "apply_penalties", "attention", "copy_rows", "embedding", "linear", "pack",
           "rms_norm", "rope_write", "sample_step", "score", "swiglu", "take_rows"]
