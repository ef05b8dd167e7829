"""The hand-offs between the engine and the kernels: plain tensors with stated shapes, no behaviour."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]
"""Of the MLP's gate."""


class LayerKV(NamedTuple):
    """One layer's keys and values: committed history in pages, drafted segments in slabs (views, never copies)."""

    k_pages: Tensor  # [num_pages * page_size, kv_heads, head_dim]
    v_pages: Tensor  # [num_pages * page_size, kv_heads, head_dim]
    k_slabs: Tensor  # [num_slabs * slab_len, kv_heads, head_dim]
    v_slabs: Tensor  # [num_slabs * slab_len, kv_heads, head_dim]
    page_size: int


class Tiles(NamedTuple):
    """How attention on a GPU divides a batch among programs; built by `stars.kernels.triton.tiles`, which says more.

    The tensors are read on the device, the numbers fix the shape of the launch. Rows that are in no item are not
    computed.
    """

    row_seq: Tensor  # int32 [rows] sequence of each row
    row_parts: Tensor  # int32 [rows, 3] place of the first part of each row, rows between its parts, parts
    items: Tensor  # int32 [1 + items + `spare_items`, FIELDS] the number of items, and the list of work
    width: int  # query rows times query heads per key head of a full tile
    lanes: int  # of a draft, whose slabs are one item; 0: of no draft, where a sequence's slab is
    split_keys: int  # keys of one range, counted from position 0; 0 divides what a tile sees evenly
    programs: int  # that walk the list
    workspace: Tensor  # float32 [at least heads * (head_dim + 1) times the places of the list]
    tickets: Tensor  # int32 [at least rows * key heads] zero before and after every launch


class Prefill(NamedTuple):
    """What the host knows of a pass into pages, as libraries want it; built by `stars.kernels.prefill_attention`.

    Every sequence has rows.
    """

    backend: str  # a key of prefill_attention.BACKENDS
    key_rows: Tensor  # int32 [total_k] page row of every key that some row sees, sequence after sequence
    cu_seqlens_q: Tensor  # int32 [sequences + 1] first row of each sequence
    cu_seqlens_k: Tensor  # int32 [sequences + 1] first entry of key_rows of each sequence
    q_lengths: tuple[int, ...]  # [sequences] rows
    k_lengths: tuple[int, ...]  # [sequences] keys: those before the pass and those of its rows
    rows: int  # sum of q_lengths; idle rows after them are not computed
    max_q: int
    max_k: int


class Batch(NamedTuple):
    """What one forward pass runs over: `rows` tokens of `sequences` sequences. All tensors are int32.

    Rows of sequence s are row_start[s] .. row_start[s + 1] - 1. With `into_slab`, a row is written to the slab and sees
    the sequence's first prefix_len page keys and its slab keys up to itself. Without, it is written to the pages at
    position prefix_len + i and sees the page keys up to itself.
    """

    token_ids: Tensor  # [rows]
    positions: Tensor  # [rows]
    slots: Tensor  # [rows] flat row of the slabs (into_slab) or of the pages; -1 writes nothing
    into_slab: bool
    row_start: Tensor  # [sequences + 1]
    seq_group: Tensor  # [sequences] row of block_tables; sequences of one group are adjacent
    block_tables: Tensor  # [groups, max_pages] page ids
    prefix_len: Tensor  # [sequences] page keys every row of the sequence sees
    slab_start: Tensor  # [sequences] flat slab row of slab key 0; unused when not into_slab
    slab_used: Tensor  # [sequences] slab keys written before this pass; 0 when not into_slab
    tiles: Tiles | None = None  # read by attention on a GPU only, which builds them on the host where there are none
    prefill: Prefill | None = None  # not into_slab: a library's attention instead of our own


class LaneState(NamedTuple):
    """Everything `sample_step` reads and advances for the lanes of one draft, one entry a lane, changed in place.

    A lane that is done (EOS, max_tokens reached, or cut where the model was uncertain) is left as it is. After a draw
    that does not end the lane, token_ids, positions, slots and slab_used are what the next forward pass needs.
    """

    token_ids: Tensor  # int32 [lanes] next input token
    positions: Tensor  # int32 [lanes] its position
    slots: Tensor  # int32 [lanes] its flat slab row
    slab_used: Tensor  # int32 [lanes] slab keys written before the next pass
    steps: Tensor  # int32 [lanes] tokens drawn so far; the position in the segment of the next draw
    max_tokens: Tensor  # int32 [lanes] tokens after which the lane is done
    done: Tensor  # int32 [lanes] 0 or 1
    out_tokens: Tensor  # int32 [lanes, max_steps]
    out_logprobs: Tensor  # float32 [lanes, max_steps] log-probability under the logits given (temperature 1, no filter)
    seeds: Tensor  # int64 [lanes] the Philox key (bits of an unsigned 64-bit seed)
    attempts: Tensor  # int32 [lanes] attempt number, from 1: counter word 2, with the kind of draw
    streams: Tensor  # int32 [lanes] segment index and sample index: counter word 3
    temperature: Tensor  # float32 [lanes]; 0 takes the argmax of the raw logits
    top_k: Tensor  # int32 [lanes]; 0 is off
    top_p: Tensor  # float32 [lanes]; 1 is off
    min_p: Tensor  # float32 [lanes]; 0 is off
    stop_ids: Tensor  # int32 [lanes, max_stop_ids]; token ids that end the lane, padded with -1
    entropy_cut: Tensor  # float32 [lanes] nats at which the lane ends before it draws; inf is off
    least_tokens: Tensor  # int32 [lanes] tokens that are drawn before the lane may be cut


class Ranking(NamedTuple):
    """What `top_tokens` reads of every lane, and where it puts what it finds."""

    ranks: Tensor  # int32 [lanes] how many tokens are wanted; 0: none, and nobody reads the lane's columns
    temperature: Tensor  # float32 [lanes] of what the filters see; 0 switches them off
    top_k: Tensor  # int32 [lanes]; 0 is off
    top_p: Tensor  # float32 [lanes]; 1 is off
    min_p: Tensor  # float32 [lanes]; 0 is off
    token_ids: Tensor  # int32 [lanes, most ranks] out: the most probable first, -1 where no token is left
    logprobs: Tensor  # float32 [lanes, most ranks] out: at temperature 1, without filters


class Penalties(NamedTuple):
    """What `apply_penalties` takes of every lane; lanes of one response share its entries of the history."""

    history: Tensor  # int32 [entries, 2] token id, and how often the committed response has it; 0: only the prompt
    start: Tensor  # int32 [lanes] first entry of a lane
    count: Tensor  # type: ignore[assignment]  # int32 [lanes] its entries, of distinct tokens in rising order
    repetition: Tensor  # float32 [lanes] above 0; 1 is off
    frequency: Tensor  # float32 [lanes]; 0 is off
    presence: Tensor  # float32 [lanes]; 0 is off


class Edits(NamedTuple):
    """What `edit_logits` takes of every lane; lanes of one request share its entries and its words.

    A lane of which all is off has count and word_count 0 and mask_row -1.
    """

    entries: Tensor  # int32 [entries, 3] token id, tokens of the response before which it is banned, bits of a float32
    start: Tensor  # int32 [lanes] first entry of a lane
    count: Tensor  # type: ignore[assignment]  # int32 [lanes] its entries, of distinct tokens
    base: Tensor  # int32 [lanes] tokens of the committed response
    words: Tensor  # int32 [words, word length] token ids to the right, the last of which is banned; -1 is any token
    first_word: Tensor  # int32 [lanes] first word of a lane
    word_count: Tensor  # int32 [lanes] its words
    tail: Tensor  # int32 [lanes, word length - 1] last tokens of the committed response, to the right, -1 where none is
    masks: Tensor  # int32 [mask rows, ceil(vocab / 32)] bit t % 32 of word t // 32: whether token t is allowed
    mask_row: Tensor  # int32 [lanes] -1: all are


class Draft(NamedTuple):
    """What a finished draft leaves on the device for a pass that trails it; parts of `LaneState`."""

    out_tokens: Tensor  # int32 [lanes, max_steps]
    steps: Tensor  # int32 [lanes] tokens drawn
    stop_ids: Tensor  # int32 [lanes, max_stop_ids] padded with -1


class TrailingRows(NamedTuple):
    """The rows of a pass that trails a draft, whose sequences take their tokens from it; changed by `append_draft`.

    The rows after row_start[s] are for a sequence's segment and its closing tokens; what they do not need stays 0 and
    is run for nothing. Row row_start[s] itself holds the token before the segment, or belongs to another sequence; it
    is -1 where the segment begins in row 0.
    """

    lanes: Tensor  # int32 [sequences] lane of the draft, or -1: the sequence is left alone
    row_start: Tensor  # int32 [sequences + 1] the row before each segment
    closing: Tensor  # int32 [sequences, max_closing] ids after the segment, padded with -1
    token_ids: Tensor  # int32 [rows] out: segment and closing tokens
    last: Tensor  # int32 [sequences] out: row of the last token, at least 0


class Stream(NamedTuple):
    """The residual stream of a fused pass, and what the next norm needs of it, so that no norm is a launch.

    Whoever writes the residual writes all three; whoever reads `scaled` multiplies its product by 1 / rms, which
    `squares` gives: 1 / sqrt(sum(squares) / hidden + eps).
    """

    residual: Tensor  # [rows, hidden] of the decoder's dtype
    scaled: Tensor  # [rows, hidden] of the decoder's dtype: the residual as stored, times the next norm's weight
    squares: Tensor  # float32 [rows, hidden / 32] squares of the residual as stored, added up by blocks of 32 features


class SplitSpace(NamedTuple):
    """Room in which programs that share a tile meet; as large as `stars.kernels.triton.tuned.room` says.

    One for each decoder, as two may run at the same time; reserved outside of captures.
    """

    partial: Tensor  # float32 [floats] sums over parts of the inner dimension
    tickets: Tensor  # int32 [counters] programs that have arrived; zero between launches
