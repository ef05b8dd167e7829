"""The operations of libstars on CPU tensors.

Each checks its tensors (dtype, device, contiguity, shape) and raises a ValueError that names the one that is wrong; the
library itself sees only addresses. Where memory runs out they raise a MemoryError, and can be called again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from stars.bindings.layouts import HEADER, OPERATIONS
from stars.bindings.matrices import PackedWeight, stored_type
from stars.bindings.params import Fields, Struct, Value
from stars.bindings.recording import run

if TYPE_CHECKING:
    from stars.kernels.types import Activation, Batch, Draft, Edits, LaneState, LayerKV, Penalties, TrailingRows


class Operation:
    """An operation of stars.h, called with the fields of its parameters."""

    def __init__(self, name: str):
        self.name = name
        self._number = OPERATIONS[name]
        self._params = Struct(f"stars_{name}_params")

    def __call__(self, **fields: Value) -> None:
        run(self._number, self._params.fill(self.name, fields), fields)


_ACTIVATIONS = {"silu": HEADER.constants["STARS_SILU"], "gelu_tanh": HEADER.constants["STARS_GELU_TANH"]}
_linear = Operation("linear")
_embedding = Operation("embedding")
_rms_norm = Operation("rms_norm")
_swiglu = Operation("swiglu")
_rescale = Operation("rescale")
_take_rows = Operation("take_rows")
_rope_write = Operation("rope_write")
_attention = Operation("attention")
_sample_step = Operation("sample_step")
_copy_rows = Operation("copy_rows")
_append_draft = Operation("append_draft")
_apply_penalties = Operation("apply_penalties")
_blend_logits = Operation("blend_logits")
_edit_logits = Operation("edit_logits")


def linear(x: Tensor, weight: PackedWeight, out: Tensor) -> None:
    """out [rows, out_features] = x [rows, in_features] @ weight.T + bias; a row's bits do not depend on the others.

    Where the weight's arithmetic is "bfloat16" and `isa()` is "avx512_bf16", x is rounded to bfloat16 before; where it
    has a format of few bits, to 16 bits (see stars_dtype in stars.h).
    """
    linear_into(x, weight, out, 0, weight.out_features)


def linear_into(x: Tensor, weight: PackedWeight, out: Tensor, column: int, width: int) -> None:
    """As `linear`, into the columns from `column` on of out [rows, width]: products of several weights side by side."""
    rows, in_features, out_features = x.shape[0], weight.in_features, weight.out_features
    _linear(
        x=(x, (rows, in_features)), weight=_packed("linear", weight),
        bias=None if weight.bias is None else (weight.bias, (out_features,)), out=(out, (rows, width)),
        rows=rows, in_features=in_features, out_features=out_features, out_stride=width, out_column=column,
        dtype=_stored(weight),
    )


def embedding(token_ids: Tensor, weight: PackedWeight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]; a token id outside the vocabulary gives a row of NaN."""
    rows, hidden = token_ids.shape[0], weight.in_features
    _embedding(
        token_ids=(token_ids, (rows,)), weight=_packed("embedding", weight), out=(out, (rows, hidden)),
        rows=rows, hidden=hidden, vocab=weight.out_features, dtype=_stored(weight),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
    """residual += x; out = weight * y / sqrt(mean(y^2) + eps), y = residual or x. `out` may be `x`."""
    hidden = x.shape[-1]
    read, x_stride = _apart(x, x.shape)
    written, out_stride = _apart(out, x.shape)
    _rms_norm(
        x=read, weight=(weight, (hidden,)), residual=None if residual is None else (residual, x.shape), out=written,
        rows=x.numel() // max(hidden, 1), hidden=hidden, x_stride=x_stride, out_stride=out_stride, eps=eps,
    )


def swiglu(gate_up: Tensor, out: Tensor, activation: Activation = "silu") -> None:
    """out [rows, intermediate] = activation(gate) * up of gate_up [rows, 2 * intermediate]."""
    rows, intermediate = out.shape
    _swiglu(gate_up=(gate_up, (rows, 2 * intermediate)), out=(out, (rows, intermediate)), rows=rows,
            intermediate=intermediate, activation=_ACTIVATIONS[activation])


def rescale(x: Tensor, scale: float, softcap: float | None = None) -> None:
    """x [rows, width] = scale * x, then softcap * tanh(x / softcap) where one is given."""
    rows, width = x.shape
    _rescale(x=(x, (rows, width)), rows=rows, width=width, scale=scale, softcap=softcap or 0.0)


def take_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[i] = x[index[i]], rows of x [n, width]; the index is not checked."""
    rows, width = index.shape[0], x.shape[1]
    _take_rows(x=(x, (x.shape[0], width)), index=(index, (rows,)), out=(out, (rows, width)), rows=rows, width=width)


def rope_write(
    qkv: Tensor, batch: Batch, cos: Tensor, sin: Tensor, kv: LayerKV, q_out: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
) -> None:
    """Normalises and rotates queries and keys, writes keys and values at batch.slots."""
    rows, heads, head_dim = q_out.shape
    angles = (cos.shape[0], head_dim // 2)
    _rope_write(
        qkv=(qkv, (rows, (heads + 2 * kv.k_pages.shape[1]) * head_dim)), cos=(cos, angles), sin=(sin, angles),
        q_norm=None if q_norm is None else (q_norm, (head_dim,)),
        k_norm=None if k_norm is None else (k_norm, (head_dim,)), q_out=(q_out, q_out.shape),
        batch=_batch(batch, rows), kv=_layer_kv(kv, head_dim), heads=heads, eps=eps,
    )


def attention(
    q: Tensor, kv: LayerKV, batch: Batch, scale: float, out: Tensor,
    window: int | None = None, softcap: float | None = None,
) -> None:
    """Causal grouped-query attention over pages and slab; q, out [rows, heads, head_dim]."""
    rows, heads, head_dim = q.shape
    _attention(
        q=(q, q.shape), out=(out, q.shape), batch=_batch(batch, rows), kv=_layer_kv(kv, head_dim), heads=heads,
        window=window or 0, scale=scale, softcap=softcap or 0.0,
    )


def sample_step(logits: Tensor, lanes: LaneState, filters: bool = True, ended: Tensor | None = None,
                cuts: bool = True) -> None:
    """Advances `lanes` in place by one draw from logits float32 [lanes, vocab], by the filters of each of them.

    With cuts=False a lane that has an entropy_cut all the same draws as if it had none.
    """
    if ended is not None:
        raise ValueError("sample_step: `ended` is for a GPU: on the CPU read lanes.done")
    count, max_steps = lanes.out_tokens.shape
    vocab, max_stop_ids = logits.shape[-1], lanes.stop_ids.shape[1]
    each = (count,)
    _sample_step(
        logits=(logits, (count, vocab)), token_ids=(lanes.token_ids, each), positions=(lanes.positions, each),
        slots=(lanes.slots, each), slab_used=(lanes.slab_used, each), steps=(lanes.steps, each),
        max_tokens=(lanes.max_tokens, each), done=(lanes.done, each), out_tokens=(lanes.out_tokens, (count, max_steps)),
        out_logprobs=(lanes.out_logprobs, (count, max_steps)), seeds=(lanes.seeds, each),
        attempts=(lanes.attempts, each), streams=(lanes.streams, each), temperature=(lanes.temperature, each),
        top_k=(lanes.top_k, each), top_p=(lanes.top_p, each), min_p=(lanes.min_p, each),
        stop_ids=(lanes.stop_ids, (count, max_stop_ids)),
        lanes=count, vocab=vocab, max_steps=max_steps, max_stop_ids=max_stop_ids,
        entropy_cut=(lanes.entropy_cut, each) if cuts else None,
        least_tokens=(lanes.least_tokens, each) if cuts else None,
    )


def copy_rows(
    k_source: Tensor, v_source: Tensor, source: Tensor, k_target: Tensor, v_target: Tensor, target: Tensor,
) -> None:
    """Rows source[i] of the sources [layers, rows, kv_heads, head_dim] to rows target[i] of the targets."""
    layers, source_rows, kv_heads, head_dim = k_source.shape
    rows, target_rows = source.shape[0], k_target.shape[1]
    from_shape, to_shape = (layers, source_rows, kv_heads, head_dim), (layers, target_rows, kv_heads, head_dim)
    _copy_rows(
        k_source=(k_source, from_shape), v_source=(v_source, from_shape), k_target=(k_target, to_shape),
        v_target=(v_target, to_shape), source=(source, (rows,)), target=(target, (rows,)),
        rows=rows, width=kv_heads * head_dim, layers=layers, source_rows=source_rows, target_rows=target_rows,
    )


def append_draft(draft: Draft, trailing: TrailingRows, vocab_size: int) -> None:
    """Writes segments and closing tokens after the row `row_start` of every sequence that has a lane.

    They must fit the rows of their sequences, and the lanes the draft: neither is checked.
    """
    (lanes, max_steps), max_stop_ids = draft.out_tokens.shape, draft.stop_ids.shape[1]
    sequences, max_closing = trailing.closing.shape
    each = (sequences,)
    _append_draft(
        out_tokens=(draft.out_tokens, (lanes, max_steps)), steps=(draft.steps, (lanes,)),
        stop_ids=(draft.stop_ids, (lanes, max_stop_ids)), lanes=(trailing.lanes, each),
        row_start=(trailing.row_start, (sequences + 1,)), closing=(trailing.closing, (sequences, max_closing)),
        token_ids=(trailing.token_ids, (trailing.token_ids.numel(),)), last=(trailing.last, each),
        sequences=sequences, max_steps=max_steps, max_stop_ids=max_stop_ids, max_closing=max_closing, vocab=vocab_size,
    )


def apply_penalties(logits: Tensor, lanes: LaneState, penalties: Penalties) -> None:
    """Penalises logits float32 [lanes, vocab] in place; entries outside the vocabulary are passed over."""
    (count, max_steps), (entries, _) = lanes.out_tokens.shape, penalties.history.shape
    vocab, each = logits.shape[-1], (count,)
    _apply_penalties(
        logits=(logits, (count, vocab)), done=(lanes.done, each), steps=(lanes.steps, each),
        out_tokens=(lanes.out_tokens, (count, max_steps)), history=(penalties.history, (entries, 2)),
        start=(penalties.start, each), count=(penalties.count, each), repetition=(penalties.repetition, each),
        frequency=(penalties.frequency, each), presence=(penalties.presence, each),
        lanes=count, vocab=vocab, max_steps=max_steps, entries=entries,
    )


def blend_logits(logits: Tensor, weights: Tensor, done: Tensor, out: Tensor) -> None:
    """out [lanes, vocab] = the sum over models of weights [models, room] times logits [models, room, vocab]; lanes that
    are done are left as they are."""
    (models, room, vocab), lanes = logits.shape, out.shape[0]
    _blend_logits(logits=(logits, (models, room, vocab)), weights=(weights, (models, room)), done=(done, (lanes,)),
                  out=(out, (lanes, vocab)), models=models, room=room, lanes=lanes, vocab=vocab)


def edit_logits(logits: Tensor, lanes: LaneState, edits: Edits) -> None:
    """Edits logits float32 [lanes, vocab] in place; tokens outside the vocabulary are passed over."""
    (count, max_steps), entries = lanes.out_tokens.shape, edits.entries.shape[0]
    words, length = edits.words.shape
    vocab, mask_rows, each = logits.shape[-1], edits.masks.shape[0], (count,)
    _edit_logits(
        logits=(logits, (count, vocab)), done=(lanes.done, each), steps=(lanes.steps, each),
        out_tokens=(lanes.out_tokens, (count, max_steps)), entries=(edits.entries, (entries, 3)),
        start=(edits.start, each), count=(edits.count, each), base=(edits.base, each),
        words=(edits.words, (words, length)), first_word=(edits.first_word, each),
        word_count=(edits.word_count, each), tail=(edits.tail, (count, length - 1)),
        masks=(edits.masks, (mask_rows, (vocab + 31) // 32)), mask_row=(edits.mask_row, each),
        lanes=count, vocab=vocab, max_steps=max_steps, entry_count=entries, word_rows=words, word_length=length,
        mask_rows=mask_rows,
    )


def _apart(x: Tensor, shape: tuple[int, ...]) -> tuple[Value, int]:
    """Rows as a field takes them, and the floats from one to the next: those of a wider matrix [rows, width] are given
    as the memory from the first to the last."""
    if x.dim() != 2 or x.is_contiguous() or x.shape != shape or x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        return (x, shape), shape[-1]
    length = (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    return (x.as_strided((length,), (1,)), (length,)), x.stride(0)


def _packed(op: str, weight: PackedWeight) -> Tensor:
    if not weight.packed:
        raise ValueError(f"{op}: weight is not packed; make it with stars.kernels.pack")
    return weight.values


def _stored(weight: PackedWeight) -> int:
    return stored_type(weight.dtype, weight.arithmetic, weight.format)


def _batch(batch: Batch, rows: int) -> Fields:
    sequences, (groups, pages) = batch.seq_group.shape[0], batch.block_tables.shape
    each = (sequences,)
    return {
        "positions": (batch.positions, (rows,)), "slots": (batch.slots, (rows,)),
        "row_start": (batch.row_start, (sequences + 1,)), "seq_group": (batch.seq_group, each),
        "block_tables": (batch.block_tables, (groups, pages)), "prefix_len": (batch.prefix_len, each),
        "slab_start": (batch.slab_start, each), "slab_used": (batch.slab_used, each),
        "rows": rows, "sequences": sequences, "block_table_stride": pages, "into_slab": batch.into_slab,
    }


def _layer_kv(kv: LayerKV, head_dim: int) -> Fields:
    kv_heads = kv.k_pages.shape[1]

    def rows_of(tensor: Tensor) -> Value:
        return tensor, (tensor.shape[0], kv_heads, head_dim)

    return {
        "k_pages": rows_of(kv.k_pages), "v_pages": rows_of(kv.v_pages), "k_slabs": rows_of(kv.k_slabs),
        "v_slabs": rows_of(kv.v_slabs), "page_size": kv.page_size, "kv_heads": kv_heads, "head_dim": head_dim,
    }
