"""A reward that is an adapter with a head over the engine's own model: its rewards, what is held once, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import stars
from building import as_on_a_gpu
from editing import edit_json
from lora import ALL, merge, write_adapter
from stars.errors import ModelError, RewardError
from stars.model.sharing import SharedWeights
from stars.reward import CausalReward, LoraReward, resolve_reward
from test_models import addresses, decoders_of

CHAT = {"messages": [{"role": "user", "content": "The quick brown fox"}]}
PARAMS = stars.SamplingParams(max_tokens=11, seed=3, ignore_eos=True)
NOWHERE = "org/chat-model"


def head(hidden: int, seed: int = 4) -> dict[str, torch.Tensor]:
    return {"score.weight": 3 * torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def base(tiny_model) -> Path:
    return tiny_model(tokenizer=True, chat_template=True, family="llama", vocab=311, dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """As train_lora_reward.py writes it: bfloat16, of every product, and of a base that is not here by its name."""
    return write_adapter(tmp_path_factory.mktemp("rewards") / "reward", base, ALL, rank=3, scale=1.0, named=NOWHERE,
                         whole=head(36), dtype=torch.bfloat16, task_type="SEQ_CLS", modules_to_save=["score"])


@pytest.fixture(scope="module")
def engine(base, adapter) -> stars.Engine:
    return stars.Engine(base, str(adapter), dtype="float32")  # a plain directory


def scored(engine: stars.Engine, prompt=CHAT, policy=None) -> stars.CompletionOutput:
    return engine.generate(prompt, PARAMS, policy or stars.Sample(score=True), use_tqdm=False)[0].outputs[0]


@pytest.fixture(scope="module")
def judge(base, adapter, tmp_path_factory):
    """transformers' classifier over the merged weights, in float64."""
    import transformers

    directory = merge(adapter, base, tmp_path_factory.mktemp("merged") / "model")
    edit_json(directory / "config.json", architectures=["LlamaForSequenceClassification"], id2label={"0": "reward"},
              pad_token_id=0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float64).eval()


@pytest.mark.parametrize("prompt", [CHAT, "Once upon a time"], ids=["chat", "text"])
def test_rewards_are_those_of_transformers_with_merged_weights(engine, judge, prompt):
    """What it reads is the prompt as the chat template has it and the response, and nothing behind that. In float32 a
    reward of about 3 * sqrt(36) is off by some hundred roundings."""
    assert isinstance(engine.reward, LoraReward)
    output = engine.generate(prompt, PARAMS, stars.Sample(score=True), use_tqdm=False)[0]
    completion = output.outputs[0]
    with torch.no_grad():
        ids = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])
        expected = judge(input_ids=ids).logits[0, 0].item()
    assert abs(completion.reward - expected) < 3 * math.sqrt(36) * 200 * torch.finfo(torch.float32).eps


def test_segments_are_scored_as_whole_texts_are(engine, judge):
    """Every attempt's reward is that of the response up to its end, whatever the cache went through before."""
    output = engine.generate(CHAT, PARAMS, stars.STARS(segment_size=4, reward_threshold=0.5, beta=1.0, width=3),
                             use_tqdm=False)[0]
    response: list[int] = []
    for segment in output.outputs[0].segments:
        response += segment.token_ids
        with torch.no_grad():
            expected = judge(input_ids=torch.tensor([[*output.prompt_token_ids, *response]])).logits[0, 0].item()
        assert abs(segment.reward - expected) < 3 * math.sqrt(36) * 200 * torch.finfo(torch.float32).eps


def test_the_base_is_held_once_and_caches_are_apart(engine):
    """All of its weights: embedding, products and norms."""
    own, reward = decoders_of(engine)["lm"], engine.reward.decoder
    assert addresses(own)[0] == addresses(reward)[0] and own is not reward
    assert own.embedding is reward.embedding and own.final_norm.data_ptr() == reward.final_norm.data_ptr()
    assert len(own.adapters) == 0 and len(reward.adapters) == 2 * 4
    assert reward.head is None and own.score_head is None and reward.score_head is not None
    assert engine.reward.cache is not engine._cache
    assert engine.reward.framing.encoder is None and engine.reward.tokenizer is engine.tokenizer


def test_an_engine_whose_own_model_is_an_adapter_of_the_same_base(base, adapter, tmp_path):
    writer = write_adapter(tmp_path / "writer", base, scale=1.0, seed=5)
    engine = stars.Engine(writer, adapter)
    assert isinstance(engine.reward, LoraReward)
    own, reward = decoders_of(engine)["lm"], engine.reward.decoder
    assert addresses(own)[0] == addresses(reward)[0]
    assert math.isfinite(scored(engine).reward)


def test_which_directories_are_rewards_over_the_own_model(base, adapter, copied, tiny_model, tmp_path):
    """An adapter that names the engine's model, or nothing that is here; one of another model is a causal reward."""
    other = tiny_model(head="reward", tokenizer=True, vocab=311)
    elsewhere = write_adapter(tmp_path / "elsewhere", other)
    named = copied(adapter)
    edit_json(named / "adapter_config.json", base_model_name_or_path=str(base))
    with SharedWeights(base):
        found = [type(resolve_reward(path)) for path in (adapter, str(named), elsewhere, other, base)]
    assert found == [LoraReward, LoraReward, CausalReward, CausalReward, CausalReward]
    with SharedWeights(None):  # of a Decoder
        assert [type(resolve_reward(path)) for path in (adapter, named)] == [LoraReward, CausalReward]
    assert math.isfinite(scored(stars.Engine(base, elsewhere), "Once").reward)


def test_it_works_inside_of_other_rewards(base, adapter):
    plain = scored(stars.Engine(base, LoraReward(adapter))).reward
    weighted = stars.WeightedReward([(LoraReward(adapter), 2.0), (lambda prompt, responses: [1.0] * len(responses), 1)])
    assert math.isclose(scored(stars.Engine(base, weighted)).reward, 2 * plain + 1, rel_tol=1e-6)


def test_another_engine_has_another_base(base, adapter, tiny_model):
    """A reward that is handed on reads the weights of whose it is now."""
    other = tiny_model(tokenizer=True, chat_template=True, family="llama", vocab=311, dtype="bfloat16", seed=9)
    judge = LoraReward(str(adapter))
    first = stars.Engine(base, judge, dtype="float32")
    before = first.score([CHAT], [[5, 6, 7]])
    del first
    after = stars.Engine(other, judge, dtype="float32").score([CHAT], [[5, 6, 7]])
    fresh = stars.Engine(other, LoraReward(str(adapter)), dtype="float32").score([CHAT], [[5, 6, 7]])
    assert list(after) == list(fresh) != list(before)


@pytest.mark.parametrize("given", [None, "int8"])
def test_what_the_engine_rounds_the_reward_reads(base, adapter, given):
    """Its weights are still held once, and its rewards are those of the rounded weights."""
    engine = stars.Engine(base, adapter, quantization="int8", reward_quantization=given)
    own, reward = decoders_of(engine)["lm"], engine.reward.decoder
    shared = own.layers[1].o
    assert shared is reward.layers[1].o and (shared.format == "INT8" or shared.quant.scheme == "int8")
    assert own.embedding is reward.embedding
    assert abs(scored(engine).reward - scored(stars.Engine(base, adapter)).reward) > 1e-6


def test_a_gpus_decoder_has_its_products_beside_those_of_the_base(engine):
    """There are three launches of each in a step, and none are fused with them."""
    beside = as_on_a_gpu(engine.reward.decoder)
    assert beside._fusing is None and beside.adapter_launches == 8 * 3


# -- what does not fit ------------------------------------------------------------------------------------------------


def refused(base, reward, error, message: str) -> None:
    """By one sentence, before a weight is read."""
    with pytest.raises(error, match=message) as seen:
        stars.Engine(base, reward)
    assert "\n" not in str(seen.value) and str(seen.value).count(". ") == 0


@pytest.fixture
def unread(monkeypatch):
    """No weight may be read."""
    from stars.model.reader import Reader

    def read(self, *names):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Reader, "matrix", read)


def test_adapters_of_other_bases(base, adapter, tiny_model, tmp_path, unread):
    """Said with names and shapes, or with both places, before memory is taken."""
    wider = tiny_model(hidden=60, heads=6, kv_heads=3, vocab=311, tokenizer=True)
    refused(base, write_adapter(tmp_path / "wider", wider, named=NOWHERE, whole=head(36)), ModelError,
            r"wider has an adapter of model.layers.0.mlp.down_proj for a matrix of \[\d+, \d+\] and its base .* has "
            r"\[36, \d+\]: use the adapter with the base model that it was trained on")
    refused(base, write_adapter(tmp_path / "head", base, named=NOWHERE, whole=head(40)), ModelError,
            rf"score.weight of .*head has shape \[1, 40\] and its base {base} asks for \[1, 36\] .*: use the adapter")
    refused(base, LoraReward(write_adapter(tmp_path / "both", wider, named=NOWHERE, whole=head(60))), ModelError,
            r"both has an adapter of model.layers.0.mlp.down_proj for a matrix of")
    here = write_adapter(tmp_path / "here", wider, whole=head(60))
    refused(base, LoraReward(here), RewardError,
            f"here is an adapter of {wider} and the engine's own model is {base}: give stars.CausalReward")


def test_an_adapter_with_a_head_is_no_language_model(base, adapter):
    with pytest.raises(ModelError, match=rf"{adapter} has 1 tensor \(score.weight\) that a llama model does not have: "
                                         "give it as a reward, or use an adapter without them"):
        stars.Engine(base, models={"a": adapter})


def test_what_is_no_adapter_with_a_head(base, adapter, copied, tmp_path, unread):
    refused(base, write_adapter(tmp_path / "plain", base, named=NOWHERE), RewardError,
            "plain has low-rank matrices and no reward head: train it with peft's task_type SEQ_CLS")
    with pytest.raises(RewardError, match='reward_quantization is "int8", and a LoraReward reads the weights of the '
                                          'engine.s own model: leave it out and give quantization'):
        stars.Engine(base, adapter, reward_quantization="int8")
    broken = copied(adapter)
    edit_json(broken / "adapter_config.json", use_dora=True)
    refused(base, LoraReward(broken), ModelError, "is an adapter with use_dora = True, which is not supported")
    (broken / "adapter_model.safetensors").write_bytes(b"\x08")
    edit_json(broken / "adapter_config.json", use_dora=False)
    refused(base, LoraReward(broken), ModelError, "is damaged or cut short")
    for given, words in ((base, "it must be a directory with adapter_config.json: a whole model is"),
                         (tmp_path / "nowhere", "it must be a directory with adapter_config.json"),
                         (3, "LoraReward.adapter is 3, it must be a directory with adapter_config.json")):
        with pytest.raises(RewardError, match=words):
            LoraReward(given)


def test_an_engine_that_was_given_a_decoder(base, adapter):
    from stars.model.loader import load_model
    from stars.model.tokenizer import load_tokenizer

    with pytest.raises(RewardError, match="over the engine's own model, which is a Decoder whose files are not known: "
                                          "build the engine with the model's directory"):
        stars.Engine(load_model(base), LoraReward(adapter), tokenizer=load_tokenizer(base))


def test_options_are_those_of_a_causal_reward(adapter):
    for options in (dict(template="html"), dict(close="always"), dict(head=3)):
        with pytest.raises(RewardError, match=f"LoraReward.{next(iter(options))} is"):
            LoraReward(adapter, **options)
    assert repr(LoraReward(adapter)) == f"LoraReward({str(adapter)!r})"
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
