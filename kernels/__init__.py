"""The operations of the engine, one a file: a torch reference beside each faster version."""

from stars.kernels.attention import attention_reference as attention
from stars.kernels.embedding import embedding_reference as embedding
from stars.kernels.linear import Weight, pack
from stars.kernels.linear import linear_reference as linear
from stars.kernels.rms_norm import rms_norm_reference as rms_norm
from stars.kernels.rope_write import rope_write_reference as rope_write
from stars.kernels.sample_step import sample_step_reference as sample_step
from stars.kernels.swiglu import swiglu_reference as swiglu
from stars.kernels.take_rows import take_rows_reference as take_rows

__all__ = ["Weight", "attention", "embedding", "linear", "pack", "rms_norm", "rope_write", "sample_step", "swiglu",
           "take_rows"]
