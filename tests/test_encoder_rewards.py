"""Encoder rewards through transformers: what a score may depend on, what is refused when, and whose error is whose."""

from __future__ import annotations

import builtins
import json
import logging
import math
import shutil
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import stars
from building import config_of
from stars.config import EngineConfig
from stars.prompt import Prompt, parse_prompt
from stars.reward import resolve_reward
from stars.reward.base import Candidate, ContextFull
from tiny_models import SENTENCES

CONFIG = config_of(cache_tokens=256, page_size=4, max_num_seqs=4, max_num_lanes=8, max_segment_size=4)
PAD, EOS = 1, 2
TOLERANCE = 1e-4  # logits of order 1, float32; padding moves them by rounding
POLICY = stars.STARS(segment_size=3, max_attempts=3, alpha=0.3, beta=0.5, reward_threshold=0.5, width=3)
TEXTS = ["", " the dog", " sleeps on and on", "!", " once upon a time there was a little girl", " naïve 東京", " fox"]
TYPED = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
MESSAGE_TEMPLATE = ("{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}"
                    "{% elif m.content %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %};{% endfor %}")


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def write_bpe(directory: Path, pair_type: int = 0, **config) -> int:
    """A byte-level tokenizer with RoBERTa's special tokens, <pad> = 1, around every text; its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(SENTENCES[1:3], trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=f"<s> $A </s> <s>:{pair_type} $B:{pair_type} </s>:{pair_type}",
        special_tokens=[("<s>", 0), ("</s>", EOS)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast",
        **config}))
    return tokenizer.get_vocab_size()


def write_encoder(directory: Path, family: str, pair_type: int = 0, tokenizer: dict | None = None, **options) -> Path:
    """A random classifier of a transformers family in DIRECTORY, with weights large enough that a mistake shows."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    vocab = write_bpe(directory, pair_type, **(tokenizer or {}))
    usual = dict(vocab_size=vocab, pad_token_id=PAD, bos_token_id=0, eos_token_id=EOS, num_labels=1)
    bert = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=40)
    sizes = {
        "Bert": bert, "Roberta": bert, "XLMRoberta": bert, "Camembert": bert, "MPNet": bert, "Electra": bert,
        "FNet": bert, "DebertaV2": bert | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0),
        "ConvBert": bert | dict(embedding_size=16, conv_kernel_size=3, head_ratio=1),
        "Albert": bert | dict(embedding_size=8), "Longformer": bert | dict(attention_window=[8, 8]),
        "DistilBert": dict(dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=40),
        "Bart": dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                     decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40,
                     decoder_start_token_id=EOS, forced_eos_token_id=None),
        "T5": dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=PAD),
        "GPT2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=40),
        "XLNet": dict(d_model=16, n_layer=2, n_head=2, d_inner=24, summary_type="last"),
    }[family]
    config = getattr(transformers, family + "Config")(**(usual | sizes | options))
    model = getattr(transformers, family + "ForSequenceClassification")(config)
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "orm" in name and parameter.dim() == 1 else 0.4 * noise)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """encoder("Bert", …): the directory of that model, written once. Treat it as read-only."""
    written: dict = {}

    def get(family: str, **options) -> Path:
        key = (family, repr(options))
        if key not in written:
            written[key] = write_encoder(tmp_path_factory.mktemp(family), family, **options)
        return written[key]

    return get


@pytest.fixture(scope="module")
def lm(tiny_model) -> Path:
    return tiny_model(family="llama", tokenizer=True, chat_template=True)


class Plain:
    """A language model's tokenizer that prompts of these tests do not use."""


def bound(directory: Path, config: EngineConfig = CONFIG, **options) -> stars.EncoderReward:
    reward = stars.EncoderReward(directory, **options)
    reward.bind(Plain(), 1000, config)
    return reward


def alone(directory: Path, *texts: str, label: int = 0) -> float:
    """transformers' own logit for one text, or one pair of texts, nothing beside it."""
    model, tokenizer = loaded(directory)
    encoded = tokenizer(*([text] for text in texts), return_tensors="pt")
    with torch.no_grad():
        return model(**encoded).logits[0, label].item()


@cache
def loaded(directory: Path):
    import transformers

    return (transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval(),
            transformers.AutoTokenizer.from_pretrained(directory))


def score(reward: stars.EncoderReward, prompt: str, texts: list[str], max_tokens: int = 4) -> list:
    session = reward.open(Prompt(prompt, [5], prompt), max_tokens)
    return [one.reward for one in reward.score([Candidate(session, [], text) for text in texts])]


# -- what a score may depend on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family, context, batch", [
    ("Bert", 40, 4), ("Electra", 40, 4), ("Albert", 40, 4), ("DistilBert", 40, 4), ("DebertaV2", 40, 4),
    ("Roberta", 38, 4), ("XLMRoberta", 38, 4), ("Camembert", 38, 4), ("MPNet", 38, 4), ("Longformer", 38, 4),
    ("Bart", 40, 4), ("T5", 1 << 30, 4), ("GPT2", 40, 4),
    ("FNet", 40, 1), ("ConvBert", 40, 1), ("XLNet", 1 << 30, 1),  # padding would change these: one text at a time
])
def test_every_family_scores_a_text_as_if_it_were_alone(encoder, family, context, batch):
    """In a batch of texts of many lengths, up to the last position there is and not one token beyond."""
    directory = encoder(family)
    reward = bound(directory, batch_size=4)
    assert (reward.max_model_len, reward._batch_size) == (context, batch)
    for text, got in zip(TEXTS, score(reward, "The dog", TEXTS), strict=True):
        assert got == pytest.approx(alone(directory, "The dog" + text), abs=TOLERANCE), text
    assert len({round(value, 3) for value in score(reward, "The dog", TEXTS)}) == len(TEXTS)
    if context > 1000:
        return
    longest = "q" * (context - 2)  # <s> and </s> around it
    [fits, too_long] = score(reward, "", [longest, longest + "q"])
    assert fits == pytest.approx(alone(directory, longest), abs=TOLERANCE)
    assert isinstance(too_long, ContextFull)
    assert str(too_long) == (f"the text is {context + 1} tokens for the reward model, whose context is {context}: "
                             "lower max_tokens")
    if family not in ("DebertaV2", "Longformer"):  # relative positions; a window's padding
        with pytest.raises((IndexError, RuntimeError)):
            alone(directory, longest + "q")


def test_the_tokenizer_may_set_a_shorter_context(encoder):
    assert bound(encoder("Bert", tokenizer={"model_max_length": 31})).max_model_len == 31


@pytest.mark.parametrize("family", ["Bert", "Roberta", "GPT2"])
def test_texts_are_filled_up_on_the_right_whatever_the_tokenizer_says(encoder, family):
    directory = encoder(family, tokenizer={"padding_side": "left"})
    for text, got in zip(TEXTS, score(bound(directory), "The dog", TEXTS), strict=True):
        assert got == pytest.approx(alone(directory, "The dog" + text), abs=TOLERANCE), text


@pytest.mark.parametrize("config_pad, tokenizer_pad, batch", [
    (None, "<pad>", 4), (PAD, None, 4), (None, None, 1), (7, "<pad>", 4)])
def test_pad_tokens(encoder, config_pad, tokenizer_pad, batch):
    """The tokenizer's, else the model's, else none is needed; never a reward that is read at a filled-up place."""
    directory = encoder("GPT2", pad_token_id=config_pad, tokenizer={"pad_token": tokenizer_pad})
    reward = bound(directory, batch_size=4)
    assert reward._batch_size == batch
    for text, got in zip(TEXTS, score(reward, "The dog", TEXTS), strict=True):
        assert got == pytest.approx(alone(directory, "The dog" + text), abs=TOLERANCE), text


def test_a_pad_token_without_an_embedding_is_none(encoder, tmp_path):
    """As tokenizers have it that were given one after training."""
    directory = shutil.copytree(encoder("GPT2", pad_token_id=None), tmp_path / "model")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<filler>"}))
    reward = bound(directory)
    assert reward.tokenizer.pad_token_id >= reward._rows and reward._batch_size == 1
    [got, other] = score(reward, "The dog", [" the dog", ""])
    assert got == pytest.approx(alone(directory, "The dog the dog"), abs=TOLERANCE) and other != got


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_pairs(encoder, family):
    directory = encoder(family, pair_type=1 if family == "Bert" else 0, tokenizer=TYPED)
    assert "token_type_ids" in loaded(directory)[1]("the").keys()
    for text, got in zip(TEXTS, score(bound(directory, inputs="pair"), "The dog", TEXTS), strict=True):
        assert got == pytest.approx(alone(directory, "The dog", text), abs=TOLERANCE), text


def test_a_model_without_types_does_not_take_pairs_of_them(encoder):
    directory = encoder("Roberta", pair_type=1, type_vocab_size=1, tokenizer=TYPED)
    with pytest.raises(stars.ModelError, match="gives texts the type 1 and the model knows 1 types: use inputs="):
        bound(directory, inputs="pair")
    [got] = score(bound(directory), "The dog", [" the"])
    assert got == pytest.approx(alone(directory, "The dog the"), abs=TOLERANCE)


def test_deterministic_scores_have_the_same_bits_in_any_company(encoder):
    directory = encoder("Bert")
    reward = bound(directory, replace(CONFIG, deterministic=True))
    together = score(reward, "The dog", TEXTS)
    assert together == [one for text in TEXTS for one in score(reward, "The dog", [text])]


# -- whose error is whose -----------------------------------------------------------------------------------------


def test_a_batch_that_fails_is_scored_text_by_text(encoder):
    """BART takes no batch whose texts have unequal numbers of </s>: each is scored nevertheless."""
    directory = encoder("Bart")
    texts = [" the dog", " the </s> fox", " sleeps", "</s>!"]
    reward = bound(directory)
    with pytest.raises(ValueError, match="same number of <eos>"):
        reward._logits([one for one in reward._encode([("The", text) for text in texts])])
    for text, got in zip(texts, score(reward, "The dog", texts), strict=True):
        assert got == pytest.approx(alone(directory, "The dog" + text), abs=TOLERANCE)


def test_a_text_that_the_model_or_its_tokenizer_does_not_take(encoder, monkeypatch):
    directory = encoder("Bert")
    reward = bound(directory)
    bad = reward.tokenizer("%")["input_ids"][1]
    forward = reward.model.forward

    def sometimes(**inputs):
        if bool((inputs["input_ids"] == bad).any()):
            raise KeyError("per\ncent")
        return forward(**inputs)

    monkeypatch.setattr(reward.model, "forward", sometimes)
    good, failing, unreadable, last = score(reward, "The dog", [" the", "100 %", "\ud800", " on"])
    assert isinstance(failing, stars.RewardError) and str(failing) == "the reward model raised KeyError: 'per\\ncent'"
    assert isinstance(unreadable, stars.RewardError)
    assert str(unreadable).startswith("the reward model's tokenizer does not take this text (")
    assert good == pytest.approx(alone(directory, "The dog the"), abs=TOLERANCE)
    assert last == pytest.approx(alone(directory, "The dog on"), abs=TOLERANCE)


@pytest.mark.parametrize("policy", [POLICY, stars.Sample(score=True)])
def test_neighbours_of_a_failing_request_go_on(lm, encoder, monkeypatch, policy):
    """The same texts and rewards as without it, and nothing is held afterwards."""
    directory = encoder("Bert", max_position_embeddings=120)
    engine = stars.Engine(lm, directory, cache_tokens=1024)
    params = stars.SamplingParams(max_tokens=9, seed=4, n=2)
    expected = engine.generate(["The dog", "A girl"], params, policy, use_tqdm=False)
    reward = engine.reward
    bad = torch.tensor(reward.tokenizer("100 %")["input_ids"][:-1])
    forward = reward.model.forward

    def sometimes(**inputs):
        if bool((inputs["input_ids"][:, : len(bad)] == bad).all(1).any()):
            raise IndexError("index out of range in self")
        return forward(**inputs)

    monkeypatch.setattr(reward.model, "forward", sometimes)
    outputs = engine.generate(["The dog", "100 %", "A girl"], params, policy, use_tqdm=False)
    for completion in outputs[1].outputs:
        assert completion.finish_reason == "error"
        assert completion.error == "the reward model raised IndexError: index out of range in self"
    for before, after in zip(expected, (outputs[0], outputs[2]), strict=True):
        for one, other in zip(before.outputs, after.outputs, strict=True):
            assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
            assert one.reward == pytest.approx(other.reward, abs=TOLERANCE)
    engine.check_integrity()
    assert engine._cache.num_free_pages == engine._cache.num_pages


# -- what is refused before tokens are spent ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", [POLICY, stars.Sample(score=True), stars.BestOfN(2)])
def test_what_cannot_fit_ends_before_a_token_is_drawn(lm, encoder, policy):
    """RoBERTa's 38 positions: <s>, </s>, 20 letters and 17 tokens to come are one too many; its neighbour goes on."""
    engine = stars.Engine(lm, encoder("Roberta"), cache_tokens=1024)
    params = [stars.SamplingParams(max_tokens=n, seed=1, n=2, ignore_eos=True) for n in (17, 2)]
    refused, other = engine.generate(["q" * 20, "q" * 20], params, policy, use_tqdm=False)
    for completion in refused.outputs:
        assert (completion.finish_reason, completion.token_ids, completion.segments) == ("error", [], [])
        assert completion.error == ("prompt and max_tokens make 39 tokens for the reward model, whose context is 38: "
                                    "lower max_tokens or shorten the prompt")
    assert refused.metrics.lm_tokens_drawn == 0
    assert [completion.finish_reason for completion in other.outputs] == ["length", "length"]
    engine.check_integrity()
    assert engine._cache.num_free_pages == engine._cache.num_pages
    with pytest.raises(stars.RequestError, match="the prompt makes 40 tokens .* context is 38: shorten the prompt"):
        engine.generate("q" * 38, stars.SamplingParams(max_tokens=1), policy, use_tqdm=False)


def test_a_prompt_with_tokens_that_the_model_has_no_embedding_for(lm, encoder, tmp_path):
    directory = shutil.copytree(encoder("Bert"), tmp_path / "model")
    reward = bound(directory)
    reward.tokenizer.add_tokens(["<new>"])
    with pytest.raises(stars.RewardError, match="token id 290 is outside the reward model's vocabulary of 290"):
        reward.open(Prompt("the <new> fox", [5], None), 4)
    good, outside = score(reward, "the fox", [" the", " <new>"])
    assert good == pytest.approx(alone(encoder("Bert"), "the fox the"), abs=TOLERANCE)
    assert str(outside) == ("token id 290 is outside the reward model's vocabulary of 290: use the tokenizer it came "
                            "with")


def test_a_response_that_outgrows_the_context_ends_there(lm, encoder):
    """Its text takes more tokens of the reward model than of the language model: it ends at the last segment that could
    be read, with that segment's reward; one that never could be read is an error."""
    directory = encoder("Roberta")
    engine = stars.Engine(lm, directory, cache_tokens=1024)
    params = stars.SamplingParams(max_tokens=18, seed=2, n=4, ignore_eos=True, temperature=1.5)
    policy = stars.STARS(segment_size=3, max_attempts=2, alpha=1.0, beta=1.0, reward_threshold=0.0)
    [output] = engine.generate("q" * 18, params, policy, use_tqdm=False)
    ended = [completion for completion in output.outputs if len(completion.token_ids) < 18]
    assert len(ended) >= 2
    for completion in ended:
        assert completion.finish_reason == "length" and completion.error is None
        assert len(completion.token_ids) % 3 == 0 and completion.token_ids
        text = "q" * 18 + completion.text.rstrip("\ufffd")
        assert len(engine.reward.tokenizer(text)["input_ids"]) <= 38
        assert completion.reward == pytest.approx(alone(directory, text), abs=TOLERANCE)
    [output] = engine.generate("q" * 18, params, stars.STARS(segment_size=18, max_attempts=2, alpha=1.0, beta=1.0,
                                                             reward_threshold=0.0), use_tqdm=False)
    assert any("whose context is 38: lower max_tokens" in (completion.error or "") for completion in output.outputs)
    engine.check_integrity()
    assert engine._cache.num_free_pages == engine._cache.num_pages


# -- messages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages, text", [
    ([{"role": "user", "content": "hi"}], "hi\n"),
    ([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}], "be brief\nhi\n"),
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []}], "hi\n\n"),
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": []}], "hi\n\n"),
    ([{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]}], "the dog\n"),
    ([{"role": "user", "content": []}], "\n"),
])
def test_messages_are_their_texts(lm, encoder, tmp_path, messages, text):
    """Rewards, that of the prompt too, are those of the contents and the response behind them."""
    directory = encoder("Bert")
    model = shutil.copytree(lm, tmp_path / "lm")
    (model / "chat_template.jinja").write_text(MESSAGE_TEMPLATE)
    engine = stars.Engine(model, directory, cache_tokens=1024)
    [output] = engine.generate({"messages": messages}, stars.SamplingParams(max_tokens=3, seed=1), POLICY,
                               use_tqdm=False)
    assert output.prompt_reward == pytest.approx(alone(directory, text), abs=TOLERANCE)
    completion = output.outputs[0]
    assert completion.reward == pytest.approx(alone(directory, text + completion.text.rstrip("\ufffd")), abs=TOLERANCE)


@pytest.mark.parametrize("content, message", [
    ([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}],
     "a message's content has a part of type 'image_url' and the reward model reads text"),
    ([{"type": "text", "text": 5}], "a message's content has a part of type 'text' and the reward model reads text"),
    ([5], "a message's content has a part of type 'int' and the reward model reads text"),
    ({"text": "hi"}, "a message's content is dict where the reward model reads text"),
    (5, "a message's content is int where the reward model reads text"),
])
def test_messages_that_are_no_text_are_refused_at_the_door(lm, encoder, content, message):
    engine = stars.Engine(lm, encoder("Bert"), cache_tokens=1024)
    messages = [{"role": "user", "content": content}]
    prompt = Prompt(messages, [5], "x")
    with pytest.raises(stars.RequestError, match=message):
        engine.reward.check(prompt, 4)


def test_ids_that_cannot_be_shown_as_text(encoder):
    reward = bound(encoder("Bert"))
    with pytest.raises(stars.RequestError, match="cannot be decoded: give the prompt as text"):
        reward.check(Prompt(None, [5], None), 4)
    with pytest.raises(stars.RequestError, match="the reward model's tokenizer does not take this text"):
        reward.check(Prompt("\ud800", [5], "\ud800"), 4)


# -- directories --------------------------------------------------------------------------------------------------


def edited(source: Path, target: Path, **changes) -> Path:
    """A copy of a model whose config.json has these keys; None takes a key out."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def test_code_of_a_directory_is_never_run_and_nobody_is_asked(encoder, tmp_path, monkeypatch):
    """In the model's place, and in that of its tokenizer."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question on standard input"))
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import *\nclass C(PreTrainedConfig):\n    model_type = 'own'\n"
    maps = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}
    directory = edited(encoder("Bert"), tmp_path / "model", model_type="own", auto_map=maps)
    (directory / "own.py").write_text(code)
    with pytest.raises(stars.ModelError, match="needs code of its own, which is never run: use a model of a type"):
        bound(directory)
    directory = shutil.copytree(encoder("Bert"), tmp_path / "tokenizer")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(
        config | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}))
    (directory / "own.py").write_text(code)
    [got] = score(bound(directory), "The dog", [""])  # tokenizer.json is all that is needed
    assert got == pytest.approx(alone(encoder("Bert"), "The dog"), abs=TOLERANCE)
    # Beside a type that transformers has, the directory's code is passed over.
    directory = edited(encoder("Bert"), tmp_path / "known", auto_map=maps)
    (directory / "own.py").write_text(code)
    [got] = score(bound(directory), "The dog", [""])
    assert got == pytest.approx(alone(encoder("Bert"), "The dog"), abs=TOLERANCE)
    assert not ran.exists()


def test_an_attention_that_would_be_downloaded_is_not_used(encoder, tmp_path):
    directory = edited(encoder("Bert"), tmp_path / "model", attn_implementation="kernels-community/anything")
    reward = bound(directory)
    assert reward.model.config._attn_implementation in ("sdpa", "eager")
    assert score(reward, "The dog", [""])[0] == pytest.approx(alone(encoder("Bert"), "The dog"), abs=TOLERANCE)


def test_pickles_and_adapters(encoder, tmp_path):
    """A pickle is not read, whether it is all there is or lies beside the safetensors."""
    directory = shutil.copytree(encoder("Bert"), tmp_path / "model")
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    [got] = score(bound(directory), "The dog", [""])
    assert got == pytest.approx(alone(encoder("Bert"), "The dog"), abs=TOLERANCE)
    (directory / "model.safetensors").unlink()
    with pytest.raises(stars.ModelError, match="its weights in pytorch_model.bin, a pickle, which is never read"):
        bound(directory)
    directory = shutil.copytree(encoder("Bert"), tmp_path / "adapter")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(stars.ModelError, match="holds an adapter, not a model: merge it"):
        bound(directory)


@pytest.mark.parametrize("changes", [
    dict(num_hidden_layers=10_000_000), dict(vocab_size=10**11), dict(max_position_embeddings=10**10),
    dict(hidden_size="large"), dict(hidden_size=-8), dict(num_attention_heads=3), dict(model_type=["bert"]),
    dict(model_type="own"), dict(id2label={"a": 1}), dict(pad_token_id=10**30), dict(dtype="pickle"),
    dict(hidden_act="unheard of"), dict(quantization_config={"quant_method": "gptq"}),
])
def test_what_transformers_does_not_load_is_one_sentence(encoder, tmp_path, changes):
    directory = edited(encoder("Bert"), tmp_path / "model", **changes)
    with pytest.raises(stars.ModelError) as caught:
        reward = resolve_reward(directory)
        assert isinstance(reward, stars.EncoderReward)
        reward.bind(Plain(), 1000, CONFIG)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_files_that_are_damaged(encoder, tmp_path):
    for name, content in (("model.safetensors", b"\0" * 90), ("tokenizer.json", b"{}"), ("config.json", b"["),
                          ("tokenizer_config.json", b"5")):
        directory = shutil.copytree(encoder("Bert"), tmp_path / name)
        (directory / name).write_bytes(content)
        with pytest.raises(stars.ModelError) as caught:
            resolve_reward(directory).bind(Plain(), 1000, CONFIG)
        assert "\n" not in str(caught.value), name


def test_a_model_that_reads_more_than_text_is_refused_when_the_engine_is_built(encoder, monkeypatch):
    monkeypatch.setattr("transformers.BertForSequenceClassification.forward",
                        lambda self, input_ids, image: None)
    with pytest.raises(stars.ModelError, match="cannot score a text .the reward model raised TypeError.*: use a model"):
        bound(encoder("Bert"))


# -- normalised heads ---------------------------------------------------------------------------------------------


def with_tensors(directory: Path, **tensors: float) -> Path:
    """Adds one-element tensors to the checkpoint."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    save_file(load_file(path) | {name: torch.tensor([value]) for name, value in tensors.items()}, path,
              metadata={"format": "pt"})
    return directory


def test_a_normalised_encoder(encoder, tmp_path):
    raw = [alone(encoder("Bert"), "The dog" + text) for text in TEXTS]
    directory = edited(encoder("Bert"), tmp_path / "model", normalize_reward=True, mean=-1.5, std=0.25)
    for got, logit in zip(score(bound(directory), "The dog", TEXTS), raw, strict=True):
        assert got == pytest.approx((logit + 1.5) / 0.25, abs=TOLERANCE / 0.25)


@pytest.fixture(scope="module")
def causal(tiny_model) -> Path:
    return tiny_model(family="qwen2", head="reward", tokenizer=True, chat_template=True)


@pytest.mark.parametrize("changes, tensors, mean, std", [
    (dict(normalize_reward=True, mean=0.75, std=1.25), {}, 0.75, 1.25),
    (dict(normalize_reward=True, mean=[0.75], std=[1.25]), {}, 0.75, 1.25),
    (dict(normalize_reward=True), dict(mean=-2.0, std=0.5), -2.0, 0.5),
    (dict(normalize_reward=True, mean=0.7501, std=1.25), dict(mean=0.75, std=1.25), 0.7501, 1.25),
    (dict(normalize_reward=False, mean=0.75, std=1.25), dict(mean=7.0, std=2.0), 0.0, 1.0),
    ({}, dict(mean=0.0, std=1.0), 0.0, 1.0),
])
def test_a_normalised_causal_head(lm, causal, tmp_path, changes, tensors, mean, std):
    """(logit - mean) / std wherever a reward is read: attempts, the prompt, thresholds and verdicts of the law."""
    plain = stars.Engine(lm, causal, cache_tokens=1024, deterministic=True)
    directory = with_tensors(edited(causal, tmp_path / "model", **changes), **tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = stars.Engine(lm, directory, cache_tokens=1024, deterministic=True)
    params = stars.SamplingParams(max_tokens=14, n=2, seed=3)
    raw_threshold, beta = 1.0, 0.5
    [raw] = plain.generate("The dog", params, stars.STARS(5, 4, 0.25, beta, raw_threshold, 2), use_tqdm=False)
    # The law reads (reward - tau) / beta: with beta and threshold in the new unit, every verdict is the same.
    policy = stars.STARS(5, 4, 0.25, beta / std, (raw_threshold - mean) / std, 2)
    [output] = engine.generate("The dog", params, policy, use_tqdm=False)
    tolerance = 1e-5 * max(1.0, abs(mean)) / std * 10  # raw rewards of order 1 to 10, float32
    assert output.prompt_reward == pytest.approx((raw.prompt_reward - mean) / std, abs=tolerance)
    verdicts = []
    for one, other in zip(raw.outputs, output.outputs, strict=True):
        assert one.token_ids == other.token_ids
        for before, after in zip(one.segments, other.segments, strict=True):
            for attempt, scored in zip(before.attempts, after.attempts, strict=True):
                assert (attempt.reward is None) == (scored.reward is None)
                if attempt.reward is not None:
                    assert scored.reward == pytest.approx((attempt.reward - mean) / std, abs=tolerance)
                    verdicts.append(scored.accepted)
                assert attempt.accepted == scored.accepted
    assert len(set(verdicts)) == 2


@pytest.mark.parametrize("kind", ["causal", "Bert"])
@pytest.mark.parametrize("changes, tensors, message", [
    (dict(normalize_reward=True), {}, "has normalize_reward and has no mean: add the mean and std of the rewards"),
    (dict(normalize_reward=True, mean=1.0), {}, "has normalize_reward and has no std"),
    (dict(normalize_reward=True, mean="much", std=1.0), {}, "needs one finite number as mean"),
    (dict(normalize_reward=True, mean=math.nan, std=1.0), {}, "needs one finite number as mean"),
    (dict(normalize_reward=True, mean=10**400, std=1.0), {}, "needs one finite number as mean"),
    (dict(normalize_reward=True, mean=True, std=1.0), {}, "needs one finite number as mean"),
    (dict(normalize_reward=True, mean=[1.0, 2.0], std=1.0), {}, "needs one finite number as mean"),
    (dict(normalize_reward=True, mean=0.0, std=0.0), {}, "std = 0, which must be positive"),
    (dict(normalize_reward=True, mean=0.0, std=-1.0), {}, "std = -1, which must be positive"),
    (dict(normalize_reward="yes", mean=0.0, std=1.0), {}, "has normalize_reward = 'yes': set it to true"),
    (dict(normalize_reward=True, mean=0.5, std=1.0), dict(mean=0.0, std=1.0), "mean = 0.5 and the tensor mean beside"),
])
def test_normalisations_that_cannot_be_applied(causal, encoder, tmp_path, kind, changes, tensors, message):
    source = causal if kind == "causal" else encoder(kind)
    directory = with_tensors(edited(source, tmp_path / "model", **changes), **tensors)
    with pytest.raises(stars.ModelError) as caught:
        if kind == "causal":
            from stars.model.loader import load_model

            load_model(directory, head="reward")
        else:
            bound(directory)
    assert message in str(caught.value) and str(directory) in str(caught.value)


@pytest.mark.parametrize("kind", ["causal", "Bert"])
def test_statistics_that_nobody_asked_for_are_said_and_left_out(lm, causal, encoder, tmp_path, kind):
    """As OpenRLHF itself has it where normalize_reward is not set."""
    source = causal if kind == "causal" else encoder(kind)
    rewards = []
    for directory in (source, edited(source, tmp_path / "config", mean=2.0, std=3.0),
                      with_tensors(shutil.copytree(source, tmp_path / "tensor"), std=3.0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine = stars.Engine(lm, directory, cache_tokens=1024)
        said = [str(one.message) for one in caught if "does not say normalize_reward" in str(one.message)]
        assert len(said) == (0 if directory is source else 1)
        [output] = engine.generate("The dog", stars.SamplingParams(max_tokens=4, seed=1), stars.Sample(score=True),
                                   use_tqdm=False)
        rewards.append(output.outputs[0].reward)
    assert rewards[0] == rewards[1] == rewards[2]


def test_a_language_model_has_no_statistics(tiny_model, tmp_path):
    """Tensors of these names are as unexpected there as any other."""
    directory = with_tensors(shutil.copytree(tiny_model(family="qwen2"), tmp_path / "model"), mean=0.0)
    with pytest.raises(stars.ModelError, match="has 1 tensor .mean. that a qwen2 model"):
        stars.Engine(directory)


def test_a_prompt_of_ids_is_read_as_its_text(lm, encoder):
    directory = encoder("Bert")
    engine = stars.Engine(lm, directory, cache_tokens=1024)
    prompt = parse_prompt({"prompt_token_ids": engine.tokenizer.encode("The dog")}, engine.tokenizer, 10**6)
    [got] = [one.reward for one in engine.reward.score([Candidate(engine.reward.open(prompt, 4), [], " the")])]
    assert got == pytest.approx(alone(directory, "The dog the"), abs=TOLERANCE)


# -- what its files may ask for ---------------------------------------------------------------------------------------


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture()
def copied(encoder, tmp_path) -> Path:
    """A Bert of one's own."""
    return Path(shutil.copytree(encoder("Bert"), tmp_path / "copy"))


@pytest.mark.parametrize(("values", "what"), [
    ({"num_labels": 10**8, "id2label": None}, "100000000 in 'num_labels'"),
    ({"text_config": {"num_labels": 10**8}}, "100000000 in 'num_labels'"),
    ({"num_hidden_layers": 10**9}, "1000000000 in 'num_hidden_layers'"),
    ({"attention_types": [[["global"], 10**9]]}, "1000000000 in 'attention_types'"),
])
def test_sizes_are_compared_with_the_tensors_before_transformers_reads_them(values, what, copied, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)  # which would make lists of that length
    changed(copied / "config.json", **values)
    with pytest.raises(stars.ModelError, match=what):
        bound(copied)


GROWING = {"type": "Sequence", "normalizers": [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}] * 7}
SEARCHING = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("part", [{"normalizer": GROWING}, {"pre_tokenizer": SEARCHING},
                                  {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}}])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.4.0.json"])
def test_tokenizers_without_bound_are_refused_before_they_are_read(part, file, copied, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)  # which would run a normaliser
    state = json.loads((copied / "tokenizer.json").read_text())
    (copied / file).write_text(json.dumps({**state, **part}))
    changed(copied / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.json"])
    with pytest.raises(stars.errors.TokenizerError, match="with a tokenizer of a usual kind"):
        bound(copied)


def test_usual_tokenizers_are_bounded():
    """Those that transformers has for encoders; SentencePiece's table of NFKC makes 18 characters of one at most."""
    import transformers
    from tokenizers import normalizers

    from stars.model import tokenizer_limits

    for name in ("Bert", "Roberta", "Albert", "XLNet", "DebertaV2", "T5", "XLMRoberta", "Camembert", "MPNet", "BigBird",
                 "Funnel", "Barthez", "Qwen2", "CLIP", "GPT2", "RemBert"):
        tokenizer_limits.check_encoder(getattr(transformers, name + "Tokenizer")().backend_tokenizer, name)
    fold = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    assert 18 * tokenizer_limits._state_growth(tokenizer_limits.part_state(fold)) < tokenizer_limits.MOST_ENCODER_GROWTH


@pytest.mark.parametrize("kept", [False, True])
def test_a_tokenizer_that_is_missing_is_not_made_up(kept, copied):
    """transformers makes one of special tokens alone, to which all words are one."""
    (copied / "tokenizer.json").unlink()
    changed(copied / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    if not kept:
        (copied / "tokenizer_config.json").unlink()
    with pytest.raises(stars.errors.TokenizerError, match="knows no word|has no file of a tokenizer") as caught:
        bound(copied)
    assert ("knows no word" in str(caught.value)) == kept


class PanicException(BaseException):
    """As the library's: no Exception."""


def test_panics_of_the_tokenizer_are_a_texts_own_error(copied, monkeypatch):
    import transformers

    def panic(*args, **kwargs):
        raise PanicException("index out of bounds")

    reward = bound(copied)
    tokenizer = reward.tokenizer
    encode = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, texts, **kwargs: (
        panic() if any("fox" in text for text in texts) else encode(self, texts, **kwargs)))
    good, bad, last = score(reward, "the", [" dog", " fox", " dog"])
    assert good == last and isinstance(bad, stars.RewardError) and "index out of bounds" in str(bad)
    with pytest.raises(stars.RequestError, match="does not take this text"):
        reward.check(Prompt("fox", [5], "fox"), 4)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(stars.ModelError, match="PanicException: index out of bounds"):
        bound(copied)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reward.check(Prompt("dog", [5], "dog"), 4)
