"""What a language model's head makes of the hidden states of a pass: logits, or log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Sequence

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
        self._decoder, self._graphs = decoder, graphs
        # Of its own: the decoder's may grow, and a recorded pass goes on with what it was recorded with.
        self.states = torch.zeros(rows, decoder.config.hidden_size, dtype=decoder.dtype, device=target.device)
        self._logits = decoder.reserve_logits(LOGIT_ROWS)
        self._given = Buffers(target, targets=(torch.int32, (rows, 1)))
        self._found = Buffers(target, logprobs=(torch.float32, (rows, 1)))

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
        parts = [read_tops(self._of(first + start, first + min(len(targets), start + LOGIT_ROWS)),
                           targets[start : start + LOGIT_ROWS], wanted)
                 for start in range(0, len(targets), LOGIT_ROWS)]
        tops = Tops(*(np.concatenate(columns) for columns in zip(*(tops for _, tops in parts), strict=True)))
        return np.concatenate([own for own, _ in parts]), tops

    def _read(self, targets: Tensor, logprobs: Tensor) -> None:
        """Of the first rows, as many as there are targets for."""
        for first in range(0, len(targets), LOGIT_ROWS):
            stop = min(len(targets), first + LOGIT_ROWS)
            token_logprobs(self._of(first, stop), targets[first:stop], logprobs[first:stop])

    def _of(self, first: int, stop: int) -> Tensor:
        """Logits of rows first .. stop - 1, which the next ones overwrite."""
        return self._decoder.logits(self.states[first:stop], self._logits[: stop - first])


def read_tops(logits: Tensor, targets: Sequence[int], wanted: int) -> tuple[np.ndarray, Tops]:
    """Of each row of logits float32 [rows, vocab]: log softmax(logits)[target] float32 [rows], the target's rank, and
    so many of the most probable tokens as are wanted. Waits for a GPU."""
    rows, device = len(targets), logits.device
    tokens = torch.tensor(targets, dtype=torch.int32, device=device).view(rows, 1)
    one, most = torch.ones(rows, dtype=torch.int32, device=device), (rows, 1, wanted)
    own = torch.empty(rows, 1, device=device)
    found = TopLogprobs(one * wanted, one * 0, torch.empty_like(tokens),
                        torch.empty(most, dtype=torch.int32, device=device), torch.empty(most, device=device), own)
    top_logprobs(logits, one, tokens, found)
    return own[:, 0].cpu().numpy(), Tops(*(getattr(found, name)[:, 0].cpu().numpy() for name in Tops._fields))
