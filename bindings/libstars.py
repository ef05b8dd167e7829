"""libstars (stars.h) in Python: its operations on CPU tensors, and their recording into programs.

Any thread may call. Without the library, `available` is False and nothing else may be called.
"""

from stars.bindings.draws import accept_uniform, gumbel, philox
from stars.bindings.library import available, isa, library_path, num_threads, set_num_threads, usable_cpus
from stars.bindings.matrices import pack, unpack
from stars.bindings.operations import (
    append_draft,
    apply_penalties,
    attention,
    blend_logits,
    copy_rows,
    embedding,
    linear,
    rescale,
    rms_norm,
    rope_write,
    sample_step,
    swiglu,
    take_rows,
)
from stars.bindings.recording import Program, leave_out, record

__all__ = [
    "Program", "accept_uniform", "append_draft", "apply_penalties", "attention", "available", "blend_logits",
    "copy_rows", "embedding", "gumbel", "isa", "leave_out", "library_path", "linear", "num_threads", "pack", "philox",
    "record", "rescale", "rms_norm", "rope_write", "sample_step", "set_num_threads", "swiglu", "take_rows", "unpack",
    "usable_cpus",
]
