"""What scores: causal reward models in their own cache, encoders, callables, and how one is chosen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import stars
from building import config_of
from stars.model.tokenizer import load_tokenizer
from stars.prompt import parse_prompt
from stars.reward import resolve_reward
from stars.reward.base import Candidate
from tiny_models import BOS, EOS, write_tokenizer
from toy import ToyModel, ids, table_reward, toy_engine

TOLERANCE = 1e-4  # rewards of order 1 to 10, float32
POLICY = stars.STARS(segment_size=5, max_attempts=4, alpha=0.3, beta=0.5, reward_threshold=2.0, width=2)
PARAMS = stars.SamplingParams(max_tokens=14, n=2, seed=3)
CONFIG = config_of(cache_tokens=1024, page_size=4, max_num_seqs=4, max_num_lanes=8, max_segment_size=4)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is a dog?"}]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def lm(tiny_model) -> Path:
    return tiny_model(family="llama", tokenizer=True, chat_template=True)


@pytest.fixture(scope="module")
def same(tiny_model) -> Path:
    """A reward model of the same vocabulary."""
    return tiny_model(family="qwen2", head="reward", tokenizer=True, chat_template=True)


@pytest.fixture(scope="module")
def other(tiny_model) -> Path:
    """A reward model that splits text differently."""
    return tiny_model(family="llama", head="reward", tokenizer=True, chat_template=True, tokenizer_seed=2, seed=7)


@pytest.fixture(scope="module")
def reference():
    """reference(directory, ids): transformers' raw logit."""
    import transformers

    models = {}

    def score(directory: Path, token_ids: list[int]) -> float:
        if directory not in models:
            models[directory] = transformers.AutoModelForSequenceClassification.from_pretrained(
                directory, dtype=torch.float32).eval()
        with torch.no_grad():
            return models[directory](torch.tensor([token_ids])).logits[0, 0].item()

    return score


def all_attempts(output: stars.RequestOutput):
    """(committed ids before, attempt) of every scored attempt."""
    for completion in output.outputs:
        assert completion.error is None
        before: list[int] = []
        for segment in completion.segments:
            for attempt in segment.attempts:
                if attempt.reward is not None:
                    yield before, attempt
            before = before + segment.token_ids


def content(response: list[int]) -> list[int]:
    return response[:-1] if response and response[-1] == EOS else response


def check(output, encode, reference, directory, closing=()) -> None:
    """Every reward of `output` is that of the whole text from scratch; encode(response ids) -> RM ids."""
    compared = 0
    for before, attempt in all_attempts(output):
        expected = reference(directory, encode(content(before + attempt.token_ids)) + list(closing))
        assert attempt.reward == pytest.approx(expected, abs=TOLERANCE)
        compared += 1
    assert compared > 6
    assert output.prompt_reward == pytest.approx(reference(directory, encode([]) + list(closing)), abs=TOLERANCE)


# -- causal -------------------------------------------------------------------------------------------------------


def test_same_vocabulary_passes_ids_through(lm, same, reference):
    """Ids that are not how the tokenizer would spell their text are scored as they are."""
    engine = stars.Engine(lm, same, cache_tokens=1024)
    assert engine.reward.same_vocabulary and not engine.reward.needs_text
    [output] = engine.generate("The dog sleeps", PARAMS, POLICY, use_tqdm=False)
    prompt = output.prompt_token_ids
    assert prompt[0] == BOS and BOS not in prompt[1:]
    check(output, lambda response: prompt + response, reference, same)
    metrics = output.metrics
    assert metrics.rm_tokens_scored < metrics.rm_tokens_full_rescore / 2


def encode_as(tokenizer, prompt_text: str, lm_tokenizer, special: bool = True):
    """The whole text in the reward model's own ids; half a character at the end is left out."""
    return lambda response: tokenizer.encode(prompt_text + lm_tokenizer.decode(response).rstrip("\ufffd"),
                                             add_special_tokens=special)


def test_other_vocabulary_is_reencoded(lm, other, reference):
    """Incremental scores, kept to the longest common prefix, equal the whole text encoded and scored from scratch."""
    engine = stars.Engine(lm, other, cache_tokens=1024)
    assert not engine.reward.same_vocabulary and engine.reward.needs_text
    prompt = "The quick brown fox"
    outputs = engine.generate([prompt, {"prompt_token_ids": engine.tokenizer.encode(prompt)}], PARAMS, POLICY,
                              use_tqdm=False)
    for output in outputs:
        check(output, encode_as(load_tokenizer(other), prompt, engine.tokenizer), reference, other)
    assert outputs[0].outputs[0].segments == outputs[1].outputs[0].segments
    assert outputs[0].metrics.rm_tokens_scored < outputs[0].metrics.rm_tokens_full_rescore


@pytest.mark.parametrize("close", ["none", "template", "eos"])
@pytest.mark.parametrize("vocabulary", ["same", "other"])
def test_messages_in_each_models_own_template(lm, same, other, reference, vocabulary, close):
    """One BOS, from the template; the closing is scored behind every response, r(prompt) too, and then dropped."""
    directory = same if vocabulary == "same" else other
    tokenizer = load_tokenizer(directory)
    engine = stars.Engine(lm, stars.CausalReward(directory, close=close), cache_tokens=1024)
    [output] = engine.generate({"messages": MESSAGES}, PARAMS, POLICY, use_tqdm=False)
    assert output.prompt_token_ids.count(BOS) == 1 and output.prompt_token_ids[0] == BOS
    prefix, closing_text = tokenizer.split_template(MESSAGES)
    closing = {"none": [], "eos": [EOS], "template": tokenizer.encode(closing_text, add_special_tokens=False)}[close]
    encode = encode_as(tokenizer, prefix, engine.tokenizer, special=False)
    if vocabulary == "same":
        encode = lambda response: tokenizer.encode(prefix, add_special_tokens=False) + response  # noqa: E731
    assert encode([]).count(BOS) == 1
    check(output, encode, reference, directory, closing)


def test_a_plain_prompt_becomes_a_user_turn(lm, same, reference):
    tokenizer = load_tokenizer(same)
    engine = stars.Engine(lm, stars.CausalReward(same, template="chat", close="template"), cache_tokens=1024)
    [output] = engine.generate("what is a dog?", PARAMS, POLICY, use_tqdm=False)
    prefix, closing = tokenizer.split_template([{"role": "user", "content": "what is a dog?"}])
    start = tokenizer.encode(prefix, add_special_tokens=False)
    check(output, lambda response: start + response, reference, same,
          tokenizer.encode(closing, add_special_tokens=False))


def test_raw_template_with_messages(lm, same, reference):
    """template="raw" scores messages as the language model reads them."""
    engine = stars.Engine(lm, stars.CausalReward(same, template="raw"), cache_tokens=1024)
    [output] = engine.generate({"messages": MESSAGES}, PARAMS, POLICY, use_tqdm=False)
    prompt = output.prompt_token_ids
    check(output, lambda response: prompt + response, reference, same)


def test_final_score_of_plain_samples(lm, same, other, reference):
    """Sample(score=True) and BestOfN score a response once, at its end, however long it is beside a slab."""
    for directory in (same, other):
        engine = stars.Engine(lm, directory, cache_tokens=1024, max_segment_size=16)
        params = stars.SamplingParams(max_tokens=60, n=2, seed=5, ignore_eos=True)
        [output] = engine.generate("The dog", params, stars.Sample(score=True), use_tqdm=False)
        encode = encode_as(load_tokenizer(directory), "The dog", engine.tokenizer)
        if directory == same:
            encode = lambda response: output.prompt_token_ids + response  # noqa: B023, E731
        for completion in output.outputs:
            expected = reference(directory, encode(completion.token_ids))
            assert completion.reward == pytest.approx(expected, abs=TOLERANCE)
        engine.check_integrity()


class Words:
    """A stand-in for an LM tokenizer: token k is the text WORDS[k]."""

    has_chat_template, bos_token, bos_token_id, eos_token_id = False, None, None, 0

    def __init__(self, words: list[str]):
        self.words = words

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.words[i] for i in ids)

    def encode(self, text, add_special_tokens=True):
        raise AssertionError("prompts come as ids in this test")

    def same_vocabulary(self, other):
        return self is other


def test_reencoding_that_overflows_a_slab_and_its_reservation(other, reference):
    """One LM token of 30 characters: a segment of 4 re-encodes to far more than a slab and than what was reserved."""
    words = ["", "zq" * 15, " quick", "vx7" * 9, " the"]
    model = ToyModel(vocab=5, seed=1, positions=64)
    engine = toy_engine(model, stars.CausalReward(other), tokenizer=Words(words), max_segment_size=4, page_size=4)
    slab = engine.reward.cache.slab_len
    prompt = [2, 4]
    policy = stars.STARS(4, 3, 0.5, 0.5, 0.5, 2)
    outputs = engine.generate([{"prompt_token_ids": prompt}] * 3, stars.SamplingParams(max_tokens=5, n=3, seed=1),
                              policy, use_tqdm=False)
    encode = encode_as(load_tokenizer(other), " quick the", engine.tokenizer)
    longest = 0
    context = engine.reward.max_model_len
    for output in outputs:
        for completion in output.outputs:
            if completion.error is not None:
                assert "re-encodes to" in completion.error
        for completion in output.outputs:
            before: list[int] = []
            for segment in completion.segments:
                for attempt in segment.attempts:
                    if attempt.reward is None:
                        continue
                    whole = encode([t for t in before + attempt.token_ids if t])
                    longest = max(longest, len(whole))
                    assert len(whole) <= context
                    assert attempt.reward == pytest.approx(reference(other, whole), abs=TOLERANCE)
                before = before + segment.token_ids
    assert longest > slab + 8, (longest, slab)
    engine.check_integrity()
    assert engine.reward.cache.num_free_slabs == engine.reward.cache.num_slabs


def test_out_of_pages_ends_that_request_only(other):
    """A reservation that cannot grow is that request's error; the next request finds the pages free again."""
    words = ["zq" * 15, "zq" * 15, "zx" * 15, "vx7" * 9, " the"]
    model = ToyModel(vocab=5, seed=1, positions=64, eos=())
    engine = toy_engine(model, stars.CausalReward(other), tokenizer=Words(words), max_segment_size=4, page_size=4,
                        cache_tokens=84, max_num_seqs=2)
    long = stars.SamplingParams(max_tokens=9, seed=1, stop_token_ids=[4], temperature=3.0)
    short = stars.SamplingParams(max_tokens=2, seed=1)
    outputs = engine.generate([{"prompt_token_ids": [4]}] * 3, [long, short, long],
                              stars.STARS(4, 2, 1.0, 0.5, -math.inf, 1), use_tqdm=False)
    errors = [output.outputs[0].error for output in outputs]
    assert errors[0] == errors[2] and "re-encodes to" in errors[0] and "the KV cache needs" in errors[0], errors
    assert errors[1] is None
    engine.check_integrity()
    assert engine.reward.cache.num_free_pages == engine.reward.cache.num_pages
    assert engine.reward.cache.num_free_slabs == engine.reward.cache.num_slabs


def session_of(reward: stars.CausalReward, lm: Path, text: str):
    session = reward.open(parse_prompt(text, load_tokenizer(lm), 10**6), 30)
    reward.start([session])
    return session


def test_any_order_of_scoring_gives_the_same_score(lm, other, reference):
    """Candidates beside each other, after rejections, after commits that end inside earlier ids: as from scratch."""
    reward = stars.CausalReward(other)
    reward.bind(load_tokenizer(lm), 10**4, CONFIG)
    session = session_of(reward, lm, "The dog")
    tokenizer = load_tokenizer(other)
    rng = np.random.default_rng(0)
    text = ""
    pieces = [" sleeps", "s", ", and", " the", " for", "est", "\n", "1", "592", " naïve", " 東", "e", " Gr", "öße"]
    for _ in range(8):
        additions = ["".join(rng.choice(pieces, rng.integers(1, 4))) for _ in range(3)]
        scored = reward.score([Candidate(session, [], text + addition) for addition in additions])
        for addition, one in zip(additions, scored, strict=True):
            whole = tokenizer.encode("The dog" + text + addition)
            assert one.reward == pytest.approx(reference(other, whole), abs=TOLERANCE)
            assert one.tokens_full == len(whole)
        winner = int(rng.integers(3))
        for index, one in enumerate(scored):
            if index != winner:
                reward.discard(one.handle)
        reward.commit([(session, scored[winner].handle)])
        text += additions[winner]
        reward.check_integrity()
    reward.close(session)
    assert reward.cache.num_free_pages == reward.cache.num_pages
    assert reward.cache.num_free_slabs == reward.cache.num_slabs


@pytest.mark.parametrize("options, message", [
    (dict(template="html"), 'template is \'html\', it must be "auto", "chat" or "raw"'),
    (dict(close="always"), 'close is \'always\', it must be "none", "template" or "eos"'),
])
def test_causal_options_are_checked(same, options, message):
    with pytest.raises(stars.RewardError) as caught:
        stars.CausalReward(same, **options)
    assert message in str(caught.value)


def test_what_does_not_fit_the_language_model(lm, tiny_model, same):
    """Vocabularies that cannot be compared, or do not match; a closing that does not exist; prompts without text."""
    bare = tiny_model(family="llama", head="reward")
    with pytest.raises(stars.RewardError, match="the reward model has no tokenizer.json"):
        stars.Engine(lm, bare)
    with pytest.raises(stars.RewardError, match="the model has no tokenizer.json"):
        stars.Engine(tiny_model(family="llama"), same)
    small = ToyModel(vocab=4, seed=1, head="reward").decoder()
    with pytest.raises(stars.RewardError, match="vocabulary of 4 does not match the model's of 5"):
        toy_engine(ToyModel(vocab=5), stars.CausalReward(small))
    with pytest.raises(stars.RewardError, match='close="template" needs a chat template'):
        stars.Engine(tiny_model(family="llama"), stars.CausalReward(bare, close="template"))
    with pytest.raises(stars.ModelError, match="score.weight"):
        stars.Engine(lm, lm)
    engine = stars.Engine(lm, stars.CausalReward(same, close="template"), cache_tokens=512)
    with pytest.raises(stars.RequestError, match='close="template" needs a chat prompt'):
        engine.generate("text", PARAMS, POLICY, use_tqdm=False)


# -- encoders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Tiny random DistilBERT and DeBERTa-v2 classifiers, with a word-piece tokenizer."""
    import transformers

    directory = tmp_path_factory.mktemp("encoders")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *("##" + c for c in
             "abcdefghijklmnopqrstuvwxyz"), "the", "dog", ",", "."]
    vocab = {word: index for index, word in enumerate(words)}
    fast = transformers.BertTokenizerFast(vocab=vocab, model_max_length=512)  # vocab_file= is taken for no vocabulary
    assert len(fast) == len(words)
    sizes = dict(vocab_size=len(words), max_position_embeddings=96, pad_token_id=0)
    made = {
        "distilbert": transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
            dim=16, hidden_dim=32, n_layers=2, n_heads=2, num_labels=1, **sizes)),
        "deberta": transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
            relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0, **sizes)),
        "three labels": transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
            dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=3, **sizes)),
        "no head": transformers.DistilBertModel(transformers.DistilBertConfig(
            dim=16, hidden_dim=32, n_layers=1, n_heads=2, **sizes)),
    }
    generator = torch.Generator().manual_seed(0)
    for name, model in made.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(directory / name)
        fast.save_pretrained(directory / name)
    return {name: directory / name for name in made}


@pytest.mark.parametrize("inputs", ["joined", "pair"])
@pytest.mark.parametrize("kind", ["distilbert", "deberta"])
def test_encoder_scores_equal_a_direct_forward(lm, encoders, kind, inputs):
    """Batched and padded, of whole texts, in the order asked. Padding costs rounding: 1e-4."""
    import transformers

    engine = stars.Engine(lm, stars.EncoderReward(encoders[kind], inputs=inputs, batch_size=3), cache_tokens=1024)
    [output] = engine.generate("the dog", PARAMS, POLICY, use_tqdm=False)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoders[kind], dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoders[kind])

    def score(text: str) -> float:
        texts = (["the dog" + text],) if inputs == "joined" else (["the dog"], [text])  # lists: "" is a text too
        with torch.no_grad():
            return model(**tokenizer(*texts, return_tensors="pt")).logits[0, 0].item()

    compared = 0
    for before, attempt in all_attempts(output):
        text = engine.tokenizer.decode(content(before + attempt.token_ids)).rstrip("\ufffd")
        assert attempt.reward == pytest.approx(score(text), abs=1e-4)
        compared += 1
    assert compared > 6 and output.prompt_reward == pytest.approx(score(""), abs=1e-4)


def test_encoder_labels_heads_and_lengths(lm, encoders):
    """The label must be named where there are several; a head must exist; an over-long text ends its request."""
    with pytest.raises(stars.RewardError, match="has 3 labels: choose"):
        stars.Engine(lm, encoders["three labels"])
    with pytest.raises(stars.RewardError, match="label is 3, the model has labels 0 to 2"):
        stars.Engine(lm, stars.EncoderReward(encoders["three labels"], label=3))
    rewards = []
    for label in (0, 2):
        engine = stars.Engine(lm, stars.EncoderReward(encoders["three labels"], label=label), cache_tokens=1024)
        [output] = engine.generate("the dog", PARAMS, stars.Sample(score=True), use_tqdm=False)
        rewards.append(output.outputs[0].reward)
    assert rewards[0] != rewards[1]
    with pytest.raises(stars.ModelError, match="lacks the tensors .*classifier"):
        stars.Engine(lm, encoders["no head"])
    engine = stars.Engine(lm, encoders["distilbert"], cache_tokens=1024)
    with pytest.raises(stars.RequestError, match="whose context is 96: shorten the prompt"):
        engine.generate("dog " * 120, stars.SamplingParams(max_tokens=4), POLICY, use_tqdm=False)
    params = stars.SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    outputs = engine.generate(["q." * 45, "the"], params, stars.Sample(score=True), use_tqdm=False)
    assert "whose context is 96: lower max_tokens" in outputs[0].outputs[0].error
    assert outputs[1].outputs[0].error is None
    engine.check_integrity()


# -- callables ----------------------------------------------------------------------------------------------------


def test_function_gets_whole_responses(lm):
    """As texts with the prompt as given, or as ids; an empty response for r(prompt); EOS left out."""
    seen = []

    def fn(prompt, responses):
        seen.append((prompt, list(responses)))
        return [0.1 * len(response) for response in responses]

    engine = stars.Engine(lm, fn, cache_tokens=1024)
    for prompt, given in (("The dog", "The dog"), ({"messages": MESSAGES}, MESSAGES),
                          ({"prompt_token_ids": engine.tokenizer.encode("The dog")}, "The dog")):
        seen.clear()
        [output] = engine.generate(prompt, PARAMS, POLICY, use_tqdm=False)
        assert seen[0] == (given, [""]) and all(one == given for one, _ in seen)
        texts = {text for _, responses in seen for text in responses}
        for before, attempt in all_attempts(output):
            assert engine.tokenizer.decode(content(before + attempt.token_ids)) in texts
    engine = stars.Engine(lm, stars.FunctionReward(fn, inputs="ids"), cache_tokens=1024)
    seen.clear()
    [output] = engine.generate("The dog", PARAMS, POLICY, use_tqdm=False)
    assert seen[0] == (output.prompt_token_ids, [[]])
    assert not any(response and response[-1] == EOS for _, responses in seen for response in responses)


@pytest.mark.parametrize("give", [
    lambda values: values, tuple, np.array, torch.tensor, lambda values: [np.float32(v) for v in values],
    lambda values: [torch.tensor(v) for v in values], lambda values: [torch.tensor([v]) for v in values],
    lambda values: [int(v) for v in values], lambda values: (v for v in values), lambda values: [v > 0 for v in values],
])
def test_numbers_of_every_kind(give):
    """What a callable may return for each response."""
    reward = table_reward(seed=3)
    engine = toy_engine(ToyModel(), stars.FunctionReward(
        lambda prompt, responses: give([reward(r) for r in responses]), inputs="ids"))
    [output] = engine.generate({"prompt_token_ids": ids(4)}, PARAMS, POLICY, use_tqdm=False)
    assert all(o.error is None for o in output.outputs)
    assert all(type(a.reward) is float for _, a in all_attempts(output))


@pytest.mark.parametrize("give, message", [
    (lambda responses: [0.0], "the reward function returned 1 values for 2 responses"),
    (lambda responses: [0.0] * 3, "the reward function returned 3 values for 2 responses"),
    (lambda responses: ["good"] * 2, "the reward function returned str where a float is expected"),
    (lambda responses: [None] * 2, "the reward function returned NoneType where a float is expected"),
    (lambda responses: torch.zeros(2, 2), "the reward function returned an array where one number"),
    (lambda responses: 3.0, "the reward function returned 3.0 where a list of "),
    (lambda responses: [math.nan] * 2, "the reward is NaN"),
    (lambda responses: [math.inf] * 2, "the reward is +inf"),
    (lambda responses: 1 / 0, "the reward function raised ZeroDivisionError: division by zero"),
])
def test_what_a_callable_must_not_do(give, message):
    """Each ends the request with one sentence that says what was wrong."""
    engine = toy_engine(ToyModel(), stars.FunctionReward(lambda prompt, responses: give(responses), inputs="ids"))
    policy = stars.STARS(3, 4, 1.0, 0.5, 1.0, 2)
    [output] = engine.generate({"prompt_token_ids": ids(4)}, stars.SamplingParams(max_tokens=9, seed=1), policy,
                               use_tqdm=False)
    assert output.outputs[0].finish_reason == "error" and message in output.outputs[0].error
    engine.check_integrity()


def test_problems_behind_the_winner_do_not_count():
    """A NaN for a candidate that came after the accepted one must not depend on the width."""
    def fn(prompt, responses):
        return [1.0] + [math.nan] * (len(responses) - 1)

    engine = toy_engine(ToyModel(), stars.FunctionReward(fn, inputs="ids"))
    [output] = engine.generate({"prompt_token_ids": ids(4)}, PARAMS, stars.STARS(3, 4, 1.0, 0.5, 0.5, 4),
                               use_tqdm=False)
    assert all(o.error is None for o in output.outputs)


def test_batch_size_skips_what_follows_the_winner():
    """With batch_size the callable sees candidates in attempt order and no more once one is accepted."""
    calls = []

    def fn(prompt, responses):
        calls.append(len(responses))
        return [1.0] * len(responses)

    engine = toy_engine(ToyModel(), stars.FunctionReward(fn, inputs="ids", batch_size=2))
    [output] = engine.generate({"prompt_token_ids": ids(4)}, stars.SamplingParams(max_tokens=3, seed=1),
                               stars.STARS(3, 8, 1.0, 0.5, 0.5, 8), use_tqdm=False)
    assert calls == [2]
    assert [a.reward is None for a in output.outputs[0].segments[0].attempts] == [False] * 2 + [True] * 6


def test_resolve_reward(tmp_path, same):
    """Directories by their kind, callables, rewards as they are; anything else is refused by its type."""
    assert resolve_reward(None) is None
    reward = stars.FunctionReward(len)
    assert resolve_reward(reward) is reward
    assert isinstance(resolve_reward(lambda prompt, responses: []), stars.FunctionReward)
    assert isinstance(resolve_reward(str(same)), stars.CausalReward)
    assert isinstance(resolve_reward(same), stars.CausalReward)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "distilbert"}))
    assert isinstance(resolve_reward(tmp_path), stars.EncoderReward)
    with pytest.raises(stars.RewardError, match="reward is int"):
        resolve_reward(3)


def test_same_vocabulary_needs_the_same_splits(tmp_path):
    """Equal files are one vocabulary, other merges are another."""
    for name, seed in (("a", 0), ("b", 0), ("c", 2)):
        write_tokenizer(tmp_path / name, seed)
    a, b, c = (load_tokenizer(tmp_path / name) for name in "abc")
    assert a.same_vocabulary(b) and not a.same_vocabulary(c)
