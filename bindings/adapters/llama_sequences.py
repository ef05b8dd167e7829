"""Candidates as sequences of llama.cpp's one unified KV cache: what the adapters' loop asks of a stack.

A response holds a trunk, which is its history, and a sequence for each attempt at once. All of them share the cells of
the history, for as long as it runs: so that rejecting takes the drafted cells alone away, and committing adds those of
the winner to the others. Neither touches what stands before, however long it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stars.adapters.drawing import Drawing, Proposal
from stars.adapters.llama_context import LlamaContext, Row
from stars.adapters.loop import Asked, Draft, Response, Settled
from stars.errors import StarsError


@dataclass(eq=False)
class Sequences:
    """What llama.cpp holds of one response."""

    trunk: int
    lanes: list[int]
    cells: int  # that it may come to need for its response and attempts
    length: int = 0  # tokens of prompt and response in the cache
    prompt_logits: Tensor | None = None  # float32 [vocab] behind the prompt
    logits: Tensor | None = None  # behind all that is in the cache; None: the last token has not been run
    drafted: dict[int, int] = field(default_factory=dict)  # lanes by attempt, of those that may still win
    ids: list[int] = field(default_factory=list)  # prompt and response, as of the last draft


class SequenceStack:
    """A `Stack` of the adapters' loop over one context of `cells` cells and `sequences` sequences.

    lanes: attempts that a response draws at once. spare: 1 where one may be held while others are drawn, else 0.
    segment_size: most tokens of an attempt. proposals: what each response draws from; whoever runs the loop fills it.
    """

    def __init__(self, context: LlamaContext, *, cells: int, sequences: int, lanes: int, spare: int, segment_size: int,
                 proposals: Mapping[Response, Proposal]):
        self._context = context
        self._free = list(range(sequences - 1, -1, -1))
        self._free_cells = cells
        self._lanes, self._segment_size = lanes + spare, segment_size
        self._proposals = proposals
        self._open: dict[Response, Sequences] = {}
        self._prompts: dict[tuple[int, ...], int] = {}  # responses to each, which share its cells
        self._rows = torch.empty(0, context.vocab_size)
        self.prompt_tokens = self.draft_tokens = 0  # rows of forward passes

    @property
    def free_sequences(self) -> int:
        """Sequences that no response holds."""
        return len(self._free)

    def cells_for(self, prompt: int, max_tokens: int) -> int:
        """Most cells that a response takes: all of it, and of its last segment what the other lanes have drafted."""
        return prompt + max_tokens + (self._lanes - 1) * (self._segment_size - 1)

    def reserve(self, response: Response) -> bool:
        """Takes sequences and cells for a response; False where others must end first."""
        prompt = tuple(response.prompt.token_ids)
        shared = len(prompt) if prompt in self._prompts else 0
        needed = self.cells_for(len(prompt), response.max_tokens) - len(prompt)
        if len(self._free) < 1 + self._lanes or self._free_cells < needed + len(prompt) - shared:
            return False
        taken = [self._free.pop() for _ in range(1 + self._lanes)]
        self._free_cells -= needed + len(prompt) - shared
        self._prompts[prompt] = self._prompts.get(prompt, 0) + 1
        response.sequence = self._open[response] = Sequences(taken[0], taken[1:], needed)
        return True

    def open(self, responses: Sequence[Response]) -> None:
        """Reads each prompt once: what another response that is open begins with too is shared."""
        for one in responses:
            own, ids = one.sequence, one.prompt.token_ids
            self._share(own, ids)
            for begin in range(own.length, len(ids), self._context.n_batch):
                part = ids[begin : begin + self._context.n_batch]
                last = len(ids) - 1 - begin
                logits = self._context.decode([Row(token, begin + place, [own.trunk], place == last)
                                               for place, token in enumerate(part)])
                self.prompt_tokens += len(part)
                own.length += len(part)
                if last < len(part):
                    own.prompt_logits = logits[0].clone()
            own.logits, own.ids = own.prompt_logits, list(ids)
            for lane in own.lanes:
                self._context.fork(own.trunk, lane, 0, -1)

    def _share(self, own: Sequences, ids: list[int]) -> None:
        """Takes over the longest beginning of `ids` that another response has in the cache."""
        best, source, window = 0, None, self._context.window
        for response, other in self._open.items():
            if other is own or not other.length:
                continue
            if response.prompt.token_ids == ids:
                common = len(ids)
            else:
                common = min(_common(other.ids[: other.length], ids), len(ids) - 1)
            # Cells that no window of its owner's reaches any more may have been given to others.
            if common > best and (not window or self._context.first(other.trunk) <= max(0, common - window)):
                best, source = common, (response, other)
        if source is not None:
            response, other = source
            self._context.fork(other.trunk, own.trunk, 0, best)
            own.length = best
            if best == len(ids):
                own.prompt_logits = other.prompt_logits

    def draft(self, asked: Sequence[Asked]) -> Sequence[list[Draft] | StarsError]:
        """Draws the attempts, one pass over all lanes a token; of lanes that have ended nothing is run."""
        if self._context.window:
            for one, _ in asked:
                self._mend(one.sequence)
        self._run_last_tokens([one for one, _ in asked])
        drawing = Drawing(asked, [self._proposals[one] for one, _ in asked])
        lanes: list[tuple[int, int]] = []  # (sequence, position of its next token)
        first = []
        for one, attempts in asked:
            own = one.sequence
            free = [lane for lane in own.lanes if lane not in own.drafted.values()]
            for attempt, lane in zip(attempts, free, strict=False):
                own.drafted[attempt.attempt] = lane
                lanes.append((lane, own.length))
                first.append(own.logits)
        if len(self._rows) < len(lanes):
            self._rows = torch.empty(len(lanes), self._context.vocab_size)
        rows = self._rows[: len(lanes)]
        torch.stack(first, out=rows)
        drawing.draw(rows)
        step = 0
        while active := [lane for lane, done in enumerate(drawing.done) if not done]:
            tokens = drawing.token_ids
            logits = self._context.decode([
                Row(tokens[lane], lanes[lane][1] + step, (lanes[lane][0],), True) for lane in active])
            self.draft_tokens += len(active)
            if len(active) < len(lanes):
                rows[active] = logits
                logits = rows
            drawing.draw(logits)
            step += 1
        return drawing.drafts()

    def _run_last_tokens(self, responses: Sequence[Response]) -> None:
        """The token that each response was committed up to has not been run yet, unless its segment is drawn anew: once
        for all lanes."""
        behind = [one for one in responses if one.sequence.logits is None]
        if not behind:
            return
        rows = []
        for one in behind:
            own = one.sequence
            own.ids = one.prompt.token_ids + one.token_ids
            rows.append(Row(own.ids[own.length], own.length, [own.trunk, *own.lanes], True))
        logits = self._context.decode(rows)
        self.draft_tokens += len(rows)
        for one, row in zip(behind, logits, strict=True):
            one.sequence.logits = row.clone()  # which a round of retries reads again
            one.sequence.length += 1

    def settle(self, settled: Sequence[Settled]) -> None:
        """Rejected lanes are cut back to the history, which a winner's lane first becomes."""
        for one, kept, held in settled:
            own = one.sequence
            if kept:
                winner = own.drafted[kept]
                self._context.fork(winner, own.trunk, own.length, -1)
                for lane in own.lanes:
                    if lane != winner:
                        self._context.cut(lane, own.length)
                        self._context.fork(winner, lane, own.length, -1)
                own.drafted, own.logits = {}, None
                own.length = self._context.used(own.trunk)
            else:
                for attempt, lane in own.drafted.items():
                    if attempt != held:
                        self._context.cut(lane, own.length)
                own.drafted = {held: own.drafted[held]} if held else {}

    def _mend(self, own: Sequences) -> None:
        """Where layers have windows, a cell is given away once no window of its only sequence reaches it, and a lane
        that was cut back since may reach it again. The trunk never goes back: it has all that may be reached."""
        first = self._context.first(own.trunk)
        for lane in own.lanes:
            if lane not in own.drafted.values() and self._context.first(lane) != first:
                self._context.cut(lane, 0)
                self._context.fork(own.trunk, lane, 0, -1)

    def close(self, response: Response) -> None:
        """Gives back sequences and cells."""
        own = self._open.pop(response, None)
        if own is None:
            return
        for sequence in (own.trunk, *own.lanes):
            self._context.cut(sequence, 0)
            self._free.append(sequence)
        self._free_cells += own.cells
        prompt = tuple(response.prompt.token_ids)
        self._prompts[prompt] -= 1
        if not self._prompts[prompt]:
            del self._prompts[prompt]
            self._free_cells += len(prompt)


def _common(a: list[int], b: list[int]) -> int:
    """Tokens at the beginning that both have."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count
