"""ctypes over libstars (stars.h): the operations on CPU tensors, and their recording into programs.

Every operation checks its tensors (dtype, device, contiguity, shape) and raises a ValueError that names the one that
is wrong; the library itself sees only addresses. Where memory runs out they raise a MemoryError, and can be called
again. Without the library, `available` is False and nothing else may be called.

Any thread may call; a recording belongs to its thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Literal
from weakref import ref

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stars.kernels.linear import Weight
    from stars.kernels.types import Batch, Draft, LaneState, LayerKV, Penalties, TrailingRows

ABI_VERSION = 4

(_LINEAR, _EMBEDDING, _RMS_NORM, _SWIGLU, _TAKE_ROWS, _ROPE_WRITE, _ATTENTION, _SAMPLE_STEP, _COPY_ROWS, _DECIDE,
 _APPEND_DRAFT, _APPLY_PENALTIES) = range(12)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_BF16_DOT = 2  # of arithmetic "bfloat16"
_OUT_OF_MEMORY = 2


def _structure(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Linear = _structure("stars_linear_params", x=c_void_p, weight=c_void_p, bias=c_void_p, out=c_void_p, rows=c_int64,
                     in_features=c_int64, out_features=c_int64, dtype=c_int32)
_Embedding = _structure("stars_embedding_params", token_ids=c_void_p, weight=c_void_p, out=c_void_p, rows=c_int64,
                        hidden=c_int64, vocab=c_int64, dtype=c_int32)
_RmsNorm = _structure("stars_rms_norm_params", x=c_void_p, weight=c_void_p, residual=c_void_p, out=c_void_p,
                      rows=c_int64, hidden=c_int64, eps=c_float)
_Swiglu = _structure("stars_swiglu_params", gate_up=c_void_p, out=c_void_p, rows=c_int64, intermediate=c_int64)
_TakeRows = _structure("stars_take_rows_params", x=c_void_p, index=c_void_p, out=c_void_p, rows=c_int64, width=c_int64)
_LayerKV = _structure("stars_layer_kv", k_pages=c_void_p, v_pages=c_void_p, k_slabs=c_void_p, v_slabs=c_void_p,
                      page_size=c_int64, kv_heads=c_int64, head_dim=c_int64)
_Batch = _structure("stars_batch", positions=c_void_p, slots=c_void_p, row_start=c_void_p, seq_group=c_void_p,
                    block_tables=c_void_p, prefix_len=c_void_p, slab_start=c_void_p, slab_used=c_void_p, rows=c_int64,
                    sequences=c_int64, block_table_stride=c_int64, into_slab=c_int32)
_RopeWrite = _structure("stars_rope_write_params", qkv=c_void_p, cos=c_void_p, sin=c_void_p, q_norm=c_void_p,
                        k_norm=c_void_p, q_out=c_void_p, batch=_Batch, kv=_LayerKV, heads=c_int64, eps=c_float)
_Attention = _structure("stars_attention_params", q=c_void_p, out=c_void_p, batch=_Batch, kv=_LayerKV, heads=c_int64,
                        window=c_int64, scale=c_float, softcap=c_float)
_SampleStep = _structure("stars_sample_step_params", **dict.fromkeys(
    ("logits", "token_ids", "positions", "slots", "slab_used", "steps", "limits", "done", "out_tokens", "out_logprobs",
     "seeds", "attempts", "streams", "temperature", "top_k", "top_p", "min_p", "stop_ids"), c_void_p),
    lanes=c_int64, vocab=c_int64, max_steps=c_int64, max_stop_ids=c_int64)
_CopyRows = _structure("stars_copy_rows_params", **dict.fromkeys(
    ("k_source", "v_source", "k_target", "v_target", "source", "target"), c_void_p),
    rows=c_int64, width=c_int64, layers=c_int64, source_rows=c_int64, target_rows=c_int64)
_Decide = _structure("stars_decide_params", **dict.fromkeys(
    ("seeds", "streams", "attempts", "tokens", "max_tokens", "start", "reward_threshold", "beta", "rewards",
     "accepted"), c_void_p), lanes=c_int64)
_AppendDraft = _structure("stars_append_draft_params", **dict.fromkeys(
    ("out_tokens", "steps", "stop_ids", "lanes", "row_start", "closing", "token_ids", "last", "tokens"), c_void_p),
    sequences=c_int64, max_steps=c_int64, max_stop_ids=c_int64, max_closing=c_int64, vocab=c_int64)
_ApplyPenalties = _structure("stars_apply_penalties_params", **dict.fromkeys(
    ("logits", "done", "steps", "out_tokens", "history", "start", "count", "repetition", "frequency", "presence"),
    c_void_p), lanes=c_int64, vocab=c_int64, max_steps=c_int64, entries=c_int64)


def library_path() -> Path:
    """The file that is loaded: the one that was built with the package, or STARS_LIBRARY of the environment."""
    return Path(os.environ.get("STARS_LIBRARY") or Path(__file__).with_name("lib") / "libstars.so")


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(library_path()))
        if library.stars_abi_version() != ABI_VERSION:
            raise OSError("it speaks another version of the interface")
        for name, result, *arguments in (
            ("stars_last_error", ctypes.c_char_p),
            ("stars_isa", ctypes.c_char_p),
            ("stars_num_threads", c_int32),
            ("stars_set_num_threads", c_int32, c_int32),
            ("stars_usable_cpus", c_int32, ctypes.c_char_p),
            ("stars_cpu_quota", c_double, ctypes.c_char_p),
            ("stars_packed_bytes", c_int64, c_int64, c_int64, c_int32),
            ("stars_pack", c_int32, c_void_p, c_int64, c_int64, c_int32, c_void_p),
            ("stars_unpack", c_int32, c_void_p, c_int64, c_int64, c_int32, c_void_p),
            ("stars_philox", c_int32, c_uint64, c_uint32, c_uint32, c_uint32, c_uint32, POINTER(c_uint32)),
            ("stars_accept_uniform", c_double, c_uint64, c_uint32, c_uint32, c_uint32),
            ("stars_gumbel", c_int32, c_uint64, c_uint32, c_uint32, c_uint32, c_int64, c_void_p),
            ("stars_call", c_int32, c_int32, c_void_p),
            ("stars_program_create", c_void_p),
            ("stars_program_add", c_int32, c_void_p, c_int32, c_void_p),
            ("stars_program_run", c_int32, c_void_p, c_int32, c_void_p, c_int64),
            ("stars_program_destroy", None, c_void_p),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        return library
    except (OSError, AttributeError) as error:  # not built, not loadable here, or another library of that name
        if os.environ.get("STARS_LIBRARY"):
            raise ImportError(f"STARS_LIBRARY names {library_path()}, which cannot be used: {error}") from error
        return None


_lib = _load()
_recordings: dict[int, ref[Program]] = {}
"""By the thread that records; empty nearly always, so that an operation asks no more than that. Weak: a recording that
an interrupt left here ends with its program."""


def available() -> bool:
    """Whether libstars was built, can be loaded and speaks this version of the interface."""
    return _lib is not None


def isa() -> str:
    """The instruction set in use: "base", "avx2", "avx512" or "avx512_bf16"."""
    return _lib.stars_isa().decode()


def num_threads() -> int:
    """Threads that an operation is spread over, the caller's included."""
    return _lib.stars_num_threads()


def set_num_threads(count: int) -> None:
    """Sets `num_threads` from the next operation on, to at most `usable_cpus`; 0 restores the default.

    Safe while other threads run operations.
    """
    if not 0 <= count < 2**31:
        raise ValueError(f"set_num_threads: count is {count}, expected 0 (the default) or a number of threads")
    _check_status(_lib.stars_set_num_threads(count))


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity mask's, or its cgroups' quota, rounded up, where that is less."""
    return _lib.stars_usable_cpus(None)


class Program:
    """A list of operations over tensors at fixed addresses, replayed as one call; made by `record`."""

    def __init__(self):
        self._handle = _lib.stars_program_create()
        if not self._handle:
            raise MemoryError(_last_error())
        self._kept = []  # every tensor of a recorded operation: their memory must outlive the program

    def __len__(self) -> int:
        """Operations recorded."""
        return len(self._kept)

    def run(self, times: int, done: Tensor) -> int:
        """Runs the operations up to `times` times, until all of `done` int32 are non-zero; returns how often."""
        pointer = _pointer("run", "done", done, torch.int32, done.shape)
        ran = _lib.stars_program_run(self._handle, times, pointer, done.numel())
        if ran < 0:
            _check_status(-ran)
        return ran

    def _add(self, op: int, params: ctypes.Structure, kept: tuple) -> None:
        _check_status(_lib.stars_program_add(self._handle, op, ctypes.byref(params)))
        self._kept.append(kept)

    def __del__(self):
        if getattr(self, "_handle", None):
            _lib.stars_program_destroy(self._handle)


@contextmanager
def record() -> Iterator[Program]:
    """Inside, every operation of this thread is executed and also appended to the program that this yields."""
    thread = get_ident()
    if _recorded_program() is not None:
        raise RuntimeError("a program is being recorded already; recordings do not nest")
    program = Program()
    own = ref(program)
    try:
        _recordings[thread] = own
        yield program
    finally:
        if _recordings.get(thread) is own:
            del _recordings[thread]


def pack(matrix: Tensor, arithmetic: Literal["float32", "bfloat16"] = "float32") -> Tensor:
    """The packed form, a uint8 vector, of a float32 or bfloat16 `matrix` [out_features, in_features].

    With `arithmetic` "bfloat16", for bfloat16 matrices only, in the order in which pairs of its values are multiplied.
    """
    if matrix.dim() != 2 or matrix.dtype not in _DTYPES or (
        arithmetic == "bfloat16" and matrix.dtype != torch.bfloat16
    ):
        expected = "bfloat16" if arithmetic == "bfloat16" else "float32 or bfloat16"
        raise ValueError(f"pack: matrix is {_describe(matrix)}, expected a {expected} matrix")
    pointer = _pointer("pack", "matrix", matrix, matrix.dtype, matrix.shape)
    shape = (*matrix.shape, _kind(matrix.dtype, arithmetic))
    packed = torch.empty(_packed_bytes(*shape), dtype=torch.uint8)  # torch aligns to 64 bytes
    _check_status(_lib.stars_pack(pointer, *shape, packed.data_ptr()))
    return packed


def unpack(
    packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype,
    arithmetic: Literal["float32", "bfloat16"] = "float32",
) -> Tensor:
    """The matrix [out_features, in_features] that `pack` was given."""
    if dtype not in _DTYPES:
        raise ValueError(f"unpack: dtype is {dtype}, expected float32 or bfloat16")
    shape = (out_features, in_features, _kind(dtype, arithmetic))
    pointer = _pointer("unpack", "packed", packed, torch.uint8, (_packed_bytes(*shape),))
    matrix = torch.empty(out_features, in_features, dtype=dtype)
    _check_status(_lib.stars_unpack(pointer, *shape, matrix.data_ptr()))
    return matrix


def linear(x: Tensor, weight: Weight, out: Tensor) -> None:
    """out [rows, out_features] = x [rows, in_features] @ weight.T + bias; a row's bits do not depend on the others.

    Where the weight's arithmetic is "bfloat16" and `isa()` is "avx512_bf16", x is rounded to bfloat16 before.
    """
    rows = x.shape[0]
    params = _Linear(
        _pointer("linear", "x", x, torch.float32, (rows, weight.in_features)), _weight_pointer("linear", weight),
        _optional_pointer("linear", "bias", weight.bias, torch.float32, (weight.out_features,)),
        _pointer("linear", "out", out, torch.float32, (rows, weight.out_features)),
        rows, weight.in_features, weight.out_features, _kind(weight.dtype, weight.arithmetic),
    )
    _call(_LINEAR, params, x, weight, out)


def embedding(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]; a token id outside the vocabulary gives a row of NaN."""
    rows = token_ids.shape[0]
    params = _Embedding(
        _pointer("embedding", "token_ids", token_ids, torch.int32, (rows,)), _weight_pointer("embedding", weight),
        _pointer("embedding", "out", out, torch.float32, (rows, weight.in_features)),
        rows, weight.in_features, weight.out_features, _kind(weight.dtype, weight.arithmetic),
    )
    _call(_EMBEDDING, params, token_ids, weight, out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
    """residual += x; out = weight * y / sqrt(mean(y^2) + eps), y = residual or x. `out` may be `x`."""
    hidden = x.shape[-1]
    params = _RmsNorm(
        _pointer("rms_norm", "x", x, torch.float32, x.shape),
        _pointer("rms_norm", "weight", weight, torch.float32, (hidden,)),
        _optional_pointer("rms_norm", "residual", residual, torch.float32, x.shape),
        _pointer("rms_norm", "out", out, torch.float32, x.shape),
        x.numel() // max(hidden, 1), hidden, eps,
    )
    _call(_RMS_NORM, params, x, weight, out, residual)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out [rows, intermediate] = silu(gate) * up of gate_up [rows, 2 * intermediate]."""
    rows, intermediate = out.shape
    params = _Swiglu(
        _pointer("swiglu", "gate_up", gate_up, torch.float32, (rows, 2 * intermediate)),
        _pointer("swiglu", "out", out, torch.float32, (rows, intermediate)), rows, intermediate,
    )
    _call(_SWIGLU, params, gate_up, out)


def take_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[i] = x[index[i]], rows of x [n, width]; the index is not checked."""
    rows, width = index.shape[0], x.shape[1]
    params = _TakeRows(
        _pointer("take_rows", "x", x, torch.float32, (x.shape[0], width)),
        _pointer("take_rows", "index", index, torch.int32, (rows,)),
        _pointer("take_rows", "out", out, torch.float32, (rows, width)), rows, width,
    )
    _call(_TAKE_ROWS, params, x, index, out)


def rope_write(
    qkv: Tensor, batch: Batch, cos: Tensor, sin: Tensor, kv: LayerKV, q_out: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
) -> None:
    """Normalises and rotates queries and keys, writes keys and values at batch.slots."""
    rows, heads, head_dim = q_out.shape
    kv_heads = kv.k_pages.shape[1]
    params = _RopeWrite(
        _pointer("rope_write", "qkv", qkv, torch.float32, (rows, (heads + 2 * kv_heads) * head_dim)),
        _pointer("rope_write", "cos", cos, torch.float32, (cos.shape[0], head_dim // 2)),
        _pointer("rope_write", "sin", sin, torch.float32, (cos.shape[0], head_dim // 2)),
        _optional_pointer("rope_write", "q_norm", q_norm, torch.float32, (head_dim,)),
        _optional_pointer("rope_write", "k_norm", k_norm, torch.float32, (head_dim,)),
        _pointer("rope_write", "q_out", q_out, torch.float32, q_out.shape),
        _batch("rope_write", batch, rows), _layer_kv("rope_write", kv, head_dim), heads, eps,
    )
    _call(_ROPE_WRITE, params, qkv, batch, cos, sin, kv, q_out, q_norm, k_norm)


def attention(
    q: Tensor, kv: LayerKV, batch: Batch, scale: float, out: Tensor,
    window: int | None = None, softcap: float | None = None,
) -> None:
    """Causal grouped-query attention over pages and slab; q, out [rows, heads, head_dim]."""
    rows, heads, head_dim = q.shape
    params = _Attention(
        _pointer("attention", "q", q, torch.float32, q.shape),
        _pointer("attention", "out", out, torch.float32, q.shape),
        _batch("attention", batch, rows), _layer_kv("attention", kv, head_dim), heads, window or 0, scale,
        softcap or 0.0,
    )
    _call(_ATTENTION, params, q, kv, batch, out)


def sample_step(logits: Tensor, lanes: LaneState) -> None:
    """Advances `lanes` in place by one draw from logits float32 [lanes, vocab]."""
    count, max_steps = lanes.out_tokens.shape
    max_stop_ids = lanes.stop_ids.shape[1]

    def vector(name: str, dtype: torch.dtype = torch.int32) -> int:
        return _pointer("sample_step", name, getattr(lanes, name), dtype, (count,))

    params = _SampleStep(
        _pointer("sample_step", "logits", logits, torch.float32, (count, logits.shape[-1])),
        vector("token_ids"), vector("positions"), vector("slots"), vector("slab_used"), vector("steps"),
        vector("limits"), vector("done"),
        _pointer("sample_step", "out_tokens", lanes.out_tokens, torch.int32, (count, max_steps)),
        _pointer("sample_step", "out_logprobs", lanes.out_logprobs, torch.float32, (count, max_steps)),
        vector("seeds", torch.int64), vector("attempts"), vector("streams"), vector("temperature", torch.float32),
        vector("top_k"), vector("top_p", torch.float32), vector("min_p", torch.float32),
        _pointer("sample_step", "stop_ids", lanes.stop_ids, torch.int32, (count, max_stop_ids)),
        count, logits.shape[-1], max_steps, max_stop_ids,
    )
    _call(_SAMPLE_STEP, params, logits, lanes)


def append_draft(draft: Draft, trailing: TrailingRows, vocab_size: int) -> None:
    """Writes segments and closing tokens after the first row of every sequence that has a lane.

    They must fit the rows of their sequences, and the lanes the draft: neither is checked.
    """
    (lanes, max_steps), max_stop_ids = draft.out_tokens.shape, draft.stop_ids.shape[1]
    sequences, max_closing = trailing.closing.shape
    tokens = torch.zeros(sequences, dtype=torch.int32)  # counts that nobody reads

    def tensor(of: Draft | TrailingRows, name: str, *shape: int) -> int:
        return _pointer("append_draft", name, getattr(of, name), torch.int32, shape)

    params = _AppendDraft(
        tensor(draft, "out_tokens", lanes, max_steps), tensor(draft, "steps", lanes),
        tensor(draft, "stop_ids", lanes, max_stop_ids),
        tensor(trailing, "lanes", sequences), tensor(trailing, "row_start", sequences + 1),
        tensor(trailing, "closing", sequences, max_closing),
        tensor(trailing, "token_ids", trailing.token_ids.numel()), tensor(trailing, "last", sequences),
        tokens.data_ptr(),
        sequences, max_steps, max_stop_ids, max_closing, vocab_size,
    )
    _call(_APPEND_DRAFT, params, draft, trailing, tokens)


def apply_penalties(logits: Tensor, lanes: LaneState, penalties: Penalties) -> None:
    """Penalises logits float32 [lanes, vocab] in place; entries outside the vocabulary are passed over."""
    (count, max_steps), (entries, _) = lanes.out_tokens.shape, penalties.history.shape

    def vector(name: str, tensor: Tensor, dtype: torch.dtype = torch.int32) -> int:
        return _pointer("apply_penalties", name, tensor, dtype, (count,))

    params = _ApplyPenalties(
        _pointer("apply_penalties", "logits", logits, torch.float32, (count, logits.shape[-1])),
        vector("done", lanes.done), vector("steps", lanes.steps),
        _pointer("apply_penalties", "out_tokens", lanes.out_tokens, torch.int32, (count, max_steps)),
        _pointer("apply_penalties", "history", penalties.history, torch.int32, (entries, 2)),
        vector("start", penalties.start), vector("count", penalties.count),
        *(vector(name, getattr(penalties, name), torch.float32) for name in ("repetition", "frequency", "presence")),
        count, logits.shape[-1], max_steps, entries,
    )
    _call(_APPLY_PENALTIES, params, logits, lanes, penalties)


def philox(seed: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]:
    """The four words of one block of the generator of `stars.kernels.philox`."""
    words = (c_uint32 * 4)()
    _check_status(_lib.stars_philox(seed & 0xFFFFFFFFFFFFFFFF, c0, c1, c2, c3, words))
    return tuple(words)


def accept_uniform(seed: int, attempt: int, segment: int, sample: int) -> float:
    """The uniform of the accept test of one attempt."""
    return _lib.stars_accept_uniform(seed & 0xFFFFFFFFFFFFFFFF, attempt, segment, sample)


def gumbel(seed: int, position: int, attempt: int, stream: int, vocab_size: int) -> Tensor:
    """float32 [vocab_size] token noise of one draw, as sample_step uses it."""
    noise = torch.empty(vocab_size)
    _check_status(_lib.stars_gumbel(seed & 0xFFFFFFFFFFFFFFFF, position, attempt, stream & 0xFFFFFFFF, vocab_size,
                                    noise.data_ptr()))
    return noise


def copy_rows(
    k_source: Tensor, v_source: Tensor, source: Tensor, k_target: Tensor, v_target: Tensor, target: Tensor,
) -> None:
    """Rows source[i] of the sources [layers, rows, kv_heads, head_dim] to rows target[i] of the targets."""
    layers, source_rows = k_source.shape[:2]
    rows, target_rows = source.shape[0], k_target.shape[1]
    width = k_source.shape[2] * k_source.shape[3]
    params = _CopyRows(
        *(_pointer("copy_rows", name, tensor, torch.float32, (layers, count, *k_source.shape[2:]))
          for name, tensor, count in (("k_source", k_source, source_rows), ("v_source", v_source, source_rows),
                                      ("k_target", k_target, target_rows), ("v_target", v_target, target_rows))),
        _pointer("copy_rows", "source", source, torch.int32, (rows,)),
        _pointer("copy_rows", "target", target, torch.int32, (rows,)),
        rows, width, layers, source_rows, target_rows,
    )
    _call(_COPY_ROWS, params, k_source, v_source, source, k_target, v_target, target)


def _call(op: int, params: ctypes.Structure, *kept: object) -> None:
    _check_status(_lib.stars_call(op, ctypes.byref(params)))
    if _recordings:
        program = _recorded_program()
        if program is not None:
            program._add(op, params, kept)


def _recorded_program() -> Program | None:
    """The one that this thread records."""
    recording = _recordings.get(get_ident())
    return None if recording is None else recording()


def _check_status(status: int) -> None:
    if status != 0:
        raise (MemoryError if status == _OUT_OF_MEMORY else ValueError)(_last_error())


def _last_error() -> str:
    return _lib.stars_last_error().decode()


def _packed_bytes(out_features: int, in_features: int, kind: int) -> int:
    if max(out_features, in_features) >= 2**63:  # ctypes would cut it off
        raise ValueError(f"stars_packed_bytes: a matrix of [{out_features}, {in_features}] is too large")
    count = _lib.stars_packed_bytes(out_features, in_features, kind)
    if count == 0:
        raise ValueError(_last_error())
    return count


def _kind(dtype: torch.dtype, arithmetic: str) -> int:
    """The stars_dtype of a packed matrix."""
    return _BF16_DOT if arithmetic == "bfloat16" else _DTYPES[dtype]


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else " not contiguous"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}{layout}"


def _pointer(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{op}: {name} is {_describe(tensor)}, expected contiguous "
                         f"{str(dtype).removeprefix('torch.')} {list(shape)} on cpu")
    return tensor.data_ptr()


def _optional_pointer(
    op: str, name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> int | None:
    return None if tensor is None else _pointer(op, name, tensor, dtype, shape)


def _weight_pointer(op: str, weight: Weight) -> int:
    if not weight.packed:
        raise ValueError(f"{op}: weight is not packed; make it with stars.kernels.pack")
    return weight.values.data_ptr()


def _batch(op: str, batch: Batch, rows: int) -> ctypes.Structure:
    sequences, (groups, pages) = batch.seq_group.shape[0], batch.block_tables.shape

    def vector(name: str, tensor: Tensor, count: int) -> int:
        return _pointer(op, name, tensor, torch.int32, (count,))

    return _Batch(
        vector("positions", batch.positions, rows), vector("slots", batch.slots, rows),
        vector("row_start", batch.row_start, sequences + 1), vector("seq_group", batch.seq_group, sequences),
        _pointer(op, "block_tables", batch.block_tables, torch.int32, (groups, pages)),
        vector("prefix_len", batch.prefix_len, sequences), vector("slab_start", batch.slab_start, sequences),
        vector("slab_used", batch.slab_used, sequences), rows, sequences, pages, batch.into_slab,
    )


def _layer_kv(op: str, kv: LayerKV, head_dim: int) -> ctypes.Structure:
    kv_heads = kv.k_pages.shape[1]
    pointers = (
        _pointer(op, name, tensor, torch.float32, (tensor.shape[0], kv_heads, head_dim))
        for name, tensor in (("k_pages", kv.k_pages), ("v_pages", kv.v_pages), ("k_slabs", kv.k_slabs),
                             ("v_slabs", kv.v_slabs))
    )
    return _LayerKV(*pointers, kv.page_size, kv_heads, head_dim)
