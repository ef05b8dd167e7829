"""The whole engine over the Triton kernels, in the interpreter, in the shapes of captured graphs: the CPU's text."""

from __future__ import annotations

import importlib

import pytest

import stars
from building import PADDED, work_as
from stars.kernels.linear import Weight
from stars.reward import CausalReward
from toy import ToyModel, ids
from triton_process import INTERPRETED, run_in_interpreter

OPERATIONS = ("append_draft", "apply_penalties", "attention", "copy_rows", "embedding", "linear", "rms_norm",
              "rope_write", "sample_step", "score", "swiglu", "take_rows")
SIZES = dict(vocab=23, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=40, layers=2)

if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_this_numpy(tensor, scope) -> None:
        """NumPy from 2.4 on converts no array of one element by int(), as Triton 3.6 does for computed loop bounds."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_for_this_numpy


def dense(weight: Weight | None) -> Weight | None:
    """The weight as a GPU holds it."""
    if weight is None:
        return None
    return Weight(weight.dense().float().contiguous(), weight.bias, weight.out_features, weight.in_features)


def completions(on_triton: bool) -> list[stars.CompletionOutput]:
    pair = []
    for model in (ToyModel(seed=1, **SIZES), ToyModel(seed=2, head="reward", **SIZES)):
        decoder = model.decoder()
        if on_triton:
            decoder.embedding, decoder.head, decoder.score_head = map(
                dense, (decoder.embedding, decoder.head, decoder.score_head))
            decoder.layers = tuple(layer._replace(**{name: dense(getattr(layer, name)) for name in
                                                     ("qkv", "o", "gate_up", "down")}) for layer in decoder.layers)
        pair.append(decoder)
    engine = stars.Engine(pair[0], CausalReward(pair[1]), cache_tokens=512, page_size=16, max_num_seqs=4,
                          max_num_lanes=8, max_segment_size=4)
    params = [stars.SamplingParams(max_tokens=7, seed=5),
              stars.SamplingParams(max_tokens=7, seed=5, top_k=9, presence_penalty=0.5, repetition_penalty=1.3)]
    policy = stars.STARS(segment_size=4, max_attempts=4, beta=0.3, reward_threshold=1.0, width=2)
    outputs = engine.generate([{"prompt_token_ids": ids(length, 23, length)} for length in (5, 20)], params, policy,
                              use_tqdm=False)
    engine.check_integrity()
    return [output.outputs[0] for output in outputs]


def test_the_engine_over_triton_gives_the_text_of_the_cpu(monkeypatch):
    """Idle lanes, rows and tiles included; tokens and verdicts equal, rewards within float32."""
    theirs = completions(on_triton=False)
    for name in OPERATIONS:
        module = importlib.import_module(f"stars.kernels.{name}")
        monkeypatch.setattr(module, "on_triton", lambda tensor: True)
        monkeypatch.setattr(module, "on_libstars", lambda tensor: False)
    monkeypatch.setattr(importlib.import_module("stars.kernels.graph"), "on_libstars", lambda done: False)
    work_as(monkeypatch, PADDED)
    ours = completions(on_triton=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.error is None and mine.token_ids == other.token_ids
        for segment, same in zip(mine.segments, other.segments, strict=True):
            for attempt, its in zip(segment.attempts, same.attempts, strict=True):
                assert (attempt.token_ids, attempt.accepted) == (its.token_ids, its.accepted)
                assert attempt.reward == pytest.approx(its.reward, abs=1e-4)
    assert sum(len(segment.attempts) for one in ours for segment in one.segments) > 4


run_in_interpreter(globals())
