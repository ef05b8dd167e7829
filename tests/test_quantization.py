"""Models in fewer bits: rounded as they are read, or stored so in Hugging Face checkpoints of several formats."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stars
from editing import edit_json, edit_tensors
from lora import write_adapter
from quantised_files import Packing, write_quantised
from stars.cli.options import shipped_pair
from stars.kernels.quant import dequantize, quantize
from stars.model.checkpoint import Checkpoint
from stars.model.loader import inspect_model, load_model, open_checkpoint
from stars.model.quantization import held_bytes, scheme_of
from stars.model.source import TensorInfo
from test_loader import logits, reward

SIZES = dict(hidden=128, heads=4, kv_heads=2, intermediate=256, vocab=97)
BOUND = 1e-3
"""Of logits, relative to the largest."""
CT = "compressed-tensors"
HALF, BRAIN = torch.float16, torch.bfloat16

STORED = [
    Packing(CT, 8, form="int-quantized", scales=BRAIN), Packing(CT, 8, form="int-quantized", whole=True),
    Packing(CT, 8, form="float-quantized", scales=BRAIN), Packing(CT, 8, form="naive-quantized"),
    Packing("fp8", 8, form="fp8", whole=True), Packing(CT, 8, 128, form="pack-quantized", scales=BRAIN),
    Packing(CT, 4, 32, form="pack-quantized", scales=BRAIN), Packing(CT, 4, 64, True, "pack-quantized", BRAIN),
    Packing(CT, 4, 128, form="pack-quantized"), Packing(CT, 4, form="pack-quantized"),
    Packing("awq", 4, 32, True), Packing("awq", 4, 64, True), Packing("awq", 4, 128, True),
    Packing("gptq", 4, 32, True, "gptq"), Packing("gptq", 4, 64, True, "gptq_v2"), Packing("gptq", 4, 128, form="gptq"),
    Packing("gptq", 4, form="gptq"), Packing("gptq", 8, 64, form="gptq"), Packing("gptq", 8, form="gptq_v2"),
]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()


def rounded_twin(directory: Path, target: Path, scheme: str, tied: bool) -> Path:
    """A plain checkpoint of the numbers that rounding leaves."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        kind = "int8" if tied and "embed" in name else scheme if (
            name.endswith("_proj.weight") or name == "lm_head.weight") else None
        if kind is not None:
            tensors[name] = dequantize(quantize(tensor, kind, 32 if kind == "int4" else 0))
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((directory / "config.json").read_text())
    return target


# -- rounded as they are read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_logits_are_those_of_the_rounded_numbers(tiny_model, tmp_path, scheme, tied):
    directory = tiny_model(tied=tied, attention_bias=True, dtype="bfloat16", **SIZES)
    twin = rounded_twin(directory, tmp_path / "twin", scheme, tied)
    found = logits(directory, quantization=scheme)
    close(found, logits(twin))
    assert (found - logits(directory)).abs().max() > 3 * BOUND  # something was rounded
    decoder = load_model(directory, quantization=scheme)
    assert (decoder.head is decoder.embedding) == tied
    assert torch.equal(decoder.layers[1].down.dense(),
                       load_file(twin / "model.safetensors")["model.layers.1.mlp.down_proj.weight"])
    embedding = load_file((twin if tied else directory) / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(decoder.embedding.dense().float(), embedding.float())


def test_rewards_are_those_of_the_rounded_numbers_and_their_head_is_float32(tiny_model, tmp_path):
    directory = tiny_model(head="reward", **SIZES)
    decoder = load_model(directory, head="reward", quantization="int4")
    assert torch.equal(decoder.score_head.dense().float(), load_file(directory / "model.safetensors")["score.weight"])
    twin = rounded_twin(directory, tmp_path / "twin", "int4", False)
    for engine in (stars.Engine(tiny_model(**SIZES), directory, reward_quantization="int4"),
                   stars.Engine(tiny_model(**SIZES), stars.CausalReward(directory, quantization="int4"))):
        found = scored(engine)
        expected = scored(stars.Engine(tiny_model(**SIZES), twin))
        assert abs(found - expected) < BOUND * max(1, abs(expected))
        assert abs(found - scored(stars.Engine(tiny_model(**SIZES), directory))) > BOUND


def scored(engine: stars.Engine) -> float:
    params = stars.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    ids = list(range(3, 15))  # of the prompt; its reward is that of a response that the model's argmax gives
    return engine.generate({"prompt_token_ids": ids}, params, stars.Sample(score=True),
                           use_tqdm=False)[0].outputs[0].reward


def test_models_of_an_engine_follow_it_and_each_reward_says_its_own(tiny_model, tmp_path):
    """One directory in two precisions is held twice; in one, once."""
    lm = tiny_model(**SIZES)
    engine = stars.Engine(lm, stars.ImplicitReward(lm, lm), quantization="int8", models={"other": lm})
    assert engine.config.quantization == "int8" and " in int8" in repr(engine)
    own = engine._models.own.decoder
    policy, reference = engine.reward.parts
    assert policy.decoder.layers[0].qkv is reference.decoder.layers[0].qkv  # as stored
    assert policy.decoder.layers[0].qkv is not own.layers[0].qkv
    assert policy.decoder.embedding is own.embedding  # its rows are looked up, and stay as they are
    assert engine._models.members[1:] == []  # it is the engine's own
    both = stars.Engine(lm, stars.ImplicitReward(lm, lm, quantization="int4"), reward_quantization="int8")
    assert all(part.quantization == "int4" for part in both.reward.parts)
    assert both._models.own.decoder.layers[0].qkv is not both.reward.parts[0].decoder.layers[0].qkv


def test_adapters_are_beside_rounded_bases(tiny_model, tmp_path):
    directory = tiny_model(**SIZES)
    adapter = write_adapter(tmp_path / "adapter", directory, scale=0.5)
    twin = rounded_twin(directory, tmp_path / "twin", "int8", False)
    other = write_adapter(tmp_path / "other", twin, scale=0.5)
    close(logits(adapter, quantization="int8"), logits(other))
    decoder = load_model(adapter, quantization="int8")
    assert all(pair.down.dtype == torch.float32 for pair in decoder.adapters)


def test_what_a_gpu_holds_is_reckoned(tiny_model):
    """To the byte of what `pack` makes of a tensor there."""
    info = TensorInfo((64, 256), "BF16", "")
    assert [held_bytes(info, scheme, 2) for scheme in (None, "int8", "fp8", "int4")] == [
        2 * 64 * 256, 64 * 256 + 4 * 64, 64 * 256 + 4 * 64, 64 * 128 + 4 * 64 * 8]
    assert held_bytes(TensorInfo((64, 256), "INT4-128", ""), None, 2) == 64 * 128 + 8 * 64 * 2
    assert held_bytes(TensorInfo((64, 256), "Q4_0", ""), "int8", 2) == 64 * 128 + 4 * 64 * 8
    assert held_bytes(TensorInfo((64, 256), "Q6_K", ""), None, 2) == 2 * 64 * 256
    names = ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
             "model.layers.0.self_attn.q_proj.bias", "score.weight")
    assert [scheme_of(name, "int4", True) for name in names] == ["int4", "int4", "int8", None, None, None]
    assert scheme_of("embed_tokens.weight", "int4", False) is None and scheme_of(names[0], None, True) is None


def test_the_shipped_pair_in_eight_bits_scores_alike():
    """Rewards of 24 texts in 8 bits: within a twentieth of their spread, and nearly in the same order."""
    lm, rm = shipped_pair()
    prompts = [f"{start} {rest}" for start in ("This film", "The acting", "I", "After an hour it")
               for rest in ("was the worst", "is a delight", "would", "made me sleep", "and the cast", "never")]
    rewards = []
    for quantization in (None, "int8"):
        engine = stars.Engine(lm, rm, dtype="float32", reward_quantization=quantization)
        params = stars.SamplingParams(max_tokens=6, seed=1)
        rewards.append(torch.tensor([output.outputs[0].reward for output in engine.generate(
            prompts, params, stars.Sample(score=True), use_tqdm=False)]))
    plain, rounded = rewards
    ranks = torch.stack([one.argsort().argsort().double() for one in rewards])
    assert (plain - rounded).abs().max() < 0.05 * plain.std() and torch.corrcoef(ranks)[0, 1] > 0.99


# -- stored so --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", STORED, ids=str)
def test_a_quantised_checkpoint_gives_the_logits_of_its_numbers(tiny_model, tmp_path, how):
    """Packed bit by bit in this file's neighbour; two ignored modules make products of several kinds."""
    directory, plain = write_quantised(tiny_model(tied=True, attention_bias=True, **SIZES), tmp_path / "model", how)
    numbers, source = load_file(plain / "model.safetensors"), open_checkpoint(directory)
    assert source.num_layers == 2 and source.tensors.keys() == numbers.keys()
    for name, tensor in numbers.items():
        read = source.read(name)
        assert source.tensors[name].shape == tensor.shape
        assert torch.equal(read if isinstance(read, torch.Tensor) else dequantize(read), tensor), name
    close(logits(directory), logits(plain))


def test_such_rewards_and_bases_of_adapters(tiny_model, tmp_path):
    how = Packing("awq", 4, 32, True)
    directory, plain = write_quantised(tiny_model(head="reward", **SIZES), tmp_path / "model", how)
    close(reward(directory), reward(plain))
    directory, plain = write_quantised(tiny_model(**SIZES), tmp_path / "lm", how)
    adapters = [write_adapter(tmp_path / f"adapter{index}", plain, named=str(base))
                for index, base in enumerate((directory, plain))]
    close(*map(logits, adapters))
    engine = stars.Engine(plain, models={"awq": directory}, quantization="int8")  # which is left as it is
    close(engine._models.members[1].decoder.layers[0].o.dense(), load_model(plain).layers[0].o.dense())


def test_what_a_quantised_checkpoint_may_be_asked_for(tiny_model, tmp_path):
    how = Packing("gptq", 4, 32, True, "gptq")
    directory, _ = write_quantised(tiny_model(**SIZES), tmp_path / "model", how)
    assert stars.Engine(directory, quantization="gptq").config.quantization is None
    for given in (lambda: load_model(directory, quantization="int8"), lambda: stars.Engine(directory,
                                                                                          quantization="awq")):
        with pytest.raises(stars.StarsError, match="the model is stored as gptq already: leave quantization out"):
            given()
    summary = inspect_model(directory)
    assert not summary.missing and not summary.unexpected
    expected = sum(info.nbytes for info in open_checkpoint(directory).tensors.values())
    assert summary.bytes == expected


REFUSED = [
    ({"quant_method": "bitsandbytes"}, "is quantised with bitsandbytes, which is not supported"),
    ({"quant_method": "mxfp4"}, "is quantised with mxfp4"), ({"quant_method": "hqq"}, "is quantised with hqq"),
    ({"quant_method": CT, "format": "nvfp4-pack-quantized"}, "compressed-tensors in the format 'nvfp4-pack-quantized'"),
    ({"quant_method": CT, "format": "marlin-24"}, "compressed-tensors in the format 'marlin-24'"),
    ({"quant_method": CT, "format": "pack-quantized", "kv_cache_scheme": {"num_bits": 8}}, "a scheme for the KV cache"),
    ({"quant_method": CT, "format": "pack-quantized", "config_groups": {"a": {"weights": {"num_bits": 3}}}},
     "compressed-tensors of 3 bits of type 'int'"),
    ({"quant_method": CT, "format": "float-quantized", "config_groups": {"a": {"weights": {
        "num_bits": 8, "type": "float", "strategy": "block"}}}}, "by the strategy 'block'"),
    ({"quant_method": CT, "format": "pack-quantized", "transform_config": {"a": 1}}, "transforms of the activations"),
    ({"quant_method": CT, "format": "int-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}},
     "the sparse format 'sparse-24-bitmask'"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 in blocks of [128, 128]"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq in the layout version = 'gemv'"),
    ({"quant_method": "awq", "bits": 8}, "awq of bits = 8"), ({"quant_method": "gptq", "bits": 3}, "gptq of bits = 3"),
    ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "gptq in marlin's layout"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq in the format 'marlin'"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"down": {"bits": 8}}}, "gptq whose modules differ (dynamic)"),
    ({"quant_method": "gptq", "bits": 4}, "says that it is quantised with gptq, and no tensor is"),
]


@pytest.mark.parametrize("given, message", REFUSED, ids=lambda value: str(value)[:40])
def test_schemes_that_are_not_read_are_named(tiny_model, copied, monkeypatch, given, message):
    """In one sentence that says what to do, before a tensor is read."""
    copy = copied(tiny_model(**SIZES))
    edit_json(copy / "config.json", quantization_config=given)
    monkeypatch.setattr(Checkpoint, "read", lambda *args: pytest.fail("a tensor was read"))
    with pytest.raises(stars.ModelError, match=re.escape(message)) as seen:
        stars.Engine(copy)
    assert ": use " in str(seen.value) and "\n" not in str(seen.value)


BROKEN = [
    (Packing("gptq", 4, 32, True, "gptq"), "g_idx", lambda one: one.flip(0), "in the order of their activations"),
    (Packing("gptq", 4, 32, True, "gptq"), "qzeros", lambda one: one[1:].clone(), "qzeros of .* is I32"),
    (Packing("gptq", 4, 32, True, "gptq"), "scales", None, "scales of .* is not there, which does not fit"),
    (Packing("gptq", 8, 64, form="gptq"), "qzeros", lambda one: one + 1, "8 bits with zeros of their own"),
    (Packing("awq", 4, 32, True), "qzeros", None, "qzeros of .* is not there"),
    (Packing("awq", 4, 32, True), "scales", lambda one: one * torch.inf, "scales that are NaN or infinite"),
    (Packing(CT, 8, form="int-quantized"), "weight_scale", lambda one: one[1:], "weight_scale of .* is F16"),
    (Packing(CT, 8, form="float-quantized"), "weight", lambda one: torch.full_like(one, torch.nan), "has NaN"),
    (Packing(CT, 4, 32, form="pack-quantized"), "weight_shape", lambda one: one + 8,
     "weight_(shape|packed) of .* is I"),
    (Packing(CT, 4, 32, True, "pack-quantized"), "weight_zero_point", None, "weight_zero_point of .* is not there"),
    (Packing(CT, 4, 32, form="pack-quantized"), "weight_scale", lambda one: one.repeat(1, 2),
     "128 columns in 8 groups, and groups of a multiple of 32 columns are read"),
]


@pytest.mark.parametrize("how, part, change, message", BROKEN, ids=lambda value: str(value)[:30])
def test_tensors_that_do_not_fit_are_named(tiny_model, tmp_path, how, part, change, message):
    directory, _ = write_quantised(tiny_model(**SIZES), tmp_path / "model", how)
    tensors = load_file(directory / "model.safetensors")
    name = f"model.layers.1.self_attn.o_proj.{part}"
    changed = ... if change is None else change(tensors[name].float()).to(tensors[name].dtype) if (
        tensors[name].dtype == torch.float8_e4m3fn) else change(tensors[name])
    edit_tensors(directory, **{name.replace(".", "__"): changed})
    with pytest.raises(stars.ModelError, match=message) as seen:
        load_model(directory)
    assert "model.layers.1.self_attn.o_proj" in str(seen.value) and "\n" not in str(seen.value)


# -- refusals of `quantization` ---------------------------------------------------------------------------------------


def test_what_cannot_be_rounded_is_refused_by_name(tiny_model, monkeypatch):
    """hidden_size 36 is no multiple of 32: nothing is read, of a reward model not even of the language model."""
    odd, even = tiny_model(), tiny_model(**SIZES)
    odd_reward = tiny_model(head="reward", vocab=97)
    assert stars.Engine(odd, quantization="int8").config.quantization == "int8"
    monkeypatch.setattr(Checkpoint, "read", lambda *args: pytest.fail("a tensor was read"))
    columns = ("q_proj.weight of .* has 36 columns, which int4 cannot divide into groups of 32: "
               'use quantization="int8"')
    for given in (lambda: stars.Engine(odd, quantization="int4"), lambda: load_model(odd, quantization="int4"),
                  lambda: stars.Engine(even, odd_reward, reward_quantization="int4"),
                  lambda: stars.Engine(even, models={"odd": odd}, quantization="int4")):
        with pytest.raises(stars.ModelError, match=columns):
            given()


def test_values_of_quantization(tiny_model):
    directory, decoder = tiny_model(**SIZES), load_model(tiny_model(**SIZES))
    for name in ("quantization", "reward_quantization"):
        for value in ("int3", 8, "fp8", "awq"):
            with pytest.raises(stars.RequestError, match=f'{name} is .*{value}.*, it must be None, "int8" or "int4" on '
                                                         'device "cpu"'):
                stars.Engine(directory, **{name: value})
    with pytest.raises(stars.ModelError, match="quantization is 'fp8', .*: no CPU multiplies its numbers"):
        load_model(directory, quantization="fp8")
    with pytest.raises(stars.RequestError, match=r"model is a Decoder.*: give load_model\(DIR, quantization=...\)"):
        stars.Engine(decoder, quantization="int8")
    with pytest.raises(stars.RequestError, match="there is no reward model whose weights are read here: leave it out"):
        stars.Engine(directory, lambda prompt, responses: [0.0] * len(responses), reward_quantization="int8")
    with pytest.raises(stars.RewardError, match='CausalReward.quantization is \'int5\', it must be "auto", None'):
        stars.CausalReward(directory, quantization="int5")
    with pytest.raises(stars.RewardError, match="ImplicitReward.quantization belongs to a directory, and model is a"):
        stars.ImplicitReward(decoder, decoder, quantization="int8")
    with pytest.raises(stars.RequestError, match='give quantization="int8"'):
        stars.Engine(directory, load_in_8bit=True)


def test_weights_that_are_no_numbers_are_not_rounded(tiny_model, copied):
    copy = copied(tiny_model(**SIZES))
    edit_tensors(copy, model__layers__1__mlp__up_proj__weight=torch.full((256, 128), torch.nan))
    with pytest.raises(stars.ModelError, match="layers.1.mlp.up_proj.weight of .* cannot be rounded to int8 .*finite"):
        load_model(copy, quantization="int8")
