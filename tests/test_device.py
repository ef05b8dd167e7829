"""What a GPU cannot do is refused in one sentence before any weight is read; checked here without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import stars
from building import cache_of
from stars import device, fit, sizes
from stars.config import EngineConfig
from stars.errors import ModelError
from stars.model.decoder import workspace_bytes
from stars.model.loader import inspect_model
from stars.reward import CausalReward
from stars.target import CUDA
from toy import ToyModel


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


def test_a_model_on_another_device():
    """The meta device stands for a GPU."""
    model = ToyModel(vocab=5, seed=0)
    elsewhere = model.decoder()
    elsewhere.final_norm = elsewhere.final_norm.to("meta")
    with pytest.raises(ModelError, match="the model given is on meta and the engine on cpu: load it with device='cpu'"):
        stars.Engine(elsewhere)
    with pytest.raises(ModelError, match="the reward model given is on meta"):
        stars.Engine(model.decoder(), CausalReward(elsewhere))


def test_too_little_memory():
    """The sentence adds up: what is free, what is missing, for what, and which settings to lower."""
    fit.check_memory({"weights": 2 << 30, "caches": 1 << 30}, 3 << 30)
    with pytest.raises(ModelError, match=r"4\.0 GiB free and lacks 2\.5 GiB \(6\.0 GiB for weights, 0\.5 GiB for caches"
                                         r"\): lower cache_tokens"):
        fit.check_memory({"weights": 6 << 30, "caches": 1 << 29}, 4 << 30)


def test_a_pair_that_does_not_fit(monkeypatch):
    """All that the two models need is named, from their directories alone."""
    models = Path(stars.__file__).parent / "demo_models"
    config = dataclasses.replace(EngineConfig.resolve(inspect_model(models / "lm").config), device="cuda", target=CUDA)
    monkeypatch.setattr(fit, "choose_prefill", lambda *settings: "triton")  # which asks the card
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))
    parts = ".*".join(f"the {model} model's {part}" for model in ("language", "reward")
                      for part in ("weights", "cache", "activations"))
    with pytest.raises(ModelError, match=f"lacks 2[.]. GiB .*{parts}.*, 2.0 GiB for libraries .*: lower cache_tokens"):
        fit.check_fit(config, models / "lm", CausalReward(str(models / "rm")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 3 << 30))
    fit.check_fit(config, models / "lm", CausalReward(str(models / "rm")))


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
