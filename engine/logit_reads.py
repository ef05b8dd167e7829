"""What a language model's head makes of the hidden states of a pass: logits, or log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from stars.buffers import Buffers
from stars.kernels import token_logprobs, top_logprobs
from stars.kernels.graph import Graphs, Part
from stars.kernels.types import TopLogprobs
from stars.logprobs import Tops
from stars.model.config import ModelConfig
from stars.model.decoder import Decoder
from stars.sampling import MAX_LOGPROBS
from stars.target import Target

LOGIT_ROWS = 64
"""Rows that have logits at a time: as many as one reading of the head serves at little more than the cost of one."""
LAUNCHES = 3  # for each of those: the product, of which a GPU may add up parts, and what is read of it


def read_bytes(shape: ModelConfig, rows: int) -> int:
    """Of a GPU's memory for the reads of a model of this shape whose passes have so many rows, at most."""
    return 4 * (rows * (shape.hidden_size + 2) + LOGIT_ROWS * shape.vocab_size)


class LogitReads:
    """Reads `states`, which a pass has written, [rows, hidden] behind the last norm; few rows have logits at a time.

    Operations of torch are among it, so that on the CPU it is run behind a program of libstars and not in it. graphs:
    of the passes, for a GPU.
    """

    @torch.inference_mode(False)  # whoever asks first may be in it, and others not
    def __init__(self, decoder: Decoder, target: Target, rows: int, graphs: Graphs):
        self._decoder, self._target, self._graphs = decoder, target, graphs
        # Of its own: the decoder's may grow, and a recorded pass goes on with what it was recorded with.
        self.states = torch.zeros(rows, decoder.config.hidden_size, dtype=decoder.dtype, device=target.device)
        self._logits = decoder.reserve_logits(LOGIT_ROWS)
        self._given = Buffers(target, targets=(torch.int32, (rows, 1)))
        self._found = Buffers(target, logprobs=(torch.float32, (rows, 1)))
        self._tells: TopReads | None = None  # made where it is first asked for

    def logits(self, rows: int) -> Tensor:
        """float32 [rows, vocab] of the first rows, in memory of its own."""
        return torch.cat([self._of(first, min(rows, first + LOGIT_ROWS)).clone()
                          for first in range(0, rows, LOGIT_ROWS)])

    def logprobs(self, targets: Sequence[int], rows: int, rare: bool) -> list[float]:
        """log softmax(logits)[target] of the first rows, one for each of `targets`; `rows`: with idle ones behind them.
        rare: as of `Graphs.run`."""
        self._given.wait()
        column = self._given.host("targets")[:, 0]
        column[: len(targets)], column[len(targets) : rows] = targets, -1
        self._given.upload()
        self._graphs.run_beside(self.part(rows), self.states, rare)
        self._found.fetch()
        self._found.wait()
        logprobs: list[float] = self._found.host("logprobs")[: len(targets), 0].tolist()
        return logprobs

    def part(self, rows: int) -> Part:
        """What `logprobs` runs of a pass of so many rows."""

        def run() -> None:
            self._read(self._given["targets"][:rows], self._found["logprobs"][:rows])

        return Part(("logprobs", rows), run, LAUNCHES * -(-rows // LOGIT_ROWS))

    def several(self, targets: Sequence[Sequence[int]]) -> list[list[float]]:
        """As `logprobs`, of several tokens at some of the rows."""
        most = max(map(len, targets))
        wanted = torch.tensor([[*row, *[-1] * (most - len(row))] for row in targets], dtype=torch.int32,
                              device=self.states.device)
        found = torch.empty(wanted.shape, device=self.states.device)
        self._read(wanted, found)
        return [values[: len(row)] for values, row in zip(found.tolist(), targets, strict=True)]

    def tops(self, first: int, targets: Sequence[int], wanted: int) -> tuple[np.ndarray, Tops]:
        """Of the rows from `first` on, one for each of `targets`: log softmax(logits)[target] float32 [rows], its rank,
        and the most probable tokens, as many as are wanted."""
        tells = self._tells
        if tells is None:
            tells = self._tells = TopReads(self._target, len(self.states), self._logits.shape[1])
        return tells.read(lambda start, stop: self._of(first + start, first + stop), targets, wanted)

    def _read(self, targets: Tensor, logprobs: Tensor) -> None:
        """Of the first rows, as many as there are targets for."""
        for first in range(0, len(targets), LOGIT_ROWS):
            stop = min(len(targets), first + LOGIT_ROWS)
            token_logprobs(self._of(first, stop), targets[first:stop], logprobs[first:stop])

    def _of(self, first: int, stop: int) -> Tensor:
        """Logits of rows first .. stop - 1, which the next ones overwrite."""
        return self._decoder.logits(self.states[first:stop], self._logits[: stop - first])


class TopReads:
    """Room for what stands beside so many given tokens at a time, each by a row of logits."""

    @torch.inference_mode(False)
    def __init__(self, target: Target, rows: int, vocab: int):
        row, most = (torch.int32, (rows,)), min(MAX_LOGPROBS, vocab)
        self._given = Buffers(target, steps=row, wanted=row, told=row, tokens=(torch.int32, (rows, 1)))
        self._found = Buffers(target, zeroed=False, ranks=(torch.int32, (rows, 1)), own=(torch.float32, (rows, 1)),
                              token_ids=(torch.int32, (rows, 1, most)), logprobs=(torch.float32, (rows, 1, most)))

    def read(self, logits: Callable[[int, int], Tensor], targets: Sequence[int], wanted: int
             ) -> tuple[np.ndarray, Tops]:
        """As `LogitReads.tops`. logits: float32 [stop - start, vocab] of rows start .. stop - 1."""
        rows, given, found = len(targets), self._given, self._found
        given.wait()
        for name, value in (("steps", 1), ("told", 0), ("wanted", wanted)):
            given.host(name)[:rows] = value
        given.host("tokens")[:rows, 0] = targets
        given.upload()
        for start in range(0, rows, LOGIT_ROWS):
            part = slice(start, min(rows, start + LOGIT_ROWS))
            top_logprobs(logits(part.start, part.stop), given["steps"][part], given["tokens"][part], TopLogprobs(
                given["wanted"][part], given["told"][part], found["ranks"][part], found["token_ids"][part],
                found["logprobs"][part], found["own"][part]))
        found.fetch()
        found.wait()
        most = min(wanted, found.host("token_ids").shape[2])
        return found.host("own")[:rows, 0].copy(), Tops(
            found.host("ranks")[:rows, 0].copy(), found.host("token_ids")[:rows, 0, :most].copy(),
            found.host("logprobs")[:rows, 0, :most].copy())
