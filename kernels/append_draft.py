"""Drafted segments as the input of a scoring pass, without a detour over the host: the pass can follow the draft.

A reward model that reads the language model's token ids scores, of every lane, the last committed token, the segment
without the stop token that ended it, and its closing tokens. How long the segment became is known on the device alone.
"""

from __future__ import annotations

from stars.bindings import libstars
from stars.kernels.dispatch import on_libstars, on_triton
from stars.kernels.types import Draft, Followers


def append_draft(draft: Draft, followers: Followers, vocab_size: int) -> None:
    """Writes segments and closing tokens behind the first row of every sequence that follows a lane.

    Ids outside `vocab_size` become 0 (whoever reads the draft refuses the lane). Rows behind the last are left alone.
    """
    if on_triton(followers.token_ids):
        from stars.kernels.triton.append_draft import append_draft as launch

        launch(draft, followers, vocab_size)
    elif on_libstars(followers.token_ids):
        libstars.append_draft(draft, followers, vocab_size)
    else:
        append_draft_reference(draft, followers, vocab_size)


def append_draft_reference(draft: Draft, followers: Followers, vocab_size: int) -> None:
    """As `append_draft`, one sequence at a time."""
    starts = followers.row_start.tolist()
    for sequence, lane in enumerate(followers.lanes.tolist()):
        if lane < 0:
            continue
        steps = int(draft.steps[lane])
        ids = draft.out_tokens[lane, :steps].tolist()
        if ids and ids[-1] in draft.stop_ids[lane].tolist():  # logits that were NaN left -1, which is among them
            ids.pop()
        ids = [token if 0 <= token < vocab_size else 0 for token in ids]
        ids += [token for token in followers.closing[sequence].tolist() if token >= 0]
        first = starts[sequence] + 1
        for row, token in enumerate(ids, first):
            followers.token_ids[row] = token
        followers.last[sequence] = first + len(ids) - 1
        followers.tokens[sequence] += steps
