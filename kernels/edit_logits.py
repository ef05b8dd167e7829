"""What a request asks of single tokens, on the logits of every lane and in place, before penalties and a draw.

Of each lane that is not done, in any order:

- an entry adds its bias to its token's logit, or makes it -inf while the response has fewer tokens than it says. The
  response is the committed one and what the lane has drawn of its segment;
- a mask makes the logit of every token -inf whose bit is not set;
- a word, which is two tokens or more, makes the logit of its last token -inf where the tokens before it are those that
  the response ends with.

A logit is changed by one addition in float32 at most, so every implementation gives the same bits. Tokens outside of
the vocabulary are passed over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.types import Edits, LaneState


def edit_logits_reference(logits: Tensor, lanes: LaneState, edits: Edits) -> None:
    """As `edit_logits`, one lane at a time."""
    vocab = logits.shape[1]
    for lane, row in enumerate(logits):  # row [vocab]
        if lanes.done[lane]:
            continue
        drawn = lanes.out_tokens[lane, : int(lanes.steps[lane])]
        start, first = int(edits.start[lane]), int(edits.first_word[lane])

        entries = edits.entries[start : start + int(edits.count[lane])]
        entries = entries[(entries[:, 0] >= 0) & (entries[:, 0] < vocab)]
        token_ids, until, bias = entries[:, 0].long(), entries[:, 1], entries[:, 2].contiguous().view(torch.float32)
        banned = until > int(edits.base[lane]) + len(drawn)
        row[token_ids] = torch.where(banned, -math.inf, row[token_ids] + bias)

        mask_row = int(edits.mask_row[lane])
        if mask_row >= 0:
            row.masked_fill_(~unpacked(edits.masks[mask_row], vocab), -math.inf)

        words = edits.words[first : first + int(edits.word_count[lane])]
        recent = torch.cat((edits.tail[lane], drawn))[len(drawn) :]  # [word length - 1]
        follow = ((words[:, :-1] == recent) | (words[:, :-1] < 0)).all(1)
        last = words[follow, -1].long()
        row[last[(last >= 0) & (last < vocab)]] = -math.inf


def unpacked(mask: Tensor, vocab: int) -> Tensor:
    """Bits of int32 words [ceil(vocab / 32)] as bool [vocab]."""
    bits = mask[:, None] >> torch.arange(32, dtype=torch.int32, device=mask.device)  # [words, 32]
    return (bits & 1).bool().flatten()[:vocab]


@operation(cpu="stars.bindings.libstars:edit_logits", cuda="stars.kernels.triton.edit_logits:edit_logits",
           reference=edit_logits_reference)
def edit_logits(logits: Tensor, lanes: LaneState, edits: Edits) -> None:
    """Changes `logits` float32 [lanes, vocab] of the lanes that are not done."""
