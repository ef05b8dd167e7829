"""Causal rewards of another vocabulary: every score is that of the whole text encoded and scored from scratch.

The language model's text grows where it likes, so the reward model's tokens before its end may change with it: the
cache is kept up to the first that does. Expected values come from transformers, which knows nothing of caches.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import stars
from building import config_of
from stars.config import EngineConfig
from stars.model.tokenizer import load_tokenizer
from stars.prompt import parse_prompt
from stars.reward.base import Candidate, ContextFull
from tiny_models import BOS, CHAT_TEMPLATE, EOS, MAX_POSITIONS, SENTENCES, SPECIAL_TOKENS
from toy import ToyModel, toy_engine

TOLERANCE = 1e-4  # rewards of order 1 to 10, float32
CONFIG = config_of(cache_tokens=1024, page_size=4, max_num_seqs=4, max_num_lanes=8, max_segment_size=4)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is a dog?"}]
SOURCES = ("gafnlostrwmuhecapisnygdelbokturamhi forest sleeps,", "g forest東京 Größe naïve façade 🙂 15 ",
           " \n\n returns sleeplessthepnocfrailsugtwaking\n")
NEW = "<new>"
"""A token that a tokenizer knows and its model has no embedding for."""


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def other(tiny_model, tmp_path_factory) -> Path:
    """A reward model whose tokenizer changes its mind: pairs of letters merge in a random order of precedence, so that
    a letter more can undo the pair before it, and the one before that. Some words become one token at their last
    letter. The letters q, v, x and z merge with nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = "\u0120abcdefghijklmnoprstuwy"  # the first is a space
    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    draw = np.random.default_rng(3)
    pairs = [(a, b) for a in letters for b in letters[1:]]
    first = [tuple(pair) for pair in ("fo", "re", "st", "sl", "ee", "ps", "ju", "mp", "tu", "rn")]
    words = [("fo", "re"), ("fore", "st"), ("sl", "ee"), ("slee", "ps"), ("ju", "mp"), ("re", "tu"), ("retu", "rn")]
    merges = first + [pairs[i] for i in draw.permutation(len(pairs)) if pairs[i] not in first] + words
    tokens = vocabulary + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    source = tiny_model(family="llama", head="reward", vocab=tokenizer.get_vocab_size(), seed=7)
    directory = shutil.copytree(source, tmp_path_factory.mktemp("other") / "model")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def wider(other, tmp_path_factory) -> Path:
    """The same model beside a tokenizer with one token more than it has embeddings."""
    directory = shutil.copytree(other, tmp_path_factory.mktemp("wider") / "model")
    tokens = json.loads((directory / "tokenizer.json").read_text())
    tokens["added_tokens"].append(tokens["added_tokens"][-1] | {
        "id": load_tokenizer(other).vocab_size, "content": NEW, "special": False})
    (directory / "tokenizer.json").write_text(json.dumps(tokens))
    return directory


def scratch(directory: Path, token_ids: list[int]) -> float:
    """transformers' raw logit of these ids."""
    with torch.no_grad():
        return loaded(directory)(torch.tensor([token_ids])).logits[0, 0].item()


@cache
def loaded(directory: Path):
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()


def bound(directory: Path, lm: Path, config: EngineConfig = CONFIG, **options) -> stars.CausalReward:
    reward = stars.CausalReward(directory, **options)
    reward.bind(load_tokenizer(lm), 10**4, config)
    assert not reward.same_vocabulary
    return reward


def opened(reward: stars.CausalReward, lm: Path, given, max_tokens: int = 30):
    prompt = parse_prompt(given, load_tokenizer(lm), 10**6)
    reward.check(prompt, max_tokens)
    session = reward.open(prompt, max_tokens)
    reward.start([session])
    return session


def framed(directory: Path, lm: Path, given, template: str, close: str):
    """(encode(response text) -> the reward model's ids without the closing, the closing), from the tokenizers alone."""
    ours, tokenizer = load_tokenizer(directory), load_tokenizer(lm)
    messages = given["messages"] if isinstance(given, dict) else [{"role": "user", "content": given}]
    chat = template == "chat" or (template == "auto" and isinstance(given, dict))
    closing = {"none": [], "eos": [EOS], "template": []}[close]
    if chat:
        before, behind = ours.split_template(messages)
        if close == "template":
            closing = ours.encode(behind, add_special_tokens=False)
    elif isinstance(given, dict):
        before = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    else:
        before = given
    special = not chat and not isinstance(given, dict)
    return lambda text: ours.encode(before + text, add_special_tokens=special), closing


def common(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def assert_all_free(reward: stars.CausalReward) -> None:
    reward.check_integrity()
    assert reward.cache.num_free_pages == reward.cache.num_pages
    assert reward.cache.num_free_slabs == reward.cache.num_slabs


# -- committed tokens that change ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given, template, close", [
    ("The quick brown do", "auto", "none"), ("The quick brown do", "auto", "eos"),
    ("what is a do", "chat", "template"), ({"messages": MESSAGES}, "auto", "template"),
    ({"messages": MESSAGES}, "chat", "none"), ({"messages": MESSAGES}, "raw", "eos"),
    ({"messages": MESSAGES}, "raw", "none"),
])
def test_text_that_grows_by_pieces_of_any_length(lm, other, given, template, close):
    """Through words, characters and half characters; what is committed changes now and then; nothing is run twice."""
    reward = bound(other, lm, template=template, close=close)
    encode, closing = framed(other, lm, given, template, close)
    start = encode("")
    assert start.count(BOS) == 1 and start[0] == BOS and bool(closing) == (close != "none")
    rng = np.random.default_rng(5)
    changed = shrunk = 0
    for source in SOURCES:
        session = opened(reward, lm, given)
        [first] = reward.score([Candidate(session, [], "")])
        assert first.reward == pytest.approx(scratch(other, start + closing), abs=TOLERANCE)
        reward.discard(first.handle)
        data, done, committed = source.encode(), 0, start[:-1]  # the last token waits for the next
        while done < len(data):
            step = int(rng.integers(1, 3))
            texts = [data[: done + count].decode(errors="replace") for count in (step, step + 1)]
            texts.append(texts[0] + "zq")
            scored = reward.score([Candidate(session, [], text) for text in texts])
            for text, one in zip(texts, scored, strict=True):
                ids = encode(text.rstrip("\ufffd")) + closing
                assert one.reward == pytest.approx(scratch(other, ids), abs=TOLERANCE), (source, text)
                assert one.tokens_full == len(ids)
                assert one.tokens_run == len(ids) - min(common(ids, committed), len(ids) - 1)
            winner = int(rng.integers(2))
            for index, one in enumerate(scored):
                if index != winner:
                    reward.discard(one.handle)
            reward.commit([(session, scored[winner].handle)])
            done += (step, step + 1)[winner]
            kept = encode(texts[winner].rstrip("\ufffd"))[:-1]
            changed += common(kept, committed) < min(len(kept), len(committed))
            shrunk += len(kept) < len(committed)
            committed = kept
            reward.check_integrity()
        # The finished response writes the session's own pages, over tokens that changed.
        [last] = reward.score([Candidate(session, [], source + "!", final=True)])
        assert last.reward == pytest.approx(scratch(other, encode(source + "!") + closing), abs=TOLERANCE)
        reward.discard(last.handle)
        reward.close(session)
    assert changed >= 6 and shrunk >= 1, (changed, shrunk)
    assert_all_free(reward)


@pytest.mark.parametrize("close", ["none", "eos"])
@pytest.mark.parametrize("final", [False, True])
def test_a_text_that_becomes_shorter(lm, other, close, final):
    """A stop string that began in an earlier segment is cut off what was committed; a closing may lie behind the cut
    there already. The last token is run again, and what is committed then ends before it."""
    reward = bound(other, lm, close=close)
    encode, closing = framed(other, lm, "The", "auto", close)
    session = opened(reward, lm, "The")
    texts = (" z</s>qz</s> fox sleeps", " z</s>qz</s> fox", " z</s>qz", " z", " zvx", " z</s>", "")
    for text in texts:
        [one] = reward.score([Candidate(session, [], text, final=final)])
        assert one.reward == pytest.approx(scratch(other, encode(text) + closing), abs=TOLERANCE), text
        reward.commit([(session, one.handle)])
        reward.check_integrity()
        assert session.table.length == len(encode(text)) - 1
    reward.close(session)
    assert_all_free(reward)


def test_two_responses_of_one_prompt_do_not_meet(lm, other):
    """They share the prompt's pages, and each changes the prompt's last tokens in its own way."""
    reward = bound(other, lm)
    prompt = "The quick brown fox jumps over the laz"
    encode, _ = framed(other, lm, prompt, "auto", "none")
    sessions = [opened(reward, lm, prompt), opened(reward, lm, prompt)]
    texts = ["", ""]
    for pieces in (("y do", "i"), ("g", "ness,"), (", and the", " s"), (" 東", "leeps"), ("京", " on.")):
        wanted = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        scored = reward.score([Candidate(session, [], text) for session, text in zip(sessions, wanted, strict=True)])
        for text, one in zip(wanted, scored, strict=True):
            assert one.reward == pytest.approx(scratch(other, encode(text)), abs=TOLERANCE)
        reward.commit([(session, one.handle) for session, one in zip(sessions, scored, strict=True)])
        texts = wanted
        reward.check_integrity()
    for session in sessions:
        reward.close(session)
    assert_all_free(reward)


@pytest.mark.parametrize("close", ["none", "eos"])
def test_candidates_longer_than_a_slab_between_short_ones(lm, other, close):
    """Their own pages take the session's place, and what is scored behind them is as from scratch."""
    reward = bound(other, lm, close=close)
    encode, closing = framed(other, lm, "The", "auto", close)
    session = opened(reward, lm, "The", max_tokens=8)
    slab = reward.cache.slab_len
    text = ""
    for piece in (" dog", "zq" * (slab // 2), "z", "y", "vx7" * 6):
        candidates = [text + piece, text + piece + "qq", text + "?"]
        scored = reward.score([Candidate(session, [], one) for one in candidates])
        for one, got in zip(candidates, scored, strict=True):
            assert got.reward == pytest.approx(scratch(other, encode(one) + closing), abs=TOLERANCE)
        assert (scored[0].handle.slab is None) == (len(piece) >= slab)
        reward.commit([(session, scored[0].handle)])
        for got in scored[1:]:
            reward.discard(got.handle)
        text += piece
        reward.check_integrity()
    [last] = reward.score([Candidate(session, [], text + " on", final=True)])
    assert last.reward == pytest.approx(scratch(other, encode(text + " on") + closing), abs=TOLERANCE)
    reward.discard(last.handle)
    reward.close(session)
    assert_all_free(reward)


# -- contexts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("close", ["none", "eos"])
def test_the_last_position_is_used_and_none_behind_it(lm, other, close):
    """The closing counts; neighbours of a text that is too long are scored."""
    reward = bound(other, lm, close=close)
    encode, closing = framed(other, lm, "The", "auto", close)
    session = opened(reward, lm, "The", max_tokens=8)
    most = "z" * (MAX_POSITIONS - len(encode("")) - len(closing))  # a letter that the tokenizer merges with nothing
    assert len(encode(most) + closing) == MAX_POSITIONS
    good, too_long, short = reward.score([Candidate(session, [], text) for text in (most, most + "z", "z")])
    assert good.reward == pytest.approx(scratch(other, encode(most) + closing), abs=TOLERANCE)
    assert short.reward == pytest.approx(scratch(other, encode("z") + closing), abs=TOLERANCE)
    assert isinstance(too_long.reward, ContextFull) and too_long.handle is None
    assert str(too_long.reward) == (f"the response re-encodes to {MAX_POSITIONS + 1} tokens for the reward model, "
                                    f"whose context is {MAX_POSITIONS}: lower max_tokens")
    reward.discard(short.handle)
    reward.commit([(session, good.handle)])
    [again] = reward.score([Candidate(session, [], most[:-1] + "q")])
    assert again.reward == pytest.approx(scratch(other, encode(most[:-1] + "q") + closing), abs=TOLERANCE)
    reward.discard(again.handle)
    reward.close(session)
    assert_all_free(reward)


@pytest.mark.parametrize("close, closing", [("none", 0), ("template", 2), ("eos", 1)])
def test_prompt_response_and_closing_fit_the_context_or_are_refused_at_the_door(lm, other, close, closing):
    reward = bound(other, lm, template="chat", close=close)
    encode, tokens = framed(other, lm, "The", "chat", close)
    assert len(tokens) == closing
    most = MAX_POSITIONS - len(encode("")) - closing
    prompt = parse_prompt("The", load_tokenizer(lm), 10**6)
    reward.check(prompt, most)
    with pytest.raises(stars.RequestError) as caught:
        reward.check(prompt, most + 1)
    assert str(caught.value) == (f"prompt and max_tokens make {MAX_POSITIONS + 1} tokens for the reward model, whose "
                                 f"context is {MAX_POSITIONS}: shorten the prompt or lower max_tokens")


class Words:
    """A stand-in for a language model's tokenizer: token k is the text WORDS[k]."""

    has_chat_template, bos_token, bos_token_id, eos_token_id = False, None, None, None

    def __init__(self, words: list[str]):
        self.words = words

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.words[i] for i in ids)

    def encode(self, text, add_special_tokens=True):
        raise AssertionError("prompts come as ids in these tests")

    def same_vocabulary(self, other):
        return self is other


def words_engine(directory: Path, words: list[str], **options) -> stars.Engine:
    """A random language model whose tokens are `words`, before a reward model of another vocabulary."""
    model = ToyModel(vocab=len(words), seed=1, positions=128, eos=())
    return toy_engine(model, stars.CausalReward(directory), tokenizer=Words(words), **options)


def assert_rewards(output: stars.RequestOutput, engine: stars.Engine, directory: Path, prompt: str) -> int:
    """Every reward of `output` is that of its text from scratch; how many there were."""
    tokenizer, count = load_tokenizer(directory), 0
    for completion in output.outputs:
        before: list[int] = []
        for segment in completion.segments:
            for attempt in segment.attempts:
                if attempt.reward is not None:
                    ids = tokenizer.encode(prompt + engine.tokenizer.decode(before + attempt.token_ids))
                    assert attempt.reward == pytest.approx(scratch(directory, ids), abs=TOLERANCE)
                    count += 1
            before = before + segment.token_ids
    return count


def test_a_response_that_outgrows_the_context_ends_there(other):
    """Tokens of thirty characters: it ends before the segment that cannot be read, as at the end of a context; where
    the first cannot, or the finished response, that is its error."""
    engine = words_engine(other, ["zq" * 15, "zx" * 15, " the", "vx7" * 9], cache_tokens=2048, max_segment_size=16)
    prompt = {"prompt_token_ids": [2]}
    params = stars.SamplingParams(max_tokens=16, seed=3, n=4)
    [output] = engine.generate(prompt, params, stars.STARS(2, 3, 1.0, 1.0, 0.0, 2), use_tqdm=False)
    tokenizer = load_tokenizer(other)
    for completion in output.outputs:
        assert (completion.finish_reason, completion.error) == ("length", None)
        assert 0 < len(completion.token_ids) < 16 and len(completion.token_ids) % 2 == 0
        length = len(tokenizer.encode(" the" + completion.text))
        assert MAX_POSITIONS - 2 * 45 < length <= MAX_POSITIONS
    assert assert_rewards(output, engine, other, " the") >= 8
    for policy in (stars.STARS(4, 2, 1.0, 1.0, 0.0, 2), stars.Sample(score=True), stars.BestOfN(2)):
        [failed] = engine.generate({"prompt_token_ids": [2] + [0] * 2}, params, policy, use_tqdm=False)
        errors = {completion.error for completion in failed.outputs if completion.finish_reason == "error"}
        assert errors and all("whose context is 128: lower max_tokens" in error for error in errors), policy
    engine.check_integrity()
    assert_all_free(engine.reward)
    assert engine._cache.num_free_pages == engine._cache.num_pages


@pytest.mark.parametrize("width", [1, 2, 3])
def test_where_a_response_ends_does_not_depend_on_the_width(other, width):
    """A text too long counts in the order of attempts, and not behind the one that was accepted."""
    engine = words_engine(other, ["zq" * 15, "q", " the", "vx7" * 9], cache_tokens=2048)
    params = stars.SamplingParams(max_tokens=16, seed=8, n=4)
    [output] = engine.generate({"prompt_token_ids": [2]}, params, stars.STARS(2, 3, 1.0, 1.0, 0.0, width),
                               use_tqdm=False)
    got = [(completion.token_ids, completion.finish_reason) for completion in output.outputs]
    [alone] = engine.generate({"prompt_token_ids": [2]}, params, stars.STARS(2, 3, 1.0, 1.0, 0.0, 1), use_tqdm=False)
    assert got == [(completion.token_ids, completion.finish_reason) for completion in alone.outputs]
    assert any(len(tokens) < 16 for tokens, _ in got)


# -- ids that the reward model has no embedding for ---------------------------------------------------------------


def test_ids_outside_the_vocabulary(lm, wider):
    """In a prompt and in a closing they are refused at the door; in a candidate they are that candidate's error."""
    reward = bound(wider, lm)
    size = reward.decoder.config.vocab_size
    message = f"token id {size} is outside the reward model's vocabulary of {size}: use the tokenizer it came with"
    with pytest.raises(stars.RequestError) as caught:
        opened(reward, lm, f"The {NEW} dog")
    assert str(caught.value) == message
    session = opened(reward, lm, "The dog")
    tokenizer = load_tokenizer(wider)
    good, outside, last = reward.score([Candidate(session, [], text) for text in (" on", f" {NEW}", " the")])
    assert isinstance(outside.reward, stars.RewardError) and str(outside.reward) == message
    assert not isinstance(outside.reward, ContextFull) and outside.handle is None
    assert good.reward == pytest.approx(scratch(wider, tokenizer.encode("The dog on")), abs=TOLERANCE)
    assert last.reward == pytest.approx(scratch(wider, tokenizer.encode("The dog the")), abs=TOLERANCE)
    reward.discard(good.handle)
    reward.commit([(session, last.handle)])
    reward.close(session)
    assert_all_free(reward)


def test_a_closing_outside_the_vocabulary_is_refused_at_the_door(lm, wider, tmp_path):
    directory = shutil.copytree(wider, tmp_path / "model")
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template.replace("eos_token", f"'{NEW}'"))
    turn = [{"role": "user", "content": "hi"}]
    with pytest.raises(stars.RequestError, match="is outside the reward model's vocabulary"):
        opened(bound(directory, lm, close="template"), lm, {"messages": turn})
    # A user's turn is closed with it as well; a template that closes the assistant's alone is the closing's case.
    (directory / "chat_template.jinja").write_text(
        template.replace("eos_token", f"('{NEW}' if message['role'] == 'assistant' else eos_token)"))
    opened(bound(directory, lm), lm, {"messages": turn})
    with pytest.raises(stars.RequestError, match="is outside the reward model's vocabulary"):
        opened(bound(directory, lm, close="template"), lm, {"messages": turn})


def test_a_request_with_ids_outside_the_vocabulary_ends_alone(wider):
    """The language model writes the token in some requests; the others' texts and rewards are those they have alone."""
    engine = words_engine(wider, [" the", " dog", " on", " fox", " it", " was", f" {NEW}"], cache_tokens=1024)
    prompts = [{"prompt_token_ids": [0]}, {"prompt_token_ids": [1]}]
    policy = stars.STARS(3, 2, 1.0, 1.0, 0.0, 2)
    both = engine.generate(prompts * 4, [stars.SamplingParams(max_tokens=6, seed=seed) for seed in range(8)], policy,
                           use_tqdm=False)
    ends = [output.outputs[0].finish_reason for output in both]
    assert set(ends) == {"error", "length"}, ends
    for index, output in enumerate(both):
        [alone] = engine.generate(prompts[index % 2], stars.SamplingParams(max_tokens=6, seed=index), policy,
                                  use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert alone.outputs[0].error == output.outputs[0].error
        if output.outputs[0].error is None:
            assert assert_rewards(output, engine, wider, (" the", " dog")[index % 2]) >= 2
        else:
            assert "is outside the reward model's vocabulary" in output.outputs[0].error
    engine.check_integrity()
    assert_all_free(engine.reward)
    assert engine._cache.num_free_pages == engine._cache.num_pages


# -- what an error leaves behind ----------------------------------------------------------------------------------


def test_pages_that_cannot_grow_are_that_candidates_error(lm, other):
    """Where others hold pages it is raised, so that the engine tries it without them; alone it is that candidate's."""
    reward = bound(other, lm, replace(CONFIG, cache_tokens=176))
    session, holder = opened(reward, lm, "The dog", 8), opened(reward, lm, "A girl", 8)
    encode, _ = framed(other, lm, "The dog", "auto", "none")
    text = "z" * 100
    words = f"the response re-encodes to {len(encode(text))} tokens for the reward model and the KV cache needs"
    with pytest.raises(stars.RewardError, match=words):
        reward.score([Candidate(session, [], one) for one in (text, " on")])
    reward.close(holder)
    holder = opened(reward, lm, "A girl", 8)
    reward.close(session)
    small = bound(other, lm, replace(CONFIG, cache_tokens=96))
    lonely = opened(small, lm, "The dog", 8)
    failed, good = small.score([Candidate(lonely, [], one) for one in (text, " on")])
    assert isinstance(failed.reward, stars.RewardError) and not isinstance(failed.reward, ContextFull)
    assert str(failed.reward).startswith(words)
    assert good.reward == pytest.approx(scratch(other, encode(" on")), abs=TOLERANCE)
    small.discard(good.handle)
    small.close(lonely)
    assert_all_free(small)
    reward.close(holder)
    session = opened(reward, lm, "The dog", 8)
    [again] = reward.score([Candidate(session, [], "z" * 40)])
    assert again.reward == pytest.approx(scratch(other, encode("z" * 40)), abs=TOLERANCE)
    reward.discard(again.handle)
    reward.close(session)
    assert_all_free(reward)


@pytest.mark.parametrize("method, long", [("score", False), ("score", True), ("prefill", True)])
def test_a_pass_that_raises_leaves_nothing_behind(lm, other, monkeypatch, method, long):
    """After a reset slabs and pages are free again, and the next call gives the right values."""
    reward = bound(other, lm)
    encode, _ = framed(other, lm, "The", "auto", "none")
    session = opened(reward, lm, "The")
    pages, slabs = reward.cache.num_free_pages, reward.cache.num_free_slabs
    text = "z" * (reward.cache.slab_len + 3) if long else " dog"

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reward._passes, method, fails)
        with pytest.raises(KeyboardInterrupt):
            reward.score([Candidate(session, [], text)])
    reward.reset()  # what the engine does before it goes on
    assert_all_free(reward)
    session = opened(reward, lm, "The")
    assert (reward.cache.num_free_pages, reward.cache.num_free_slabs) == (pages, slabs)
    [one] = reward.score([Candidate(session, [], text)])
    assert one.reward == pytest.approx(scratch(other, encode(text)), abs=TOLERANCE)
    reward.discard(one.handle)
    reward.close(session)
    assert_all_free(reward)


# -- whole requests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template, close", [("raw", "none"), ("raw", "eos"), ("chat", "none"), ("chat", "template")])
def test_messages_of_another_vocabulary(lm, other, template, close):
    """ "raw" reads what the language model reads, its template's special tokens once each; "chat" the reward's own."""
    engine = stars.Engine(lm, stars.CausalReward(other, template=template, close=close), cache_tokens=1024)
    params = stars.SamplingParams(max_tokens=12, n=2, seed=3)
    [output] = engine.generate({"messages": MESSAGES}, params, stars.STARS(5, 4, 0.3, 0.5, 2.0, 2), use_tqdm=False)
    encode, closing = framed(other, lm, {"messages": MESSAGES}, template, close)
    assert encode("").count(BOS) == 1
    assert output.prompt_reward == pytest.approx(scratch(other, encode("") + closing), abs=TOLERANCE)
    count = 0
    for completion in output.outputs:
        before: list[int] = []
        for segment in completion.segments:
            for attempt in segment.attempts:
                if attempt.reward is not None:
                    ids = before + attempt.token_ids
                    text = engine.tokenizer.decode(ids[:-1] if ids[-1] == EOS else ids).rstrip("\ufffd")
                    assert attempt.reward == pytest.approx(scratch(other, encode(text) + closing), abs=TOLERANCE)
                    count += 1
            before = before + segment.token_ids
    assert count > 6


def test_the_sentences_split_differently(lm, other):
    """What these tests rest on."""
    left, right = load_tokenizer(lm), load_tokenizer(other)
    assert sum(left.encode(text) != right.encode(text) for text in SENTENCES) >= 3


class Letters:
    """A token a letter."""

    has_chat_template, bos_token_id, eos_token_id, width = False, None, None, 1

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) - ord("a") for letter in text[:: self.width]]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.width * chr(ord("a") + token) for token in ids)

    def same_vocabulary(self, other):
        return self is other


class SevenLetters(Letters):
    """A token seven letters: responses re-encode to seven times as many tokens."""

    width = 7


@pytest.mark.rounds_raise
@pytest.mark.parametrize("width", [1, 3])
def test_neighbours_do_not_decide_whether_there_is_room(width):
    """Responses that outgrow what was reserved for them, in a cache that four of them fill: each ends as it does alone,
    those that cannot fit even then with an error."""
    model, judge = ToyModel(vocab=5, seed=1, positions=96), ToyModel(vocab=5, seed=3, positions=192, head="reward")

    def made() -> stars.Engine:
        reward = stars.CausalReward(judge.decoder(), tokenizer=Letters())
        return toy_engine(model, reward, tokenizer=SevenLetters(), cache_tokens=400)

    params = [stars.SamplingParams(max_tokens=14, seed=seed, ignore_eos=True) for seed in range(4)]
    prompts = [{"prompt_token_ids": [1, 2, 3][: 1 + seed % 3]} for seed in range(4)]
    policy = stars.STARS(4, 4, 0.5, 0.5, 0.5, width)
    alone = [made().generate(prompt, one, policy, use_tqdm=False)[0].outputs[0]
             for prompt, one in zip(prompts, params, strict=True)]
    engine = made()
    together = [output.outputs[0] for output in engine.generate(prompts, params, policy, use_tqdm=False)]
    for one, other in zip(alone, together, strict=True):
        assert (one.token_ids, one.finish_reason, one.error) == (other.token_ids, other.finish_reason, other.error)
        assert one.reward == pytest.approx(other.reward, abs=1e-4)
        assert one.finish_reason == "length" and len(one.token_ids) == 14
    engine.check_integrity()
    assert_all_free(engine.reward)
