"""A context of llama.cpp whose sequences share one KV cache: the C functions that the adapter calls, and their errors.

Through llama-cpp-python. What it was tried with is `TRIED`; a version that lacks a function is refused by its name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stars.errors import ModelError, RequestError

TRIED = "0.3.36"
FUNCTIONS = ("llama_get_memory", "llama_memory_seq_cp", "llama_memory_seq_rm", "llama_memory_seq_pos_min",
             "llama_memory_seq_pos_max", "llama_memory_clear", "llama_init_from_model", "llama_model_is_recurrent",
             "llama_model_is_hybrid", "llama_model_has_encoder", "llama_model_has_decoder", "llama_model_n_swa",
             "llama_model_get_vocab", "llama_vocab_n_tokens", "llama_get_logits", "llama_decode")
FIELDS = ("kv_unified", "swa_full", "n_seq_max")  # of the context's parameters


def load_api() -> Any:
    """The module llama_cpp. ModelError where it is missing or another version than the adapter can use."""
    try:
        api = import_module("llama_cpp")
    except Exception as error:  # its library may be missing, too
        raise ModelError(f"llama-cpp-python cannot be imported ({error}): pip install llama-cpp-python=={TRIED}"
                         ) from error
    fields = {name for name, *_ in api.llama_context_params._fields_}
    missing = [name for name in FUNCTIONS if not hasattr(api, name)] + [
        name for name in FIELDS if name not in fields]
    if missing:
        raise ModelError(f"llama-cpp-python {getattr(api, '__version__', '')} has no {missing[0]}, which the adapter "
                         f"needs: install llama-cpp-python=={TRIED}")
    return api


class Row(NamedTuple):
    """One token of a forward pass."""

    token: int
    position: int
    sequences: Sequence[int]  # whose it becomes; all of them end at position - 1
    wanted: bool  # whether the logits behind it are


class LlamaContext:
    """One context of a model that is loaded already, its cache empty.

    model: a llama_model_p. params: llama_context_params, of which a copy is changed: the cache becomes a unified one of
    n_ctx cells for n_seq_max sequences, with windows held whole. lora: a llama_adapter_lora_p and its scale, or None.
    ModelError for models that do not generate or whose cache cannot be cut, and where there is no memory.
    """

    def __init__(self, api: Any, model: Any, params: Any, *, n_ctx: int, n_seq_max: int, n_batch: int,
                 lora: tuple[Any, float] | None = None):
        self._api = api
        _check_model(api, model)
        given = type(params).from_buffer_copy(params)
        given.n_ctx, given.n_seq_max, given.n_batch = n_ctx, n_seq_max, n_batch
        given.n_ubatch = min(given.n_ubatch or n_batch, n_batch)
        given.kv_unified = given.swa_full = True
        given.embeddings = False
        self.vocab_size: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.window: int = api.llama_model_n_swa(model)  # tokens that some layers see; 0: all see all
        self.n_batch = n_batch
        self.rows = 0  # run so far
        self._context = api.llama_init_from_model(model, given)
        if not self._context:
            raise ModelError(f"llama.cpp cannot make a context of n_ctx={n_ctx} cells and n_seq_max={n_seq_max} "
                             "sequences of this model: give less, or see what llama.cpp says with verbose=True")
        self._batch = api.llama_batch_init(n_batch, 0, n_seq_max)
        self._views: dict[tuple[int, int], Tensor] = {}
        if lora is not None:
            adapters, scales = (api.llama_adapter_lora_p_ctypes * 1)(lora[0]), (ctypes.c_float * 1)(lora[1])
            if api.llama_set_adapters_lora(self._context, adapters, 1, scales):
                self.close()
                raise ModelError("llama.cpp cannot put the Llama's LoRA adapter on a second context: merge it")
        self._memory = api.llama_get_memory(self._context)
        try:
            self._probe()
        except BaseException:
            self.close()
            raise

    def _probe(self) -> None:
        """Cuts a sequence of two tokens, which tells more than names do."""
        self.decode([Row(0, place, [0], place == 1) for place in range(2)])
        cut = self._memory and self._api.llama_memory_seq_rm(self._memory, 0, 1, -1)
        if not cut or self._api.llama_memory_seq_pos_max(self._memory, 0) != 0:
            raise ModelError("this model's cache in llama.cpp cannot be cut, so that no candidate can be rejected: use "
                             "a model whose attention keeps all keys")
        self._api.llama_memory_clear(self._memory, False)
        self.rows = 0

    def decode(self, rows: Sequence[Row]) -> Tensor:
        """Runs at most n_batch rows; the logits behind those that are wanted, float32 [wanted, vocab] in their order.

        They lie in llama.cpp's own buffer, and hold until the next pass. RequestError where the cache is full,
        ModelError where the pass fails.
        """
        batch = self._batch
        for place, (token, position, sequences, wanted) in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place] = len(sequences)
            own = batch.seq_id[place]
            for index, sequence in enumerate(sequences):
                own[index] = sequence
        batch.n_tokens = len(rows)
        status = self._api.llama_decode(self._context, batch)
        if status == 1:
            raise RequestError("llama.cpp's cache is full: give the adapter a larger n_ctx")
        if status:
            raise ModelError(f"llama_decode gave {status} for {len(rows)} tokens: see what llama.cpp says with "
                             "verbose=True")
        self.rows += len(rows)
        count = sum([row.wanted for row in rows])
        if not count:
            return torch.empty(0, self.vocab_size)
        logits = self._api.llama_get_logits(self._context)
        key = ctypes.addressof(logits.contents), count
        if key not in self._views:
            self._views = {key: torch.from_numpy(np.ctypeslib.as_array(logits, (count, self.vocab_size)))}
        return self._views[key]

    def fork(self, source: int, target: int, begin: int, end: int) -> None:
        """The tokens of `source` at positions begin .. end - 1 become those of `target`, too."""
        self._api.llama_memory_seq_cp(self._memory, source, target, begin, end)

    def cut(self, sequence: int, begin: int) -> None:
        """Takes a sequence's tokens from position `begin` on away from it; nothing once the context is closed."""
        if self._context:
            self._api.llama_memory_seq_rm(self._memory, sequence, begin, -1)

    def first(self, sequence: int) -> int:
        """The first position that every layer still has of a sequence; -1: it is empty."""
        return int(self._api.llama_memory_seq_pos_min(self._memory, sequence))

    def used(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return int(self._api.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def close(self) -> None:
        """Gives its memory back; once."""
        context, self._context = self._context, None
        if context:
            self._views = {}
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(context)


def _check_model(api: Any, model: Any) -> None:
    """ModelError for models whose names tell already that it cannot be done."""
    if api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model):
        kind = "recurrent" if api.llama_model_is_recurrent(model) else "hybrid"
        raise ModelError(f"this model is {kind} ({_described(api, model)}): its state cannot be cut, so that no "
                         "candidate can be rejected; use a model of attention alone")
    if api.llama_model_has_encoder(model) or not api.llama_model_has_decoder(model):
        raise ModelError(f"this model is no decoder alone ({_described(api, model)}): use one that continues a text")


def _described(api: Any, model: Any) -> str:
    text = ctypes.create_string_buffer(128)
    api.llama_model_desc(model, text, 128)
    return text.value.decode(errors="replace")
