"""Loading is strict: what does not fit is refused before weights are read, by an error that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from building import cache_of
from editing import edit_config, edit_tensors
from stars.errors import ModelError
from stars.kernels import linear
from stars.kernels.types import Batch
from stars.model.checkpoint import Checkpoint
from stars.model.config import load_config
from stars.model.loader import inspect_model, load_model

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def copy(tiny_model, copied):
    """copy(family="qwen2", …): a copy of that tiny model to break."""
    return lambda **options: copied(tiny_model(**options))


def rename_tensors(directory: Path, rename) -> None:
    path = directory / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)


def last_hidden(decoder) -> torch.Tensor:
    """Hidden state [1, hidden] behind a fixed prompt."""
    cache = cache_of(decoder.config, page_size=4, num_pages=4, num_slabs=1, slab_len=4)
    ids = [5, 9, 60, 33, 7]
    table = cache.open(ids)

    def ints(values):
        return torch.tensor(values, dtype=torch.int32)

    batch = Batch(ints(ids), ints(list(range(5))), ints(list(cache.rows(table, 0, 5))), False, ints([0, 5]), ints([0]),
                  cache.block_tables([table]), ints([0]), ints([0]), ints([0]))
    return decoder.forward(batch, cache, ints([4])).clone()


def logits(directory: Path, *, dtype: str = "float32", **options) -> torch.Tensor:
    """Not of "auto": for a bfloat16 checkpoint the clock would decide."""
    decoder = load_model(directory, dtype=dtype, **options)
    return decoder.logits(last_hidden(decoder)).clone()


def reward(directory: Path) -> torch.Tensor:
    decoder = load_model(directory, dtype="float32", head="reward")
    rewards = torch.empty(1)
    linear(last_hidden(decoder), decoder.score_head, rewards.view(1, 1))
    return rewards


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_missing_tensors_are_named(copy):
    directory = copy()
    edit_tensors(directory, **{NORM.replace(".", "__"): ...})
    with pytest.raises(ModelError, match=rf"lacks 1 tensor \({NORM}\): copy the model again"):
        load_model(directory)
    for name in list(load_file(directory / "model.safetensors")):
        if "layers.1" in name:
            edit_tensors(directory, **{name.replace(".", "__"): ...})
    with pytest.raises(ModelError, match=r"lacks 9 tensors \(model.layers.1.*, .*, .* and 6 more\)"):
        load_model(directory)


def test_unexpected_tensors_are_named(copy):
    directory = copy()
    edit_tensors(directory, model__layers__0__self_attn__q_proj__bias=torch.zeros(36))
    with pytest.raises(ModelError, match=r"has 1 tensor \(model.layers.0.self_attn.q_proj.bias\) that a llama model"):
        load_model(directory)
    edit_tensors(directory, model__layers__0__self_attn__q_proj__bias=..., model__layers__2__mlp=torch.zeros(1))
    with pytest.raises(ModelError, match="model.layers.2.mlp"):
        load_model(directory)


def test_an_absent_bias_is_missed(copy):
    """Where config.json says there are biases, a checkpoint without them is not taken for one with zeros."""
    directory = copy(family="qwen2")
    for layer in range(2):
        for part in "qkv":
            edit_tensors(directory, **{f"model__layers__{layer}__self_attn__{part}_proj__bias": ...})
    with pytest.raises(ModelError, match="lacks 6 tensors"):
        load_model(directory)


def test_rotary_tables_of_old_checkpoints_are_ignored(copy, tiny_model):
    directory = copy()
    edit_tensors(directory, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(3))
    assert torch.equal(logits(directory), logits(tiny_model()))


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"family": "qwen3", "head": "reward"}])
def test_bare_names(options, copy, tiny_model):
    """Checkpoints of the bare model class leave "model." out."""
    directory = copy(**options)
    rename_tensors(directory, lambda name: name.removeprefix("model."))
    run = reward if options.get("head") == "reward" else logits
    assert torch.equal(run(directory), run(tiny_model(**options)))


def test_shapes_are_named_both(copy):
    directory = copy()
    edit_tensors(directory, model__layers__1__mlp__down_proj__weight=torch.zeros(36, 51))
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.down_proj.weight .* shape \[36, 51\] .* \[36, 52\]"):
        load_model(directory)
    directory = copy()
    edit_config(directory, vocab_size=98)
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight .* shape \[97, 36\] .* \[98, 36\]"):
        load_model(directory)


def test_element_types_are_named(copy):
    directory = copy()
    edit_tensors(directory, **{NORM.replace(".", "__"): torch.zeros(36, dtype=torch.int64)})
    with pytest.raises(ModelError, match=f"{NORM} .* stored as I64, which is not supported"):
        load_model(directory)


def test_everything_is_checked_before_weights_are_read(copy, monkeypatch):
    directory = copy()
    edit_tensors(directory, lm_head__weight=torch.zeros(97, 35))
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(ModelError, match="lm_head.weight"):
        load_model(directory)
    inspect_model(directory)


def test_a_tied_head_is_stored_once(tiny_model):
    decoder = load_model(tiny_model(tied=True))
    assert decoder.head is decoder.embedding
    decoder = load_model(tiny_model())
    assert decoder.head is not decoder.embedding


def test_a_tied_head_in_the_file(copy, tiny_model):
    """Equal to the embedding it is no harm; another one contradicts config.json."""
    directory = copy(tied=True)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(directory, lm_head__weight=embedding.clone())
    assert torch.equal(logits(directory), logits(tiny_model(tied=True)))
    edit_tensors(directory, lm_head__weight=embedding + 1)
    with pytest.raises(ModelError, match="tie_word_embeddings but a lm_head.weight that differs"):
        load_model(directory)
    edit_tensors(directory, lm_head__weight=...)
    edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(ModelError, match="lacks 1 tensor .lm_head.weight"):
        load_model(directory)


# -- heads ------------------------------------------------------------------------------------------------------------


def test_a_missing_reward_head_is_never_invented(copy, tiny_model):
    expected = r"no reward head score.weight: use a checkpoint with architectures LlamaForSequenceClassification"
    with pytest.raises(ModelError, match=expected):
        load_model(tiny_model(), head="reward")
    directory = copy(head="reward")
    edit_tensors(directory, score__weight=...)
    with pytest.raises(ModelError, match=expected):
        load_model(directory, head="reward")


def test_a_reward_model_is_no_language_model(tiny_model):
    with pytest.raises(ModelError, match=r"is a reward model \(Qwen2ForSequenceClassification\)"):
        load_model(tiny_model(family="qwen2", head="reward", tied=True))


def test_several_labels_are_refused(copy, tiny_model):
    with pytest.raises(ModelError, match=r"gives 3 labels \(score.weight is \[3, 36\]\) where a reward is one number"):
        load_model(tiny_model(head="reward", labels=3), head="reward")
    directory = copy(head="reward")
    edit_config(directory, id2label={"0": "bad", "1": "good"})
    with pytest.raises(ModelError, match=r"gives 2 labels \(id2label.*but score.weight has 1 row"):
        load_model(directory, head="reward")


def test_a_left_over_lm_head_is_ignored_in_a_reward_model(copy, tiny_model):
    directory = copy(head="reward")
    edit_tensors(directory, lm_head__weight=torch.zeros(97, 36))
    assert torch.equal(reward(directory), reward(tiny_model(head="reward")))


def test_wrong_calls_are_refused(tiny_model):
    with pytest.raises(ModelError, match="dtype 'float16' is not supported: use one of auto, float32, bfloat16"):
        load_model(tiny_model(), dtype="float16")
    with pytest.raises(ModelError, match="head 'score' is not supported"):
        load_model(tiny_model(), head="score")
    with pytest.raises(ModelError, match="device 'nowhere' cannot be used"):
        load_model(tiny_model(), device="nowhere")
    hidden = torch.zeros(1, 36)
    with pytest.raises(ModelError, match="no reward head"):
        load_model(tiny_model()).score(None, None, None, torch.empty(1))  # before a pass is looked at
    with pytest.raises(ModelError, match="no language model head"):
        load_model(tiny_model(head="reward"), head="reward").logits(hidden)


def test_more_rows_than_reserved(tiny_model):
    from stars.errors import IntegrityError

    decoder = load_model(tiny_model(), max_rows=4)
    with pytest.raises(IntegrityError, match=r"a pass of 5 rows exceeds the 4 reserved: reserve\(5\) first"):
        last_hidden(decoder)
    decoder.reserve(5)
    last_hidden(decoder)


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "dtype", "kept"), [
    ("float32", "auto", torch.float32), ("float32", "float32", torch.float32), ("float32", "bfloat16", torch.bfloat16),
    ("bfloat16", "auto", torch.bfloat16), ("bfloat16", "float32", torch.bfloat16), ("float16", "auto", torch.float32),
])
def test_types_of_what_is_kept(stored, dtype, kept, tiny_model):
    """Matrices are exact unless rounding was asked for; norms, biases and the reward head are always float32."""
    directory = tiny_model(family="qwen3", head="reward", dtype=stored, attention_bias=True)
    tensors = load_file(directory / "model.safetensors")
    decoder = load_model(directory, dtype=dtype, head="reward")
    layer = decoder.layers[1]
    parts = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert layer.qkv.dense().dtype == kept
    assert torch.equal(layer.qkv.dense(), torch.cat(parts).to(kept))
    assert torch.equal(layer.o.dense(), tensors["model.layers.1.self_attn.o_proj.weight"].to(kept))
    biases = [tensors[f"model.layers.1.self_attn.{part}_proj.bias"] for part in "qkv"]
    assert torch.equal(layer.qkv.bias, torch.cat(biases).float())
    assert torch.equal(layer.q_norm, tensors["model.layers.1.self_attn.q_norm.weight"].float())
    assert torch.equal(decoder.score_head.dense(), tensors["score.weight"].float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_refers_to_the_file(dtype, copy):
    """A training run that overwrites the file in place does not change a loaded model."""
    directory = copy(dtype=dtype, family="qwen2")
    decoder = load_model(directory)
    before = decoder.logits(last_hidden(decoder)).clone()
    path = directory / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(decoder.logits(last_hidden(decoder)), before)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "grown"])
def test_damaged_files(damage, copy):
    directory = copy()
    path = directory / "model.safetensors"
    data = path.read_bytes()
    damaged = {"cut": data[:-100], "header": data[:8] + b"x" * 20 + data[28:], "empty": b"", "grown": data + b"0"}
    path.write_bytes(damaged[damage])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged or cut short \(.+\): copy the model again"):
        load_model(directory)


def test_damaged_index(copy):
    directory = copy(sharded=True)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"][NORM]

    def write(**weight_map):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], **weight_map}}))

    write(**{NORM: "other-" + shard})
    with pytest.raises(ModelError, match=f"lacks other-{shard}, which model.safetensors.index.json names"):
        load_model(directory)
    write(**{NORM: next(name for name in content["weight_map"].values() if name != shard)})
    with pytest.raises(ModelError, match=f"says {NORM} is in .*, which it is not"):
        load_model(directory)
    write(**{NORM: f"../{directory.name}/{shard}"})
    with pytest.raises(ModelError, match="is not a file beside it: refused"):
        load_model(directory)
    index.write_text("{}")
    with pytest.raises(ModelError, match="holds no weight_map"):
        load_model(directory)
    write()
    load_model(directory)
    (directory / shard).unlink()
    with pytest.raises(ModelError, match=f"lacks {shard}"):
        load_model(directory)


def test_a_tensor_in_two_shards(copy):
    directory = copy(sharded=True)
    shards = sorted(directory.glob("*.safetensors"))
    tensors = [load_file(shard) for shard in shards]
    save_file({**tensors[1], **tensors[0]}, shards[1])
    with pytest.raises(ModelError, match="is in both"):
        load_model(directory)


def test_directories_without_safetensors(copy, tmp_path):
    directory = copy()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin, a pickle, which is never read: convert"):
        load_model(directory)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter of None, which is not a directory here"):
        load_model(directory)
    (directory / "adapter_config.json").unlink()
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="has neither model.safetensors nor"):
        load_model(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ModelError, match="has no config.json"):
        load_model(directory)
    with pytest.raises(ModelError, match="is not a directory"):
        load_model(tmp_path / "absent")


# -- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"rope": "llama3"}, {"rope": "yarn-mscale"}, {"rope": "theta"}, {"family": "mistral", "window": 6},
    {"family": "qwen2", "window": 5}, {"family": "qwen3", "head": "reward", "dtype": "bfloat16"},
])
def test_dialects_say_the_same(options, tiny_model):
    assert load_config(tiny_model(dialect="v4", **options)) == load_config(tiny_model(dialect="v5", **options))


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "mamba"}, "model_type 'mamba', which is not supported: use one of llama, mistral"),
    ({"architectures": ["LlamaForQuestionAnswering"]}, "architecture 'LlamaForQuestionAnswering'"),
    ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "is quantised with gptq of bits = None"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'.*KV cache cannot follow"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope factor = None where a positive number"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotates only a part of each head"),
    ({"num_key_value_heads": 4}, "6 attention heads, not a multiple of its 4"),
    ({"head_dim": 7}, "odd head_dim 7"),
    ({"hidden_size": ...}, "hidden_size = None where a positive integer"),
    ({"vocab_size": "97"}, "vocab_size = '97' where a positive integer"),
    ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' where token ids"),
])
def test_unsupported_configurations(changes, message, copy):
    directory = copy()
    edit_config(directory, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(directory)


# -- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"tied": True, "sharded": True, "dtype": "bfloat16"}, {"family": "qwen3", "head": "reward"},
])
def test_inspect(options, tiny_model):
    import transformers

    directory = tiny_model(**options)
    kind = "AutoModelForSequenceClassification" if options.get("head") == "reward" else "AutoModelForCausalLM"
    parameters = getattr(transformers, kind).from_pretrained(directory).num_parameters()
    summary = inspect_model(directory)
    assert summary.parameters == parameters
    assert summary.bytes == parameters * (2 if options.get("dtype") == "bfloat16" else 4)
    assert summary.head == options.get("head", "lm") and summary.tied == options.get("tied", False)
    assert len(summary.shards) == len(list(directory.glob("*.safetensors")))
    assert (summary.missing, summary.unexpected) == ([], [])
    assert not summary.tokenizer and not summary.chat_template


def test_inspect_of_broken_and_headless_models(copy, tiny_model):
    directory = copy(tokenizer=True, chat_template=True)
    summary = inspect_model(directory)
    assert summary.tokenizer and summary.chat_template
    edit_tensors(directory, **{NORM.replace(".", "__"): ..., "extra": torch.zeros(1)})
    summary = inspect_model(directory)
    assert (summary.missing, summary.unexpected) == ([NORM], ["extra"])
    edit_tensors(directory, lm_head__weight=...)
    assert "lm_head.weight" in inspect_model(directory).missing
    edit_config(directory, architectures=["LlamaModel"])
    assert inspect_model(directory).head == "none"
    directory = copy(head="reward")
    edit_tensors(directory, score__weight=...)
    summary = inspect_model(directory)
    assert summary.head == "reward" and summary.missing == ["score.weight"]


@pytest.mark.parametrize("head", ["lm", "reward"])
def test_every_product_is_as_deterministic_as_asked(tiny_model, head):
    """On a GPU one that is not would be cuBLAS', whose bits depend on the number of rows."""
    decoder = load_model(tiny_model(head=head), head=head, deterministic=True)
    weights = [weight for layer in decoder.layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    heads = [weight for weight in (decoder.head, decoder.score_head) if weight is not None]
    assert len(heads) == 1 and all(weight.deterministic for weight in weights + heads)
