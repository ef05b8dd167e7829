"""libstars (stars.h) in Python: its operations on CPU tensors, and their recording into programs.

Any thread may call. Without the library, `available` is False and nothing else may be called.
"""

from stars.bindings.draws import accept_uniform, gumbel, philox
from stars.bindings.library import alone, available, isa, library_path, num_threads, set_num_threads, usable_cpus
from stars.bindings.matrices import format_of, pack, pack_quant, pack_rows, quant_bytes, unpack, unpack_quant
from stars.bindings.operations import (
    append_draft,
    apply_penalties,
    attention,
    blend_logits,
    copy_rows,
    edit_logits,
    embedding,
    linear,
    linear_into,
    rescale,
    rms_norm,
    rope_write,
    sample_step,
    swiglu,
    take_rows,
    top_logprobs,
)
from stars.bindings.recording import Program, leave_out, record

__all__ = [
    "Program", "accept_uniform", "alone", "append_draft", "apply_penalties", "attention", "available", "blend_logits",
    "copy_rows", "edit_logits", "embedding", "format_of", "gumbel", "isa", "leave_out", "library_path", "linear",
    "linear_into", "num_threads", "pack", "pack_quant", "pack_rows", "philox", "quant_bytes", "record", "rescale",
    "rms_norm", "rope_write", "sample_step", "set_num_threads", "swiglu", "take_rows", "top_logprobs", "unpack",
    "unpack_quant", "usable_cpus",
]
