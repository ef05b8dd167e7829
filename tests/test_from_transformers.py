"""Models and tokenizers that transformers has loaded: the engine of them is that of their saved directory."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import stars
from process_models import source_of, write_process_model
from stars.errors import ModelError, RequestError, RewardError, TokenizerError
from stars.kernels.linear import Weight
from stars.model.config import load_config
from stars.model.families import FAMILIES
from stars.model.loaded import LoadedModel
from stars.model.loader import load_model
from stars.model.tokenizer import from_transformers, load_tokenizer
from tiny_models import CHAT_TEMPLATE, SENTENCES, TinyModel, write_tokenizer

DEMO = Path(stars.__file__).parent / "demo_models" / "lm"
TEXTS = (*SENTENCES, "", " ", "  two  spaces ", "</s>", "a</s> b<s>", "<|user|>hi", "<think>x</think>", "🙂🇩🇪",
         "\ufeff")
MESSAGES = [{"role": "user", "content": " Hello. "}, {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Go on"}]


def assert_same(ours, loaded) -> None:
    """The two tokenizers of ours differ in nothing that is seen of them."""
    assert ours.vocab_size == loaded.vocab_size
    assert ours.same_vocabulary(loaded) and loaded.same_vocabulary(ours)
    for name in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "special_tokens",
                 "named_tokens", "has_chat_template"):
        assert getattr(ours, name) == getattr(loaded, name), name
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == loaded.encode(text, add_special_tokens=special), text
            assert ours.decode(ids, skip_special_tokens=special) == loaded.decode(ids, skip_special_tokens=special)
    if ours.has_chat_template:
        assert ours.apply_chat_template(MESSAGES) == loaded.apply_chat_template(MESSAGES)


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """fast(name): a tokenizer that transformers loads from a directory, and that directory."""
    import transformers

    base = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(base / "plain")
    write_tokenizer(base / "chat", seed=2, chat_template=CHAT_TEMPLATE)
    places = {"plain": base / "plain", "chat": base / "chat", "demo": DEMO}
    return lambda name: (transformers.AutoTokenizer.from_pretrained(places[name]), places[name])


@pytest.mark.parametrize("name", ["plain", "chat", "demo"])
def test_a_fast_tokenizer_is_what_its_directory_is(fast, name, tmp_path):
    theirs, directory = fast(name)
    ours = from_transformers(theirs)
    assert_same(ours, load_tokenizer(directory))
    theirs.save_pretrained(tmp_path)
    assert_same(ours, load_tokenizer(tmp_path))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


def test_tokens_that_were_added_in_memory(fast):
    theirs, directory = fast("plain")
    theirs.add_special_tokens({"additional_special_tokens": ["<think>"], "eos_token": "<|user|>"})
    ours = from_transformers(theirs)
    assert ours.encode("<think>", add_special_tokens=False) == [len(theirs) - 1]
    assert ours.vocab_size == len(theirs) == load_tokenizer(directory).vocab_size + 1
    assert ours.eos_token_id == theirs.eos_token_id != load_tokenizer(directory).eos_token_id
    theirs.add_tokens(["later"])
    assert ours.vocab_size == len(theirs) - 1


def test_chat_templates_by_name(fast):
    theirs, _ = fast("chat")
    theirs.chat_template = {"default": "D{{ messages[0]['content'] }}", "tool_use": "T{{ messages[0]['content'] }}"}
    ours = from_transformers(theirs)
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        assert ours.apply_chat_template(MESSAGES[1:2], tools=tools) == theirs.apply_chat_template(
            MESSAGES[1:2], tools=tools, tokenize=False)
    theirs.chat_template = None
    assert not from_transformers(theirs).has_chat_template


def test_what_is_left_of_training_does_not_cut(fast):
    theirs, _ = fast("plain")
    theirs.backend_tokenizer.enable_truncation(2)
    theirs.backend_tokenizer.enable_padding(length=50)
    assert len(from_transformers(theirs).encode(SENTENCES[0])) > 10
    assert theirs.backend_tokenizer.truncation is not None, "the user's tokenizer is the user's"


def test_a_tokenizer_that_cannot_be_taken(fast):
    from transformers import ByT5Tokenizer

    with pytest.raises(TokenizerError, match=r"ByT5Tokenizer, a slow one, it must be a fast tokenizer of"):
        from_transformers(ByT5Tokenizer())
    with pytest.raises(TokenizerError, match=r"tokenizer is str, it must be a fast tokenizer of"):
        from_transformers("somewhere")


def test_errors_name_where_it_is_from_and_no_temporary_directory(fast):
    theirs, directory = fast("plain")
    with pytest.raises(TokenizerError, match=f"{directory} has no chat template"):
        from_transformers(theirs).apply_chat_template(MESSAGES)


# -- models ------------------------------------------------------------------------------------------------------------

MODELS = {
    "llama": TinyModel("llama"),
    "llama-bias-tied": TinyModel("llama", attention_bias=True, mlp_bias=True, tied=True),
    "llama-float16": TinyModel("llama", dtype="float16", rope="llama3"),
    "mistral-window": TinyModel("mistral", window=6, head_dim=8),
    "qwen2-window": TinyModel("qwen2", layers=4, window=5, rope="yarn"),
    "qwen3-bias-window": TinyModel("qwen3", attention_bias=True, window=7, tied=True, kv_heads=3),
    "phi3-longrope": TinyModel("phi3", hidden=60, rope="longrope", window=7),
    "gemma-tied": TinyModel("gemma", head_dim=10, tied=True),
    "gemma2-bfloat16": TinyModel("gemma2", layers=3, head_dim=10, window=5, dtype="bfloat16"),
    "gemma3": TinyModel("gemma3_text", layers=4, head_dim=10, window=6, rope="linear", tied=True),
    "smollm3-bfloat16-tied": TinyModel("smollm3", layers=4, tied=True, rope="theta", dtype="bfloat16"),
    "olmo2": TinyModel("olmo2", rope="theta", kv_heads=3),
    "olmo3-window": TinyModel("olmo3", layers=4, window=6, rope="yarn"),
}
JUDGE = TinyModel("llama", "reward", seed=5)
PARAMS = [stars.SamplingParams(max_tokens=12, seed=seed, ignore_eos=True) for seed in (1, 2)]
PROMPTS = [{"prompt_token_ids": list(range(5, 5 + count))} for count in (5, 19)]
POLICY = stars.STARS(segment_size=4, max_attempts=3, reward_threshold=0.5, width=2)
SMALL: dict[str, Any] = {"cache_tokens": 512, "max_num_seqs": 4, "max_num_lanes": 8, "max_segment_size": 16}


def loaded(directory: Path, architecture: str | None = None):
    """What transformers makes of a checkpoint, in the type that it is stored in."""
    import transformers

    named = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture or named).from_pretrained(directory, dtype="auto").eval()


def digest(model) -> str:
    """Of all that a model holds: its tensors' bits, places and versions, and its settings."""
    whole = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        whole.update(repr((name, tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor._version)).encode())
        whole.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def decoded(engine: stars.Engine, policy: Any = POLICY) -> list[Any]:
    """All that was drawn and decided of two requests, rewards to the bit."""
    outputs = [output.outputs[0] for output in engine.generate(PROMPTS, PARAMS, policy, use_tqdm=False)]
    assert all(output.error is None for output in outputs)
    return [(output.token_ids, output.reward, [[(attempt.token_ids, attempt.reward, attempt.accepted)
                                                for attempt in segment.attempts] for segment in output.segments])
            for output in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_is_that_of_the_saved_directory(name, tiny_model):
    """Token for token, with a reward model in memory beside it; both are afterwards what they were before."""
    directory, judge = tiny_model(MODELS[name]), tiny_model(JUDGE)
    model, reward = loaded(directory), loaded(judge)
    before = digest(model), digest(reward)
    assert load_config(LoadedModel(model)) == load_config(directory)
    ours = decoded(stars.Engine.from_transformers(model, reward, **SMALL))
    assert ours == decoded(stars.Engine(directory, judge, **SMALL))
    assert any(attempt[1] is not None for _, _, segments in ours for segment in segments for attempt in segment)
    assert (digest(model), digest(reward)) == before


def test_every_family_is_among_them():
    assert {tiny.family for tiny in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "int8"}, {"deterministic": True}])
def test_settings_are_those_of_an_engine(settings, tiny_model):
    directory, judge = tiny_model(MODELS["llama-bias-tied"]), tiny_model(JUDGE)
    if "quantization" in settings:
        settings = settings | {"reward_quantization": "int8"}
    ours = stars.Engine.from_transformers(loaded(directory), loaded(judge), **settings, **SMALL)
    assert decoded(ours) == decoded(stars.Engine(directory, judge, **settings, **SMALL))
    assert ours.config.quantization == settings.get("quantization")


def test_a_type_that_the_model_was_moved_to(tiny_model, tmp_path):
    """Not the one that its configuration was loaded with."""
    model = loaded(tiny_model(MODELS["llama"])).to(torch.bfloat16)
    assert LoadedModel(model).settings["dtype"] == "bfloat16"
    model.save_pretrained(tmp_path)
    assert decoded(stars.Engine.from_transformers(model, **SMALL), None) == decoded(
        stars.Engine(tmp_path, **SMALL), None)


def test_in_training_with_gradients(tiny_model):
    model = loaded(tiny_model(MODELS["llama"])).train()
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    ours = decoded(stars.Engine.from_transformers(model, **SMALL), None)
    assert ours == decoded(stars.Engine(tiny_model(MODELS["llama"]), **SMALL), None)
    assert model.training and all(parameter.grad is not None for parameter in model.parameters())


def test_named_models_and_implicit_rewards(tiny_model):
    """Wherever a directory may be given; a model that is given twice is held once."""
    places = [tiny_model(TinyModel("llama")), tiny_model(TinyModel("llama", layers=1, seed=3))]
    models = [loaded(place) for place in places]
    found = []
    for own, small in (models, places):
        engine = stars.Engine(own, stars.ImplicitReward(small, own), models={"small": small, "same": own}, **SMALL)
        assert engine._models.store_of("same") == 0 and engine._models.store_of("small") == 1
        found.append(decoded(engine, stars.RewardGuidedSpeculation("small", reward_threshold=0.1, segment_size=4)))
    assert found[0] == found[1]


def test_a_process_reward_in_memory(tiny_model, tmp_path):
    """Of which it is, its class says."""
    directory = write_process_model(tmp_path / "steps", source_of(tiny_model, "token"), "token")
    lm = tiny_model(tokenizer=True)
    prompt, response = "Once upon a time", "A step.\n\nThe other one."
    rewards = [stars.Engine(lm, reward, **SMALL).score(prompt, response) for reward in (loaded(directory), directory)]
    assert rewards[0] == rewards[1]
    reward = stars.ProcessReward(loaded(directory), tokenizer=load_tokenizer(directory))
    assert stars.Engine(lm, reward, **SMALL).score(prompt, response) == rewards[1]


def test_the_tokenizer_is_that_of_the_directory_or_given(tiny_model, tmp_path):
    import transformers

    directory, judge = (tiny_model(tokenizer=True, chat_template=True, head=head) for head in ("lm", "reward"))
    params = stars.SamplingParams(max_tokens=8, seed=3)
    wanted = stars.Engine(directory, judge, **SMALL).chat(MESSAGES, params, POLICY, use_tqdm=False)[0].outputs[0]
    model, reward = loaded(directory), loaded(judge)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    bare = loaded(judge)
    for one in (model, bare):
        one.config._name_or_path = "nowhere/here"
    for engine in (
        stars.Engine.from_transformers(loaded(directory), reward, **SMALL),
        stars.Engine.from_transformers(model, reward, tokenizer=theirs, **SMALL),
        stars.Engine.from_transformers(model, stars.CausalReward(bare, tokenizer=theirs), tokenizer=directory, **SMALL),
    ):
        got = engine.chat(MESSAGES, params, POLICY, use_tqdm=False)[0].outputs[0]
        assert (got.token_ids, got.text, got.reward) == (wanted.token_ids, wanted.text, wanted.reward)
    with pytest.raises(RewardError, match=r"given without its tokenizer, .*: give CausalReward\(model, tokenizer="):
        stars.Engine.from_transformers(model, bare, tokenizer=theirs, **SMALL)
    engine = stars.Engine.from_transformers(model, **SMALL)
    assert engine.tokenizer is None
    assert len(engine.generate(PROMPTS[0], PARAMS[0], use_tqdm=False)[0].outputs[0].token_ids) == 12


# -- memory ------------------------------------------------------------------------------------------------------------


def test_what_is_read_is_the_memory_itself(tiny_model):
    model = loaded(tiny_model(MODELS["llama-bias-tied"]))
    source = LoadedModel(model)
    for name, parameter in model.named_parameters():
        assert source.read(name).data_ptr() == parameter.data_ptr() and not source.read(name).requires_grad
    assert source.place_of("lm_head.weight") == source.place_of("model.embed_tokens.weight")


def test_nothing_holds_what_was_copied(tiny_model):
    """The caller's model, and with it the memory of its weights, is free once the caller lets go of it."""
    model, reward = loaded(tiny_model(MODELS["llama"])), loaded(tiny_model(JUDGE))
    engine = stars.Engine.from_transformers(model, reward, **SMALL)
    held = [weakref.ref(one) for one in (model, reward)]
    places = {tensor.data_ptr() for one in (model, reward) for tensor in one.parameters()}
    for decoder in (engine._models.own.decoder, engine.reward.decoder):
        mine = [decoder.embedding, decoder.final_norm, *(weight for layer in decoder.layers for weight in layer)]
        values = [weight.values if isinstance(weight, Weight) else weight for weight in mine
                  if isinstance(weight, (Weight, torch.Tensor))]
        assert len(values) > 12 and not places & {value.data_ptr() for value in values}, "on the CPU all are copies"
    del model, reward
    gc.collect()
    assert [one() for one in held] == [None, None]
    assert not [one for one in gc.get_objects() if type(one) is LoadedModel], "which hold the tensors"
    decoded(engine)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], message: str, call, *given, **named) -> None:
    with pytest.raises(error, match=message):
        call(*given, **named)


@pytest.fixture
def llama(tiny_model):
    return loaded(tiny_model(MODELS["llama"]))


def test_what_is_no_model_of_transformers(tiny_model):
    take = stars.Engine.from_transformers
    refused(ModelError, "model is PosixPath, it must be a PreTrainedModel", take, tiny_model(MODELS["llama"]))
    refused(ModelError, "model is Linear, it must be a PreTrainedModel", take, torch.nn.Linear(2, 2))
    refused(ModelError, "model is NoneType, it must be a PreTrainedModel", take, None)


def test_a_family_that_is_not_known():
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    gpt = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, intermediate_size=16))
    refused(ModelError, "the config of the GPTNeoXForCausalLM given has model_type 'gpt_neox', which is not supported",
            stars.Engine.from_transformers, gpt)


def test_heads_that_are_others(llama, tiny_model):
    reward, bare = loaded(tiny_model(JUDGE)), llama.model
    refused(ModelError, "the LlamaForSequenceClassification given is a reward model", stars.Engine.from_transformers,
            reward)
    refused(ModelError, r"the LlamaModel given lacks 1 tensor \(lm_head.weight\)", stars.Engine.from_transformers, bare)
    refused(ModelError, "the LlamaForCausalLM given has no reward head", stars.Engine.from_transformers, llama, llama)


def test_an_encoder_as_reward(llama):
    import transformers

    bert = transformers.BertForSequenceClassification(transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, intermediate_size=16, num_labels=1))
    refused(RewardError, "reward is a BertForSequenceClassification of transformers, and encoders are loaded from dir",
            stars.Engine.from_transformers, llama, bert)


def test_a_subclass_may_compute_something_else(llama):
    llama.__class__ = type("Mine", (type(llama),), {})
    refused(ModelError, "the config of the Mine given has architecture 'Mine', which is not supported",
            stars.Engine.from_transformers, llama)


def test_quantised_weights(llama):
    layer = llama.model.layers[0].mlp
    layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight.to(torch.int8), requires_grad=False)
    refused(ModelError, r"has model.layers.0.mlp.down_proj.weight as int8, which is not read", LoadedModel, llama)
    layer.down_proj.weight = torch.nn.Parameter(
        torch.zeros(36, 52).as_subclass(type("AffineQuantizedTensor", (torch.Tensor,), {})), requires_grad=False)
    refused(ModelError, "mlp.down_proj.weight as AffineQuantizedTensor, which is not read", LoadedModel, llama)
    llama.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    refused(ModelError, r"the LlamaForCausalLM given is quantised by transformers \(bitsandbytes\)", LoadedModel, llama)


def test_weights_that_are_elsewhere(llama):
    import transformers

    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(llama.config)
    refused(ModelError, r'weights that are on no device \(.* is on "meta"\): load it whole', LoadedModel, empty)
    llama.model.layers[1].to("meta")
    refused(ModelError, r'\(model.layers.1..* is on "meta"\): load it whole', stars.Engine.from_transformers, llama)


def test_adapters_beside_the_weights(llama):
    """As peft wraps a model, and as transformers itself puts adapters into one."""
    llama.merge_and_unload = lambda: None
    refused(ModelError, r"with an adapter beside its weights: give what its merge_and_unload\(\) returns",
            stars.Engine.from_transformers, llama)
    del llama.merge_and_unload
    llama.model.layers[0].mlp.down_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2, 52)))
    refused(ModelError, r"has an adapter beside its weights: give what peft's merge_and_unload", LoadedModel, llama)


def test_weights_and_configuration_that_disagree(llama):
    llama.config.num_hidden_layers = 3
    llama.config.layer_types = None
    refused(ModelError, "the LlamaForCausalLM given lacks 9 tensors", stars.Engine.from_transformers, llama)
    llama.config.num_hidden_layers = 2
    llama.config.num_attention_heads = 5
    refused(ModelError, "has 5 attention heads, not a multiple of its 2 key-value heads: correct model.config",
            stars.Engine.from_transformers, llama)


def test_settings_that_there_are_not(llama):
    refused(RequestError, "Engine has no parameter", stars.Engine.from_transformers, llama, max_lanes=3)
    refused(RequestError, "max_num_seqs is 0", stars.Engine.from_transformers, llama, max_num_seqs=0)


def test_a_slow_tokenizer(llama):
    from transformers import ByT5Tokenizer

    refused(TokenizerError, "tokenizer is ByT5Tokenizer, a slow one", stars.Engine.from_transformers, llama,
            tokenizer=ByT5Tokenizer())


def test_load_model_takes_one_too(llama, tiny_model):
    ours, theirs = load_model(llama), load_model(tiny_model(MODELS["llama"]))
    assert torch.equal(ours.layers[0].qkv.dense(), theirs.layers[0].qkv.dense())


def test_the_engine_does_without_transformers():
    """It is not imported by what takes its models."""
    code = "import sys, stars.engine, stars.model.loaded; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
