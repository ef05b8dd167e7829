"""Drafted segments as the input of a scoring pass, without a detour over the host: the pass can trail the draft.

A reward model that reads the language model's token ids scores, of every lane, the last committed token, the segment
without the stop token that ended it, and its closing tokens. How long the segment became is known on the device alone.
"""

from __future__ import annotations

from stars.bindings import libstars
from stars.kernels.dispatch import on_libstars, on_triton
from stars.kernels.types import Draft, TrailingRows


def append_draft(draft: Draft, trailing: TrailingRows, vocab_size: int) -> None:
    """Writes segments and closing tokens after the first row of every sequence that has a lane.

    Ids outside `vocab_size` become 0 (whoever reads the draft refuses the lane). Rows after the last are left alone.
    """
    if on_triton(trailing.token_ids):
        from stars.kernels.triton.append_draft import append_draft as launch

        launch(draft, trailing, vocab_size)
    elif on_libstars(trailing.token_ids):
        libstars.append_draft(draft, trailing, vocab_size)
    else:
        append_draft_reference(draft, trailing, vocab_size)


def append_draft_reference(draft: Draft, trailing: TrailingRows, vocab_size: int) -> None:
    """As `append_draft`, one sequence at a time."""
    starts = trailing.row_start.tolist()
    for sequence, lane in enumerate(trailing.lanes.tolist()):
        if lane < 0:
            continue
        steps = int(draft.steps[lane])
        ids = draft.out_tokens[lane, :steps].tolist()
        if ids and ids[-1] in draft.stop_ids[lane].tolist():  # logits that were NaN left -1, which is among them
            ids.pop()
        ids = [token if 0 <= token < vocab_size else 0 for token in ids]
        ids += [token for token in trailing.closing[sequence].tolist() if token >= 0]
        first = starts[sequence] + 1
        for row, token in enumerate(ids, first):
            trailing.token_ids[row] = token
        trailing.last[sequence] = first + len(ids) - 1
