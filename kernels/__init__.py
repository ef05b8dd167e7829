"""The operations of the engine, one a file: a torch reference and its faster versions."""

from stars.kernels.append_draft import append_draft
from stars.kernels.apply_penalties import apply_penalties
from stars.kernels.attention import attention
from stars.kernels.blend_logits import blend_logits
from stars.kernels.copy_rows import copy_rows
from stars.kernels.edit_logits import edit_logits
from stars.kernels.embedding import embedding
from stars.kernels.embedding_scaled import embedding_scaled
from stars.kernels.linear import Weight, linear, pack, pack_rows
from stars.kernels.linear_normed import linear_normed
from stars.kernels.linear_residual import linear_residual
from stars.kernels.linear_swiglu import linear_swiglu
from stars.kernels.qkv_rope import qkv_rope
from stars.kernels.rescale import rescale
from stars.kernels.rms_norm import rms_norm
from stars.kernels.rope_write import rope_write
from stars.kernels.sample_step import sample_step
from stars.kernels.score import score
from stars.kernels.swiglu import swiglu
from stars.kernels.take_rows import take_rows
from stars.kernels.token_logprobs import token_logprobs
from stars.kernels.top_tokens import top_tokens

__all__ = ["Weight", "append_draft", "apply_penalties", "attention", "blend_logits", "copy_rows", "edit_logits",
           "embedding", "embedding_scaled", "linear", "linear_normed", "linear_residual", "linear_swiglu", "pack",
           "pack_rows", "qkv_rope", "rescale", "rms_norm", "rope_write", "sample_step", "score", "swiglu", "take_rows",
           "token_logprobs", "top_tokens"]
