"""Drafted segments as the input of a scoring pass, without a detour over the host: the pass can trail the draft.

A reward model that reads the language model's token ids scores, of every lane, the segment without the stop token that
ended it, and its closing tokens. How long the segment became is known on the device alone.
"""

from __future__ import annotations

from stars.kernels.dispatch import operation
from stars.kernels.types import Draft, TrailingRows


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
        trailing.last[sequence] = max(0, first + len(ids) - 1)


@operation(cpu="stars.bindings.libstars:append_draft", cuda="stars.kernels.triton.append_draft:append_draft",
           reference=append_draft_reference, by="draft.steps")
def append_draft(draft: Draft, trailing: TrailingRows, vocab_size: int) -> None:
    """Writes segments and closing tokens after the row `row_start` of every sequence that has a lane.

    Ids outside `vocab_size` become 0 (whoever reads the draft refuses the lane). Rows after the last are left alone.
    Where nothing is written the last row is that of `row_start`, or 0 where that is -1: whoever gave no row before the
    segment knows not to read it.
    """
