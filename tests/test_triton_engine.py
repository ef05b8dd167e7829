"""The whole engine over the Triton kernels, in the interpreter, in the shapes of captured graphs: the CPU's text."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import stars
from building import PADDED, as_on_a_gpu, fused_up_to, work_as
from letters import Letters
from stars import kernels
from stars.kernels import dispatch, graph
from stars.kernels.linear import Weight, pack
from stars.kernels.triton import tuned
from stars.model.decoder import Decoder
from stars.model.tokenizer import Tokenizer, load_tokenizer
from stars.reward import CausalReward
from toy import ToyModel, ids, table_reward
from triton_process import INTERPRETED, run_in_interpreter

SIZES = dict(vocab=23, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=64, layers=2)

if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_this_numpy(tensor, scope) -> None:
        """NumPy from 2.4 on converts no array of one element by int(), as Triton 3.6 does for computed loop bounds."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_for_this_numpy


def as_dequantised(decoder: Decoder) -> Decoder:
    """The CPU's decoder of the matrices that a quantised one's weights stand for."""
    def packed(weight: Weight | None) -> Weight | None:
        return None if weight is None else pack(weight.dense().float().contiguous(), weight.bias)

    layers = [layer._replace(**{name: packed(getattr(layer, name)) for name in ("qkv", "o", "gate_up", "down")})
              for layer in decoder.layers]
    return Decoder(decoder.config, packed(decoder.embedding), layers, decoder.final_norm, packed(decoder.head),
                   packed(decoder.score_head), decoder.cos, decoder.sin, decoder.max_rows)


def pair(scheme: str = "fp32") -> tuple[Decoder, Decoder]:
    """A language model and a reward model with weights as a GPU has them."""
    lm, rm = (as_on_a_gpu(model.decoder(), scheme) for model in (
        ToyModel(seed=1, **SIZES), ToyModel(seed=2, head="reward", **SIZES)))
    return lm, rm


def completions(lm: Decoder, rm: Decoder) -> list[stars.CompletionOutput]:
    engine = stars.Engine(lm, CausalReward(rm), cache_tokens=512, page_size=16, max_num_seqs=4, max_num_lanes=8,
                          max_segment_size=4)
    params = [stars.SamplingParams(max_tokens=7, seed=5),
              stars.SamplingParams(max_tokens=7, seed=5, top_k=9, presence_penalty=0.5, repetition_penalty=1.3)]
    policy = [stars.STARS(segment_size=4, max_attempts=4, beta=0.3, reward_threshold=1.0, width=2),
              stars.CARDS(2.6, 1, 4, 4, beta=0.3, reward_threshold=1.0, width=2)]
    outputs = engine.generate([{"prompt_token_ids": ids(length, 23, length)} for length in (5, 20)],
                              params, policy, use_tqdm=False)
    engine.check_integrity()
    return [output.outputs[0] for output in outputs]


def same_text(monkeypatch, lm: Decoder, rm: Decoder) -> Counter[str]:
    """Over the Triton kernels as on the CPU, idle lanes, rows and tiles included: equal tokens and verdicts, rewards
    within float32. Returns how often products of either list of a decoder were formed, by their weights' schemes."""
    theirs = completions(as_dequantised(lm), as_dequantised(rm))
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    monkeypatch.setattr(graph, "column", lambda done: "reference")
    work_as(monkeypatch, PADDED)
    called: Counter[str] = Counter()

    def counted(name, operation):
        return lambda *given: (called.update([(name, given[1].scheme)]), operation(*given))[1]

    for name in ("linear", "qkv_rope"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    ours = completions(lm, rm)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.error is None and mine.token_ids == other.token_ids
        for segment, same in zip(mine.segments, other.segments, strict=True):
            for attempt, its in zip(segment.attempts, same.attempts, strict=True):
                assert (attempt.token_ids, attempt.accepted) == (its.token_ids, its.accepted)
                assert attempt.reward == pytest.approx(its.reward, abs=1e-4)
    assert sum(len(segment.attempts) for one in ours for segment in one.segments) > 4
    return called


def test_the_engine_over_triton_gives_the_text_of_the_cpu(monkeypatch):
    assert set(same_text(monkeypatch, *pair())) == {("linear", "fp32")}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_logits_of_16_bits_are_products_in_float32(monkeypatch, dtype):
    """Rounded to 16 bits, more than one in thirty would be lost in an equal of its row."""
    decoder = as_on_a_gpu(ToyModel(vocab=997, hidden=96, heads=2, head_dim=16, seed=4).decoder(), dtype)
    hidden = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).to(decoder.dtype)
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    logits = decoder.logits(hidden)
    left, right = hidden.double(), decoder.head.values.double().T
    assert logits.dtype == torch.float32
    assert bool(((logits - left @ right).abs() <= 1e-6 * (left.abs() @ right.abs())).all())
    for row in logits:
        assert len(row.to(decoder.dtype).unique()) < 0.97 * 997 < 0.99 * 997 < len(row.unique())


def test_fused_passes_give_the_text_of_the_cpu(monkeypatch):
    """Of quantised weights and, as a table says so, of others; prompts go through the single operations."""
    monkeypatch.setattr(tuned, "MAX_FUSED_ROWS", 16)
    lm, rm = pair("int4-32")[0], pair()[1]
    with tuned.using(fused_up_to(16, rm)):
        rm.reserve_fused()
        called = same_text(monkeypatch, lm, rm)
    assert set(called) == {(name, scheme) for name in ("linear", "qkv_rope") for scheme in ("int4-32", "fp32")}


def guided(decoders: list[Decoder]) -> list[stars.CompletionOutput]:
    """Of one batch: a guide, the guide alone, a guide and a reference, whose lanes and weights are several."""
    lm, guide, reference = decoders
    engine = stars.Engine(lm, models={"guide": guide, "reference": reference}, cache_tokens=512, page_size=16,
                          max_num_seqs=4, max_num_lanes=8, max_segment_size=16)
    params = [stars.SamplingParams(max_tokens=3, seed=5, n=2), stars.SamplingParams(max_tokens=3, seed=6, top_k=9),
              stars.SamplingParams(max_tokens=3, seed=7, presence_penalty=0.5)]
    policy = [stars.TokenGuidance(), stars.TokenGuidance(reference="lm"),
              stars.TokenGuidance(reference="reference", weight=0.8)]
    outputs = engine.generate([{"prompt_token_ids": ids(length, 23, length)} for length in (5, 9, 20)],
                              params, policy, use_tqdm=False)
    engine.check_integrity()
    return [completion for output in outputs for completion in output.outputs]


def test_blended_drafts_give_the_text_of_the_cpu(monkeypatch):
    """Models of other heads and widths than the first, whose attention has tiles of its own."""
    models = [ToyModel(seed=1, **SIZES), ToyModel(seed=2, **(SIZES | dict(heads=4, kv_heads=2, layers=1))),
              ToyModel(seed=3, **(SIZES | dict(hidden=64, layers=1)))]
    theirs = guided([as_dequantised(as_on_a_gpu(model.decoder())) for model in models])
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    monkeypatch.setattr(graph, "column", lambda done: "reference")
    work_as(monkeypatch, PADDED)
    ours = guided([as_on_a_gpu(model.decoder()) for model in models])
    assert len(ours) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.error is None and mine.token_ids == other.token_ids and len(mine.token_ids) > 1
        assert mine.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)


def edited(lm: Decoder) -> list[stars.RequestOutput]:
    """Biases, bans, a minimum and a grammar, each beside the others and beside a request without any."""
    letters = Letters("abcdefghijklmnopqrstu ")
    table = table_reward(3)
    reward = stars.FunctionReward(lambda prompt, responses: [table(one) for one in responses], inputs="ids")
    engine = stars.Engine(lm, reward, tokenizer=letters, cache_tokens=512, page_size=16, max_num_seqs=4,
                          max_num_lanes=8, max_segment_size=3)
    params = [stars.SamplingParams(max_tokens=5, seed=5, min_tokens=4, logit_bias={0: 9.0, 3: 4.0, 4: 4.0},
                                   bad_words=["cd", "h"], repetition_penalty=1.3),
              stars.SamplingParams(max_tokens=5, seed=6, structured_outputs={"regex": "[ac][d-f]{2}[bg]"}),
              stars.SamplingParams(max_tokens=5, seed=7, allowed_token_ids=[2, 5, 22], ignore_eos=True),
              stars.SamplingParams(max_tokens=5, seed=8, ignore_eos=True)]
    policy = stars.STARS(segment_size=3, max_attempts=2, beta=0.3, reward_threshold=1.0, width=2)
    outputs = engine.generate([{"prompt_token_ids": ids(5, 23, 5)}] * 4, params, policy, use_tqdm=False)
    engine.check_integrity()
    return outputs


def test_edits_and_grammars_are_those_of_the_cpu(monkeypatch):
    pytest.importorskip("llguidance")
    model = ToyModel(seed=1, **SIZES)
    theirs = edited(as_dequantised(as_on_a_gpu(model.decoder())))
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    monkeypatch.setattr(graph, "column", lambda done: "reference")
    work_as(monkeypatch, PADDED)
    ours = edited(as_on_a_gpu(model.decoder()))
    for output, other in zip(ours, theirs, strict=True):
        [mine], [its] = output.outputs, other.outputs
        assert mine.error is None and mine.token_ids == its.token_ids
        assert [[(attempt.token_ids, attempt.accepted) for attempt in segment.attempts] for segment in mine.segments] \
            == [[(attempt.token_ids, attempt.accepted) for attempt in segment.attempts] for segment in its.segments]
        assert mine.cumulative_logprob == pytest.approx(its.cumulative_logprob, abs=1e-4)
    biased, shaped, allowed, _ = (output.outputs[0] for output in ours)
    assert len(biased.token_ids) >= 4 and "cd" not in biased.text and "h" not in biased.text
    assert re.fullmatch("[ac][d-f]{2}[bg]", shaped.text) and shaped.finish_reason == "stop"
    assert {*allowed.token_ids} <= {2, 5, 22}
    assert sum(len(segment.attempts) for output in ours for segment in output.outputs[0].segments) > 10


def told(decoder: Decoder) -> stars.RequestOutput:
    """Log-probabilities of two responses and of their prompt, read in two chunks, beside a request without any."""
    engine = stars.Engine(decoder, cache_tokens=512, page_size=16, max_num_seqs=4, max_num_lanes=8, max_segment_size=16,
                          max_num_batched_tokens=16)
    params = [stars.SamplingParams(max_tokens=3, seed=5, n=2, logprobs=3, prompt_logprobs=2, top_k=9,
                                   presence_penalty=0.5), stars.SamplingParams(max_tokens=1, seed=6)]
    [output, other] = engine.generate([{"prompt_token_ids": ids(18, 23, 3)}, {"prompt_token_ids": ids(5, 23, 4)}],
                                      params, stars.Sample(), use_tqdm=False)
    engine.check_integrity()
    assert other.outputs[0].logprobs is None
    return output


def test_log_probabilities_are_those_of_the_cpu(monkeypatch):
    model = ToyModel(seed=1, **SIZES)
    theirs = told(as_dequantised(as_on_a_gpu(model.decoder())))
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    monkeypatch.setattr(graph, "column", lambda done: "reference")
    work_as(monkeypatch, PADDED)
    ours = told(as_on_a_gpu(model.decoder()))
    both = [(one.token_ids, one.logprobs) for one in ours.outputs], [(one.token_ids, one.logprobs)
                                                                     for one in theirs.outputs]
    for (mine, entries), (other, its) in zip(*both, strict=True):
        assert mine == other and len(entries) == len(its) == len(mine)
    entries = [entry for _, one in both[0] for entry in one] + ours.prompt_logprobs[1:]
    its = [entry for _, one in both[1] for entry in one] + theirs.prompt_logprobs[1:]
    assert len(entries) == len(its) > 20
    for mine, other in zip(entries, its, strict=True):
        assert list(mine) == list(other) and len(mine) >= 2
        for token, one in mine.items():
            assert one.rank == other[token].rank and one.logprob == pytest.approx(other[token].logprob, abs=1e-4)


def letters(folder: Path, merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer of the letters a to w, and of pairs of them."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    tokens = [*"abcdefghijklmnopqrstuvw", *(one + other for one, other in merges)]
    backend = Backend(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.Fuse()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_a_reward_of_another_tokenizer_gives_the_cpus_rewards(monkeypatch, tmp_path):
    """It reads the text again in pairs of letters, of which the end of a segment may cut one."""
    draw = random.Random(33)  # one whose pairs undo others
    pairs = [(one, other) for one in "abcdefghijklmnopqrstuvw" for other in "abcdefghijklmnopqrstuvw"]
    own, its = letters(tmp_path / "own", []), letters(tmp_path / "its", draw.sample(pairs, 500))
    lm, rm = (as_on_a_gpu(ToyModel(seed=seed, head=head, **(SIZES | dict(vocab=vocab, layers=1))).decoder())
              for seed, head, vocab in ((1, "lm", 23), (2, "reward", 523)))

    def decoded(lm: Decoder, rm: Decoder) -> tuple[stars.CompletionOutput, list[tuple[int, int]]]:
        reward = CausalReward(rm, tokenizer=its, template="raw")
        engine = stars.Engine(lm, reward, tokenizer=own, cache_tokens=256, page_size=16, max_num_seqs=2,
                              max_num_lanes=4, max_segment_size=3)
        assert reward.needs_text
        known, planned = [], reward._plan  # of each candidate: what of it was held, and what was kept of that

        def noted(candidate):
            plan = planned(candidate)
            known.append((len(plan.session.committed), plan.start))
            return plan

        reward._plan = noted
        policy = stars.STARS(segment_size=3, max_attempts=2, beta=0.3, reward_threshold=1.0, width=2)
        [output] = engine.generate("wadecat", stars.SamplingParams(max_tokens=8, seed=5, ignore_eos=True), policy,
                                   use_tqdm=False)
        engine.check_integrity()
        return output.outputs[0], known

    theirs, kept = decoded(as_dequantised(lm), as_dequantised(rm))
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    monkeypatch.setattr(graph, "column", lambda done: "reference")
    work_as(monkeypatch, PADDED)
    ours, also = decoded(lm, rm)
    assert ours.error is None and ours.token_ids == theirs.token_ids and len(ours.token_ids) == 8
    read = [[(one.token_ids, one.accepted) for segment in each.segments for one in segment.attempts]
            for each in (ours, theirs)]
    assert read[0] == read[1] and len(read[0]) > 4
    for segment, same in zip(ours.segments, theirs.segments, strict=True):
        for attempt, its_own in zip(segment.attempts, same.attempts, strict=True):
            assert attempt.reward == pytest.approx(its_own.reward, abs=1e-4)
    assert any(start < held for held, start in kept), "no pair was cut"
    assert any(start < held for held, start in also)


run_in_interpreter(globals())
