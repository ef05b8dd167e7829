"""Where the edits of all lanes of a draft lie, and the masks that a grammar fills while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from stars.buffers import Buffers
from stars.config import EngineConfig
from stars.edits import Edited, Matcher, TokenEdits
from stars.helper import Helper
from stars.kernels.types import Edits
from stars.sizes import MAX_WORD, edit_entries, edit_words, mask_words


class EditedLane(Protocol):
    """What is read of a lane."""

    @property
    def edits(self) -> Edited | None: ...

    @property
    def matcher(self) -> Matcher | None: ...

    @property
    def ranks(self) -> int: ...


class Place(NamedTuple):
    """Where what a request asks lies; its lanes share it."""

    start: int
    first_word: int
    mask_row: int


class Matched(NamedTuple):
    """A lane whose mask is filled before each of its draws."""

    lane: int
    row: np.ndarray  # int32 [mask words], its mask
    matcher: Matcher
    edits: TokenEdits | None
    base: int  # committed tokens of its response
    draws: bool  # False: its tokens are enumerated


class EditBuffers:
    """The edits of up to `rows` lanes, sent as far as they are filled, and touched only where lanes have some."""

    def __init__(self, config: EngineConfig, rows: int, vocab_size: int):
        target, one = config.target, (torch.int32, (rows,))
        self._lanes = Buffers(
            target, start=one, count=one, base=one, first_word=one, word_count=one,
            tail=(torch.int32, (rows, MAX_WORD - 1)), mask_row=one)
        self._entries = Buffers(target, zeroed=False, entries=(torch.int32, (edit_entries(config, vocab_size), 3)))
        self._words = Buffers(target, zeroed=False, words=(torch.int32, (edit_words(config), MAX_WORD)))
        self._masks = Buffers(target, zeroed=False, masks=(torch.int32, (rows, mask_words(vocab_size))))
        self._all = {**dict.fromkeys(Edits._fields, self._lanes), "entries": self._entries, "words": self._words,
                     "masks": self._masks}
        self._matched: list[Matched] = []
        self._rows = 0  # masks that are used
        self._helper = Helper("stars-masks")

    def edits(self, rows: int) -> Edits:
        """Of the first `rows` lanes, on the device."""
        return Edits(*(self._all[name][name][:rows] if self._all[name] is self._lanes else self._all[name][name]
                       for name in Edits._fields))

    def fill(self, lanes: Sequence[EditedLane]) -> bool:
        """Writes what is asked of every lane, and sends all but the masks of matchers; whether there are any."""
        self._helper.settle()  # of a draft that was interrupted: whoever fills masks writes here
        for buffers in (self._lanes, self._entries, self._words, self._masks):
            buffers.wait()
        host = {name: self._all[name].host(name) for name in Edits._fields}
        entries, words, masks = host["entries"], host["words"], host["masks"]
        places: dict[int, Place] = {}  # by the edits of a request
        stop = last_word = rows = 0
        self._matched = []
        for index, lane in enumerate(lanes):
            host["count"][index] = host["word_count"][index] = host["base"][index] = 0
            host["mask_row"][index] = -1
            if lane.edits is not None:
                edits, base, tail = lane.edits
                place = places.get(id(edits))
                if place is None:
                    mask_row = -1
                    if edits.mask is not None and lane.matcher is None:
                        mask_row, rows = rows, rows + 1
                        masks[mask_row] = edits.mask
                    place = places[id(edits)] = Place(stop, last_word, mask_row)
                    entries[stop : stop + len(edits.entries)] = edits.entries
                    words[last_word : last_word + len(edits.words)] = edits.words
                    stop, last_word = stop + len(edits.entries), last_word + len(edits.words)
                host["start"][index], host["first_word"][index], host["mask_row"][index] = place
                host["count"][index], host["word_count"][index] = len(edits.entries), len(edits.words)
                host["base"][index] = base
                if len(edits.words):
                    host["tail"][index] = -1
                    if tail:
                        host["tail"][index, -len(tail) :] = tail
            if lane.matcher is not None:
                asked, base = (lane.edits.edits, lane.edits.base) if lane.edits is not None else (None, 0)
                host["mask_row"][index] = rows
                self._matched.append(Matched(index, masks[rows], lane.matcher, asked, base, not lane.ranks))
                rows += 1
        self._lanes.upload()
        self._entries.upload(stop * entries.strides[0])
        self._words.upload(last_word * words.strides[0])
        self._rows = rows
        if not self._matched:
            self._masks.upload(rows * masks.strides[0])
        return bool(self._matched)

    def idle(self, rows: int) -> None:
        """As `fill`, of lanes that ask for nothing, for a step that is recorded."""
        self._lanes.wait()
        self._lanes.host("count")[:rows] = self._lanes.host("word_count")[:rows] = 0
        self._lanes.host("mask_row")[:rows] = -1
        self._lanes.upload()

    def begin_masks(self, done: np.ndarray, steps: np.ndarray) -> None:
        """Has the masks filled, in a thread of its own, of the lanes with a matcher that are not done: what of it needs
        no interpreter lock runs beside the model.

        done, steps: int32 [lanes], as of LaneState.
        """
        live = [matched for matched in self._matched if not done[matched.lane]]
        drawn = [int(steps[matched.lane]) for matched in live]
        self._masks.wait()
        self._helper.begin(partial(_fill_masks, live, drawn))

    def send_masks(self) -> None:
        """Waits for the masks, and sends them; raises what a matcher raised."""
        self._helper.wait()
        self._masks.upload(self._rows * self._masks.host("masks").strides[0])

    def accept(self, drawn_before: np.ndarray, steps: np.ndarray, out_tokens: np.ndarray) -> None:
        """Hands the matchers the tokens that their lanes drew in a step.

        drawn_before, steps: int32 [lanes] tokens that were drawn before it and after. out_tokens: as of LaneState.
        """
        for lane, _, matcher, _, _, draws in self._matched:
            if draws and steps[lane] > drawn_before[lane]:
                token = int(out_tokens[lane, steps[lane] - 1])
                if token >= 0:
                    matcher.accept(token)


def _fill_masks(live: Sequence[Matched], drawn: Sequence[int]) -> None:
    """Fills the masks of lanes that have drawn so many tokens."""
    for (_, row, matcher, edits, base, _), steps in zip(live, drawn, strict=True):
        matcher.fill(row)
        if edits is None:
            continue
        if edits.mask is not None:
            row &= edits.mask
        if edits.stops is not None and base + steps < edits.min_tokens:
            left = row & ~edits.stops
            if left.any():  # else the text is complete, and cannot be made longer
                row[:] = left
