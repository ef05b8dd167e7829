"""The text of responses: behind their prompt, as it streams, up to a stop string; special tokens of every file."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

import stars
from building import PADDED, work_as
from stars.errors import RequestError, TokenizerError
from stars.model.tokenizer import Detokenizer, Tokenizer, finished, load_tokenizer
from stars.reward.causal import CausalReward
from stars.stops import cut_at_stop, find_stop, hold_back, stop_tokens
from stars.trace import request_trace
from toy import ToyModel, scripted_engine, toy_engine

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
WORDS = ["This", "film", "was", "great", "the", "movie", "gre", "at"]
TEXTS = ["This film was great", " the movie", "gre", "at", " ", "  was", "\n\n", "grüße 東京🙂", "<|end|>",
         "<|user|>the", "</s><s>", "at<|end|> the", "é", "."]


def save(tokenizer: tokenizers.Tokenizer, directory: Path, **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def with_specials(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def fallback_tokenizer(metaspace: bool = False) -> tokenizers.Tokenizer:
    """Llama 2's kind, with its own decoder or a Metaspace one: ids 0 to 4 are special, 5 to 260 the bytes."""
    vocab = {token: index for index, token in enumerate(SPECIAL)} | {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    merges = []
    for character in "\u2581abcdefghijklmnopqrstuvwxyzT":
        vocab[character] = len(vocab)
    for word in [*("\u2581" + word for word in WORDS), *WORDS]:
        left = word[0]
        for character in word[1:]:
            if (left, character) not in merges:
                merges.append((left, character))
            left += character
            vocab.setdefault(left, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True,
                                                byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                               decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return with_specials(tokenizer)


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """GPT-2's kind: ids 0 to 4 are special, the bytes are single tokens, a few words are whole ones."""
    vocab = {token: index for index, token in enumerate(SPECIAL)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab |= {character: 5 + index for index, character in enumerate(alphabet)}
    merges = []
    for word in [*("Ġ" + word for word in WORDS), *WORDS]:
        left = word[0]
        for character in word[1:]:
            if (left, character) not in merges:
                merges.append((left, character))
            left += character
            vocab.setdefault(left, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return with_specials(tokenizer)


def word_tokenizer(decoder) -> tokenizers.Tokenizer:
    """Whole words, put together by `decoder`."""
    words = [*SPECIAL, *WORDS, "##at", ".", " "]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    return with_specials(tokenizer)


KINDS = {
    "fallback": fallback_tokenizer, "metaspace": lambda: fallback_tokenizer(True), "byte level": byte_level_tokenizer,
    "word pieces": lambda: word_tokenizer(decoders.WordPiece()), "joined": lambda: word_tokenizer(None),
    "suffixes": lambda: word_tokenizer(decoders.BPEDecoder("at")),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, tuple[Tokenizer, object]]:
    """By kind: our tokenizer and transformers'."""
    import transformers

    base = tmp_path_factory.mktemp("kinds")
    paths = {name: save(make(), base / name.replace(" ", "-")) for name, make in KINDS.items()}
    return {name: (load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path))
            for name, path in paths.items()}


# -- behind the prompt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(before=st.lists(st.sampled_from(TEXTS), max_size=5), behind=st.lists(st.sampled_from(TEXTS), max_size=4),
       bos=st.booleans(), specials=st.integers(0, 20))
def test_a_response_is_what_the_whole_text_has_behind_the_prompt(loaded, kind, before, behind, bos, specials):
    """decode(all)[len(decode(prompt)):], where decode(all) begins so, as transformers decodes."""
    ours, theirs = loaded[kind]
    prompt = [1] * bos + [token for text in before for token in ours.encode(text, False)] + [4] * specials
    prompt = prompt or [1]
    response = [token for text in behind for token in ours.encode(text, False)]
    whole, beginning = (theirs.decode(ids, skip_special_tokens=True) for ids in (prompt + response, prompt))
    if whole.startswith(beginning):
        assert Detokenizer(ours, prompt).decode(response) == whole[len(beginning):]


def test_spaces_by_hand(loaded):
    ours, _ = loaded["fallback"]
    film, great, space = (ours.encode(text, False)[-1] for text in ("film", "great", " "))
    assert ours.decode([great]) == "great"
    for prompt in ([1, film], [film, 4], [1, film] + [3] * 50, [film, film], [1, space], [space]):
        assert Detokenizer(ours, prompt).decode([great]) == " great", prompt
    for prompt in ([1], [4] * 30):  # nothing that shows stands before it
        assert Detokenizer(ours, prompt).decode([great]) == "great", prompt
    assert Detokenizer(ours, [1, film]).decode([]) == ""
    assert Detokenizer(ours, [1, film]).decode([4, great, 2]) == " great"


@pytest.mark.parametrize("kind", ["fallback", "byte level"])
def test_characters_across_the_border(loaded, kind):
    """A character that the prompt leaves unfinished belongs to the response that completes it; an invalid one stays."""
    ours, _ = loaded[kind]
    a, b = (ours.encode(text, False)[-1] for text in "ab")
    first, second, third = byte_ids(ours, "東".encode())
    assert [Detokenizer(ours, [a, first]).decode([second, third, b][:count]) for count in range(4)] == [
        "", "", "東", "東b"]
    assert Detokenizer(ours, [a, first, second]).decode([third]) == "東"
    assert Detokenizer(ours, [a, first]).decode([b]) == "b"
    assert Detokenizer(ours, [a] + [first, second, third] * 5).decode([first, second, third, b]) == "東b"
    # However far back it begins: special tokens decode to nothing.
    assert Detokenizer(ours, [a, first, *[4] * 7, second]).decode([third]) == "東"
    # A sign that may still change is no stop string; one that stays is.
    assert cut_at_stop(Detokenizer(ours, [a]), [], [first, second], ["\ufffd"]) is None
    assert cut_at_stop(Detokenizer(ours, [a]), [], [first, b, b], ["\ufffd"]) == (2, "\ufffd")
    # So a reward that reads text gets whole characters on both sides.
    from stars.prompt import parse_prompt
    assert parse_prompt({"prompt_token_ids": [1, a, first]}, ours, 1000).text == "a"


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte."""
    vocab = tokenizer._backend.get_vocab()
    if "<0x00>" in vocab:
        return [vocab[f"<0x{byte:02X}>"] for byte in data]
    return [vocab[character] for character in byte_level_alphabet(data)]


def byte_level_alphabet(data: bytes) -> str:
    """GPT-2's characters for bytes: those that print are themselves, the others follow from U+0100 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return "".join(chr(byte) if byte in printed else chr(256 + others.index(byte)) for byte in data)


# -- characters of several tokens -------------------------------------------------------------------------------------


def test_decoding_of_broken_bytes_by_hand(loaded):
    ours, theirs = loaded["fallback"]
    a, b = (ours.encode(text, False)[-1] for text in "ab")
    for data, text in ((b"\xe4", "\ufffd"), (b"\xe4\xbd", "\ufffd"), ("你".encode() + b"\xe5", "你\ufffd"),
                       (b"\xff" + "é".encode(), "\ufffdé"), (b"\xe4\xff\xbd", "\ufffd\ufffd\ufffd"),
                       (b"\xf0\x9f\x99", "\ufffd"), ("🙂\n".encode(), "🙂\n")):
        assert ours.decode(byte_ids(ours, data)) == text
        assert ours.decode([a, *byte_ids(ours, data), 4, b]) == "a" + text + "b"
        if "\ufffd" not in text:
            assert theirs.decode(byte_ids(ours, data)) == text
    assert ours.decode([4, *byte_ids(ours, b"\xe4")], skip_special_tokens=False) == "<|end|>\ufffd"
    assert hold_back("ab\ufffd", ()) == "ab" and hold_back("ab\ufffd\ufffd", ()) == "ab\ufffd"
    assert finished("\ufffd") == "" and finished("a") == "a"


@pytest.mark.parametrize("kind", ["fallback", "byte level"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
          derandomize=True)
@given(data=st.lists(st.one_of(st.sampled_from([*map(str.encode, "aé東🙂\ufffd ")]), st.binary(min_size=1, max_size=3)),
                     max_size=8).map(b"".join),
       cut=st.integers(0, 6), stops=st.lists(st.sampled_from(["東", "a東", "\ufffda", "é🙂 "]), max_size=2))
def test_text_is_that_of_the_bytes_and_never_taken_back(loaded, kind, data, cut, stops):
    """Whatever bytes a model writes: their text is Python's, each streamed text begins with the one before."""
    ours, _ = loaded[kind]
    ids = byte_ids(ours, data)
    assert ours.decode(byte_ids(ours, b"a") + ids)[1:] == data.decode(errors="replace")
    detokenizer, response = Detokenizer(ours, [1, *ids[:cut]]), ids[cut:]
    texts = [detokenizer.decode(response[:count]) for count in range(len(response) + 1)]
    shown = [hold_back(text, stops) for text in texts]
    assert all(later.startswith(earlier) for earlier, later in pairwise([*shown, texts[-1]]))
    # No more is held back than one character, which the bytes so far leave open, and the start of a stop string.
    assert all(len(text) - len(hold_back(text, ())) <= 1 for text in texts)
    # A stop string is found with the token that completes it, whatever follows.
    expected = next((count for count, text in enumerate(texts) if find_stop(finished(text), stops)), None)
    cut_there = cut_at_stop(detokenizer, [], response, stops)
    assert (None if cut_there is None else cut_there[0]) == (expected or None)


# -- whole engines ----------------------------------------------------------------------------------------------------


def scripted(tokenizer: Tokenizer, script: list[int], prompt: list[int], reward=None, **options) -> stars.Engine:
    """An engine whose model writes `script` after `prompt`, then EOS (2)."""
    return scripted_engine(tokenizer, tokenizer.vocab_size, script, len(prompt), reward, eos=2, **options)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_everything_that_reads_text_gets_its_spaces(loaded, size):
    """Outputs, streams, rewards and the trace: prompt and response are what transformers decodes from both."""
    ours, theirs = loaded["fallback"]
    prompt = ours.encode("This film was", False)
    script = [token for word in ("great", "the", "movie") for token in ours.encode(word, False)]
    seen = []
    reward = stars.FunctionReward(lambda p, responses: [seen.append((p, r)) or 1.0 for r in responses])
    engine = scripted(ours, script, prompt, reward)
    policy = stars.STARS(segment_size=size, alpha=1.0, reward_threshold=0.0, width=1)
    outputs = list(engine.stream("This film was", stars.SamplingParams(max_tokens=8), policy))
    completion = outputs[-1].outputs[0]
    assert completion.text == " great the movie" and completion.finish_reason == "stop"
    assert outputs[-1].prompt_token_ids == prompt
    assert theirs.decode(prompt + completion.token_ids, skip_special_tokens=True) == "This film was" + completion.text
    assert {p for p, _ in seen} == {"This film was"} and seen[-1][1] == " great the movie"
    assert all(" great the movie".startswith(r) and r.startswith(" great") for _, r in seen)
    segments = request_trace(outputs[-1], ours).completions[0].segments
    assert "".join(segment.committed.text for segment in segments) == completion.text
    if size == 1:
        assert [segment.committed.text for segment in segments] == [" great", " the", " movie", ""]


@pytest.mark.parametrize("size", [1, 4])
def test_a_reward_model_of_another_vocabulary_reads_the_spaces(loaded, size):
    """Its reward is that of the whole text, encoded in its own way; after an unfinished character, of what is whole."""
    ours, theirs = loaded["fallback"]
    other, _ = loaded["byte level"]
    rm = ToyModel(vocab=other.vocab_size, seed=9, head="reward", eos=(2,))
    prompt = ours.encode("This film was", False)
    east = byte_ids(ours, "東京".encode())
    script = [*ours.encode("great", False), *ours.encode("the", False), *east]
    engine = scripted(ours, script, prompt, CausalReward(rm.decoder(), tokenizer=other))
    policy = stars.STARS(segment_size=size, alpha=1.0, reward_threshold=-1e4, width=1)
    [output] = engine.generate("This film was", stars.SamplingParams(max_tokens=20), policy, use_tqdm=False)
    assert output.outputs[0].text == " great the東京" and len(output.outputs[0].segments) == math.ceil(9 / size)
    kept = list(prompt)
    for segment in output.outputs[0].segments:
        kept += segment.token_ids
        text = theirs.decode(kept, skip_special_tokens=True)
        whole = "This film was great the"
        if text.startswith(whole):  # the bytes behind it by Python's decoder: transformers' replaces the whole run
            tail = bytes(token - 5 for token in kept[len(prompt) + 2 :] if token != 2)
            text = whole + tail.decode(errors="ignore")
        assert segment.reward == pytest.approx(rm.reward(other.encode(text)), abs=1e-4), text
    engine.check_integrity()


def test_a_stop_string_does_not_reach_into_the_prompt(loaded):
    """The prompt ends in "gre", the response begins with "at": no "great" was written."""
    for kind in ("fallback", "byte level"):
        ours, _ = loaded[kind]
        gre, at = ours.encode("gre", False)[-1:], ours.encode("great", False)[-1:]
        at = [ours._backend.token_to_id("at")]
        engine = scripted(ours, at * 3, [1, *gre])
        params = stars.SamplingParams(max_tokens=8, stop=["great", " at", "eat"])
        [output] = engine.generate({"prompt_token_ids": [1, *gre]}, params, use_tqdm=False)
        assert output.outputs[0].text == "atatat" and output.outputs[0].stop_reason is None


def test_a_stop_string_that_is_a_special_token(loaded):
    """Its id ends the response; the text never had it; the reason is the string."""
    ours, _ = loaded["byte level"]
    film, was = (ours.encode(text, False) for text in ("film", " was"))
    script = [*film, *was, 4, *film]
    engine = scripted(ours, script, [1])

    def run(**options):
        [output] = engine.generate({"prompt_token_ids": [1]}, stars.SamplingParams(max_tokens=12, **options),
                                   use_tqdm=False)
        completion = output.outputs[0]
        return completion.text, completion.token_ids[-1], completion.finish_reason, completion.stop_reason

    assert run() == ("film wasfilm", 2, "stop", None)
    assert run(stop="<|end|>") == run(stop=["zebra", "<|end|>"]) == ("film was", 4, "stop", "<|end|>")
    assert run(stop=["<|end|>", "lm w"]) == ("fi", was[-1], "stop", "lm w")
    assert run(stop=["</s>"]) == ("film wasfilm", 2, "stop", None)  # the model's own EOS
    assert run(stop=["</s>"], ignore_eos=True) == ("film wasfilm", 2, "stop", "</s>")
    assert run(stop_token_ids=[4]) == ("film was", 4, "stop", 4)
    with pytest.raises(RequestError, match=r"the stop string '\\n<\|end\|>' contains the special token '<\|end\|>'"):
        run(stop=["\n<|end|>"])
    assert stop_tokens(ours, ["<|end|>", "x"], 5) == {4: "<|end|>"}
    assert stop_tokens(ours, ["<|end|>", "x"], 4) == {}  # an id that the model does not have
    assert stop_tokens(object(), ["<|end|>"], 9) == {}  # another tokenizer, which does not say


# Tokens of a vocabulary like real ones: stop strings begin, end and lie inside of them.
PIECES = ["</s>", "<s>", "ab", "a", "b", "cab", "bc ", " c", "abcab", "ca", "é", " "]


class Pieces:
    """A tokenizer of PIECES, each put right behind the other."""

    has_chat_template, eos_token_id, special_tokens = False, 0, {"</s>": 0, "<s>": 1}

    def encode(self, text, add_special_tokens=True):
        raise AssertionError("prompts are given as ids")

    def decode(self, ids, skip_special_tokens=True):
        return "".join(PIECES[token] for token in ids if token > 1)


TOY = ToyModel(vocab=len(PIECES), seed=3, eos=(0,), sharpness=1.5)
PROMPT = [1, 4, 2]


def log_probability(ids: list[int], place: int) -> float:
    """Of response token `place`, in float64 by the formulas."""
    logits = TOY.logits(PROMPT + ids[:place])
    return logits[ids[place]] - (math.log(np.exp(logits - logits.max()).sum()) + logits.max())


def by_hand(free: list[int], stops: list[str], stop_ids: tuple[int, ...]) -> tuple:
    """(token ids, text, stop reason) of a response that would be `free` if nothing stopped it."""
    text = ""
    for count, token in enumerate(free, start=1):
        if token in stop_ids:
            return free[:count], text, None if token == 0 else token
        text += PIECES[token] if token > 1 else ""
        found = [(text.index(stop), stop) for stop in stops if stop in text]
        if found:
            return free[:count], text[: min(found)[0]], min(found)[1]
    return free, text, None


@pytest.mark.parametrize("size", [1, 3, 16])
def test_stop_strings_in_tokens_of_several_characters(size):
    """Tokens, text, reason, cumulative_logprob and the reward of what is kept, against a search by hand."""
    rewarding = stars.FunctionReward(lambda prompt, responses: [float(len(r)) for r in responses])
    policy = stars.STARS(segment_size=size, alpha=1.0, reward_threshold=-5.0, width=1)
    engine = toy_engine(TOY, rewarding, tokenizer=Pieces())
    cases = [["bca"], ["ab", "abc"], ["c", "bca", "cab"], [" c", "c ", "b"], ["é"], ["aba", "cab"], ["zz", "  "]]
    stopped = several = ended = 0
    for stops in cases:
        for stop_ids in ((), (5,), (7, 3)):
            params = stars.SamplingParams(max_tokens=13, n=4, seed=len(stops), stop=stops, stop_token_ids=stop_ids)
            free_params = stars.SamplingParams(max_tokens=13, n=4, seed=len(stops), ignore_eos=True)
            [output] = engine.generate({"prompt_token_ids": PROMPT}, params, policy, use_tqdm=False)
            [free] = engine.generate({"prompt_token_ids": PROMPT}, free_params, policy, use_tqdm=False)
            for completion, unstopped in zip(output.outputs, free.outputs, strict=True):
                kept, text, reason = by_hand(unstopped.token_ids, stops, (0, *stop_ids))
                assert (completion.token_ids, completion.text, completion.stop_reason) == (kept, text, reason)
                assert completion.finish_reason == ("stop" if reason is not None or kept[-1] == 0 else "length")
                expected = sum(log_probability(kept, place) for place in range(len(kept)))
                assert completion.cumulative_logprob == pytest.approx(expected, abs=1e-4)
                assert completion.reward == len(text)
                assert [token for segment in completion.segments for token in segment.token_ids] == kept
                stopped += isinstance(reason, str)
                ended += isinstance(reason, int)
                full = "".join(PIECES[token] for token in kept if token > 1)
                several += isinstance(reason, str) and sum(stop in full for stop in stops) > 1
    assert stopped > 20 and several > 2 and ended > 5


def test_several_stop_strings_complete_in_one_token():
    """The one that begins first is the reason, and the text ends before it; of two there the shorter one."""
    assert find_stop("xabcab", ["cab", "bc"]) == (2, "bc")
    assert find_stop("xabc", ["abc", "ab"]) == (1, "ab")
    pieces = Detokenizer(Pieces(), PROMPT)
    assert cut_at_stop(pieces, [10], [10, 8, 3], ["cab", "bc"]) == (2, "bc")
    assert cut_at_stop(pieces, [3], [4, 9, 2], ["bca"]) == (2, "bca")  # begins in what is committed and drafted
    assert cut_at_stop(pieces, [], [3], ["ba"]) is None  # the prompt's b
    assert cut_at_stop(pieces, [], [], ["a"]) is None


def test_scoring_behind_the_draft_beside_stop_strings(monkeypatch):
    """Where scoring follows drafts, requests with stop strings wait for the host: all get what they get without."""
    prompts = [{"prompt_token_ids": PROMPT}] * 3
    params = [stars.SamplingParams(max_tokens=12, n=2, seed=7, stop=stop) for stop in (["bc", "ca"], None, ["<s>"])]
    policy = stars.STARS(4, 3, 0.5, 0.2, 2.5, width=3)

    def run():
        rm = ToyModel(vocab=len(PIECES), seed=8, head="reward", eos=(0,))
        engine = toy_engine(TOY, CausalReward(rm.decoder(), tokenizer=Same()), tokenizer=Same())
        outputs = engine.generate(prompts, params, policy, use_tqdm=False)
        engine.check_integrity()
        return [[(c.token_ids, c.text, c.finish_reason, c.stop_reason, round(c.reward, 4), len(c.segments))
                 for c in output.outputs] for output in outputs], outputs

    before, outputs = run()
    work_as(monkeypatch, PADDED)
    assert run()[0] == before
    reasons = [c.stop_reason for output in outputs for c in output.outputs]
    assert set(reasons) & {"bc", "ca", "<s>"}
    for output in outputs:
        for c in output.outputs:
            expected = sum(log_probability(c.token_ids, place) for place in range(len(c.token_ids)))
            assert c.cumulative_logprob == pytest.approx(expected, abs=1e-4)


class Same(Pieces):
    """The same vocabulary for both models."""

    def same_vocabulary(self, other):
        return True


# -- EOS --------------------------------------------------------------------------------------------------------------


def test_the_tokenizers_eos_ends_a_response(loaded):
    """Beside the model's own, unless EOS is ignored or the model has no such id."""
    ours, _ = loaded["byte level"]
    film = ours.encode("film", False)

    def run(eos, **options):
        class Named:
            eos_token_id, decode, encode, vocab_size = eos, ours.decode, ours.encode, ours.vocab_size

        engine = scripted(Named(), [*film, 4, *film], [1])
        assert engine._intake._eos_token_ids == ((2, 4) if eos == 4 else (2,))
        [output] = engine.generate({"prompt_token_ids": [1]}, stars.SamplingParams(max_tokens=12, **options),
                                   use_tqdm=False)
        completion = output.outputs[0]
        return completion.text, completion.token_ids, completion.stop_reason

    assert run(4) == ("film", [*film, 4], None)
    assert run(None) == run(2) == run(ours.vocab_size) == ("filmfilm", [*film, 4, *film, 2], None)
    assert run(4, ignore_eos=True, stop_token_ids=[2]) == ("filmfilm", [*film, 4, *film, 2], 2)


# -- special tokens of every file -------------------------------------------------------------------------------------


def assert_same_tokens(path: Path) -> None:
    """Every token and flag as transformers has them after loading the same directory."""
    import transformers

    ours, theirs = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    assert ours._backend.get_vocab(True) == theirs.get_vocab()
    ours_added, theirs_added = ours._backend.get_added_tokens_decoder(), theirs.added_tokens_decoder
    assert {index: repr(token) for index, token in ours_added.items()} == {
        index: repr(token) for index, token in theirs_added.items()}
    assert ours._special_tokens == theirs.special_tokens_map
    text = "".join(theirs.get_added_vocab()) + " This<|a|>film <|b|>"
    assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
    ids = ours.encode(text, False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


NEW = ["<|a|>", "<|b|>", "<|c|>", "<|d|>", "film", "<|end|>", "at"]
FLAGGED = st.builds(lambda content, flags: {"content": content, **flags}, st.sampled_from(NEW), st.fixed_dictionaries(
    {}, optional={name: st.booleans() for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}))
TYPED = FLAGGED.map(lambda token: {"__type": "AddedToken", **token})
LISTED = st.lists(st.one_of(st.sampled_from(NEW), TYPED), max_size=3, unique_by=str)
CONFIG = st.fixed_dictionaries({}, optional={
    "additional_special_tokens": LISTED,
    "extra_special_tokens": st.one_of(LISTED, st.dictionaries(st.sampled_from(["a_token", "b_token"]),
                                                              st.sampled_from(NEW), max_size=2)),
    "eos_token": st.one_of(st.sampled_from(NEW), TYPED), "pad_token": st.sampled_from([None, *NEW]),
    "image_token": st.sampled_from(NEW), "audio_token": TYPED, "add_bos_token": st.booleans(),
    "added_tokens_decoder": st.dictionaries(st.sampled_from(["2", "400", "401", "1000"]), FLAGGED, max_size=3),
})
MAP = st.fixed_dictionaries({}, optional={
    "additional_special_tokens": st.lists(st.sampled_from(NEW), max_size=3, unique=True),
    "extra_special_tokens": st.one_of(st.lists(st.sampled_from(NEW), max_size=2, unique=True),
                                      st.dictionaries(st.sampled_from(["a_token", "c_token"]), st.sampled_from(NEW))),
    "eos_token": st.one_of(st.sampled_from(NEW), FLAGGED), "bos_token": st.sampled_from([None, "<|d|>"]),
    "image_token": st.sampled_from(NEW),
})
ADDED = st.dictionaries(st.sampled_from(NEW), st.integers(3, 500), max_size=4).filter(
    lambda tokens: len(set(tokens.values())) == len(tokens))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save(byte_level_tokenizer(), tmp_path_factory.mktemp("added"))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
          derandomize=True)
@example({"eos_token": {"__type": "AddedToken", "content": "<|c|>", "lstrip": True}, "audio_token": {
    "__type": "AddedToken", "content": "<|c|>", "lstrip": True, "normalized": True}}, None, None)
@given(config=CONFIG, older=st.one_of(st.none(), MAP), added=st.one_of(st.none(), ADDED))
def test_added_tokens_are_those_of_transformers(plain, config, older, added):
    """Whichever files name them, alone or against each other: ids, flags and names."""
    files = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **config},
             "special_tokens_map.json": older, "added_tokens.json": added}
    for name, content in files.items():
        if content is None:
            (plain / name).unlink(missing_ok=True)
        else:
            (plain / name).write_text(json.dumps(content))
    assert_same_tokens(plain)


@pytest.mark.parametrize("file, content", [
    ("tokenizer_config.json", {"eos_token": 5}), ("tokenizer_config.json", {"pad_token": {"content": None}}),
    ("tokenizer_config.json", {"additional_special_tokens": "<|a|>"}),
    ("tokenizer_config.json", {"extra_special_tokens": [None]}),
    ("tokenizer_config.json", {"extra_special_tokens": {"a_token": [1]}}),
    ("tokenizer_config.json", {"added_tokens_decoder": None}),
    ("tokenizer_config.json", {"added_tokens_decoder": ["<|a|>"]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "<|a|>"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": 3}}}),
    ("tokenizer_config.json", {"eos_token": "\ud800"}),
    ("special_tokens_map.json", {"extra_special_tokens": 4}), ("special_tokens_map.json", {"bos_token": ["<s>"]}),
    ("added_tokens.json", {"<|a|>": "x"}), ("added_tokens.json", {"<|a|>": None}), ("added_tokens.json", {"<|a|>": -1}),
    ("added_tokens.json", []),
])
def test_special_tokens_of_a_wrong_form(tmp_path, file, content):
    path = save(byte_level_tokenizer(), tmp_path / "t")
    (path / file).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=f"{path}.*: "):
        load_tokenizer(path)


def test_a_token_cannot_take_a_templates_variable(tmp_path):
    path = save(byte_level_tokenizer(), tmp_path / "t", extra_special_tokens={"messages": "<|a|>", "a_token": "<|b|>"},
                chat_template="{{ a_token }}{{ messages[0].content }}")
    assert load_tokenizer(path).apply_chat_template([{"role": "user", "content": "hi"}]) == "<|b|>hi"


# -- keys of messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [
    {"reasoning": "why"}, {"thinking": "why"}, {"reasoning_content": "why"}, {"reasoning": "", "thinking": None},
    {"reasoning_content": None, "reasoning": "a"}, {"thinking": "a", "reasoning": "b"},
    {"reasoning_content": "a", "thinking": "b", "reasoning": "c"}, {"tool_calls": None, "name": "x"},
    {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]},
    {"name": None, "extra": 1},
])
def test_keys_of_messages_are_those_that_transformers_gives(tmp_path, keys):
    import transformers

    path = save(byte_level_tokenizer(), tmp_path / "t", bos_token="<s>")
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m | tojson }};{% endfor %}")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes", **keys}]
    given_before = json.dumps(messages)
    expected = transformers.AutoTokenizer.from_pretrained(path).apply_chat_template(messages, tokenize=False)
    assert load_tokenizer(path).apply_chat_template(messages, add_generation_prompt=False) == expected
    assert json.dumps(messages) == given_before
