"""llama.cpp beside the engine, in the same process: greedy decoding by its C functions, through llama-cpp-python.

Tokens are chosen by numpy's argmax over the logits where they lie, which takes less time than llama.cpp's own sampler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def version() -> str:
    """Its version, and the instructions that it was built with."""
    import llama_cpp

    info = llama_cpp.llama_print_system_info().decode()
    return f"llama-cpp-python {llama_cpp.__version__}: {info}"


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet(level: int, text: bytes, data: object) -> None:
    """Swallows its messages."""


class LlamaCpp:
    """One GGUF file, and a context for up to `sequences` texts of `length` tokens each."""

    def __init__(self, path: Path, threads: int, length: int = 1024, sequences: int = 1):
        import llama_cpp as api

        api.llama_log_set(_quiet, None)
        api.llama_backend_init()
        self._api = api
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * sequences, sequences
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no memory for a context of {path}")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(512, 0, 1)

    def close(self) -> None:
        """Gives its memory back."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def greedy(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Reads the prompts and draws `tokens` tokens after each, all sequences in one batch a step."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        drawn: list[list[int]] = []
        rows = [(token, i, index, i == len(prompt) - 1)
                for index, prompt in enumerate(prompts) for i, token in enumerate(prompt)]
        for begin in range(0, len(rows), 512):
            part = rows[begin : begin + 512]
            self._decode(part)
            drawn += [[self._argmax(row)] for row, (_, _, _, last) in enumerate(part) if last]
        for step in range(tokens - 1):
            self._decode([(own[-1], len(prompt) + step, index, True)
                          for index, (prompt, own) in enumerate(zip(prompts, drawn, strict=True))])
            for index, own in enumerate(drawn):
                own.append(self._argmax(index))
        return drawn

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) of every row of a pass."""
        batch = self._batch
        for row, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        batch.n_tokens = len(rows)
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")

    def _argmax(self, row: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())
