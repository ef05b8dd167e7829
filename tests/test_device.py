"""What a GPU cannot do is refused in one sentence before any weight is read; checked here without one."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import recorded_gpu
import stars
from building import cache_of, work_as
from stars import device, fit, sizes
from stars.bindings import libstars
from stars.config import EngineConfig
from stars.errors import ModelError
from stars.model.checkpoint import Checkpoint
from stars.model.config import ModelConfig, load_config
from stars.model.loader import inspect_model
from stars.model.tokenizer import load_tokenizer
from stars.model.workspace import workspace_bytes
from stars.reward import CausalReward
from stars.reward.base import Held
from stars.sizes import Occupant
from stars.target import CUDA
from test_encoder_rewards import write_encoder
from toy import ToyModel, toy_pair

needs_libstars = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
LM = ToyModel(vocab=37, seed=1, positions=100_000)
RM = ToyModel(vocab=37, seed=2, kv_heads=2, positions=50_000, head="reward")
GIVEN = dict(page_size=16, max_num_seqs=5, max_num_lanes=9, max_segment_size=7)


def test_no_gpu(monkeypatch):
    """The sentence names what is missing and what to use instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match='needs an NVIDIA GPU .* use device="cpu"'):
        device.check_gpu()


def test_old_gpu(monkeypatch):
    """A card before Ampere is refused with its capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ModelError, match="capability 7.5 and the kernels need 8.0"):
        device.check_gpu()


def test_old_triton(monkeypatch):
    """A Triton without what the kernels use is refused with its version."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    device.check_gpu()
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    with pytest.raises(ModelError, match="triton is 3.1.0 and the kernels need 3.6"):
        device.check_gpu()


def test_head_dim_without_a_kernel():
    """The toy's head_dim of 8 has no kernel."""
    with pytest.raises(ModelError, match="head_dim 8 .* 64, 80, 96, 128, 256"):
        device.check_model(ToyModel(vocab=5, seed=0).config)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(num_heads=34, num_kv_heads=2), "17 query heads for each key head"),
    (dict(hidden_size=16392), "16392 hidden columns"), (dict(vocab_size=262145), "262145 tokens in its vocabulary"),
])
def test_shapes_without_a_kernel(changes, words):
    """What a kernel would refuse at its first launch is refused before."""
    config = dataclasses.replace(ToyModel(vocab=5, seed=0).config, head_dim=64, num_heads=32, num_kv_heads=2,
                                 vocab_size=262144, hidden_size=16384)
    device.check_model(config)
    with pytest.raises(ModelError, match=f"the model has {words} and the GPU's kernels take"):
        device.check_model(dataclasses.replace(config, **changes))
    device.check_model(dataclasses.replace(config, vocab_size=300000), sampled=False)  # nothing is drawn from rewards


def test_limits_are_those_of_the_kernels():
    pytest.importorskip("triton")
    from stars.kernels.triton import rms_norm

    assert device.MAX_HIDDEN == rms_norm.MAX_HIDDEN


def test_an_unusual_stored_type(monkeypatch):
    """On a GPU, where the checkpoint's type is the default."""
    monkeypatch.setattr("stars.config.check_gpu", lambda: None)
    config = dataclasses.replace(ToyModel(vocab=5, seed=0).config, head_dim=64, dtype="float64")
    with pytest.raises(ModelError, match="stored as float64, which is not supported: choose a dtype"):
        EngineConfig.resolve(config, "cuda")


def served() -> ModelConfig:
    """A shape that the kernels serve."""
    return dataclasses.replace(ToyModel(vocab=5, seed=0).config, head_dim=64, num_heads=4, num_kv_heads=2)


def test_auto_is_a_gpu_that_serves_the_model(monkeypatch):
    """Else the CPU: no card, an old one, no Triton or an old one, a head size without a kernel."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert EngineConfig.resolve(served()).device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    config = EngineConfig.resolve(served())
    assert (config.device, config.dtype, config.target) == ("cuda", "float32", CUDA)
    assert EngineConfig.resolve(served(), "cpu").device == "cpu"
    assert EngineConfig.resolve(ToyModel(vocab=5, seed=0).config).device == "cpu"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        assert EngineConfig.resolve(served()).device == "cpu"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert EngineConfig.resolve(served()).device == "cpu"
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    assert EngineConfig.resolve(served()).device == "cpu"
    with pytest.raises(ModelError, match="triton is 3.1.0"):
        EngineConfig.resolve(served(), "cuda")


def test_auto_is_where_a_decoder_is(monkeypatch):
    """Whose tensors are on the CPU, also where a GPU would serve it."""
    asked = []
    monkeypatch.setattr("stars.config.auto_device", lambda config: asked.append(config) or "cuda")
    engine = stars.Engine(ToyModel(vocab=5, seed=0).decoder(), cache_tokens=64)
    assert engine.config.device == "cpu" and not asked


def test_a_model_on_another_device():
    """The meta device stands for a GPU."""
    model = ToyModel(vocab=5, seed=0)
    elsewhere = model.decoder()
    elsewhere.final_norm = elsewhere.final_norm.to("meta")
    with pytest.raises(ModelError, match="the model given is on meta and the engine on cpu: load it with device='cpu'"):
        stars.Engine(elsewhere)
    with pytest.raises(ModelError, match="the reward model given is on meta"):
        stars.Engine(model.decoder(), CausalReward(elsewhere))


def on_a_gpu(config: ModelConfig = LM.config, **settings) -> EngineConfig:
    """The settings of an engine on a GPU, of which there is none here."""
    with pytest.MonkeyPatch.context() as patch:
        work_as(patch, CUDA._replace(triton=False))
        return dataclasses.replace(EngineConfig.resolve(config, **(GIVEN | settings)), target=CUDA)


def models(config: EngineConfig) -> dict[str, Occupant]:
    """Both models, their weights of 3 and 2 million bytes."""
    return {"the language model": Occupant(LM.config, torch.bfloat16, 3_000_000, True),
            "the reward model": Occupant(RM.config, torch.bfloat16, 2_000_000, False, config.max_segment_size)}


def needed(config: EngineConfig, reward: int = 0) -> int:
    return sum(sizes.needed_bytes(config, models(config), reward).values())


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("share", [0.9, 0.37, 1.0])
@pytest.mark.parametrize("reward", [0, 12345])
def test_a_cache_takes_what_memory_leaves(page_size, share, reward):
    """The most whole pages that fit beside all else, of both models alike; a page more would not."""
    config = on_a_gpu(gpu_memory_utilization=share, page_size=page_size)
    assert (config.least_cache_tokens, config.cache_tokens) == (2048, 5 * 100_000)
    draw, total = np.random.default_rng(page_size), 90_000_000_000
    for _ in range(20):
        tokens = int(draw.integers(2048 // page_size, 5 * 100_000 // page_size)) * page_size
        budget = needed(config.fitted(tokens), reward) + int(draw.integers(0, 100))
        free = budget + round((1.0 - share) * total)
        fitted = fit.fit_memory(config, models(config), reward, free, total)
        assert fitted.cache_tokens == fitted.least_cache_tokens == tokens
        assert (fitted.max_model_len, fitted.max_model_len_from) == (
            (tokens, "gpu_memory_utilization") if tokens < 100_000 else (100_000, "the model's context"))
        assert fitted == dataclasses.replace(config, **{name: getattr(fitted, name) for name in (
            "cache_tokens", "least_cache_tokens", "max_model_len", "max_model_len_from")})
    assert fit.fit_memory(config, models(config), reward, total, total).cache_tokens == 5 * 100_000


def test_the_least_is_what_was_asked_for():
    """To the byte: tokens that are given, or a length that is given; else a few thousand, or a shorter context."""
    for settings, least, most in (
            (dict(cache_tokens=777), 784, 784), (dict(max_model_len=3001), 3008, 15_008),
            (dict(), 2048, 5 * 100_000), (dict(max_num_lanes=1, max_model_len=40), 48, 48)):
        config = on_a_gpu(**settings)
        assert (config.least_cache_tokens, config.cache_tokens) == (least, most)
        total = 90_000_000_000
        free = needed(config.fitted(least)) + (0 if "cache_tokens" in settings else round(0.1 * total))
        fitted = fit.fit_memory(config, models(config), 0, free, total)
        assert fitted.cache_tokens == least
        advice = "lower cache_tokens" if "cache_tokens" in settings else "raise gpu_memory_utilization, or lower m"
        with pytest.raises(ModelError, match=f"lacks 1 MiB .*: {advice}"):
            fit.fit_memory(config, models(config), 0, free - 1, total)
    short = dataclasses.replace(LM.config, max_position_embeddings=100)
    assert on_a_gpu(short).least_cache_tokens == 112 and on_a_gpu(short).cache_tokens == 5 * 100 + 12


@pytest.mark.parametrize("settings", [dict(cache_tokens=30_000), dict(max_model_len=30_000), dict()])
def test_what_is_advised_is_enough(settings):
    """The sentence says how much is missing and the setting to change, and what it says then fits."""
    config, total = on_a_gpu(**settings), 90_000_000_000
    for tokens in (16, 1600):
        free = needed(config.fitted(tokens)) + 5 + (0 if "cache_tokens" in settings else round(0.1 * total))
        with pytest.raises(ModelError) as caught:
            fit.fit_memory(config, models(config), 0, free, total)
        found = re.search(r"lower (\w+) to (\d+)$", str(caught.value))
        assert found[1] in (settings or ["max_model_len"]) and int(found[2]) == tokens
        again = on_a_gpu(**{found[1]: tokens})
        assert fit.fit_memory(again, models(again), 0, free, total).cache_tokens >= tokens
        assert ("raise gpu_memory_utilization, or " in str(caught.value)) == ("cache_tokens" not in settings)


def test_too_little_memory():
    """The sentence adds up: what is free, what is missing, for what, and which settings to lower."""
    config = on_a_gpu(cache_tokens=1 << 20)
    weights = models(config)["the language model"]._replace(weight_bytes=6 << 30)
    with pytest.raises(ModelError) as caught:
        fit.fit_memory(config, {"the language model": weights}, 0, 5 << 30, 80 << 30)
    assert str(caught.value) == (
        "the GPU has 5.0 GiB free and lacks 2.1 GiB (6.0 GiB for the language model's weights, 65 MiB for the language "
        "model's cache, 58 MiB for captured graphs, 1.0 GiB for libraries): lower max_num_lanes, max_num_seqs or "
        "max_segment_size, or use smaller models")
    with pytest.raises(ModelError, match=r"^the GPU has 9\.0 GiB free, 1\.0 GiB of it within gpu_memory_utilization="
                                         r"0\.9, and lacks .*: raise gpu_memory_utilization, or lower max_num_lanes"):
        fit.fit_memory(on_a_gpu(), {"the language model": weights}, 0, 9 << 30, 80 << 30)


def test_a_pair_that_does_not_fit(monkeypatch):
    """All that the two models need is named, from their directories alone."""
    pair = Path(stars.__file__).parent / "demo_models"
    lm = load_config(pair / "lm")
    config = on_a_gpu(lm, cache_tokens=32768, max_num_lanes=64, max_num_seqs=64, max_segment_size=128)
    monkeypatch.setattr(fit, "choose_prefill", lambda *settings: "triton")  # which asks the card
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))
    given = config, pair / "lm", CausalReward(str(pair / "rm")), load_tokenizer(pair / "lm"), lm.vocab_size
    parts = ".*".join(f"the {model} model's {part}" for model in ("language", "reward")
                      for part in ("weights", "cache", "activations"))
    with pytest.raises(ModelError, match=f"lacks 1[.]. GiB .*{parts}.*, 1.0 GiB for libraries.*: lower max_num_lanes"):
        fit.fit(*given)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 3 << 30))
    assert fit.fit(*given) == config
    # Weights by their headers, slabs of a segment, as both read the same ids.
    occupants = [fit.occupant(config, pair / "lm", 128, True), fit.occupant(config, pair / "rm", 9, False)]
    assert [one.weight_bytes for one in occupants] == [
        2 * inspect_model(pair / name).parameters for name in ("lm", "rm")]
    assert given[2].holds(*given[3:], config) == Held(str(pair / "rm"), 128)


def test_every_model_of_a_sum_has_room(monkeypatch):
    """Each has a cache and activations of its own, weights of one directory count once, and rewards of another kind
    count besides."""
    pair = Path(stars.__file__).parent / "demo_models"
    lm = load_config(pair / "lm")
    config = on_a_gpu(lm, cache_tokens=32768, max_num_lanes=64, max_num_seqs=64, max_segment_size=128)
    monkeypatch.setattr(fit, "choose_prefill", lambda *settings: "triton")

    class Large(stars.FunctionReward):
        def holds(self, *settings):
            return Held(other_bytes=1 << 30)
    inner = stars.WeightedReward([(pair / "rm", 1.0), (Large(len), 0.0)])
    reward = stars.WeightedReward([(str(pair / "rm"), 1.0), (inner, 0.5), (stars.CachedReward(Large(len)), 1.0)])
    noted = []
    monkeypatch.setattr(fit, "fit_memory", lambda config, models, other, free, total: noted.append((models, other)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))
    fit.fit(config, pair / "lm", reward, load_tokenizer(pair / "lm"), lm.vocab_size)
    fit.fit(config, pair / "lm", CausalReward(pair / "rm"), load_tokenizer(pair / "lm"), lm.vocab_size)
    [(held, other), (alone, none)] = noted
    assert list(held) == ["the language model", "reward model 1", "reward model 2"] and other == 2 << 30 and none == 0
    assert held["reward model 1"] == alone["the reward model"]
    assert held["reward model 2"] == held["reward model 1"]._replace(weight_bytes=0)
    assert sum(sizes.needed_bytes(config, held, other).values()) > 2 << 30


def test_both_models_of_an_implicit_reward_have_room(monkeypatch):
    """With their language model heads, and what logits are read with: of a chunk's rows, and of few at a time. All of
    one directory have its weights once."""
    lm = Path(stars.__file__).parent / "demo_models" / "lm"
    shape = load_config(lm)
    config = on_a_gpu(shape, cache_tokens=32768, max_num_lanes=64, max_num_seqs=64, max_segment_size=128)
    monkeypatch.setattr(fit, "choose_prefill", lambda *settings: "triton")
    noted = []
    monkeypatch.setattr(fit, "fit_memory", lambda config, models, other, free, total: noted.append((models, other)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))
    reward = stars.WeightedReward([(stars.ImplicitReward(lm, lm), 1.0)])
    fit.fit(config, lm, reward, load_tokenizer(lm), shape.vocab_size)
    [(held, other)] = noted
    assert list(held) == ["the language model", "reward model 1", "reward model 2"]
    assert [one.weight_bytes for one in held.values()] == [2 * inspect_model(lm, "lm").parameters, 0, 0]
    assert [one.slab_len for one in held.values()][1:] == [129, 129]
    assert other == 2 * 4 * (2048 * (shape.hidden_size + 2) + 64 * shape.vocab_size)


def test_nothing_is_read_of_a_pair_that_does_not_fit(monkeypatch):
    """An engine is refused before a tensor is read; on the CPU memory is not asked for."""
    pair = Path(stars.__file__).parent / "demo_models"
    monkeypatch.setattr(Checkpoint, "read", lambda *given: pytest.fail("a tensor was read"))
    work_as(monkeypatch, CUDA._replace(triton=False, dtypes=("bfloat16",)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (11 << 28, 3 << 30))
    with pytest.raises(ModelError, match="2.5 GiB of it within gpu_memory_utilization=0.9, and lacks .*: lower m"):
        stars.Engine(pair / "lm", pair / "rm", max_num_lanes=4096)


@needs_libstars
def test_an_engine_of_what_memory_leaves(monkeypatch):
    """Both caches have the tokens that fit beside models that are there already, and the engine decodes."""
    gpu = recorded_gpu.install(monkeypatch)
    lm, rm = toy_pair(29, (1, 2), positions=4001)
    sized = dict(page_size=16, max_num_seqs=3, max_num_lanes=6, max_segment_size=16)

    def build(free: int) -> stars.Engine:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2 << 30))
        return recorded_gpu.build(gpu, lm.decoder(), CausalReward(rm.decoder()), **sized)

    engine = build(2 << 30)
    assert engine.config.cache_tokens == 12_016 and engine.config.max_model_len == 4001  # three whole responses
    held = {"the language model": Occupant(lm.config, torch.float32, 0, True),
            "the reward model": Occupant(rm.config, torch.float32, 0, False, 16)}
    enough = sum(sizes.needed_bytes(engine.config.fitted(2512), held).values()) + round(0.1 * (2 << 30))
    engine = build(enough)
    for cache in (engine._cache, engine.reward.cache):
        assert cache.num_pages == 157 and cache.k_pages.shape[1] == 2512
    assert engine.reward.cache.slab_len == 16 and engine.config.max_model_len == 2512
    params, policy = stars.SamplingParams(max_tokens=9, seed=1), stars.STARS(4, 2, reward_threshold=0.5, width=2)
    [output] = engine.generate({"prompt_token_ids": [3, 4, 5]}, params, policy, use_tqdm=False)
    assert output.outputs[0].error is None
    engine.check_integrity()
    with pytest.raises(stars.RequestError, match=r"the limit is 2512 \(gpu_memory_utilization\)"):
        engine.generate({"prompt_token_ids": [3]}, stars.SamplingParams(max_tokens=2512), use_tqdm=False)


@needs_libstars
@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
], ids=["torch", "triton", "cublas"])
@pytest.mark.parametrize("place", ["engine.PagedCache", "engine.Passes", "engine.Drafter", "reward.causal.PagedCache",
                                   "reward.causal.Passes", "draft.Drafter.warm_up", "passes.Passes.warm_up",
                                   "width.WidthChooser.measure", "reward.causal.CausalReward.warm_up"])
def test_what_the_formulas_missed_is_said_in_one_sentence(monkeypatch, place, error):
    """Wherever memory gives out while an engine is built."""
    recorded_gpu.install(monkeypatch)
    work_as(monkeypatch, recorded_gpu.TARGET._replace(captured_at_start=True))
    for nothing in ("draft.Drafter.warm_up", "passes.Passes.warm_up", "width.WidthChooser.measure"):
        monkeypatch.setattr(f"stars.{nothing}", lambda *given: None)
    monkeypatch.setattr(f"stars.{place}", raising(error))
    with pytest.raises(ModelError) as raised:
        stars.Engine(LM.decoder(), CausalReward(RM.decoder()), cache_tokens=512, **GIVEN)
    assert str(raised.value) == (
        "there is no memory for an engine of cache_tokens=512, max_num_lanes=9 and max_segment_size=7: lower them, or "
        "gpu_memory_utilization where cache_tokens is left out")
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error, refused", [
    (MemoryError(), True), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"), False),
])
def test_a_fault_that_only_names_memory_stays_what_it_is(monkeypatch, error, refused):
    monkeypatch.setattr("stars.engine.Drafter", raising(error))
    with pytest.raises(ModelError if refused else RuntimeError) as raised:
        stars.Engine(LM.decoder(), cache_tokens=512, **GIVEN)
    said = "there is no memory for an engine of cache_tokens=512, max_num_lanes=9 and max_segment_size=7: lower them"
    assert str(raised.value) == (said if refused else str(error))


def raising(error: Exception):
    def fail(*given):
        raise error
    return fail


def test_what_an_encoder_takes_is_left_free(tmp_path):
    """Its weights in float32, by the headers of its files."""
    pytest.importorskip("transformers")
    directory = write_encoder(tmp_path, "Bert")
    with safe_open(directory / "model.safetensors", "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 it is no dictionary
    config = on_a_gpu()
    assert stars.EncoderReward(directory).holds(None, 37, config) == Held(other_bytes=4 * parameters)
    assert stars.FunctionReward(len, inputs="ids").holds(None, 37, config) == Held()


def test_activations_are_those_of_the_decoder():
    """The estimate is what a decoder of that many rows allocates."""
    model = ToyModel(vocab=5, seed=0)
    decoder = model.decoder()
    decoder.reserve(100)
    decoder.reserve_logits(70)
    held = sum(t.numel() * t.element_size() for t in (*decoder._space, decoder._logits) if t is not None)
    assert workspace_bytes(model.config, 100, 70, torch.float32) == held


def test_cache_bytes_are_those_of_the_cache():
    """The estimate is what a cache of that many rows allocates."""
    config = ToyModel(vocab=5, seed=0).config
    cache = cache_of(config, page_size=4, num_pages=10, num_slabs=3, slab_len=8)
    held = sum(t.numel() * t.element_size() for t in (cache.k_pages, cache.v_pages, cache.k_slabs, cache.v_slabs))
    assert sizes.cache_bytes(config, 10 * 4 + 3 * 8, torch.float32) == held
