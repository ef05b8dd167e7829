"""Engine(models=…, heads=…): each model is held once, whatever it is loaded for, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stars
from editing import edit_config, edit_json
from lora import write_adapter
from stars.config import EngineConfig
from stars.fit import fit, occupant
from stars.kernels.linear import Weight
from stars.model.config import load_config
from stars.model.decoder import Decoder
from stars.model.loader import load_model
from stars.model.sharing import own_directory
from stars.sizes import Occupant, needed_bytes
from stars.target import CUDA
from toy import ToyModel, toy_engine


@pytest.fixture(scope="module")
def base(tiny_model) -> Path:
    return tiny_model(tokenizer=True, chat_template=True)


def trunk(decoder) -> list[Weight | torch.Tensor]:
    """The weights of a decoder but for its heads."""
    return [decoder.embedding, decoder.final_norm,
            *(one for layer in decoder.layers for one in layer if isinstance(one, (Weight, torch.Tensor)))]


def addresses(*decoders) -> list[set[int]]:
    """Where those of each decoder lie."""
    return [{(one.values if isinstance(one, Weight) else one).data_ptr() for one in trunk(decoder)}
            for decoder in decoders]


def decoders_of(engine) -> dict:
    models = engine._models
    return {name: models.members[models.store_of(name)].decoder for name in ("lm", *models.named)}


def test_one_directory_is_loaded_once(base, copied, tmp_path):
    (tmp_path / "link").symlink_to(base)
    other = copied(base)
    engine = stars.Engine(base, models={"a": base, "b": str(tmp_path / "link"), "c": other, "d": f"{other}/"})
    found = decoders_of(engine)
    assert found["lm"] is found["a"] is found["b"] and found["c"] is found["d"] is not found["lm"]
    assert len(engine._models.members) == len(engine._cache.stores) == 2
    assert not set.intersection(*addresses(found["lm"], found["c"]))
    assert "models a, b, c, d; reward None" in repr(engine)
    assert "models" not in repr(stars.Engine(base))


def test_weights_are_shared_with_rewards(base, tiny_model):
    """A language model that judges by a row of its own head, and two rewards of one directory: one trunk each."""
    judge = tiny_model(tokenizer=True, chat_template=True, head="reward")
    reward = stars.WeightedReward([(stars.CausalReward(base, head={"tensor": "lm_head", "rows": [7]}), 1.0),
                                   (stars.CausalReward(judge), 1.0), (stars.CausalReward(judge, close="eos"), 1.0)])
    engine = stars.Engine(base, reward, models={"other": base})
    own, *rewards = addresses(decoders_of(engine)["lm"], *(part.decoder for part in reward.parts))
    assert own == rewards[0] and rewards[1] == rewards[2] and not own & rewards[1]
    engine.generate("The quick", stars.SamplingParams(max_tokens=4, seed=1), stars.BestOfN(n=2), use_tqdm=False)


def test_engines_do_not_share(base):
    """The scope ends with construction, whether it succeeds or not."""
    one, two = (decoders_of(stars.Engine(base))["lm"] for _ in range(2))
    with pytest.raises(stars.ModelError, match="is on cpu and the engine on meta"), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr("stars.models.load_model", lambda *given, **named: pytest.fail("the own one is held"))
        patch.setattr(Decoder, "check_device", lambda *given: (_ for _ in ()).throw(
            stars.ModelError("the model is on cpu and the engine on meta")))
        stars.Engine(base, models={"a": base})
    assert own_directory() is None
    assert not set.intersection(*addresses(one, two))
    assert not set.intersection(*addresses(load_model(base), load_model(base)))


def test_shared_weights_change_no_text(base, copied):
    params = stars.SamplingParams(max_tokens=12, seed=5)
    texts = [stars.Engine(base, models=models).generate("The quick", params, use_tqdm=False)[0].outputs[0].token_ids
             for models in (None, {"a": base}, {"a": copied(base)})]
    assert texts[0] == texts[1] == texts[2]


def test_the_same_decoder_is_one_model():
    model, other = ToyModel(5, 1), ToyModel(5, 2)
    own, beside = model.decoder(), other.decoder()
    engine = stars.Engine(own, cache_tokens=256, models={"a": own, "b": beside, "c": beside})
    assert [engine._models.store_of(name) for name in ("lm", "a", "b", "c")] == [0, 0, 1, 1]


@pytest.mark.parametrize("models, message", [
    ([1], r"models is \[1\], it must be a dictionary of model directories by name"),
    ({"": "x"}, "models has the name '', it must be a text"),
    ({" ": "x"}, "models has the name ' ', it must be a text"),
    ({"a\n": "x"}, r"models has the name 'a\\n', it must be a text that can be printed"),
    ({3: "x"}, "models has the name 3, it must be a text"),
    ({"lm": "x"}, "models has the name 'lm', which is the engine's own model: choose another"),
    ({"a": "b", "b": "a"}, r"models\['a'\] is 'b', a name and no directory: give the directory"),
    ({"a": "a"}, r"models\['a'\] is 'a', a name and no directory"),
    ({"a": "lm"}, r"models\['a'\] is 'lm', a name and no directory"),
    ({"a": 3}, r"models\['a'\]: model is int, it must be a model directory, a GGUF file or a Decoder"),
    ({"a": None}, r"models\['a'\]: model is NoneType, it must be"),
    ({"a": "org/name"}, r"models\['a'\]: org/name is not a directory here, nor is all of it in the cache"),
    ({"a": "/no\nwhere"}, r"models\['a'\]: '/no\\nwhere' is not a directory: give the path of a model"),
    ({"a": "/nowhere/x"}, r"models\['a'\]: /nowhere/x is not a directory: give the path of a model"),
])
def test_names_and_values(models, message):
    with pytest.raises((stars.RequestError, stars.ModelError), match=message):
        stars.Engine(ToyModel().decoder(), cache_tokens=64, models=models)


@pytest.mark.parametrize("heads, message", [
    ([1], r"heads is \[1\], it must be a dictionary of safetensors files by name"),
    ({"": "x"}, "heads has the name '', it must be a text"),
    ({"agent": 3}, r"heads\['agent'\] is 3, it must be the path of a safetensors file"),
    ({"agent": "/nowhere/head.safetensors"}, r"heads\['agent'\] is '/nowhere/head.safetensors', which is not there"),
    ({"agent": "/"}, r"heads\['agent'\] is '/', which is a directory: give the path of a safetensors file"),
])
def test_heads_that_are_none(heads, message):
    with pytest.raises(stars.RequestError, match=message):
        stars.Engine(ToyModel().decoder(), cache_tokens=64, heads=heads)


def refused(own, other, message: str, **options) -> None:
    """One sentence that names the model, before any weight is read."""
    with pytest.raises(stars.ModelError, match=rf"models\['guide'\]: .*{message}") as seen, \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr("stars.engine.load_model", lambda *given, **named: pytest.fail("weights were read"))
        stars.Engine(own, models={"guide": other}, **options)
    assert "\n" not in str(seen.value) and str(seen.value).count(":") <= 3


def test_another_vocabulary(base, tiny_model, tmp_path):
    size = load_config(base).vocab_size
    refused(base, tiny_model(tokenizer=True, tokenizer_seed=1), "vocabular")
    refused(base, tiny_model(vocab=size), "it has no tokenizer.json, so the vocabularies of both cannot be compared")
    refused(tiny_model(vocab=97), tiny_model(vocab=98), "its vocabulary has 98 tokens and that of the engine's own "
            "model 97: use models of one vocabulary")
    swapped = Path(shutil.copytree(base, tmp_path / "swapped"))
    state = json.loads((swapped / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(state))
    refused(base, swapped, "its tokenizer has another vocabulary than that of the engine's own model, though as many")


def test_other_special_tokens(base, copied):
    size = load_config(base).vocab_size
    more = copied(base)
    edit_json(more / "tokenizer_config.json", extra_special_tokens=["<|turn|>"])
    refused(base, more, r"its tokenizer has the special token '<|turn|>', which that of the engine's own")
    other_end = copied(base)
    edit_json(other_end / "generation_config.json", eos_token_id=[2, size - 1])
    edit_config(other_end, eos_token_id=[2, size - 1])
    refused(base, other_end, f"it ends texts with token {size - 1}, which the engine's own model does not")
    stars.Engine(other_end, models={"small": base})  # whose EOS is one of them
    padded = copied(base)
    edit_json(padded / "tokenizer_config.json", pad_token="<|filler|>")
    stars.Engine(base, models={"guide": padded})


def test_a_shorter_context(base, copied):
    shorter = copied(base)
    edit_config(shorter, max_position_embeddings=48)
    refused(base, shorter, "its context is 48 tokens and max_model_len 128: build the engine with max_model_len=48")
    stars.Engine(base, max_model_len=48, models={"guide": shorter})


def test_more_rows_than_are_numbered():
    """Of a cache of the engine's own sizes, in a model with more heads."""
    own, wide = ToyModel(5, 1).decoder(), ToyModel(5, 2, heads=8, kv_heads=8).decoder()
    refused(own, wide, "its cache would have .* rows of 8 heads, which are numbered in int32: lower cache_tokens",
            cache_tokens=1 << 29)


def test_what_a_gpu_cannot_run_is_said_with_its_name(monkeypatch):
    model = ToyModel(5, 1).decoder()
    config = replace(EngineConfig.resolve(model.config, dtype="float32"), device="cuda", target=CUDA)
    asked = []

    def check(shape, sampled):
        asked.append(shape)
        if len(asked) == 2:
            raise stars.ModelError('the model has head_dim 8: use device="cpu"')

    monkeypatch.setattr("stars.fit.check_model", check)
    monkeypatch.setattr("stars.fit.choose_prefill", lambda *given: "triton")
    with pytest.raises(stars.ModelError, match=r"^models\['guide'\]: the model has head_dim 8"):
        fit(config, model, None, None, 5, {"same": model, "guide": ToyModel(5, 2).decoder()})


def test_models_that_are_none(base, tiny_model, tmp_path):
    refused(base, tmp_path, "has no config.json")
    refused(ToyModel(5, 1).decoder(), ToyModel(5, 2, head="reward").decoder(), "Decoder without a language model head")
    with pytest.raises(stars.ModelError, match=r"models\['guide'\]: .* is a reward model"):
        stars.Engine(base, models={"guide": tiny_model(tokenizer=True, chat_template=True, head="reward")})


def test_deterministic_engines_ask_every_model(base, copied, monkeypatch):
    from stars import models
    other, asked = copied(base), []
    monkeypatch.setattr(models, "check_row_invariance", lambda decoder, target: asked.append(decoder))
    engine = stars.Engine(base, models={"a": other, "b": base}, deterministic=True)
    assert asked == [decoders_of(engine)["a"]]

    def refuse(decoder, target):
        raise stars.ModelError("deterministic=True cannot be kept here")

    monkeypatch.setattr(models, "check_row_invariance", refuse)
    with pytest.raises(stars.ModelError, match=r"models\['a'\]: deterministic=True cannot be kept here"):
        stars.Engine(base, models={"a": other}, deterministic=True)


def test_a_missing_name_is_said_at_the_door():
    engine = toy_engine(ToyModel(5, 1), models={"guide": ToyModel(5, 2).decoder()})
    with pytest.raises(stars.RequestError, match=r"no model named 'small' \(there are: 'lm', 'guide'\): build the "
                                                 r"engine with Engine\(model, models=\{'small': DIR\}\)"):
        engine._models.store_of("small")


# -- memory -----------------------------------------------------------------------------------------------------------


def test_what_is_held_once_is_counted_once(base, tiny_model, tmp_path):
    """Of a second reader of a directory nothing, of an adapter its own matrices alone."""
    config = EngineConfig.resolve(load_config(base), dtype="float32")
    adapter = write_adapter(tmp_path / "adapter", base, ("q_proj", "v_proj", "down_proj"), rank=3)
    read: set = set()
    whole, again, beside, head = (occupant(config, model, 8, drafts, choice, read=read) for model, drafts, choice in (
        (base, True, "auto"), (base, True, "auto"), (adapter, True, "auto"),
        (base, False, {"tensor": "lm_head", "rows": [7]})))
    decoder = load_model(base)
    assert whole.weight_bytes == 4 * sum(
        (one.dense() if isinstance(one, Weight) else one).numel() for one in (*trunk(decoder), decoder.head))
    assert again.weight_bytes == 0
    held = load_model(adapter).adapters
    assert beside.weight_bytes == 4 * sum(one.out_features * one.in_features for pair in held for one in pair)
    assert beside.adapter == (4, 6, 60)  # q and v in one product of 36 + 2 * 12 features, down in another, two layers
    assert head.weight_bytes < 4 * 2 * load_config(base).vocab_size * 36
    assert occupant(config, adapter, 8, True).weight_bytes == whole.weight_bytes + beside.weight_bytes


def test_every_named_model_is_counted(base):
    """Another model that drafts has a cache, activations, graphs and lists of words of its own."""
    config = EngineConfig.resolve(load_config(base), dtype="float32", cache_tokens=1024, max_num_seqs=4,
                                  max_num_lanes=8, max_segment_size=16)
    shape = load_config(base)
    one = Occupant(shape, torch.float32, 1000, True)
    alone, both = (needed_bytes(config, dict.fromkeys(names, one)) for names in (("a",), ("a", "b")))
    for part in ("weights", "cache", "activations"):
        assert both[f"a's {part}"] == both[f"b's {part}"] == alone[f"a's {part}"] > 0
    for part in ("captured graphs", "the words that penalties count"):
        assert both[part] == 2 * alone[part] > 0
    engine = stars.Engine(base, models={"x": write_copy(base)}, cache_tokens=1024, max_num_seqs=4, max_num_lanes=8,
                          max_segment_size=16)
    stores = engine._cache.stores
    assert [sum(tensor.nbytes for tensor in (store.k_pages, store.v_pages, store.k_slabs, store.v_slabs))
            for store in stores] == [both["a's cache"]] * 2


def write_copy(directory: Path) -> Path:
    return Path(shutil.copytree(directory, directory.parent / "beside", dirs_exist_ok=True))
