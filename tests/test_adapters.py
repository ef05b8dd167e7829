"""LoRA adapters beside their base: the arithmetic of peft and of the merged model, the base held once, bad files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stars
from building import as_on_a_gpu
from editing import edit_config, edit_json
from lora import ALL, QKVO, merge, write_adapter
from stars.errors import ModelError
from stars.fit import occupant
from stars.kernels.linear import pack
from stars.model import low_rank
from stars.model.adapters import NEUTRAL
from stars.model.config import load_config
from stars.model.loader import inspect_model, load_model
from test_loader import logits, reward
from test_models import addresses, decoders_of

FAMILIES = {
    "llama": dict(family="llama"),
    "biases": dict(family="llama", attention_bias=True, mlp_bias=True, tied=True),
    "qwen2": dict(family="qwen2", dtype="bfloat16", sharded=False),
    "qwen3": dict(family="qwen3", head_dim=10),
}
ADAPTERS = {
    "all": dict(modules=ALL),
    "attention's queries and values": dict(modules=("q_proj", "v_proj"), rank=1, dtype=torch.bfloat16),
    "up alone": dict(modules=("up_proj",), rank=16, use_rslora=True),
    "ranks of their own": dict(modules=(*QKVO, "down_proj"), ranks={"k_proj": 7, "o_proj": 2},
                               alpha_pattern={"k_proj": 11, "layers.1.self_attn.o_proj": 0.5}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_are_those_of_the_merged_model(tiny_model, tmp_path, operations, family, adapter):
    """Of float32 all of it: sums of a few hundred products, twice as many roundings, of logits of about ten."""
    base = tiny_model(**FAMILIES[family])
    beside = write_adapter(tmp_path / "adapter", base, scale=1.0, **ADAPTERS[adapter])
    merged = merge(beside, base, tmp_path / "merged")
    ours, theirs, without = (logits(directory, dtype="float32") for directory in (beside, merged, base))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (ours - without).abs().max() > 1e-2 * theirs.abs().max()


def test_logits_are_those_of_transformers_with_the_products_beside(tiny_model, tmp_path):
    """y = W x + b + scale * B (A x), in the order in which peft forms it, hooked into transformers' own model."""
    import transformers

    base = tiny_model(family="qwen2", vocab=101)
    adapter = write_adapter(tmp_path / "adapter", base, rank=5, alpha=8.0, scale=1.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    low = load_file(adapter / "adapter_model.safetensors")

    def beside(down: torch.Tensor, up: torch.Tensor):
        return lambda module, given, out: out + (given[0] @ down.T) @ up.T * (8.0 / 5)

    hooked = 0
    for name, module in model.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in low:
            module.register_forward_hook(beside(low[key], low[key.replace("lora_A", "lora_B")]))
            hooked += 1
    assert hooked == 2 * len(ALL)
    with torch.no_grad():
        theirs = model(torch.tensor([[5, 9, 60, 33, 7]])).logits[0, -1]
    ours = logits(adapter)[0]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def base(tiny_model) -> Path:
    return tiny_model(tokenizer=True, chat_template=True)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "guide", base, scale=1.0)


@pytest.mark.parametrize("own", ["base", "adapter", "another"])
def test_the_base_is_held_once(base, adapter, tiny_model, copied, own):
    """Beside the engine's own model, which may be an adapter itself, and where two adapters have one base."""
    second = copied(adapter)
    models = {"one": adapter, "two": second, "plain": base}
    engine = stars.Engine({"base": base, "adapter": adapter, "another": copied(base)}[own], models=models)
    found = decoders_of(engine)
    one, two, plain = addresses(*(found[name] for name in ("one", "two", "plain")))
    assert one == two == plain and found["one"] is not found["two"]
    assert (addresses(found["lm"])[0] == one) == (own != "another")
    assert found["one"].head is found["plain"].head
    assert len(engine._cache.stores) == {"base": 3, "adapter": 3, "another": 4}[own]
    products = len(load_model(adapter).adapters)
    assert products == 8 and [len(found[name].adapters) for name in ("one", "two", "plain")] == [8, 8, 0]


@pytest.mark.parametrize("named", ["org/name", "../nowhere", ""])
def test_an_adapter_of_a_base_that_is_not_here_is_one_of_the_engines_own_model(base, tmp_path, named):
    adapter = write_adapter(tmp_path / "adapter", base, named=named or " ")
    engine = stars.Engine(base, models={"guide": adapter})
    own, guide = addresses(*decoders_of(engine).values())
    assert own == guide
    with pytest.raises(ModelError, match="is an adapter of .*, which is not a directory here, nor whole in the "
                                         "hub's cache: set base_model_name_or_path in its adapter_config.json"):
        load_model(adapter)


def test_bases_are_found_beside_their_adapter(base, copied, tmp_path, monkeypatch):
    """By the adapter's own directory first, then by the one that one is in."""
    home = copied(base)
    adapter = write_adapter(home.parent / "guide", home, named=f"../{home.name}")
    monkeypatch.chdir(tmp_path)
    engine = stars.Engine(adapter)
    assert addresses(decoders_of(engine)["lm"]) and engine.tokenizer is not None and engine.tokenizer.has_chat_template
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=home.name)  # from the directory one is in
    assert load_config(adapter) == load_config(home)


def texts(model, **options) -> list[list[int]]:
    """Token ids of several requests, with prompts longer than a pass of one row."""
    engine = stars.Engine(model, **options)
    params = [stars.SamplingParams(max_tokens=14, seed=seed, temperature=0.7) for seed in range(4)]
    prompts = ["The quick brown fox", "Once", "A reward model reads the whole text and", "Numbers such as 3"]
    return [output.outputs[0].token_ids for output in engine.generate(prompts, params, use_tqdm=False)]


def test_texts_are_those_of_the_merged_model(base, adapter, tmp_path):
    merged = merge(adapter, base, tmp_path / "merged")
    assert texts(adapter) == texts(merged) != texts(base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_engines_keep_their_promise(adapter, dtype):
    together = texts(adapter, deterministic=True, dtype=dtype)
    assert together == texts(adapter, deterministic=True, dtype=dtype, max_num_lanes=1)


def test_a_decoder_that_grows_has_room(adapter):
    decoder = load_model(adapter, max_rows=2)
    before = decoder._room
    decoder.reserve(7)
    assert decoder._room is not before and before.low.numel() == 2 * 9 and before.delta.numel() == 2 * 104
    assert decoder._room.low.numel() == 7 * 9 and decoder._room.delta.numel() == 7 * 104  # qkv's ranks, gate and up


def test_rows_wider_than_a_norm_are_added_in_pieces(monkeypatch):
    """Exactly what one piece gives: sums of two numbers, element by element."""
    generator = torch.Generator().manual_seed(1)
    down, up = (pack(torch.randn(shape, generator=generator)) for shape in ((3, 10), (84, 3)))
    pair = low_rank.LowRank(down, up)
    x, out = torch.randn(5, 10, generator=generator), torch.randn(5, 84, generator=generator)
    outs = []
    for most in (84, 83, 42, 5, 1):
        monkeypatch.setattr(low_rank, "MAX_HIDDEN", most)
        outs.append(out.clone())
        low_rank.add_low_rank(x, pair, outs[-1], low_rank.adapter_room([pair], 6, torch.float32, x.device))
        assert torch.equal(outs[-1], outs[0])
    expected = out.double() + x.double() @ down.dense().double().T @ up.dense().double().T
    assert (outs[0] - expected).abs().max() < 1e-5


def test_a_gpus_decoder_takes_the_single_operations(base, adapter):
    """The fused products have no sums beside them, and launches are counted."""
    plain, beside = (as_on_a_gpu(load_model(directory)) for directory in (base, adapter))
    assert beside._fusing is None and beside.adapter_launches == 8 * 3
    assert beside.launches(4) == 10 * 2 + 2 + 24 and plain.launches(4) <= 10 * 2 + 2


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", "model.norm", "model.layers.1.mlp.up_proj"])
def test_modules_that_were_trained_whole(tiny_model, tmp_path, module):
    """They take the place of the base's; all else is shared."""
    base = tiny_model()
    held = load_file(base / "model.safetensors")[f"{module}.weight"]
    whole = torch.randn(held.shape, generator=torch.Generator().manual_seed(2))
    adapter = write_adapter(tmp_path / "adapter", base, QKVO, whole={f"{module}.weight": whole}, modules_to_save=["x"])
    theirs = logits(merge(adapter, base, tmp_path / "merged"))
    assert (logits(adapter) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    engine = stars.Engine(base, models={"guide": adapter})
    own, guide = addresses(*decoders_of(engine).values())
    assert len(own & guide) == len(own) - (module != "lm_head")


def test_bases_that_leave_model_out_of_their_names(tiny_model, copied, tmp_path):
    bare = copied(tiny_model(head="reward"))
    tensors = load_file(bare / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, bare / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", bare, ("v_proj", "down_proj"), scale=1.0,
                            whole={"model.norm.weight": torch.linspace(0.5, 1.5, 36)})
    low = load_file(adapter / "adapter_model.safetensors")
    assert "base_model.model.layers.0.mlp.down_proj.lora_A.weight" in low
    merged = merge(adapter, bare, tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, merged / "model.safetensors")
    assert torch.allclose(reward(adapter), reward(merged), rtol=1e-5)


def test_an_untied_head_beside_a_tied_base(tiny_model, tmp_path):
    base = tiny_model(tied=True)
    adapter = write_adapter(tmp_path / "adapter", base, QKVO, whole={"lm_head.weight": torch.zeros(97, 36)})
    with pytest.raises(ModelError, match="has tie_word_embeddings but a lm_head.weight that differs"):
        load_model(adapter)


# -- reward models ----------------------------------------------------------------------------------------------------


def test_a_reward_head_that_an_adapter_brings(tiny_model, tmp_path):
    """An adapter of a language model, trained with a head of its own, as peft saves it for sequence classification."""
    base = tiny_model(tokenizer=True, chat_template=True)
    head = 3 * torch.randn(1, 36, generator=torch.Generator().manual_seed(4))
    adapter = write_adapter(tmp_path / "adapter", base, QKVO, scale=1.0, whole={"score.weight": head},
                            task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    merged = merge(adapter, base, tmp_path / "merged")
    edit_config(merged, id2label={"0": "reward"})
    assert torch.allclose(reward(adapter), reward(merged), rtol=1e-5)
    judge = stars.CausalReward(adapter)
    engine = stars.Engine(base, judge)
    own, its = addresses(decoders_of(engine)["lm"], judge.decoder)
    assert own == its
    params = stars.SamplingParams(max_tokens=8, seed=1)
    found = [one.generate("The quick", params, stars.BestOfN(n=3), use_tqdm=False)[0].outputs[0]
             for one in (engine, stars.Engine(base, merged))]
    assert found[0].token_ids == found[1].token_ids and math.isclose(found[0].reward, found[1].reward, rel_tol=1e-4)


def test_an_adapter_of_a_reward_model(tiny_model, tmp_path):
    base = tiny_model(head="reward")
    adapter = write_adapter(tmp_path / "adapter", base, scale=1.0)
    assert torch.allclose(reward(adapter), reward(merge(adapter, base, tmp_path / "merged")), rtol=1e-5)
    assert not torch.allclose(reward(adapter), reward(base), rtol=1e-2)


# -- what does not fit ------------------------------------------------------------------------------------------------


def changed(adapter: Path, **changes) -> None:
    """Sets tensors of an adapter by a part of their names; None takes them out."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for part, value in changes.items():
        name = next(one for one in sorted(tensors) if part.replace("__", ".") in one)
        tensors[name] = value(tensors[name]) if value is not None else None
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def refused(adapter: Path, message: str, by_headers: bool = True) -> None:
    """By the loader in one sentence, and where `by_headers` by who only looks at it."""
    with pytest.raises(ModelError, match=message) as seen:
        load_model(adapter)
    assert "\n" not in str(seen.value)
    if by_headers:
        with pytest.raises(ModelError, match=message):
            inspect_model(adapter)


@pytest.mark.parametrize("key, value, message", [
    ("peft_type", "IA3", "has peft_type = 'IA3', and LORA adapters are read: merge it into its base model"),
    ("peft_type", ..., "has peft_type = None"),
    ("use_dora", True, "is an adapter with use_dora = True, which is not supported: merge it"),
    ("bias", "lora_only", "is an adapter with bias = 'lora_only', which is not supported"),
    ("fan_in_fan_out", True, "is an adapter with fan_in_fan_out = True"),
    ("lora_bias", True, "is an adapter with lora_bias = True"),
    ("layer_replication", [[0, 1]], r"is an adapter with layer_replication = \[\[0, 1\]\]"),
    ("trainable_token_indices", [3], r"is an adapter with trainable_token_indices = \[3\]"),
    ("alora_invocation_tokens", [3], r"is an adapter with alora_invocation_tokens = \[3\]"),
    ("init_lora_weights", "pissa_niter_16", "has init_lora_weights = 'pissa_niter_16', by which its base was changed"),
    ("init_lora_weights", "OLoRA", "has init_lora_weights = 'OLoRA', by which its base was changed"),
    ("use_rslora", "yes", "has use_rslora = 'yes' where true or false is needed"),
    ("r", 4, "has r = 4 and .* has matrices of rank 3: use the adapter_config.json that was saved with them"),
    ("lora_alpha", None, "has lora_alpha = None where a number is needed: repair it"),
    ("lora_alpha", "16", "has lora_alpha = '16' where a number is needed"),
    ("lora_alpha", float("nan"), "has lora_alpha = nan where a number is needed"),
    ("alpha_pattern", {r".*\d+.q_proj": 3}, "has alpha_pattern = .*, and names of modules are read, no patterns"),
    ("alpha_pattern", [3], r"has alpha_pattern = \[3\], and names of modules are read"),
])
def test_settings_that_are_not_of_plain_adapters(adapter, copied, key, value, message):
    assert key in NEUTRAL or key in ("peft_type", "init_lora_weights", "use_rslora", "r", "lora_alpha", "alpha_pattern")
    broken = copied(adapter)
    edit_json(broken / "adapter_config.json", **{key: value})
    refused(broken, message)


@pytest.mark.parametrize("neutral", [dict(use_dora=None), dict(layer_replication=None), dict(alpha_pattern=None),
                                     dict(target_parameters=[]), dict(trainable_token_indices={}),
                                     dict(init_lora_weights="gaussian"), dict(megatron_core="megatron.core")])
def test_settings_that_change_nothing(adapter, copied, neutral):
    same = copied(adapter)
    edit_json(same / "adapter_config.json", **neutral)
    assert torch.equal(logits(same), logits(adapter))


def test_tensors_that_do_not_fit(base, adapter, copied, tmp_path, tiny_model):
    def broken(**changes) -> Path:
        directory = copied(adapter)
        changed(directory, **changes)
        return directory

    refused(broken(q_proj__lora_B=None), "q_proj.lora_A.weight without a lora_B that goes with it: copy the adapter")
    refused(broken(q_proj__lora_A=None), "q_proj.lora_B.weight without its lora_A: copy the adapter again")
    refused(broken(q_proj__lora_B=lambda tensor: tensor[:, :2].contiguous()), "without a lora_B that goes with it")
    refused(broken(q_proj__lora_B=lambda tensor: tensor[:-1].contiguous()),
            r"has an adapter of model.layers.0.self_attn.q_proj for a matrix of \[35, 36\] and its base .* has "
            r"\[36, 36\]: use the adapter with the base model that it was trained on", by_headers=False)
    refused(broken(q_proj__lora_A=lambda tensor: tensor.double()), "is stored as F64, which is not supported")
    deeper = tiny_model(layers=3)
    refused(write_adapter(tmp_path / "deeper", deeper, named=str(base)),
            r"an adapter of model.layers.2.\w+.\w+ for a matrix of .* and its base .* has no such layer",
            by_headers=False)
    for name, words in (("lm_head.lora_A.weight", "adapters are read of q_proj, k_proj, v_proj, o_proj, gate_proj, "
                                                  "up_proj, down_proj alone: merge it"),
                        ("model.embed_tokens.lora_embedding_A", "adapters are read of"),
                        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "adapters are read of"),
                        ("model.layers.0.self_attn.q_proj.extra", "and its base has no such tensor")):
        directory = copied(adapter)
        path = directory / "adapter_model.safetensors"
        save_file({**load_file(path), f"base_model.model.{name}": torch.zeros(3, 36)}, path)
        refused(directory, words)
    save_file({"base_model.model.score.weight": torch.zeros(1, 36)}, path)
    refused(directory, "has no lora_A and lora_B: save the adapter with peft's save_pretrained")
    save_file({"lora_A": torch.zeros(1, 36)}, path)
    refused(directory, "names of an adapter's tensors begin with base_model.model.: save the adapter")
    path.write_bytes(b"nothing")
    refused(directory, "is damaged or cut short .*: copy the adapter again")
    path.rename(directory / "adapter_model.bin")
    refused(directory, "lacks adapter_model.safetensors, and a pickle is never read")


STRANGE = (None, True, -1, 3.5, 10**400, float("inf"), "", "a\0b", "x" * 5000, [], [[]], {}, {"a": []}, {"": {}})


@pytest.mark.parametrize("key", ["peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "bias",
                                 "alpha_pattern", "use_rslora", "init_lora_weights", *NEUTRAL])
def test_whatever_stands_in_the_settings(adapter, copied, key):
    """It loads, or is refused in one sentence; 10**400 is an integer that no float holds."""
    strange = copied(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    refusals = 0
    for value in STRANGE:
        (strange / "adapter_config.json").write_text(json.dumps(settings | {key: value}))
        try:
            load_model(strange)
        except ModelError as error:
            refusals += 1
            assert "\n" not in str(error) and len(str(error)) < 700
    assert refusals >= (0 if key in ("rank_pattern", "init_lora_weights") else 5)


def test_one_module_by_two_names(adapter, copied):
    twice = copied(adapter)
    path = twice / "adapter_model.safetensors"
    tensors = load_file(path)
    low = {name: tensor for name, tensor in tensors.items() if "layers.0.self_attn.q_proj" in name}
    save_file(tensors | {name.replace("model.model.", "model."): tensor.clone() for name, tensor in low.items()}, path)
    refused(twice, r"has both base_model.model.\S* and base_model.model.\S*q_proj.lora_A.weight: save the adapter")


def test_bases_that_are_none(base, adapter, copied, tmp_path):
    """Another adapter, itself, a model of another shape."""
    for named, words in ((str(adapter), "is an adapter of .*, which is an adapter itself: merge it"),
                         (".", "which is an adapter itself"), (3, "is an adapter of 3, which is not a directory here")):
        circle = copied(adapter)
        edit_json(circle / "adapter_config.json", base_model_name_or_path=named)
        with pytest.raises(ModelError, match=words):
            load_config(circle)
        if named != 3:
            with pytest.raises(ModelError, match=rf"models\['guide'\]: .*{words}"):
                stars.Engine(base, models={"guide": circle})
    itself = copied(adapter)
    edit_json(itself / "adapter_config.json", base_model_name_or_path="org/name")
    with pytest.raises(ModelError, match="is an adapter of 'org/name', which is not a directory here"):
        stars.Engine(itself)
    empty = tmp_path / "empty"
    empty.mkdir()
    edit_json(itself / "adapter_config.json", base_model_name_or_path=str(empty))
    with pytest.raises(ModelError, match=f"{empty} has no config.json"):
        load_model(itself)


def test_a_model_beside_an_adapters_settings_is_a_model(base, adapter, copied):
    """What peft leaves in a directory where an adapter was merged."""
    both = copied(base)
    shutil.copy(adapter / "adapter_config.json", both)
    assert torch.equal(logits(both), logits(base))


def test_what_an_adapter_needs_is_known_from_its_headers(base, adapter, tmp_path):
    summary = inspect_model(adapter)
    plain = inspect_model(base)
    held = load_model(adapter).adapters
    assert summary.adapter.base == base and set(summary.adapter.modules) == set(ALL) and summary.adapter.ranks == (3,)
    assert summary.adapter.products == len(held) == 8 and summary.adapter.widest == (9, 104)
    assert summary.adapter.elements == sum(one.out_features * one.in_features for pair in held for one in pair)
    assert summary.parameters == plain.parameters + summary.adapter.elements and plain.adapter is None
    assert summary.tokenizer and summary.chat_template and summary.head == "lm" and not summary.missing
    config = stars.Engine(base).config
    given, read = occupant(config, load_model(adapter), 8, True), occupant(config, adapter, 8, True)
    assert given.adapter == read.adapter == (8, 9, 104) and given.weight_bytes == 0
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"


def test_an_implicit_reward_of_an_adapter_and_its_base(base, adapter, tmp_path):
    """Three models, one set of base weights; rewards are those of the merged policy."""
    judge = stars.ImplicitReward(adapter, base, beta=0.5)
    engine = stars.Engine(base, judge, models={"guide": adapter})
    decoders = [*decoders_of(engine).values(), *(part.decoder for part in judge.parts)]
    held = addresses(*decoders)
    assert len(held) == 4 and all(one == held[0] for one in held)
    assert [len(one.adapters) for one in decoders] == [0, 8, 8, 0]
    merged = merge(adapter, base, tmp_path / "merged")
    params = stars.SamplingParams(max_tokens=12, seed=4)
    policy = stars.STARS(segment_size=4, max_attempts=4, reward_threshold=0.5, beta=0.2)
    ours, theirs = (one.generate("The quick", params, policy, use_tqdm=False)[0].outputs[0] for one in (
        engine, stars.Engine(base, stars.ImplicitReward(merged, base, beta=0.5))))
    assert ours.token_ids == theirs.token_ids
    assert ours.reward == pytest.approx(theirs.reward, abs=1e-4) and abs(ours.reward) > 0.1
