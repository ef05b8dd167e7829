"""The loop's stack over a causal language model of transformers: it drafts the lanes of all responses in one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stars.adapters.drawing import Drawing, Proposal
from stars.adapters.hf_cache import History, Lanes, drafting, growing
from stars.adapters.loop import Asked, Draft, Response, Settled
from stars.errors import RequestError, StarsError
from stars.stops import find_stop

Processor = Callable[[Tensor, Tensor], Tensor]
"""(token ids [lanes, length], float32 logits [lanes, vocab]) -> logits, as transformers' LogitsProcessor."""
Criterion = Callable[[Tensor, Any], Tensor | bool]
"""(token ids [lanes, length], None) -> bool [lanes] or one for all, as transformers' StoppingCriteria."""


class ForwardTokens(NamedTuple):
    """Rows of forward passes that the language model ran."""

    prompt: int  # each prompt once, with the padding that its batch has
    drafts: int


class Inputs(NamedTuple):
    """What generate gives: rows are responses, those to one prompt side by side."""

    token_ids: Tensor  # int64 [rows, length], padded on the left
    padding: list[int]  # [rows] columns before the prompt
    positions: Tensor  # int64 [rows, length]
    after: list[int]  # [rows] the position behind the prompt
    responses: int  # to each prompt
    chunk: int | None  # most columns of a pass over prompts
    cache: Any  # as generate has prepared it, empty


class Edits(NamedTuple):
    """What of generate's stands between logits and draw, or ends a lane: none of it where these are empty."""

    processors: Callable[[int], Sequence[Processor]] | None = None  # of a row
    criteria: Sequence[Criterion] = ()
    stop_strings: Sequence[str] = ()  # those that one of the criteria finds: a text ends before one

    def __bool__(self) -> bool:
        return self.processors is not None or bool(self.criteria)


class _Sequence:
    """What the stack keeps of a response."""

    def __init__(self, row: int, history: History, ahead: Tensor):
        self.row = row  # of generate's
        self.history = history  # of all tokens where `ahead` is there, else of all but the last
        self.ahead: Tensor | None = ahead  # float32 [vocab], the next token's logits
        self.stop = history.stop  # column behind the last committed token, once that has run
        self.drafted: dict[int, tuple[int, int]] = {}  # row and tokens of each attempt of the round
        self.held: list[list[Tensor]] | None = None  # keys and values of the held attempt's tokens but the last
        self.ids: Tensor | None = None  # int64 [lanes, length], where processors or criteria read it


class HFStack:
    """Drafts by forward passes of `model`, whose cache it rewinds. rows: of `inputs`, by response."""

    def __init__(self, model: Any, inputs: Inputs, rows: Mapping[Response, int], proposal: Proposal,
                 edits: Edits = Edits()):
        self._model = model
        self._inputs = inputs
        self._rows = rows
        self._proposal = proposal
        self._edits = edits
        self._device = model.device
        self._read: dict[int, tuple[History, Tensor, int]] = {}  # prompts, while responses to them are to come
        takes = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"
        self._takes_mask, self._takes_positions = "attention_mask" in takes, "position_ids" in takes
        self._fixed: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})
        self._lanes: Lanes | None = drafting(inputs.cache, model)
        self._steps = 0  # most tokens of an attempt of the round
        self.forward_tokens = ForwardTokens(0, 0)

    def open(self, responses: Sequence[Response]) -> None:
        """Reads each prompt once, in one pass, whatever the number of responses to it."""
        count = self._inputs.responses
        rows = [self._rows[one] for one in responses]
        wanted = [prompt for prompt in dict.fromkeys([row // count for row in rows]) if prompt not in self._read]
        if wanted:
            self._read_prompts(wanted)
        for one, row in zip(responses, rows, strict=True):
            history, ahead, left = self._read.pop(row // count)
            if left > 1:
                self._read[row // count] = history, ahead, left - 1
            one.sequence = _Sequence(row, history, ahead)

    def draft(self, asked: Sequence[Asked]) -> Sequence[list[Draft] | StarsError]:
        """Draws all attempts, as rows of one batch. Where the next token's logits are there, lanes draw a pass earlier
        than those whose last committed token is still to be run."""
        assert self._lanes is not None
        sequences: list[_Sequence] = [one.response.sequence for one in asked]
        counts = [len(one.attempts) for one in asked]
        self._steps = steps = max([attempt.max_tokens for one in asked for attempt in one.attempts])
        late = [int(one.ahead is None) for one in sequences]
        for one, history in zip(sequences, self._lanes.place([one.history for one in sequences], counts, steps),
                                strict=True):
            one.history, one.stop = history, history.stop
        end = sequences[0].history.stop
        begin = [self._inputs.after[one.response.sequence.row] + len(one.response.token_ids) - behind
                 for one, behind in zip(asked, late, strict=True)]  # the position of the first token that is run
        positions = self._lane_wise(begin, counts)[:, None] + torch.arange(steps, device=self._device)
        mask = None
        if any(one.history.start for one in sequences):
            mask = torch.ones(sum(counts), end + steps, dtype=torch.int64, device=self._device)
            for one, count in zip(sequences, counts, strict=True):
                mask[one.history.first : one.history.first + count, : one.history.start] = 0
        drawing = Drawing(asked, self._proposal, self._device)
        if self._edits:
            self._begin_ids(asked)
        lanes, stopped = drawing.lanes, set[int]()
        token_ids = self._lane_wise([_last(one.response) for one in asked], counts)
        ahead = next((one.ahead for one in sequences if one.ahead is not None), None)
        if ahead is not None:
            rows = torch.stack([ahead if one.ahead is None else one.ahead for one in sequences])
            waiting = self._lane_wise(late, counts).to(lanes.done)
            lanes.done.copy_(waiting)  # those do not draw now
            self._draw(asked, drawing, rows.repeat_interleave(torch.tensor(counts, device=self._device), dim=0),
                       [0 - behind for behind in late], stopped)
            lanes.done.sub_(waiting)
            token_ids = torch.where(waiting.bool(), token_ids, lanes.token_ids)
        ran = 0
        while not bool(lanes.done.all()):
            logits = self._forward(self._lanes, token_ids[:, None].long(),
                                   None if mask is None else mask[:, : end + ran + 1], positions[:, ran : ran + 1])
            ran += 1
            if ran == 1:
                for one, behind in zip(sequences, late, strict=True):
                    if behind:
                        one.stop, one.ahead = end + 1, logits[one.history.first]
            self._draw(asked, drawing, logits, [ran - behind for behind in late], stopped)
            token_ids = lanes.token_ids
        self.forward_tokens = self.forward_tokens._replace(drafts=self.forward_tokens.drafts + ran * sum(counts))
        return self._drafts(asked, drawing.drafts(), stopped)

    def settle(self, settled: Sequence[Settled]) -> None:
        """Says where each history goes on: nothing is copied but what is held."""
        assert self._lanes is not None
        for response, kept, held in settled:
            one: _Sequence = response.sequence
            history = one.history._replace(stop=one.stop)
            if kept in one.drafted:
                row, tokens = one.drafted[kept]
                history = history._replace(row=row, stop=one.stop + tokens - 1)
            elif kept:
                assert one.held is not None
                self._lanes.put(history.row, one.stop, one.held)
                history = history._replace(stop=one.stop + _columns(one.held))
            elif len(one.drafted) >= history.rows:  # all of them have run the last token
                history = history._replace(known=one.stop)
            if held in one.drafted:
                row, tokens = one.drafted[held]
                one.held = self._lanes.take(row, one.stop, one.stop + tokens - 1)
            elif not held:
                one.held = None
            one.history, one.drafted = history, {}
            if kept:
                one.ahead = None

    def close(self, response: Response) -> None:
        """Nothing is held but what `response.sequence` was: its rows are written anew by the next round."""

    # -- passes --------------------------------------------------------------------------------------------------------

    def _read_prompts(self, prompts: Sequence[int]) -> None:
        inputs = self._inputs
        rows = [prompt * inputs.responses for prompt in prompts]
        skipped = min([inputs.padding[row] for row in rows])
        ids, positions = inputs.token_ids[rows, skipped:], inputs.positions[rows, skipped:]
        padding = [inputs.padding[row] - skipped for row in rows]
        length = ids.shape[1]
        mask = None
        if any(padding):
            mask = (torch.arange(length, device=self._device) >= torch.tensor(padding, device=self._device)[:, None])
            mask = mask.long()
        lanes, size = growing(inputs.cache, self._model, length), inputs.chunk or length
        for begin in range(0, length, size):
            stop = min(begin + size, length)
            logits = self._forward(lanes, ids[:, begin:stop], None if mask is None else mask[:, :stop],
                                   positions[:, begin:stop])
            if not any(layer.buffers for layer in lanes.layers):
                raise RequestError(f"{type(self._model).__name__} does not use the cache that it is given, which the "
                                   "adapter would rewind: use a model of attention layers")
        for place, prompt in enumerate(prompts):
            self._read[prompt] = History(lanes, place, padding[place], length), logits[place], inputs.responses
        self.forward_tokens = self.forward_tokens._replace(prompt=self.forward_tokens.prompt + ids.numel())

    def _forward(self, lanes: Lanes, token_ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Float32 [rows, vocab] of the last column."""
        given = {self._cache_name: lanes.cache, **self._fixed}
        if self._takes_mask:
            given["attention_mask"] = mask
        if self._takes_positions:
            given["position_ids"] = positions
        logits: Tensor = self._model(input_ids=token_ids, **given).logits[:, -1]
        return logits.to(self._device, torch.float32).contiguous()

    def _lane_wise(self, values: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Int64 [lanes]: each value as often as its response has lanes."""
        every = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
        return torch.tensor(every, dtype=torch.int64, device=self._device)

    # -- what stands between logits and draw ---------------------------------------------------------------------------

    def _begin_ids(self, asked: Sequence[Asked]) -> None:
        """Token ids of lanes as generate has them, padding first; what is not drawn yet is 0."""
        for one in asked:
            sequence: _Sequence = one.response.sequence
            history = self._inputs.token_ids[sequence.row]
            committed = history.new_tensor(one.response.token_ids + [0] * self._steps)
            sequence.ids = torch.cat([history, committed]).repeat(len(one.attempts), 1)

    def _draw(self, asked: Sequence[Asked], drawing: Drawing, logits: Tensor, steps: Sequence[int],
              stopped: set[int]) -> None:
        """Draws from `logits` [lanes, vocab] what is edited of them. steps: of each response, which of its attempts'
        tokens this is; one that there is not: they wait, or are done. stopped: gets the lanes that a criterion ends."""
        if not self._edits:
            drawing.draw(logits)
            return
        lanes, first = drawing.lanes, 0
        spans: list[tuple[Asked, slice, Tensor, int, int]] = []
        for one, step in zip(asked, steps, strict=True):
            if 0 <= step < self._steps:
                ids = one.response.sequence.ids
                column = ids.shape[1] - self._steps + step
                spans.append((one, slice(first, first + len(one.attempts)), ids, column, step))
            first += len(one.attempts)
        if self._edits.processors is not None:
            logits = logits.clone()
            for one, rows, ids, column, _ in spans:
                scores = logits[rows].clone()
                for processor in self._edits.processors(one.response.sequence.row):
                    scores = processor(ids[:, :column], scores)
                logits[rows] = scores
        before = lanes.done.tolist()
        drawing.draw(logits)
        for _, rows, ids, column, step in spans:
            ids[:, column] = lanes.out_tokens[rows, step].clamp(min=0).to(ids)
            ends = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            for criterion in self._edits.criteria:
                ends |= torch.as_tensor(criterion(ids[:, : column + 1], None)).to(ends)  # some: a bool for all rows
            for lane in ends.nonzero().flatten().tolist():
                if not before[rows.start + lane]:
                    stopped.add(rows.start + lane)
                    lanes.done[rows.start + lane] = 1

    def _drafts(self, asked: Sequence[Asked], drafted: Sequence[list[Draft] | StarsError], stopped: set[int],
                ) -> Sequence[list[Draft] | StarsError]:
        """What was drawn, and what the stack remembers of it."""
        first = 0
        for one, drafts in zip(asked, drafted, strict=True):
            if not isinstance(drafts, StarsError):
                for place, (attempt, draft) in enumerate(zip(one.attempts, drafts, strict=True)):
                    one.response.sequence.drafted[attempt.attempt] = first + place, len(draft.token_ids)
                    if first + place in stopped and not draft.ended:
                        drafts[place] = draft._replace(ended=True, text=self._text(one.response, draft.token_ids))
            first += len(one.attempts)
        return drafted

    def _text(self, response: Response, token_ids: list[int]) -> str | None:
        """Of a response that a criterion has ended: before the stop string, where it was one."""
        if response.decode is None:
            return None
        text = response.decode(response.token_ids + token_ids)
        found = find_stop(text, self._edits.stop_strings)
        return text[: found[0]] if found else text


def _last(response: Response) -> int:
    return response.token_ids[-1] if response.token_ids else response.prompt.token_ids[-1]


def _columns(states: Sequence[Sequence[Tensor]]) -> int:
    return next((part.shape[1] for layer in states for part in layer), 0)
